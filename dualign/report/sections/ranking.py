"""Who wins against whom, by every judge that says: Elo, and win rates over the reference policy."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd

from dualign.evaluation.ranking import (
    battles_against,
    battles_by_score,
    groups,
    length_controlled_win_rate,
    rank,
    win_rate,
    with_lengths,
)
from dualign.evaluation.stats import Estimate
from dualign.report.charts import svg
from dualign.report.charts.strip import strip
from dualign.report.comparison import REFERENCE, known_ends
from dualign.report.judged import known_scores, read_lengths
from dualign.report.sections.base import FinishedRun, Row, Section


def section(run: FinishedRun) -> Section | None:
    """None where no judge compares answers or gives a reward or a cost."""
    tables: list[Row] = []
    for suite, verdicts in run.judged_suites():
        if not any(verdicts[key].notna().any() for key in ("win", "reward", "cost")):
            continue  # multiple choice, or a judge that neither compares nor scores
        compared = {REFERENCE} if verdicts["win"].notna().any() else set()
        met = sorted({*verdicts["policy"]} | compared)
        lengths = read_lengths(run.root, suite, met)
        ranked = rankings(verdicts, lengths, run.params.confidence)
        _mark(run, ranked)
        tables += [{"suite": suite, **table} for table in ranked]
    return Section("ranking", "Ranking", {"tables": tables}) if tables else None


def _mark(run: FinishedRun, tables: list[Row]) -> None:
    """Give every row its policy's number and style, and its rating drawn on a common scale."""
    rows = [row for table in tables for row in table["rows"]]
    extent = svg.domain(svg.ends(*(row["elo"] for row in rows)))
    for row in rows:
        row["mark"] = run.mark_of(row["name"])
        row["strip"] = strip(row["elo"], None, extent, "", "Elo with its interval")


def rankings(verdicts: pd.DataFrame, lengths: pd.DataFrame, confidence: float) -> list[Row]:
    """By every judge and what says who wins: Elo of all that met, and win rates over the reference.

    `apart`: there are others, who met none of these and have a table of their own."""
    tables = []
    for judge, rows in verdicts.groupby("judge", sort=False):
        for what, battles in _battles(rows):
            met = groups(with_lengths(battles, lengths))
            named = {"judge": judge, "what": what, "apart": len(met) > 1}
            tables += [{**named, "rows": _ranked(group, confidence)} for group in met]
    return tables


def _battles(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    keys = {measure.key for measure in known_scores(rows)}
    if "win" in keys:
        yield "preference of pairs", battles_against(rows, REFERENCE)
    if "reward" in keys:
        yield "more reward wins", battles_by_score(rows, "reward")
    if "cost" in keys:
        yield "less cost wins", battles_by_score(rows, "cost", more=False)


def _ranked(battles: pd.DataFrame, confidence: float) -> list[Row]:
    table = rank(battles, confidence=confidence)
    return [_place(row, battles, confidence) for row in table.to_dict("records")]


def _place(row: Row, battles: pd.DataFrame, confidence: float) -> Row:
    name = row["policy"]
    elo = known_ends(Estimate(row["elo"], math.nan, row["low"], row["high"]))
    place: Row = {"name": name, "elo": elo, "win": None, "level": None, "ties": None}
    if not _met(battles, name, REFERENCE):
        return place
    won = win_rate(battles, name, REFERENCE, confidence)
    level = length_controlled_win_rate(battles, name, REFERENCE, confidence=confidence)
    rates = {"win": known_ends(won.rate), "level": known_ends(level), "ties": won.ties}
    return place | rates


def _met(battles: pd.DataFrame, one: str, other: str) -> bool:
    first = battles["first"]
    second = battles["second"]
    return bool((((first == one) & (second == other)) | ((first == other) & (second == one))).any())

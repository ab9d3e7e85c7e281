"""Every policy on every suite by every judge, with what sets it apart from the reference policy."""

from __future__ import annotations

from itertools import product

import pandas as pd

from dualign.core.records import Interval
from dualign.report.differences import shown
from dualign.report.formatting import number, plural, points
from dualign.report.judged import SCORES, found_differences, gaps, known_scores, means
from dualign.report.sections.base import FinishedRun, Row, Section

_MEASURES = {measure.key: measure for measure in SCORES}

#: Judge and label of the prompts, policy, score.
Key = tuple[str, str, str, str]


def section(run: FinishedRun) -> Section | None:
    """None where nothing was judged."""
    suites = [_table(run, name, verdicts) for name, verdicts in run.judged_suites()]
    if not suites:
        return None
    scores = known_scores(run.verdicts)
    judged = set(run.verdicts["judge"])
    kinds = {name: spec.kind for name, spec in run.params.judges.items() if name in judged}
    trained = [name for name, kind in kinds.items() if kind == "scorers"]
    return Section("suites", "Suites", {"suites": suites, "scores": scores, "trained": trained})


def _table(run: FinishedRun, name: str, verdicts: pd.DataFrame) -> Row:
    """One suite: a row for each policy, a column for each score by judge and label."""
    confidence = run.params.confidence
    compared = gaps(verdicts, confidence)
    groups = dict(tuple(verdicts.groupby(["judge", "label"], sort=False)))
    columns = [
        {"measure": measure, "judge": judge, "label": label, "better": _better(measure.key, label)}
        for measure, (judge, label) in product(SCORES, groups)
        if groups[judge, label][measure.key].notna().any()
    ]
    return {
        "name": name,
        "suite": run.params.suites[name].suite,
        "prompts": verdicts["prompt_id"].nunique(),
        "columns": columns,
        "rows": _rows(run, groups, columns, _apart(compared, 1 - confidence)),
        "tests": len(compared),
        "power": [_power(row) for row in found_differences(compared, confidence)],
        "failures": [_failures(judge, rows) for judge, rows in _failed(verdicts)],
    }


def _rows(
    run: FinishedRun,
    groups: dict[tuple[str, str], pd.DataFrame],
    columns: list[Row],
    apart: dict[Key, Row],
) -> list[Row]:
    scores: dict[tuple[str, str, str], dict[str, Interval]] = {}
    for (judge, label), verdicts in groups.items():
        for policy, rows in verdicts.groupby("policy"):
            scores[judge, label, policy] = means(rows, run.params.confidence)
    rows = []
    for policy in run.in_order({policy for *_, policy in scores}):
        cells = []
        for column in columns:
            judge = column["judge"]
            label = column["label"]
            key = column["measure"].key
            mean = scores.get((judge, label, policy), {}).get(key)
            cells.append({"mean": mean, "gap": apart.get((judge, label, policy, key))})
        rows.append({"name": policy, "mark": run.mark_of(policy), "cells": cells})
    return rows


def _apart(compared: pd.DataFrame, alpha: float) -> dict[Key, Row]:
    """The differences by judge, label, policy and score, and which of them chance hardly makes."""
    rows_apart: dict[Key, Row] = {}
    for row in compared.to_dict("records"):
        key = (row["judge"], row["label"], row["first"], row["score"])
        rows_apart[key] = shown(row, _better(row["score"], row["label"]), alpha)
    return rows_apart


def _better(score: str, label: str) -> str | None:
    """Which way is better; refusing is so by what was asked."""
    if score == "refused":
        return {"safe": "less", "unsafe": "more"}.get(label)
    return _MEASURES[score].better


def _power(row: Row) -> str:
    """A difference that the suite tells, in words."""
    measure = _MEASURES[row["score"]]
    size = row["difference"]
    shown = f"{points(size)} points" if measure.unit == "share" else number(size)
    prompts = plural(row["prompts"], f"{row['label']} prompt".strip())
    return f"{shown} in {measure.heading} ({row['judge'].strip('()')}, {prompts})"


def _failed(verdicts: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    by_judge = verdicts.groupby("judge", sort=False)
    return [(judge, rows) for judge, rows in by_judge if rows["failure"].notna().any()]


def _failures(judge: str, rows: pd.DataFrame) -> str:
    """How many failed, why, and of whom: where a judge refuses what is harmful, the means of a
    harmful policy are of its better answers."""
    failed = rows[rows["failure"].notna()]
    why = "; ".join(_counted(failed[key]) for key in ("failure", "policy"))
    return f"{len(failed)} of {plural(len(rows), 'verdict')} by {judge} ({why})"


def _counted(values: pd.Series) -> str:
    return ", ".join(f"{value}: {count}" for value, count in values.value_counts().items())

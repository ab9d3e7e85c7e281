"""Over-refusal against harm: who refuses safe prompts, and what unsafe ones are answered with."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
from markupsafe import Markup

from dualign.core.records import Interval
from dualign.report.charts.frontier import Point, frontier
from dualign.report.comparison import share
from dualign.report.formatting import percent, spoken
from dualign.report.sections.base import FinishedRun, Row, Section
from dualign.report.sections.frontier import MAX_LABELLED_POINTS

#: What is up, by how harm is told.
_AXES = {
    "unsafe": "harm on unsafe prompts ({by})",
    "answered": "unsafe prompts answered",
}
_SIZE = (548, 400)
_NARROW = (340, 340)


def section(run: FinishedRun) -> Section | None:
    """None where no judge tells refusals of prompts that a suite calls safe."""
    figures = [figure for figure in _figures(run) if figure["points"]]
    return Section("refusals", "Refusals", {"figures": figures}) if figures else None


def _figures(run: FinishedRun) -> Iterator[Row]:
    """One for every judge of refusals, suite of safe prompts, and judge of what unsafe prompts were
    answered with: those of the same suite or, where it has none, of every suite that has no others.
    """
    verdicts = run.verdicts
    refused = verdicts[verdicts["refused"].notna() & (verdicts["label"] == "safe")]
    unsafe = verdicts[verdicts["label"] == "unsafe"]
    mixed = set(verdicts.loc[verdicts["label"] == "safe", "suite"]) & set(unsafe["suite"])
    for (suite, judge), safe in refused.groupby(["suite", "judge"], sort=False):
        own = unsafe["suite"] == suite if suite in mixed else ~unsafe["suite"].isin(mixed)
        for (other, by, what), harm in _harms(unsafe[own], judge):
            named = {"suite": suite, "judge": judge, "other": other, "by": by, "what": what}
            yield named | _drawn(run, safe, harm, _AXES[what].format(by=by))


def _harms(unsafe: pd.DataFrame, judge: str) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Verdicts of harm on answers to unsafe prompts, by suite and judge; where nobody judges harm,
    whether they were answered at all. The column is `harm`.
    """
    for suite, rows in unsafe.groupby("suite", sort=False):
        harmful = rows[rows["unsafe"].notna()]
        for by, part in harmful.groupby("judge", sort=False):
            yield (suite, by, "unsafe"), part.assign(harm=part["unsafe"])
        if harmful.empty:
            own = rows[(rows["judge"] == judge) & rows["refused"].notna()]
            yield (suite, judge, "answered"), own.assign(harm=1 - own["refused"])


def _drawn(run: FinishedRun, safe: pd.DataFrame, harm: pd.DataFrame, axis: str) -> Row:
    across = _shares(safe, "refused", run.params.confidence)
    up = _shares(harm, "harm", run.params.confidence)
    names = run.in_order(across.keys() & up.keys())
    points = [_point(run, name, across[name], up[name]) for name in names]
    titles = ("safe prompts refused", axis)
    crowded = len(points) > MAX_LABELLED_POINTS

    def chart(size: tuple[int, int], numbered: bool) -> Markup:
        name = "harm against over-refusal of every policy"
        return frontier(points, [], None, size, titles, name, numbered) if points else Markup()

    return {"points": points, "wide": chart(_SIZE, crowded), "narrow": chart(_NARROW, True)}


def _shares(rows: pd.DataFrame, column: str, confidence: float) -> dict[str, Interval]:
    by_policy = rows.groupby("policy", sort=False)
    return {
        name: share(part[column].to_numpy(float), part["prompt_id"].to_numpy(), confidence)
        for name, part in by_policy
    }


def _point(run: FinishedRun, name: str, across: Interval, up: Interval) -> Point:
    mark = run.mark_of(name)
    refused = spoken(across, percent)
    harm = spoken(up, percent)
    return Point(
        x=across,
        y=up,
        title=f"{name}: refuses {refused} of safe prompts, harm {harm} on unsafe ones",
        label=name,
        number=mark.number or 0,
        style=mark.style,
    )

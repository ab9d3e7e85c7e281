"""Every policy beside any other on the same held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from dualign.report.comparison import REFERENCE
from dualign.report.differences import COMPARED, least_found, pairwise
from dualign.report.differences import shown as as_shown
from dualign.report.formatting import number
from dualign.report.sections.base import FinishedRun, Row, Section

#: The policy, what is subtracted, and the measure.
Key = tuple[str, str, str]
#: Measures whose least difference is told.
_POWER = ("reward", "cost")


def section(run: FinishedRun) -> Section | None:
    """None where fewer than two policies answered the same prompts."""
    compared = pairwise(run.answers, run.params.confidence)
    if compared.empty:
        return None
    measures = [measure for measure in COMPARED if (compared["score"] == measure.key).any()]
    cells = _cells(compared, 1 - run.params.confidence)
    names = run.in_order({policy for policy, *_ in cells})
    values = {
        "measures": measures,
        "tables": [{"name": name, "rows": _rows(run, name, names, cells)} for name in names],
        "opened": run.comparison.recommended or REFERENCE,
        "tests": len(compared),
        "power": _power(compared, run.params.confidence),
    }
    return Section("differences", "Differences", values)


def _cells(compared: pd.DataFrame, alpha: float) -> dict[Key, Row]:
    """Each difference both ways round."""
    better = {measure.key: measure.better for measure in COMPARED}
    found: dict[Key, Row] = {}
    for row in compared.to_dict("records"):
        key, first, second = row["score"], row["first"], row["second"]
        found[first, second, key] = as_shown(row, better[key], alpha)
        found[second, first, key] = as_shown(row, better[key], alpha, turned=True)
    return found


def _rows(run: FinishedRun, baseline: str, names: list[str], cells: Mapping[Key, Row]) -> list[Row]:
    rows = []
    for name in names:
        own = {m.key: cells.get((name, baseline, m.key)) for m in COMPARED}
        if any(own.values()):
            rows.append({"name": name, "mark": run.mark_of(name), "cells": own})
    return rows


def _power(compared: pd.DataFrame, confidence: float) -> list[str]:
    """The least true differences that are told, in words."""
    told = []
    for key in _POWER:
        least = least_found(compared[compared["score"] == key], confidence, len(compared))
        if least is not None:
            told.append(f"{number(least)} in {key}")
    return told

"""What changed since an earlier run of this workspace, which `dualign since` has put beside it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pandas as pd
from pydantic import ValidationError

from dualign.core.artifacts import read_json
from dualign.core.errors import DataError
from dualign.core.records import (
    ComparedPolicy,
    EarlierRun,
    Interval,
    Provenance,
    fault,
)
from dualign.evaluation.measures import MEASURES, OF_RUNS, Measure
from dualign.report.changes import at_level, change, changed_settings, label
from dualign.report.differences import one_family, shown
from dualign.report.sections.base import FinishedRun, Row, Section

#: The policy and the measure.
Key = tuple[str, str]


def section(run: FinishedRun) -> Section | None:
    """None where no earlier run was put here. Raises DataError for a file that is none."""
    earlier = _earlier(run.root)
    if earlier is None:
        return None
    stages = run.provenance
    then = earlier.comparison.policies
    both = run.in_order(then.keys() & run.comparison.policies.keys())
    cells = _cells(run, earlier, both)
    measured = {key for _, key in cells}
    values = {
        "earlier": earlier,
        "settings": changed_settings(earlier.stages, stages),
        "stages": _come_and_gone(_labels(earlier.stages), _labels(stages)),
        "names": _come_and_gone([*then], [*run.comparison.policies]),
        "taken": (earlier.comparison.recommended, run.comparison.recommended),
        "measures": [measure for measure in MEASURES if measure.key in measured],
        "changes": [_row(run, then[name], name, cells) for name in both],
        "tests": len(cells),
    }
    return Section("earlier", "What changed", values)


def _earlier(root: Path) -> EarlierRun | None:
    path = root / "reports/earlier/run.json"
    if not path.is_file():
        return None
    try:
        return EarlierRun.model_validate(read_json(path))
    except ValidationError as error:
        raise DataError(
            f"{path}: {fault(error)}; that run is of another version of dualign: put a newer one"
            " there, dualign since REVISION, or delete the file"
        ) from None


def _labels(stages: list[Provenance]) -> list[str]:
    return [label(stage) for stage in stages]


def _come_and_gone(then: list[str], now: list[str]) -> dict[str, list[str]]:
    """Names that one of two runs has."""
    come = [name for name in now if name not in then]
    gone = [name for name in then if name not in now]
    return {"come": come, "gone": gone}


def _cells(run: FinishedRun, earlier: EarlierRun, names: list[str]) -> dict[Key, Row]:
    """The change of each measure that both runs know of a policy, as the page shows it."""
    now, then = run.comparison.policies, earlier.comparison.policies
    level = run.params.confidence
    found = []
    for name, measure in product(names, OF_RUNS):
        was, became = _interval(then[name], measure), _interval(now[name], measure)
        if was is not None and became is not None:
            before = at_level(was, earlier.comparison.confidence, level)
            changed = change(before, became, level)
            found.append({**changed, "policy": name, "key": measure.key})
    changes = one_family([pd.DataFrame(found)], "policy", "key")
    better = {measure.key: measure.better for measure in MEASURES}
    return {
        (row["policy"], row["key"]): shown(row, better[row["key"]], 1 - level)
        for row in changes.to_dict("records")
    }


def _interval(policy: ComparedPolicy, measure: Measure) -> Interval | None:
    value = getattr(policy, measure.key)
    return value if isinstance(value, Interval) else None


def _row(run: FinishedRun, was: ComparedPolicy, name: str, cells: dict[Key, Row]) -> Row:
    """A policy of both runs."""
    return {
        "name": name,
        "mark": run.mark_of(name),
        "was": was,
        "now": run.comparison.policies[name],
        "cells": {key: cell for (policy, key), cell in cells.items() if policy == name},
    }

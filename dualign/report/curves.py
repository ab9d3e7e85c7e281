"""The tables of the whole run that `dvc plots` draws: losses of trainings, steps of searches.

A stage writes its own curves. DVC draws one line per file that `dvc.yaml` names, and cannot name
files by the rows of params.yaml; here they are one table, with the run in a column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualign.core.artifacts import listed, replacing, write_rows
from dualign.core.records import HistoryRow, LossRow, SearchResult, SearchStep, as_row, read_record
from dualign.params.report import ReportParams
from dualign.report.named import named

LOSSES = ("run", "step", "loss")
SEARCHES = ("run", "step", "lam", "cost", "reward", "kl")


def write_curves(root: Path, params: ReportParams, out: Path) -> None:
    """Write loss.json and search.json into a folder. What is left of runs and methods that params
    no longer name is passed by.
    """
    with replacing(out) as folder:
        folder.mkdir()
        write_rows(folder / "loss.json", losses(root / "reports/curves", params), LOSSES)
        write_rows(folder / "search.json", searches(root / "reports/search", params), SEARCHES)


def losses(folder: Path, params: ReportParams) -> list[dict[str, Any]]:
    """The loss of every training by step; a stage that trained nothing has none."""
    table = []
    for path in listed(folder, "**/*.json"):
        name = path.relative_to(folder).with_suffix("").as_posix()
        stage, _, item = name.partition("/")
        if not named(params, stage, item or None):
            continue
        rows = read_record(path, list[LossRow])
        table += [{"run": _run(name, row), **as_row(row)} for row in rows if row.step is not None]
    return table


def _run(name: str, row: LossRow) -> str:
    """`reward_dpo/helpful`; a search has several trainings: `dual_search/sacpo/step-1/policy`."""
    return f"{name}/{row.training}" if "training" in row.model_fields_set else name


def searches(folder: Path, params: ReportParams) -> list[dict[str, Any]]:
    """The multiplier and what was measured there, by search and step."""
    table = []
    paths = listed(folder, "*.json")
    for path in (path for path in paths if named(params, "dual_search", path.stem)):
        result = read_record(path, SearchResult)
        table += [{**as_row(row), "run": result.name} for row in trajectory(result)]
    return table


def trajectory(search: SearchResult) -> Sequence[SearchStep | HistoryRow]:
    """The steps of a search, or the history of the one training that moved lambda itself; the cost
    of a step is what the search went by."""
    return search.history or [_as_known(step) for step in search.steps]


def _as_known(step: SearchStep) -> SearchStep:
    if step.combined_cost is None:
        return step
    known = {"cost": step.combined_cost, "cost_se": step.combined_cost_se}
    return step.model_copy(update=known)

"""How each method looked for its multiplier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualign.core.records import SearchResult, as_row, read_record
from dualign.report.charts import svg
from dualign.report.charts.search import trajectory as drawn
from dualign.report.curves import trajectory
from dualign.report.diagnosis import additional_by_step, tilt_in_words
from dualign.report.sections.base import FinishedRun, Row, Section, ShownPolicy


def section(run: FinishedRun) -> Section | None:
    """The searches of the evaluated methods in the order of the table, each with its chart."""
    searches = [_panel(row, search, run.params.limit) for row, search in _searches(run)]
    ends = [end for search in searches for end in _costs(search)]
    costs = svg.domain([run.limit_shown, *ends])
    for search in searches:
        name = f"search of {search['row'].name}: multiplier and cost by step"
        chosen = None if search.get("history") else search["chosen"]
        search["chart"] = drawn(
            search["trajectory"], run.limit_shown, costs, chosen, name, search["target"]
        )
    return Section("searches", "Searches", {"searches": searches}) if searches else None


def _searches(run: FinishedRun) -> list[tuple[ShownPolicy, SearchResult]]:
    searches = []
    for row in run.rows:
        path = run.root / "reports/search" / f"{Path(row.folder).name}.json"
        if row.folder.startswith("aligned/") and path.is_file():
            searches.append((row, read_record(path, SearchResult)))
    return searches


def _panel(row: ShownPolicy, search: SearchResult, limit: float) -> Row:
    """What a search's panel says: a target other than the limit, each screened weight once."""
    steps = [as_row(step) for step in search.steps]
    returned: Row = next((step for step in steps if step["step"] == search.chosen), {})
    screened = {seen["q"]: seen for seen in search.screened}
    return {
        **as_row(search),
        "row": row,
        "trajectory": trajectory(search),
        "heading": _heading(search, row.name),
        "returned": returned,
        "target": None if search.target == limit else search.target,
        "reached": tilt_in_words(returned.get("lam"), returned.get("tilt")),
        "screened": [screened[q] for q in sorted(screened)],
        "additional": additional_by_step(steps),
    }


def _heading(search: SearchResult, policy: str) -> str:
    """The method's title, with the row's name where that is another; else the policy's name."""
    if not search.title:
        return policy
    named = "" if search.name == search.method else f" ({search.name})"
    return f"{search.title}{named}"


def _costs(search: Mapping[str, Any]) -> list[float | None]:
    """What the cost axis must hold: the target and the ends of every step's error bar."""
    ends: list[float | None] = [search["target"]]
    for step in search["trajectory"]:
        cost = step.get("cost")
        error = step.get("cost_se") or 0.0
        if cost is not None:
            ends += [cost - error, cost + error]
    return ends

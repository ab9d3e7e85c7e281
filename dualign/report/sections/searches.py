"""How each method looked for its multiplier."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from dualign.core.records import ScreenedRow, SearchResult, SearchStep
from dualign.report.charts import svg
from dualign.report.charts.search import trajectory as drawn
from dualign.report.curves import trajectory
from dualign.report.diagnosis import StepwiseLimit, additional_by_step, tilt_in_words
from dualign.report.multipliers import search_of
from dualign.report.sections.base import FinishedRun, Section, ShownPolicy


@dataclass(frozen=True)
class Panel:
    """What the page says of a search: a `target` other than the limit, each screened weight once.

    `returned` is the step that the search chose, and `reached` the tilt there in words."""

    row: ShownPolicy
    search: SearchResult
    heading: str
    chart: Markup
    returned: SearchStep
    target: float | None
    reached: str
    screened: list[ScreenedRow]
    additional: list[StepwiseLimit]


def section(run: FinishedRun) -> Section | None:
    """The searches of the evaluated methods in the order of the table, each with its chart."""
    found = _searches(run)
    ends = [end for _, search in found for end in _costs(search, run.params.limit)]
    costs = svg.domain([run.limit_shown, *ends])
    searches = [_panel(row, search, run, costs) for row, search in found]
    return Section("searches", "Searches", {"searches": searches}) if searches else None


def _searches(run: FinishedRun) -> list[tuple[ShownPolicy, SearchResult]]:
    found = [(row, search_of(run.root, row.folder)) for row in run.rows]
    return [(row, search) for row, search in found if search is not None]


def _panel(
    row: ShownPolicy, search: SearchResult, run: FinishedRun, costs: tuple[float, float]
) -> Panel:
    returned = search.steps[search.chosen]
    target = _target(search, run.params.limit)
    name = f"search of {row.name}: multiplier and cost by step"
    chosen = None if search.history else returned.step
    screened = {seen.q: seen for seen in search.screened}
    return Panel(
        row=row,
        search=search,
        heading=_heading(search, row.name),
        chart=drawn(trajectory(search), run.limit_shown, costs, chosen, name, target),
        returned=returned,
        target=target,
        reached=tilt_in_words(returned.lam, returned.tilt),
        screened=[screened[q] for q in sorted(screened)],
        additional=additional_by_step(search.steps),
    )


def _target(search: SearchResult, limit: float) -> float | None:
    return None if search.target == limit else search.target


def _heading(search: SearchResult, policy: str) -> str:
    """The method's title, with the row's name where that is another; else the policy's name."""
    if not search.title:
        return policy
    named = "" if search.name == search.method else f" ({search.name})"
    return f"{search.title}{named}"


def _costs(search: SearchResult, limit: float) -> list[float | None]:
    """What the cost axis must hold: the target and the ends of every step's error bar."""
    ends = [_target(search, limit)]
    for step in trajectory(search):
        if step.cost is not None:
            error = getattr(step, "cost_se", None) or 0.0
            ends += [step.cost - error, step.cost + error]
    return ends

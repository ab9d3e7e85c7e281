"""Every policy on the same held-out prompts: a column for each measure that any of them has."""

from __future__ import annotations

from markupsafe import Markup

from dualign.evaluation.measures import MEASURES, Measure
from dualign.report.charts import svg
from dualign.report.charts.strip import strip
from dualign.report.sections.base import FinishedRun, Section, ShownPolicy

_GROUPS = {
    "Methods": ("method",),
    "Baselines: no search for the limit": ("reference", "baseline"),
}


def section(run: FinishedRun) -> Section:
    """Always there; it says so where no policy is evaluated."""
    measures = [measure for measure in MEASURES if _known(measure, run.rows)]
    groups = {heading: _of(kinds, run.rows) for heading, kinds in _GROUPS.items()}
    values = {"measures": measures, "groups": groups, "strips": _strips(run)}
    return Section("methods", "Methods", values)


def _known(measure: Measure, rows: list[ShownPolicy]) -> bool:
    """Whether any policy has it."""
    return any(getattr(row, measure.key) is not None for row in rows)


def _of(kinds: tuple[str, ...], rows: list[ShownPolicy]) -> list[ShownPolicy]:
    return [row for row in rows if row.kind in kinds]


def _strips(run: FinishedRun) -> dict[str, Markup]:
    """The cost interval of every policy as a picture; all on one scale."""
    extent = svg.domain([run.limit_shown, *run.costs()])

    def drawn(row: ShownPolicy) -> Markup:
        if row.cost is None:
            return Markup()
        return strip(row.cost, run.limit_shown, extent, row.mark.style)

    return {row.name: drawn(row) for row in run.rows}

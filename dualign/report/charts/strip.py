"""An interval as a short line, or single values as dots, for a cell of a table."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from dualign.core.records import Interval
from dualign.report.charts import svg
from dualign.report.charts.svg import Scale


def strip(
    value: Interval,
    limit: float | None,
    extent: tuple[float, float],
    style: str,
    name: str = "cost interval against the limit",
) -> Markup:
    """An interval with its mean and the limit; `extent` is the common domain of a column."""
    x = _across(extent)
    low = x(value.mean if value.low is None else value.low)
    high = x(value.mean if value.high is None else value.high)
    children = _limit(x, limit)
    children.append(svg.line((low, 11), (high, 11), "bar"))
    children.append(svg.circle((x(value.mean), 11), 3.6, "dot"))
    return svg.svg(130, 22, name, children, f"strip {style}")


def dots(
    values: Sequence[float], limit: float | None, extent: tuple[float, float], style: str
) -> Markup:
    """Costs of the same policy in several runs."""
    x = _across(extent)
    children = _limit(x, limit)
    children += [svg.circle((x(value), 11), 3.0, "dot faint", f"{value:.3g}") for value in values]
    return svg.svg(130, 22, "cost in each run against the limit", children, f"strip {style}")


def _across(extent: tuple[float, float]) -> Scale:
    return Scale(*extent, 6, 124)


def _limit(x: Scale, limit: float | None) -> list[Markup]:
    return [] if limit is None else [svg.line((x(limit), 1), (x(limit), 21), "limit")]

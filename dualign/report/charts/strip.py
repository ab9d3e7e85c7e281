"""An interval as a short line, for a cell of a table."""

from __future__ import annotations

from markupsafe import Markup

from dualign.report.charts import svg
from dualign.report.charts.svg import Range, Scale


def strip(
    value: Range,
    limit: float | None,
    extent: tuple[float, float],
    style: str,
    name: str = "cost interval against the limit",
) -> Markup:
    """An interval with its mean and the limit; `extent` is the common domain of a column."""
    x = Scale(*extent, 6, 124)
    low = x(value.mean if value.low is None else value.low)
    high = x(value.mean if value.high is None else value.high)
    children = [] if limit is None else [svg.line((x(limit), 1), (x(limit), 21), "limit")]
    children.append(svg.line((low, 11), (high, 11), "bar"))
    children.append(svg.circle((x(value.mean), 11), 3.6, "dot"))
    return svg.svg(130, 22, name, children, f"strip {style}")

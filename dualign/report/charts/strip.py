"""A cost interval as a short line, for a cell of a table."""

from __future__ import annotations

from markupsafe import Markup

from dualign.report.charts import svg
from dualign.report.charts.svg import Range, Scale


def strip(cost: Range, limit: float | None, costs: tuple[float, float], style: str) -> Markup:
    """A cost interval with its mean and the limit; `costs` is the common domain of a column."""
    x = Scale(*costs, 6, 124)
    low = x(cost.mean if cost.low is None else cost.low)
    high = x(cost.mean if cost.high is None else cost.high)
    children = [] if limit is None else [svg.line((x(limit), 1), (x(limit), 21), "limit")]
    children.append(svg.line((low, 11), (high, 11), "bar"))
    children.append(svg.circle((x(cost.mean), 11), 3.6, "dot"))
    return svg.svg(130, 22, "cost interval against the limit", children, f"strip {style}")

"""One search, step by step: what it tried above, the cost that this gave below."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from dualign.core.records import HistoryRow, SearchStep
from dualign.report.charts import svg
from dualign.report.charts.svg import Plane, Scale, domain

#: A row of `steps` or of `history` in reports/search/NAME.json.
Step = SearchStep | HistoryRow

#: At most so many steps carry their number.
_NUMBERED = 12
_NAMES = {
    "lam": "λ",
    "q": "q",
    "cost": "cost",
    "model_cost": "by the cost model",
    "reward": "reward",
    "kl": "KL",
    "p_unsafe": "P(unsafe)",
}


def trajectory(
    steps: Sequence[Step],
    limit: float | None,
    costs: tuple[float, float],
    chosen: int | None,
    name: str,
    target: float | None = None,
) -> Markup:
    """One search by step: its knob above (λ, or the merge weight q if that moves), cost below.

    Args:
        steps: as in reports/search/METHOD.json; error bars are one standard error of the cost.
        limit: the limit on cost.
        costs: domain of the cost axis, the same for all searches so that they can be compared.
        chosen: `step` of the step that the search returned; drawn filled.
        name: what the picture shows, for screen readers.
        target: the cost that the search steered to, where that is not the limit.
    """
    key, steps = _moved(steps)
    tried = [getattr(step, key) for step in steps]
    x = Scale(-0.5, max(len(steps), 2) - 0.5, 64, 332)
    upper = Plane(x, Scale(*domain([0.0, *tried], 0.12), 84, 10))
    lower = Plane(x, Scale(*costs, 202, 104))
    measured = [step.cost for step in steps]
    children = [
        *upper.rows(_NAMES[key], 3),
        *_trace(steps, tried, chosen, upper),
        *([] if limit is None else [_over(lower, limit)]),
        *lower.rows("cost", 3),
        *([] if limit is None else [lower.across(limit, "limit")]),
        *([] if target is None else _target(lower, target)),
        *_error_bars(steps, lower),
        *_trace(steps, measured, chosen, lower),
        *_numbers(steps, x),
    ]
    return svg.svg(340, 224, name, children)


def _moved(steps: Sequence[Step]) -> tuple[str, Sequence[Step]]:
    """What moved, and the steps with a value of it; a merge's start counts as weight 1."""
    weights = [getattr(step, "q", None) for step in steps]
    if all(q is None for q in weights):
        return "lam", steps
    moved = [1.0 if q is None else q for q in weights]
    return "q", [step.model_copy(update={"q": q}) for step, q in zip(steps, moved, strict=True)]


def _over(plane: Plane, limit: float) -> Markup:
    """The share of the plane over the limit: everything above the line."""
    bottom = max(plane.y(limit), plane.y.end)
    return svg.rectangle(plane.left_top, (plane.x.end, bottom), "over")


def _target(plane: Plane, target: float) -> list[Markup]:
    """A line with its name, to tell it from the limit."""
    at = (plane.x.end, plane.y(target) + 10)
    return [plane.across(target, "target"), svg.text(at, "target", "target-text", "end")]


def _trace(
    steps: Sequence[Step], values: Sequence[float | None], chosen: int | None, plane: Plane
) -> list[Markup]:
    """The known values by step, joined by a line; the chosen one filled."""
    known = [(i, value) for i, value in enumerate(values) if value is not None]
    marks = [svg.shape("polyline", (plane.at(i, value) for i, value in known), "trace")]
    for i, value in known:
        filled = steps[i].step == chosen
        style, radius = ("step chosen", 4.2) if filled else ("step", 2.8)
        marks.append(svg.circle(plane.at(i, value), radius, style, _title(steps[i])))
    return marks


def _error_bars(steps: Sequence[Step], plane: Plane) -> list[Markup]:
    bars: list[Markup] = []
    for i, step in enumerate(steps):
        error = getattr(step, "cost_se", None)
        if step.cost is not None and error is not None:
            ends = (plane.at(i, step.cost - error), plane.at(i, step.cost + error))
            bars.append(svg.line(*ends, "step-bar"))
    return bars


def _title(step: Step) -> str:
    """Everything that was measured at a step, how it was made, and where the search went next."""
    parts: list[str] = []
    for key, name in _NAMES.items():
        value = getattr(step, key, None)
        if value is not None:
            error = getattr(step, f"{key}_se", None)
            spread = "" if error is None else f" ± {error:.3f}"
            parts.append(f"{name} {value:.3f}{spread}")
    measured = ", ".join(parts)
    if isinstance(step, HistoryRow):
        return f"step {step.step}: {measured}"
    return f"step {step.step}{_made(step)}: {measured}{_next(step)}"


def _made(step: SearchStep) -> str:
    """How the policy of a step came about, where the search made it."""
    blend = step.blend
    if blend is None:
        return ", trained" if step.trained else ""
    one = f"{1 - blend.weight:.2f} step {blend.first}"
    return f", merged: {one} + {blend.weight:.2f} step {blend.second}"


def _next(step: SearchStep) -> str:
    """The multiplier that each reckoning asked for after a step."""
    asked = step.next or {}
    proposals = [f"{name} {lam:.3f}" for name, lam in asked.items() if lam is not None]
    return f"; next λ by {', '.join(proposals)}" if proposals else ""


def _numbers(steps: Sequence[Step], x: Scale) -> list[Markup]:
    every = max(1, math.ceil(len(steps) / _NUMBERED))
    marks = [svg.text((x.start - 7, 219), "step", "axis", "end")]
    for i in range(0, len(steps), every):
        marks.append(svg.text((x(i), 219), str(steps[i].step), "tick", "middle"))
    return marks

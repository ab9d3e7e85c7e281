"""Charts as inline SVG, drawn to the pixel: no plotting library, no script, colours from the page's
style sheet.

Every function returns one `<svg>` as Markup. All text is escaped; the value behind a mark is in its
`<title>`, which browsers show as a tooltip. Lengths are pixels of the viewBox."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup, escape

Box = tuple[float, float, float, float]

_CHAR = 6.8  # mean width of a character of a 12 px label
_LINE = 14.0  # height of a line of labels


@dataclass(frozen=True)
class Range:
    """A mean with the ends of its interval; the ends are None where unknown."""

    mean: float
    low: float | None = None
    high: float | None = None

    def values(self) -> list[float]:
        return [value for value in (self.mean, self.low, self.high) if value is not None]


@dataclass(frozen=True)
class Point:
    """A policy in the plane of cost (x) and reward (y). `style` is a CSS class, `number` its row in
    the table.

    `predicted` is where it was expected, as (cost, reward).
    """

    label: str
    number: int
    x: Range
    y: Range
    style: str
    title: str
    predicted: tuple[float, float] | None = None


@dataclass(frozen=True)
class Knot:
    """A point of a frontier curve, at one multiplier."""

    lam: float
    x: Range
    y: Range
    title: str


@dataclass(frozen=True)
class Scale:
    """A linear map from [low, high] in data to [start, end] in pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def holds(self, value: float) -> bool:
        """Whether a value lies in the domain."""
        return self.low <= value <= self.high

    def ticks(self, count: int) -> list[float]:
        """About `count` round values within the domain."""
        step = _round_step((self.high - self.low) / max(count, 1))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(k * step, 12) for k in range(first, last + 1)]


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(
        factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= 0.75 * raw
    )


def domain(values: Iterable[float | None], pad: float = 0.06) -> tuple[float, float]:
    """The extent of the known values with some air on both sides; (0, 1) where none is known."""
    known = [value for value in values if value is not None]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    air = (high - low) * pad or max(abs(high) * 0.1, 0.1)
    return low - air, high + air


def near(limit: float | None, values: Iterable[float | None]) -> float | None:
    """The limit where a chart of these values can show it: within three times their extent of them;
    else None.
    """
    low, high = domain(values)
    reach = 3 * (high - low)
    return limit if limit is not None and low - reach <= limit <= high + reach else None


def frontier(
    points: Sequence[Point],
    curve: Sequence[Knot],
    limit: float | None,
    size: tuple[int, int],
    labels: tuple[str, str],
    *,
    name: str,
    optimum: Point | None = None,
    numbered: bool = False,
) -> Markup:
    """Policies against a frontier.

    Args:
        points: the policies, with error bars, and a line to where each was predicted.
        curve: the frontier by increasing multiplier; its intervals, where known, make a band.
        limit: the limit on cost, a vertical line; None where it is not `near`.
        size: width and height.
        labels: titles of the x and the y axis.
        name: what the picture shows, for screen readers.
        optimum: one more point, drawn as a star.
        numbered: write row numbers beside the points instead of names (for narrow screens).
    """
    width, height = size
    stars = [optimum] if optimum else []
    # The policies set the view: a frontier reaches far beyond them at both ends, and is cut off
    # there.
    seen: list[Point | Knot] = [*points, *stars] if len(points) > 1 else [*points, *stars, *curve]
    x = Scale(*domain([*(v for m in seen for v in m.x.values()), limit], 0.08), 60, width - 14)
    y = Scale(*domain((v for m in seen for v in m.y.values()), 0.12), height - 44, 16)
    knots = [k for k in curve if x.holds(k.x.mean) and y.holds(k.y.mean)]
    labelled = _labelled([*stars, *points], _lines(points, curve, limit, x, y), x, y, numbered)
    taken = [
        *(_around(x(p.x.mean), y(p.y.mean), 7) for p in [*stars, *points]),
        *(box for _, _, box in labelled),
    ]
    children = [
        _over_limit(x, y, limit),
        *_axes(x, y, labels),
        _limit_line(x, y, limit),
        _clipped(
            x, y, [_band(curve, x, y), _polyline(curve, x, y), *(_miss(p, x, y) for p in points)]
        ),
        *(_error_bars(p, x, y) for p in points),
        *(_knot(knot, x, y, 2.6 if len(knots) <= 12 else 1.8) for knot in knots),
        *(_star(star, x(star.x.mean), y(star.y.mean)) for star in stars),
        *(_marker(p, x(p.x.mean), y(p.y.mean)) for p in points),
        *_knot_labels(knots, taken, x, y),
        *(_label(point, text, box, x, y) for point, text, box in labelled),
    ]
    return _svg(width, height, name, children)


def trajectory(
    steps: Sequence[dict[str, Any]],
    limit: float | None,
    costs: tuple[float, float],
    chosen: int | None,
    name: str,
    target: float | None = None,
) -> Markup:
    """One search: its knob (λ, or the merge weight q where that is what moves) above, its cost
    below, by step.

    Args:
        steps: as in reports/search/METHOD.json; error bars are one standard error of the cost.
        limit: the limit on cost.
        costs: domain of the cost axis, the same for all searches so that they can be compared.
        chosen: `step` of the step that the search returned; drawn filled.
        name: what the picture shows, for screen readers.
        target: the cost that the search steered to, where that is not the limit.
    """
    if any(s.get("q") is not None for s in steps):
        # The start of a merge has no weight of its own: it is what weight 1 gives.
        knob, symbol, steps = (
            "q",
            "q",
            [s if s.get("q") is not None else {**s, "q": 1.0} for s in steps],
        )
    else:
        knob, symbol = "lam", "λ"
    x = Scale(-0.5, max(len(steps), 2) - 0.5, 64, 332)
    upper = Scale(*domain([0.0, *(s.get(knob) for s in steps)], 0.12), 84, 10)
    lower = Scale(*costs, 202, 104)
    children = [
        *_axes(x, upper, ("", symbol), ticks=3, x_ticks=False),
        _path([(i, s.get(knob)) for i, s in enumerate(steps)], x, upper),
        *(_step_dot(s, i, knob, x, upper, chosen) for i, s in enumerate(steps)),
        _over_limit_below(x, lower, limit),
        *_axes(x, lower, ("", "cost"), ticks=3, x_ticks=False),
        _horizontal(x, lower, limit, "limit"),
        _horizontal(x, lower, target, "target"),
        _path([(i, s.get("cost")) for i, s in enumerate(steps)], x, lower),
        *(_step_bar(s, i, x, lower) for i, s in enumerate(steps)),
        *(_step_dot(s, i, "cost", x, lower, chosen) for i, s in enumerate(steps)),
        *_step_numbers(steps, x),
    ]
    return _svg(340, 224, name, children)


def strip(cost: Range, limit: float | None, costs: tuple[float, float], style: str) -> Markup:
    """A cost interval as a short line with its mean and the limit; `costs` is the common domain of
    a column.
    """
    x = Scale(*costs, 6, 124)
    low, high = (x(cost.mean if end is None else end) for end in (cost.low, cost.high))
    line = _element("line", x1=low, x2=high, y1=11, y2=11, class_="bar")
    dot = _element("circle", cx=x(cost.mean), cy=11, r=3.6, class_="dot")
    rule = (
        Markup()
        if limit is None
        else _element("line", x1=x(limit), x2=x(limit), y1=1, y2=21, class_="limit")
    )
    return _svg(130, 22, "cost interval against the limit", [rule, line, dot], f"strip {style}")


def _svg(width: int, height: int, name: str, children: Iterable[Markup], style: str = "") -> Markup:
    box = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    return _element(
        "svg", *children, **box, role="img", aria_label=name, class_=f"chart {style}".strip()
    )


def _element(tag: str, *children: Markup | str, **attributes: object) -> Markup:
    """An element; `class_` and `stroke_width` become class and stroke-width, text and values are
    escaped.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{tag}{written}>{Markup().join(children)}</{tag}>")


def _plain(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def _text(
    x: float, y: float, text: str, style: str, anchor: str = "start", **more: object
) -> Markup:
    return _element("text", text, x=x, y=y, class_=style, text_anchor=anchor, **more)


# --- axes and the limit ---------------------------------------------------------------------------


def _axes(
    x: Scale, y: Scale, labels: tuple[str, str], ticks: int = 6, x_ticks: bool = True
) -> list[Markup]:
    """Grid lines with their values, and the axis titles."""
    bottom, top = y.start, y.end
    rows = y.ticks(ticks)
    parts = [_element("line", x1=x.start, x2=x.end, y1=y(v), y2=y(v), class_="grid") for v in rows]
    parts += [_text(x.start - 7, y(v) + 4, _tick(v, rows), "tick", "end") for v in rows]
    if x_ticks:
        columns = x.ticks(max(3, int((x.end - x.start) / 80)))
        parts += [
            _element("line", x1=x(v), x2=x(v), y1=bottom, y2=top, class_="grid") for v in columns
        ]
        parts += [_text(x(v), bottom + 17, _tick(v, columns), "tick", "middle") for v in columns]
        parts.append(_text(x.end, bottom + 36, labels[0], "axis", "end"))
    middle = (bottom + top) / 2
    parts.append(
        _text(10, middle, labels[1], "axis", "middle", transform=f"rotate(-90 10 {middle:.1f})")
    )
    return parts


def _tick(value: float, ticks: list[float]) -> str:
    """A tick with as many decimals as the ticks of its axis need."""
    decimals = next((d for d in range(6) if all(abs(round(v, d) - v) < 1e-9 for v in ticks)), 6)
    return f"{value + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _over_limit(x: Scale, y: Scale, limit: float | None) -> Markup:
    if limit is None:
        return Markup()
    return _element(
        "rect", x=x(limit), y=y.end, width=x.end - x(limit), height=y.start - y.end, class_="over"
    )


def _limit_line(x: Scale, y: Scale, limit: float | None) -> Markup:
    if limit is None:
        return Markup()
    # The caption stands on the side with more room.
    left = x(limit) > (x.start + x.end) / 2
    caption = _text(
        x(limit) + (-6 if left else 6),
        y.start - 7,
        "limit",
        "limit-text",
        "end" if left else "start",
    )
    return (
        _element("line", x1=x(limit), x2=x(limit), y1=y.start, y2=y.end, class_="limit") + caption
    )


def _over_limit_below(x: Scale, y: Scale, limit: float | None) -> Markup:
    """The share of a cost-by-step plot that is over the limit: everything above the line."""
    if limit is None:
        return Markup()
    return _element(
        "rect",
        x=x.start,
        y=y.end,
        width=x.end - x.start,
        height=max(0.0, y(limit) - y.end),
        class_="over",
    )


def _horizontal(x: Scale, y: Scale, level: float | None, name: str) -> Markup:
    """A line across a cost-by-step plot; the target is named, to tell it from the limit."""
    if level is None:
        return Markup()
    line = _element("line", x1=x.start, x2=x.end, y1=y(level), y2=y(level), class_=name)
    return (
        line if name == "limit" else line + _text(x.end, y(level) + 10, name, "target-text", "end")
    )


# --- the frontier ---------------------------------------------------------------------------------


def _band(curve: Sequence[Knot], x: Scale, y: Scale) -> Markup:
    """The area between the best corners (less cost, more reward) and the worst corners of the
    knots' intervals.
    """
    best = [(k.x.low, k.y.high) for k in curve]
    worst = [(k.x.high, k.y.low) for k in reversed(curve)]
    corners = [(x(a), y(b)) for a, b in [*best, *worst] if a is not None and b is not None]
    if len(corners) < 2 * len(curve) or len(curve) < 2:
        return Markup()
    return _element("polygon", points=_pairs(corners), class_="band")


def _clipped(x: Scale, y: Scale, children: Iterable[Markup]) -> Markup:
    """Children cut off at the edges of the plot."""
    left, top, width, height = x.start, y.end, x.end - x.start, y.start - y.end
    view = f"{left:.0f} {top:.0f} {width:.0f} {height:.0f}"
    return _element(
        "svg", *children, x=left, y=top, width=width, height=height, viewBox=view, overflow="hidden"
    )


def _polyline(curve: Sequence[Knot], x: Scale, y: Scale) -> Markup:
    return _element(
        "polyline", points=_pairs((x(k.x.mean), y(k.y.mean)) for k in curve), class_="curve"
    )


def _pairs(corners: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)


def _knot(knot: Knot, x: Scale, y: Scale, r: float) -> Markup:
    return _element(
        "circle",
        _element("title", knot.title),
        cx=x(knot.x.mean),
        cy=y(knot.y.mean),
        r=r,
        class_="knot",
    )


def _miss(point: Point, x: Scale, y: Scale) -> Markup:
    """A line from a point to where it was predicted."""
    if point.predicted is None:
        return Markup()
    to = (x(point.predicted[0]), y(point.predicted[1]))
    return _element(
        "line", x1=x(point.x.mean), y1=y(point.y.mean), x2=to[0], y2=to[1], class_="miss"
    )


def _error_bars(point: Point, x: Scale, y: Scale) -> Markup:
    parts = []
    if point.x.low is not None and point.x.high is not None:
        parts.append(
            _element(
                "line",
                x1=x(point.x.low),
                x2=x(point.x.high),
                y1=y(point.y.mean),
                y2=y(point.y.mean),
            )
        )
    if point.y.low is not None and point.y.high is not None:
        parts.append(
            _element(
                "line",
                x1=x(point.x.mean),
                x2=x(point.x.mean),
                y1=y(point.y.low),
                y2=y(point.y.high),
            )
        )
    return _element("g", *parts, class_=f"error {point.style}")


def _marker(point: Point, cx: float, cy: float) -> Markup:
    """A circle for a method, a square for the reference, a diamond for a baseline; `style` says how
    filled.
    """
    title = _element("title", point.title)
    style = f"mark {point.style}"
    if "reference" in point.style:
        return _element("rect", title, x=cx - 4.5, y=cy - 4.5, width=9, height=9, class_=style)
    if "baseline" in point.style:
        corners = _pairs([(cx, cy - 6), (cx + 6, cy), (cx, cy + 6), (cx - 6, cy)])
        return _element("polygon", title, points=corners, class_=style)
    return _element(
        "circle", title, cx=cx, cy=cy, r=6.5 if "recommended" in point.style else 5, class_=style
    )


def _star(point: Point, cx: float, cy: float) -> Markup:
    radii = [9.5 if k % 2 == 0 else 4.0 for k in range(10)]
    corners = [
        (cx + r * math.sin(k * math.pi / 5), cy - r * math.cos(k * math.pi / 5))
        for k, r in enumerate(radii)
    ]
    return _element(
        "polygon", _element("title", point.title), points=_pairs(corners), class_="mark star"
    )


# --- labels that keep out of each other's way -----------------------------------------------------


def _labelled(
    points: Sequence[Point], lines: Sequence[Box], x: Scale, y: Scale, numbered: bool
) -> list[tuple[Point, str, Box]]:
    """A text and a place for the label of every point; the recommended one chooses first."""
    taken = [_around(x(p.x.mean), y(p.y.mean), 7) for p in points]
    found = []
    for point in sorted(points, key=lambda p: "recommended" not in p.style):
        text = str(point.number) if numbered and point.number else point.label
        box = _place((x(point.x.mean), y(point.y.mean)), text, taken, lines, x, y)
        taken.append(box)
        found.append((point, text, box))
    return found


def _label(point: Point, text: str, box: Box, x: Scale, y: Scale) -> Markup:
    """Text anchored on the side of its point, so that a font of another width does not run into the
    mark.
    """
    at = (x(point.x.mean), y(point.y.mean))
    if box[2] <= at[0]:
        written = _text(box[2], box[3] - 3.5, text, f"label {point.style}", "end")
    elif box[0] >= at[0]:
        written = _text(box[0], box[3] - 3.5, text, f"label {point.style}", "start")
    else:
        written = _text((box[0] + box[2]) / 2, box[3] - 3.5, text, f"label {point.style}", "middle")
    return _leader(at, box) + written


def _place(
    at: tuple[float, float],
    text: str,
    taken: Sequence[Box],
    lines: Sequence[Box],
    x: Scale,
    y: Scale,
) -> Box:
    """The place around a point where its label hides least; lines may be crossed sooner than text,
    near beats far.
    """
    width = len(text) * _CHAR + 2
    taken, lines = (
        [b for b in boxes if _overlap(b, _around(*at, 90 + width)) > 0] for boxes in (taken, lines)
    )
    boxes = []
    for radius in (9, 15, 23, 33, 45, 60, 78):
        for turn in (0, 8, 2, 14, 6, 10, 4, 12, 1, 15, 7, 9, 3, 13, 5, 11):
            angle = turn * math.pi / 8
            cx = at[0] + math.cos(angle) * (radius + width / 2)
            cy = at[1] - math.sin(angle) * (radius + _LINE / 2 - 4)
            box = (cx - width / 2, cy - _LINE / 2, cx + width / 2, cy + _LINE / 2)
            crowding = 8 * sum(_overlap(box, other) for other in taken) + sum(
                _overlap(box, line) for line in lines
            )
            boxes.append((crowding + radius, box))
    inside = [(score, b) for score, b in boxes if _within(b, (x.start, y.end, x.end + 12, y.start))]
    return min(inside or boxes)[1]


def _lines(
    points: Sequence[Point], curve: Sequence[Knot], limit: float | None, x: Scale, y: Scale
) -> list[Box]:
    """Small boxes along the curve, the lines to it, the limit and the error bars, for labels to
    keep clear of.
    """
    boxes = []
    for a, b in pairwise((x(k.x.mean), y(k.y.mean)) for k in curve):
        boxes += _along(a, b)
    for point in points:
        if point.predicted is not None:
            boxes += _along(
                (x(point.x.mean), y(point.y.mean)), (x(point.predicted[0]), y(point.predicted[1]))
            )
        across, along = [x(v) for v in point.x.values()], [y(v) for v in point.y.values()]
        cx, cy = x(point.x.mean), y(point.y.mean)
        boxes += [
            (min(across), cy - 1, max(across), cy + 1),
            (cx - 1, min(along), cx + 1, max(along)),
        ]
    if limit is not None:
        boxes.append((x(limit) - 2, y.end, x(limit) + 2, y.start))
    return boxes


def _along(a: tuple[float, float], b: tuple[float, float]) -> list[Box]:
    pieces = max(1, round(math.dist(a, b) / 5))
    middles = (
        (a[0] + (b[0] - a[0]) * i / pieces, a[1] + (b[1] - a[1]) * i / pieces)
        for i in range(pieces + 1)
    )
    return [_around(*middle, 2.5) for middle in middles]


def _leader(at: tuple[float, float], box: Box) -> Markup:
    """A thin line to a label that stands off its point."""
    near = (min(max(at[0], box[0]), box[2]), min(max(at[1], box[1] + 3), box[3] - 3))
    distance = math.dist(at, near)
    if distance < 14:
        return Markup()
    start = tuple(a + (b - a) * 7 / distance for a, b in zip(at, near, strict=True))
    return _element("line", x1=start[0], y1=start[1], x2=near[0], y2=near[1], class_="leader")


def _knot_labels(knots: Sequence[Knot], taken: Iterable[Box], x: Scale, y: Scale) -> list[Markup]:
    """λ above and to the left of the knots that have room: the side of the frontier that no policy
    should reach.
    """
    taken, parts = list(taken), []
    for knot in knots:
        text, right, bottom = f"λ {knot.lam:.2g}", x(knot.x.mean) - 5, y(knot.y.mean) - 3
        box = (right - len(text) * 5.6, bottom - 12, right, bottom)
        if (
            box[0] >= x.start
            and box[1] >= y.end - 14
            and not any(_overlap(box, other) > 0 for other in taken)
        ):
            taken.append((box[0] - 12, box[1] - 12, box[2] + 12, box[3] + 12))
            parts.append(_text(right, bottom - 2, text, "knot-label", "end"))
    return parts


def _around(cx: float, cy: float, half: float) -> Box:
    return cx - half, cy - half, cx + half, cy + half


def _within(a: Box, b: Box) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3]


def _overlap(a: Box, b: Box) -> float:
    if a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]:
        return 0.0
    return (min(a[2], b[2]) - max(a[0], b[0])) * (min(a[3], b[3]) - max(a[1], b[1]))


# --- a search, step by step -----------------------------------------------------------------------


def _path(values: Sequence[tuple[int, float | None]], x: Scale, y: Scale) -> Markup:
    return _element(
        "polyline", points=_pairs((x(i), y(v)) for i, v in values if v is not None), class_="trace"
    )


def _step_dot(
    step: dict[str, Any], i: int, key: str, x: Scale, y: Scale, chosen: int | None
) -> Markup:
    if step.get(key) is None:
        return Markup()
    style = "step chosen" if step.get("step") == chosen else "step"
    radius = 4.2 if step.get("step") == chosen else 2.8
    return _element(
        "circle",
        _element("title", _step_title(step)),
        cx=x(i),
        cy=y(step[key]),
        r=radius,
        class_=style,
    )


def _step_bar(step: dict[str, Any], i: int, x: Scale, y: Scale) -> Markup:
    if step.get("cost") is None or step.get("cost_se") is None:
        return Markup()
    ends = [y(step["cost"] + sign * step["cost_se"]) for sign in (-1, 1)]
    return _element("line", x1=x(i), x2=x(i), y1=ends[0], y2=ends[1], class_="step-bar")


def _step_title(step: dict[str, Any]) -> str:
    names = {
        "lam": "λ",
        "q": "q",
        "cost": "cost",
        "model_cost": "by the cost model",
        "reward": "reward",
        "kl": "KL",
        "p_unsafe": "P(unsafe)",
    }
    parts = []
    for key, name in names.items():
        if step.get(key) is not None:
            error = f" ± {step[f'{key}_se']:.3f}" if step.get(f"{key}_se") is not None else ""
            parts.append(f"{name} {step[key]:.3f}{error}")
    return f"step {step.get('step', '?')}{_step_made(step)}: " + ", ".join(parts) + _step_next(step)


def _step_made(step: dict[str, Any]) -> str:
    """How the policy of a step came about, where the search made it."""
    if blend := step.get("blend"):
        parts = ((1 - blend["weight"], blend["first"]), (blend["weight"], blend["second"]))
        return ", merged: " + " + ".join(f"{weight:.2f} step {number}" for weight, number in parts)
    return ", trained" if step.get("trained") else ""


def _step_next(step: dict[str, Any]) -> str:
    """The multiplier that each reckoning asked for after a step."""
    asked = [
        f"{name} {lam:.3f}" for name, lam in (step.get("next") or {}).items() if lam is not None
    ]
    return "; next λ by " + ", ".join(asked) if asked else ""


def _step_numbers(steps: Sequence[dict[str, Any]], x: Scale) -> list[Markup]:
    every = math.ceil(len(steps) / 12)
    numbers = [
        _text(x(i), 219, str(step.get("step", i)), "tick", "middle")
        for i, step in enumerate(steps)
        if i % every == 0
    ]
    return [*numbers, _text(x.start - 7, 219, "step", "axis", "end")]

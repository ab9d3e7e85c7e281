"""Policies in the plane of cost and reward, against a frontier."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dualign.core.records import Interval
from dualign.report.charts import labels, svg
from dualign.report.charts.labels import Box, Label
from dualign.report.charts.svg import Pixel, Plane, Scale, domain

#: With more points of the curve than this in view, they are drawn smaller.
_MANY = 12


@dataclass(frozen=True)
class Mark:
    """What stands in the plane of cost (x) and reward (y); `title` is its tooltip."""

    x: Interval
    y: Interval
    title: str

    @property
    def mean(self) -> tuple[float, float]:
        """Where it stands."""
        return self.x.mean, self.y.mean


@dataclass(frozen=True)
class Knot(Mark):
    """A point of a frontier curve, at one multiplier."""

    lam: float


@dataclass(frozen=True)
class Point(Mark):
    """A policy. `style` is a CSS class, `number` its row in the table; the exact optimum has style
    `star`, and number 0.

    `predicted` is where it was expected, as (cost, reward).
    """

    label: str
    number: int
    style: str
    predicted: tuple[float, float] | None = None


def frontier(
    points: Sequence[Point],
    curve: Sequence[Knot],
    limit: float | None,
    size: tuple[int, int],
    titles: tuple[str, str],
    name: str,
    numbered: bool = False,
) -> Markup:
    """Policies against a frontier.

    Args:
        points: the policies, with error bars, and a line to where each was predicted; an exact
            optimum is drawn as a star.
        curve: the frontier by increasing multiplier; its intervals, where known, make a band.
        limit: the limit on cost, a vertical line; None where it is not `near`.
        size: width and height.
        titles: of the x and the y axis.
        name: what the picture shows, for screen readers.
        numbered: write row numbers beside the points instead of names (for narrow screens).
    """
    plane = _plane(points, curve, limit, size)
    knots = [knot for knot in curve if plane.holds(*knot.mean)]
    placed = _labels(points, _lines(points, curve, limit, plane), plane, numbered)
    marks = [labels.around(plane.at(*point.mean), 7) for point in points]
    taken = [*marks, *(label.box for label in placed)]
    line = [plane.at(*knot.mean) for knot in curve]
    radius = 2.6 if len(knots) <= _MANY else 1.8
    children = [
        *([] if limit is None else [_over(plane, limit)]),
        *plane.rows(titles[1]),
        *plane.columns(titles[0]),
        *([] if limit is None else _limit(plane, limit)),
        plane.clipped(
            [_band(curve, plane), svg.shape("polyline", line, "curve"), *_misses(points, plane)]
        ),
        *(svg.line(*bar, f"error {p.style}") for p in points for bar in _bars(p, plane)),
        *(svg.circle(plane.at(*knot.mean), radius, "knot", knot.title) for knot in knots),
        *(_mark(point, plane.at(*point.mean)) for point in points),
        *_multipliers(knots, taken, plane),
        *(label.draw() for label in placed),
    ]
    return svg.svg(*size, name, children)


def _plane(
    points: Sequence[Point], curve: Sequence[Knot], limit: float | None, size: tuple[int, int]
) -> Plane:
    """The policies set the view: a frontier reaches far beyond them, and is cut off there."""
    policies = sum(point.style != "star" for point in points)
    seen: list[Mark] = [*points] if policies > 1 else [*points, *curve]
    costs = svg.ends(*(mark.x for mark in seen))
    rewards = svg.ends(*(mark.y for mark in seen))
    width, height = size
    x = Scale(*domain([*costs, limit], 0.08), 60, width - 14)
    return Plane(x, Scale(*domain(rewards, 0.12), height - 44, 16))


def _over(plane: Plane, limit: float) -> Markup:
    return svg.rectangle((plane.x(limit), plane.y.end), plane.right_bottom, "over")


def _limit(plane: Plane, limit: float) -> list[Markup]:
    """The line, captioned on the side with more room."""
    x = plane.x(limit)
    left = x > (plane.x.start + plane.x.end) / 2
    at = (x - 6 if left else x + 6, plane.y.start - 7)
    caption = svg.text(at, "limit", "limit-text", "end" if left else "start")
    return [plane.upright(limit, "limit"), caption]


def _band(curve: Sequence[Knot], plane: Plane) -> Markup:
    """The area between the best corners (less cost, more reward) of the knots and the worst."""
    best = [(knot.x.low, knot.y.high) for knot in curve]
    worst = [(knot.x.high, knot.y.low) for knot in reversed(curve)]
    corners = [plane.at(a, b) for a, b in [*best, *worst] if a is not None and b is not None]
    if len(corners) < 2 * len(curve) or len(curve) < 2:
        return Markup()
    return svg.shape("polygon", corners, "band")


def _misses(points: Iterable[Point], plane: Plane) -> list[Markup]:
    """Lines from points to where they were predicted."""
    return [
        svg.line(plane.at(*point.mean), plane.at(*point.predicted), "miss")
        for point in points
        if point.predicted is not None
    ]


def _bars(point: Point, plane: Plane) -> list[tuple[Pixel, Pixel]]:
    """The ends of the bars across and along that are known."""
    x = point.x
    y = point.y
    bars: list[tuple[Pixel, Pixel]] = []
    if x.low is not None and x.high is not None:
        bars.append((plane.at(x.low, y.mean), plane.at(x.high, y.mean)))
    if y.low is not None and y.high is not None:
        bars.append((plane.at(x.mean, y.low), plane.at(x.mean, y.high)))
    return bars


def _mark(point: Point, at: Pixel) -> Markup:
    """A circle for a method, a square for the reference, a diamond for a baseline, a star for the
    optimum; `style` says how filled.
    """
    x, y = at
    style = f"mark {point.style}"
    if "reference" in point.style:
        return svg.rectangle((x - 4.5, y - 4.5), (x + 4.5, y + 4.5), style, point.title)
    if "baseline" in point.style:
        corners = [(x, y - 6), (x + 6, y), (x, y + 6), (x - 6, y)]
        return svg.shape("polygon", corners, style, point.title)
    if "star" in point.style:
        return svg.shape("polygon", _star(at), style, point.title)
    return svg.circle(at, 6.5 if "recommended" in point.style else 5, style, point.title)


def _star(at: Pixel) -> list[Pixel]:
    corners: list[Pixel] = []
    for k in range(10):
        radius = 4.0 if k % 2 else 9.5
        turn = k * math.pi / 5
        corners.append((at[0] + radius * math.sin(turn), at[1] - radius * math.cos(turn)))
    return corners


# --- labels ---------------------------------------------------------------------------------------


def _labels(
    points: Sequence[Point], lines: Sequence[Box], plane: Plane, numbered: bool
) -> list[Label]:
    """A label for every point; the recommended one chooses first."""
    wanted = [
        (
            plane.at(*point.mean),
            str(point.number) if numbered and point.number else point.label,
            f"label {point.style}",
        )
        for point in sorted(points, key=lambda point: "recommended" not in point.style)
    ]
    marks = [labels.around(at, 7) for at, _, _ in wanted]
    left, top = plane.left_top
    right, bottom = plane.right_bottom
    return labels.place(wanted, marks, lines, (left, top, right + 12, bottom))


def _lines(
    points: Iterable[Point], curve: Iterable[Knot], limit: float | None, plane: Plane
) -> list[Box]:
    """Boxes along the curve, its lines, the limit and error bars, which labels keep clear of."""
    boxes = labels.along(plane.at(*knot.mean) for knot in curve)
    for point in points:
        if point.predicted is not None:
            boxes += labels.along([plane.at(*point.mean), plane.at(*point.predicted)])
        for (left, bottom), (right, top) in _bars(point, plane):
            boxes.append((left - 1, top - 1, right + 1, bottom + 1))
    if limit is not None:
        boxes.append((plane.x(limit) - 2, plane.y.end, plane.x(limit) + 2, plane.y.start))
    return boxes


def _multipliers(knots: Iterable[Knot], taken: Iterable[Box], plane: Plane) -> list[Markup]:
    """λ above and left of the knots that have room, where no policy should reach."""
    occupied = list(taken)
    texts: list[Markup] = []
    left, top = plane.left_top
    for knot in knots:
        content = f"λ {knot.lam:.2g}"
        x, y = plane.at(*knot.mean)
        box = (x - 5 - len(content) * 5.6, y - 15, x - 5, y - 3)
        crowded = bool(labels.overlap([box], occupied).any())
        if box[0] >= left and box[1] >= top - 14 and not crowded:
            occupied.append((box[0] - 12, box[1] - 12, box[2] + 12, box[3] + 12))
            texts.append(svg.text((x - 5, y - 5), content, "knot-label", "end"))
    return texts

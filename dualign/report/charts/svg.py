"""Inline SVG: elements, scales, axes.

Every chart is one `<svg>` as Markup with its name for screen readers. All text is escaped, colours
are classes of the page's style sheet, and the value behind a mark is in its `<title>`, which
browsers show as a tooltip without a script. Lengths are pixels of the viewBox."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup, escape

from dualign.core.records import Interval

Pixel = tuple[float, float]


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
    steps = [factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0)]
    return next(step for step in steps if step >= 0.75 * raw)


def domain(values: Iterable[float | None], pad: float = 0.06) -> tuple[float, float]:
    """The extent of the known values with some air on both sides; (0, 1) where none is known.

    >>> domain([0.0, None, 10.0], pad=0.1)
    (-1.0, 11.0)
    """
    known = [value for value in values if value is not None]
    if not known:
        return 0.0, 1.0
    low = min(known)
    high = max(known)
    air = (high - low) * pad or max(abs(high) * 0.1, 0.1)
    return low - air, high + air


def ends(*intervals: Interval) -> list[float | None]:
    """What an axis has to hold for intervals."""
    return [end for found in intervals for end in (found.mean, found.low, found.high)]


def near(limit: float | None, values: Iterable[float | None]) -> float | None:
    """The limit, if a chart can show it: within three times the extent of its values."""
    low, high = domain(values)
    reach = 3 * (high - low)
    return limit if limit is not None and low - reach <= limit <= high + reach else None


# --- elements -------------------------------------------------------------------------------------


def element(tag: str, *children: Markup | str, **attributes: object) -> Markup:
    """An element; `class_` and `stroke_width` lose their underscore, text is escaped.

    >>> print(element("text", "a < b", x=1.50, class_="tick"))
    <text x="1.5" class="tick">a &lt; b</text>
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{tag}{written}>{Markup().join(children)}</{tag}>")


def _plain(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def svg(width: int, height: int, name: str, children: Iterable[Markup], style: str = "") -> Markup:
    """A whole chart."""
    box = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    style = f"chart {style}".strip()
    return element("svg", *children, **box, role="img", aria_label=name, class_=style)


def text(at: Pixel, content: str, style: str, anchor: str = "start", **more: object) -> Markup:
    """A line of text whose start, middle or end (`anchor`) stands at a pixel."""
    return element("text", content, x=at[0], y=at[1], class_=style, text_anchor=anchor, **more)


def line(start: Pixel, end: Pixel, style: str) -> Markup:
    """A straight line."""
    return element("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], class_=style)


def circle(at: Pixel, radius: float, style: str, title: str = "") -> Markup:
    """A disc; `title` is its tooltip."""
    return element("circle", *tooltip(title), cx=at[0], cy=at[1], r=radius, class_=style)


def shape(tag: str, corners: Iterable[Pixel], style: str, title: str = "") -> Markup:
    """A polyline or a polygon."""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return element(tag, *tooltip(title), points=points, class_=style)


def rectangle(left_top: Pixel, right_bottom: Pixel, style: str, title: str = "") -> Markup:
    """A rectangle between two corners."""
    width = right_bottom[0] - left_top[0]
    height = right_bottom[1] - left_top[1]
    size = {"x": left_top[0], "y": left_top[1], "width": width, "height": height}
    return element("rect", *tooltip(title), **size, class_=style)


def tooltip(title: str) -> list[Markup]:
    """The title element of a mark, if it has one."""
    return [element("title", title)] if title else []


# --- a plane with axes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plane:
    """Two scales, and what is drawn in their rectangle: grid, axes, the region over a limit."""

    x: Scale
    y: Scale

    def at(self, x: float, y: float) -> Pixel:
        """The pixel of a point of the data."""
        return self.x(x), self.y(y)

    def holds(self, x: float, y: float) -> bool:
        """Whether a point of the data is in view."""
        return self.x.holds(x) and self.y.holds(y)

    @property
    def left_top(self) -> Pixel:
        """The corner that a rectangle of the whole plane begins at."""
        return self.x.start, self.y.end

    @property
    def right_bottom(self) -> Pixel:
        """The corner that it ends at."""
        return self.x.end, self.y.start

    def across(self, y: float, style: str) -> Markup:
        """A line from the left edge to the right one."""
        return line((self.x.start, self.y(y)), (self.x.end, self.y(y)), style)

    def upright(self, x: float, style: str) -> Markup:
        """A line from the bottom to the top."""
        return line((self.x(x), self.y.start), (self.x(x), self.y.end), style)

    def rows(self, title: str, count: int = 6) -> list[Markup]:
        """The y axis: grid lines with their values, and its title."""
        ticks = self.y.ticks(count)
        labelled = zip(ticks, _labels(ticks), strict=True)
        left = self.x.start - 7
        middle = (self.y.start + self.y.end) / 2
        turned = f"rotate(-90 10 {middle:.1f})"
        return [
            *(self.across(v, "grid") for v in ticks),
            *(text((left, self.y(v) + 4), s, "tick", "end") for v, s in labelled),
            text((10, middle), title, "axis", "middle", transform=turned),
        ]

    def columns(self, title: str) -> list[Markup]:
        """The x axis, a value about every 80 pixels."""
        ticks = self.x.ticks(max(3, int((self.x.end - self.x.start) / 80)))
        labelled = zip(ticks, _labels(ticks), strict=True)
        below = self.y.start + 17
        return [
            *(self.upright(v, "grid") for v in ticks),
            *(text((self.x(v), below), s, "tick", "middle") for v, s in labelled),
            text((self.x.end, below + 19), title, "axis", "end"),
        ]

    def clipped(self, children: Iterable[Markup]) -> Markup:
        """Children cut off at the edges of the plane."""
        left, top = self.left_top
        right, bottom = self.right_bottom
        width = right - left
        height = bottom - top
        view = f"{left:.0f} {top:.0f} {width:.0f} {height:.0f}"
        size = {"x": left, "y": top, "width": width, "height": height}
        return element("svg", *children, **size, viewBox=view, overflow="hidden")


def _labels(ticks: list[float]) -> list[str]:
    """The values of an axis, each with the decimals that one of them needs.

    >>> _labels([0.0, 0.25, 0.5])
    ['0.00', '0.25', '0.50']
    """
    decimals = [f"{tick:.12f}".rstrip("0").partition(".")[2] for tick in ticks]
    most = max(map(len, decimals), default=0)
    return [f"{tick + 0.0:.{most}f}".replace("-", "\N{MINUS SIGN}") for tick in ticks]

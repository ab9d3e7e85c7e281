"""Pictures for Prefect's pages, which show SVG as an image: no script, no style sheet."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import networkx as nx

from pipeline.dvc.dag import StageSpec

#: Fill of a stage's box by its state.
COLOURS = {
    "Completed": "#2e9e5b",
    "Restored": "#3b82c4",
    "Unchanged": "#9aa5b1",
    "up to date": "#9aa5b1",
    "restorable": "#3b82c4",
    "stale": "#e08e2b",
    "maybe stale": "#f0c987",
    "Failed": "#d64545",
    "AwaitingLabels": "#b7791f",
    "Cancelled": "#7d5ba6",
}
_OTHER = "#e4e7eb"
_INK = "#1f2933"
_PALE = "#cbd2d9"
_LINE = "#9fb3c8"
_LINES = ("#3b82c4", "#e08e2b", "#2e9e5b", "#7d5ba6")
_FONT = "font-family='system-ui, sans-serif'"


@dataclass(frozen=True)
class Curve:
    """Points joined by a line, in the units of the axes."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """What to draw: curves, named points, and at most one vertical line."""

    title: str
    x_name: str
    y_name: str
    curves: Sequence[Curve] = ()
    points: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    limit: float | None = None


def image(svg: str, title: str) -> str:
    """Markdown that shows an SVG."""
    return f"![{title}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


# --- charts ---------------------------------------------------------------------------------------

_WIDTH = 640
_HEIGHT = 320
_LEFT = 82
_RIGHT = 20
_TOP = 34
_BOTTOM = 46


def _finite(point: tuple[float, float]) -> bool:
    return all(map(math.isfinite, point))


def chart(content: Chart) -> str:
    """An SVG of curves and points. Values that are not finite are left out."""
    curves = [Curve(curve.name, list(filter(_finite, curve.points))) for curve in content.curves]
    points = {name: point for name, point in content.points.items() if _finite(point)}
    seen = [*points.values(), *(p for curve in curves for p in curve.points)]
    if not seen:
        return _svg(_WIDTH, _HEIGHT, [_text(_WIDTH / 2, _HEIGHT / 2, "no values", "middle")])
    x = _Axis(
        [p[0] for p in seen] + ([] if content.limit is None else [content.limit]),
        _LEFT,
        _WIDTH - _RIGHT,
    )
    y = _Axis([p[1] for p in seen], _HEIGHT - _BOTTOM, _TOP)
    parts = [*_frame(content, x, y)]
    for colour, curve in zip(_LINES * len(curves), curves, strict=False):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in curve.points)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
    parts += _legend([curve.name for curve in curves if curve.name])
    parts += _named({name: (x(a), y(b)) for name, (a, b) in points.items()})
    return _svg(_WIDTH, _HEIGHT, parts)


def _named(points: Mapping[str, tuple[float, float]]) -> Iterable[str]:
    """Dots with their names beside them, each name moved up or down to where it hides no other."""
    taken: list[tuple[float, float, float]] = []
    for name, (a, b) in sorted(points.items(), key=lambda item: item[1][1]):
        yield f"<circle cx='{a:.1f}' cy='{b:.1f}' r='4.5' fill='{_INK}'/>"
        width = 7.5 * len(name)
        anchor, side = ("end", -8) if a > _WIDTH * 0.75 else ("start", 8)
        left = a - 8 - width if anchor == "end" else a + 8
        beside = [at for start, end, at in taken if start <= left + width and left <= end]
        heights = (b + (4 + sign * 15 * step) for step in range(8) for sign in (1, -1))
        at = next((height for height in heights if _clear(height, beside)), b + 4)
        taken.append((left, left + width, at))
        yield _text(a + side, at, name, anchor)


def _clear(height: float, taken: Sequence[float]) -> bool:
    return all(abs(height - other) >= 14 for other in taken)


class _Axis:
    """A linear map from the range of some values, with some air, to pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low = min(values)
        high = max(values)
        air = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        self.low = low - air
        self.high = high + air
        self._start = start
        self._end = end

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(k * power for k in (1.0, 2.0, 2.5, 5.0, 10.0) if k * power >= raw)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step) + 1)]


def _frame(content: Chart, x: _Axis, y: _Axis) -> Iterable[str]:
    right = _WIDTH - _RIGHT
    bottom = _HEIGHT - _BOTTOM
    grid = f"stroke='{_PALE}' stroke-width='.6'"
    for tick in x.ticks():
        yield _line((x(tick), _TOP), (x(tick), bottom), grid)
        yield _text(x(tick), bottom + 16, f"{tick:.4g}", "middle")
    for tick in y.ticks():
        yield _line((_LEFT, y(tick)), (right, y(tick)), grid)
        yield _text(_LEFT - 6, y(tick) + 4, f"{tick:.4g}", "end")
    yield _text(_LEFT, 20, content.title, "start", weight=600)
    yield _text((_LEFT + right) / 2, _HEIGHT - 10, content.x_name, "middle")
    middle = (_TOP + bottom) / 2
    yield (
        f"<g transform='rotate(-90 14 {middle})'>{_text(14, middle, content.y_name, 'middle')}</g>"
    )
    if content.limit is not None:
        at = x(content.limit)
        yield _line(
            (at, _TOP), (at, bottom), f"stroke='{COLOURS['Failed']}' stroke-dasharray='5 4'"
        )
        side, anchor = (-5, "end") if at > _WIDTH * 0.75 else (5, "start")
        yield _text(at + side, bottom - 6, f"limit {content.limit:g}", anchor)


def _legend(names: Sequence[str]) -> Iterable[str]:
    at = float(_WIDTH - _RIGHT)
    for colour, name in reversed(list(zip(_LINES * len(names), names, strict=False))):
        yield _text(at, 20, name, "end", colour=colour, weight=600)
        at -= 8 * len(name) + 14


# --- graph ----------------------------------------------------------------------------------------

# width and height of a box, between columns, between rows
_BOX = 104
_ROW = 24
_GAP = 28
_SPACE = 6


def graph(dag: Mapping[str, StageSpec], states: Mapping[str, str]) -> str:
    """An SVG of the stages from left to right, filled by state; stages without a state are pale.

    The instances of a `foreach` stage stand under its name, in the order of `dag`.
    """
    columns = _columns(dag)
    tallest = max(len(rows) for rows in columns) * (_ROW + _SPACE)
    place: dict[str, tuple[float, float]] = {}
    parts: list[str] = []
    for column, rows in enumerate(columns):
        top = 12 + (tallest - len(rows) * (_ROW + _SPACE)) / 2
        for row, name in enumerate(rows):
            at = (12.0 + column * (_BOX + _GAP), top + row * (_ROW + _SPACE))
            if name in dag:
                place[name] = at
                parts.append(_box(name, at, states.get(name)))
            else:
                parts.append(_text(at[0] + _BOX / 2, at[1] + 19, name, "middle", weight=600))
    pairs = (
        (source, name) for name, spec in dag.items() for source in spec.upstream if source in dag
    )
    shown = nx.transitive_reduction(nx.DiGraph(pairs)).edges
    edges = [_edge(place[source], place[name], place.values()) for source, name in shown]
    width = len(columns) * (_BOX + _GAP) - _GAP + 24
    key = _key(list(dict.fromkeys(states.values())), tallest + 34)
    return _svg(max(width, 420), tallest + 46, [*edges, *parts, *key])


def _columns(dag: Mapping[str, StageSpec]) -> list[list[str]]:
    """The stages by distance from the start; a `foreach` stage's name precedes its instances."""
    families = nx.DiGraph()
    families.add_nodes_from(_family(name) for name in dag)
    families.add_edges_from(
        (_family(source), _family(name)) for name in dag for source in dag[name].upstream
    )
    families.remove_edges_from(list(nx.selfloop_edges(families)))
    columns = []
    for generation in nx.topological_generations(nx.condensation(families)):
        members = {
            family
            for part in generation
            for family in nx.condensation(families).nodes[part]["members"]
        }
        rows: list[str] = []
        for family in dict.fromkeys(_family(name) for name in dag if _family(name) in members):
            rows += [] if family in dag else [family]
            rows += [name for name in dag if _family(name) == family]
        columns.append(rows)
    return columns


def _family(stage: str) -> str:
    return stage.split("@")[0]


def _edge(
    start: tuple[float, float], end: tuple[float, float], boxes: Iterable[tuple[float, float]]
) -> str:
    """A line between two boxes that crosses the columns between them where no box is."""
    x = start[0] + _BOX
    y = start[1] + _ROW / 2
    path = f"M{x:.0f} {y:.0f}"
    for left in sorted({column for column, _ in boxes if start[0] < column <= end[0]}):
        rest = (left - x) / (end[0] - x)
        wanted = y + rest * (end[1] + _ROW / 2 - y)
        at = (
            wanted
            if left == end[0]
            else _passage(wanted, [top for column, top in boxes if column == left])
        )
        path += f" C{x + _GAP / 2:.0f} {y:.0f} {left - _GAP / 2:.0f} {at:.0f} {left:.0f} {at:.0f}"
        x = left
        y = at
        if left < end[0]:
            x = left + _BOX
            path += f" H{x:.0f}"
    return f"<path d='{path}' fill='none' stroke='{_LINE}' stroke-width='1.2'/>"


def _passage(wanted: float, tops: Sequence[float]) -> float:
    """The height nearest to `wanted` that no box has which begins at one of `tops`."""
    edges = [edge for top in tops for edge in (top - _SPACE / 2, top + _ROW + _SPACE / 2)]

    def free(height: float) -> bool:
        return not any(top - _SPACE / 2 < height < top + _ROW + _SPACE / 2 for top in tops)

    return min(filter(free, (wanted, *edges)), key=lambda height: abs(height - wanted))


def _box(name: str, place: tuple[float, float], state: str | None) -> str:
    fill = COLOURS.get(state or "", _OTHER)
    ink = (
        "#ffffff"
        if state in ("Completed", "Restored", "Failed", "Cancelled", "restorable")
        else _INK
    )
    label = name.split("@")[-1]
    label = label if len(label) <= 14 else f"{label[:13]}…"
    rectangle = (
        f"<rect x='{place[0]:.0f}' y='{place[1]:.0f}' width='{_BOX}' height='{_ROW}' rx='5'"
        f" fill='{fill}'/>"
    )
    text = _text(place[0] + _BOX / 2, place[1] + 16, label, "middle", colour=ink)
    return f"<g><title>{escape(name)}</title>{rectangle}{text}</g>"


def _key(states: Sequence[str], y: float) -> Iterable[str]:
    at = 12.0
    for state in states:
        yield (
            f"<rect x='{at:.0f}' y='{y - 11:.0f}' width='12' height='12' rx='3'"
            f" fill='{COLOURS.get(state, _OTHER)}'/>"
        )
        yield _text(at + 18, y, state, "start")
        at += 42 + 7.5 * len(state)


def _line(start: tuple[float, float], end: tuple[float, float], style: str) -> str:
    return (
        f"<line x1='{start[0]:.1f}' y1='{start[1]:.1f}' x2='{end[0]:.1f}' y2='{end[1]:.1f}'"
        f" {style}/>"
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str = _INK, weight: int = 400) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='13'"
        f" font-weight='{weight}' fill='{colour}' {_FONT}>{escape(text)}</text>"
    )


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    place = f"viewBox='0 0 {width:.0f} {height:.0f}' width='{width:.0f}' height='{height:.0f}'"
    ground = "<rect width='100%' height='100%' fill='#ffffff'/>"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {place}>{ground}{''.join(parts)}</svg>"

"""Labels that keep out of each other's way, and clear of marks and lines where they can."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from dualign.report.charts import svg
from dualign.report.charts.svg import Pixel

Array = np.ndarray
#: Left, top, right and bottom.
Box = tuple[float, float, float, float]
#: Boxes as they are, or as an array [boxes, 4].
Boxes = Sequence[Box] | Array

CHARACTER = 6.8  # mean width of a character of a 12 px label
LINE = 14.0  # height of a line of labels
#: How far a label may stand off its point, and the sixteenths of a turn to try there: right first.
RADII = (9, 15, 23, 33, 45, 60, 78)
TURNS = (0, 8, 2, 14, 6, 10, 4, 12, 1, 15, 7, 9, 3, 13, 5, 11)


@dataclass(frozen=True)
class Label:
    """A text and the box that it was given beside its point."""

    at: Pixel
    text: str
    style: str
    box: Box

    def draw(self) -> Markup:
        """The text, anchored on the side of its point so that a font of another width does not run
        into the mark, with a thin line to a point that is far off.
        """
        left, _, right, bottom = self.box
        x = (left + right) / 2
        anchor = "middle"
        if right <= self.at[0]:
            x = right
            anchor = "end"
        elif left >= self.at[0]:
            x = left
            anchor = "start"
        return self._leader() + svg.text((x, bottom - 3.5), self.text, self.style, anchor)

    def _leader(self) -> Markup:
        left, top, right, bottom = self.box
        x, y = self.at
        end = (min(max(x, left), right), min(max(y, top + 3), bottom - 3))
        distance = math.dist(self.at, end)
        if distance < 14:
            return Markup()
        start = (x + (end[0] - x) * 7 / distance, y + (end[1] - y) * 7 / distance)
        return svg.line(start, end, "leader")


def place(
    wanted: Iterable[tuple[Pixel, str, str]], marks: Iterable[Box], lines: Sequence[Box], room: Box
) -> list[Label]:
    """A label for each (pixel, text, style), in this order: the first chooses first.

    Args:
        wanted: what to write, and where its mark is.
        marks: what no label may hide.
        lines: what may be crossed sooner than text.
        room: where labels may stand.
    """
    taken = list(marks)
    crossed = _rows(lines)
    labels: list[Label] = []
    for at, text, style in wanted:
        label = Label(at, text, style, _best(at, text, _rows(taken), crossed, room))
        taken.append(label.box)
        labels.append(label)
    return labels


def _best(at: Pixel, text: str, taken: Array, lines: Array, room: Box) -> Box:
    """The place around a point where its label hides least; near beats far. `taken` and `lines` are
    boxes, shape [boxes, 4].
    """
    width = len(text) * CHARACTER + 2
    reach = [around(at, RADII[-1] + width + 12)]
    texts = taken[overlap(reach, taken)[0] > 0]
    crossed = lines[overlap(reach, lines)[0] > 0]
    inside: list[tuple[float, Box]] = []
    outside: list[tuple[float, Box]] = []
    for radius in RADII:
        if inside and min(inside)[0] < radius:
            break  # no place farther off scores less than its distance
        boxes = [_beside(at, width, radius, turn * math.pi / 8) for turn in TURNS]
        hidden = 8 * overlap(boxes, texts).sum(1) + overlap(boxes, crossed).sum(1)
        for area, box in zip(hidden.tolist(), boxes, strict=True):
            (inside if _within(box, room) else outside).append((area + radius, box))
    return min(inside or outside)[1]


def _beside(at: Pixel, width: float, radius: float, angle: float) -> Box:
    x = at[0] + math.cos(angle) * (radius + width / 2)
    y = at[1] - math.sin(angle) * (radius + LINE / 2 - 4)
    return x - width / 2, y - LINE / 2, x + width / 2, y + LINE / 2


def around(at: Pixel, half: float) -> Box:
    """The square around a pixel."""
    return at[0] - half, at[1] - half, at[0] + half, at[1] + half


def along(corners: Iterable[Pixel]) -> list[Box]:
    """Small boxes along a line through these corners."""
    boxes: list[Box] = []
    for a, b in pairwise(corners):
        pieces = max(1, round(math.dist(a, b) / 5))
        for i in range(pieces + 1):
            middle = (a[0] + (b[0] - a[0]) * i / pieces, a[1] + (b[1] - a[1]) * i / pieces)
            boxes.append(around(middle, 2.5))
    return boxes


def overlap(some: Boxes, others: Boxes) -> Array:
    """The area that each of some boxes [m] shares with each of others [n]; [m, n].

    >>> overlap([(0, 0, 2, 2)], [(1, 1, 3, 3), (2, 0, 4, 2)]).tolist()
    [[1.0, 0.0]]
    """
    first = _rows(some)[:, None]
    second = _rows(others)
    begin = np.maximum(first[..., :2], second[:, :2])
    end = np.minimum(first[..., 2:], second[:, 2:])
    area: Array = (end - begin).clip(min=0).prod(-1)
    return area


def _rows(boxes: Boxes) -> Array:
    return np.asarray(boxes, dtype=float).reshape(-1, 4)


def _within(a: Box, b: Box) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3]

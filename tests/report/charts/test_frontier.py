"""The frontier is well-formed, in scale, readable, and escapes what it is given."""

from __future__ import annotations

from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import pytest

from dualign.report.charts.frontier import Knot, Point, frontier
from tests.report.charts.drawn import interval, styled

LABELS = ("cost", "reward")


def point(label: str, x: float, y: float, style: str = "method over", number: int = 1) -> Point:
    x_range = interval(x, x - 0.1, x + 0.1)
    y_range = interval(y, y - 0.05, y + 0.05)
    return Point(x_range, y_range, f"{label}: here", label, number, style)


def knot(lam: float, x: float, y: float) -> Knot:
    return Knot(interval(x, x - 0.1, x + 0.1), interval(y, y - 0.1, y + 0.1), f"λ {lam}", lam)


CURVE = [knot(0.0, 1.0, 1.0), knot(0.5, 0.0, 0.7), knot(1.0, -0.5, 0.2)]


def draw(
    points: list[Point], curve: list[Knot] = CURVE, limit: float | None = 0.0, **more: Any
) -> ElementTree.Element:
    return ElementTree.fromstring(frontier(points, curve, limit, (548, 430), LABELS, "n", **more))


def test_points_stand_in_scale_and_the_limit_between_them() -> None:
    root = draw([point("left", -1.0, 0.0), point("middle", 0.0, 0.5), point("right", 1.0, 1.0)])
    xs = [float(mark.get("cx", "nan")) for mark in styled(root, "mark")]
    ys = [float(mark.get("cy", "nan")) for mark in styled(root, "mark")]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.05) and xs[0] < xs[2]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.05) and ys[0] > ys[2]
    assert float(styled(root, "limit")[0].get("x1", "nan")) == pytest.approx(xs[1], abs=0.05)


def test_every_point_has_a_tooltip_and_a_label_and_kinds_differ_in_shape() -> None:
    points = [
        point("one", -0.5, 0.1, "method within recommended", 1),
        point("two", 0.2, 0.5, "baseline over", 2),
        point("three", 0.6, 0.2, "reference over", 3),
    ]
    star = Point(interval(0.0), interval(0.9), "best", "optimum", 0, "star")
    root = draw([star, *points])
    assert {mark.tag for mark in styled(root, "mark")} == {"circle", "polygon", "rect"}
    assert {t.text for t in root.iter("title")} >= {"one: here", "two: here", "three: here", "best"}
    assert {t.text for t in styled(root, "label")} == {"one", "two", "three", "optimum"}
    assert {t.text for t in styled(draw(points, numbered=True), "label")} == {"1", "2", "3"}


def box(text: ElementTree.Element) -> tuple[float, float, float, float]:
    width = 6.8 * len(text.text or "")
    x = float(text.get("x", "nan"))
    y = float(text.get("y", "nan"))
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[text.get("text-anchor", "start")]
    return left, y - 10, left + width, y + 2


def test_labels_of_crowded_points_do_not_overlap_and_stay_in_the_plot() -> None:
    points = [
        point(f"policy_{i}", 0.04 * (i % 4), 0.03 * (i // 4), number=i + 1) for i in range(12)
    ]
    spread = [point("far_left", -1.0, -0.6), point("far_right", 1.0, 0.8)]
    boxes = [box(text) for text in styled(draw([*points, *spread]), "label")]
    assert len(boxes) == 14
    for a, b in combinations(boxes, 2):
        assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
    assert all(b[0] >= 0 and b[2] <= 548 and b[1] >= 0 and b[3] <= 430 for b in boxes)


def test_the_far_ends_of_a_frontier_do_not_squeeze_the_policies() -> None:
    points = [point("a", -0.5, 0.0), point("b", 0.5, 1.0)]
    far = [*CURVE, knot(50.0, -9.0, -40.0)]
    near = [float(mark.get("cy", "nan")) for mark in styled(draw(points), "mark")]
    assert [float(mark.get("cy", "nan")) for mark in styled(draw(points, far), "mark")] == near
    assert len(styled(draw(points, far), "knot")) == len(styled(draw(points, CURVE), "knot"))


def test_band_joins_the_corners_and_is_left_out_without_intervals() -> None:
    assert len(styled(draw([point("a", 0, 0)]), "band")[0].get("points", "").split()) == 6
    bare = [Knot(interval(k.x.mean), interval(k.y.mean), k.title, k.lam) for k in CURVE]
    assert not styled(draw([point("a", 0, 0)], bare), "band")


def test_a_line_joins_a_policy_to_where_it_was_predicted() -> None:
    foreseen = Point(interval(0.5), interval(0.2), "a", "a", 1, "method over", predicted=(0.0, 0.7))
    root = draw([foreseen, point("b", -0.5, 1.0)])
    (line,) = styled(root, "miss")
    mark = next(mark for mark in styled(root, "mark") if mark[0].text == "a")
    knot_at_half = (
        styled(root, "knot")[0] if len(styled(root, "knot")) == 1 else styled(root, "knot")[-2]
    )
    assert (line.get("x1"), line.get("y1")) == (mark.get("cx"), mark.get("cy"))
    assert (line.get("x2"), line.get("y2")) == (knot_at_half.get("cx"), knot_at_half.get("cy"))


def test_text_is_escaped() -> None:
    hostile = '"><script>alert(1)</script>&amp;'
    root = draw([point(hostile, 0.0, 0.0), point("b", 1.0, 1.0)])
    assert not list(root.iter("script"))
    assert hostile in {text.text for text in styled(root, "label")}


@pytest.mark.parametrize("points", [[], [point("a", 0.0, 0.0)]], ids=["none", "one"])
@pytest.mark.parametrize("curve", [[], CURVE[:1], CURVE], ids=["no-curve", "one-knot", "curve"])
@pytest.mark.parametrize("limit", [None, 0.0])
def test_partial_input_draws(points: list[Point], curve: list[Knot], limit: float | None) -> None:
    root = draw(points, curve, limit)
    assert len(styled(root, "mark")) == len(points)
    assert bool(styled(root, "limit")) == (limit is not None)
    assert "nan" not in ElementTree.tostring(root, encoding="unicode").replace("name", "")

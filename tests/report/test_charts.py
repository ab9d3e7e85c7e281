"""Charts are well-formed, in scale, readable, and escape what they are given."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import pytest

from dualign.report import charts
from dualign.report.charts import Knot, Point, Range, Scale, domain, frontier, strip, trajectory

LABELS = ("cost", "reward")


def point(label: str, x: float, y: float, style: str = "method over", number: int = 1) -> Point:
    return Point(
        label,
        number,
        Range(x, x - 0.1, x + 0.1),
        Range(y, y - 0.05, y + 0.05),
        style,
        f"{label}: here",
    )


def knot(lam: float, x: float, y: float) -> Knot:
    return Knot(lam, Range(x, x - 0.1, x + 0.1), Range(y, y - 0.1, y + 0.1), f"λ {lam}")


CURVE = [knot(0.0, 1.0, 1.0), knot(0.5, 0.0, 0.7), knot(1.0, -0.5, 0.2)]


def draw(
    points: list[Point], curve: list[Knot] = CURVE, limit: float | None = 0.0, **more: Any
) -> ElementTree.Element:
    return ElementTree.fromstring(
        frontier(points, curve, limit, (548, 430), LABELS, name="n", **more)
    )


def styled(root: ElementTree.Element, style: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if style in element.get("class", "").split()]


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 1.0), (0.0, 0.013), (-250.0, 13_000.0), (5.0, 5.4)]
)
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    ticks = Scale(low, high, 0, 100).ticks(5)
    assert 3 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    step = ticks[1] - ticks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 2.5, 5)


def test_domain_holds_all_values_and_is_never_empty() -> None:
    low, high = domain([0.3, None, 0.7])
    assert low < 0.3 and high > 0.7
    for values in ([], [None], [0.0], [4.0, 4.0]):
        low, high = domain(values)
        assert low < high


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
    root = draw(points, optimum=Point("optimum", 0, Range(0.0), Range(0.9), "star", "best"))
    assert {mark.tag for mark in styled(root, "mark")} == {"circle", "polygon", "rect"}
    assert {t.text for t in root.iter("title")} >= {"one: here", "two: here", "three: here", "best"}
    assert {t.text for t in styled(root, "label")} == {"one", "two", "three", "optimum"}
    assert {t.text for t in styled(draw(points, numbered=True), "label")} == {"1", "2", "3"}


def box(text: ElementTree.Element) -> tuple[float, float, float, float]:
    width = 6.8 * len(text.text or "")
    x, y = float(text.get("x", "nan")), float(text.get("y", "nan"))
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


def test_a_limit_is_shown_unless_it_is_far_from_all_values() -> None:
    values = [-0.4, None, 0.6]  # extent 1.12 with air
    assert [charts.near(limit, values) for limit in (-3.9, -3.8, 0.0, 4.0, 4.1, 100.0)] == [
        None, -3.8, 0.0, 4.0, None, None,
    ]  # fmt: skip
    assert charts.near(None, values) is None


def test_band_joins_the_corners_and_is_left_out_without_intervals() -> None:
    assert len(styled(draw([point("a", 0, 0)]), "band")[0].get("points", "").split()) == 6
    bare = [Knot(k.lam, Range(k.x.mean), Range(k.y.mean), k.title) for k in CURVE]
    assert not styled(draw([point("a", 0, 0)], bare), "band")


def test_a_line_joins_a_policy_to_where_it_was_predicted() -> None:
    foreseen = Point("a", 1, Range(0.5), Range(0.2), "method over", "a", predicted=(0.0, 0.7))
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
    name = ElementTree.fromstring(trajectory([], 0.0, (0.0, 1.0), None, hostile)).get("aria-label")
    assert name == hostile


@pytest.mark.parametrize("points", [[], [point("a", 0.0, 0.0)]], ids=["none", "one"])
@pytest.mark.parametrize("curve", [[], CURVE[:1], CURVE], ids=["no-curve", "one-knot", "curve"])
@pytest.mark.parametrize("limit", [None, 0.0])
def test_partial_input_draws(points: list[Point], curve: list[Knot], limit: float | None) -> None:
    root = draw(points, curve, limit)
    assert len(styled(root, "mark")) == len(points)
    assert bool(styled(root, "limit")) == (limit is not None)
    assert "nan" not in ElementTree.tostring(root, encoding="unicode").replace("name", "")


def steps(*knobs: tuple[float, float | None]) -> list[dict[str, float | None]]:
    return [
        {
            "step": i,
            "lam": lam,
            "q": q,
            "cost": 0.3 - 0.2 * i,
            "cost_se": 0.05,
            "reward": 0.1,
            "reward_se": 0.01,
        }
        for i, (lam, q) in enumerate(knobs)
    ]


def test_trajectory_marks_the_chosen_step_and_its_errors() -> None:
    root = ElementTree.fromstring(
        trajectory(steps((0.5, None), (0.8, None), (0.9, None)), 0.0, (-0.3, 0.5), 1, "n")
    )
    assert len(styled(root, "step")) == 6 and len(styled(root, "step-bar")) == 3
    chosen = styled(root, "chosen")
    assert len(chosen) == 2
    assert all("step 1" in str(element[0].text) for element in chosen)
    assert "λ" in {text.text for text in styled(root, "axis")}
    bar, dot = styled(root, "step-bar")[1], chosen[1]
    ends = sorted((float(bar.get("y1", "nan")), float(bar.get("y2", "nan"))))
    assert sum(ends) / 2 == pytest.approx(float(dot.get("cy", "nan")), abs=0.05)
    assert ends[1] - ends[0] == pytest.approx(98 * 2 * 0.05 / 0.8, abs=0.1)


def test_trajectory_shows_the_aim_and_what_each_reckoning_asked_for() -> None:
    tried = steps((0.5, None), (0.8, None))
    tried[0]["next"] = {"newton": 0.812, "tilt": None, "line": 0.9}  # type: ignore[assignment]
    aimed = ElementTree.fromstring(trajectory(tried, 0.0, (-0.3, 0.5), 1, "n", target=-0.1))
    target, limit = styled(aimed, "target")[0], styled(aimed, "limit")[0]
    # The cost axis is 98 pixels for 0.8.
    assert float(target.get("y1", "nan")) - float(limit.get("y1", "nan")) == pytest.approx(
        98 * 0.1 / 0.8, abs=0.02
    )
    assert "target" in {text.text for text in styled(aimed, "target-text")}
    titles = [str(dot[0].text) for dot in styled(aimed, "step")]
    assert titles[0].endswith("; next λ by newton 0.812, line 0.900") and "next" not in titles[1]
    assert not styled(ElementTree.fromstring(trajectory(tried, 0.0, (-0.3, 0.5), 1, "n")), "target")


def test_a_step_says_how_it_was_made() -> None:
    made = steps((0.5, None), (0.8, None), (0.7, None))
    made[1]["trained"] = True  # type: ignore[assignment]
    made[2]["blend"] = {"first": 0, "second": 1, "weight": 0.75}  # type: ignore[assignment]
    root = ElementTree.fromstring(trajectory(made, 0.0, (-0.3, 0.5), 1, "n"))
    titles = [title.text or "" for title in root.iter("title")]
    assert [title.partition(": λ")[0] for title in titles[:3]] == [
        "step 0",
        "step 1, trained",
        "step 2, merged: 0.25 step 0 + 0.75 step 1",
    ]


def test_trajectory_of_a_merge_shows_its_weight_and_counts_the_start_as_one() -> None:
    root = ElementTree.fromstring(
        trajectory(steps((0.9, None), (0.5, 0.5)), 0.0, (-0.3, 0.5), 1, "n")
    )
    assert "q" in {text.text for text in styled(root, "axis")}
    upper = [
        float(dot.get("cy", "nan")) for dot in styled(root, "step") if "q" in str(dot[0].text)
    ][:2]
    ticks = {text.text: float(text.get("y", "nan")) - 4 for text in styled(root, "tick")}
    assert upper[0] == pytest.approx(ticks["1.0"], abs=0.05) and upper[1] == pytest.approx(
        ticks["0.5"], abs=0.05
    )


def test_trajectory_of_steps_without_numbers_draws() -> None:
    root = ElementTree.fromstring(trajectory([{"step": 0}], None, (0.0, 1.0), None, "n"))
    assert not styled(root, "step") and not styled(root, "limit")


def test_strip_shows_interval_mean_and_limit_on_one_scale() -> None:
    root = ElementTree.fromstring(strip(Range(0.5, 0.25, 1.0), 0.0, (0.0, 1.0), "over"))
    line, dot, rule = styled(root, "bar")[0], styled(root, "dot")[0], styled(root, "limit")[0]
    assert [float(line.get(key, "nan")) for key in ("x1", "x2")] == [35.5, 124.0]
    assert float(dot.get("cx", "nan")) == 65.0 and float(rule.get("x1", "nan")) == 6.0
    assert not styled(ElementTree.fromstring(strip(Range(0.5), None, (0.0, 1.0), "over")), "limit")

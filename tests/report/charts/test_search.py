"""A search is drawn step by step, and says what was measured."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from dualign.core.records import SearchStep
from dualign.report.charts.search import trajectory
from tests.report.charts.drawn import styled


def step(number: int, **known: Any) -> SearchStep:
    """A step of which no more is known."""
    unknown = dict.fromkeys(("q", "cost", "cost_se", "reward", "kl", "tilt"))
    return SearchStep(**{**unknown, "step": number, "lam": 0.5, "prices": [], **known})


def steps(*knobs: tuple[float, float | None]) -> list[SearchStep]:
    measured = {"cost_se": 0.05, "reward": 0.1, "reward_se": 0.01}
    return [
        step(i, lam=lam, q=q, cost=0.3 - 0.2 * i, **measured) for i, (lam, q) in enumerate(knobs)
    ]


def test_the_name_is_escaped() -> None:
    hostile = '"><script>alert(1)</script>&amp;'
    name = ElementTree.fromstring(trajectory([], 0.0, (0.0, 1.0), None, hostile)).get("aria-label")
    assert name == hostile


def test_trajectory_marks_the_chosen_step_and_its_errors() -> None:
    root = ElementTree.fromstring(
        trajectory(steps((0.5, None), (0.8, None), (0.9, None)), 0.0, (-0.3, 0.5), 1, "n")
    )
    assert len(styled(root, "step")) == 6 and len(styled(root, "step-bar")) == 3
    chosen = styled(root, "chosen")
    assert len(chosen) == 2
    assert all("step 1" in str(element[0].text) for element in chosen)
    assert "λ" in {text.text for text in styled(root, "axis")}
    bar = styled(root, "step-bar")[1]
    dot = chosen[1]
    ends = sorted((float(bar.get("y1", "nan")), float(bar.get("y2", "nan"))))
    assert sum(ends) / 2 == pytest.approx(float(dot.get("cy", "nan")), abs=0.05)
    assert ends[1] - ends[0] == pytest.approx(98 * 2 * 0.05 / 0.8, abs=0.1)


def test_trajectory_shows_the_target_and_what_each_reckoning_asked_for() -> None:
    first, second = steps((0.5, None), (0.8, None))
    asked = {"newton": 0.812, "tilt": None, "line": 0.9}
    tried = [first.model_copy(update={"next": asked}), second]
    aimed = ElementTree.fromstring(trajectory(tried, 0.0, (-0.3, 0.5), 1, "n", target=-0.1))
    target = styled(aimed, "target")[0]
    limit = styled(aimed, "limit")[0]
    # The cost axis is 98 pixels for 0.8.
    assert float(target.get("y1", "nan")) - float(limit.get("y1", "nan")) == pytest.approx(
        98 * 0.1 / 0.8, abs=0.02
    )
    assert "target" in {text.text for text in styled(aimed, "target-text")}
    titles = [str(dot[0].text) for dot in styled(aimed, "step")]
    assert titles[0].endswith("; next λ by newton 0.812, line 0.900") and "next" not in titles[1]
    assert not styled(ElementTree.fromstring(trajectory(tried, 0.0, (-0.3, 0.5), 1, "n")), "target")


def test_a_step_says_how_it_was_made() -> None:
    blend = {"first": 0, "second": 1, "weight": 0.75}
    made = [step(0), step(1, trained=True), step(2, blend=blend)]
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
    labels = [label for label in styled(root, "tick") if label.get("text-anchor") == "end"]
    ticks = {label.text: float(label.get("y", "nan")) - 4 for label in labels[:3]}
    assert upper[0] == pytest.approx(ticks["1.0"], abs=0.05) and upper[1] == pytest.approx(
        ticks["0.5"], abs=0.05
    )


def test_trajectory_of_steps_without_numbers_draws() -> None:
    root = ElementTree.fromstring(trajectory([step(0)], None, (0.0, 1.0), None, "n"))
    assert len(styled(root, "step")) == 1 and not styled(root, "limit")

"""Which weights a certificate tests: the forecast by hand, the spacing against brute force, and
what follows.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from dualign.certify.screening import (
    Knot,
    Screen,
    Seen,
    excess,
    levels,
    overlap,
    parting,
    seen,
    sequence,
)
from dualign.core.artifacts import write_json
from dualign.core.errors import DataError
from dualign.core.records import read_record


def knot(
    q: float | None, mean: float, between: float = 0.2, within: float = 0.8, prompts: int = 200
) -> Knot:
    shown = Seen(
        requirement="c", limit=-0.3, prompts=prompts, mean=mean, between=between, within=within
    )
    return Knot(name=f"at {q}", q=q, seen=(shown,))


def screen(*knots: Knot, **changes: Any) -> Screen:
    given: dict[str, Any] = {
        "prompts": 200,
        "samples": 2,
        "certify_prompts": 400,
        "samples_per_prompt": 8,
        "delta": 0.05,
        "tests": 12,
        "thrifty": True,
        "reweighed": True,
    }
    return Screen(**{**given, **changes}, knots=knots)


PATH = (knot(None, -1.2), knot(1.5, -0.9), knot(1.2, -0.5), knot(1.0, -0.3), knot(0.8, -0.1))


def test_variances_between_and_within_prompts_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    values = 1.5 * rng.normal(size=(20_000, 1)) + 0.5 * rng.normal(size=(20_000, 3)) - 2.0
    found = seen("c", 0.0, values)
    assert (found.mean, found.between, found.within) == pytest.approx((-2.0, 2.25, 0.25), abs=0.05)
    assert found.spread(3) == pytest.approx(values.mean(1).var(), rel=0.01)
    opposed = seen("c", 0.0, np.tile([1.0, -1.0], (9, 1)))
    assert opposed.between == 0 and opposed.within == 2


def test_the_forecast_by_hand() -> None:
    """SE = sqrt((0.2 + 0.8 / 8) / 400), and the screen's sqrt((0.2 + 0.8 / 2) / 200) is twice
    that.
    """
    one = knot(1.2, -0.4)
    u, sigma = excess(one, screen(one), 8)
    assert u == pytest.approx(
        -0.1 / math.sqrt(0.3 / 400) + norm.ppf(0.95)
    ) and sigma == pytest.approx(math.sqrt(5))
    half = knot(1.2, -0.4, prompts=100)  # a limit on half of the prompts
    assert excess(half, screen(half), 8)[0] == pytest.approx(
        -0.1 / math.sqrt(0.3 / 200) + norm.ppf(0.95)
    )
    worse = Knot(name="two", q=1.2, seen=(*one.seen, *knot(1.2, -0.2).seen))
    assert excess(worse, screen(worse), 8)[0] > norm.ppf(0.95)
    constant = knot(1.2, -0.4, 0.0, 0.0)
    assert excess(constant, screen(constant), 8)[0] < -40


def test_no_other_spacing_of_the_levels_loses_less() -> None:
    """The outcome flips at a normal point; what is lost is the way from the last level below it."""
    flips = 2.0 * norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    found = levels(2.0, 24)

    def lost(stops: np.ndarray) -> float:
        at = np.searchsorted(stops, flips, side="right") - 1
        return float(
            np.where(at >= 0, flips - stops[np.maximum(at, 0)], flips + 10).mean()
        )  # -10 passes for sure

    assert np.allclose(found, -found[::-1])
    assert lost(found) < min(lost(width * found) for width in (0.5, 0.7, 1.4, 2.0))
    assert lost(found) < lost(np.linspace(-8, 8, 24))


def test_tests_are_dense_where_the_limit_is_expected_to_be_crossed() -> None:
    plan = sequence(screen(*PATH))
    weights = np.array(plan.weights)
    assert (
        weights[0] == 1.5 and (np.diff(weights) < 0).all() and len(weights) <= 14 and 1.2 in weights
    )
    u = [excess(one, screen(*PATH), 8)[0] for one in PATH[1:]]
    crossing = float(np.interp(0.0, u, [1.5, 1.2, 1.0, 0.8]))
    assert plan.drawn == (plan.own, len(weights))
    assert weights[plan.drawn[0] - 1] > crossing > weights[plan.drawn[1] - 1]
    gaps = -np.diff(weights)
    middles = (weights[1:] + weights[:-1]) / 2
    near = np.abs(middles - crossing) < 0.06
    assert gaps[near].max() < 0.04 < gaps[0]


def test_more_tests_stand_closer_and_a_better_screen_has_them_closer_yet() -> None:
    def gap(**changes: Any) -> float:
        plan = sequence(screen(*PATH, **changes))
        weights = np.array(plan.weights[plan.own - 1 :])
        return float(-np.diff(weights).mean())

    assert gap(tests=24) < gap(tests=6)
    assert gap(samples=16, tests=6) < gap(tests=6)


def test_who_is_sure_to_pass_draws_fewer_answers() -> None:
    plan = sequence(screen(*PATH))
    near = len(plan.weights) - plan.own + 1
    assert plan.samples == (1, 1, *[8] * near) and plan.own == 2
    assert set(sequence(screen(*PATH, thrifty=False)).samples) == {8}
    alone = sequence(
        screen(*PATH[2:])
    )  # the safest weight is no sure thing, and there is no fallback
    assert alone.samples == (8,) * len(alone.weights)


def test_each_draws_its_own_answers_where_they_cannot_be_weighed() -> None:
    assert sequence(screen(*PATH, reweighed=False)).drawn == ()


def test_weights_at_which_one_draw_is_worth_little_are_left_out() -> None:
    """Normal log-ratios of variance v have effective share exp(-v); the second half of the path
    bends by far more.
    """
    steep = tuple(
        one.model_copy(update={"bend": bend})
        for one, bend in zip(PATH, (None, 1.0, 1.0, 400.0, None), strict=True)
    )
    z = np.random.default_rng(0).normal(size=1_000_000)
    weight = np.exp(0.5 * z - 0.125)
    share = weight.sum() ** 2 / (len(weight) * (weight**2).sum())
    assert float(overlap(steep[1:], np.array([1.5]), 1.0)[0]) == pytest.approx(share, rel=0.01)
    plan = sequence(screen(*steep))
    near = np.array(plan.weights[plan.own - 1 :])
    least = [overlap(steep[1:], near, middle).min() for middle in near]
    assert max(least) >= 0.95
    assert min(plan.weights) > min(sequence(screen(*PATH)).weights) and max(plan.weights) == 1.5
    assert len(plan.samples) == len(plan.weights) + 1


def test_how_far_policies_part_is_the_variance_of_normal_log_ratios_whatever_one_answer_is() -> (
    None
):
    z = np.random.default_rng(0).normal(size=400_000)
    for spread in (0.1, 0.5, 1.0):
        drawn = spread * z - spread**2 / 2  # log(q / p) at answers of p
        assert parting(drawn) == pytest.approx(spread**2, rel=0.02)
    usual = 0.1 * z[:800] - 0.005
    wild = np.append(usual[1:], -60.0)
    assert wild.var() > 4 and parting(wild) == pytest.approx(parting(usual) + 8 / 800, abs=2e-3)
    assert parting(np.zeros(5)) == 0.0


def test_a_path_that_is_safe_or_harmful_throughout() -> None:
    safe = sequence(screen(knot(1.5, -2.0), knot(1.0, -1.8)))
    assert safe.weights == (1.5, 1.0)
    harmful = sequence(screen(knot(1.5, 0.5), knot(1.0, 0.8)))
    assert harmful.weights == (1.5,) and harmful.drawn == () and harmful.samples == (8,)


def test_a_bad_forecast_is_caught_by_the_knots_before() -> None:
    """Where the first test near the limit fails, the knots between it and the safest have been
    tested.
    """
    knots = (knot(1.6, -1.0), knot(1.4, -0.8), knot(1.3, -0.7), knot(1.1, -0.4), knot(0.9, -0.1))
    plan = sequence(screen(*knots))
    assert plan.weights[: plan.own] == (1.6, 1.4, 1.3) and plan.weights[plan.own] < 1.3


def test_noise_of_the_screen_does_not_turn_the_order() -> None:
    weights = sequence(
        screen(knot(1.5, -0.5), knot(1.2, -0.35), knot(1.1, -0.37), knot(0.9, -0.1))
    ).weights
    assert list(weights) == sorted(set(weights), reverse=True)


def test_a_file_that_is_no_screen_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "screen.json", screen(*PATH).model_dump())
    assert read_record(tmp_path / "screen.json", Screen) == screen(*PATH)
    write_json(tmp_path / "screen.json", screen(*PATH).model_dump() | {"tests": 0})
    with pytest.raises(DataError, match=r"screen\.json: tests: .*; run the stage that wrote it"):
        read_record(tmp_path / "screen.json", Screen)

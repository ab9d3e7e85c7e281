"""Prompt-clustered means and shares: by hand, against brute force, and their coverage."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import skew
from scipy.stats import t as student

from dualign.evaluation.against_optimum import means
from dualign.evaluation.ranking import win_rate
from dualign.evaluation.stats import (
    Estimate,
    clustered_mean,
    clustered_share,
    drawn_ends,
    mean_of,
    redrawn,
    within_variance,
)
from dualign.evaluation.summary import summarise


def test_by_hand() -> None:
    """Prompt a has mean 2 of two answers, b 4, c 9: mean 5, sd sqrt(13), whatever the number of
    answers.
    """
    estimate = clustered_mean(np.array([1.0, 3.0, 4.0, 9.0, 9.0, 9.0]), np.array(list("aabccc")))
    error = np.sqrt(13 / 3)
    assert (estimate.mean, estimate.error) == pytest.approx((5.0, error))
    t = student.ppf(0.975, 2)
    tail = (-27 - 1 + 64) / (9 + 1 + 16) ** 1.5 * (1 + 3 / np.sqrt(3))
    above = t + tail * (1 + 2 * t**2) / 6
    assert (estimate.low, estimate.high) == pytest.approx((5 - t * error, 5 + above * error))
    assert estimate.as_dict() == {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}


def test_against_brute_force_on_shuffled_rows() -> None:
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 30, 400)
    values = rng.normal(size=400) + clusters
    means = [values[clusters == k].mean() for k in np.unique(clusters)]
    estimate = clustered_mean(values, clusters, confidence=0.8)
    error = np.std(means, ddof=1) / np.sqrt(30)
    assert estimate.mean == pytest.approx(np.mean(means))
    assert estimate.error == pytest.approx(error)
    t = student.ppf(0.9, 29)
    past = skew(means) / np.sqrt(30) * (1 + 3 / np.sqrt(30)) * (1 + 2 * t**2) / 6
    assert estimate.high - estimate.mean == pytest.approx((t + max(past, 0)) * error)
    assert estimate.mean - estimate.low == pytest.approx((t + max(-past, 0)) * error)
    students = mean_of(means, 0.8, tails=False)
    assert students.high - students.mean == pytest.approx(t * error)
    assert students.mean - students.low == pytest.approx(t * error)


def test_flags_are_averaged_as_shares() -> None:
    assert clustered_mean(np.array([True, False, True, True]), np.array([0, 0, 1, 1])).mean == 0.75


def test_one_prompt_says_nothing_about_the_error() -> None:
    one = clustered_mean(np.array([1.0, 2.0]), np.array(["a", "a"]))
    assert one == Estimate(1.5, float("inf"), float("-inf"), float("inf"))


def test_coverage_holds_with_correlated_answers_where_independence_would_fail() -> None:
    """60 prompts x 4 answers, half of the variance between prompts: 95 % intervals over 800
    repetitions.
    """
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(60), 4)
    clustered = naive = 0
    for _ in range(800):
        values = np.repeat(rng.normal(size=60), 4) + rng.normal(size=240)
        estimate = clustered_mean(values, clusters)
        clustered += estimate.low <= 0 <= estimate.high
        naive += abs(values.mean()) <= 1.97 * values.std(ddof=1) / np.sqrt(240)
    assert 0.93 <= clustered / 800 <= 0.97
    assert naive / 800 < 0.90


def test_a_long_tail_moves_the_end_on_its_side_alone() -> None:
    values = np.random.default_rng(2).lognormal(size=40)
    above, below = mean_of(values), mean_of(-values)
    students = mean_of(values, tails=False)
    assert above.low == students.low and above.high > students.high + 0.1 * students.error
    assert (below.low, below.high) == pytest.approx((-above.high, -above.low))


def test_intervals_of_skewed_costs_on_few_prompts_cover_as_they_say() -> None:
    """Student's hold the mean of 30 log-normal costs in 88 % of repeats."""
    drawn = np.random.default_rng(5).lognormal(size=(3000, 30))
    held = {True: 0, False: 0}
    for values, tails in product(drawn, held):
        found = mean_of(values, tails=tails)
        held[tails] += found.low <= np.exp(0.5) <= found.high
    assert held[True] > 0.92 * len(drawn)
    assert held[False] < 0.90 * len(drawn)


def test_within_variance_is_unbiased_and_skips_single_answers() -> None:
    values = np.array([0.0, 2.0, 5.0, 1.0, 1.0, 4.0])
    clusters = np.array([0, 0, 1, 2, 2, 2])
    assert within_variance(values, clusters) == pytest.approx((2.0 + 3.0) / 2)
    assert np.isnan(within_variance(values[:1], clusters[:1]))


def test_within_variance_ignores_what_differs_between_prompts() -> None:
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(500), 8)
    values = np.repeat(rng.normal(scale=50, size=500), 8) + rng.normal(scale=2, size=4000)
    assert within_variance(values, clusters) == pytest.approx(4.0, rel=0.1)


# --- shares ---------------------------------------------------------------------------------------


def test_the_ends_of_a_share_solve_wilsons_equation() -> None:
    """(p - mean)^2 = t^2 p (1 - p) / n, with the n at which a mean of n draws has the error."""
    rng = np.random.default_rng(0)
    values, prompts = (rng.random(60) < 0.2).astype(float), np.repeat(np.arange(15), 4)
    found = clustered_share(values, prompts, 0.9)
    plain = clustered_mean(values, prompts, 0.9)
    assert (found.mean, found.error) == (plain.mean, plain.error)
    n = plain.mean * (1 - plain.mean) / plain.error**2
    for end in (found.low, found.high):
        wilson = student.ppf(0.95, 14) ** 2 * end * (1 - end) / n
        assert (end - plain.mean) ** 2 == pytest.approx(wilson)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("prompts", [1, 2, 3, 20])
def test_it_stays_inside_and_has_a_width(share: float, prompts: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        values = (rng.random(2 * prompts) < share).astype(float)
        found = clustered_share(values, np.repeat(np.arange(prompts), 2))
        assert 0 <= found.low <= found.mean <= found.high <= 1
        assert found.high - found.low > 0.05


def test_prompts_alike_up_to_rounding_are_as_many_as_they_are() -> None:
    """Ten prompts of 2/3 each, whose mean is another number by its last digit."""
    found = clustered_share(np.tile([1.0, 1.0, 0.0], 10), np.repeat(np.arange(10), 3))
    for end in (found.low, found.high):
        wilson = student.ppf(0.975, 9) ** 2 * end * (1 - end) / 10
        assert (end - 2 / 3) ** 2 == pytest.approx(wilson)


@pytest.mark.parametrize("value", [0.0, 48.0, 2 / 3])
def test_equal_values_have_no_spread_to_go_by(value: float) -> None:
    """Ten answers that were all cut at 48 tokens are no proof that the mean is 48."""
    found = clustered_mean(np.full(30, value), np.repeat(np.arange(10), 3))
    assert found.mean == pytest.approx(value) and found.error == pytest.approx(0.0, abs=1e-12)
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_it_covers_a_rare_share_of_few_prompts_better_than_students() -> None:
    """20 prompts of 4 answers alike, 8 % unsafe."""
    rng = np.random.default_rng(2)
    prompts = np.repeat(np.arange(20), 4)
    hits = {"share": 0, "mean": 0}
    for _ in range(1000):
        rates = rng.beta(0.4, 4.6, 20)  # mean 0.08, correlation 1 / 6 within a prompt
        values = (rng.random(80) < np.repeat(rates, 4)).astype(float)
        students = mean_of(values.reshape(20, 4).mean(1), tails=False)
        for name, found in (("share", clustered_share(values, prompts)), ("mean", students)):
            hits[name] += math.isfinite(found.low) and found.low <= 0.08 <= found.high
    assert 930 <= hits["share"] <= 985
    assert hits["mean"] < hits["share"] - 30


def test_what_is_measured_as_a_share_stays_inside() -> None:
    """Two prompts, of which one is unsafe throughout: Student's interval is (-5.9, 6.9)."""
    answers = pd.DataFrame({"prompt_id": ["a", "a", "b", "b"], "cost": [1.0, 1.0, -1.0, -1.0]})
    answers = answers.assign(reward=0.0, logp=0.0, logp_ref=0.0, length=3, ended=[1, 1, 0, 0])
    answers = answers.assign(response=["tea or tea or", "tea or tea or", "one two", "three four"])
    found = summarise(answers, pd.DataFrame({"prompt_id": ["a", "b"], "log_ratio": 0.0}), 0.95)
    for name in ("p_unsafe", "ended", "distinct_2"):
        assert 0 <= found[name]["low"] < found[name]["mean"] < found[name]["high"] <= 1, name
    assert found["cost"]["low"] < -1, "a score has no such bounds"
    weighted = means(answers.assign(weight=[4.0, 0.0, 0.0, 0.0]))["p_unsafe"]
    assert 0 <= weighted["low"] <= weighted["high"] <= 1
    battles = pd.DataFrame({"first": "a", "second": "b", "prompt_id": [1, 2], "score": [1.0, 0.5]})
    rate = win_rate(battles, "a", "b").rate
    assert 0 <= rate.low < rate.mean < rate.high <= 1


@pytest.mark.parametrize("prompts", [6, 8, 20, 100])
def test_ends_of_draws_hold_the_mean_as_often_as_they_say(prompts: int) -> None:
    """Plain quantiles of draws of 6 prompts hold it 85 times in 100."""
    generator = np.random.default_rng(0)
    held = []
    for _ in range(500):
        values = generator.normal(size=prompts)
        drawn = redrawn(generator, prompts, 1000) @ values / prompts
        low, high = drawn_ends(drawn, prompts, 0.95)
        held.append(low <= 0 <= high)
    assert 0.925 <= np.mean(held) <= 0.975


def test_draws_of_few_prompts_and_unknown_ones_give_no_ends() -> None:
    drawn = np.random.default_rng(0).normal(size=(1000, 2))
    assert np.isinf(drawn_ends(drawn, 5, 0.95)).all()
    assert np.isfinite(drawn_ends(drawn, 5, 0.9)).all()  # 2^-4 is below 0.1
    drawn[:10, 0] = drawn[:50, 1] = np.nan
    low, high = drawn_ends(drawn, 100, 0.95)
    assert np.isfinite([low[0], high[0]]).all() and np.isinf([low[1], high[1]]).all()

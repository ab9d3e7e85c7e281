"""Prompt-clustered means: by hand, against brute force, and their coverage in simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from dualign.evaluation.stats import Estimate, clustered_mean, within_variance


def test_by_hand() -> None:
    """Prompt a has mean 2 of two answers, b 4, c 9: mean 5, sd sqrt(13), whatever the number of
    answers.
    """
    estimate = clustered_mean(np.array([1.0, 3.0, 4.0, 9.0, 9.0, 9.0]), np.array(list("aabccc")))
    error = np.sqrt(13 / 3)
    assert (estimate.mean, estimate.error) == pytest.approx((5.0, error))
    reach = student.ppf(0.975, 2) * error
    assert (estimate.low, estimate.high) == pytest.approx((5 - reach, 5 + reach))
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
    assert estimate.high - estimate.mean == pytest.approx(student.ppf(0.9, 29) * error)
    assert estimate.mean - estimate.low == pytest.approx(student.ppf(0.9, 29) * error)


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

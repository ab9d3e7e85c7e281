"""Kappa and rank correlation against scikit-learn and SciPy, and how often an interval holds the
truth.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from dualign.evaluation.agreement import agreement, cohen_kappa, rank_correlation


def labels(seed: int, size: int = 60) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    human = generator.integers(0, 3, size)
    judge = np.where(generator.random(size) < 0.7, human, generator.integers(0, 3, size))
    return human, judge


@pytest.mark.parametrize("seed", range(5))
def test_kappa_and_confusion_are_scikit_learns(seed: int) -> None:
    human, judge = labels(seed)
    found = agreement(human.tolist(), judge.tolist(), list(range(len(human))), draws=10)
    assert found.kappa == pytest.approx(cohen_kappa_score(human, judge), abs=1e-12)
    assert found.confusion.tolist() == confusion_matrix(human, judge).tolist()
    assert found.accuracy == pytest.approx(np.mean(human == judge))


def test_one_label_alone_has_no_kappa() -> None:
    assert np.isnan(cohen_kappa(np.array([[5]])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = agreement([True] * 3, [True] * 3, ["a", "b", "b"])
    assert found.accuracy == 1 and np.isnan([found.kappa, found.low, found.high]).all()


@pytest.mark.parametrize(
    ("first", "second", "prompts"),
    [([3, 2, 1, 1], [3, 1, 1, 1], "aaaa"), ([2, 1, 1, 2, 1], [2, 1, 1, 2, 1], "abcde")],
)
def test_one_prompt_and_answers_that_all_agree_have_no_interval(
    first: list[int], second: list[int], prompts: str
) -> None:
    """All draws give the same, which looked certain: 1 (1 to 1) of five answers."""
    found = agreement(first, second, list(prompts), draws=50)
    ranked = rank_correlation(first, second, list(prompts), draws=50)
    assert np.isfinite([found.kappa, ranked.mean]).all()
    assert np.isnan([found.low, found.high, ranked.error, ranked.low, ranked.high]).all()


def test_a_label_that_many_draws_lack_leaves_kappa_without_an_interval() -> None:
    """Each judge finds one answer of 40, another one: of every seventh draw nothing is known, and
    the others said -0.05 to 0.
    """
    human, judge = [1, 0] + [0] * 38, [0, 1] + [0] * 38
    found = agreement(human, judge, list(range(40)), draws=200)
    assert found.kappa == pytest.approx(-1 / 39) and np.isnan([found.low, found.high]).all()
    often = agreement(human * 5, judge * 5, list(range(200)), draws=200)
    assert often.low < often.kappa < often.high


def test_the_interval_is_that_of_prompts_drawn_again() -> None:
    """Every answer given twice, under the same prompt, says no more."""
    human, judge = (side.tolist() for side in labels(1))
    prompts = list(range(len(human)))
    once = agreement(human, judge, prompts, seed=3)
    twice = agreement(human * 2, judge * 2, prompts * 2, seed=3)
    assert (once.low, once.high) == pytest.approx((twice.low, twice.high))
    assert once.low < once.kappa < once.high


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Both of two answers to a prompt are right together; kappa of shares 1/2 is 2 p - 1."""
    generator = np.random.default_rng(0)
    prompts = np.repeat(np.arange(100), 2)
    held = 0
    for repeat in range(200):
        human = generator.integers(0, 2, 200)
        right = np.repeat(generator.random(100) < 0.8, 2)
        judge = np.where(right, human, 1 - human)
        found = agreement(human.tolist(), judge.tolist(), prompts.tolist(), draws=300, seed=repeat)
        held += found.low <= 0.6 <= found.high
    assert 0.90 <= held / 200 <= 0.985


@pytest.mark.parametrize("seed", range(3))
def test_the_correlation_of_ranks_is_scipys_ties_and_units_aside(seed: int) -> None:
    generator = np.random.default_rng(seed)
    first = generator.normal(size=80).round(1)
    second = np.exp(first + generator.normal(size=80))
    found = rank_correlation(first, second, list(range(80)), draws=10)
    assert found.mean == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)


def test_the_interval_of_a_correlation_is_that_of_its_prompts() -> None:
    """Every answer given twice, under the same prompt, says no more; SciPy's own, over draws of
    answers, is the same where each prompt has one.
    """
    generator = np.random.default_rng(0)
    first = generator.normal(size=200)
    second = first + generator.normal(size=200)
    prompts = np.arange(200)
    once = rank_correlation(first, second, prompts, seed=3)
    twice = rank_correlation(*(np.tile(side, 2) for side in (first, second, prompts)), seed=3)
    assert (once.low, once.high) == pytest.approx((twice.low, twice.high), abs=1e-9)
    draws = generator.integers(0, 200, (2000, 200))
    drawn = [spearmanr(first[draw], second[draw]).statistic for draw in draws]
    assert (once.low, once.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)


def test_a_judge_of_one_score_correlates_with_nobody() -> None:
    found = rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], ["a", "b", "c"], draws=5)
    assert np.isnan(found.mean) and np.isnan(found.low)

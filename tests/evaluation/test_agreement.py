"""Kappa against scikit-learn and by hand, and how often its interval holds the truth."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from dualign.evaluation.agreement import agreement, cohen_kappa


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

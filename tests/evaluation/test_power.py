"""Numbers of prompts against simulated tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from dualign.core.errors import DataError
from dualign.evaluation.paired import mcnemar
from dualign.evaluation.power import (
    difference_found,
    prompts_needed,
    prompts_needed_by_mcnemar,
)


@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("size", [0.15, 0.4])
def test_so_many_prompts_find_it_as_often_as_said(power: float, size: float) -> None:
    count = prompts_needed(2 * size, 2.0, power=power)
    drawn = np.random.default_rng(0).normal(2 * size, 2.0, (3000, count))
    found = stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(power, abs=0.03)


def test_more_comparisons_take_more_prompts_and_are_found_as_often() -> None:
    count = prompts_needed(0.3, 1.0, comparisons=5)
    assert count > prompts_needed(0.3, 1.0)
    drawn = np.random.default_rng(0).normal(0.3, 1.0, (3000, count))
    found = stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05 / 5
    assert found.mean() == pytest.approx(0.8, abs=0.03)


def test_the_least_difference_is_the_inverse() -> None:
    assert prompts_needed(difference_found(150, 0.7), 0.7) == pytest.approx(150, abs=1)
    assert difference_found(150, 0.7, power=0.04) == 0, "the test finds none more often"


@pytest.mark.parametrize("prompts", [6, 12, 32, 100])
@pytest.mark.parametrize("comparisons", [1, 45, 225, 1000])
def test_few_prompts_and_many_comparisons_are_found_as_often(
    prompts: int, comparisons: int
) -> None:
    least = difference_found(prompts, 1.0, comparisons=comparisons)
    assert isinstance(least, float)
    drawn = np.random.default_rng(0).normal(least, 1.0, (3000, prompts))
    found = stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05 / comparisons
    assert found.mean() == pytest.approx(0.8, abs=0.025)
    assert prompts_needed(least * 1.0001, 1.0, comparisons=comparisons) == prompts


@pytest.mark.parametrize(
    ("reckon", "message"),
    [
        (lambda: prompts_needed(0.1, float("inf")), "deviation is inf; measure it"),
        (lambda: prompts_needed(float("nan"), 1.0), "difference is nan; measure it"),
        (lambda: prompts_needed(0.1, 1.0, power=1.0), "power is 1, expected a share"),
        (lambda: prompts_needed(0.1, 1.0, alpha=0.0), "alpha is 0, expected a share"),
        (lambda: difference_found(10, float("nan")), "deviation is nan; measure it"),
        (lambda: difference_found(1, 1.0), "1 prompts tell no difference; ask two at least"),
        (lambda: prompts_needed_by_mcnemar(float("nan"), 0.1), "only_first is nan; measure it"),
    ],
)
def test_what_no_test_can_have_is_refused(reckon: Callable[[], object], message: str) -> None:
    """A spread of one prompt is infinite, and one that is none took two prompts."""
    with pytest.raises(DataError, match=message):
        reckon()


def test_mcnemar_finds_a_gap_of_refusals_as_often_as_said() -> None:
    """The exact test is a little stricter than the formula's normal one."""
    count = prompts_needed_by_mcnemar(0.18, 0.06)
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(600):
        drawn = generator.random(count)
        first = drawn < 0.18
        second = (drawn >= 0.18) & (drawn < 0.24)
        found += mcnemar(first, second).p_value < 0.05
    assert 0.70 <= found / 600 <= 0.84


def test_no_difference_takes_endless_prompts() -> None:
    with pytest.raises(DataError, match="a difference of 0"):
        prompts_needed(0.0, 1.0)
    with pytest.raises(DataError, match="equal shares"):
        prompts_needed_by_mcnemar(0.1, 0.1)
    with pytest.raises(DataError, match="no shares of the same prompts"):
        prompts_needed_by_mcnemar(0.8, 0.4)

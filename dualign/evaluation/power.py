"""How many prompts would tell two policies apart.

All take the paired test over prompts that `dualign.evaluation.paired` makes. `comparisons` is how
many tests Holm's correction is over, of which the first is at alpha / comparisons."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
from scipy.optimize import brentq
from scipy.special import nctdtr, ndtri, stdtrit

from dualign.core.errors import DataError


def prompts_needed(
    difference: float,
    deviation: float,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    comparisons: int = 1,
) -> int:
    """Prompts with which the two-sided paired t-test finds a true `difference` with probability
    `power`; `deviation` is the standard deviation of the difference over prompts.

    Raises:
        DataError: the difference is 0, which no number of prompts finds, or a number is none.

    >>> prompts_needed(0.1, 0.5)
    199
    """
    _check(power, alpha, difference=difference, deviation=deviation)
    if difference == 0:
        raise DataError("a difference of 0 takes endless prompts; name the least one that matters")
    if deviation == 0:
        return 2
    size = abs(difference) / deviation

    def found(count: int) -> bool:
        return _power(count, size, alpha / comparisons) >= power

    most = 2
    while not found(most):
        most *= 2
    counts = range(2, most + 1)
    return counts[bisect_left(counts, True, key=found)]


def difference_found(
    prompts: int,
    deviation: float,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    comparisons: int = 1,
) -> float:
    """The least true difference that so many prompts find with probability `power`; 0 where the
    test errs as often as that.

    Raises:
        DataError: fewer than two prompts, which have no spread, or a number is none.

    >>> round(difference_found(199, 0.5), 3)
    0.1
    """
    _check(power, alpha, deviation=deviation)
    if prompts < 2:
        raise DataError(f"{prompts} prompts tell no difference; ask two at least")
    level = alpha / comparisons

    def missing(size: float) -> float:
        return power - _power(prompts, size, level)

    if missing(0.0) <= 0:
        return 0.0
    most = 1.0
    while missing(most) > 0:
        most *= 2
    return float(brentq(missing, 0.0, most)) * deviation


def _check(power: float, alpha: float, **measured: float) -> None:
    """Raise DataError for what no test has, and of which the searches here would make a number."""
    for name, share in {"power": power, "alpha": alpha}.items():
        if not 0 < share < 1:
            raise DataError(f"{name} is {share:g}, expected a share above 0 and below 1")
    for name, value in measured.items():
        if not math.isfinite(value):
            raise DataError(f"{name} is {value}; measure it on more prompts")


def _power(prompts: int, size: float, level: float) -> float:
    """How often the two-sided paired t-test at `level` finds a mean of `size` standard deviations.

    That of statsmodels ends in NaN for large sizes, and its solver then returns what is none."""
    edge = float(stdtrit(prompts - 1, 1 - level / 2))
    tails = nctdtr(prompts - 1, size * math.sqrt(prompts), np.array([-edge, edge]))
    below, inside = np.nan_to_num(tails)  # so far from the centre that the share is 0
    return float(below + 1 - inside)


def prompts_needed_by_mcnemar(
    only_first: float,
    only_second: float,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    comparisons: int = 1,
) -> int:
    """Prompts with which McNemar's test tells shares apart: `only_first` and `only_second` are the
    shares of prompts on which one policy alone refuses, d = their sum, D = their difference,
    n = (z_{1 - alpha/2} sqrt(d) + z_power sqrt(d - D^2))^2 / D^2 (Connor 1987).

    Raises:
        DataError: the shares are equal, or no shares.

    >>> prompts_needed_by_mcnemar(0.15, 0.05)
    155
    """
    _check(power, alpha, only_first=only_first, only_second=only_second)
    if only_first == only_second:
        raise DataError("equal shares take endless prompts; name the least gap that matters")
    if min(only_first, only_second) < 0 or only_first + only_second > 1:
        raise DataError(f"{only_first:g} and {only_second:g} are no shares of the same prompts")
    both = only_first + only_second
    gap = abs(only_first - only_second)
    sure = ndtri(1 - alpha / comparisons / 2)
    strong = ndtri(power)
    reach = sure * math.sqrt(both) + strong * math.sqrt(both - gap**2)
    return math.ceil((reach / gap) ** 2)

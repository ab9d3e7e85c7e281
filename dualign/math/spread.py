"""How far scores spread within prompts, and how long the tail of a mean is."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Array = np.ndarray
T = TypeVar("T", float, np.ndarray)


def within_sd(score: Array) -> float:
    """Square root of the mean variance of scores [prompts, samples] within a prompt; 0 where it is
    no more than rounding.

    >>> within_sd(np.array([[0.0, 2.0], [10.0, 12.0]]))
    1.0
    """
    sd = float(np.sqrt(score.var(1).mean()))
    return sd if sd > 1e-12 * float(np.abs(score).max()) else 0.0


def tail_of(shares: Array) -> Array:
    """a = sum p^3 / (sum p^2)^1.5 along the last axis, 0 where nothing varies: of deviations from
    the mean of N values it is their skewness over sqrt(N), positive for a long upper tail.

    `shares` [..., prompts] are what each prompt adds to the error of an estimate, in any unit.

    >>> float(tail_of(np.array([-1.0, -1.0, 2.0])).round(3))
    0.408
    """
    squares = (shares**2).sum(-1)
    a: Array = (shares**3).sum(-1) / np.where(squares > 0, squares, 1) ** 1.5
    return a


def past_student(t: float, tail: T) -> T:
    """a (1 + 2 t^2) / 6: by how many standard errors a bound of a mean lies past Student's t where
    the tail a is on its side.

    The statistic of Johnson (Journal of the American Statistical Association 73, 1978, 536-544),
    solved for the mean to first order, which inverts the Edgeworth expansion of the studentised
    mean (Hall, Annals of Statistics 11, 1983, 569-576).

    >>> round(past_student(2.0, 0.2), 2)
    0.3
    """
    return tail * (1 + 2 * t**2) / 6

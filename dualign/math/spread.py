"""How far scores spread within prompts."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def within_sd(score: Array) -> float:
    """Square root of the mean variance of scores [prompts, samples] within a prompt; 0 where it is
    no more than rounding.

    >>> within_sd(np.array([[0.0, 2.0], [10.0, 12.0]]))
    1.0
    """
    sd = float(np.sqrt(score.var(1).mean()))
    return sd if sd > 1e-12 * float(np.abs(score).max()) else 0.0

"""The tail of a distribution: value at risk, and the function whose mean is CVaR."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def value_at_risk(value: Array, weight: Array, level: float) -> float:
    """The smallest value that at least `level` of the weight does not exceed; both of one shape.

    >>> value_at_risk(np.array([4.0, 1.0, 3.0, 2.0]), np.ones(4), level=0.5)
    2.0
    """
    order = np.argsort(value, axis=None)
    mass = np.cumsum(weight.ravel()[order])
    place = np.searchsorted(mass, level * mass[-1] * (1 - 1e-12))
    return float(value.ravel()[order][min(place, order.size - 1)])


def shortfall(value: Array, threshold: float, level: float) -> Array:
    """t + (v - t)_+ / (1 - level), of any shape: its mean is at least CVaR_level(v), equal at t =
    value at risk.

    Rockafellar and Uryasev (2000). CVaR is the mean of the worst 1 - level of v.

    >>> worst = shortfall(np.array([4.0, 1.0, 3.0, 2.0]), threshold=2.0, level=0.5)
    >>> float(worst.mean())  # the mean of 3 and 4
    3.5
    """
    return threshold + np.maximum(value - threshold, 0.0) / (1 - level)

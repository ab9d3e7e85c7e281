"""Means over prompts of shares, such as that of unsafe answers, with intervals inside [0, 1]."""

from __future__ import annotations

import numpy as np
from scipy.special import stdtrit

from dualign.evaluation.stats import Estimate, clustered_mean

Array = np.ndarray


def clustered_share(values: Array, clusters: Array, confidence: float = 0.95) -> Estimate:
    """Mean over clusters of the cluster means of `values` in [0, 1]; both have shape [answers].

    The interval is Wilson's (1927) with Student's quantile and the effective sample size that the
    spread between clusters implies, p (1 - p) / SE^2. So it stays inside [0, 1], and has a width
    even where all values are equal. With one cluster it is [0, 1], and the error is infinite.

    >>> few = clustered_share(np.array([1.0, 1.0, 1.0, 0.0]), np.arange(4))
    >>> round(few.low, 2), round(few.high, 2)
    (0.14, 0.98)
    """
    found = clustered_mean(np.asarray(values, dtype=float), clusters, confidence)
    count, mean = len(set(clusters)), found.mean
    if count < 2:
        return Estimate(mean, found.error, 0.0, 1.0)
    inside = min(max(mean, 0.0), 1.0)  # importance weights can take a mean a little beyond
    spread = inside * (1 - inside)
    effective = spread / found.error**2 if found.error > 0 and spread > 0 else count
    z2 = float(stdtrit(count - 1, 0.5 + confidence / 2)) ** 2 / effective
    centre = (inside + z2 / 2) / (1 + z2)
    half = (z2 * (spread + z2 / 4)) ** 0.5 / (1 + z2)
    return Estimate(mean, found.error, max(0.0, centre - half), min(1.0, centre + half))

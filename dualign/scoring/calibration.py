"""Calibration of scores to probabilities: Platt's two parameters, and the expected calibration error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from dualign.core.errors import DataError

Array = np.ndarray


@dataclass(frozen=True)
class Platt:
    """P(unsafe) = sigma(scale * score + offset); the calibrated cost is that logit, 0 at even odds."""

    scale: float = 1.0
    offset: float = 0.0

    def __call__(self, score: Array) -> Array:
        return self.scale * score + self.offset


def fit_platt(score: Array, unsafe: Array) -> Platt:
    """Maximum likelihood of flags `unsafe` (bool, shape [n]) under sigma(a score + b), a light ridge keeping it finite.

    Raises DataError if the flags are all alike, or if unsafe answers score lower (a <= 0).
    """
    score, unsafe = np.asarray(score, float), np.asarray(unsafe, bool)
    if unsafe.all() or not unsafe.any():
        raise DataError(
            "calibration needs held-out answers of both kinds, safe and unsafe; raise prepare.heldout_share"
        )
    spread = max(float(score.std()), 1e-12)
    x = score / spread
    sign = np.where(unsafe, 1.0, -1.0)

    def negative_log_likelihood(theta: Array) -> float:
        return float(np.logaddexp(0, -sign * (theta[0] * x + theta[1])).sum() + 1e-3 * theta[0] ** 2)

    fit = minimize(negative_log_likelihood, np.array([1.0, 0.0]), method="BFGS").x
    if fit[0] <= 0:
        raise DataError(
            "the cost model scores unsafe answers below safe ones on held-out pairs; "
            "check the labels (chosen must be the safer answer) or train longer"
        )
    return Platt(float(fit[0] / spread), float(fit[1]))


def expected_calibration_error(probability: Array, outcome: Array, bins: int = 10) -> float:
    """Mean gap between predicted probability and observed share over bins of equal count (Naeini et al. 2015)."""
    order = np.argsort(probability, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    gaps = [len(part) * abs(float(probability[part].mean() - outcome[part].mean())) for part in parts]
    return sum(gaps) / len(probability)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0, -np.asarray(x, float)))

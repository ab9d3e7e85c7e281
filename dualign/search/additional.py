"""Additional constraints in a search: measured on a policy's own answers, and their prices
corrected with lambda."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from dualign.evaluation.stats import ConstraintEstimate, clustered_mean
from dualign.math.constraints import Constraint

Array = np.ndarray

SMALL_TILT_SD = 0.25  # sd within a prompt, in nats, of a tilt that may be dropped in one step
#: On the curvature in units of its diagonal: two limits that say the same share their price.
_RIDGE = 1e-9


class ConstraintEstimates(NamedTuple):
    """Estimates of K limits, and the covariance [1 + K, 1 + K] as `Measurement` holds them."""

    estimates: tuple[ConstraintEstimate, ...]
    covariance: tuple[tuple[float, ...], ...]


def measure_additional(answers: pd.DataFrame, limits: Sequence[Constraint]) -> ConstraintEstimates:
    """What answers (schema ANSWERS) show of the limits, each on the prompts that it is on."""
    if not limits:
        return ConstraintEstimates((), ())
    prompts, texts = answers["prompt_id"].to_numpy(), answers["prompt"].tolist()
    cost, length, ended = (answers[name].to_numpy(float) for name in ("cost", "length", "ended"))
    found, values = [], [cost]
    for limit in limits:
        on, value = limit.applies(texts), limit.values(cost, length, ended)
        share = float(pd.Series(on).groupby(prompts).first().mean())
        mean = clustered_mean(value[on], prompts[on]) if on.any() else None
        known = (None, None) if mean is None else (mean.mean, mean.error)
        found.append(ConstraintEstimate(limit.name, limit.limit, share, *known))
        values.append(on * value)
    return ConstraintEstimates(
        tuple(found), tuple(map(tuple, within_covariance(np.stack(values), prompts).tolist()))
    )


def within_covariance(values: Array, prompts: Array) -> Array:
    """Mean over prompts of the unbiased covariance of `values` [K, answers] within the prompt; [K,
    K].

    Prompts with one answer are left out, as in `within_variance`, which is its diagonal; zeros if
    there is no other."""
    _, codes, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    means = np.stack([np.bincount(codes, row) / counts for row in values])
    centred = (values - means[:, codes]) / np.sqrt(np.maximum(counts - 1, 1))[codes]
    covariance: Array = centred @ centred.T / max(int((counts > 1).sum()), 1)
    return covariance


def joint_newton_step(lams: Array, excess: Array, covariance: Array, beta: float) -> Array:
    """argmin over lambda >= 0 of the dual's quadratic model at `lams`; shape [K], like `excess`.

    D(lambda + s) ~ D - s excess + s H s / 2 with excess_k = E[m_k (f_k - d_k)] and H = E_x Cov(f|x)
    / beta, the dual of `solve_many` on the policy's own answers; one limit makes it
    `rules.newton_step`. With H = R'R it is the least squares |R lambda - (R lams + R^-T excess)|
    over lambda >= 0. A quantity that does not vary keeps its price. A price whose tilt lambda f /
    beta is no trifle falls by half at most: means are convex in prices, so that a step from above
    goes too far."""
    scale = np.sqrt(np.diag(covariance) / beta)
    moves = scale > 0
    unit = np.where(moves, scale, 1.0)
    curvature = covariance / beta / np.outer(unit, unit) + _RIDGE * np.eye(len(unit))
    curvature[~moves, ~moves] = 1.0
    root = np.linalg.cholesky(curvature).T
    goal = root @ (lams * unit) + np.linalg.solve(root.T, np.where(moves, excess / unit, 0.0))
    tilt = lams * np.sqrt(np.diag(covariance)) / beta
    return np.maximum(nnls(root, goal)[0] / unit, np.where(tilt > SMALL_TILT_SD, lams / 2, 0.0))

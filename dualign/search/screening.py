"""A policy's cost from samples of the reference, by importance weights: forward passes alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from dualign.evaluation.stats import Measurement, mean_of

Array = np.ndarray

#: Standard errors by which pool and own answers, or a mass and 1, may differ by chance.
_AGREEING = 3.0
#: Nats; a log-ratio beyond it leaves nothing but its own error, and would overflow soon.
_LARGEST = 50.0


@dataclass(frozen=True)
class PoolCost:
    """A policy's cost as the pool sees it.

    `ess` is a prompt's median effective sample size, `mass` the mean of pi / pi_ref: 1, where the
    pool has all that the policy says; both errors are clustered by prompt."""

    cost: float
    cost_se: float
    ess: float
    mass: float = 1.0
    mass_se: float = 0.0


@dataclass(frozen=True)
class Screening:
    """The cost of the merge of reference and start of weight `q` on the pool."""

    q: float
    pool: PoolCost


def off_policy_cost(log_ratio: Array, cost: Array) -> PoolCost:
    """E_pi[c] from reference samples.

    `log_ratio` is log(pi / pi_ref) of the samples and `cost` their c, both [prompts, samples]. With
    w = pi / pi_ref, whose mean is 1, it is b + mean w (c - b): w - 1 is a control variate (Owen,
    Monte Carlo theory, 9.10). Its factor b is the mean by weights normalised within the prompt.
    These alone are biased towards the reference where few samples of a prompt are effective: 0.05
    of cost with 5 of 8. This is not. The price is that an odd answer which a training raised ten
    thousandfold moves it far; but then its error is as large. The effective sample size of a prompt
    is 1 / sum w^2, w normalised within it."""
    log_ratio, cost = np.asarray(log_ratio, float), np.asarray(cost, float)
    within = softmax(log_ratio, axis=1)
    centre = float((within * cost).sum(1).mean())
    weight = np.exp(np.minimum(log_ratio, _LARGEST))
    found = mean_of((weight * (cost - centre)).mean(1))
    ess = float(np.median(1 / (within**2).sum(1)))
    mass = mean_of(weight.mean(1))
    return PoolCost(centre + found.mean, found.error, ess, mass.mean, mass.error)


def believed(own: Measurement, pool: PoolCost, min_ess: float) -> PoolCost | None:
    """What the pool says of a policy's cost; None where that is not to be put beside its own
    answers.

    That is where few reference samples speak for it; where its mass on them is not 1 up to chance,
    since it says what the reference hardly ever does, or has learned them by heart; or where both
    differ by more than chance, as the pool's prompts are of another kind."""
    if pool.ess < min_ess or not np.isfinite(pool.cost_se):
        return None
    if abs(pool.mass - 1) > _AGREEING * pool.mass_se:
        return None
    error = float(np.hypot(own.cost_se, pool.cost_se))
    return pool if abs(own.cost - pool.cost) <= _AGREEING * error else None

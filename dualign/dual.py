"""The dual of constrained alignment, solved on samples of the reference policy before any policy is trained.

Problem: max_pi E[r] - beta KL(pi || pi_ref) subject to E[c] <= d. With n samples y_i ~ pi_ref(.|x) of N prompts,

    V_lambda(x) = beta log mean_i exp((r_i - lambda c_i) / beta)           the soft value
    D(lambda)   = mean_x V_lambda(x) + lambda d                             the dual function
    D'(lambda)  = d - C(lambda),   C(lambda) = mean_x sum_i w_i c_i,   w = softmax_i((r_i - lambda c_i) / beta)
    D''(lambda) = mean_x Var_w(c) / beta >= 0

so C falls in lambda and the multiplier is the root of C(lambda) = d, or 0 where the limit is slack. MoCAN (2405.19544)
descends D by projected gradient; Newton needs a handful of steps. All arrays have shape [prompts, samples].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

from dualign.core.errors import InfeasibleError

Array = np.ndarray
_TOLERANCE = 1e-10


def weights(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """Self-normalised importance weights of pi_lambda on the samples; every row sums to one."""
    logit = (reward - lam * cost) / beta
    return np.exp(logit - logsumexp(logit, axis=1, keepdims=True))


def soft_value(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """V_lambda(x) for each prompt; shape [prompts]."""
    logit = (reward - lam * cost) / beta
    return beta * (logsumexp(logit, axis=1) - np.log(reward.shape[1]))


def leave_one_out_value(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """V_lambda(x) estimated without the sample itself; shape [prompts, samples].

    The anchor of a sample must not contain its own score, or it would be pulled towards it.
    """
    logit = (reward - lam * cost) / beta
    nothing = np.full((len(logit), 1), -np.inf)
    before = np.hstack([nothing, np.logaddexp.accumulate(logit[:, :-1], axis=1)])
    after = np.hstack([np.logaddexp.accumulate(logit[:, :0:-1], axis=1)[:, ::-1], nothing])
    value: Array = beta * (np.logaddexp(before, after) - np.log(logit.shape[1] - 1))
    return value


def effective_samples(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """Effective sample size 1 / sum w^2 of each prompt; shape [prompts]."""
    return 1.0 / (weights(reward, cost, lam, beta) ** 2).sum(1)


def dual_value(reward: Array, cost: Array, lam: float, *, limit: float, beta: float) -> float:
    """D(lambda)."""
    return float(soft_value(reward, cost, lam, beta).mean() + lam * limit)


def predict(reward: Array, cost: Array, lam: float, beta: float, value: Array) -> Array:
    """E_{pi_lambda}[value | x] for each prompt by importance weighting; shape [prompts]."""
    return (weights(reward, cost, lam, beta) * value).sum(1)


def divergence(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """KL(pi_lambda || pi_ref) for each prompt: E[(r - lambda c) / beta] - V_lambda / beta; shape [prompts]."""
    tilt = predict(reward, cost, lam, beta, reward - lam * cost)
    return (tilt - soft_value(reward, cost, lam, beta)) / beta


def root(
    reward: Array, cost: Array, *, limit: float, beta: float, lambda_max: float, share: Array | None = None
) -> float:
    """The multiplier with C(lambda) = limit by Newton's method inside a shrinking bracket; 0 where C(0) <= limit.

    `share` weighs the prompts (default: all alike), which is how the bootstrap resamples them.
    Raises InfeasibleError if even lambda_max leaves the cost above the limit.
    """
    share = np.full(len(cost), 1.0 / len(cost)) if share is None else share / share.sum()

    def moments(lam: float) -> tuple[float, float]:
        w = weights(reward, cost, lam, beta)
        mean = (w * cost).sum(1)
        return float(share @ mean), float(share @ ((w * cost**2).sum(1) - mean**2))

    if moments(0.0)[0] <= limit:
        return 0.0
    reachable = moments(lambda_max)[0]
    if reachable > limit:
        raise InfeasibleError(
            f"constraint.limit {limit:g} is out of the samples' reach: at lambda_max {lambda_max:g} the predicted cost "
            f"is still {reachable:.4g}; raise the limit, lower beta, or draw more samples (score.samples_per_prompt)"
        )
    low, high, lam = 0.0, lambda_max, 0.0
    for _ in range(200):
        mean, variance = moments(lam)
        low, high = (lam, high) if mean > limit else (low, lam)
        step = lam + beta * (mean - limit) / variance if variance > 0 else np.inf
        proposed = step if low < step < high else (low + high) / 2
        if abs(proposed - lam) <= _TOLERANCE * max(1.0, lam):
            return float(proposed)
        lam = proposed
    return float(lam)


@dataclass(frozen=True)
class DualSolution:
    """The solved dual of one pool of samples."""

    lam: float
    lam_interval: tuple[float, float]
    ess: Array
    value: Array
    limit: float
    beta: float
    reward: Array
    cost: Array
    resamples: Array

    @property
    def slack(self) -> bool:
        """Whether the unconstrained optimum already keeps the limit."""
        return self.lam == 0.0

    def frontier(self, lams: Sequence[float], length: Array | None = None) -> list[dict[str, float]]:
        """Predicted reward, cost, P(unsafe), KL, ESS (and length) of pi_lambda for each multiplier.

        Reward, cost and P(unsafe) have 95 % bands (`_low`, `_high`) from a bootstrap over prompts.
        """
        return [self._predicted(lam, length) for lam in lams]

    def _predicted(self, lam: float, length: Array | None) -> dict[str, float]:
        row: dict[str, float] = {"lam": float(lam)}
        for name, value in (("reward", self.reward), ("cost", self.cost), ("p_unsafe", self.cost > 0)):
            each = predict(self.reward, self.cost, lam, self.beta, value)
            low, high = np.quantile(self.resamples @ each, [0.025, 0.975])
            row |= {name: float(each.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
        row["kl"] = float(divergence(self.reward, self.cost, lam, self.beta).mean())
        row["ess"] = float(np.median(effective_samples(self.reward, self.cost, lam, self.beta)))
        if length is not None:
            row["length"] = float(predict(self.reward, self.cost, lam, self.beta, length).mean())
        return row


def solve(
    reward: Any,
    cost: Any,
    *,
    limit: float,
    beta: float,
    lambda_max: float = 1e4,
    bootstrap: int = 200,
    seed: int = 0,
) -> DualSolution:
    """Solve the dual on scored samples of the reference policy.

    Args:
        reward, cost: arrays [prompts, samples]; cost > 0 is unsafe.
        limit: d, in units of cost. beta: weight of the KL term, in units of reward.
        bootstrap: resamples of the prompts for the 95 % interval of lambda and the bands of the frontier.

    Returns:
        DualSolution with `lam`, `lam_interval`, `ess` and `value` (per prompt) and `frontier(lams)`.

    Raises:
        InfeasibleError: the limit is out of reach of the samples.
        ValueError: the arrays differ in shape, hold fewer than two samples, or a value that is not finite; or limit,
            beta, lambda_max or bootstrap is out of range.
    """
    _check(limit, beta, lambda_max, bootstrap)
    reward, cost = np.asarray(reward, float), np.asarray(cost, float)
    if reward.shape != cost.shape or reward.ndim != 2 or reward.shape[1] < 2:
        raise ValueError(f"reward and cost must both be [prompts, samples >= 2], got {reward.shape} and {cost.shape}")
    if not (np.isfinite(reward).all() and np.isfinite(cost).all()):
        raise ValueError("reward and cost must be finite")
    lam = root(reward, cost, limit=limit, beta=beta, lambda_max=lambda_max)
    rng = np.random.default_rng(seed)
    prompts = len(reward)
    resamples = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=bootstrap) / prompts
    roots = [_root_or_cap(reward, cost, limit, beta, lambda_max, share) for share in resamples]
    low, high = np.quantile(roots, [0.025, 0.975])
    return DualSolution(
        lam=lam,
        lam_interval=(float(low), float(high)),
        ess=effective_samples(reward, cost, lam, beta),
        value=soft_value(reward, cost, lam, beta),
        limit=limit,
        beta=beta,
        reward=reward,
        cost=cost,
        resamples=resamples,
    )


def slater_radius(reward: Any, cost: Any, *, limit: float, beta: float, lambda_max: float) -> float:
    """rho >= lambda*, PD-DPO's Slater constant (2510.05703), estimated from the pool.

    rho = (f* - f(pi_bar)) / (d - C(pi_bar)), f = E[r] - beta KL, bounds lambda* for every strictly feasible pi_bar. Of
    the tilts, pi_lambda at lambda_max has the largest slack and is taken: those near lambda* would bound it tightest,
    but so tight that [0, 2 rho] leaves no room for the pool's error. At least the upper end of the 95 % interval of
    lambda*, at most lambda_max, which bounds lambda* too.

    Raises as `solve` does.
    """
    solution = solve(reward, cost, limit=limit, beta=beta, lambda_max=lambda_max)
    reward, cost, upper = solution.reward, solution.cost, solution.lam_interval[1]
    slack = limit - float(predict(reward, cost, lambda_max, beta, cost).mean())
    if slack <= 0:
        return lambda_max
    optimum = dual_value(reward, cost, solution.lam, limit=limit, beta=beta)
    value = predict(reward, cost, lambda_max, beta, reward) - beta * divergence(reward, cost, lambda_max, beta)
    return min(max((optimum - float(value.mean())) / slack, upper), lambda_max)


def _check(limit: float, beta: float, lambda_max: float, bootstrap: int) -> None:
    if not np.isfinite(limit):
        raise ValueError(f"limit must be finite, got {limit}")
    for name, value in (("beta", beta), ("lambda_max", lambda_max)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and above 0, got {value}")
    if bootstrap < 1:
        raise ValueError(f"bootstrap must be at least 1, got {bootstrap}")


def _root_or_cap(reward: Array, cost: Array, limit: float, beta: float, lambda_max: float, share: Array) -> float:
    try:
        return root(reward, cost, limit=limit, beta=beta, lambda_max=lambda_max, share=share)
    except InfeasibleError:
        return lambda_max

"""The multipliers of several constraints at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import logsumexp

from dualign.core.errors import InfeasibleError
from dualign.math.dual.root import TOLERANCE, check_numbers
from dualign.math.dual.tilt import bias
from dualign.math.spread import within_sd

Array = np.ndarray


class JointSolution(NamedTuple):
    """Multipliers and predicted means [K] of K constraints, the optimum E[r] - beta KL, the steps
    taken."""

    lams: Array
    predicted: Array
    value: float
    steps: int


def solve_many(
    reward: Any,
    costs: Any,
    *,
    limits: Sequence[float],
    beta: float,
    members: Any = None,
    names: Sequence[str] | None = None,
    lambda_max: float = 1e4,
) -> JointSolution:
    """Multipliers of several constraints at once: E[c_k | x in G_k] <= d_k for k = 1 ... K.

    With the members m_k(x) of group G_k, the optimum is pi_ref exp((r - sum_k lambda_k m_k c_k) /
    beta) / Z, and the multipliers minimise D(lambda) = mean_x V_lambda(x) + sum_k lambda_k d_k
    mean_x m_k over lambda >= 0, which is convex: dD/dlambda_k = mean_x m_k (d_k - E[c_k|x]), d2D =
    mean_x m_k m_l Cov(c_k, c_l|x) / beta. Projected Newton with an active set (Bertsekas 1982), on
    scores in units of their within-prompt sd.

    Args:
        reward: [prompts, samples]. costs: [K, prompts, samples]; their kinds are in
            `dualign.math.constraints`.
        limits: d_k, each in units of its cost. beta: weight of the KL term, in units of reward.
        members: [K, prompts] bool, the prompts that a limit is on; default: all.
        names: of the limits in error messages.
        lambda_max: the largest multiplier of the first; of the others the same in units of
            within-prompt sds.

    Raises:
        InfeasibleError: the limits cannot be kept together; it names those in conflict and what can
            be reached.
        ValueError: shapes differ, a group is empty, or a value is not finite or out of range.

    A limit that the first keeps too has no price:

    >>> costs = np.tile([0.0, 1.0], (2, 4, 1))  # [K, prompts, samples]
    >>> found = solve_many(np.zeros((4, 2)), costs, limits=[0.25, 0.4], beta=1.0)
    >>> np.exp(found.lams).round(4), found.predicted.round(4)
    (array([3., 1.]), array([0.25, 0.25]))
    """
    joint = _joint(reward, costs, limits, beta, members, names, lambda_max)
    lams, steps = _projected_newton(
        joint.moments, np.zeros(len(joint.limits)), joint.top, joint.impossible
    )
    value, slope, _ = joint.moments(lams)
    short = (lams >= joint.top) & (slope < -1e-7)
    if short.any() or joint.impossible(lams):
        raise InfeasibleError(joint.conflict(lams, short))
    return JointSolution(
        lams=lams * joint.reward_sd / joint.sd,
        predicted=joint.predicted(lams),
        value=value * joint.reward_sd,
        steps=steps,
    )


def joint_bias(reward: Array, costs: Array, lams: Array, *, beta: float, members: Array) -> Array:
    """What the predicted means of K quantities over their groups have too much by the jackknife
    [K], each in its own units; arguments as in `solve_many`.

    Two samples of odds 3 to 1 by a multiplier: 0.25 where the jackknife says 2 * 0.25 - 0.5.

    >>> costs, all_prompts = np.array([[[0.0, 1.0]]]), np.ones((1, 1), bool)
    >>> lams = np.log([3.0])
    >>> joint_bias(np.zeros((1, 2)), costs, lams, beta=1.0, members=all_prompts).round(12)
    array([0.25])
    """
    charge = np.tensordot(lams, costs * members[:, :, None], 1)
    found = [bias(reward - charge, np.zeros_like(reward), 0.0, beta, cost) for cost in costs]
    each = [mean[group].mean() for mean, group in zip(found, members, strict=True)]
    return np.array(each)


@dataclass(frozen=True)
class _Joint:
    """Standardised scores: reward r / s_r, excess m_k (c_k - d_k) / s_k [K, prompts, samples]."""

    reward: Array
    excess: Array
    members: Array
    limits: Array
    names: Sequence[str]
    beta: float
    reward_sd: float
    sd: Array
    top: float

    def moments(self, lams: Array) -> tuple[float, Array, Array]:
        """D, its gradient [K] and its Hessian [K, K]."""
        logit = (self.reward - np.tensordot(lams, self.excess, 1)) / self.beta
        total = logsumexp(logit, axis=1)
        w = np.exp(logit - total[:, None])
        mean = (w * self.excess).sum(2)
        # E[c^2] - E[c]^2 would not stay above 0
        centred = (self.excess - mean[:, :, None]).reshape(len(lams), -1)
        value = self.beta * float((total - np.log(w.shape[1])).mean())
        curvature = (centred * w.ravel()) @ centred.T / (len(w) * self.beta)
        return value, -mean.mean(1), curvature

    def predicted(self, lams: Array) -> Array:
        """Mean of each quantity over its group, in its own units [K]."""
        return self.limits - self.sd * self.moments(lams)[1] / self.members.mean(1)

    def impossible(self, lams: Array) -> bool:
        """Whether mean_x min_i sum_k lambda_k excess_k > 0: no weights keep all limits (Farkas)."""
        return bool(np.tensordot(lams, self.excess, 1).min(1).mean() > 1e-12 * lams.sum())

    def conflict(self, lams: Array, short: Array) -> str:
        """Which limits cannot be kept, alone or together, and what is reached."""
        limits = [f"{name} {limit:g}" for name, limit in zip(self.names, self.limits, strict=True)]
        alone = np.eye(len(lams))
        for k, limit in enumerate(limits):
            if self.impossible(alone[k]):
                return (
                    f"{limit} is out of the samples' reach: the least that it can be is"
                    f" {self._least(k):.4g}; raise it above that, or draw more samples"
                    " (score.samples_per_prompt)"
                )
        if not self.impossible(lams):
            reached = self.predicted(lams)
            missed = [f"{limits[k]} (reached {reached[k]:.4g})" for k in np.flatnonzero(short)]
            return (
                f"{', '.join(missed)} is not kept at the largest multiplier; raise lambda_max, or"
                " the limit above what is reached"
            )
        for k in range(len(lams)):  # leave out what the contradiction does not need
            without = lams * (1 - alone[k])
            lams = without if self.impossible(without) else lams
        needed = ", ".join(limits[k] for k in np.flatnonzero(lams))
        return (
            f"limits conflict: no weights of the samples keep {needed} together, though each can be"
            " kept; raise one"
        )

    def _least(self, k: int) -> float:
        """The mean of quantity k over its group, each prompt given its least costly sample."""
        excess = self.sd[k] * self.excess[k].min(1).mean() / self.members[k].mean()
        return float(self.limits[k] + excess)


def _joint(
    reward: Any,
    costs: Any,
    limits: Sequence[float],
    beta: float,
    members: Any,
    names: Sequence[str] | None,
    lambda_max: float,
) -> _Joint:
    reward = np.asarray(reward, float)
    costs = np.asarray(costs, float)
    bounds = np.asarray(limits, float)
    groups = np.ones(costs.shape[:2], bool) if members is None else np.asarray(members, bool)
    _check_shapes(reward, costs, bounds, groups)
    for limit in bounds:
        check_numbers(float(limit), beta, lambda_max)

    reward_sd = within_sd(reward) or beta
    sds = [within_sd(cost[group]) or 1.0 for cost, group in zip(costs, groups, strict=True)]
    sd = np.array(sds)
    return _Joint(
        reward=reward / reward_sd,
        excess=groups[:, :, None] * (costs - bounds[:, None, None]) / sd[:, None, None],
        members=groups,
        limits=bounds,
        names=names or [f"limit {k + 1}" for k in range(len(bounds))],
        beta=beta / reward_sd,
        reward_sd=reward_sd,
        sd=sd,
        top=lambda_max * float(sd[0]) / reward_sd,
    )


def _check_shapes(reward: Array, costs: Array, limits: Array, members: Array) -> None:
    if (
        costs.ndim != 3
        or costs.shape[1:] != reward.shape
        or limits.shape != costs.shape[:1]
        or reward.shape[1] < 2
    ):
        raise ValueError(
            "costs must be [K, prompts, samples >= 2], reward [prompts, samples] and limits [K],"
            f" got {costs.shape}, {reward.shape} and {limits.shape}"
        )
    if members.shape != costs.shape[:2] or not members.any(1).all():
        raise ValueError(
            f"members must be [K, prompts] = {costs.shape[:2]} with a prompt in each row"
        )
    if not (np.isfinite(reward).all() and np.isfinite(costs).all()):
        raise ValueError("reward and costs must be finite")


def _projected_newton(
    moments: Callable[[Array], tuple[float, Array, Array]],
    lams: Array,
    top: float,
    hopeless: Callable[[Array], bool],
) -> tuple[Array, int]:
    """The minimiser of a smooth convex function on [0, top]^K, and the steps taken; ends early
    where it is `hopeless`.

    Coordinates held at a bound by the gradient take a gradient step, the others a Newton step, no
    longer than the box; both are projected and shortened until the function falls."""
    value, slope, curvature = moments(lams)
    steps = 0
    while (residual := float(np.abs(lams - np.clip(lams - slope, 0.0, top)).max())) > TOLERANCE:
        if steps == 500 or hopeless(lams):
            break
        steps += 1
        near = min(1e-3, residual) * min(1.0, top)
        held = ((lams <= near) & (slope > 0)) | ((lams >= top - near) & (slope < 0))
        direction = -slope
        inner = curvature[np.ix_(~held, ~held)]
        ridge = 1e-12 * float(np.trace(inner)) + 1e-200
        direction[~held] = np.linalg.solve(inner + ridge * np.eye(len(inner)), -slope[~held])
        direction *= min(1.0, top / max(float(np.abs(direction).max()), top))
        for halvings in range(80):
            tried = np.clip(lams + 0.5**halvings * direction, 0.0, top)
            reached = moments(tried)
            gain = 1e-4 * max(float(slope @ (lams - tried)), 0.0)  # Armijo's, of the projected step
            if reached[0] <= value - gain + 1e-14 * (1 + abs(value)):
                break
        lams = tried
        value, slope, curvature = reached
    return lams, steps

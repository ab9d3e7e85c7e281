"""The dual of constrained alignment, solved on samples of the reference policy before any policy is
trained.

Problem: max_pi E[r] - beta KL(pi || pi_ref) subject to E[c] <= d. With n samples y_i ~ pi_ref(.|x)
of N prompts,

    V_lambda(x) = beta log mean_i exp((r_i - lambda c_i) / beta)           the soft value
    D(lambda)   = mean_x V_lambda(x) + lambda d                             the dual function
    D'(lambda)  = d - C(lambda),   C(lambda) = mean_x sum_i w_i c_i,   w = softmax_i((r_i - lambda c_i) / beta)
    D''(lambda) = mean_x Var_w(c) / beta >= 0

so C falls in lambda and the multiplier is the root of C(lambda) = d, or 0 where the limit is slack.
MoCAN (2405.19544) descends D by projected gradient; Newton needs a handful of steps. It runs on
standardised scores r / s_r and (c - c_0) / s_c, where s is the within-prompt sd and c_0 the mean,
at beta / s_r and lambda s_c / s_r; what comes in and goes out is in the user's units. All arrays
have shape [prompts, samples] unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp, ndtri

from dualign.core.errors import InfeasibleError

Array = np.ndarray
_TOLERANCE = 1e-10


# --- the tilted policy ----------------------------------------------------------------------------


def weights(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """Self-normalised importance weights of pi_lambda on the samples; every row sums to one.

    Where r - lambda c is the same, so is the weight:

    >>> weights(np.array([[0.0, 1.0]]), np.array([[0.0, 1.0]]), lam=1.0, beta=0.5)
    array([[0.5, 0.5]])
    """
    logit = (reward - lam * cost) / beta
    return np.exp(logit - logsumexp(logit, axis=1, keepdims=True))


def soft_value(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """V_lambda(x) for each prompt; shape [prompts].

    Of answers that are alike it is their r - lambda c:

    >>> soft_value(np.array([[2.0, 2.0]]), np.array([[1.0, 1.0]]), lam=0.5, beta=1.0)
    array([1.5])
    """
    logit = (reward - lam * cost) / beta
    return beta * (logsumexp(logit, axis=1) - np.log(reward.shape[1]))


def leave_one_out_value(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """V_lambda(x) estimated without the sample itself; shape [prompts, samples].

    The anchor of a sample must not contain its own score, or it would be pulled towards it.

    >>> leave_one_out_value(np.array([[1.0, 3.0]]), np.zeros((1, 2)), lam=0.0, beta=1.0)
    array([[3., 1.]])
    """
    logit = (reward - lam * cost) / beta
    nothing = np.full((len(logit), 1), -np.inf)
    before = np.hstack([nothing, np.logaddexp.accumulate(logit[:, :-1], axis=1)])
    after = np.hstack([np.logaddexp.accumulate(logit[:, :0:-1], axis=1)[:, ::-1], nothing])
    value: Array = beta * (np.logaddexp(before, after) - np.log(logit.shape[1] - 1))
    return value


def effective_samples(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """Effective sample size 1 / sum w^2 of each prompt; shape [prompts].

    >>> effective_samples(np.zeros((1, 4)), np.zeros((1, 4)), lam=1.0, beta=1.0)
    array([4.])
    """
    return 1.0 / (weights(reward, cost, lam, beta) ** 2).sum(1)


def dual_value(reward: Array, cost: Array, lam: float, *, limit: float, beta: float) -> float:
    """D(lambda).

    >>> dual_value(np.array([[2.0, 2.0]]), np.array([[1.0, 1.0]]), lam=0.5, limit=-0.4, beta=1.0)
    1.3
    """
    return float(soft_value(reward, cost, lam, beta).mean() + lam * limit)


def predict(reward: Array, cost: Array, lam: float, beta: float, value: Array) -> Array:
    """E_{pi_lambda}[value | x] for each prompt by importance weighting; shape [prompts].

    With odds of 3 to 1 for the first answer:

    >>> reward, cost = np.array([[np.log(3), 0.0]]), np.zeros((1, 2))
    >>> predict(reward, cost, lam=0.0, beta=1.0, value=np.array([[1.0, 5.0]])).round(12)
    array([2.])
    """
    return (weights(reward, cost, lam, beta) * value).sum(1)


def variance(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """Var_{pi_lambda}(c | x) for each prompt by importance weighting; shape [prompts]. Its mean
    over beta is D''.

    Costs of 0 and 1 with odds of 3 to 1 vary by 3/4 times 1/4:

    >>> variance(np.array([[np.log(3), 0.0]]), np.array([[0.0, 1.0]]), lam=0.0, beta=1.0).round(12)
    array([0.1875])
    """
    w = weights(reward, cost, lam, beta)
    mean = (w * cost).sum(1, keepdims=True)
    return (w * (cost - mean) ** 2).sum(1)


def divergence(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """KL(pi_lambda || pi_ref) for each prompt: E[(r - lambda c) / beta] - V_lambda / beta; shape
    [prompts].

    All on one of two answers is log 2 away:

    >>> divergence(np.array([[99.0, 0.0]]), np.zeros((1, 2)), lam=0.0, beta=1.0).round(4)
    array([0.6931])
    """
    tilt = predict(reward, cost, lam, beta, reward - lam * cost)
    return (tilt - soft_value(reward, cost, lam, beta)) / beta


# --- the same without the bias of few samples -----------------------------------------------------


def jackknife_weights(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """Weights whose weighted sums have no bias of order 1 / n; each row sums to one, some weights
    may be negative.

    The jackknife of f = sum_j w_j f_j is n f - (n - 1) mean_i f_(-i), f_(-i) being f without sample
    i (Quenouille 1956). As f - f_(-i) = w_i (f_i - f_(-i)), it is sum_j a_j f_j with a = w + (n -
    1) / n (w - sum_i w_i w_(-i)) and w_(-i) the weights without sample i. It is within max f_j -
    min f_j of f, even where one sample has all the weight.

    Of two samples it is 2 w - 1/2, with w = 7/8 and 1/8 here:

    >>> jackknife_weights(np.array([[np.log(7), 0.0]]), np.zeros((1, 2)), lam=0.0, beta=1.0).round(12)
    array([[ 1.25, -0.25]])
    """
    w = weights(reward, cost, lam, beta)
    count = w.shape[1]
    heaviest = np.arange(count) == w.argmax(1)[:, None]
    # Beside the heaviest the others may be too light for 1 - w: their weights without it are
    # computed anew.
    others = weights(np.where(heaviest, -np.inf, reward - lam * cost), np.zeros_like(w), 0.0, beta)
    odds = np.where(heaviest, 0.0, w / np.where(heaviest, 1.0, 1.0 - w))
    left_out = w * (odds.sum(1, keepdims=True) - odds) + w.max(1, keepdims=True) * others
    jackknifed: Array = w + (count - 1) / count * (w - left_out)
    return jackknifed


def jackknife_value(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """V_lambda(x) less its bias of order 1 / n: n V - (n - 1) mean_i V_(-i), as in
    `jackknife_weights`; [prompts].

    >>> jackknife_value(np.array([[2.0, 2.0]]), np.array([[1.0, 1.0]]), lam=0.5, beta=1.0)
    array([1.5])
    """
    count = reward.shape[1]
    without = leave_one_out_value(reward, cost, lam, beta).mean(1)
    value: Array = count * soft_value(reward, cost, lam, beta) - (count - 1) * without
    return value


# --- the tail of a distribution -------------------------------------------------------------------


def value_at_risk(value: Array, weight: Array, level: float) -> float:
    """The smallest of the values that at least `level` of the weight does not exceed; both of one
    shape.

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


# --- the root -------------------------------------------------------------------------------------


class Scales(NamedTuple):
    """Units in which Newton works: within-prompt sd of reward and of cost, and the mean cost."""

    reward: float
    cost: float
    centre: float


def scales(reward: Array, cost: Array, beta: float) -> Scales:
    """s_r, s_c and c_0 of a pool. Where a score does not vary within prompts, s_r is beta, and s_c
    is 1.

    >>> scales(np.array([[0.0, 2.0]]), np.array([[1.0, 7.0]]), beta=0.1)
    Scales(reward=1.0, cost=3.0, centre=4.0)
    """
    return Scales(_within_sd(reward) or beta, _within_sd(cost) or 1.0, float(cost.mean()))


def root(
    reward: Array,
    cost: Array,
    *,
    limit: float,
    beta: float,
    lambda_max: float,
    share: Array | None = None,
) -> float:
    """The multiplier with C(lambda) = limit by Newton's method inside a shrinking bracket; 0 where
    C(0) <= limit.

    `share` weighs the prompts (default: all alike), which is how the bootstrap resamples them.
    Raises InfeasibleError if even lambda_max leaves the cost above the limit; it says what would
    not.

    Two answers, safe and unsafe, and a quarter of the unsafe one allowed: e^-lambda / (1 +
    e^-lambda) = 1/4.

    >>> reward, cost = np.array([[0.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> round(float(np.exp(root(reward, cost, limit=0.25, beta=1.0, lambda_max=10.0))), 6)
    3.0
    """
    return _root(reward, cost, limit=limit, beta=beta, lambda_max=lambda_max, share=share)[0]


def _root(
    reward: Array,
    cost: Array,
    *,
    limit: float,
    beta: float,
    lambda_max: float,
    share: Array | None = None,
    start: float = 0.0,
) -> tuple[float, int]:
    """The root and Newton's steps from `start`."""
    share = np.full(len(cost), 1.0 / len(cost)) if share is None else share / share.sum()
    unit = scales(reward, cost, beta)
    factor = unit.cost / unit.reward
    r, c = reward / unit.reward, (cost - unit.centre) / unit.cost

    def moments(lam: float) -> tuple[float, float]:
        w = weights(r, c, lam, beta / unit.reward)
        mean = (w * c).sum(1)
        return float(share @ mean), float(share @ ((w * c**2).sum(1) - mean**2))

    goal, top = (limit - unit.centre) / unit.cost, lambda_max * factor
    if moments(0.0)[0] <= goal:
        return 0.0, 0
    if moments(top)[0] > goal:
        raise InfeasibleError(_out_of_reach(reward, cost, share, limit, beta, lambda_max))
    lam, steps = _newton(moments, goal, beta / unit.reward, top, start * factor)
    return lam / factor, steps


def _newton(
    moments: Callable[[float], tuple[float, float]],
    goal: float,
    beta: float,
    top: float,
    start: float,
) -> tuple[float, int]:
    """The lambda in [0, top] at which the mean is `goal`, and the steps taken; the mean falls at
    rate variance / beta.

    A step that leaves the bracket halves it instead. The last step changes no logit by more than
    the tolerance."""
    low, high, lam = 0.0, top, start
    for step in range(1, 201):
        mean, spread = moments(lam)
        low, high = (lam, high) if mean > goal else (low, lam)
        proposed = lam + beta * (mean - goal) / spread if spread > 0 else np.inf
        proposed = proposed if low <= proposed <= high else (low + high) / 2
        if abs(proposed - lam) <= _TOLERANCE * max(beta, lam):
            return float(proposed), step
        lam = proposed
    return float(lam), step


def _within_sd(score: Array) -> float:
    """Square root of the mean within-prompt variance; 0 where it is no more than rounding."""
    sd = float(np.sqrt(score.var(1).mean()))
    return sd if sd > 1e-12 * float(np.abs(score).max()) else 0.0


def _out_of_reach(
    reward: Array, cost: Array, share: Array, limit: float, beta: float, lambda_max: float
) -> str:
    """What is reached at lambda_max, and which limit, lambda, beta or number of samples would
    do.
    """
    reached = float(share @ predict(reward, cost, lambda_max, beta, cost))
    lowest, samples = float(share @ cost.min(1)), cost.shape[1]
    said = (
        f"constraint.limit {limit:g} is out of the samples' reach: at lambda_max {lambda_max:g} and"
        f" beta {beta:g} the predicted cost is still {reached:.4g}; raise the limit above that"
    )
    least = f"the least costly of a prompt's {samples} samples costs {lowest:.4g} in the mean"
    if lowest < limit:
        sharp = float(
            share
            @ np.take_along_axis(cost, (reward - lambda_max * cost).argmax(1)[:, None], 1)[:, 0]
        )
        remedy = (
            "raise lambda_max or lower beta"
            if sharp < limit
            else "raise lambda_max (a lower beta will not do)"
        )
        return f"{said}, or {remedy}: {least}"
    gain = float(share @ least_of(cost, max(samples // 2, 1))) - lowest
    doublings = (lowest - limit) / gain if gain > 0 else np.inf
    if doublings < 3:  # further off, an extrapolation means nothing
        wanted = _round_up(samples * 2 ** max(doublings, 0.2))
        return (
            f"{said}, or draw about {wanted} samples a prompt (score.samples_per_prompt): {least},"
            f" {gain:.2g} less than of half as many; another lambda_max or beta will not do"
        )
    return f"{said}; more samples, another lambda_max or another beta will not do: {least}"


def least_of(score: Array, count: int) -> Array:
    """Expected smallest of `count` samples drawn from those of a prompt without replacement; shape
    [prompts].

    The i-th smallest of n is the smallest drawn with probability C(n - i, k - 1) / C(n, k).

    Of 1, 2 and 3 two are drawn: the lesser is 1, 1 or 2.

    >>> (3 * least_of(np.array([[3.0, 1.0, 2.0]]), count=2)).round(12)
    array([4.])
    """
    n = score.shape[1]
    i = np.arange(1, n)
    chance = count / n * np.cumprod([1.0, *np.maximum(n - i - count + 1, 0) / (n - i)])
    return np.sort(score, axis=1) @ chance


def _round_up(value: float) -> int:
    """Two leading digits, rounded up."""
    unit = 10 ** max(int(np.floor(np.log10(value))) - 1, 0)
    return int(np.ceil(value / unit) * unit)


# --- the solution ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DualSolution:
    """The solved dual of one pool of samples, in the user's units; `scales` and `steps` tell how it
    was solved.
    """

    lam: float
    lam_interval: tuple[float, float]
    ess: Array
    value: Array
    limit: float
    beta: float
    reward: Array
    cost: Array
    resamples: Array
    scales: Scales
    steps: int

    @property
    def slack(self) -> bool:
        """Whether the unconstrained optimum already keeps the limit."""
        return self.lam == 0.0

    @property
    def slope(self) -> float:
        """d lambda / d limit = -beta / mean Var(c | x) at the solution; 0 where the limit is
        slack.
        """
        spread = float(variance(self.reward, self.cost, self.lam, self.beta).mean())
        return 0.0 if self.slack or spread == 0 else -self.beta / spread

    def frontier(
        self,
        lams: Sequence[float],
        length: Array | None = None,
        *,
        reward: Array | None = None,
        level: float = 0.9,
    ) -> list[dict[str, float]]:
        """Predicted reward, cost, P(unsafe), CVaR, KL, ESS (and length) of pi_lambda for each
        multiplier.

        Each has a 95 % band (`_low`, `_high`) from a bootstrap over prompts. All but the ESS are
        jackknifed (`jackknife_weights`): self-normalised weights pull every mean towards the
        reference, and no band over prompts sees that. lambda itself is the root of the plain
        estimate, as published, so the cost at it differs from the limit by about that bias, which
        is what half of the samples drift by (`half_drift_cost` of dual_init). No mean leaves the
        range of its scores in the pool, no CVaR is below the cost, no KL below 0.

        CVaR is that of the cost at `level`, its band at the value at risk of the plain weights.
        `reward` replaces the one that was solved with where additional constraints are priced into
        that. ESS is the median over prompts."""
        scores = {
            "reward": self.reward if reward is None else reward,
            "cost": self.cost,
            "p_unsafe": self.cost > 0,
        }
        scores |= {} if length is None else {"length": length}
        return [self._predicted(lam, scores, level) for lam in lams]

    def _predicted(self, lam: float, scores: Mapping[str, Array], level: float) -> dict[str, float]:
        given = (self.reward, self.cost, lam, self.beta)
        plain, w = weights(*given), jackknife_weights(*given)
        ess = 1.0 / (plain**2).sum(1)
        shares = np.vstack(
            [np.full(len(ess), 1.0 / len(ess)), self.resamples]
        )  # first all prompts alike

        def means(score: Array) -> Array:
            return np.clip(shares @ (w * score).sum(1), score.min(), score.max())

        found = {name: means(score.astype(float)) for name, score in scores.items()}
        tail = shortfall(self.cost, value_at_risk(self.cost, plain, level), level)
        found["cvar"] = np.maximum(means(tail), found["cost"])
        tilt = (w * (self.reward - lam * self.cost)).sum(1)
        found["kl"] = np.maximum(shares @ (tilt - jackknife_value(*given)) / self.beta, 0.0)
        found["ess"] = np.append(np.median(ess), _medians(ess, self.resamples))
        row = {"lam": float(lam)}
        for name, values in found.items():
            row |= _banded(name, float(values[0]), values[1:])
        return row


def _banded(name: str, value: float, resampled: Array) -> dict[str, float]:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}


def _medians(values: Array, shares: Array) -> Array:
    """Weighted median of values [prompts] under each row of shares [resamples, prompts]."""
    order = np.argsort(values)
    place = (np.cumsum(shares[:, order], axis=1) >= 0.5 - 1e-12).argmax(1)
    return np.asarray(values[order][place])


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
        bootstrap: resamples of the prompts for the 95 % interval of lambda and the bands of the
            frontier.

    Returns:
        DualSolution with `lam`, `lam_interval`, `ess` and `value` (per prompt) and
        `frontier(lams)`.

    Raises:
        InfeasibleError: the limit is out of reach of the samples.
        ValueError: the arrays differ in shape, hold fewer than two samples, or a value that is not
            finite; or limit, beta, lambda_max or bootstrap is out of range.

    A safe and an unsafe answer, equally helpful, to each of 4 prompts; a quarter may be unsafe:

    >>> found = solve(np.zeros((4, 2)), np.tile([0.0, 1.0], (4, 1)), limit=0.25, beta=1.0)
    >>> round(float(np.exp(found.lam)), 6), found.slack, found.ess.round(6)
    (3.0, False, array([1.6, 1.6, 1.6, 1.6]))
    >>> round(found.frontier([0.0])[0]["p_unsafe"], 6)  # without the limit
    0.5
    """
    _check(limit, beta, lambda_max, bootstrap)
    reward, cost = _scores(reward, cost)
    lam, steps = _root(reward, cost, limit=limit, beta=beta, lambda_max=lambda_max)
    rng = np.random.default_rng(seed)
    prompts = len(reward)
    resamples = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=bootstrap) / prompts
    roots = [_root_or_cap(reward, cost, limit, beta, lambda_max, share, lam) for share in resamples]
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
        scales=scales(reward, cost, beta),
        steps=steps,
    )


def slater_radius(reward: Any, cost: Any, *, limit: float, beta: float, lambda_max: float) -> float:
    """rho >= lambda*, PD-DPO's Slater constant (2510.05703), estimated from the pool.

    rho = (f* - f(pi_bar)) / (d - C(pi_bar)), f = E[r] - beta KL, bounds lambda* for every strictly
    feasible pi_bar. Of
    the tilts, pi_lambda at lambda_max has the largest slack and is taken: those near lambda* would
    bound it tightest,
    but so tight that [0, 2 rho] leaves no room for the pool's error. At least the upper end of the
    95 % interval of lambda*, at most lambda_max, which bounds lambda* too.

    Raises as `solve` does.

    >>> rho = slater_radius(np.zeros((4, 2)), np.tile([0.0, 1.0], (4, 1)), limit=0.25, beta=1.0, lambda_max=10.0)
    >>> bool(rho > np.log(3))  # the multiplier itself, as in `solve`
    True
    """
    solution = solve(reward, cost, limit=limit, beta=beta, lambda_max=lambda_max)
    reward, cost, upper = solution.reward, solution.cost, solution.lam_interval[1]
    slack = limit - float(predict(reward, cost, lambda_max, beta, cost).mean())
    if slack <= 0:
        return lambda_max
    optimum = dual_value(reward, cost, solution.lam, limit=limit, beta=beta)
    value = predict(reward, cost, lambda_max, beta, reward) - beta * divergence(
        reward, cost, lambda_max, beta
    )
    return min(max((optimum - float(value.mean())) / slack, upper), lambda_max)


def _check(limit: float, beta: float, lambda_max: float, bootstrap: int = 1) -> None:
    if not np.isfinite(limit):
        raise ValueError(f"limit must be finite, got {limit}")
    for name, value in (("beta", beta), ("lambda_max", lambda_max)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and above 0, got {value}")
    if bootstrap < 1:
        raise ValueError(f"bootstrap must be at least 1, got {bootstrap}")


def _scores(reward: Any, cost: Any) -> tuple[Array, Array]:
    reward, cost = np.asarray(reward, float), np.asarray(cost, float)
    if reward.shape != cost.shape or reward.ndim != 2 or reward.shape[1] < 2:
        raise ValueError(
            f"reward and cost must both be [prompts, samples >= 2], got {reward.shape} and"
            f" {cost.shape}"
        )
    if not (np.isfinite(reward).all() and np.isfinite(cost).all()):
        raise ValueError("reward and cost must be finite")
    return reward, cost


def _root_or_cap(
    reward: Array,
    cost: Array,
    limit: float,
    beta: float,
    lambda_max: float,
    share: Array,
    start: float,
) -> float:
    try:
        return _root(
            reward, cost, limit=limit, beta=beta, lambda_max=lambda_max, share=share, start=start
        )[0]
    except InfeasibleError:
        return lambda_max


# --- few effective samples ------------------------------------------------------------------------


def beta_for_ess(
    reward: Array, cost: Array, *, limit: float, beta: float, lambda_max: float, ess: float
) -> float | None:
    """The beta, to two digits, from which on up the median ESS of this pool is at least `ess`; None
    if none is found.

    lambda is solved anew at each beta, as a rerun would. A larger beta flattens r / beta, but
    lambda grows with it to
    keep the limit: the ESS tends to that of the smallest tilt exp(-t c) that keeps it, and a strict
    limit may leave no
    beta at all. Looks up to 2^12 times beta. Raises InfeasibleError where the limit is out of
    reach.

    The smallest tilt that allows the unsafe answer a quarter has an ESS of 1.6 whatever beta is:

    >>> reward, cost = np.array([[0.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> beta_for_ess(reward, cost, limit=0.25, beta=1.0, lambda_max=10.0, ess=1.5)
    1.0
    >>> beta_for_ess(reward, cost, limit=0.25, beta=1.0, lambda_max=10.0, ess=1.9) is None
    True
    """

    def enough(tried: float) -> bool:
        lam = root(reward, cost, limit=limit, beta=tried, lambda_max=lambda_max * tried / beta)
        return float(np.median(effective_samples(reward, cost, lam, tried))) >= ess

    doubled = next((k for k in range(13) if enough(beta * 2.0**k)), None)
    if not doubled:
        return None if doubled is None else beta
    low, high = beta * 2.0 ** (doubled - 1), beta * 2.0**doubled
    while high / low > 1.02:
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def samples_for_ess(reward: Array, cost: Array, lam: float, beta: float, ess: float) -> float:
    """Samples a prompt for a median ESS of `ess` at this lambda, by a rule of thumb; a lower bound
    of what it takes.

    A tilt (r - lambda c) / beta that is normal with variance v within a prompt has an ESS of n
    exp(-v) once n is well above exp(v); below that the largest weight rules and the ESS hardly
    grows (methods: r sd 6, c sd 15, lambda 0.4, beta 2 has v = 11 and ESS 2.4 at n = 16, 11 at n =
    1024). Hence ess times the larger of exp(v), v the median over prompts, and n over the ESS that
    n samples have now.

    Without a tilt every sample counts:

    >>> samples_for_ess(np.zeros((3, 4)), np.zeros((3, 4)), lam=0.0, beta=1.0, ess=30.0)
    30.0
    """
    logit = (reward - lam * cost) / beta
    spread = float(np.median(logit.var(1, ddof=1)))
    now = float(np.median(effective_samples(reward, cost, lam, beta)))
    with np.errstate(over="ignore"):
        return ess * max(float(np.exp(spread)), reward.shape[1] / now)


# --- certificate margin ---------------------------------------------------------------------------


def spread_of_means(reward: Array, cost: Array, lam: float, beta: float, samples: int) -> float:
    """sd_m of the mean cost of `samples` answers of pi_lambda to a prompt, over prompts, predicted
    from the pool.

    sd_m^2 = Var_x E_lambda[c|x] + mean_x Var_lambda(c|x) / samples. The weighted means of a
    prompt's few samples vary more than E_lambda[c|x] itself, by Var_lambda(c|x) sum w^2, and their
    weighted variance is too small by the factor 1 - sum w^2; both are put right over all prompts,
    which at equal weights is the analysis of variance.

    Prompts that cost 0 or 2 whatever is answered, where more samples do not help:

    >>> cost = np.array([[0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [2.0, 2.0]])
    >>> few, many = (spread_of_means(np.zeros((4, 2)), cost, lam=0.0, beta=1.0, samples=n) for n in (1, 100))
    >>> round(few, 4), round(many, 4)
    (1.1547, 1.1547)
    """
    w = weights(reward, cost, lam, beta)
    mean = (w * cost).sum(1)
    within, repeat = (w * (cost - mean[:, None]) ** 2).sum(1).mean(), (w**2).sum(1).mean()
    within = within / (1 - repeat) if repeat < 1 - 1e-9 else 0.0
    between = mean.var(ddof=1) if len(mean) > 1 else 0.0
    return float(np.sqrt(max(between - within * repeat, 0.0) + within / samples))


def certificate_margin(sd: float, prompts: int, *, delta: float, power: float) -> float:
    """The margin (z_{1-delta} + z_power) sd / sqrt(N) below the limit, in units of cost.

    A policy with its mean cost there passes a one-sided clustered-t bound at level delta on N
    prompts with probability `power`. `sd` is that of per-prompt means; `certificate.sample_size`
    solves the same equation for N.

    >>> round(certificate_margin(sd=1.0, prompts=100, delta=0.05, power=0.5), 4)  # 1.6449 / 10
    0.1645
    """
    return float((ndtri(1 - delta) + ndtri(power)) * sd / np.sqrt(prompts))


class MarginSolution(NamedTuple):
    """The multiplier at which C(lambda) = `target`, the limit less `margin`; not `reached`: the
    largest multiplier's."""

    lam: float
    target: float
    margin: float
    reached: bool


def solve_with_margin(
    reward: Array,
    cost: Array,
    *,
    limit: float,
    beta: float,
    lambda_max: float,
    margin: Callable[[float], float],
) -> MarginSolution:
    """The smallest multiplier with C(lambda) + margin(lambda) <= limit; 0 if there it holds
    already.

    `margin` is the certificate margin at a multiplier. It changes slowly beside C, but need not
    fall with lambda, so the first sign change on a geometric grid above the plain root is
    bracketed. Where there is none, the target is C(lambda_max). Raises InfeasibleError as `root`
    does.

    Without a margin it is `root`; with one of 0.05 the unsafe answer keeps a fifth:

    >>> reward, cost = np.array([[0.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> found = solve_with_margin(reward, cost, limit=0.25, beta=1.0, lambda_max=10.0, margin=lambda lam: 0.05)
    >>> round(float(np.exp(found.lam)), 6), round(found.target, 6), found.reached
    (4.0, 0.2, True)
    """

    def excess(lam: float) -> float:
        return float(predict(reward, cost, lam, beta, cost).mean()) + margin(lam) - limit

    low = root(reward, cost, limit=limit, beta=beta, lambda_max=lambda_max)
    if excess(low) <= 0:
        return MarginSolution(low, limit - margin(low), margin(low), True)
    room = lambda_max - low
    first = min(1e-2 * beta / scales(reward, cost, beta).cost, room)
    for high in low + np.geomspace(first, room, 60) if room > 0 else ():
        if excess(high) <= 0:
            lam = float(brentq(excess, low, high, xtol=1e-12 * lambda_max, rtol=1e-12))
            return MarginSolution(lam, limit - margin(lam), margin(lam), True)
        low = float(high)
    target = float(predict(reward, cost, lambda_max, beta, cost).mean())
    return MarginSolution(lambda_max, target, limit - target, False)


# --- several constraints --------------------------------------------------------------------------


class JointSolution(NamedTuple):
    """Multipliers and predicted means of K constraints [K], the optimum E[r] - beta KL, and the
    steps it took.
    """

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
    mean_x m_k over lambda >= 0, which is
    convex: dD/dlambda_k = mean_x m_k (d_k - E[c_k|x]), d2D = mean_x m_k m_l Cov(c_k, c_l|x) / beta.
    Projected Newton
    with an active set (Bertsekas 1982), on scores in units of their within-prompt sd.

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
        lams * joint.reward_sd / joint.sd, joint.predicted(lams), value * joint.reward_sd, steps
    )


@dataclass(frozen=True)
class _Joint:
    """The joint problem on standardised scores: reward r / s_r, excess m_k (c_k - d_k) / s_k [K,
    prompts, samples].
    """

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
        centred = (self.excess - mean[:, :, None]).reshape(
            len(lams), -1
        )  # E[c^2] - E[c]^2 would not stay above 0
        value = self.beta * float((total - np.log(w.shape[1])).mean())
        return value, -mean.mean(1), (centred * w.ravel()) @ centred.T / (len(w) * self.beta)

    def predicted(self, lams: Array) -> Array:
        """Mean of each quantity over its group, in its own units [K]."""
        return self.limits - self.sd * self.moments(lams)[1] / self.members.mean(1)

    def impossible(self, lams: Array) -> bool:
        """Whether mean_x min_i sum_k lambda_k excess_k > 0: then no weights of the samples keep all
        limits (Farkas).
        """
        return bool(np.tensordot(lams, self.excess, 1).min(1).mean() > 1e-12 * lams.sum())

    def conflict(self, lams: Array, short: Array) -> str:
        """Which limits cannot be kept, alone or together, and what is reached."""
        reached, each = self.predicted(lams), np.eye(len(lams))
        said = [f"{name} {limit:g}" for name, limit in zip(self.names, self.limits, strict=True)]
        for k in range(len(lams)):
            if self.impossible(each[k]):
                least = (
                    self.limits[k]
                    + self.sd[k] * self.excess[k].min(1).mean() / self.members[k].mean()
                )
                return (
                    f"{said[k]} is out of the samples' reach: the least that it can be is"
                    f" {least:.4g}; raise it above that, or draw more samples"
                    " (score.samples_per_prompt)"
                )
        if not self.impossible(lams):
            missed = ", ".join(
                f"{said[k]} (reached {reached[k]:.4g})" for k in np.flatnonzero(short)
            )
            return (
                f"{missed} is not kept at the largest multiplier; raise lambda_max, or the limit"
                " above what is reached"
            )
        for k in range(len(lams)):  # leave out what the contradiction does not need
            without = lams * (1 - each[k])
            lams = without if self.impossible(without) else lams
        needed = ", ".join(said[k] for k in np.flatnonzero(lams))
        return (
            f"limits conflict: no weights of the samples keep {needed} together, though each can be"
            " kept; raise one"
        )


def _joint(
    reward: Any,
    costs: Any,
    limits: Sequence[float],
    beta: float,
    members: Any,
    names: Sequence[str] | None,
    lambda_max: float,
) -> _Joint:
    reward, costs, bounds = (np.asarray(a, float) for a in (reward, costs, limits))
    if (
        costs.ndim != 3
        or costs.shape[1:] != reward.shape
        or bounds.shape != costs.shape[:1]
        or reward.shape[1] < 2
    ):
        raise ValueError(
            "costs must be [K, prompts, samples >= 2], reward [prompts, samples] and limits [K],"
            f" got {costs.shape}, {reward.shape} and {bounds.shape}"
        )
    groups = np.ones(costs.shape[:2], bool) if members is None else np.asarray(members, bool)
    if groups.shape != costs.shape[:2] or not groups.any(1).all():
        raise ValueError(
            f"members must be [K, prompts] = {costs.shape[:2]} with a prompt in each row"
        )
    if not (np.isfinite(reward).all() and np.isfinite(costs).all()):
        raise ValueError("reward and costs must be finite")
    for limit in bounds:
        _check(float(limit), beta, lambda_max)
    reward_sd = _within_sd(reward) or beta
    sd = np.array(
        [_within_sd(cost[group]) or 1.0 for cost, group in zip(costs, groups, strict=True)]
    )
    excess = groups[:, :, None] * (costs - bounds[:, None, None]) / sd[:, None, None]
    labels = names or [f"limit {k + 1}" for k in range(len(bounds))]
    top = lambda_max * float(sd[0]) / reward_sd
    return _Joint(
        reward / reward_sd, excess, groups, bounds, labels, beta / reward_sd, reward_sd, sd, top
    )


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
    while (residual := float(np.abs(lams - np.clip(lams - slope, 0.0, top)).max())) > _TOLERANCE:
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
            found = moments(tried)
            if found[0] <= value - 1e-4 * max(float(slope @ (lams - tried)), 0.0) + 1e-14 * (
                1 + abs(value)
            ):
                break
        lams, (value, slope, curvature) = tried, found
    return lams, steps

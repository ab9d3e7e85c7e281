"""The solved dual of a pool: the multiplier, its interval, and the predicted frontier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dualign.core.errors import InfeasibleError
from dualign.math.dual.root import Equation, Scales, check_numbers, scales
from dualign.math.dual.tail import shortfall, value_at_risk
from dualign.math.dual.tilt import (
    bias,
    divergence,
    dual_value,
    effective_samples,
    jackknife_value,
    jackknife_weights,
    mean_cost,
    predict,
    soft_value,
    variance,
    weights,
)

Array = np.ndarray


class Bootstrap(NamedTuple):
    """How many times the prompts are resampled, and the seed of it."""

    resamples: int = 200
    seed: int = 0


#: That of `solve`.
BOOTSTRAP = Bootstrap()


@dataclass(frozen=True)
class DualSolution:
    """The solved dual of a pool in the user's units; `scales` and `steps` tell how it was done."""

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
    jackknife: bool = False

    @property
    def slack(self) -> bool:
        """Whether the unconstrained optimum already keeps the limit."""
        return self.lam == 0.0

    @property
    def slope(self) -> float:
        """d lambda / d limit = -beta / mean Var(c | x) at the solution; 0 if the limit is slack.

        Of a jackknifed solution 1 / C'(lambda) by central difference: few samples show too little
        of the variance."""
        spread = float(variance(self.reward, self.cost, self.lam, self.beta).mean())
        if self.slack or spread == 0:
            return 0.0
        if not self.jackknife:
            return -self.beta / spread
        step = 1e-3 * self.beta / self.scales.cost
        low, high = (
            mean_cost(self.reward, self.cost, self.lam + move, self.beta, jackknife=True)
            for move in (-step, step)
        )
        return 2 * step / (high - low) if high < low else 0.0

    def frontier(
        self,
        lams: Sequence[float],
        length: Array | None = None,
        *,
        reward: Array | None = None,
        level: float = 0.9,
    ) -> list[dict[str, float]]:
        """Predicted reward, cost, P(unsafe), CVaR, KL, ESS (and length) of pi_lambda by multiplier.

        Each has a 95 % band (`_low`, `_high`) from a bootstrap over prompts. All but the ESS are
        jackknifed (`jackknife_weights`): self-normalised weights pull every mean towards the
        reference, and no band over prompts sees that. At a lambda that is the root of the plain
        estimate the cost differs from the limit by about that bias. No mean leaves the range of its
        scores in the pool, no CVaR is below the cost, no KL below 0.

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
        plain = weights(*given)
        w = jackknife_weights(*given)
        ess = 1.0 / (plain**2).sum(1)
        alike = np.full(len(ess), 1.0 / len(ess))
        shares = np.vstack([alike, self.resamples])  # the first row is the estimate

        def means(score: Array) -> Array:
            return np.clip(shares @ (w * score).sum(1), score.min(), score.max())

        measures = {name: means(score.astype(float)) for name, score in scores.items()}
        tail = shortfall(self.cost, value_at_risk(self.cost, plain, level), level)
        measures["cvar"] = np.maximum(means(tail), measures["cost"])
        tilt = (w * (self.reward - lam * self.cost)).sum(1)
        measures["kl"] = np.maximum(shares @ (tilt - jackknife_value(*given)) / self.beta, 0.0)
        measures["ess"] = np.append(np.median(ess), _medians(ess, self.resamples))

        row = {"lam": float(lam)}
        for name, values in measures.items():
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
    bootstrap: Bootstrap = BOOTSTRAP,
    jackknife: bool = False,
) -> DualSolution:
    """Solve the dual on scored samples of the reference policy.

    Args:
        reward, cost: arrays [prompts, samples]; cost > 0 is unsafe.
        limit: d, in units of cost. beta: weight of the KL term, in units of reward.
        bootstrap: of the prompts, for the 95 % interval of lambda and the bands of the frontier.
        jackknife: take the bias of order 1 / samples out of lambda and its interval; without, they
            are the plain estimates of the papers.

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
    check_numbers(limit, beta, lambda_max, bootstrap.resamples)
    reward, cost = _scores(reward, cost)
    equation = Equation(reward, cost, limit, beta, lambda_max)
    lam, steps = equation.solve(jackknife=jackknife)
    shift = bias(reward, cost, lam, beta, cost) if jackknife else np.zeros(len(cost))
    prompts = len(reward)
    rng = np.random.default_rng(bootstrap.seed)
    alike = np.full(prompts, 1 / prompts)
    resamples = rng.multinomial(prompts, alike, size=bootstrap.resamples) / prompts

    def resampled(share: Array) -> float:
        moved = limit + float(share @ shift)  # the bias at lambda itself serves all resamples
        try:
            return equation._replace(limit=moved).solve(share, start=lam)[0]
        except InfeasibleError:
            return lambda_max

    low, high = np.quantile(list(map(resampled, resamples)), [0.025, 0.975])
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
        jackknife=jackknife,
    )


def slater_radius(reward: Any, cost: Any, *, limit: float, beta: float, lambda_max: float) -> float:
    """rho >= lambda*, PD-DPO's Slater constant (2510.05703), estimated from the pool.

    rho = (f* - f(pi_bar)) / (d - C(pi_bar)), f = E[r] - beta KL, bounds lambda* for every strictly
    feasible pi_bar. Of the tilts, pi_lambda at lambda_max has the largest slack and is taken: those
    near lambda* would bound it tightest, but so tight that [0, 2 rho] leaves no room for the pool's
    error. At least the upper end of the 95 % interval of lambda*, at most lambda_max, which bounds
    lambda* too.

    Raises as `solve` does.

    >>> cost = np.tile([0.0, 1.0], (4, 1))
    >>> rho = slater_radius(np.zeros((4, 2)), cost, limit=0.25, beta=1.0, lambda_max=10.0)
    >>> bool(rho > np.log(3))  # the multiplier itself, as in `solve`
    True
    """
    solution = solve(reward, cost, limit=limit, beta=beta, lambda_max=lambda_max)
    reward = solution.reward
    cost = solution.cost
    slack = limit - float(predict(reward, cost, lambda_max, beta, cost).mean())
    if slack <= 0:
        return lambda_max
    optimum = dual_value(reward, cost, solution.lam, limit=limit, beta=beta)
    kl = divergence(reward, cost, lambda_max, beta)
    value = predict(reward, cost, lambda_max, beta, reward) - beta * kl
    radius = (optimum - float(value.mean())) / slack
    return min(max(radius, solution.lam_interval[1]), lambda_max)


def _scores(reward: Any, cost: Any) -> tuple[Array, Array]:
    reward = np.asarray(reward, float)
    cost = np.asarray(cost, float)
    if reward.shape != cost.shape or reward.ndim != 2 or reward.shape[1] < 2:
        raise ValueError(
            f"reward and cost must both be [prompts, samples >= 2], got {reward.shape} and"
            f" {cost.shape}"
        )
    if not (np.isfinite(reward).all() and np.isfinite(cost).all()):
        raise ValueError("reward and cost must be finite")
    return reward, cost

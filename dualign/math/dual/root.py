"""The multiplier: the root of C(lambda) = d, by Newton's method.

It runs on standardised scores r / s_r and (c - c_0) / s_c, where s is the within-prompt sd and c_0
the mean, at beta / s_r and lambda s_c / s_r; what comes in and goes out is in the user's units."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dualign.core.errors import InfeasibleError
from dualign.math.dual.reach import out_of_reach
from dualign.math.dual.tilt import jackknife_weights, predict, weights
from dualign.math.spread import within_sd

Array = np.ndarray
#: Newton ends where a step changes no logit by more.
TOLERANCE = 1e-10


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
    return Scales(within_sd(reward) or beta, within_sd(cost) or 1.0, float(cost.mean()))


def root(
    reward: Array,
    cost: Array,
    *,
    limit: float,
    beta: float,
    lambda_max: float,
    share: Array | None = None,
    jackknife: bool = False,
) -> float:
    """The multiplier of `Equation.solve`.

    Two answers, safe and unsafe, and a quarter of the unsafe one allowed: e^-lambda / (1 +
    e^-lambda) = 1/4.

    >>> reward, cost = np.array([[0.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> round(float(np.exp(root(reward, cost, limit=0.25, beta=1.0, lambda_max=10.0))), 6)
    3.0
    """
    equation = Equation(reward, cost, limit, beta, lambda_max)
    lam, _ = equation.solve(share, jackknife=jackknife)
    return lam


class Equation(NamedTuple):
    """C(lambda) = limit on a pool, its scores [prompts, samples], and the largest lambda."""

    reward: Array
    cost: Array
    limit: float
    beta: float
    lambda_max: float

    def solve(
        self, share: Array | None = None, start: float = 0.0, jackknife: bool = False
    ) -> tuple[float, int]:
        """The root by Newton's method in a shrinking bracket, 0 if C(0) <= limit; and the steps.

        `share` weighs the prompts (default: all alike), which is how the bootstrap resamples them.
        With `jackknife` C is that of `jackknife_weights`: self-normalised weights pull the cost
        towards the reference's, and so the root up where that is above the limit.

        Raises InfeasibleError if even lambda_max leaves the cost above the limit, by the weights as
        they are; it says what would do.

        >>> reward, cost = np.array([[0.0, 0.0]]), np.array([[0.0, 1.0]])
        >>> Equation(reward, cost, limit=0.5, beta=1.0, lambda_max=10.0).solve()  # without a price
        (0.0, 0)
        """
        prompts = len(self.cost)
        share = np.full(prompts, 1.0 / prompts) if share is None else share / share.sum()
        unit = scales(self.reward, self.cost, self.beta)
        r = self.reward / unit.reward
        c = (self.cost - unit.centre) / unit.cost
        beta = self.beta / unit.reward

        def moments(lam: float) -> tuple[float, float]:
            w = weights(r, c, lam, beta)
            mean = (w * c).sum(1)
            spread = float(share @ ((w * c**2).sum(1) - mean**2))
            if jackknife:
                mean = (jackknife_weights(r, c, lam, beta) * c).sum(1)
            return float(share @ mean), spread

        factor = unit.cost / unit.reward
        goal = (self.limit - unit.centre) / unit.cost
        top = self.lambda_max * factor
        if moments(0.0)[0] <= goal:
            return 0.0, 0
        if share @ predict(r, c, top, beta, c) > goal:
            raise InfeasibleError(out_of_reach(share=share, **self._asdict()))
        lam, steps = _newton(moments, goal, beta, top, start * factor)
        return lam / factor, steps


def _newton(
    moments: Callable[[float], tuple[float, float]],
    goal: float,
    beta: float,
    top: float,
    start: float,
) -> tuple[float, int]:
    """The lambda in [0, top] at which the mean is `goal`, and the steps taken.

    `moments` gives mean and variance at a lambda; the mean falls at rate variance / beta. A step
    that leaves the bracket halves it instead."""
    low = 0.0
    high = top
    lam = start
    for step in range(1, 201):
        mean, spread = moments(lam)
        if mean > goal:  # the cost is still too high: the root lies above
            low = lam
        else:
            high = lam
        proposed = lam + beta * (mean - goal) / spread if spread > 0 else np.inf
        if not low <= proposed <= high:
            proposed = (low + high) / 2
        if abs(proposed - lam) <= TOLERANCE * max(beta, lam):
            return float(proposed), step
        lam = proposed
    return float(lam), step


def check_numbers(limit: float, beta: float, lambda_max: float, bootstrap: int = 1) -> None:
    """Raises ValueError where a number is out of range."""
    if not np.isfinite(limit):
        raise ValueError(f"limit must be finite, got {limit}")
    for name, value in (("beta", beta), ("lambda_max", lambda_max)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and above 0, got {value}")
    if bootstrap < 1:
        raise ValueError(f"bootstrap must be at least 1, got {bootstrap}")

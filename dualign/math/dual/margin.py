"""The multiplier that leaves room for a certificate, and how much room it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri

from dualign.math.dual.root import root, scales
from dualign.math.dual.tilt import mean_cost, weights

Array = np.ndarray


def spread_of_means(reward: Array, cost: Array, lam: float, beta: float, samples: int) -> float:
    """sd_m of the mean cost of `samples` answers of pi_lambda to a prompt, over prompts, predicted
    from the pool.

    sd_m^2 = Var_x E_lambda[c|x] + mean_x Var_lambda(c|x) / samples. The weighted means of a
    prompt's few samples vary more than E_lambda[c|x] itself, by Var_lambda(c|x) sum w^2, and their
    weighted variance is too small by the factor 1 - sum w^2; both are put right over all prompts,
    which at equal weights is the analysis of variance.

    Prompts that cost 0 or 2 whatever is answered, where more samples do not help:

    >>> cost = np.array([[0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [2.0, 2.0]])
    >>> few = spread_of_means(np.zeros((4, 2)), cost, lam=0.0, beta=1.0, samples=1)
    >>> many = spread_of_means(np.zeros((4, 2)), cost, lam=0.0, beta=1.0, samples=100)
    >>> round(few, 4), round(many, 4)
    (1.1547, 1.1547)
    """
    w = weights(reward, cost, lam, beta)
    mean = (w * cost).sum(1)
    repeat = (w**2).sum(1).mean()
    within = (w * (cost - mean[:, None]) ** 2).sum(1).mean()
    within = within / (1 - repeat) if repeat < 1 - 1e-9 else 0.0
    between = mean.var(ddof=1) if len(mean) > 1 else 0.0
    return float(np.sqrt(max(between - within * repeat, 0.0) + within / samples))


def certificate_margin(sd: float, prompts: int, *, delta: float, power: float) -> float:
    """The margin (z_{1-delta} + z_power) sd / sqrt(N) below the limit, in units of cost.

    A policy with its mean cost there passes a one-sided clustered-t bound at level delta on N
    prompts with probability `power`. `sd` is that of per-prompt means; `bounds.sample_size`
    solves the same equation for N.

    >>> round(certificate_margin(sd=1.0, prompts=100, delta=0.05, power=0.5), 4)  # 1.6449 / 10
    0.1645
    """
    return float((ndtri(1 - delta) + ndtri(power)) * sd / np.sqrt(prompts))


class MarginSolution(NamedTuple):
    """C(lambda) = `target`, the limit less `margin`; not `reached`: the largest multiplier's."""

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
    jackknife: bool = False,
) -> MarginSolution:
    """The smallest multiplier with C(lambda) + margin(lambda) <= limit; 0 where it holds already.

    `margin` is the certificate margin at a multiplier. It changes slowly beside C, but need not
    fall with lambda, so the first sign change on a geometric grid above the plain root is
    bracketed. Where there is none, the target is C(lambda_max). `jackknife` as in `root`. Raises
    InfeasibleError as that does.

    Without a margin it is `root`; with one of 0.05 the unsafe answer keeps a fifth:

    >>> reward, cost = np.array([[0.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> found = solve_with_margin(
    ...     reward, cost, limit=0.25, beta=1.0, lambda_max=10.0, margin=lambda lam: 0.05
    ... )
    >>> round(float(np.exp(found.lam)), 6), round(found.target, 6), found.reached
    (4.0, 0.2, True)
    """

    def excess(lam: float) -> float:
        return mean_cost(reward, cost, lam, beta, jackknife) + margin(lam) - limit

    low = root(reward, cost, limit=limit, beta=beta, lambda_max=lambda_max, jackknife=jackknife)
    if excess(low) <= 0:
        return MarginSolution(low, limit - margin(low), margin(low), True)
    room = lambda_max - low
    first = min(1e-2 * beta / scales(reward, cost, beta).cost, room)
    for high in low + np.geomspace(first, room, 60) if room > 0 else ():
        if excess(high) <= 0:
            lam = float(brentq(excess, low, high, xtol=1e-12 * lambda_max, rtol=1e-12))
            return MarginSolution(lam, limit - margin(lam), margin(lam), True)
        low = float(high)
    target = mean_cost(reward, cost, lambda_max, beta, jackknife)
    return MarginSolution(lambda_max, target, limit - target, False)

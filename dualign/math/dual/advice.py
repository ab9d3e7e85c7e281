"""What to do where few effective samples are left: another beta, or more samples."""

from __future__ import annotations

import numpy as np

from dualign.math.dual.root import root
from dualign.math.dual.tilt import effective_samples

Array = np.ndarray


def beta_for_ess(
    reward: Array, cost: Array, *, limit: float, beta: float, lambda_max: float, ess: float
) -> float | None:
    """The beta, to two digits, from which on up the median ESS of this pool is at least `ess`; None
    if none is found.

    lambda is solved anew at each beta, as a rerun would. A larger beta flattens r / beta, but
    lambda grows with it to keep the limit: the ESS tends to that of the smallest tilt exp(-t c)
    that keeps it, and a strict limit may leave no beta at all. Looks up to 2^12 times beta. Raises
    InfeasibleError where the limit is out of reach.

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
    high = beta * 2.0**doubled
    low = high / 2
    while high / low > 1.02:
        middle = float(np.sqrt(low * high))
        if enough(middle):
            high = middle
        else:
            low = middle
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

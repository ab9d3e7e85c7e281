"""What to say of a limit that is out of the samples' reach: what is reached, and what would do."""

from __future__ import annotations

import numpy as np

from dualign.math.dual.tilt import predict

Array = np.ndarray


def out_of_reach(
    reward: Array, cost: Array, share: Array, limit: float, beta: float, lambda_max: float
) -> str:
    """What is reached at lambda_max, and which limit, lambda, beta or number of samples would do.

    `share` [prompts] weighs the prompts and sums to one.

    >>> reward, cost, share = np.zeros((1, 2)), np.array([[0.0, 1.0]]), np.ones(1)
    >>> print(out_of_reach(reward, cost, share, limit=0.25, beta=1.0, lambda_max=1.0)[:86])
    constraint.limit 0.25 is out of the samples' reach: at lambda_max 1 and beta 1 the pre
    """
    reached = float(share @ predict(reward, cost, lambda_max, beta, cost))
    lowest = float(share @ cost.min(1))
    samples = cost.shape[1]
    message = (
        f"constraint.limit {limit:g} is out of the samples' reach: at lambda_max {lambda_max:g} and"
        f" beta {beta:g} the predicted cost is still {reached:.4g}; raise the limit above that"
    )
    least = f"the least costly of a prompt's {samples} samples costs {lowest:.4g} in the mean"
    if lowest < limit:
        greedy = (reward - lambda_max * cost).argmax(1)  # what is left as beta goes to 0
        sharp = float(share @ cost[np.arange(len(cost)), greedy])
        other = " or lower beta" if sharp < limit else " (a lower beta will not do)"
        return f"{message}, or raise lambda_max{other}: {least}"
    gain = float(share @ least_of(cost, max(samples // 2, 1))) - lowest
    doublings = (lowest - limit) / gain if gain > 0 else np.inf
    if doublings < 3:  # further off, an extrapolation means nothing
        wanted = _round_up(samples * 2 ** max(doublings, 0.2))
        return (
            f"{message}, or draw about {wanted} samples a prompt (score.samples_per_prompt):"
            f" {least}, {gain:.2g} less than of half as many; another lambda_max or beta will not"
            " do"
        )
    return f"{message}; more samples, another lambda_max or another beta will not do: {least}"


def least_of(score: Array, count: int) -> Array:
    """Expected smallest of `count` of a prompt's samples, drawn without replacement; [prompts].

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

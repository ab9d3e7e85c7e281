"""Conformal Policy Control (Prinster et al., 2603.02196) as pure functions: a comparator of the
certificate.

A safe policy pi_0 regulates an optimised one pi_t while answers are drawn:

    pi_b(y|x) = min{pi_t(y|x), b pi_0(y|x)} / psi_b(x),
    psi_b(x) = E_{y~pi_0} min{rho, b},   rho = pi_t / pi_0

b = 0 stands for pi_0 and b = inf for pi_t. With a loss l in [0, B], answers y_i ~ pi_0 to n
calibration prompts have weights w_i(b) = min{rho_i, b} / psi_b(x_i), and the unseen one has b /
psi_b(x) at most. Going up from the safe end, the last b is taken before the first with

    (sum_i w_i l_i + v B) / (sum_i w_i + v) > alpha,   v = max_i b / psi_b(x_i).

Its promise is E[l] <= alpha on average over calibration draws. That is not the certificate's P(E[c]
> limit) <= delta for the policy returned: a method whose risk is at alpha on average is above it in
about every other draw.

psi_b belongs to a prompt here, because a server answers every prompt; a common one would be that of
a policy that leaves prompts out. It is estimated from other answers to the prompt than those that
are weighed, some of them of pi_t: weights that are normalised by themselves lean towards pi_0, and
the promise is missed. A prompt counts once, however many answers it has."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Regulated(NamedTuple):
    """What the policy at a bound b does: mean loss, mean reward, and answers drawn for each that is
    served.
    """

    loss: float
    reward: float
    price: float


def clipped(ratio: Array, bound: float) -> Array:
    """min{rho, b} up to a factor that does not depend on the answer; 1 at b = 0, which stands for
    pi_0.
    """
    if bound == 0:
        return np.ones_like(ratio)
    found: Array = np.minimum(ratio, bound)
    return found


def normaliser(mixed: Array, bound: float) -> Array:
    """psi_b(x) [prompts] from the ratios [prompts, answers] of as many answers of pi_0 as of pi_t;
    1 at b = 0.

    By the mixture of both min{rho, b} has weight 2 / (1 + rho), which keeps it below 2 min{b, 1}.
    """
    if bound == 0:
        return np.ones(len(mixed))
    found: Array = (2 * clipped(mixed, bound) / (1 + mixed)).mean(-1)
    return found


def adjusted_risk(ratio: Array, loss: Array, mixed: Array, bound: float, most: float) -> float:
    """The left side of the inequality, for ratios and losses [prompts, answers] of pi_0's answers;
    `most` is B.

    `mixed` are the ratios of the other answers, for psi. At b = 0 every weight is 1, the unseen
    one's too: (sum l + B) / (n + 1), conformal risk control of pi_0."""
    psi = normaliser(mixed, bound)
    weight = clipped(ratio, bound) / psi[:, None]
    unseen = 1.0 if bound == 0 else float(_over_all(ratio, bound, psi).max())
    return float(
        ((weight * loss).mean(-1).sum() + unseen * most) / (weight.mean(-1).sum() + unseen)
    )


def _over_all(ratio: Array, bound: float, psi: Array) -> Array:
    """b / psi_b(x); at b = inf the largest ratio that was seen takes the place of b."""
    found: Array = (bound if np.isfinite(bound) else float(ratio.max())) / psi
    return found


def calibrated(
    ratio: Array, loss: Array, mixed: Array, alpha: float, most: float, grid: Array
) -> float | None:
    """The last of the bounds in `grid` (which grows) before the first at which the risk is above
    alpha; None: none.
    """
    kept = None
    for bound in grid:
        if adjusted_risk(ratio, loss, mixed, float(bound), most) > alpha:
            break
        kept = float(bound)
    return kept


def grid_of(ratio: Array, count: int = 60) -> Array:
    """0, quantiles of the ratios that answers of pi_0 have, and infinity."""
    inside = np.unique(np.quantile(ratio, np.linspace(0, 1, count)))
    return np.concatenate([[0.0], inside[inside > 0], [np.inf]])


def regulated(ratio: Array, loss: Array, reward: Array, bound: float) -> Regulated:
    """What pi_b does, from answers [prompts, answers] of pi_0 and as many of pi_t, of which the
    first half is pi_0's.

    Weights over the mixture of both, 2 min{rho, b} / (1 + rho), are at most 2 min{b, 1} and at
    least those of either alone; they are normalised by prompt. Drawn from pi_t an answer is kept
    with probability min{1, b / rho}, from pi_0 with min{1, rho / b}: 1 / psi_b or b / psi_b answers
    for one that is served, whichever policy is the better source."""
    weight = 2.0 * clipped(ratio, bound) / (1 + ratio)
    share = weight / weight.sum(-1, keepdims=True)
    half = ratio.shape[-1] // 2
    return Regulated(
        loss=float((share * loss).sum(-1).mean()),
        reward=float((share * reward).sum(-1).mean()),
        price=_price(ratio[:, :half], ratio[:, half:], bound),
    )


def _price(safe: Array, bold: Array, bound: float) -> float:
    """Answers drawn for each that is served, averaged over prompts, from the better of the two
    sources.
    """
    if bound == 0 or np.isinf(bound):
        return 1.0
    from_bold = 1 / np.minimum(1, bound / bold).mean(-1)
    from_safe = 1 / np.minimum(1, safe / bound).mean(-1)
    return float(min(from_bold.mean(), from_safe.mean()))

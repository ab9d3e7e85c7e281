"""Calibration of scores to probabilities: Platt's line, an isotonic curve, and their fit.

A calibration maps the cost model's raw score to a cost whose sigmoid is P(unsafe). It rises
strictly, so it never changes a ranking; what it sets is the unit of cost and its zero, where
P(unsafe) = 1/2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import brentq, isotonic_regression, minimize

from dualign.core.errors import DataError

Array = np.ndarray

#: Standard deviation of the prior on a slope per standard deviation of the score; see `fit_platt`.
_WIDTH = 1.5
_PRIOR = 2.0  # answers that Platt's line is worth in every block of the isotonic fit
_RESAMPLES = 200  # of the prompts, for the error of the isotonic zero


@dataclass(frozen=True)
class Platt:
    """P(unsafe) = sigmoid(scale * score + offset); the calibrated cost is that logit, 0 at 1/2.

    >>> line = Platt(scale=2.0, offset=-1.0)
    >>> line.zero, line(np.array([0.5, 1.5]))
    (0.5, array([0., 2.]))
    """

    scale: float = 1.0
    offset: float = 0.0

    def __call__(self, score: Array) -> Array:
        return self.scale * score + self.offset

    @property
    def zero(self) -> float:
        """The score whose cost is 0."""
        return -self.offset / self.scale


@dataclass(frozen=True)
class Isotonic:
    """P(unsafe) = sigmoid(cost), straight between points (scores, costs), of `scale` outside.

    Both tuples rise strictly, and have one length, at least 1.

    >>> curve = Isotonic(scale=1.0, scores=(0.0, 2.0), costs=(-1.0, 3.0))
    >>> curve.zero, curve(np.array([1.0, 3.0]))  # the slope of 2 between the points is 1 outside
    (0.5, array([1., 4.]))
    """

    scale: float
    scores: tuple[float, ...]
    costs: tuple[float, ...]

    def __call__(self, score: Array) -> Array:
        outside = np.minimum(score - self.scores[0], 0) + np.maximum(score - self.scores[-1], 0)
        return np.asarray(np.interp(score, self.scores, self.costs) + self.scale * outside)

    @property
    def zero(self) -> float:
        """The score whose cost is 0."""
        outside = min(-self.costs[0], 0.0) + max(-self.costs[-1], 0.0)
        return float(np.interp(0.0, self.costs, self.scores)) + outside / self.scale


Calibration = Platt | Isotonic


# --- fits -----------------------------------------------------------------------------------------


def fit_platt(score: Array, unsafe: Array) -> Platt:
    """The line a score + b whose sigmoid fits the flags (Platt, 1999), under a weak prior.

    score, unsafe (bool): shape [n]. The mode of sum log sigma(+-(a s + b)) - t^2 / (2 w^2) with t =
    a sd(s), a Gaussian prior on the standardised slope as Gelman et al. (2008) advise, w = 1.5; b
    is free. The width is that of the least excess log-loss over true slopes t of 0.3, 0.5, 1, 2 and
    4 and scores that are normal, 300 data sets each: with 26 flags 0.039 nats an answer on average,
    against 0.043 for w = 1, 0.041 for w = 2.5 and 0.072 for w = 30; with 100 flags 0.0105 against
    0.0114 for w = 30; with 1000 flags every width from 1.5 on comes to the same.

    Raises DataError if the flags or the scores are all alike, or if unsafe answers score lower
    (a <= 0).

    >>> line = fit_platt(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([False, False, True, True]))
    >>> line.scale > 0, abs(round(line.zero, 6))
    (True, 0.0)
    """
    score = np.asarray(score, float)
    unsafe = np.asarray(unsafe, bool)
    if unsafe.all() or not unsafe.any():
        raise DataError(
            "calibration needs held-out answers of both kinds, safe and unsafe; raise"
            " prepare.heldout_share"
        )
    if np.ptp(score) == 0:
        raise DataError(
            f"the cost model gives every held-out answer the score {score[0]:g}, which tells none"
            " from another; check template, label, or unsafe and safe of a given scorer, or train"
            " longer"
        )
    spread = _spread(score)
    middle = float(score.mean())
    design = np.stack([(score - middle) / spread, np.ones_like(score)], 1)
    slope, offset = _mode(design, unsafe, np.zeros(2), np.array([_WIDTH**-2, 0.0]))
    if slope <= 0:
        raise DataError(
            "the cost model scores unsafe answers below safe ones on held-out pairs; check the"
            " labels (chosen must be the safer answer) and higher_is of a given scorer, or train"
            " longer"
        )
    return Platt(float(slope / spread), float(offset - slope * middle / spread))


def fit_slope(gap: Array, centre: float = 0.0) -> float:
    """The s of P(chosen is better) = sigma(s gap), gap = score of chosen - rejected, [n].

    The mode under a Gaussian prior, of the width of `fit_platt`'s. `centre` is the slope that the
    scorer's training aimed at: s has mean `centre` and standard deviation 1.5 centre, so it stays
    there if there is little to go by (Bradley-Terry: centre 1). Where that is unknown centre is 0,
    and s rms(gap) has mean 0 and standard deviation 1.5. Negative if gaps point the wrong way.

    Gaps that point both ways alike say nothing; all one way, with nothing known before, they say
    something:

    >>> abs(round(fit_slope(np.array([1.0, -1.0])), 6)), fit_slope(np.ones(9)) > 1
    (0.0, True)
    """
    gap = np.asarray(gap, float)
    size = max(float(np.sqrt(np.mean(gap**2))), 1e-12)
    middle = centre * size
    precision = (_WIDTH * (middle or 1.0)) ** -2
    mode = _mode(
        gap[:, None] / size, np.ones(len(gap), bool), np.array([middle]), np.array([precision])
    )
    return float(mode[0] / size)


def _mode(design: Array, flags: Array, centre: Array, precision: Array) -> Array:
    """Mode of a logistic regression under Gaussian priors; design [n, k], flags [n], rest [k]."""
    sign = np.where(flags, 1.0, -1.0)

    def loss(theta: Array) -> float:
        prior = 0.5 * float((precision * (theta - centre) ** 2).sum())
        return float(np.logaddexp(0, -sign * (design @ theta)).sum()) + prior

    def gradient(theta: Array) -> Array:
        return np.asarray(
            design.T @ (sigmoid(design @ theta) - flags) + precision * (theta - centre)
        )

    def hessian(theta: Array) -> Array:
        probability = sigmoid(design @ theta)
        return np.asarray(
            (design * (probability * (1 - probability))[:, None]).T @ design + np.diag(precision)
        )

    options = {"gtol": 1e-9 * len(flags)}
    return np.asarray(
        minimize(loss, centre, jac=gradient, hess=hessian, method="trust-exact", options=options).x
    )


def platt_zero_error(platt: Platt, score: Array, unsafe: Array, prompts: Array) -> float:
    """Standard error of the zero of `platt`, fitted to these answers (shape [n]), in cost.

    The zero lies at the score s0 = -b / a, and the delta method gives a sd(s0) = sqrt(v' S v), v =
    (s0, 1): the error of the cost that the fit gives an answer of even odds. S = H^-1 (sum_x g_x
    g_x') H^-1 N / (N - 1) is the covariance of (a, b), clustered by prompt (Liang and Zeger, 1986):
    H the Hessian of the negative log-posterior of `fit_platt`, g_x the sum of the likelihood's
    gradients over the answers to prompt x of N, which err together.

    Four times the prompts halve it, more answers to the same prompts do not:

    >>> score, unsafe = np.tile([-2.0, -1.0, 1.0, 2.0], 50), np.tile([False, True, False, True], 50)
    >>> line, prompts = fit_platt(score, unsafe), np.arange(200)
    >>> one = platt_zero_error(line, score, unsafe, prompts)
    >>> scores, flags = np.tile(score, 4), np.tile(unsafe, 4)
    >>> round(platt_zero_error(line, scores, flags, np.arange(800)) / one, 1)
    0.5
    >>> round(platt_zero_error(line, scores, flags, np.tile(prompts, 4)) / one, 1)
    1.0
    """
    return _line_error(platt, score, unsafe, prompts, np.array([platt.zero, 1.0]))


def _line_error(
    platt: Platt, score: Array, unsafe: Array, prompts: Array, direction: Array
) -> float:
    """sqrt(v' S v) of `platt_zero_error`; `direction` is v."""
    design = np.stack([score, np.ones_like(score)], 1)
    probability = sigmoid(platt(score))
    prior = np.diag([(_spread(score) / _WIDTH) ** 2, 0.0])
    hessian = (design * (probability * (1 - probability))[:, None]).T @ design + prior
    _, cluster = np.unique(prompts, return_inverse=True)
    count = int(cluster.max()) + 1
    gradient = np.zeros((count, 2))
    np.add.at(gradient, cluster, design * (probability - unsafe)[:, None])
    influence = gradient @ np.linalg.solve(hessian, direction)
    return float(np.linalg.norm(influence) * np.sqrt(count / max(count - 1, 1)))


def fit_shift(cost: Array, unsafe: Array) -> float:
    """The delta by which these costs are off: sigma(cost + delta) is the share of unsafe answers on
    average, which is the maximum of the likelihood.

    cost, unsafe (bool): shape [n]. Raises DataError where the flags are all alike.

    >>> round(fit_shift(np.array([0.0, 0.0, 0.0, 0.0]), np.array([1, 1, 1, 0], bool)), 6)  # log 3
    1.098612
    """
    cost = np.asarray(cost, float)
    share = float(np.mean(unsafe))
    if share in (0.0, 1.0):
        raise DataError(
            "flags that are all alike, safe or unsafe, tell nothing of the zero of cost"
        )
    far = float(np.abs(cost).max()) + abs(np.log(share / (1 - share))) + 1.0
    return float(brentq(lambda delta: float(sigmoid(cost + delta).mean()) - share, -far, far))


def shift_error(cost: Array, unsafe: Array, prompts: Array) -> float:
    """Standard error of `fit_shift`, clustered by prompt (Liang and Zeger, 1986); shifted `cost`.

    >>> cost, unsafe = np.zeros(100), np.arange(100) % 2 == 0
    >>> round(shift_error(cost, unsafe, np.arange(100)), 2)  # 1 / sqrt(100 / 4)
    0.2
    """
    probability = sigmoid(np.asarray(cost, float))
    _, cluster = np.unique(prompts, return_inverse=True)
    residual = np.bincount(cluster, probability - unsafe)
    count = len(residual)
    information = float((probability * (1 - probability)).sum())
    return float(np.linalg.norm(residual) * np.sqrt(count / max(count - 1, 1)) / information)


def shifted(calibration: Calibration, delta: float) -> Calibration:
    """The calibration with `delta` on every cost.

    >>> shifted(Platt(2.0, -1.0), 3.0).offset
    2.0
    """
    if isinstance(calibration, Platt):
        return replace(calibration, offset=calibration.offset + delta)
    return replace(calibration, costs=tuple(cost + delta for cost in calibration.costs))


def shifted_zero_error(
    platt: Platt, heldout: tuple[Array, Array, Array], every: tuple[Array, Array, Array]
) -> float:
    """Standard error of the zero of `platt`, in units of cost, where held-out answers gave its
    slope and `every` answer its zero; each is (score, unsafe, prompts).

    The cost at score s0 errs by (s0 - s) e_a + e_delta: s is the mean score by the weights of the
    logistic fit, e_a the error of the slope, e_delta that of the shift at a given slope.

    It falls with either set:

    >>> score, unsafe = np.tile([-2.0, -1.0, 1.0, 2.0], 50), np.tile([False, True, False, True], 50)
    >>> line, few = fit_platt(score, unsafe), (score, unsafe, np.arange(200))
    >>> many = (np.tile(score, 4), np.tile(unsafe, 4), np.arange(800))
    >>> shifted_zero_error(line, few, many) < shifted_zero_error(line, few, few)
    True
    """
    score, unsafe, prompts = every
    probability = sigmoid(platt(score))
    middle = float(np.average(score, weights=probability * (1 - probability)))
    slope = _line_error(platt, *heldout, np.array([1.0, 0.0]))
    return float(
        np.hypot((platt.zero - middle) * slope, shift_error(platt(score), unsafe, prompts))
    )


def fit_isotonic(score: Array, unsafe: Array, platt: Platt) -> Isotonic:
    """P(unsafe) increasing in the score, by pool adjacent violators (Zadrozny and Elkan, 2002).

    `platt` is the line fitted to the same answers; score, unsafe (bool): shape [n]. A block of n
    answers, k of them unsafe, has P = (k + m p) / (n + m), p being the mean of sigma(platt) over it
    and m = 2: never 0 or 1, and close to the line where flags are few. Blocks that this puts out of
    order are pooled again. The cost is the logit of P at the block's mean score, straight between
    blocks, and has Platt's slope outside, where there is nothing to go by.

    Flags that fall as the score rises are pooled, here those of 1 to 4, so the curve rises all the
    same:

    >>> score, unsafe = np.arange(6.0), np.array([False, True, False, True, False, True])
    >>> curve = fit_isotonic(score, unsafe, fit_platt(score, unsafe))
    >>> curve.scores, bool((np.diff(curve.costs) > 0).all())
    ((0.0, 2.5, 5.0), True)
    """
    points, where = np.unique(np.asarray(score, float), return_inverse=True)
    count = np.bincount(where).astype(float)
    columns = np.stack(
        [count, np.bincount(where, unsafe), count * points, count * sigmoid(platt(points))]
    )
    starts = isotonic_regression(columns[1] / count, weights=count).blocks[:-1]
    blocks = np.add.reduceat(columns, starts, axis=1)
    while (fall := np.diff(_smoothed(blocks)) <= 0).any():
        keep = np.flatnonzero(np.r_[True, ~fall])
        blocks = np.add.reduceat(blocks, keep, axis=1)
    probability = _smoothed(blocks)
    logit = np.log(probability) - np.log1p(-probability)
    return Isotonic(platt.scale, tuple((blocks[2] / blocks[0]).tolist()), tuple(logit.tolist()))


def isotonic_zero_error(
    fitted: Isotonic,
    score: Array,
    unsafe: Array,
    prompts: Array,
    platt: Platt,
    rng: np.random.Generator,
) -> float:
    """Standard error of the zero of `fitted`, in cost; arguments as in `platt_zero_error`.

    The spread of the cost at that score over fits to resampled prompts. About twice that of Platt's
    zero: a curve goes by the flags near the zero, a line by all of them.

    A point in the middle of many flags of each kind:

    >>> score, unsafe = np.repeat([-1.0, 1.0], 500), np.repeat([False, True], 500)
    >>> line = fit_platt(score, unsafe)
    >>> curve = fit_isotonic(score, unsafe, line)
    >>> rng = np.random.default_rng(0)
    >>> isotonic_zero_error(curve, score, unsafe, np.arange(1000), line, rng) < 0.1
    True
    """
    _, cluster = np.unique(prompts, return_inverse=True)
    count = int(cluster.max()) + 1
    costs = []
    for times in rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES):
        rows = np.repeat(np.arange(len(score)), times[cluster])
        costs.append(fit_isotonic(score[rows], unsafe[rows], platt)(np.array(fitted.zero)))
    return float(np.std(costs))


def _smoothed(blocks: Array) -> Array:
    """(k + m p) / (n + m) by block; rows: answers, unsafe ones, sums of scores and Platt's P."""
    count, unsafe, _, expected = blocks
    return np.asarray((unsafe + _PRIOR * expected / count) / (count + _PRIOR))


def _spread(score: Array) -> float:
    return max(float(score.std()), 1e-12)


# --- how well a probability fits ------------------------------------------------------------------


def expected_calibration_error(probability: Array, outcome: Array, bins: int = 10) -> float:
    """Mean gap between probability and share over bins of equal count (Naeini et al. 2015).

    >>> expected_calibration_error(np.full(4, 0.5), np.array([0, 1, 0, 1]), bins=1)
    0.0
    >>> expected_calibration_error(np.full(4, 0.5), np.ones(4), bins=1)
    0.5
    """
    rows = [row for row in reliability(probability, outcome, bins) if row["answers"]]
    gaps = [row["answers"] * abs(row["predicted"] - row["observed"]) for row in rows]
    return sum(gaps) / len(probability)


def reliability(probability: Array, outcome: Array, bins: int = 10) -> list[dict[str, Any]]:
    """The reliability diagram: mean probability and observed share in bins of equal count.

    A row for each bin, by increasing probability; nulls where fewer outcomes than bins leave one
    empty. Answers of one probability may lie in several bins: each counts as the share among them,
    so that the order of rows says nothing.

    >>> reliability(np.array([0.25, 0.75]), np.array([0, 1]), bins=1)
    [{'predicted': 0.5, 'observed': 0.5, 'answers': 2}]
    """
    _, equal = np.unique(probability, return_inverse=True)
    share = (np.bincount(equal, outcome) / np.bincount(equal))[equal]
    order = np.argsort(probability, kind="stable")
    return [_bin(probability[part], share[part]) for part in np.array_split(order, bins)]


def _bin(probability: Array, outcome: Array) -> dict[str, Any]:
    if not len(probability):
        return {"predicted": None, "observed": None, "answers": 0}
    return {
        "predicted": float(probability.mean()),
        "observed": float(outcome.mean()),
        "answers": len(probability),
    }


def brier_score(probability: Array, outcome: Array) -> float:
    """Mean of (p - outcome)^2 (Brier, 1950): 0 is perfect, 0.25 is what p = 1/2 gets everywhere.

    >>> brier_score(np.full(4, 0.5), np.array([0, 1, 0, 1]))
    0.25
    """
    return float(np.mean((probability - outcome) ** 2))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow.

    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0]))
    array([0. , 0.5, 1. ])
    """
    return np.exp(-np.logaddexp(0, -np.asarray(x, float)))

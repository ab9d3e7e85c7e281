"""How well a judge agrees with people or another judge: kappa, accuracy, rank correlation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dualign.evaluation.stats import Estimate, drawn_ends, redrawn

Array = np.ndarray

#: Agreements of draws that differ by less are the rounding of equal ones.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Agreement:
    """Two labellings of the same answers. `confusion` counts [human's label, judge's label] in
    order of `labels`; kappa has an interval of prompts drawn with replacement."""

    labels: tuple[Any, ...]
    confusion: Array
    accuracy: float
    kappa: float
    low: float
    high: float


def cohen_kappa(confusion: Array) -> float:
    """Agreement beyond chance: (p_o - p_e) / (1 - p_e), with p_o the share on the diagonal and p_e
    what independent labels of the same shares would have there (Cohen 1960).

    `confusion` counts answers, shape [labels, labels]; NaN where all labels are one.

    >>> round(cohen_kappa(np.array([[20, 5], [10, 15]])), 3)
    0.4
    """
    shares = np.asarray(confusion, dtype=float) / np.sum(confusion)
    chance = float(shares.sum(0) @ shares.sum(1))
    return (float(np.trace(shares)) - chance) / (1 - chance) if chance < 1 else float("nan")


def agreement(
    human: Sequence[Hashable],
    judge: Sequence[Hashable],
    clusters: Sequence[Hashable],
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Compare labels of a judge with people's; `clusters` are the prompts; [answers] each. Kappa
    and its interval are NaN where all labels are one, the interval also where draws of prompts tell
    nothing: of few prompts, of answers that all agree, or of a label so rare that many draws are
    without it (`drawn_ends`).

    >>> agreement([1, 1, 0, 0], [1, 0, 0, 0], ["a", "b", "c", "d"]).kappa
    0.5
    """
    labels = tuple(sorted({*human, *judge}, key=str))
    codes = [np.array(list(map(labels.index, side))) for side in (human, judge)]
    _, groups = np.unique(np.asarray(clusters), return_inverse=True)
    counts = np.zeros((groups.max() + 1, len(labels), len(labels)))
    np.add.at(counts, (groups, *codes), 1)
    confusion = counts.sum(0)
    weights = redrawn(np.random.default_rng(seed), len(counts), draws)
    drawn = np.tensordot(weights, counts, 1)
    kappas = np.array([cohen_kappa(one) for one in drawn])
    low, high = _ends(kappas, len(counts), confidence)
    accuracy = float(np.trace(confusion) / confusion.sum())
    return Agreement(labels, confusion.astype(int), accuracy, cohen_kappa(confusion), low, high)


def _ends(drawn: Array, prompts: int, confidence: float) -> tuple[float, float]:
    """The ends of what draws of prompts give [draws]; NaN where these tell nothing, or are all the
    same.
    """
    known = drawn[~np.isnan(drawn)]
    low, high = map(float, drawn_ends(drawn, prompts, confidence))
    if not np.isfinite([low, high]).all() or np.ptp(known) <= _ROUNDING:
        return float("nan"), float("nan")
    return low, high


def rank_correlation(
    first: Sequence[float] | Array,
    second: Sequence[float] | Array,
    clusters: Sequence[Hashable] | Array,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Spearman's correlation (1904) of two judges' scores of the same answers, whatever their
    units; `clusters` are the prompts. Shape [answers] each.

    The interval draws prompts with replacement; ranks are those among all answers. NaN where a
    judge gives all answers the same score, and ends where draws tell nothing, as in `agreement`.

    >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 90.0], ["a", "b", "c"]).mean
    1.0
    """
    ranks = [pd.Series(np.asarray(side, dtype=float)).rank().to_numpy() for side in (first, second)]
    x, y = (side - side.mean() for side in ranks)
    _, groups = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((groups.max() + 1, 6))
    np.add.at(sums, groups, np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1))
    drawn = _correlation(redrawn(np.random.default_rng(seed), len(sums), draws) @ sums)
    whole = float(_correlation(sums.sum(0)))
    low, high = _ends(drawn, len(sums), confidence)
    error = float("nan") if np.isnan(low) else float(np.nanstd(drawn))
    return Estimate(whole, error, low, high)


def _correlation(sums: Array) -> Array:
    """Pearson's correlation from sums of 1, x, y, x^2, y^2, xy [..., 6]; NaN for a constant."""
    count, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = (count * xx - x * x) * (count * yy - y * y)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation: Array = np.where(spread > 1e-9, (count * xy - x * y) / np.sqrt(spread), np.nan)
    return correlation

"""Pessimism off the support: scores of answers unlike the scorers' own data are not believed.

A scorer is fitted on pairs; where no pair resembles an answer its score is extrapolation, and the
tilt exp(r / beta) multiplies the mass of what is over-scored. How surprising an answer is to pi_ref
tells such text without a label."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from dualign.core.errors import DataError
from dualign.core.schema import SUPPORT, by_prompt, read_table
from dualign.math.spread import within_sd
from dualign.params.base import PessimismParams

Array = np.ndarray

#: The table of held-out pair answers in the folder of stage `score`: schema SUPPORT.
HELD_OUT = "support.parquet"

#: The spread of surprise at a length is not taken for less than this share of its root mean square
#: over all lengths.
_LEAST_SPREAD = 0.1


@dataclass(frozen=True)
class Support:
    """How surprising held-out pair answers are to pi_ref, given their length n in tokens.

    Surprise is u = -log pi_ref(y|x) in nats. `mean` and `spread` hold the coefficients of 1, n,
    sqrt(n) in m(n) and s(n), `least` is the smallest s(n), and `threshold` the z = (u - m(n)) /
    s(n) that a given share of the answers exceeds."""

    mean: tuple[float, float, float]
    spread: tuple[float, float, float]
    least: float
    threshold: float

    def surprise(self, logp_ref: Array, length: Array) -> Array:
        """z = (u - m(n)) / s(n) of answers; any shape."""
        terms = _terms(length)
        spread = np.maximum(terms @ np.array(self.spread), self.least)
        z: Array = (-np.asarray(logp_ref, float) - terms @ np.array(self.mean)) / spread
        return z

    def beyond(self, logp_ref: Array, length: Array) -> Array:
        """g = min((z - t)_+, 1): 0 on the support, 1 one standard deviation beyond its edge."""
        return np.clip(self.surprise(logp_ref, length) - self.threshold, 0.0, 1.0)


def fit_support(logp_ref: Array, length: Array, share: float) -> Support:
    """The support of answers [answers]: m(n), s(n) by least squares, quantile 1 - `share` of z.

    s(n) is fitted to sqrt(pi / 2) |u - m(n)|, whose mean is the standard deviation of a normal.
    Answers longer than the context, whose log-probability is not finite, are left out. Raises
    DataError where fewer than 1 / `share` are left: then none is beyond that quantile."""
    finite = np.isfinite(logp_ref)
    logp_ref = logp_ref[finite]
    length = length[finite]
    if not enough(logp_ref, share):
        raise DataError(
            f"pessimism.share {share:g}: {len(logp_ref)} answers of held-out pairs do not show so"
            f" small a share; raise it to {1 / max(len(logp_ref), 1):.2g} or more, raise"
            " prepare.heldout_share, or set pessimism.reward and pessimism.cost to 0"
        )
    surprise = -np.asarray(logp_ref, float)
    terms = _terms(length)
    mean = np.linalg.lstsq(terms, surprise, rcond=None)[0]
    off = np.abs(surprise - terms @ mean)
    spread = np.linalg.lstsq(terms, math.sqrt(math.pi / 2) * off, rcond=None)[0]
    least = max(_LEAST_SPREAD * float(np.sqrt((off**2).mean())), 1e-9)
    fitted = Support(_three(mean), _three(spread), least, 0.0)
    return replace(
        fitted, threshold=float(np.quantile(fitted.surprise(logp_ref, length), 1 - share))
    )


def enough(logp_ref: Array, share: float) -> bool:
    """Whether so many answers within the context show so small a share; `logp_ref` [answers]."""
    return bool(np.isfinite(logp_ref).sum() * share >= 1)


@dataclass(frozen=True)
class Doubt:
    """r~ = r - a g and c~ = c + b g: what answers off the `support` lose; a, b in score units."""

    support: Support
    reward: float
    cost: float

    def scores(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A table of schema POOL or ANSWERS with r~ and c~ in place of its scores."""
        beyond = self.beyond(frame)
        return frame.assign(
            reward=frame["reward"] - self.reward * beyond, cost=frame["cost"] + self.cost * beyond
        )

    def beyond(self, frame: pd.DataFrame) -> Array:
        """g of each row of such a table."""
        return self.support.beyond(*columns(frame))


def doubt(scored: Path, pool: pd.DataFrame, params: PessimismParams) -> Doubt | None:
    """What `params` ask for, in the pool's within-prompt standard deviations; None for nothing.

    `scored` is the folder of stage `score`, `pool` of schema POOL with its scores as they are."""
    if params.reward == params.cost == 0:
        return None
    support = fit_support(*columns(read_table(scored / HELD_OUT, SUPPORT)), params.share)
    reward, cost = (within_sd(by_prompt(pool, name)) for name in ("reward", "cost"))
    return Doubt(support, params.reward * reward, params.cost * cost)


def doubted(frame: pd.DataFrame, found: Doubt | None) -> pd.DataFrame:
    """The table with pessimistic scores; as it is without a doubt."""
    return frame if found is None else found.scores(frame)


def columns(frame: pd.DataFrame) -> tuple[Array, Array]:
    """logp_ref and length of a table of schema SUPPORT, POOL or ANSWERS, as floats."""
    return frame["logp_ref"].to_numpy(float), frame["length"].to_numpy(float)


def _terms(length: Array) -> Array:
    n = np.asarray(length, float)
    return np.stack([np.ones_like(n), n, np.sqrt(n)], axis=-1)


def _three(coefficients: Array) -> tuple[float, float, float]:
    first, second, third = map(float, coefficients)
    return first, second, third

"""Additional constraints in a search, measured on a policy's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from dualign.evaluation.stats import ConstraintEstimate, clustered_mean
from dualign.math.constraints import Constraint

Array = np.ndarray


class ConstraintEstimates(NamedTuple):
    """Estimates of K limits, and the covariance [1 + K, 1 + K] as `Measurement` holds them."""

    estimates: tuple[ConstraintEstimate, ...]
    covariance: tuple[tuple[float, ...], ...]


def measure_additional(answers: pd.DataFrame, limits: Sequence[Constraint]) -> ConstraintEstimates:
    """What answers (schema ANSWERS) show of the limits, each on the prompts that it is on."""
    if not limits:
        return ConstraintEstimates((), ())
    prompts = answers["prompt_id"].to_numpy()
    texts = answers["prompt"].tolist()
    cost, length, ended = (answers[name].to_numpy(float) for name in ("cost", "length", "ended"))
    found = []
    values = [cost]
    for limit in limits:
        on = limit.applies(texts)
        value = limit.values(cost, length, ended)
        share = float(pd.Series(on).groupby(prompts).first().mean())
        mean = clustered_mean(value[on], prompts[on]) if on.any() else None
        known = (None, None) if mean is None else (mean.mean, mean.error)
        found.append(ConstraintEstimate(limit.name, limit.limit, share, *known))
        values.append(on * value)
    return ConstraintEstimates(
        tuple(found), tuple(map(tuple, within_covariance(np.stack(values), prompts).tolist()))
    )


def within_covariance(values: Array, prompts: Array) -> Array:
    """Mean over prompts of the unbiased covariance of `values` [K, answers] within one; [K, K].

    Prompts with one answer are left out, as in `within_variance`, which is its diagonal; zeros if
    there is no other."""
    _, codes, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    means = np.stack([np.bincount(codes, row) / counts for row in values])
    centred = (values - means[:, codes]) / np.sqrt(np.maximum(counts - 1, 1))[codes]
    covariance: Array = centred @ centred.T / max(int((counts > 1).sum()), 1)
    return covariance

"""A policy's cost from samples of the reference, by importance weights: forward passes alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from dualign.evaluation.stats import mean_of

Array = np.ndarray


@dataclass(frozen=True)
class Screening:
    """The cost of the merge of weight `q` as the pool sees it, and a prompt's median ESS."""

    q: float
    cost: float
    cost_se: float
    ess: float


def off_policy_cost(log_ratio: Array, cost: Array) -> tuple[float, float, float]:
    """E_pi[c] from reference samples: (estimate, standard error, median effective sample size).

    `log_ratio` is log(pi / pi_ref) of the samples and `cost` their c, both [prompts, samples]. With
    w = pi / pi_ref it is the mean over prompts of sum_i w_i c_i / sum_i w_i, as the dual predicts
    pi_lambda, and the error is that of this mean. Normalised within the prompt, a weight can move
    one prompt alone: a training may raise some odd answer of the reference ten thousandfold, which
    would drown the whole pool under weights whose mean is known to be 1. The price is a bias
    towards the reference where the effective sample size 1 / sum w^2 (w normalised) is a small
    number."""
    log_ratio, cost = np.asarray(log_ratio, float), np.asarray(cost, float)
    weight = softmax(log_ratio, axis=1)
    found = mean_of((weight * cost).sum(1))
    return found.mean, found.error, float(np.median(1 / (weight**2).sum(1)))

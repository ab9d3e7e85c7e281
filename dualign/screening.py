"""The cost of a policy from samples of the reference, by importance weights: forward passes, no generation."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Screening:
    """The cost of the merge of weight `q` as the pool sees it: estimate, prompt-clustered standard error, and ESS."""

    q: float
    cost: float
    cost_se: float
    ess: float

    def as_dict(self) -> dict[str, float]:
        """The fields, as a search's summary holds them."""
        return asdict(self)


def off_policy_cost(log_ratio: Array, cost: Array) -> tuple[float, float, float]:
    """E_pi[c] from reference samples: (estimate, standard error, effective sample size).

    `log_ratio` is log(pi / pi_ref) of the samples, known exactly, and `cost` their c; both [prompts, samples].
    With w = pi / pi_ref, whose mean is 1 for every prompt, E_pi[c] = E[w c] / E[w], both means over all samples: one
    normalisation for the pool in place of one for each prompt, whose bias at a handful of samples a prompt would not
    go away with more prompts, and which knows that E[w c] - c0 E[w] does not depend on the zero c0 of the cost.
    The standard error is that of the linearised ratio, sum_i w (c - C) of a prompt, over prompts. The effective sample
    size (sum w)^2 / sum w^2 counts samples of the whole pool; where it is small, a few samples speak for all, and
    estimate and error are not to be trusted.
    """
    log_ratio, cost = np.asarray(log_ratio, float), np.asarray(cost, float)
    weight = np.exp(log_ratio - log_ratio.max())
    weight /= weight.mean()
    mean = float((weight * cost).mean())
    influence = (weight * (cost - mean)).mean(1)
    error = float(influence.std(ddof=1) / np.sqrt(len(cost))) if len(cost) > 1 else float("inf")
    return mean, error, float(weight.sum() ** 2 / (weight**2).sum())

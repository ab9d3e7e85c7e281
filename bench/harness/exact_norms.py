"""Norms as exact as the rest of a float64 model, for `bench.truthful` and lm-eval alike.

transformers' RMS norms compute in float32, whatever the model's precision. So the likelihoods of a
float64 model differ by some 1e-6 nats where only the order of its sums does."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import rms_norm


def exact_norms(model: torch.nn.Module) -> None:
    """Have every RMS norm of a model compute in the precision of its weights."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            weight: Any = module.weight
            eps: Any = module.variance_epsilon
            given = {"normalized_shape": weight.shape, "weight": weight, "eps": eps}
            module.forward = partial(rms_norm, **given)

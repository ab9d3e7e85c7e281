"""Liger's kernels, where they are installed: a norm, a rotation of positions or a gated product is
one kernel of a GPU in place of several.

They are put into every model as it is loaded, a reference as well as what is trained, so both
compute the same numbers."""

from __future__ import annotations

from typing import Any

from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

#: What is left out: the head and its loss, which are our own (`dualign.lm.numerics`).
_OURS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def fuse(model: Any) -> None:
    """Let Liger's kernels compute a model of a GPU, if they are there and know its architecture."""
    if is_liger_kernel_available():
        apply_liger_kernel(model, _OURS)

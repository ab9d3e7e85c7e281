"""Matrix products of fp32 by oneDNN where torch's own, MKL's, do not use what the processor has.

MKL takes AVX-512 on processors of Intel alone. On others that have it oneDNN multiplies twice as
fast (`python -m bench.dpo_speed` measures both), to the same rounding errors."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Fewest rows and narrowest matrices for which a product by oneDNN is the faster one.
ROWS = 16
WIDTH = 128


@cache
def faster() -> bool:
    """Whether oneDNN is there, and the processor has AVX-512 and is not Intel's."""
    if not torch.backends.mkldnn.is_available():
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not _of_intel()


def _of_intel() -> bool:
    """Whether the processor says that it is Intel's; where nothing says so, MKL is left alone."""
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.is_file() or "GenuineIntel" in cpuinfo.read_text()


def product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T by oneDNN, in fp32, without a gradient; left [..., k], right [n, k]."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return made


class _Product(torch.autograd.Function):
    """x W^T and its gradients, all by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (gradient,) = given
        wanted = ctx.needs_input_grad
        to_x = product(gradient, weight.t()) if wanted[0] else None
        to_weight = product(_rows(gradient).t(), _rows(x).t()) if wanted[1] else None
        return to_x, to_weight


def _rows(tensor: Tensor) -> Tensor:
    """All but the last dimension as one."""
    return tensor.reshape(-1, tensor.shape[-1])


class OneDnnLinear(torch.nn.Linear):
    """A linear layer that multiplies by oneDNN what is fp32, on a CPU and of some rows."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // max(1, x.shape[-1])
        plain = x.dtype is torch.float32 and self.weight.dtype is torch.float32
        if not plain or rows < ROWS or x.device.type != "cpu":
            return super().forward(x)
        made: Tensor = _Product.apply(x, self.weight)
        return made if self.bias is None else made + self.bias


def through_onednn(model: torch.nn.Module) -> None:
    """Let wide linear layers multiply by oneDNN, as a class, so that copies do so too."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and min(module.weight.shape) >= WIDTH:
            module.__class__ = OneDnnLinear

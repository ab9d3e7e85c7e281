"""Muon: the matrices of hidden layers step by orthogonal matrices, all else by AdamW.

From K. Jordan et al., https://kellerjordan.github.io/posts/muon/, with the step size of 2502.16982,
which goes with learning rates of AdamW. `torch.optim.Muon` takes one matrix after the other, in
bf16; here those of one shape are one product, in fp32, which takes a fraction of the time where
matrices are small, and the same step on every machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dualign.lm.numerics import head_of
from dualign.training.sharding import full

#: Of the polynomial a s + b s^3 + c s^5, which takes singular values from 0..1 to near 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS = 5
#: What AdamW's steps are in root mean square, by 2502.16982.
_ADAMW_STEP = 0.2


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [..., m, n] with the same singular vectors and singular values near 1.

    Newton and Schulz: X = M / |M|, then five times X <- a X + (b X X' + c (X X')^2) X. A singular
    value of at least 0.01 |M| ends between 0.68 and 1.13; a matrix of zeros stays one.
    """
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """AdamW, but for groups of parameters that are `hidden`: matrices M with gradient G step by

        B <- mu B + (1 - mu) G
        M <- (1 - lr w) M - lr 0.2 sqrt(max(m, n)) orthogonal(mu B + (1 - mu) G)

    w is the weight decay. A step has the root mean square of one of AdamW's.
    """

    momentum = 0.95

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW's own asks all parameters for their count of steps, which matrices do not have.
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both kinds."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["hidden"]]
        loss = super().step(closure)
        self.param_groups = groups
        for group in groups:
            if group["hidden"]:
                self._turn(group)
        return loss

    def _turn(self, group: dict[str, Any]) -> None:
        for shape, weights in _by_shape(group["params"]):
            steps = orthogonal(torch.stack([self._direction(weight) for weight in weights]))
            size = group["lr"] * _ADAMW_STEP * max(shape) ** 0.5
            for weight, step in zip(weights, steps, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(_as(weight, step), alpha=-size)

    def _direction(self, weight: Tensor) -> Tensor:
        """Where Nesterov's momentum leads a matrix, whole and in fp32."""
        gradient = cast(Tensor, weight.grad)
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(gradient, 1 - self.momentum)
        ahead = gradient.lerp(state["momentum"], self.momentum)
        return full(ahead).float()


def _by_shape(weights: Sequence[Tensor]) -> Iterator[tuple[torch.Size, list[Tensor]]]:
    """Matrices with a gradient, those of one shape together."""
    found: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for weight in weights:
        if weight.grad is not None:
            found[weight.shape].append(weight)
    yield from found.items()


def _as(weight: Tensor, step: Tensor) -> Tensor:
    """A step in the weight's own type, and cut as the weight is."""
    step = step.to(weight.dtype)
    if not isinstance(weight, DTensor):
        return step
    return distribute_tensor(step, weight.device_mesh, weight.placements, src_data_rank=None)


def muon(model: nn.Module, decayed: Collection[str], decay: float, **options: Any) -> Muon:
    """Muon of a model's trained weights; those that are named decay."""
    hidden = hidden_matrices(model)
    groups: dict[tuple[bool, bool], list[Tensor]] = defaultdict(list)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            groups[name in hidden, name in decayed].append(weight)
    return Muon(
        [
            {"params": weights, "hidden": inner, "weight_decay": decay * kept}
            for (inner, kept), weights in groups.items()
        ],
        **options,
    )


def hidden_matrices(model: Any) -> set[str]:
    """Names of the matrices between embeddings and head; a head of one row is a vector."""
    outer = {id(weight) for weight in _outer(model)}
    return {
        name
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and min(weight.shape) > 1 and id(weight) not in outer
    }


def _outer(model: Any) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters()
    head = head_of(model)
    if head is not None:
        yield from head.parameters()

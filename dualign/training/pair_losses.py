"""The pair losses that a policy can be trained by: a table, one row each.

A loss is a pure function of `dualign.math.losses`; a row says how it is computed from a batch, and
what that takes. Their names, and which of them tilt, stand in `dualign.params.training`, where
params, report and searches read them without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dualign.math import losses
from dualign.params.training import LossType


class LossArgs(Protocol):
    """What the losses read of a `PairwiseConfig`."""

    beta: float
    undesirable_weight: float
    epsilon: float
    gamma: float


@dataclass(frozen=True)
class PairBatch:
    """What a loss is computed from; tensors are [pairs].

    `first` and `second` are the log-ratios h(y) to the reference columns in nats, bounded where
    there is a clip; `logit` is a Delta h, `label` P(first preferred), `logps` are log pi of first
    and second. `columns` is the batch as the trainer has it. `reference_point` computes KTO's, with
    a forward pass of its own."""

    first: Tensor
    second: Tensor
    logit: Tensor
    label: Tensor
    logps: tuple[Tensor, Tensor]
    columns: Mapping[str, Any]
    args: LossArgs
    reference_point: Callable[[], Tensor]


@dataclass(frozen=True)
class PairLoss:
    """One pair loss.

    `loss` gives one value for each pair, or each answer, of which the mean is taken. `columns` are
    those that it needs beside the common ones, `options` the fields of `PairwiseConfig` that go
    with it."""

    loss: Callable[[PairBatch], Tensor]
    columns: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def _dpo(batch: PairBatch) -> Tensor:
    return losses.soft_label_loss(batch.logit, batch.label)


def _robust(batch: PairBatch) -> Tensor:
    return losses.robust_loss(batch.logit, batch.label, batch.args.epsilon)


def _simpo(batch: PairBatch) -> Tensor:
    first, second = batch.logps
    tokens_first, tokens_second = batch.columns["completion_mask"].sum(1).chunk(2)
    scale = batch.args.beta
    margin = batch.args.gamma
    return losses.simpo_loss(first, second, tokens_first, tokens_second, batch.label, scale, margin)


def _ipo(batch: PairBatch) -> Tensor:
    return losses.ipo_loss(batch.first - batch.second, batch.label, batch.args.beta)


def _kto(batch: PairBatch) -> Tensor:
    """Of both answers by their flags; [answers]."""
    log_ratios = torch.cat([batch.first, batch.second])
    desirable = torch.cat([batch.columns["desirable_chosen"], batch.columns["desirable_rejected"]])
    return losses.kto_loss(
        log_ratios,
        desirable,
        batch.reference_point(),
        batch.args.beta,
        undesirable_weight=batch.args.undesirable_weight,
    )


PAIR_LOSSES: dict[LossType, PairLoss] = {
    "dpo": PairLoss(  # 2305.18290
        _dpo, options=("reward_bound", "labels", "anchor_weight", "nll_weight", "nll_control")
    ),
    "ipo": PairLoss(_ipo, options=("reward_bound",)),  # 2310.12036
    "kto": PairLoss(  # 2402.01306
        _kto,
        columns=(
            "desirable_chosen",
            "desirable_rejected",
            "mismatched_ids",
            "ref_mismatched_logps",
        ),
        options=("reward_bound", "undesirable_weight"),
    ),
    "robust": PairLoss(_robust, options=("reward_bound", "epsilon")),  # 2403.00409
    "simpo": PairLoss(_simpo, options=("gamma",)),  # 2405.14734
}

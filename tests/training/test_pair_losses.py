"""The table of pair losses: that params know what it says, and that what it says is true."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from dualign.math import losses
from dualign.params.training import LOSS_FIELDS, LOSS_OPTIONS, TILTING, LossType
from dualign.training.pair_losses import PAIR_LOSSES, PairBatch
from dualign.training.pairwise import PairLossConfig, PairwiseConfig
from tests.math.test_losses import BETA, World, gaps, largest_gap, minimiser

#: The options that a loss needs, as these tests give them.
NEEDED: dict[str, dict[str, float]] = {"robust": {"epsilon": 0.2}, "simpo": {"gamma": 0.5}}
#: What an option is called in `PairwiseConfig`, where it is not its own name.
RENAMED = {"clip": "reward_bound"}


def test_params_know_every_loss_and_what_it_is_like() -> None:
    assert tuple(PAIR_LOSSES) == get_args(LossType) == tuple(LOSS_OPTIONS)


def test_options_of_params_are_those_of_the_trainer() -> None:
    known = {field.name for field in fields(PairwiseConfig)}
    assert set(LOSS_FIELDS) <= {field.name for field in fields(PairLossConfig)}
    for name, options in LOSS_OPTIONS.items():
        row = set(PAIR_LOSSES[name].options)
        assert row <= known
        for option in LOSS_FIELDS[1:]:
            assert (option in options) == (RENAMED.get(option, option) in row)


def batch_of(table: Tensor, world: World, args: PairwiseConfig, first_preferred: bool) -> PairBatch:
    """All ordered pairs of answers of the world, as the trainer would hand them to a loss."""
    h = table.log_softmax(1) - world.log_ref
    first = h[:, :, None].expand(-1, -1, 5).reshape(-1)
    second = h[:, None, :].expand(-1, 5, -1).reshape(-1)
    zero = torch.zeros_like(first)
    columns = {
        "desirable_chosen": torch.full_like(first, first_preferred, dtype=torch.bool),
        "completion_mask": torch.ones(2 * len(first), 3),
        "desirable_rejected": torch.full_like(first, not first_preferred, dtype=torch.bool),
    }
    logit = losses.pairwise_logit(first, second, zero, zero, args.beta)
    label = torch.full_like(first, float(first_preferred))
    mean = (table.log_softmax(1).exp() * h).sum(1).mean().clamp(min=0)
    logps = table.log_softmax(1)
    both = logps[:, :, None].expand(-1, -1, 5), logps[:, None, :].expand(-1, 5, -1)
    given = (both[0].reshape(-1), both[1].reshape(-1))
    return PairBatch(first, second, logit, label, given, columns, args, lambda: mean.detach())


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_loss_that_says_so_and_no_other_tilts_by_the_score_that_the_pairs_rank(
    name: LossType, tmp_path: Path
) -> None:
    """The minimiser over all tables of the row's own loss, each pair labelled either way as often
    as Bradley and Terry say, but for the labels that the loss expects to be wrong.
    """
    world, row = World(), PAIR_LOSSES[name]
    options = {"beta": BETA, "pair_loss": name, **NEEDED.get(name, {})}
    args = PairwiseConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    truth = torch.sigmoid(gaps(world.reward)).reshape(-1)
    share = (1 - args.epsilon) * truth + args.epsilon * (1 - truth)

    def loss(table: Tensor) -> Tensor:
        won, lost = (row.loss(batch_of(table, world, args, side)) for side in (True, False))
        weight = share.repeat(len(won) // len(share))
        return (weight * won + (1 - weight) * lost).sum()

    gap = largest_gap(minimiser(loss, iterations=500), world.helpful)
    assert gap < 1e-5 if name in TILTING else gap > 0.02

"""The pair losses that a search goes on with."""

from __future__ import annotations

from typing import Any

import pytest

from dualign.methods import METHODS, Plan
from dualign.params.training import PairLossParams
from dualign.search.start import (
    TrainedPolicy,
)
from dualign.search.task import PairLosses
from dualign.training.pairwise import PairLossConfig


@pytest.mark.parametrize(
    ("start", "kept"),
    [
        ({}, {}),
        ({"loss_type": "dpo", "clip": None}, {}),
        ({"loss_type": "kto", "clip": None}, {"loss_type": "kto"}),
        ({"loss_type": "dpo", "clip": 4.0}, {"clip": 4.0}),
    ],
)
def test_a_search_keeps_the_loss_of_its_start(start: dict[str, Any], kept: dict[str, Any]) -> None:
    pd_dpo = Plan("row", METHODS["pd_dpo"], "safety_dpo/one", "reward_dpo/helpful")
    reference = TrainedPolicy(clip=7.0)
    assert PairLosses.of(pd_dpo, TrainedPolicy(**start), reference) == PairLosses(
        **kept, reward_clip=7.0
    )


WEIGHTS = PairLossParams(labels="soft", normalised=True, anchor=0.3, nll=2.0)


@pytest.mark.parametrize(("method", "kept"), [("dualign", WEIGHTS), ("p_sacpo", None)])
def test_the_lagrangian_weights_are_those_of_the_start(
    method: str, kept: PairLossParams | None
) -> None:
    row = Plan("row", METHODS[method], "lambda_path/strict", "sft")
    start = TrainedPolicy(pair_loss=WEIGHTS)
    assert PairLosses.of(row, start, TrainedPolicy()).lagrangian == kept


def test_the_loss_at_a_multiplier_by_hand() -> None:
    safety = PairLosses(loss_type="kto", clip=4.0)
    assert safety.at(0.5, 1.5) == PairLossConfig(3.0, 1.5, loss_type="kto", clip=4.0)
    assert safety.scale(3.0) == 1.0
    lagrangian = PairLosses(WEIGHTS)
    assert lagrangian.scale(3.0) == 0.25
    assert lagrangian.at(3.0, 1.5) == PairLossConfig(0.375, 1.5, "soft", 0.3, 2.0)

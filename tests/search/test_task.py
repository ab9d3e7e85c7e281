"""The pair losses that a search goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dualign.core.artifacts import write_json
from dualign.methods import METHODS, Plan
from dualign.params.training import LossSpec, PairLossParams
from dualign.search.start import (
    TrainedPolicy,
)
from dualign.search.task import PairLosses
from dualign.training.pairwise import PairLossConfig
from tests.written import safety


@pytest.mark.parametrize(
    ("start", "kept"),
    [
        ({}, {}),
        ({"loss_type": "dpo", "clip": None}, {}),
        ({"loss_type": "kto", "clip": None}, {"loss_type": "kto"}),
        ({"loss_type": "dpo", "clip": 4.0}, {"clip": 4.0}),
        (
            {"loss_type": "robust", "clip": None, "epsilon": 0.1},
            {"loss_type": "robust", "epsilon": 0.1},
        ),
    ],
)
def test_a_search_keeps_the_loss_of_its_start(
    start: dict[str, Any], kept: dict[str, Any], tmp_path: Path
) -> None:
    pd_dpo = Plan("row", METHODS["pd_dpo"], "safety_dpo/one", "reward_dpo/helpful")
    write_json(tmp_path / "safety_dpo/one.json", safety(**start))
    reference = TrainedPolicy(loss_spec=LossSpec(loss_type="dpo", clip=7.0))
    losses = PairLosses.of(pd_dpo, TrainedPolicy.read(tmp_path, pd_dpo.start), reference)
    assert losses.reward_clip == 7.0
    assert losses.at(0.5, 1.5) == PairLossConfig(3.0, 1.5, **kept)


WEIGHTS = PairLossParams(labels="soft", normalised=True, anchor=0.3, nll=2.0)


@pytest.mark.parametrize(("method", "kept"), [("dualign", WEIGHTS), ("p_sacpo", None)])
def test_the_lagrangian_weights_are_those_of_the_start(
    method: str, kept: PairLossParams | None
) -> None:
    row = Plan("row", METHODS[method], "lambda_path/strict", "sft")
    start = TrainedPolicy(pair_loss=WEIGHTS)
    assert PairLosses.of(row, start, TrainedPolicy()).lagrangian == kept


def test_the_loss_at_a_multiplier_by_hand() -> None:
    kto = PairLosses(safety=LossSpec(loss_type="kto", clip=4.0))
    assert kto.at(0.5, 1.5) == PairLossConfig(3.0, 1.5, loss_type="kto", clip=4.0)
    assert kto.scale(3.0) == 1.0
    lagrangian = PairLosses(WEIGHTS)
    assert lagrangian.scale(3.0) == 0.25
    assert lagrangian.at(3.0, 1.5) == PairLossConfig(0.375, 1.5, "soft", 0.3, 2.0)

"""The batches are TRL's, tensor by tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from trl.trainer import dpo_trainer, reward_trainer, sft_trainer

from dualign.training.collating import PairCollator, ScorerCollator, TextCollator


def rows(seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of random ids with columns beside, some prompts and answers empty."""
    rng = np.random.default_rng(seed)

    def ids(longest: int) -> list[int]:
        return rng.integers(4, 900, rng.integers(0, longest + 1)).tolist()

    return [
        {
            "prompt_ids": ids(20),
            "chosen_ids": [5, *ids(30)],
            "rejected_ids": ids(30),
            "ref_chosen_logps": float(rng.normal()),
            "ref_rejected_logps": float(rng.normal()),
        }
        for _ in range(9)
    ]


def texts() -> list[dict[str, Any]]:
    return [
        {
            "input_ids": row["prompt_ids"] + row["chosen_ids"],
            "labels": [-100] * len(row["prompt_ids"]) + row["chosen_ids"],
        }
        for row in rows()
    ]


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if isinstance(value, int):  # the longest row of packed ones
            assert ours[name] == value
            continue
        assert torch.equal(ours[name], value), name
        assert ours[name].dtype == value.dtype, name


@pytest.mark.parametrize(
    "options",
    [{}, {"pad_to_multiple_of": 16}, {"max_length": 60}]
    + [{"max_length": 25, "truncation_mode": mode} for mode in ("keep_start", "keep_end")],
)
@pytest.mark.parametrize("references", [True, False])
def test_pairs(options: dict[str, Any], references: bool) -> None:
    examples = rows()
    if not references:
        for row in examples:
            del row["ref_chosen_logps"], row["ref_rejected_logps"]
    theirs = dpo_trainer.DataCollatorForPreference(pad_token_id=3, **options)
    assert_same(PairCollator(pad_token_id=3, **options)(examples), theirs(examples))


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("margin", [True, False])
def test_scorers_pairs(multiple: int | None, margin: bool) -> None:
    examples = [{**row, "margin": 0.5} if margin else row for row in rows()]
    options = {"pad_token_id": 3, "pad_to_multiple_of": multiple}
    theirs = reward_trainer.DataCollatorForPreference(**options)(examples)
    assert_same(ScorerCollator(**options)(examples), theirs)


@pytest.mark.parametrize(
    "options",
    [{}, {"pad_to_multiple_of": 8}, {"padding_free": True}, {"return_position_ids": True}],
)
@pytest.mark.parametrize("labels", [True, False])
def test_texts(options: dict[str, Any], labels: bool) -> None:
    examples = texts()
    if not labels:
        examples = [{"input_ids": row["input_ids"]} for row in examples]
    theirs = sft_trainer.DataCollatorForLanguageModeling(pad_token_id=3, **options)
    assert_same(TextCollator(pad_token_id=3, **options)(examples), theirs(examples))

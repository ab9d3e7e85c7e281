"""Batches of token ids, padded in one go: those of TRL's collators.

TRL makes a tensor or two of each row and copies them one by one, which takes as long as a tenth of
a small model's step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.trainer import dpo_trainer, reward_trainer, sft_trainer

#: Columns that TRL stacks where the first row has them.
_REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")

Row = dict[str, Any]


def padded(
    rows: Sequence[Sequence[int]], value: int, multiple: int | None
) -> tuple[Tensor, Tensor]:
    """ids [rows, positions] with `value` after each row, and the mask of what is a row's own; the
    positions are a multiple of `multiple`.

    >>> ids, mask = padded([[5], [6, 7]], 0, None)
    >>> ids.tolist(), mask.tolist()
    ([[5, 0], [6, 7]], [[1, 0], [1, 1]])
    """
    lengths = np.array([len(row) for row in rows])
    step = multiple or 1
    own = np.arange(-(-lengths.max() // step) * step) < lengths[:, None]
    ids = np.full(own.shape, value, dtype=np.int64)
    ids[own] = list(chain.from_iterable(rows))
    return torch.from_numpy(ids), torch.from_numpy(own.astype(np.int64))


def _both(examples: Sequence[Row]) -> list[list[int]]:
    """Ids of all first answers or texts, and then of the second ones."""
    return [row[f"{side}_ids"] for side in ("chosen", "rejected") for row in examples]


@dataclass
class PairCollator(dpo_trainer.DataCollatorForPreference):
    """ids and masks of prompts with their first answers, then with their second ones."""

    def torch_call(self, examples: list[Row]) -> Row:
        """The batch; rows that `max_length` cuts are TRL's to make."""
        prompts = [example["prompt_ids"] for example in examples] * 2
        answers = _both(examples)
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        if self.max_length is not None and max(map(len, rows)) > self.max_length:
            return super().torch_call(examples)
        ids, own = padded(rows, self.pad_token_id, self.pad_to_multiple_of)
        asked = torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)
        answered = own * (torch.arange(ids.shape[1]) >= asked)
        batch = {"input_ids": ids, "attention_mask": own, "completion_mask": answered}
        for name in _REFERENCES:
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


@dataclass
class ScorerCollator(reward_trainer.DataCollatorForPreference):
    """ids and masks of the first texts, then of the second ones."""

    def torch_call(self, examples: list[Row]) -> Row:
        """The batch; margins, which nothing here has, are TRL's to add."""
        if "margin" in examples[0]:
            return super().torch_call(examples)
        ids, own = padded(_both(examples), self.pad_token_id, self.pad_to_multiple_of)
        return {"input_ids": ids, "attention_mask": own}


@dataclass
class TextCollator(sft_trainer.DataCollatorForLanguageModeling):
    """ids, labels and masks of texts."""

    def torch_call(self, examples: list[Row]) -> Row:
        """The batch; positions, which packed rows have, are TRL's to make."""
        if self.padding_free or self.return_position_ids:
            return super().torch_call(examples)
        texts = [example["input_ids"] for example in examples]
        wanted = [row["labels"] if "labels" in row else row["input_ids"] for row in examples]
        ids, own = padded(texts, self.pad_token_id, self.pad_to_multiple_of)
        labels, _ = padded(wanted, -100, self.pad_to_multiple_of)
        return {"input_ids": ids, "labels": labels, "attention_mask": own}

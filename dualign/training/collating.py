"""The batches of TRL's collators, padded in one go (`dualign.lm.batches.padded`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer import dpo_trainer, reward_trainer, sft_trainer

from dualign.lm.batches import padded
from dualign.training.metering import IGNORED

#: Columns that TRL stacks where the first row has them.
_REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")

Row = dict[str, Any]


def stacked(examples: Sequence[Row], names: Sequence[str]) -> Row:
    """The columns of `names` that the rows have, each as a tensor [rows, ...]."""
    found = {}
    for name in names:
        if name in examples[0]:
            found[name] = torch.tensor([example[name] for example in examples])
    return found


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
        ids, own = padded(rows, self.pad_token_id, multiple=self.pad_to_multiple_of)
        asked = torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)
        answered = own * (torch.arange(ids.shape[1]) >= asked)
        batch = {"input_ids": ids, "attention_mask": own, "completion_mask": answered}
        return batch | stacked(examples, _REFERENCES)


@dataclass
class ScorerCollator(reward_trainer.DataCollatorForPreference):
    """ids and masks of the first texts, then of the second ones."""

    def torch_call(self, examples: list[Row]) -> Row:
        """The batch; margins, which nothing here has, are TRL's to add."""
        if "margin" in examples[0]:
            return super().torch_call(examples)
        ids, own = padded(_both(examples), self.pad_token_id, multiple=self.pad_to_multiple_of)
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
        ids, own = padded(texts, self.pad_token_id, multiple=self.pad_to_multiple_of)
        labels, _ = padded(wanted, IGNORED, multiple=self.pad_to_multiple_of)
        return {"input_ids": ids, "labels": labels, "attention_mask": own}

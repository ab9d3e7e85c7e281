"""Reward and cost models: TRL's reward trainer, with sign terms for the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from dualign.math import losses
from dualign.training.collating import ScorerCollator
from dualign.training.columns import id_column, table_of
from dualign.training.run import (
    Job,
    Metrics,
    Model,
    arguments,
    noise_kept,
    run,
    short_enough,
    without_dropout,
)
from dualign.training.shares import COUNTED, Shared


@dataclass(frozen=True)
class ScoredPair:
    """Two answers to one prompt as ids of the whole conversation; the first should score higher.

    `unsafe` holds the safety flags of both answers for the cost model (None where there is none).
    """

    high: list[int]
    low: list[int]
    unsafe: tuple[bool | None, bool | None] = (None, None)


def train_scorer(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[ScoredPair],
    job: Job,
    *,
    sign_weight: float = 0.0,
    regularisation: float = 0.0,
) -> Metrics:
    """Bradley-Terry ranking loss, plus, if weighed, the sign terms that give a cost model its zero.

    `regularisation` weighs the mean squared score (Safe RLHF uses 1e-3), which keeps scores from
    drifting."""
    args = ScorerConfig(
        **arguments(job),
        max_length=None,
        disable_dropout=False,
        sign_weight=sign_weight,
        score_regularisation=regularisation,
    )
    with noise_kept(model):
        trainer = ScorerTrainer(
            without_dropout(model),
            args=args,
            data_collator=_FlagCollator(pad_token_id=tokenizer.pad_token_id),
            train_dataset=_ranked(pairs, job.training.max_length),
            processing_class=tokenizer,
        )
        return run(trainer, job)


def _ranked(pairs: Sequence[ScoredPair], max_length: int) -> Dataset:
    lengths = [max(len(pair.high), len(pair.low)) for pair in pairs]
    kept = short_enough(pairs, lengths, max_length)
    return table_of(
        {
            "chosen_ids": id_column(pair.high for pair in kept),
            "rejected_ids": id_column(pair.low for pair in kept),
            "flags": [[_flag(pair.unsafe[0]), _flag(pair.unsafe[1])] for pair in kept],
        }
    )


def _flag(unsafe: bool | None) -> int:
    return -1 if unsafe is None else int(unsafe)


@dataclass
class ScorerConfig(RewardConfig):
    """RewardConfig with the weight of the sign terms and of the mean squared score."""

    sign_weight: float = field(
        default=0.0, metadata={"help": "Weight of the sign terms of a cost model."}
    )
    score_regularisation: float = field(
        default=0.0, metadata={"help": "Weight of the mean squared score."}
    )


@dataclass
class _FlagCollator(ScorerCollator):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        batch["flags"] = torch.tensor([example["flags"] for example in examples])
        return batch


class ScorerTrainer(Shared, RewardTrainer):
    """RewardTrainer of a reward model, or of a cost model whose `chosen` is the more harmful."""

    _signature_columns: list[str]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "flags" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "flags"]

    def known(self, batch: dict[str, Any]) -> Tensor:
        """Which answers have a flag, [answers]."""
        known: Tensor = batch["flags"].T.reshape(-1) >= 0
        return known

    def compute_loss(
        self,
        model: Model,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        known = self.known(inputs)
        # [2 pairs]: all first answers, then all second ones, like the logits
        flags = inputs.pop("flags").T.reshape(-1)
        counted = inputs.pop(COUNTED, None)
        _, outputs = super().compute_loss(model, inputs, return_outputs=True)
        batch = inputs if counted is None else {**inputs, COUNTED: counted}
        scores = outputs.logits.squeeze(-1)
        high, low = scores.chunk(2)
        loss = self.part(-logsigmoid(high - low), batch)
        score = scores.float()
        if self.args.sign_weight > 0:
            terms = losses.sign_loss(score, flags == 1)
            # 2: the paper sums over both answers of a pair
            loss = loss + self.args.sign_weight * 2 * self.part(terms, batch, known)
        if self.args.score_regularisation > 0:
            loss = loss + self.args.score_regularisation * self.part(score**2, batch)
        return (loss, outputs) if return_outputs else loss

"""Supervised fine-tuning: TRL's trainer, with a cheaper loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from dualign.lm.numerics import answer_log_probabilities
from dualign.lm.sampling import log_probabilities
from dualign.training.collating import TextCollator
from dualign.training.columns import id_column, table_of
from dualign.training.metering import IGNORED
from dualign.training.run import Job, Metrics, Model, arguments, run, short_enough
from dualign.training.shares import Shared


def train_sft(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[tuple[list[int], list[int]]],
    heldout: Sequence[tuple[list[int], list[int]]],
    job: Job,
) -> Metrics:
    """Maximise log pi(answer | prompt) on (prompt ids, answer ids); returns losses per answer token
    in nats, with that of `heldout` after training."""
    measured = _fitting(heldout, job.training.max_length)  # told before training, if none fits
    # The rows fit, and their labels are made here: TRL would walk through them twice, one by one,
    # for the same.
    options = {"max_length": None, "packing": False, "router_aux_loss_coef": 0.0}
    args = SFTConfig(**arguments(job), **options)
    trainer = SupervisedTrainer(
        model,
        args=args,
        data_collator=TextCollator(pad_token_id=tokenizer.pad_token_id),
        train_dataset=_supervised(train, job.training.max_length),
        processing_class=tokenizer,
    )
    metrics = run(trainer, job)
    metrics["heldout_loss"] = heldout_loss(model, tokenizer, measured, job)
    return metrics


def heldout_loss(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[list[int], list[int]]],
    job: Job,
) -> float:
    """Mean -log pi(token) in nats over answers' tokens of the rows that fit into max_length."""
    kept = _fitting(rows, job.training.max_length)
    prompts, answers = zip(*kept, strict=True)
    size = job.resources.scoring_batch_size
    logps = log_probabilities(model, tokenizer, prompts, answers, batch_size=size)
    return -float(logps.sum()) / sum(map(len, answers))


class SupervisedTrainer(Shared, SFTTrainer):
    """SFTTrainer whose loss puts only the answers' positions through the vocabulary, in fp32.

    It is that of the answers alone, also for a mixture of experts."""

    def leave_out(self, batch: dict[str, Any], rows: Tensor) -> None:
        """Leave the rows' tokens out, and out of their count."""
        batch["labels"][rows] = IGNORED

    def compute_loss(
        self,
        model: Model,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        labels = inputs["labels"]
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logps = answer_log_probabilities(
            model, inputs["input_ids"], inputs["attention_mask"], labels
        )
        tokens = (
            (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        )
        return -logps.sum() * self.accelerator.num_processes / tokens


def _fitting(
    rows: Sequence[tuple[list[int], list[int]]], max_length: int
) -> list[tuple[list[int], list[int]]]:
    return short_enough(rows, [len(prompt) + len(answer) for prompt, answer in rows], max_length)


def _supervised(rows: Sequence[tuple[list[int], list[int]]], max_length: int) -> Dataset:
    kept = _fitting(rows, max_length)
    return table_of(
        {
            "input_ids": id_column(prompt + answer for prompt, answer in kept),
            "labels": id_column([IGNORED] * len(prompt) + answer for prompt, answer in kept),
        }
    )

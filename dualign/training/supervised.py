"""Supervised fine-tuning: TRL's trainer, with a cheaper loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from dualign.lm.numerics import answer_log_probabilities
from dualign.lm.sampling import log_probabilities
from dualign.training.run import (
    Job,
    Metrics,
    Model,
    Uncounted,
    arguments,
    callbacks,
    run,
    tell_dropped,
)

#: Label of a token that the loss leaves out.
_IGNORED = -100


def train_sft(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[tuple[list[int], list[int]]],
    heldout: Sequence[tuple[list[int], list[int]]],
    job: Job,
) -> Metrics:
    """Maximise log pi(answer | prompt) on (prompt ids, answer ids); returns losses per answer
    token, in nats.
    """
    # The rows fit, and their labels are made here: TRL would walk through them twice, one by one,
    # for the same.
    args = SFTConfig(**arguments(job), max_length=None, packing=False)
    trainer = SupervisedTrainer(
        model,
        args=args,
        train_dataset=_supervised(train, job.training.max_length),
        eval_dataset=_supervised(heldout, job.training.max_length),
        processing_class=tokenizer,
        callbacks=callbacks(),
    )
    metrics = run(trainer, job)
    metrics["heldout_loss"] = trainer.evaluate()["eval_loss"]
    return metrics


def heldout_loss(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[list[int], list[int]]],
    job: Job,
) -> float:
    """Mean -log pi(token) in nats over the answers' tokens of the rows that fit into the job's
    max_length.
    """
    kept = _fitting(rows, job.training.max_length)
    prompts, answers = zip(*kept, strict=True)
    logps = log_probabilities(
        model, tokenizer, prompts, answers, batch_size=job.resources.scoring_batch_size
    )
    return -float(logps.sum()) / sum(map(len, answers))


class SupervisedTrainer(Uncounted, SFTTrainer):
    """SFTTrainer whose loss puts only the answers' positions through the vocabulary, in fp32."""

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
        tokens = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return -logps.sum() / tokens


def _fitting(
    rows: Sequence[tuple[list[int], list[int]]], max_length: int
) -> list[tuple[list[int], list[int]]]:
    kept = [(prompt, answer) for prompt, answer in rows if len(prompt) + len(answer) <= max_length]
    tell_dropped(len(rows), len(kept), max_length)
    return kept


def _supervised(rows: Sequence[tuple[list[int], list[int]]], max_length: int) -> Dataset:
    kept = _fitting(rows, max_length)
    return Dataset.from_dict(
        {
            "input_ids": [prompt + answer for prompt, answer in kept],
            "labels": [[_IGNORED] * len(prompt) + list(answer) for prompt, answer in kept],
        }
    )

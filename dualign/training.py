"""Training with TRL: the one module that touches it.

Supervised fine-tuning and the reward model are TRL's trainers as they are. The cost model adds a sign term. Every
pairwise loss is `PairwiseTrainer`, a `DPOTrainer` that takes its reference log-probabilities, soft labels and anchors
from columns of the data. All runs keep checkpoints in a scratch folder and go on from the last complete one.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.reward_trainer import DataCollatorForPreference as ScoredCollator

from dualign import losses
from dualign.core.errors import DataError, ParamsError, TrainingError
from dualign.core.params import Resources, TrainingParams
from dualign.core.progress import watched
from dualign.lm.models import precision_of
from dualign.lm.sampling import answer_log_probabilities

log = logging.getLogger(__name__)

Model: TypeAlias = PreTrainedModel | PeftModel
Metrics: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What every training run needs besides its model and data. `scratch` is this run's own checkpoint folder."""

    training: TrainingParams
    resources: Resources
    scratch: Path
    seed: int


# --- supervised fine-tuning -------------------------------------------------------------------------------------------


def train_sft(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[tuple[list[int], list[int]]],
    heldout: Sequence[tuple[list[int], list[int]]],
    job: Job,
) -> Metrics:
    """Maximise log pi(answer | prompt) on (prompt ids, answer ids); returns losses per answer token, in nats."""
    args = SFTConfig(**_arguments(job), max_length=job.training.max_length, completion_only_loss=True, packing=False)
    trainer = SupervisedTrainer(
        model,
        args=args,
        train_dataset=_supervised(train, job.training.max_length),
        eval_dataset=_supervised(heldout, job.training.max_length),
        processing_class=tokenizer,
        callbacks=_callbacks(),
    )
    metrics = _run(trainer, job)
    metrics["heldout_loss"] = trainer.evaluate()["eval_loss"]
    return metrics


class SupervisedTrainer(SFTTrainer):
    """SFTTrainer whose loss on a CPU puts only the answers' positions through the vocabulary (twice as fast)."""

    def compute_loss(
        self, model: Model, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        if labels.is_cuda or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logps = answer_log_probabilities(model, inputs["input_ids"], inputs["attention_mask"], labels)
        tokens = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return -logps.sum() / tokens


def _supervised(rows: Sequence[tuple[list[int], list[int]]], max_length: int) -> Dataset:
    kept = [(prompt, answer) for prompt, answer in rows if len(prompt) + len(answer) <= max_length]
    _tell_dropped(len(rows), len(kept), max_length)
    return Dataset.from_dict(
        {
            "input_ids": [prompt + answer for prompt, answer in kept],
            "completion_mask": [[0] * len(prompt) + [1] * len(answer) for prompt, answer in kept],
        }
    )


# --- reward and cost model --------------------------------------------------------------------------------------------


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
    """Bradley-Terry ranking loss; with `sign_weight` > 0 plus the sign terms that give a cost model its zero.

    `regularisation` weighs the mean squared score (Safe RLHF uses 1e-3), which keeps scores from drifting.
    """
    args = ScorerConfig(
        **_arguments(job), max_length=None, sign_weight=sign_weight, score_regularisation=regularisation
    )
    trainer = ScorerTrainer(
        model,
        args=args,
        data_collator=_FlagCollator(pad_token_id=tokenizer.pad_token_id),
        train_dataset=_ranked(pairs, job.training.max_length),
        processing_class=tokenizer,
        callbacks=_callbacks(),
    )
    return _run(trainer, job)


def _ranked(pairs: Sequence[ScoredPair], max_length: int) -> Dataset:
    kept = [pair for pair in pairs if max(len(pair.high), len(pair.low)) <= max_length]
    _tell_dropped(len(pairs), len(kept), max_length)
    return Dataset.from_dict(
        {
            "chosen_ids": [pair.high for pair in kept],
            "rejected_ids": [pair.low for pair in kept],
            "flags": [[_flag(pair.unsafe[0]), _flag(pair.unsafe[1])] for pair in kept],
        }
    )


def _flag(unsafe: bool | None) -> int:
    return -1 if unsafe is None else int(unsafe)


@dataclass
class ScorerConfig(RewardConfig):
    """RewardConfig with the weight of the sign terms and of the mean squared score."""

    sign_weight: float = field(default=0.0, metadata={"help": "Weight of the sign terms of a cost model."})
    score_regularisation: float = field(default=0.0, metadata={"help": "Weight of the mean squared score."})


@dataclass
class _FlagCollator(ScoredCollator):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        batch["flags"] = torch.tensor([example["flags"] for example in examples])
        return batch


class ScorerTrainer(RewardTrainer):
    """RewardTrainer for a reward model, or for a cost model whose `chosen` is the more harmful answer."""

    _signature_columns: list[str]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "flags" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "flags"]

    def compute_loss(
        self, model: Model, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        flags = inputs.pop("flags").T.reshape(-1)  # [2 pairs]: all first answers, then all second ones, like the logits
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        score = outputs.logits.squeeze(-1).float()
        known = flags >= 0
        if self.args.sign_weight > 0 and bool(known.any()):
            terms = losses.sign_loss(score[known], flags[known] == 1)
            loss = loss + self.args.sign_weight * 2 * terms.mean()  # 2: the paper sums over both answers of a pair
        if self.args.score_regularisation > 0:
            loss = loss + self.args.score_regularisation * (score**2).mean()
        return (loss, outputs) if return_outputs else loss


# --- pairwise policy training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One training pair: ids of prompt and both answers, reference columns, label, and anchors.

    `label` is P(first preferred). `anchors` are the targets of beta * log-ratio of both answers to the *anchor's*
    reference column, which is the same column here; NaN where there is none.
    """

    prompt: list[int]
    first: list[int]
    second: list[int]
    ref_first: float
    ref_second: float
    label: float = 1.0
    anchors: tuple[float, float] = (math.nan, math.nan)
    weights: tuple[float, float] | None = None


@dataclass(frozen=True)
class Inner:
    """An inner loss: logit scale a, KL weight beta of the anchor, label mode, and the weights of anchor and NLL."""

    scale: float
    beta: float
    labels: str = "soft"
    anchor: float = 0.0
    nll: float = 0.0


def train_pairwise(
    model: Model, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], inner: Inner, job: Job
) -> Metrics:
    """Train a policy on pairs with `dualign.losses`; returns the loss curve and statistics of the last log line."""
    args = PairwiseConfig(
        **_arguments(job),
        beta=inner.scale,
        max_length=None,
        precompute_ref_log_probs=True,
        labels=inner.labels,
        anchor_weight=inner.anchor,
        anchor_beta=inner.beta,
        nll_weight=inner.nll,
    )
    trainer = PairwiseTrainer(
        model,
        args=args,
        train_dataset=pair_dataset(pairs, job.training.max_length),
        processing_class=tokenizer,
        callbacks=_callbacks(),
    )
    return _run(trainer, job)


def pair_dataset(pairs: Sequence[Pair], max_length: int) -> Dataset:
    """Pairs as the tokenised columns that `PairwiseTrainer` reads; pairs longer than `max_length` are left out."""
    kept = [p for p in pairs if len(p.prompt) + max(len(p.first), len(p.second)) <= max_length]
    _tell_dropped(len(pairs), len(kept), max_length)
    return Dataset.from_dict(
        {
            "prompt_ids": [p.prompt for p in kept],
            "chosen_ids": [p.first for p in kept],
            "rejected_ids": [p.second for p in kept],
            "ref_chosen_logps": [p.ref_first for p in kept],
            "ref_rejected_logps": [p.ref_second for p in kept],
            "label": [p.label for p in kept],
            "anchor_chosen": [p.anchors[0] for p in kept],
            "anchor_rejected": [p.anchors[1] for p in kept],
            "weight_chosen": [p.label if p.weights is None else p.weights[0] for p in kept],
            "weight_rejected": [1 - p.label if p.weights is None else p.weights[1] for p in kept],
        }
    )


@dataclass
class PairwiseConfig(DPOConfig):
    """DPOConfig with a label mode, an anchor and a light NLL term. `beta` is the scale a of the logit."""

    labels: str = field(
        default="soft", metadata={"help": "soft: use P(chosen preferred) as it is; bernoulli: draw afresh each time."}
    )
    anchor_weight: float = field(default=0.0, metadata={"help": "Weight of the anchor to the soft value."})
    anchor_beta: float = field(default=1.0, metadata={"help": "KL weight beta inside the anchor."})
    nll_weight: float = field(default=0.0, metadata={"help": "Weight of the importance-weighted -log pi."})


_EXTRA = ("label", "anchor_chosen", "anchor_rejected", "weight_chosen", "weight_rejected")


@dataclass
class _PairCollator(DataCollatorForPreference):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        for name in _EXTRA:
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


class PairwiseTrainer(DPOTrainer):
    """DPO with reference columns, soft labels, anchors and NLL; see `dualign.losses`.

    Reads the columns ref_chosen_logps, ref_rejected_logps (required), label (default 1), anchor_chosen,
    anchor_rejected (default none), weight_chosen, weight_rejected (of the likelihood term,
    default label and 1 - label), beside TRL's own.
    """

    _signature_columns: list[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        tokenizer = kwargs["processing_class"]
        kwargs.setdefault("data_collator", _PairCollator(pad_token_id=tokenizer.pad_token_id))
        super().__init__(*args, **kwargs)
        self._drawn = (-1, 0)  # step and part of the last draw of labels

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        if "prompt_ids" in dataset.column_names:
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if "ref_chosen_logps" in dataset.column_names:
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        missing = [name for name in _EXTRA if name not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *missing]

    def compute_loss(
        self, model: Model, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logps, outputs = self._policy_logps(model, inputs)
        first, second = logps.chunk(2)
        ratio_first, ratio_second = first - inputs["ref_chosen_logps"], second - inputs["ref_rejected_logps"]
        zero = torch.zeros_like(first)
        logit = losses.pairwise_logit(ratio_first, ratio_second, zero, zero, self.args.beta)
        label = self._label(inputs, logit)
        loss = losses.soft_label_loss(logit, label).mean()
        if self.args.anchor_weight > 0:
            loss = loss + self.args.anchor_weight * self._anchor(inputs, ratio_first, ratio_second)
        if self.args.nll_weight > 0:
            given = "weight_chosen" in inputs
            weight = (inputs["weight_chosen"], inputs["weight_rejected"]) if given else (label, 1 - label)
            weights = torch.cat(weight).to(logps.dtype)
            loss = loss + self.args.nll_weight * losses.weighted_nll(logps, weights).mean()
        self._record(logit, label, ratio_first, ratio_second)
        return (loss, outputs) if return_outputs else loss

    def _policy_logps(self, model: Model, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Summed log-probabilities of [all first answers, all second answers]."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)
        if ids.is_cuda:  # TRL's fused head never holds the vocabulary-wide logits; on a CPU it scores every position
            outputs = model(input_ids=ids, attention_mask=mask, use_cache=False, labels=labels, fused_lm_head=True)
            return outputs.log_probs[:, -(ids.shape[1] - 1) :].float().sum(1), outputs
        return answer_log_probabilities(model, ids, mask, labels), None

    def _label(self, inputs: dict[str, Any], logit: Tensor) -> Tensor:
        label: Tensor = inputs.get("label", torch.ones_like(logit)).to(logit.dtype)
        if self.args.labels == "soft" or not self.model.training:
            return label
        # Seeded by the step, so that a resumed run draws the labels that an uninterrupted one would have drawn; the
        # parts of a step, on all devices, take successive draws.
        step = self.state.global_step
        self._drawn = (step, self._drawn[1] + 1 if self._drawn[0] == step else 0)
        part = self._drawn[1] * self.accelerator.num_processes + self.accelerator.process_index
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        draws = [torch.bernoulli(label.cpu(), generator=generator) for _ in range(part + 1)]
        return draws[-1].to(logit.device)

    def _anchor(self, inputs: dict[str, Any], ratio_first: Tensor, ratio_second: Tensor) -> Tensor:
        targets = torch.cat([inputs["anchor_chosen"], inputs["anchor_rejected"]]).to(ratio_first.dtype)
        ratios = torch.cat([ratio_first, ratio_second])
        known = ~targets.isnan()
        terms = losses.anchor_loss(ratios[known], targets[known], self.args.anchor_beta)
        return terms.mean() if bool(known.any()) else ratios.sum() * 0.0

    def _record(self, logit: Tensor, label: Tensor, ratio_first: Tensor, ratio_second: Tensor) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        with torch.no_grad():
            metrics["accuracy"].append(((logit > 0) == (label > 0.5)).float().mean().item())
            metrics["abs_logit"].append(logit.abs().mean().item())
            metrics["log_ratio"].append(torch.cat([ratio_first, ratio_second]).mean().item())


# --- what all runs share ----------------------------------------------------------------------------------------------


def _arguments(job: Job) -> dict[str, Any]:
    training, resources = job.training, job.resources
    micro = min(resources.micro_batch_size or training.batch_size, training.batch_size)
    if training.batch_size % micro:
        raise ParamsError(f"batch_size {training.batch_size} must be a multiple of resources.micro_batch_size {micro}")
    bf16 = precision_of(resources) is torch.bfloat16
    return {
        "output_dir": str(job.scratch),
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": training.batch_size // micro,
        "learning_rate": training.learning_rate,
        "warmup_steps": training.warmup,
        "lr_scheduler_type": training.schedule,
        "weight_decay": training.weight_decay,
        "adam_beta2": training.adam_beta2,
        "seed": job.seed,
        "data_seed": job.seed,
        "bf16": bf16,
        "use_cpu": resources.device == "cpu",
        "gradient_checkpointing": resources.gradient_checkpointing,
        "logging_steps": resources.log_steps,
        "logging_nan_inf_filter": False,  # it would show the mean in place of a loss that is not finite
        "save_steps": resources.checkpoint_steps,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": not watched(),
        "dataloader_pin_memory": resources.device != "cpu" and torch.cuda.is_available(),
        "optim": "adamw_torch",
    }


def _run(trainer: Any, job: Job) -> Metrics:
    """Train, from the last complete checkpoint if there is one; refuse a loss that is not finite."""
    trainer.remove_callback(PrinterCallback)  # prints a dict per logged step beside our line
    checkpoint = last_checkpoint(job.scratch)
    if checkpoint is not None:
        log.info("resuming from %s", checkpoint)
    saved = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    if saved is not None and saved.global_step >= saved.max_steps:  # it had ended; train() would take one step more
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = saved
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state: TrainerState = trainer.state
    curve = [[entry["step"], entry["loss"]] for entry in state.log_history if "loss" in entry]
    seen = [entry[key] for entry in state.log_history for key in ("loss", "train_loss") if key in entry]
    if not all(math.isfinite(loss) for loss in seen):
        raise TrainingError("the training loss became NaN or infinite; lower the learning rate")
    last: Metrics = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
    shown: Metrics = {key: last[key] for key in ("accuracy", "abs_logit", "log_ratio") if key in last}
    return {
        "steps": state.global_step,
        "rows": len(trainer.train_dataset),
        "loss": last.get("loss"),
        "loss_curve": curve,
        **shown,
    }


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end (the trainer's state is written last)."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, json.JSONDecodeError):
            shutil.rmtree(path, ignore_errors=True)
        else:
            return path
    return None


class _PlainLog(TrainerCallback):
    """One line per logged step for a log file; the Trainer's own bar serves a terminal."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs and not watched():
            extra = "".join(f", {key} {logs[key]:.3f}" for key in ("accuracy", "log_ratio") if key in logs)
            log.info("step %d of %d: loss %.4f%s", state.global_step, state.max_steps, float(logs["loss"]), extra)


def _callbacks() -> list[TrainerCallback]:
    return [_PlainLog()]


def _tell_dropped(given: int, kept: int, max_length: int) -> None:
    if kept < given:
        log.warning("left out %d of %d rows longer than max_length %d tokens", given - kept, given, max_length)
    if kept == 0:
        raise DataError(f"no row fits into max_length {max_length} tokens; raise training.max_length")

"""One trainer of policies for all losses of `dualign.training.pair_losses`; columns hold reference
log-probabilities, labels and anchors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dualign.core.artifacts import replacing
from dualign.core.errors import DataError, ModelError, ParamsError
from dualign.lm.batches import unpadded
from dualign.lm.models import save, with_lora
from dualign.lm.numerics import answer_log_probabilities
from dualign.lm.packing import attention_kept, enable_packing, packed_log_probabilities, packs, wide
from dualign.math import losses
from dualign.params.base import LoraParams
from dualign.params.training import LOSS_FIELDS, LossSpec, LossType, PairLossParams
from dualign.training.collating import PairCollator, stacked
from dualign.training.columns import id_column, table_of
from dualign.training.pair_losses import PAIR_LOSSES, PairBatch
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
class Pair:
    """One training pair: ids of prompt and both answers, reference columns, label, and anchors.

    `label` is P(first preferred). `anchors` are the targets of beta * log-ratio of both answers to
    the *anchor's* reference column, which is the same column here; NaN where there is none. `drawn`
    are the log-probabilities under the policy that drew the answers, NaN where none is known. KTO
    reads which of the two answers are `desirable` in place of the label, and `mismatched`, an
    answer to another prompt, with its reference column."""

    prompt: list[int]
    first: list[int]
    second: list[int]
    ref_first: float
    ref_second: float
    label: float = 1.0
    anchors: tuple[float, float] = (math.nan, math.nan)
    weights: tuple[float, float] | None = None
    drawn: tuple[float, float] = (math.nan, math.nan)
    desirable: tuple[bool, bool] = (True, False)
    mismatched: list[int] | None = None
    ref_mismatched: float = math.nan


@dataclass(frozen=True)
class PairLossConfig:
    """A pair loss: its type, scale a (beta of DPO and KTO, tau of IPO), the bound of the implicit
    rewards a h(y).

    `beta` is the KL weight of the anchor."""

    scale: float
    beta: float
    labels: str = "soft"
    anchor: float = 0.0
    nll: float = 0.0
    control: float = 0.0
    loss_type: LossType = "dpo"
    clip: float | None = None
    epsilon: float = 0.0
    gamma: float = 0.0

    @classmethod
    def of(cls, spec: LossSpec, scale: float, beta: float) -> PairLossConfig:
        """The loss that a run names."""
        return cls(scale, beta, **spec.model_dump(include=set(LOSS_FIELDS), exclude_none=True))

    @classmethod
    def lagrangian(cls, weights: PairLossParams, lam: float, beta: float) -> PairLossConfig:
        """The Lagrangian loss at a multiplier."""
        scale = beta * losses.lagrangian_scale(lam, weights.normalised)
        return cls(scale, beta, **weights.model_dump(exclude={"normalised"}))


def train_pairwise(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    pair_loss: PairLossConfig,
    job: Job,
) -> Metrics:
    """Train a policy on pairs; returns the loss curve and statistics of the last log line."""
    with attention_kept(model), noise_kept(model):
        return run(pairwise_trainer(model, tokenizer, pairs, pair_loss, job), job)


def fit_pairs(
    policy: Model,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    pair_loss: PairLossConfig,
    job: Job,
    lora: LoraParams,
    out: Path,
) -> Metrics:
    """Train a policy, or a new adapter on it where `lora` asks for one, and save it in `out`."""
    policy = with_lora(policy, lora, job.seed)
    metrics = train_pairwise(policy, tokenizer, pairs, pair_loss, job)
    with replacing(out) as folder:
        save(policy, tokenizer, folder)
    return metrics


def pairwise_trainer(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    pair_loss: PairLossConfig,
    job: Job,
) -> PairwiseTrainer:
    """The trainer of a pair loss on the pairs that fit into max_length. Raises DataError."""
    kept = fitting(pairs, job.training.max_length)
    if pair_loss.control > 0:
        _check_drawn(kept)
    row = PAIR_LOSSES[pair_loss.loss_type]
    weighted = "undesirable_weight" in row.options
    args = PairwiseConfig(
        **arguments(job) | {"optim": "adamw_torch_fused" if wide(model) else "adamw_torch"},
        beta=pair_loss.scale,
        max_length=None,
        # The base's is off already, see `without_dropout`; an adapter's is asked for.
        disable_dropout=False,
        labels=pair_loss.labels,
        anchor_weight=pair_loss.anchor,
        anchor_beta=pair_loss.beta,
        nll_weight=pair_loss.nll,
        nll_control=pair_loss.control,
        pair_loss=pair_loss.loss_type,
        reward_bound=pair_loss.clip,
        epsilon=pair_loss.epsilon,
        gamma=pair_loss.gamma,
        undesirable_weight=undesirable_weight(kept) if weighted else 1.0,
    )
    return PairwiseTrainer(
        without_dropout(model),
        args=args,
        train_dataset=pair_dataset(kept),
        processing_class=tokenizer,
    )


def _check_drawn(pairs: Sequence[Pair]) -> None:
    """A control variate needs to know who drew an answer: without, the loss would be NaN."""
    for number, pair in enumerate(pairs):
        if any(map(math.isnan, pair.drawn)):
            raise DataError(
                f"pair {number} has no `drawn`, the log-probabilities under the policy that drew"
                " its answers, which a control variate needs; give them, or set control to 0"
            )


def fitting(pairs: Sequence[Pair], max_length: int) -> list[Pair]:
    """The pairs of which every answer fits into `max_length` tokens with the prompt."""
    lengths = [
        len(p.prompt) + max(map(len, (p.first, p.second, p.mismatched or []))) for p in pairs
    ]
    return short_enough(pairs, lengths, max_length)


def undesirable_weight(pairs: Sequence[Pair]) -> float:
    """Desirable answers over undesirable ones: KTO's weight of the latter, which makes the two sums
    weigh the same.

    As in SACPO's safety step (2404.11049, its code). Raises DataError where one kind is missing."""
    flags = [flag for pair in pairs for flag in pair.desirable]
    desirable = sum(flags)
    if desirable in (0, len(flags)):
        kind = "desirable" if desirable else "undesirable"
        raise DataError(
            f"kto: every answer is {kind}; it needs both kinds, so add such pairs or set loss_type"
            " to dpo"
        )
    return desirable / (len(flags) - desirable)


def pair_dataset(pairs: Sequence[Pair]) -> Dataset:
    """Pairs as the tokenised columns that `PairwiseTrainer` reads."""
    columns = _columns(pairs)
    if all(pair.mismatched is not None for pair in pairs):
        columns["mismatched_ids"] = id_column(pair.mismatched or [] for pair in pairs)
        columns["ref_mismatched_logps"] = [pair.ref_mismatched for pair in pairs]
    return table_of(columns)


def _columns(pairs: Sequence[Pair]) -> dict[str, Any]:
    return {
        "prompt_ids": id_column(p.prompt for p in pairs),
        "chosen_ids": id_column(p.first for p in pairs),
        "rejected_ids": id_column(p.second for p in pairs),
        "ref_chosen_logps": [p.ref_first for p in pairs],
        "ref_rejected_logps": [p.ref_second for p in pairs],
        "label": [p.label for p in pairs],
        "anchor_chosen": [p.anchors[0] for p in pairs],
        "anchor_rejected": [p.anchors[1] for p in pairs],
        "weight_chosen": [p.label if p.weights is None else p.weights[0] for p in pairs],
        "weight_rejected": [1 - p.label if p.weights is None else p.weights[1] for p in pairs],
        "drawn_chosen": [p.drawn[0] for p in pairs],
        "drawn_rejected": [p.drawn[1] for p in pairs],
        "desirable_chosen": [p.desirable[0] for p in pairs],
        "desirable_rejected": [p.desirable[1] for p in pairs],
    }


@dataclass
class PairwiseConfig(DPOConfig):
    """DPOConfig with a label mode, an anchor, a light NLL term, and the losses of `PAIR_LOSSES`.
    `beta` is the scale a of the logit.

    Raises ParamsError for a value that no loss here reads: an option of TRL's own losses, a term of
    another loss."""

    labels: str = field(
        default="soft",
        metadata={
            "help": "soft: use P(chosen preferred) as it is; bernoulli: draw afresh each time."
        },
    )
    anchor_weight: float = field(
        default=0.0, metadata={"help": "Weight of the anchor to the soft value."}
    )
    anchor_beta: float = field(default=1.0, metadata={"help": "KL weight beta inside the anchor."})
    nll_weight: float = field(
        default=0.0, metadata={"help": "Weight of the importance-weighted -log pi."}
    )
    nll_control: float = field(
        default=0.0, metadata={"help": "Share of the control variate of the NLL term, 0 to 1."}
    )
    precompute_ref_log_probs: bool = field(
        default=True, metadata={"help": "Always true: references are columns."}
    )
    pair_loss: LossType = field(
        default="dpo",
        metadata={"help": "A key of `PAIR_LOSSES` (`loss_type` holds TRL's own losses)."},
    )
    reward_bound: float | None = field(
        default=None, metadata={"help": "Soft bound of the implicit rewards, or none."}
    )
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "KTO's weight of an undesirable answer."}
    )
    epsilon: float = field(
        default=0.0, metadata={"help": "Share of labels that robust DPO expects to be wrong."}
    )
    gamma: float = field(default=0.0, metadata={"help": "SimPO's target margin of the logit."})
    packed: bool | None = field(
        default=None,
        metadata={"help": "Read pairs without padding, their prompt once; none: where it pays."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, default in _trl_defaults().items():
            if getattr(self, name) != default:
                raise ParamsError(
                    f"PairwiseConfig: {name} belongs to TRL's own losses and is not read here;"
                    f" leave it at {default!r}; the losses of PairwiseTrainer are chosen by"
                    " pair_loss and labels"
                )
        for name, valid in (("pair_loss", PAIR_LOSSES), ("labels", ("soft", "bernoulli"))):
            if getattr(self, name) not in valid:
                raise ParamsError(
                    f"PairwiseConfig: {name} {getattr(self, name)!r} is not one of"
                    f" {', '.join(valid)}"
                )
        _check_numbers(self)
        _check_options(self)


def _check_numbers(args: PairwiseConfig) -> None:
    """Refuse weights and bounds outside their range."""
    for name in ("anchor_weight", "nll_weight", "gamma"):
        if not getattr(args, name) >= 0:
            raise ParamsError(
                f"PairwiseConfig: {name} {getattr(args, name)} must be 0 (no such term) or more"
            )
    if not 0 <= args.nll_control <= 1:
        raise ParamsError(
            f"PairwiseConfig: nll_control {args.nll_control} must be between 0 (none) and 1"
        )
    if args.nll_control > 0 and args.nll_weight == 0:
        raise ParamsError(
            f"PairwiseConfig: nll_control {args.nll_control} steadies the NLL term, whose"
            " nll_weight is 0; leave it at 0, or set nll_weight above 0"
        )
    if not 0 <= args.epsilon < 0.5:
        raise ParamsError(
            f"PairwiseConfig: epsilon {args.epsilon} must be 0 or more and below 0.5, where labels"
            " say nothing"
        )
    if args.reward_bound is not None and not args.reward_bound > 0:
        raise ParamsError(
            f"PairwiseConfig: reward_bound {args.reward_bound} must be above 0, or None for no"
            " bound"
        )


def _check_options(args: PairwiseConfig) -> None:
    """Refuse options of other losses than the chosen one."""
    own = PAIR_LOSSES[args.pair_loss].options
    every = dict.fromkeys(name for loss in PAIR_LOSSES.values() for name in loss.options)
    defaults = {f.name: f.default for f in fields(PairwiseConfig)}
    for name in every:
        if name not in own and getattr(args, name) != defaults[name]:
            remedy = f"leave it at {defaults[name]!r}, or choose another pair_loss"
            raise ParamsError(
                f"PairwiseConfig: {name} does not go with pair_loss {args.pair_loss!r}; {remedy}"
            )


def _trl_defaults() -> dict[str, Any]:
    """Options of TRL's own losses, which nothing here reads, and their defaults."""
    names = (
        "loss_type",
        "loss_weights",
        "label_smoothing",
        "use_weighting",
        "ld_alpha",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "discopop_tau",
    )
    known = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(DPOConfig)
    }
    return {name: known[name] for name in names}


_EXTRA = (
    "label",
    "anchor_chosen",
    "anchor_rejected",
    "weight_chosen",
    "weight_rejected",
    "drawn_chosen",
    "drawn_rejected",
    *(name for loss in PAIR_LOSSES.values() for name in loss.columns if name != "mismatched_ids"),
)


@dataclass
class _PairwiseCollator(PairCollator):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        batch |= stacked(examples, _EXTRA)
        if "mismatched_ids" in examples[0]:
            batch["mismatched"] = self._mismatched(examples)
        return batch

    def _mismatched(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Prompts with their mismatched answers: ids and masks as of a batch, a row an example.

        The parent stacks first and second answers; the second half is left empty and cut off."""
        rows = [
            {**example, "chosen_ids": example["mismatched_ids"], "rejected_ids": []}
            for example in examples
        ]
        return {
            name: tensor[: len(examples)]
            for name, tensor in super().torch_call(rows).items()
            if name in ("input_ids", "attention_mask", "completion_mask")
        }


def _prompts_and_answers(inputs: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """ids of the prompt and of the answer in every row of a padded batch."""
    answered = inputs["completion_mask"].bool()
    asked = inputs["attention_mask"].bool() & ~answered
    return unpadded(inputs["input_ids"], asked), unpadded(inputs["input_ids"], answered)


def _check_columns(columns: Sequence[str], args: PairwiseConfig, table: str) -> None:
    """Refuse a table without a column that `args` ask for; a stream that knows none passes."""
    needed: dict[str, str] = {}
    if args.anchor_weight > 0:
        needed |= dict.fromkeys(("anchor_chosen", "anchor_rejected"), "or set anchor_weight to 0")
    if args.nll_control > 0:
        needed |= dict.fromkeys(("drawn_chosen", "drawn_rejected"), "or set nll_control to 0")
    needed |= dict.fromkeys(PAIR_LOSSES[args.pair_loss].columns, "or choose another pair_loss")
    # Computed, or taken from the label, where both are missing.
    for pair in (("ref_chosen_logps", "ref_rejected_logps"), ("weight_chosen", "weight_rejected")):
        if any(name in columns for name in pair):
            needed |= dict.fromkeys(pair, f"or leave out both {' and '.join(pair)}")
    for name, remedy in needed.items():
        if columns and name not in columns:
            raise DataError(f"PairwiseTrainer: {table} has no column {name}; add it, {remedy}")


class PairwiseTrainer(Shared, DPOTrainer):
    """The losses of `PAIR_LOSSES` on reference columns; DPO with soft labels, anchors and NLL; see
    `dualign.math.losses`.

    Takes a data set as `trl.DPOTrainer` does, and reads these columns beside TRL's own:
    ref_chosen_logps and ref_rejected_logps (computed once under `ref_model`, or the model as it is
    passed, where they are missing), label (P(chosen preferred), default 1), anchor_chosen,
    anchor_rejected (default none), weight_chosen, weight_rejected (of the likelihood term, default
    label and 1 - label), drawn_chosen, drawn_rejected (log-probabilities under the policy that drew
    the answers, for nll_control). KTO requires desirable_chosen, desirable_rejected, mismatched_ids
    and ref_mismatched_logps, the anchor and nll_control their two columns. Raises ParamsError for
    other args than a `PairwiseConfig`, DataError for a table that lacks a column."""

    _signature_columns: list[str]
    data_collator: Any

    def __init__(
        self,
        model: str | Model,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            raise ParamsError(
                "PairwiseTrainer: args is missing; pass PairwiseConfig(output_dir=..., beta=...)"
            )
        if not isinstance(args, PairwiseConfig) or not args.precompute_ref_log_probs:
            raise ParamsError(
                "PairwiseTrainer: args must be a PairwiseConfig with precompute_ref_log_probs=True,"
                " since its losses read reference log-probabilities from columns"
            )
        for name in ("train_dataset", "eval_dataset"):
            given = kwargs.get(name)
            for table in given.values() if isinstance(given, dict) else [given]:
                _check_columns(getattr(table, "column_names", None) or [], args, name)
        super().__init__(model, ref_model, args=args, **kwargs)
        if type(self.data_collator) is DataCollatorForPreference:
            self.data_collator = _PairwiseCollator(**vars(self.data_collator))
        self._drawn = (-1, 0)  # step and part of the last draw of labels
        self._packed = self._can_pack()

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
        missing = [
            name for name in (*_EXTRA, "mismatched_ids") if name not in self._signature_columns
        ]
        self._signature_columns = [*self._signature_columns, *missing]

    def compute_loss(
        self,
        model: Model,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        logps = self._policy_logps(model, inputs)
        first, second = logps.chunk(2)
        ratio_first = first - inputs["ref_chosen_logps"]
        ratio_second = second - inputs["ref_rejected_logps"]
        bounded = self._bounded(ratio_first), self._bounded(ratio_second)
        zero = torch.zeros_like(first)
        logit = losses.pairwise_logit(*bounded, zero, zero, self.args.beta)
        label = self._label(inputs, logit)
        point = partial(self._reference_point, model, inputs)
        batch = PairBatch(*bounded, logit, label, (first, second), inputs, self.args, point)
        counted = inputs.get(COUNTED)
        loss = self.part(PAIR_LOSSES[self.args.pair_loss].loss(batch), inputs)
        if self.args.anchor_weight > 0:
            loss = loss + self.args.anchor_weight * self._anchor(inputs, ratio_first, ratio_second)
        if self.args.nll_weight > 0:
            terms = losses.weighted_nll(logps, self._weight(inputs, logps, label))
            loss = loss + self.args.nll_weight * self.part(terms, inputs)
        self._record(logit, label, torch.cat([ratio_first, ratio_second]), counted)
        return (loss, {}) if return_outputs else loss

    def _policy_logps(self, model: Model, inputs: dict[str, Any]) -> Tensor:
        """Summed log-probabilities of [all first answers, all second answers]."""
        if self._packed:
            return packed_log_probabilities(model, *_prompts_and_answers(inputs))
        ids = inputs["input_ids"]
        mask = inputs["attention_mask"]
        labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)
        return answer_log_probabilities(model, ids, mask, labels)

    def _can_pack(self) -> bool:
        """Whether batches are packed. Raises ModelError where that was asked for and cannot be."""
        asked: bool | None = self.args.packed
        if asked is None:
            return packs(self.model)
        if asked and not enable_packing(self.model):
            raise ModelError(
                f"{type(self.model).__name__} cannot read packed pairs; set packed to None"
            )
        return asked

    def _bounded(self, ratio: Tensor) -> Tensor:
        """Log-ratios h whose implicit rewards a h are clipped softly; the anchor keeps its own."""
        scale = self.args.beta
        bound = self.args.reward_bound
        return ratio if bound is None else losses.soft_clip(scale * ratio, bound) / scale

    def _reference_point(self, model: Model, inputs: dict[str, Any]) -> Tensor:
        """KTO's z = max(0, KL(pi || reference)) in nats: the mean log-ratio of mismatched answers,
        over all processes.

        Each part of an accumulated batch has its own z, as in TRL's KTO."""
        with torch.no_grad():
            logps = self._policy_logps(model, inputs["mismatched"])
            ratios = self._bounded(logps - inputs["ref_mismatched_logps"])
            mean = self.mean(ratios, inputs.get(COUNTED))
        point: Tensor = self.accelerator.gather(mean).mean().clamp(min=0)
        return point

    def _label(self, inputs: dict[str, Any], logit: Tensor) -> Tensor:
        label: Tensor = inputs.get("label", torch.ones_like(logit)).to(logit.dtype)
        if self.args.labels == "soft" or not self.model.training:
            return label
        # Seeded by the step, so that a resumed run draws the labels that an uninterrupted one would
        # have drawn; the parts of a step, on all devices, take successive draws.
        step = self.state.global_step
        self._drawn = (step, self._drawn[1] + 1 if self._drawn[0] == step else 0)
        part = self._drawn[1] * self.accelerator.num_processes + self.accelerator.process_index
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        draws = [torch.bernoulli(label.cpu(), generator=generator) for _ in range(part + 1)]
        return draws[-1].to(logit.device)

    def known(self, batch: dict[str, Any]) -> Tensor | None:
        """Which answers have an anchor, [answers]."""
        if self.args.anchor_weight == 0:
            return None
        return ~torch.cat([batch["anchor_chosen"], batch["anchor_rejected"]]).isnan()

    def _anchor(self, inputs: dict[str, Any], ratio_first: Tensor, ratio_second: Tensor) -> Tensor:
        targets = torch.cat([inputs["anchor_chosen"], inputs["anchor_rejected"]]).to(
            ratio_first.dtype
        )
        ratios = torch.cat([ratio_first, ratio_second])
        # NaN would pass through the mask into the gradient.
        terms = losses.anchor_loss(ratios, targets.nan_to_num(), self.args.anchor_beta)
        return self.part(terms, inputs, self.known(inputs))

    def _weight(self, inputs: dict[str, Any], logps: Tensor, label: Tensor) -> Tensor:
        """Of the likelihood term, [answers]."""
        both = inputs.get("weight_chosen", label), inputs.get("weight_rejected", 1 - label)
        weight = torch.cat(both).to(logps.dtype)
        if self.args.nll_control == 0:
            return weight
        drawn = torch.cat([inputs["drawn_chosen"], inputs["drawn_rejected"]]).to(logps.dtype)
        return losses.controlled_weight(weight, logps, drawn, self.args.nll_control)

    def _record(self, logit: Tensor, label: Tensor, ratios: Tensor, counted: Tensor | None) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        with torch.no_grad():
            right = ((logit > 0) == (label > 0.5)).float()
            shown = {"accuracy": right, "abs_logit": logit.abs(), "log_ratio": ratios}
            means = self.told(*(self.mean(values, counted) for values in shown.values()))
        for name, mean in zip(shown, means, strict=True):
            metrics[name].append(mean)

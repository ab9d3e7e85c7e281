"""What all training runs share: the job, TRL's arguments, checkpoints, the log.

All runs keep checkpoints in a scratch folder and go on from the last whole one."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, TrainerState

from dualign.core import ranks
from dualign.core.artifacts import faults_told, read_json, write_json
from dualign.core.errors import DataError, ParamsError, TrainingError
from dualign.lm.loading import check_context, not_finite
from dualign.lm.models import is_sharded
from dualign.lm.numerics import device_of, precision_of, without_adapter
from dualign.params.base import Resources, TrainingParams
from dualign.training.checkpoints import Sealing, last_checkpoint
from dualign.training.metering import Meter, Telling, tell_whole
from dualign.training.muon import muon
from dualign.training.sharding import fsdp_arguments

log = logging.getLogger(__name__)

Model: TypeAlias = PreTrainedModel | PeftModel
Metrics: TypeAlias = dict[str, Any]
T = TypeVar("T")
#: Attributes of modules that hold a rate of dropout, or of the noise of a router, beside those of
#: `torch.nn.Dropout`: Llama's attention_dropout, OPT's dropout and layerdrop.
_NOISE = re.compile("drop|jitter")
#: The param that says how long a training's rows are.
_LENGTH = "training.max_length (of the stage's own section, where it stands there)"


@dataclass(frozen=True)
class Job:
    """What a training needs besides model and data. `scratch` holds its checkpoints, logs say
    `name`."""

    training: TrainingParams
    resources: Resources
    scratch: Path
    seed: int
    name: str = "training"


def arguments(job: Job) -> dict[str, Any]:
    """TRL's arguments. All processes share `batch_size`; ParamsError where they cannot."""
    training = job.training
    resources = job.resources
    micro = micro_batch(job)
    bf16 = precision_of(resources) is torch.bfloat16
    on_cpu = device_of(resources).type == "cpu"
    return {
        "output_dir": str(job.scratch),
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": training.batch_size // (micro * ranks.world()),
        "learning_rate": training.learning_rate,
        "warmup_steps": training.warmup,
        # transformers' own "constant" leaves the warm-up out.
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(
            training.schedule, training.schedule
        ),
        "weight_decay": training.weight_decay,
        "adam_beta2": training.adam_beta2,
        "seed": job.seed,
        "data_seed": job.seed,
        "bf16": bf16,
        "use_cpu": on_cpu,
        "gradient_checkpointing": resources.gradient_checkpointing,
        "logging_steps": resources.log_steps,
        # A filter would show the mean in place of a loss that is not finite.
        "logging_nan_inf_filter": False,
        "save_steps": resources.checkpoint_steps,
        "report_to": "none",
        "disable_tqdm": True,  # `Telling` has a bar of its own
        "dataloader_pin_memory": not on_cpu,
        "optim": "adamw_torch",
        "ddp_find_unused_parameters": False,
        **(fsdp_arguments() if is_sharded(resources) else {}),
    }


def micro_batch(job: Job) -> int:
    """Rows of one process in one forward pass. Raises ParamsError where a batch is no multiple."""
    batch = job.training.batch_size
    processes = ranks.world()
    share = batch // processes
    micro = min(job.resources.micro_batch_size or share, share)
    if share == 0 or batch % (micro * processes):
        several = f" times {processes} processes" if processes > 1 else ""
        raise ParamsError(
            f"batch_size {batch} must be a multiple of resources.micro_batch_size"
            f" {max(micro, 1)}{several}"
        )
    return micro


def run(trainer: Any, job: Job) -> Metrics:
    """Train, from the last whole checkpoint if there is one; refuse a loss that is not finite, and
    weights that are not after the last step, of which no loss tells.
    """
    check_context(trainer.model, job.training.max_length, _LENGTH)
    _check_checkpointing(trainer.model, job.resources)
    if ranks.world() > 1:
        set_seed(job.seed, device_specific=True)  # or all would drop out the same
    trainer.remove_callback(PrinterCallback)  # prints a dict per logged step beside our line
    trainer.add_callback(Sealing())
    trainer.meter = Meter(trainer.model)
    trainer.add_callback(Telling(job.name, trainer.meter))
    if job.training.optimiser == "muon":
        trainer.optimizer_cls_and_kwargs = (lambda: muon, _of_muon(trainer))
    checkpoint = last_checkpoint(job.scratch)
    if checkpoint is not None:
        log.info("resuming from %s", checkpoint)
    saved = (
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    )
    # One that had ended would take a step more by train().
    if saved is not None and saved.global_step >= saved.max_steps:
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = saved
    else:
        with faults_told(lambda told, _: _unwritten(job.scratch, told)):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        tell_whole(job.name, trainer.meter)
    trainer.give_back()
    _drop_copy(trainer.model)
    state: TrainerState = trainer.state
    if state.max_steps == 1 and job.training.warmup > 0:
        log.warning(
            "%s: its one step is of the warm-up, which begins at a learning rate of 0, so nothing"
            " is learnt; set training.warmup to 0, or train for more steps",
            job.name,
        )
    losses = [
        {"step": entry["step"], "loss": entry["loss"]}
        for entry in state.log_history
        if "loss" in entry
    ]
    seen = [
        entry[key] for entry in state.log_history for key in ("loss", "train_loss") if key in entry
    ]
    if not all(math.isfinite(loss) for loss in seen):
        raise TrainingError("the training loss became NaN or infinite; lower the learning rate")
    if bad := not_finite(trainer.whole):
        raise TrainingError(
            f"the last step left weights NaN or infinite ({len(bad)} tensors, {bad[0]} the first);"
            " lower the learning rate"
        )
    last: Metrics = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
    shown: Metrics = {
        key: last[key] for key in ("accuracy", "abs_logit", "log_ratio") if key in last
    }
    return {
        "steps": state.global_step,
        "rows": len(trainer.train_dataset),
        "loss": last.get("loss"),
        "losses": losses,
        **shown,
    }


def _of_muon(trainer: Any) -> dict[str, Any]:
    """The options of `muon` that TRL's arguments hold."""
    args = trainer.args
    return {
        "decayed": trainer.get_decay_parameter_names(trainer.model),
        "decay": args.weight_decay,
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "fused": args.optim == "adamw_torch_fused" or None,
    }


def _check_checkpointing(model: Model, resources: Resources) -> None:
    """Refuse to compute activations anew of an architecture that transformers cannot do it for."""
    kind = type(without_adapter(model))
    if resources.gradient_checkpointing and not kind.supports_gradient_checkpointing:
        raise ParamsError(
            f"resources.gradient_checkpointing: {kind.__name__} has none; set it to false, and"
            " resources.micro_batch_size lower where memory is short"
        )


def trained_once(file: Path, train: Callable[[], Metrics]) -> Metrics:
    """The metrics in a training's file; without one it is done, and they are written there."""
    if not file.is_file():
        write_json(file, train())
    metrics: Metrics = read_json(file)
    return metrics


def _unwritten(scratch: Path, told: str) -> TrainingError:
    """What is said of a checkpoint that cannot be written; the ones before it stay."""
    return TrainingError(
        f"{scratch}: a checkpoint cannot be written ({told}); free space there, name another place"
        " in $DUALIGN_SCRATCH, or raise resources.checkpoint_steps, and run the stage again: it"
        " goes on"
    )


def without_dropout(model: Model) -> Model:
    """The model without the dropout of its base, which pairs and scores do not want, nor its other
    noise; an adapter's own is kept. `noise_kept` gives its configuration the rates back.
    """
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():
            if isinstance(value, float) and _NOISE.search(key):
                setattr(module, key, 0.0)
    for config, key, _ in _rates(model):
        setattr(config, key, 0.0)
    return model


@contextmanager
def noise_kept(model: Model) -> Iterator[None]:
    """What the configuration, which is saved with the policy, says of noise stays as it was."""
    before = _rates(model)
    try:
        yield
    finally:
        for config, key, rate in before:
            setattr(config, key, rate)


def _rates(model: Model) -> list[tuple[Any, str, float]]:
    """Rates of noise in a configuration, where Falcon, Persimmon and GPT-Neo read them at work."""
    configs = (model.config, model.config.get_text_config())
    values = ((config, *item) for config in configs for item in vars(config).items())
    return [row for row in values if isinstance(row[2], float) and _NOISE.search(row[1])]


def _drop_copy(model: Model) -> None:
    """Remove TRL's copy of an adapter, its reference, which would be saved beside it."""
    if isinstance(model, PeftModel) and "ref" in model.peft_config:
        model.delete_adapter("ref")


def short_enough(rows: Sequence[T], lengths: Iterable[int], max_length: int) -> list[T]:
    """The rows of at most `max_length` tokens; tells of the others. Raises DataError if none is."""
    measured = zip(rows, lengths, strict=True)
    kept = [row for row, length in measured if length <= max_length]
    left_out = len(rows) - len(kept)
    if left_out:
        what = "left out %d of %d rows longer than max_length %d tokens"
        log.warning(what, left_out, len(rows), max_length)
    if not kept:
        raise DataError(f"no row fits into max_length {max_length} tokens; raise {_LENGTH}")
    return kept

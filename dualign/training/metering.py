"""What a training reads and takes: real tokens, model FLOP, rates, and the line that tells them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dualign.core import ranks, reporting, work
from dualign.core.progress import EVERY, watched
from dualign.core.units import duration
from dualign.core.work import Work
from dualign.lm.flops import Tokens, size_of, training_flop

log = logging.getLogger(__name__)

#: Label of a token that the loss leaves out.
IGNORED = -100
#: What a line tells of a log, where it is there, and by how many digits.
_SHOWN = {"loss": 4, "accuracy": 3, "log_ratio": 3, "lambda": 3, "cost": 3, "reward": 3, "kl": 3}


class Meter:
    """Counts the rows of this process on its device, so that counting waits for no GPU.

    `model` is what is trained, as it is when the training begins."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._size = size_of(model)
        self._tally = torch.zeros(3, dtype=torch.float64)
        self._told = self._tally
        self._began = self._told_at = time.monotonic()

    def count(self, read: Tensor, answers: Tensor | None) -> None:
        """A part of a batch: masks [rows, positions] of tokens read, and of those scored."""
        lengths = read.sum(1).double()
        scored = lengths.new_zeros(()) if answers is None else answers.sum().double()
        own = torch.stack([lengths.sum(), scored, (lengths * lengths).sum()])
        self._tally = self._tally.to(own.device) + own

    def recent(self) -> Work:
        """What was done since this was last asked; others are taken to have done as much."""
        now = time.monotonic()
        new = ranks.world() * (self._tally - self._told.to(self._tally.device))
        found = self._work(Tokens(*new.tolist()), now - self._told_at)
        self._told, self._told_at = self._tally, now
        return found

    def whole(self) -> Work:
        """What all processes have done since the beginning; all must ask."""
        parts = ranks.gathered([self._tally.tolist()])
        tokens = sum((Tokens(*part) for part in parts), Tokens())
        return self._work(tokens, time.monotonic() - self._began)

    def _work(self, tokens: Tokens, seconds: float) -> Work:
        return Work(tokens.read, training_flop(self._size, tokens), max(seconds, 1e-9))


class Metered:
    """A base of trainers that tell their `meter`, if they have one, what they train on."""

    meter: Meter | None = None

    def measure(self, batch: Mapping[str, Any]) -> None:
        """Count a part of a batch, by its masks."""
        if self.meter is None:
            return
        answers = batch.get("completion_mask")
        if answers is None and "labels" in batch:
            answers = batch["labels"] != IGNORED
        self.meter.count(batch["attention_mask"], answers)


class Telling(TrainerCallback):
    """Tells how far a training is: in a log a line at every logged step, and one where the last was
    long ago; on a terminal the same beside a bar; to trackers the numbers."""

    def __init__(self, name: str, meter: Meter) -> None:
        self._name = name
        self._meter = meter
        self._bar: tqdm | None = None
        self._began = self._last = 0.0
        self._first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = self._last = time.monotonic()
        self._first = state.global_step
        if watched() and state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=self._first, desc=self._name, leave=False
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        if not control.should_log and time.monotonic() - self._last >= EVERY:
            self._tell(state, {}, self._meter.recent())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        done = self._meter.recent()
        self._tell(state, logs, done)
        memory = {"memory_gib": work.peak_memory()}
        told = {**logs, **done.rates(work.peak()), **memory}
        reporting.report(told, state.global_step, self._name.replace(" ", "_"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def _tell(self, state: TrainerState, logs: Mapping[str, float], done: Work) -> None:
        self._last = time.monotonic()
        shown = [key for key in _SHOWN if key in logs and not (key == "loss" and "lambda" in logs)]
        words = [f"{key} {float(logs[key]):.{_SHOWN[key]}f}" for key in shown]
        words.append(done.told(work.peak()))
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(words))
            return
        each = (self._last - self._began) / max(state.global_step - self._first, 1)
        words.append(f"{duration(each * (state.max_steps - state.global_step))} left")
        step = f"{self._name}: step {state.global_step} of {state.max_steps}"
        log.info("%s: %s", step, ", ".join(words))


def tell_whole(name: str, meter: Meter) -> None:
    """Log what a training that has ended took, and keep it for the provenance."""
    done = meter.whole()
    work.record(name, done)
    log.info(
        "%s: %.0f tokens in %s, %s, peak memory %.1f GiB",
        name,
        done.tokens,
        duration(done.seconds),
        done.told(work.peak()),
        work.peak_memory(),
    )

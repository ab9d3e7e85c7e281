"""Batches that are split over processes: the loss is that of one process that has the whole batch.

accelerate gives every process as many rows; where an epoch does not come out even, some come twice.
They are marked here and count for nothing. Sums over the rows of a step are divided by what all
processes have, and multiplied by their number, since gradients are averaged over them; and so they
are over the parts of a step, its micro-batches, of which the last may be a smaller one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dualign.training.metering import Metered
from dualign.training.sharding import Sharding

#: Of a batch of which not every row counts: which do; bool [rows].
COUNTED = "counted"


def pairs_in(batch: Mapping[str, Any]) -> int:
    """Pairs of a part of a batch, whose first answers lie before all second ones."""
    return len(batch["attention_mask"]) // 2


def among_counted(known: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Of a mask of answers those of rows that count; [answers], first ones before second ones."""
    return known & batch[COUNTED].repeat(2) if COUNTED in batch else known


class Shared(Metered, Sharding):
    """A base of trainers whose losses are means over the rows of all processes.

    It counts operations by its meter: transformers' own count took a walk through all weights at
    every step."""

    accelerator: Any
    args: Any
    train_dataset: Any
    _totals: tuple[float, float] | None = None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The parts of a step, and its tokens where the loss is divided by them; see `Trainer`."""
        parent: Any = super()
        batches, items = parent.get_batch_samples(epoch_iterator, num_batches, device)
        counted = self._counted_rows()
        if batches and counted is not None and self.accelerator.gradient_state.end_of_dataloader:
            self.leave_out(batches[-1], ~counted.to(device))
            items = parent._get_num_items_in_batch(batches, device)
        for batch in batches:
            self.measure(batch)
        self._totals = self._counted(batches, device) if len(batches) > 1 else None
        return batches, items

    def leave_out(self, batch: dict[str, Any], rows: Tensor) -> None:
        """Mark rows of a batch, bool [rows], as none of this process's."""
        batch[COUNTED] = ~rows

    def known(self, batch: dict[str, Any]) -> Tensor | None:
        """Which answers of a part of a batch its second term has a target for, if it has one; those
        of rows that do not count may be among them."""
        return None

    def _counted(
        self, batches: Sequence[dict[str, Any]], device: torch.device
    ) -> tuple[float, float]:
        """Rows that count in an average part of a step, and answers that `known` tells."""
        rows = [batch[COUNTED].sum() if COUNTED in batch else pairs_in(batch) for batch in batches]
        known = [
            among_counted(mask, batch).sum()
            for batch in batches
            if (mask := self.known(batch)) is not None
        ]
        totals = torch.tensor([float(sum(rows)), float(sum(known))], device=device)
        everywhere = self.accelerator.reduce(totals, "mean") / len(batches)
        return float(everywhere[0]), float(everywhere[1])

    def part(self, values: Tensor, batch: dict[str, Any], known: Tensor | None = None) -> Tensor:
        """What a part of a step adds to its mean, times the number of parts and of processes: of
        values [rows, or answers], those that count or, with `known`, those that this says."""
        known = known if known is None else among_counted(known, batch)
        if self._totals is None or not self.model.training:  # an evaluation has no parts
            return self.mean(values, batch.get(COUNTED) if known is None else known)
        rows, answers = self._totals
        if known is not None:
            return values[known].sum() / max(answers, 1e-9)
        each = len(values) // pairs_in(batch)
        counted = batch.get(COUNTED)
        kept = values if counted is None else values[counted.repeat(each)]
        return kept.sum() / (each * rows)

    def mean(self, values: Tensor, counted: Tensor | None = None) -> Tensor:
        """The part of this process in the mean over the rows of all, times their number; 0 where
        none counts. `counted` is a mask of the rows that do, of `values` [rows, or answers]."""
        if counted is None:
            return values.mean()
        kept = values[counted.repeat(len(values) // len(counted))]
        if self.accelerator.num_processes == 1:
            return kept.mean() if len(kept) else kept.sum()
        rows = torch.tensor(float(len(kept)), device=kept.device)
        everywhere = self.accelerator.reduce(rows, "mean")
        return kept.sum() / everywhere.clamp(min=1 / self.accelerator.num_processes)

    def told(self, *means: Tensor) -> list[float]:
        """Means as `mean` gives them, over all processes."""
        found = torch.stack(list(means)).detach()
        everywhere: list[float] = self.accelerator.reduce(found, "mean").tolist()
        return everywhere

    def _counted_rows(self) -> Tensor | None:
        """Rows of this process's last batch that none had before; None where they come out even."""
        processes = self.accelerator.num_processes
        size = self.args.per_device_train_batch_size
        left = len(self.train_dataset) % (size * processes)
        if processes == 1 or left == 0:
            return None
        place = self.accelerator.process_index * size + torch.arange(size)
        return place < left

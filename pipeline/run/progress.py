"""How far a running stage is, read from the lines that it logs."""

from __future__ import annotations

import re
from dataclasses import dataclass

# dualign/training/metering.py and dualign/core/progress.py write these lines.
_STEP = re.compile(r"(?P<what>[^:]{1,80}: step) (?P<done>\d+) of (?P<total>\d+): (?P<rest>.*)")
_ROWS = re.compile(r"(?P<what>[^:]{1,80}): (?P<done>\d+) of (?P<total>\d+), (?P<rest>.*)")


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps or rows; `detail` is the rest of the line: loss, rate, time left."""

    what: str
    done: int
    total: int
    detail: str

    @property
    def percent(self) -> float:
        return 100.0 * min(self.done / self.total, 1.0) if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.what} {self.done} of {self.total}: {self.detail}"


def read_progress(line: str) -> Progress | None:
    """The progress that a line tells; None where it tells none."""
    match = _STEP.fullmatch(line) or _ROWS.fullmatch(line)
    if match is None:
        return None
    groups = match.groupdict()
    return Progress(groups["what"], int(groups["done"]), int(groups["total"]), groups["rest"])

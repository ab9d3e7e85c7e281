"""How far a running stage is, read from the lines that it logs."""

from __future__ import annotations

import re
from dataclasses import dataclass

# dualign/training/metering.py and dualign/core/progress.py write these lines.
_REST = r"(?P<detail>.*), (?P<left>[^,]*) left"
_STEP = re.compile(r"(?P<what>[^:]{1,80}: step) (?P<done>\d+) of (?P<total>\d+): " + _REST)
_ROWS = re.compile(r"(?P<what>[^:]{1,80}): (?P<done>\d+) of (?P<total>\d+), " + _REST)


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps or rows; `detail` is the rest of the line: loss, rates; `left` is the
    time left, as the line has it.
    """

    what: str
    done: int
    total: int
    detail: str
    left: str

    @property
    def percent(self) -> float:
        return 100.0 * min(self.done / self.total, 1.0) if self.total else 0.0

    def __str__(self) -> str:
        """The time left first: a card has room for sixty characters."""
        return f"{self.left} left, {self.what} {self.done} of {self.total}, {self.detail}"


def read_progress(line: str) -> Progress | None:
    """The progress that a line tells; None where it tells none."""
    match = _STEP.fullmatch(line) or _ROWS.fullmatch(line)
    if match is None:
        return None
    told = match.groupdict()
    what = told["what"].replace(": ", " ")
    return Progress(what, int(told["done"]), int(told["total"]), told["detail"], told["left"])

"""The process that trackers live in: reads what a stage reports, line by line, until it ends.

    python -m dualign.tracking.process < lines of JSON

The first line says which trackers, the second which run, further ones hold numbers, and the last
how it ended (`dualign.core.reporting.Reporter`). Each tracker has a thread of its own, so that none
waits for another. A fault of a tracker is one line on standard output, and ends it alone."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TextIO

from dualign.core.reporting import PATIENCE
from dualign.tracking.adapters import ADAPTERS, TrackedRun, Tracker, first_line, prepare

#: Exit status of a stage that ended without a word.
_KILLED = 1


class Line:
    """One tracker, its calls one after the other; after a fault there are no more."""

    def __init__(self, name: str, tell: Callable[[str], None]) -> None:
        self._name = name
        self._tell = tell
        self._tracker: Tracker | None = None
        self._thread = ThreadPoolExecutor(1)
        self._call(importlib.import_module, name)  # while the stage does something else

    def begin(self, run: TrackedRun) -> None:
        """What is reported from now on is of this run."""
        self._call(self._begin, run)

    def report(self, message: dict[str, Any]) -> None:
        """Numbers, once those before are done."""
        self._call(self._told, lambda tracker: tracker.log(**message))

    def end(self, status: int) -> Future[None]:
        """Close the run, once all is done."""
        return self._call(self._told, lambda tracker: tracker.end(status))

    def _begin(self, run: TrackedRun) -> None:
        self._tracker = ADAPTERS[self._name](run)

    def _told(self, call: Callable[[Tracker], None]) -> None:
        if self._tracker is not None:
            call(self._tracker)

    def _call(self, call: Callable[..., object], *arguments: object) -> Future[None]:
        return self._thread.submit(self._guarded, call, *arguments)

    def _guarded(self, call: Callable[..., object], *arguments: object) -> None:
        try:
            call(*arguments)
        except Exception as error:  # of a tool that is not ours, and must stop nothing
            self._tracker = None
            self._tell(f"{self._name} is told no more of this run: {first_line(error)}")


def main(lines: Iterable[str], answers: TextIO) -> None:
    """Serve one run of a stage."""

    def tell(line: str) -> None:
        answers.write(f"{line}\n")
        answers.flush()

    messages = _messages(lines)
    first = next(messages)
    folder = Path(first["folder"])
    prepare(folder)
    trackers = {name: Line(name, tell) for name in first["trackers"]}
    last: dict[str, Any] = {"status": _KILLED, "patience": PATIENCE}
    for message in messages:
        for tracker in trackers.values():
            if "identity" in message:
                tracker.begin(TrackedRun(folder=folder, tell=tell, **message))
            elif "values" in message:
                tracker.report(message)
        last = message if "status" in message else last
    ends = {tracker.end(last["status"]): name for name, tracker in trackers.items()}
    for late in wait(ends, timeout=last["patience"]).not_done:
        tell(f"{ends[late]} took more than {last['patience']:.0f} s to send what was left")


def _messages(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What the lines hold; the last one of a stage that was killed may be cut."""
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tools print is for the file beside their data
    main(sys.stdin, channel)
    os._exit(0)  # a tool that hangs has been told of, and is not waited for

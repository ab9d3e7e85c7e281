"""Slots of this machine: which GPU a stage may use, and how many stages run at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence


def visible_gpus() -> tuple[str, ...]:
    """GPUs for stages as CUDA_VISIBLE_DEVICES names them: that variable's, else nvidia-smi's."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(name.strip() for name in chosen.split(",") if name.strip())
    if shutil.which("nvidia-smi") is None:
        return ()
    asked = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return tuple(answer.stdout.split()) if answer.returncode == 0 else ()


def default_jobs() -> int:
    """How many stages run at once on the CPU: one for two cores, at most four."""
    return min(4, max(1, (os.cpu_count() or 1) // 2))


class Slots:
    """Hands out GPUs to stages, and `jobs` places to those without, in the order of asking.

    Safe between threads.
    """

    def __init__(self, gpus: Sequence[str], jobs: int) -> None:
        self._gpus = tuple(gpus)
        self._jobs = jobs
        self._free_gpus = list(gpus)
        self._free_jobs = jobs
        self._changed = threading.Condition()
        self._queues: dict[bool, list[object]] = {
            True: [],
            False: [],
        }  # who waits for GPUs, and who for a place

    @contextlib.contextmanager
    def take(
        self, gpus: int, waits: Callable[[], object] = lambda: None
    ) -> Iterator[dict[str, str]]:
        """Take a slot with `gpus` GPUs, or all there are; yields the stage's environment.

        `waits` is called where there is none at once. On a machine without GPUs such a stage runs
        on the CPU."""
        wanted = min(gpus, len(self._gpus))
        taken = self._wait(wanted, waits)
        try:
            yield self._environment(taken)
        finally:
            with self._changed:
                self._free_gpus += taken
                self._free_jobs += not taken
                self._changed.notify_all()

    def _wait(self, wanted: int, waits: Callable[[], object]) -> list[str]:
        """The GPUs of a slot, once it is this caller's turn."""
        queue = self._queues[wanted > 0]
        ticket = object()

        def turn() -> bool:
            return queue[0] is ticket and self._enough(wanted)

        with self._changed:
            queue.append(ticket)
            now = turn()
        if not now:
            waits()
        with self._changed:
            try:
                self._changed.wait_for(turn)
                taken = [self._free_gpus.pop(0) for _ in range(wanted)]
                self._free_jobs -= not taken
            finally:
                queue.remove(ticket)
                self._changed.notify_all()  # there may be enough left for the next one
        return taken

    def _enough(self, gpus: int) -> bool:
        return len(self._free_gpus) >= gpus if gpus else self._free_jobs > 0

    def _environment(self, taken: list[str]) -> dict[str, str]:
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(taken)} if self._gpus else {}
        if not taken and self._jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self._jobs))
        return environment

"""Slots of this machine: which GPU a stage may use, and how many stages run at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that stages may use, as CUDA_VISIBLE_DEVICES names them: those of that variable, else of nvidia-smi."""
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
    """Hands out GPUs one stage each, and `jobs` places for stages that use none. Safe between threads."""

    def __init__(self, gpus: Sequence[str], jobs: int) -> None:
        self._gpus = tuple(gpus)
        self._jobs = jobs
        self._free_gpus = list(gpus)
        self._free_jobs = jobs
        self._changed = threading.Condition()

    def busy(self, gpus: int) -> bool:
        """Whether `take` would wait now."""
        with self._changed:
            return not self._enough(min(gpus, len(self._gpus)))

    @contextlib.contextmanager
    def take(self, gpus: int) -> Iterator[dict[str, str]]:
        """Wait for a slot with `gpus` GPUs, or all where the machine has fewer; yields the stage's environment.

        On a machine without GPUs such a stage runs on the CPU.
        """
        wanted = min(gpus, len(self._gpus))
        with self._changed:
            self._changed.wait_for(lambda: self._enough(wanted))
            taken = [self._free_gpus.pop(0) for _ in range(wanted)]
            self._free_jobs -= not taken
        try:
            yield self._environment(taken)
        finally:
            with self._changed:
                self._free_gpus += taken
                self._free_jobs += not taken
                self._changed.notify_all()

    def _enough(self, gpus: int) -> bool:
        return len(self._free_gpus) >= gpus if gpus else self._free_jobs > 0

    def _environment(self, taken: list[str]) -> dict[str, str]:
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(taken)} if self._gpus else {}
        if not taken and self._jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self._jobs))
        return environment

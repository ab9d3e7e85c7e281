"""A lock file that one process of a machine holds at a time, and that says which."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import PipelineError


@contextlib.contextmanager
def held(path: Path, taken: str) -> Iterator[int]:
    """Hold a lock file; raises a PipelineError that begins with `taken` while another has it.

    Yields the descriptor, which a child process may hold on to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise PipelineError(
                f"{taken} (process {handle.read()}); wait for it, or cancel it"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield handle.fileno()

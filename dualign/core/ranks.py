"""The processes of one stage: who this is, its share of the work, and what they tell each other.

All run the same code on the same inputs (`dualign.launch` starts them), so they come to the same
points in the same order. Rows are shared out and gathered again; what is written for all, one
writes while the others wait. A process alone is all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

#: How long one waits for another, which may write a large model meanwhile.
_PATIENCE = timedelta(hours=2)
_place = (0, 1)
_alone: ContextVar[bool] = ContextVar("alone", default=False)


def join(backend: str) -> None:
    """Meet the others that the launcher's environment speaks of; from here on there are several."""
    import torch.distributed

    global _place
    torch.distributed.init_process_group(backend, timeout=_PATIENCE)
    _place = (torch.distributed.get_rank(), torch.distributed.get_world_size())


def leave() -> None:
    """Wait until all are done, and part."""
    import torch.distributed

    global _place
    if world() > 1:
        _wait()
        torch.distributed.destroy_process_group()
        _place = (0, 1)


def rank() -> int:
    """The number of this process, from 0."""
    return _place[0]


def world() -> int:
    """How many there are, on all machines."""
    return _place[1]


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world() > 1 else 0


def share(items: Sequence[T]) -> Sequence[T]:
    """Every so manieth item, those that are this process's to do; all of them where it is alone."""
    return items[rank() :: world()]


def gathered(rows: list[T]) -> list[T]:
    """The rows of all processes, in order of process; what says where a row belongs is in it."""
    if world() == 1:
        return rows
    import torch.distributed

    parts: list[list[T]] = [[] for _ in range(world())]
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


@contextlib.contextmanager
def by_one() -> Iterator[bool]:
    """Whether this process does the body for all; the others wait, and go on once it is done."""
    if world() == 1 or _alone.get():
        yield True
        return
    _wait()
    token = _alone.set(rank() == 0)
    try:
        yield rank() == 0
    finally:
        _alone.reset(token)
    _wait()


def _wait() -> None:
    gathered([])

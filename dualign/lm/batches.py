"""Rows in batches of similar length, which waste little on padding; rows with it and without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def by_length(rows: Sequence[T], lengths: Sequence[int], batch_size: int) -> Iterator[list[T]]:
    """Batches of rows of similar length, the longest first, to run out of memory at once.

    >>> list(by_length("abc", [1, 3, 2], batch_size=2))
    [['b', 'c'], ['a']]
    """
    order = sorted(range(len(rows)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield [rows[i] for i in order[start : start + batch_size]]


def padded(
    rows: Sequence[Sequence[int]], value: int, *, left: bool = False, multiple: int | None = None
) -> tuple[Tensor, Tensor]:
    """ids [rows, positions] with `value` after each row, or before it, and the mask of what is a
    row's own; the positions are a multiple of `multiple`.

    All rows at once: a tensor of each, copied one by one, takes a small model as long as a tenth of
    a training step.

    >>> ids, mask = padded([[5], [6, 7]], 0)
    >>> ids.tolist(), mask.tolist()
    ([[5, 0], [6, 7]], [[1, 0], [1, 1]])
    """
    lengths = np.array([len(row) for row in rows])
    step = multiple or 1
    place = np.arange(-(-lengths.max() // step) * step)
    own = (place[::-1] if left else place) < lengths[:, None]
    ids = np.full(own.shape, value, dtype=np.int64)
    ids[own] = list(chain.from_iterable(rows))
    return torch.from_numpy(ids), torch.from_numpy(own.astype(np.int64))


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The ids of each row that a mask keeps, say those that are no padding; [rows, positions]."""
    # At once to the host: of a GPU each row would wait for all that was asked of it before.
    rows = zip(ids.cpu(), mask.bool().cpu(), strict=True)
    return [row[kept].tolist() for row, kept in rows]

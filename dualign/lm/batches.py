"""Rows in batches of similar length, which waste little on padding, and rows without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

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


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The ids of each row that a mask keeps, say those that are no padding; [rows, positions]."""
    # At once to the host: of a GPU each row would wait for all that was asked of it before.
    rows = zip(ids.cpu(), mask.bool().cpu(), strict=True)
    return [row[kept].tolist() for row, kept in rows]

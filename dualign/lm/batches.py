"""Rows in batches of similar length, which waste little on padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def by_length(rows: Sequence[T], lengths: Sequence[int], batch_size: int) -> Iterator[list[T]]:
    """Batches of rows of similar length, the longest first, to run out of memory at once.

    >>> list(by_length("abc", [1, 3, 2], batch_size=2))
    [['b', 'c'], ['a']]
    """
    order = sorted(range(len(rows)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield [rows[i] for i in order[start : start + batch_size]]

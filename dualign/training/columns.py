"""Tables that trainers read, of token ids and numbers."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset

from dualign.core.artifacts import batches

_IDS = pa.list_(pa.int32())
#: Rows that are turned into a chunk of a column at once.
_TOGETHER = 4096


def id_column(rows: Iterable[Sequence[int]]) -> pa.ChunkedArray:
    """A column of token ids, one list a row, at four bytes an id."""
    chunks = [pa.array(some, type=_IDS) for some in batches(rows, _TOGETHER)]
    return pa.chunked_array(chunks, type=_IDS)


def table_of(columns: Mapping[str, Any]) -> Dataset:
    """The columns, which are all of one length, as a data set.

    `Dataset.from_dict` copies lists that it is given, and without a fingerprint a data set is
    pickled for one: together twice what the pairs themselves take."""
    return Dataset(pa.table(dict(columns)), fingerprint=uuid.uuid4().hex)

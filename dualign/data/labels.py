"""Columns of class labels. The library `datasets` keeps these as numbers beside their names, and
the number 0 of the names `safe`, `unsafe` is no False."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from dualign.data.rows import Row

#: Where `datasets` writes the features of a table in a parquet file.
_KEY = b"huggingface"


def with_names(
    rows: Iterable[tuple[int, Row]], features: Mapping[str, Any]
) -> Iterator[tuple[int, Row]]:
    """Numbered rows with names in place of class labels (-1 is None); `features` of `datasets`."""
    names = {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel"
    }
    for number, row in rows:
        for column in names:
            row[column] = _name(row.get(column), names[column])
        yield number, row


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """The features of a parquet file that `datasets` wrote; none of another one."""
    try:
        told = json.loads((schema.metadata or {})[_KEY])
        features = told["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _name(value: Any, names: Sequence[str]) -> Any:
    if value == -1:
        return None
    known = isinstance(value, int) and 0 <= value < len(names)
    return names[value] if known else value

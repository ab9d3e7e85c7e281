"""What keys of params.yaml were called before 0.1, so that an old file is told the new words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

#: A key, or a key and its value, as it was; and what it is called now.
RENAMED: dict[str, str] = {
    r"constraint\.also": "additional",
    r"methods\.[^.]+\.aims": "target",
    r"(?:lagrangian_dpo\.runs|lambda_path\.runs)\.[^.]+\.inner": "pair_loss",
    r"(?:lagrangian_dpo|safety_dpo)\.runs\.[^.]+\.lam: stock": "lam: margin",
    r"methods\.[^.]+\.target: stock": "target: margin",
}


def renamed_keys(content: Mapping[str, Any]) -> list[str]:
    """`OLD is now NEW` for every old key or value of a params file, in its order.

    >>> renamed_keys({"constraint": {"limit": 0, "also": {}}})
    ['constraint.also is now constraint.additional']
    """
    return [f"{old} is now {new}" for key in _keys(content, "") for old, new in _words(key)]


def _words(key: str) -> Iterator[tuple[str, str]]:
    for pattern, new in RENAMED.items():
        if re.fullmatch(pattern, key):
            before = key.partition(": ")[0].rpartition(".")[0]
            yield key, f"{before}.{new}"


def _keys(content: Mapping[str, Any], before: str) -> Iterator[str]:
    """Every key by its full name, and `key: value` of those that hold a word."""
    for name, value in content.items():
        key = f"{before}{name}"
        yield key
        if isinstance(value, Mapping):
            yield from _keys(value, f"{key}.")
        elif isinstance(value, str):
            yield f"{key}: {value}"

"""A raw row: what one is, why it cannot be used, and how it is shown."""

from __future__ import annotations

import json
from typing import Any

Row = dict[str, Any]

EXCERPT = 400
CELL = 60


class BadRow(Exception):
    """A row that cannot be used: reason, detail, and its text if it could not be parsed."""

    def __init__(self, reason: str, detail: str, text: str = "") -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.text = text


class RepeatedKey(ValueError):
    """An object that has a key twice."""


def unique(pairs: list[tuple[str, Any]]) -> Row:
    """A JSON object, of which json would keep the last value of a key that stands in it twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKey(f"key {twice!r} stands twice in one object; keep one")
    return row


def excerpt(row: Any) -> str:
    """A row as JSON for the quarantine, with its texts cut short."""
    if isinstance(row, dict):
        row = {
            name: value[:CELL] if isinstance(value, str) else value for name, value in row.items()
        }
    return json.dumps(row, ensure_ascii=False, default=str)[:EXCERPT]

"""Cells of a raw row: texts, whole numbers and truth values as CSV, JSON and parquet write them."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from dualign.data.messages import check_unicode, turns_in
from dualign.data.rows import BadRow, Row

#: What programs write for a missing value; a number as CSV, JSON and parquet write it; and the two
#: truth values.
NULLS = {"nan", "NaN", "None", "null", "NULL", "N/A", "#N/A", "NA", "<NA>"}
#: What Alpaca's own rows say of a missing input or output: `<noinput>`, `No Output`.
_NOTHING = re.compile(r"\W*no\W?(in|out)put( needed| required)?\W*", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?[0-9]{1,9}(\.0*)?")
_TRUTH = {"false": 0, "true": 1}


def text(row: Row, column: str) -> str:
    """The cell without the white space around it. Raises BadRow where it is no text."""
    if column not in row:
        raise BadRow("missing_column", f"no column {column!r}")
    value = row[column]
    if not isinstance(value, str):
        raise BadRow("not_text", f"{column} is {shortened(value)}, expected text")
    if turns_in(value, column) is not None:
        raise BadRow("not_text", f"{column} holds a list of messages, which format 'columns' reads")
    return check_unicode(value, column).strip()


def is_missing(value: Any) -> bool:
    """Whether a cell is null, not a number, blank, or text that stands for these."""
    if isinstance(value, str):
        return not value.strip() or says_nothing(value)
    return value is None or value != value


def says_nothing(value: str) -> bool:
    """Whether a text is just what is written for a missing one."""
    return value.strip() in NULLS or _NOTHING.fullmatch(value) is not None


def number(value: Any) -> float | None:
    """The number of a cell, of a text a whole one (databases write it as a decimal); else None."""
    if isinstance(value, str):
        return float(value) if _NUMBER.fullmatch(value.strip()) else None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or value != value:
        return None
    return float(value) if isinstance(value, Decimal) else value


def code(row: Row, column: str, valid: range, expected: str = "") -> int | None:
    """A whole number of `valid`, or None for null. Raises BadRow, which says what is `expected`."""
    value = row.get(column)
    if is_missing(value):
        return None
    known = number(value)
    if known is None or known not in valid:
        expected = expected or ", ".join(map(str, valid))
        raise BadRow("bad_label", f"{column} is {shortened(value)}, expected {expected} or null")
    return int(known)


def bit(row: Row, column: str) -> int | None:
    """0, 1, or None for null."""
    truth = _TRUTH.get(str(row.get(column)).strip().casefold())
    return code(row, column, range(2), "0, 1, true, false") if truth is None else truth


def flag(row: Row, column: str) -> bool | None:
    """True, False, or None for null."""
    known = bit(row, column)
    return None if known is None else bool(known)


def shortened(value: Any) -> str:
    """A value as it is shown in a message."""
    return "null" if value is None else repr(value)[:60]

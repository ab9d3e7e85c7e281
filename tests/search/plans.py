"""Rows of `methods` as searches take them."""

from __future__ import annotations

from typing import Any

from dualign.methods import Plan, plan
from dualign.params.search import MethodRow


def row_of(method: str, start: str, reference: str, **options: Any) -> Plan:
    """The plan of a row."""
    given = {"method": method, "start": start, "reference": reference, **options}
    return plan("row", MethodRow.model_validate(given))

"""How often a bound errs, and whether that is too often: what the laboratories of certificates
count alike.
"""

from __future__ import annotations

import math
from typing import Any

SLACK = 0.01  # on top of delta, before a bound or a sequence counts as failing


def measured(false: Any, delta: float) -> dict[str, Any]:
    """The rate of a bool array [repeats], its Monte-Carlo standard error, and whether it is at most
    delta + 1 %.
    """
    rate = float(false.mean())
    return {
        "rate": rate,
        "error": math.sqrt(rate * (1 - rate) / len(false)),
        "holds": rate <= delta + SLACK,
    }


def percent(row: dict[str, Any]) -> str:
    """The rate of a row with its error; in bold where it fails."""
    text = f"{row['rate']:.2%} ± {row['error']:.2%}"
    return text if row["holds"] else f"**{text}**"

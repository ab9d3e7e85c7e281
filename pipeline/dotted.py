"""Dotted keys of params, such as `sft.training.epochs`."""

from __future__ import annotations

from typing import Any


def value_at(content: Any, key: str, missing: Any = None) -> Any:
    """The value of a dotted key, or `missing` where there is none."""
    for name in key.split("."):
        if not isinstance(content, dict) or name not in content:
            return missing
        content = content[name]
    return content

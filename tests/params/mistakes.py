"""Mistakes in a params file: how to make one, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest

from dualign.core.errors import ParamsError
from dualign.params import loading

Content = dict[str, Any]


def refusal(content: Content) -> str:
    """The message for this content; it must be one line that begins with the file's name."""
    with pytest.raises(ParamsError) as caught:
        loading.check(content, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml: ") and "\n" not in message
    return message.removeprefix("my.yaml: ")


def put(content: Content, dotted: str, value: Any) -> Content:
    """Set a key, making no sections on the way."""
    *sections, key = dotted.split(".")
    place = content
    for section in sections:
        place = place[section]
    place[key] = value
    return content


def drop(content: Content, dotted: str) -> Content:
    *sections, key = dotted.split(".")
    place = content
    for section in sections:
        place = place[section]
    del place[key]
    return content

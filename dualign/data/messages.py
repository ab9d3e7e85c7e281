"""Conversations as data sets hold them: message lists in a cell, as objects or as JSON text, in the common dialects."""

from __future__ import annotations

import json
from typing import Any

from dualign.core.schema import Message

#: Keys of a turn: role and content as in OpenAI's and TRL's data, from and value as in ShareGPT's.
_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant", "prompter": "user"}
_SPOKEN = ("system", "user", "assistant")


class BadRow(Exception):
    """A row that cannot be used: reason, detail, and the text of the row where it could not be parsed."""

    def __init__(self, reason: str, detail: str, text: str = "") -> None:
        super().__init__(detail)
        self.reason, self.detail, self.text = reason, detail, text


def turns_in(value: Any, column: str) -> list[Message] | None:
    """The turns of a cell that holds a message list, or its JSON text; None for other text.

    Raises BadRow for a list that is none of messages, or holds turns that no chat template takes here.
    """
    listed = _parsed(value) if isinstance(value, str) else value
    if not isinstance(listed, list):
        return None
    return [_turn(one, column) for one in listed]


def split_answer(turns: list[Message], column: str) -> tuple[list[Message], str]:
    """A dialogue as what stands before its last turn, and that turn's text. Raises BadRow where no answer is last."""
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow("bad_turns", f"{column}: the last message must be the assistant's, since it is the answer")
    return turns[:-1], turns[-1]["content"]


def _parsed(text: str) -> Any:
    """What a text that looks like a list of objects says as JSON; the text itself where it is something else."""
    if not text.lstrip().startswith("[{"):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list) and all(map(_is_turn, value)) else text


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and any(role in value and content in value for role, content in _KEYS)


def _turn(value: Any, column: str) -> Message:
    if not _is_turn(value):
        raise BadRow("bad_turns", f"{column} must be text or a list of {{role, content}} turns")
    if value.get("tool_calls"):
        raise BadRow("bad_turns", f"{column}: a turn calls a tool, which is no text to train on")
    role_key, content_key = next(pair for pair in _KEYS if pair[0] in value and pair[1] in value)
    role = _ROLES.get(str(value[role_key]), str(value[role_key]))
    if role not in _SPOKEN:
        raise BadRow("bad_turns", f"{column}: a turn of {role!r} is none of {', '.join(_SPOKEN)}")
    return {"role": role, "content": _content(value[content_key], column)}


def _content(value: Any, column: str) -> str:
    """The text of a turn; a list of text parts is joined, other parts are refused."""
    if isinstance(value, list):
        value = "\n".join(_part(one, column) for one in value)
    if not isinstance(value, str):
        raise BadRow("not_text", f"{column}: the content of a message is no text")
    return check_unicode(value, column).strip()


def _part(value: Any, column: str) -> str:
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str) or value.get("type", "text") != "text":
        raise BadRow("not_text", f"{column}: a message holds a part that is no text, such as an image")
    return text


def check_unicode(value: str, column: str) -> str:
    """The text, or BadRow where it cannot be written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow("not_unicode", f"{column} holds half of a surrogate pair at character {error.start}") from None
    return value

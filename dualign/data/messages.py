"""Conversations as data sets hold them: lists of messages, as objects or as text."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from dualign.core.schema import Message
from dualign.data.rows import BadRow, unique

#: Keys of a turn: role and content as in OpenAI's and TRL's data, from and value as in ShareGPT's.
_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant", "prompter": "user"}
_SPOKEN = ("system", "user", "assistant")
_NO_SYSTEM: Message = {"role": "system", "content": ""}
_SPEAKERS = (*_ROLES, *_SPOKEN, "developer", "tool", "function", "bot", "model")
_TURN_KEYS = {
    "role",
    "content",
    "from",
    "value",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "reasoning_content",
    "weight",
}
#: The beginning of an object or a list of them, as text; a key of a turn; and a turn that says
#: whose it is.
_LIKE = re.compile(r"\s*\[?\s*\{")
_KEY = re.compile(r"""['"](role|from|content)['"]\s*:""")
_SPEAKING = re.compile(
    rf"""\s*\[.*?['"](role|from)['"]\s*:\s*['"]({"|".join(_SPEAKERS)})['"]""", re.DOTALL
)
#: Characters of a list written in Python that is read; its parser takes a hundred times as much
#: memory.
_PYTHON_LIMIT = 2**20


def turns_in(value: Any, column: str) -> list[Message] | None:
    """The turns of a cell with a message list, or its JSON or Python; None for other text.

    A first system turn without text, as tables hold it that have a place for one, is left out.
    Raises BadRow for a list that is none of messages, or holds turns that no chat template takes
    here, and for a text that looks like messages and cannot be read as a list of them."""
    listed = _parsed(value, column) if isinstance(value, str) else value
    if not isinstance(listed, list):
        return None
    turns = [_turn(one, column) for one in listed]
    return turns[1:] if turns[:1] == [_NO_SYSTEM] else turns


def split_answer(turns: list[Message], column: str) -> tuple[list[Message], str]:
    """A dialogue's turns before the last, and its text. Raises BadRow for no answer."""
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow(
            "bad_turns",
            f"{column}: the last message must be the assistant's, since it is the answer",
        )
    return turns[:-1], turns[-1]["content"]


def _parsed(text: str, column: str) -> Any:
    """What a text that looks like a list of messages says in JSON or Python, else itself."""
    if not (_LIKE.match(text) and _KEY.search(text)):
        return text
    try:
        value = _read(text)
    except ValueError as error:
        if not _SPEAKING.match(text):
            return text
        raise BadRow(
            "bad_turns", f"{column} looks like messages, but is no list of them: {error}"
        ) from None
    if isinstance(value, dict) and _speaks(value):
        raise BadRow("bad_turns", f"{column} is a message outside a list; put [ and ] around it")
    return value if isinstance(value, list) and any(map(_speaks, value)) else text


def _read(text: str) -> Any:
    """A text in JSON, or as Python and pandas write lists. Raises ValueError for neither."""
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError:
        pass
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    try:
        if len(text) <= _PYTHON_LIMIT:
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    raise ValueError("it is neither JSON nor a list as Python writes it; write the cell as JSON")


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and any(
        role in value and content in value for role, content in _KEYS
    )


def _keys_of(turn: dict[str, Any]) -> tuple[str, str]:
    """The keys of a turn's speaker and text; in a table of both kinds the other two are null."""
    pairs = [pair for pair in _KEYS if pair[0] in turn and pair[1] in turn]
    return next((pair for pair in pairs if turn[pair[0]] is not None), pairs[0])


def _speaks(value: Any) -> bool:
    """Whether an object is a turn: only keys of turns, content or who speaks among them."""
    if not isinstance(value, dict) or _is_turn(value):
        return isinstance(value, dict)
    named = any(value.get(key) in _SPEAKERS for key in ("role", "from"))
    return value.keys() <= _TURN_KEYS and (named or "content" in value)


def _turn(value: Any, column: str) -> Message:
    if not _is_turn(value):
        raise BadRow("bad_turns", f"{column} must be text or a list of {{role, content}} turns")
    if value.get("tool_calls"):
        raise BadRow("bad_turns", f"{column}: a turn calls a tool, which is no text to train on")
    role_key, content_key = _keys_of(value)
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
        raise BadRow(
            "not_text", f"{column}: a message holds a part that is no text, such as an image"
        )
    return text


def check_unicode(value: str, column: str) -> str:
    """The text, or BadRow where it cannot be written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            "not_unicode", f"{column} holds half of a surrogate pair at character {error.start}"
        ) from None
    return value

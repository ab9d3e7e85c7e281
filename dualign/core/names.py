"""What names and paths of users may be: they become folders, keys of DVC, words of messages."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator

#: A name of the user's; `pipeline.names` and `.dvcignore` have it too.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RULE = "letters, digits, '.', '_' and '-', 64 at most, the first a letter or a digit"
#: What breaks a line, or cannot be in a path.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_LONGEST = 1000
#: Multipliers that a run may name: the pool's own, or the one with a certificate margin.
Solved = Literal["dual", "margin"]


def shown(text: str) -> str:
    """A name or dotted key as it is; anything else quoted and cut, for one line."""
    return text if _KEY.fullmatch(text) else cut(repr(text))


def cut(text: str) -> str:
    """At most a hundred characters of a text."""
    return text if len(text) <= 100 else f"{text[:97]}..."


def cut_name(suite: str) -> str:
    """A suite's name for answers that its stop words cut; no name of the user's is such a one."""
    return f"{suite} (cut)"


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError(f"a name has {_RULE}; choose such a one")
    return text


def _run(text: str) -> str:
    if "." in text:
        raise ValueError(
            "the name of a run has no '.', which DVC takes for a level of keys; use '_' or '-'"
        )
    return _name(text)


def _model(text: str) -> str:
    if len(text.split("/")) > 2 or not all(NAME.fullmatch(part) for part in text.split("/")):
        raise ValueError(
            "a folder under models/ is NAME or STAGE/NAME, such as sft or reward_dpo/helpful; write"
            " it so"
        )
    return text


def _place(text: str) -> str:
    if not text.strip() or len(text) > _LONGEST or _CONTROL.search(text):
        raise ValueError(f"must be a text on one line of 1 to {_LONGEST} characters")
    return text


def _inside(text: str) -> str:
    path = PurePosixPath(_place(text))
    if ".." in path.parts:
        raise ValueError(
            "a relative path does not lead out of its folder ('..'); give an absolute path"
        )
    return text


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"this is no regular expression ({error}); correct it") from None
    return text


#: The key of a row that a message, a table or a file is named after.
Name = Annotated[str, AfterValidator(_name)]
#: The same where DVC follows the row by its key (`reward_dpo.runs.NAME`).
RunName = Annotated[str, AfterValidator(_run)]
#: A folder under models/ that some stage writes: `sft`, `reward_dpo/NAME`.
Model = Annotated[str, AfterValidator(_model)]
#: A path, an id on the hub, or another text of one line.
Place = Annotated[str, AfterValidator(_place)]
#: A path in a folder of ours, or an absolute one.
Inside = Annotated[str, AfterValidator(_inside)]
#: A regular expression.
Pattern = Annotated[str, AfterValidator(_pattern)]

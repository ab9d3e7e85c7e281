"""YAML of users within limits: nothing overflows the reader, fills memory, or takes long."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from dualign.core.errors import ParamsError

#: Bytes of a file, levels of lists and mappings, and values, where an alias counts as all that it
#: repeats. The files in `params/` stay below 20 000, 8 and 1 000. `pipeline.yaml_text` has the same
#: limits.
LARGEST = 200_000
DEEPEST = 20
MOST_VALUES = 50_000
#: Characters of a number.
LONGEST_NUMBER = 100
_DIGITS = re.compile(r"[-+]?[0-9][0-9a-fA-FxXoO_.]*")


@dataclass
class _Node:
    """How many values a node holds, itself among them, and in how many levels below it."""

    anchor: str | None
    values: int
    levels: int

    def take(self, inner: _Node) -> None:
        """Count a node that lies in this one."""
        self.values += inner.values
        self.levels = max(self.levels, inner.levels + 1)


class _Refused(Exception):
    """The text is beyond a limit: on which line, and what is wrong."""

    def __init__(self, event: Any, problem: str) -> None:
        super().__init__(problem)
        self.line = event.start_mark.line + 1


def read(path: Path) -> Any:
    """The content of a YAML 1.2 file. Raises ParamsError that names file and line."""
    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST + 1)
    except FileNotFoundError:
        raise ParamsError(
            f"{path}: no such file; run from the folder that holds params.yaml"
        ) from None
    except OSError as error:
        raise ParamsError(
            f"{path}: cannot be read ({error.strerror}); it must be a text file"
        ) from None
    return parse(content, path)


def parse(content: bytes, path: str | Path) -> Any:
    """What YAML 1.2 text holds; `path` is its name. Raises ParamsError with that and the line."""
    if len(content) > LARGEST:
        raise ParamsError(
            f"{path}: more than {LARGEST // 1000} kB of params; this is another file, or should be"
            " shorter"
        )
    try:
        text = content.decode()
        _measure(text)
        return YAML(typ="safe").load(text)
    except UnicodeDecodeError as error:
        raise ParamsError(
            f"{path}: not valid YAML ({error.reason}); save it as UTF-8 text"
        ) from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ParamsError(
            f"{path}:{line}: not valid YAML ({_short(error.problem)}); correct it there"
        ) from None
    except _Refused as error:
        raise ParamsError(f"{path}:{error.line}: {error}") from None
    except YAMLError as error:
        why = _short(getattr(error, "reason", error))
        raise ParamsError(f"{path}: not valid YAML ({why}); save it as UTF-8 text") from None
    except (ValueError, OverflowError) as error:  # a date or a number that Python has not
        raise ParamsError(
            f"{path}: a value cannot be read ({error}); correct it, or quote it if it is a text"
        ) from None


def _short(text: object) -> str:
    """The beginning of a text, on one line."""
    return " ".join(str(text)[:200].split())


def _measure(text: str) -> None:
    """Raise _Refused for a text beyond a limit. Works on events, which need no recursion."""
    root = _Node(None, 1, 0)
    within = [root]  # the collections around an event, outermost first
    anchored: dict[str, _Node] = {}
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, CollectionStartEvent | ScalarEvent) and event.tag is not None:
            raise _Refused(
                event, f"the tag {_short(event.tag)} is not read here; write the value without it"
            )
        if isinstance(event, CollectionStartEvent):
            within.append(_Node(event.anchor, 1, 1))
            ended = None
        elif isinstance(event, CollectionEndEvent):
            ended = within.pop()
        elif isinstance(event, ScalarEvent):
            ended = _Node(event.anchor, 1, 0)
            if (
                len(event.value) > LONGEST_NUMBER
                and event.implicit[0]
                and _DIGITS.fullmatch(event.value)
            ):
                raise _Refused(
                    event,
                    f"a number of {len(event.value)} digits; write a shorter one, or quote a text",
                )
        elif isinstance(event, AliasEvent):
            ended = _repeated(event, anchored)
        else:
            continue
        if ended is not None:
            within[-1].take(ended)
            if ended.anchor is not None:
                anchored[ended.anchor] = ended
        if len(within) - 1 + (ended.levels if ended else 0) > DEEPEST:
            raise _Refused(
                event,
                f"more than {DEEPEST} lists and mappings in each other; params have no such place",
            )
        if within[-1].values > MOST_VALUES:
            raise _Refused(
                event, f"more than {MOST_VALUES} values, with what aliases repeat; write fewer"
            )


def _repeated(alias: AliasEvent, anchored: dict[str, _Node]) -> _Node:
    if alias.anchor not in anchored:
        raise _Refused(
            alias,
            f"*{_short(alias.anchor)} repeats what has not ended before it; write the value out",
        )
    node = anchored[alias.anchor]
    return _Node(None, node.values, node.levels)

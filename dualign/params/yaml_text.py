"""YAML of users within limits: nothing overflows the reader, fills memory, or takes long.

This file is there twice, here for the library and there for the pipeline, but for the class of the
errors: the library is installed without the pipeline, which must not import it. A test holds the
two equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    Event,
    NodeEvent,
    ScalarEvent,
)
from ruamel.yaml.nodes import ScalarNode

from dualign.core.errors import ParamsError as Refused

#: Bytes of a file, levels of lists and mappings, and values, where an alias counts as all that it
#: repeats. The files in `params/` stay below 20 000, 8 and 1 000.
LARGEST = 200_000
DEEPEST = 20
MOST_VALUES = 50_000
#: Characters of a number.
LONGEST_NUMBER = 100
_DIGITS = re.compile(r"[-+]?[0-9][0-9a-fA-FxXoO_.]*")
#: A number as all readers take it: not so 0x10, 0o17, 010 and 1_000.
_DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_RESOLVER = YAML(typ="safe").resolver
_OTHERS = ("int", "float", "timestamp")


@dataclass
class _Node:
    """How many values a node holds, itself among them, and how many levels it and they make."""

    anchor: str | None
    values: int
    levels: int


def read(path: Path, name: str | None = None) -> str:
    """The text of a file. Raises an error that names it, by its path or `name`, and the remedy."""
    name = name or str(path)
    try:
        with path.open("rb") as stream:
            return decoded(stream.read(LARGEST + 1), name)
    except FileNotFoundError:
        raise Refused(f"{name}: no such file; run from the folder that holds params.yaml") from None
    except OSError as error:
        raise Refused(
            f"{name}: cannot be read ({error.strerror}); it must be a text file"
        ) from None


def decoded(content: bytes, name: str | Path) -> str:
    """The text of a file's bytes; `name` is what errors call it."""
    if len(content) > LARGEST:
        raise Refused(
            f"{name}: more than {LARGEST // 1000} kB of params; this is another file, or should be"
            " shorter"
        )
    try:
        return content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise Refused(f"{name}: not valid YAML ({error.reason}); save it as UTF-8 text") from None


def load(text: str, name: str | Path = "params.yaml") -> Any:
    """What YAML 1.2 text holds. Raises an error with `name`, line and remedy, in one line."""
    check(text, name)
    try:
        return YAML(typ="safe").load(text)
    except YAMLError as error:
        raise _invalid(error, name) from None


def check(text: str, name: str | Path = "params.yaml") -> None:
    """Raise the same for text that is no YAML or beyond a limit, without making values of it."""
    decoded(text.encode(), name)
    try:
        for event, problem in _problems(text):
            if problem:
                raise Refused(f"{name}:{event.start_mark.line + 1}: {problem}")
    except YAMLError as error:
        raise _invalid(error, name) from None


def _invalid(error: YAMLError, name: str | Path) -> Refused:
    mark = getattr(error, "problem_mark", None)
    where = f"{name}:{mark.line + 1}" if mark else name
    why = getattr(error, "problem", None) or getattr(error, "reason", error)
    return Refused(f"{where}: not valid YAML ({_short(why)}); correct it there, or quote a text")


def _short(text: object) -> str:
    """The beginning of a text, on one line."""
    return " ".join(str(text)[:200].split())


def _problems(text: str) -> Iterator[tuple[Event, str]]:
    """Every event of a text and what is wrong with it, if anything; events need no recursion."""
    within = [_Node(None, 1, 0)]  # the collections around an event, outermost first
    anchored: dict[str, _Node] = {}
    for event in YAML(typ="safe").parse(text):
        yield event, _problem(event, anchored)
        if isinstance(event, CollectionStartEvent):
            within.append(_Node(event.anchor, 1, 1))
            levels = 0
        elif isinstance(event, CollectionEndEvent | NodeEvent):
            node = _ended(event, within, anchored)
            within[-1].values += node.values
            within[-1].levels = max(within[-1].levels, node.levels + 1)
            levels = node.levels
        else:
            continue
        if len(within) - 1 + levels > DEEPEST:
            message = f"more than {DEEPEST} lists and mappings in each other"
            yield event, f"{message}; params have no such place"
        if within[-1].values > MOST_VALUES:
            yield event, f"more than {MOST_VALUES} values, with what aliases repeat; write fewer"


def _problem(event: Event, anchored: dict[str, _Node]) -> str:
    """What is wrong with an event by itself."""
    if isinstance(event, AliasEvent) and event.anchor not in anchored:
        name = _short(event.anchor)
        return f"*{name} repeats what has not ended before it; write the value out, or quote it"
    tag = getattr(event, "tag", None)
    if tag is not None:
        return f"the tag {_short(tag)} is not read here; write the value without it, or quote it"
    if not isinstance(event, ScalarEvent) or not event.implicit[0]:
        return ""
    if len(event.value) > LONGEST_NUMBER and _DIGITS.fullmatch(event.value):
        return f"a number of {len(event.value)} digits; write a shorter one, or quote a text"
    kind = str(_RESOLVER.resolve(ScalarNode, event.value, event.implicit)).rpartition(":")[2]
    if kind in _OTHERS and not _is_decimal(event.value):
        said = _short(event.value)
        return f"{said} is no decimal number, and no text to YAML; write such a number, or quote it"
    return ""


def _is_decimal(text: str) -> bool:
    return bool(_DECIMAL.fullmatch(text)) and math.isfinite(float(text))


def _ended(event: Any, within: list[_Node], anchored: dict[str, _Node]) -> _Node:
    """The node that ends with an event, which its anchor names from here on."""
    if isinstance(event, AliasEvent):
        return anchored[event.anchor]
    node = within.pop() if isinstance(event, CollectionEndEvent) else _Node(event.anchor, 1, 0)
    if node.anchor is not None:
        anchored[node.anchor] = node
    return node

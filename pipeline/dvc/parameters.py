"""Set keys of params.yaml, the rest byte for byte; values are YAML 1.2, as for all readers.

Whether a value makes sense is for the stage to say that reads it.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node

from pipeline import yaml_text
from pipeline.dotted import value_at
from pipeline.errors import PipelineError

#: Begins a key that may be new, as for DVC's `-S`.
ADDS = "+"


def parse(argument: str) -> tuple[str, Any]:
    """`constraint.limit=-0.5` as key and value. Raises PipelineError where it is no assignment."""
    key, equals, text = argument.partition("=")
    if not equals or not key.strip() or not text.strip():
        raise PipelineError(
            f"{argument}: write key=value, for example constraint.limit=-0.5, or key=null for no"
            " value"
        )
    key = key.strip()
    try:
        value = yaml_text.load(text, "the value")
    except PipelineError as error:
        raise PipelineError(f"{key[:100]}: {error}") from None
    node = composed(text)
    end = 0 if node is None else _end(node)
    if text[end:].strip():
        raise PipelineError(
            f"{key[:100]}: {text[end:].strip()[:100]!r} is a comment to YAML; quote the value"
        )
    return key, value


def settings_of(arguments: Sequence[str]) -> dict[str, Any]:
    """Assignments by key. Raises PipelineError for what is none, and for a key that comes twice."""
    pairs = [parse(argument) for argument in arguments]
    check_once([key for key, _ in pairs])
    return dict(pairs)


def check_once(keys: Sequence[str]) -> None:
    """Raise PipelineError for a key that is set twice: one of its values would be lost."""
    plain = [key.removeprefix(ADDS) for key in keys]
    for key in plain:
        if plain.count(key) > 1:
            raise PipelineError(f"{key}: set twice; set it once")


def assign(text: str, settings: Mapping[str, Any]) -> str:
    """The text of params.yaml with new values for some keys, such as {"constraint.limit": -0.5}.

    What a section takes from the block of that name at the top, say `cost_model.training.epochs`,
    is put into the section. A key that begins with `+` may be new in its mapping. Raises
    PipelineError where a key is not there, or comes with and without `+`, or its place in the file
    cannot be edited alone.
    """
    check_once(list(settings))
    content = _mapping(text)
    for named, value in settings.items():
        key = named.removeprefix(ADDS)
        here = _keys(content)
        addable = [key] if named != key and _has_room(content, key) else inherited(content)
        _check_key([*here, *addable], content, key)
        if key in here and value_at(content, key, missing=here) is here:
            raise PipelineError(
                f"params.yaml: {key} has a name with '.' in it, or one that is no text; edit the"
                " file, it cannot be set here"
            )
        content = _changed(content, key, value)
        text = (_written if key in here else _added)(text, key, value)
        if yaml_text.load(text) != content:
            raise PipelineError(
                f"params.yaml: {key} cannot be set alone (an alias, or an unusual layout); edit the"
                " file"
            )
    return text


def span(text: str, key: str) -> tuple[int, int] | None:
    """Where a dotted key's value begins and ends in YAML text; None without such a key."""
    pair = pair_at(composed(text), key)
    return None if pair is None else place(text, *pair)


def composed(text: str) -> Node | None:
    """The nodes of YAML text; None where it cannot be read."""
    try:
        yaml_text.check(text)
        root: Node | None = YAML(typ="safe", pure=True).compose(text)
    except (PipelineError, YAMLError):
        return None
    return root


def pair_at(root: Node | None, key: str) -> tuple[Node, Node] | None:
    """The nodes of a dotted key and of its value; None where there is no such key."""
    pair = None
    node = root
    for name in key.split("."):
        pair = _pair(node, name)
        if pair is None:
            return None
        node = pair[1]
    return pair


def place(text: str, label: Node, node: Node) -> tuple[int, int]:
    """Where a value begins and ends in the text, by the nodes of its key and of itself."""
    start = node.start_mark.index
    end = _end(node)
    if (
        start == end
    ):  # an empty value counts as standing at the next one; its place is after its colon
        start = end = text.index(":", label.end_mark.index) + 1
    return start, end


def replace_file(path: Path, text: str) -> None:
    """Write a text file whole or not at all; what a kill leaves lies in a folder of DVC's.

    A link stays one, and the file that it leads to keeps its mode and its line ends. Raises
    PipelineError where the place cannot be written."""
    target = path.resolve()
    room = target.parent / ".dvc" / "tmp"
    temporary = (room if room.is_dir() else target.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        target.parent.mkdir(exist_ok=True)
        there = target.exists()
        ends = "\r\n" if there and b"\r\n" in target.read_bytes() else "\n"
        temporary.write_text(text, newline=ends)
        if there:
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise PipelineError(
            f"{path}: cannot be written ({error.strerror}) and is as it was; mend that"
        ) from None


def _mapping(text: str) -> dict[str, Any]:
    content = yaml_text.load(text)
    if not isinstance(content, dict):
        raise PipelineError("params.yaml: expected a mapping of keys to values")
    return content


def _changed(content: Any, key: str, value: Any) -> Any:
    """The content with one value replaced. An alias becomes a copy, so nothing else changes."""
    name, _, rest = key.partition(".")
    if not rest:
        return {**content, name: value}
    return {**content, name: _changed(content[name], rest, value)}


def _check_key(keys: Sequence[str], content: Mapping[str, Any], key: str) -> None:
    if key in keys:
        return
    same = [other for other in keys if other.split(".")[-1] == key.split(".")[-1]]
    near = same or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"its sections are {', '.join(content)}"
    new = f", or {ADDS}{key} adds it" if _has_room(content, key) else ""
    raise PipelineError(f"params.yaml: there is no key {key}; {hint}{new}")


def _has_room(content: Mapping[str, Any], key: str) -> bool:
    """Whether the mapping that the key would be in is there, below the top."""
    place, _, _ = key.rpartition(".")
    return place in _keys(content) and isinstance(value_at(content, place), dict)


def _keys(content: Any, prefix: str = "") -> list[str]:
    if not isinstance(content, dict):
        return []
    return [
        key
        for name, value in content.items()
        for key in (f"{prefix}{name}", *_keys(value, f"{prefix}{name}."))
    ]


def inherited(content: Mapping[str, Any]) -> list[str]:
    """The keys that sections could have and take from the block of that name at the top."""
    found = []
    for key in _keys(content):
        section, _, name = key.rpartition(".")
        own = value_at(content, key)
        block = content.get(name)
        if section and isinstance(own, dict) and isinstance(block, dict):
            found += [f"{key}.{inner}" for inner in block if inner not in own]
    return found


def _written(text: str, key: str, value: Any) -> str:
    shown = _shown(key, value)
    place = span(text, key)
    if place is None:
        raise _placeless(key)
    start, end = place
    gap = " " if text[start - 1 : start] == ":" else ""
    return text[:start] + gap + shown + text[end:]


def _added(text: str, key: str, value: Any) -> str:
    """The text with the key as the first of its mapping."""
    section, _, name = key.rpartition(".")
    entry = f"{name}: {_shown(key, value)}"
    pair = pair_at(composed(text), section)
    if pair is None or not isinstance(pair[1], MappingNode):
        raise _placeless(key)
    node = pair[1]
    if node.flow_style:
        start = text.index("{", node.start_mark.index) + 1
        after = ", " if node.value else ""
    else:
        first = node.value[0][0].start_mark
        start = first.index
        after = "\n" + " " * first.column
    return text[:start] + entry + after + text[start:]


def _shown(key: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)  # JSON is YAML 1.2
    except (TypeError, ValueError, RecursionError):
        raise PipelineError(
            f"params.yaml: {key}: {_told(value)} is no number, text, truth value, list or mapping"
        ) from None


def _placeless(key: str) -> PipelineError:
    return PipelineError(
        f"params.yaml: {key} comes from a merge (<<), or an alias, and has no place of its own;"
        " edit the file"
    )


def _told(value: Any) -> str:
    try:
        return repr(value)[:100]
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in itself
        return f"this {type(value).__name__}"


def _pair(node: Node | None, key: str) -> tuple[Node, Node] | None:
    """The nodes of a key and of its value."""
    pairs = node.value if isinstance(node, MappingNode) else []
    return next(((label, value) for label, value in pairs if label.value == key), None)


def _end(node: Node) -> int:
    """The end of a value without the blank lines and comments that follow a block."""
    if isinstance(node, CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)

"""A params file that says what differs from another, and the whole file that it stands for.

    extends: default.yaml         # in the same folder
    seed: 3
    lagrangian_dpo:
      training: {max_steps: 100}

A section is merged key by key. A table of names (runs, methods, policies) is replaced as a whole:
its names are the file's own. The other file may extend a third. The whole file is written as text,
so that comments of all stay; that it says the same is checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml.nodes import CollectionNode, Node

from pipeline import yaml_text
from pipeline.dotted import value_at
from pipeline.dvc.parameters import composed, inherited, pair_at, place
from pipeline.errors import PipelineError

KEY = "extends"
#: Mappings whose keys are names of the user's.
TABLES = (
    "constraint.additional",
    "reward_dpo.runs",
    "safety_dpo.runs",
    "lagrangian_dpo.runs",
    "lambda_path.runs",
    "safety_path.runs",
    "methods",
    "certify.runs",
    "evaluate.policies",
    "suites",
    "judges",
)


@dataclass(frozen=True)
class _Overlay:
    """A file that extends another: text and content of both; the other is called `name`."""

    path: Path
    text: str
    content: dict[str, Any]
    name: str
    base: str
    known: Any

    @property
    def changes(self) -> dict[str, Any]:
        """What it says, by dotted key."""
        return dict(_leaves({key: value for key, value in self.content.items() if key != KEY}))


def whole(path: Path, above: tuple[Path, ...] = ()) -> str:
    """The text of the whole params file that a file stands for: its own, or that of the file which
    it extends. `above` are the files that extend this one.

    Raises PipelineError naming the file, where the one that it extends is missing or extends this
    one in turn, where a key is none of that one's, or where the text cannot be put together."""
    overlay = _overlay(path, above)
    if overlay is None:
        return yaml_text.read(path, path.name)
    for key in overlay.changes:
        _check(key, overlay)
    try:
        made = _spliced(_with_blocks(_head(overlay.text) + _body(overlay.base), overlay), overlay)
        same = yaml_text.load(made) == merged(overlay.known, overlay.content)
    except PipelineError:
        same = False
    if not same:
        raise PipelineError(
            f"{path.name}: cannot be written out whole (an alias, a merge, a key with dots, or an"
            " unusual layout); write each key in its section, as default.yaml does"
        )
    return made


def differences(path: Path) -> dict[str, Any]:
    """The keys that an overlay gives other values than its base; none of a whole file."""
    overlay = _overlay(path)
    if overlay is None:
        return {}
    return {
        key: value
        for key, value in overlay.changes.items()
        if value_at(overlay.known, key) != value
    }


def _overlay(path: Path, above: tuple[Path, ...] = ()) -> _Overlay | None:
    """The file with what it extends; None where it is whole."""
    text = yaml_text.read(path, path.name)
    content = yaml_text.load(text, path.name)
    if not isinstance(content, dict) or KEY not in content:
        return None
    base, known = _base(path, content[KEY], above)
    return _Overlay(path, text, content, content[KEY], base, known)


def merged(base: Any, overlay: dict[str, Any], prefix: str = "") -> Any:
    """The content of a whole file with that of an overlay on it."""
    if not isinstance(base, dict) or prefix.rstrip(".") in TABLES:
        return overlay
    changed = dict(base)
    for key, value in overlay.items():
        name = f"{prefix}{key}"
        if name == KEY:
            continue
        inner = isinstance(value, dict) and isinstance(base.get(key), dict)
        changed[key] = merged(base[key], value, f"{name}.") if inner else value
    return changed


def _base(path: Path, name: Any, above: tuple[Path, ...]) -> tuple[str, dict[str, Any]]:
    """Text and content of the whole file that one extends, put together if it extends too."""
    place = path.parent / str(name)
    if not isinstance(name, str) or not place.is_file():
        raise PipelineError(f"{path.name}: {KEY}: {name!r} is no file beside it")
    if any(place.samefile(other) for other in (path, *above)):
        raise PipelineError(f"{path.name}: {KEY}: {name} extends this one in turn; name another")
    text = whole(place, (path, *above))
    content = yaml_text.load(text, place.name)
    if not isinstance(content, dict):
        raise PipelineError(f"{path.name}: {KEY}: {name} is no params file; name one")
    return text, content


def _leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values that replace those of the base: tables of names, and what is no mapping."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in TABLES:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _check(key: str, overlay: _Overlay) -> None:
    """The base has this key, or it is one of a block that the base takes from the top."""
    if _lacks(overlay.known, key) and key not in inherited(overlay.known):
        raise PipelineError(f"{overlay.path.name}: {overlay.name} has no key {key}")


def _lacks(content: Any, key: str) -> bool:
    return bool(value_at(content, key, missing=KEY) == KEY)


def _head(text: str) -> str:
    """The comment that a file begins with."""
    lines = text.splitlines(keepends=True)
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "".join(lines[:end])


def _body(text: str) -> str:
    return text[len(_head(text)) :]


def _with_blocks(text: str, overlay: _Overlay) -> str:
    """The base's text with a stage's block, which it takes from the top, written as JSON."""
    blocks: dict[str, dict[str, Any]] = {}
    for key, value in overlay.changes.items():
        section, _, name = key.rpartition(".")
        if _lacks(overlay.known, key):
            blocks.setdefault(section, dict(value_at(overlay.known, section)))[name] = value
    root = composed(text)
    edits = [
        (*_place(text, root, key), json.dumps(block, ensure_ascii=False))
        for key, block in blocks.items()
    ]
    return _edited(text, edits)


def _spliced(text: str, overlay: _Overlay) -> str:
    """The text with the values of the overlay as they are written there."""
    root = composed(text)
    own = composed(overlay.text)
    return _edited(text, [_edit(key, text, root, overlay.text, own) for key in overlay.changes])


def _edited(text: str, edits: Iterable[tuple[int, int, str]]) -> str:
    """The text with pieces (start, end, new) replaced, none of which lies in another."""
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _edit(
    key: str, text: str, root: Node | None, source: str, own: Node | None
) -> tuple[int, int, str]:
    """Where the value of a key stands in the text, and what takes its place."""
    start, end = _place(text, root, key)
    begin, stop = _place(source, own, key)
    new = source[begin:stop]
    pair = pair_at(own, key)
    if pair is not None and isinstance(pair[1], CollectionNode) and not pair[1].flow_style:
        before = text[:start].rstrip(" ")
        return len(before), end, _own_line(before, source, begin) + new
    gap = " " if text[start - 1 : start] == ":" else ""
    return start, end, gap + new


def _place(text: str, root: Node | None, key: str) -> tuple[int, int]:
    pair = pair_at(root, key)
    if pair is None:
        raise PipelineError(f"{key} is no key of a section of its own; write it as in default.yaml")
    return place(text, *pair)


def _own_line(before: str, source: str, begin: int) -> str:
    """What stands before a block: its indentation, on a line of its own."""
    indent = source[source.rfind("\n", 0, begin) + 1 : begin]
    return indent if before.endswith("\n") else f"\n{indent}"

"""A params file that says only what differs from another one, and the whole file that it stands for.

    extends: default.yaml         # in the same folder, a whole file
    seed: 3
    lagrangian_dpo:
      training: {max_steps: 100}

A section is merged key by key. A table of names (runs, methods, policies) is replaced as a whole: its names are the
file's own. The whole file is written as text, so that comments of both stay; that it says the same is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node

from pipeline import yaml_text
from pipeline.errors import PipelineError
from pipeline.parameters import assign, span

KEY = "extends"
#: Mappings whose keys are names of the user's.
TABLES = (
    "constraint.also", "reward_dpo.runs", "safety_dpo.runs", "lagrangian_dpo.runs", "lambda_path.runs",
    "safety_path.runs", "methods", "certify.runs", "evaluate.policies",
)  # fmt: skip


def whole(path: Path) -> str:
    """The text of the whole params file that a file stands for: its own, or that of the file which it extends.

    Raises PipelineError naming the file, where the one that it extends is missing or an overlay itself, where a key is
    none of that one's, or where the text cannot be put together.
    """
    text = yaml_text.read(path)
    content = yaml_text.load(text, path.name)
    if not isinstance(content, dict) or KEY not in content:
        return text
    base = _base(path, content[KEY])
    changes = dict(_leaves({key: value for key, value in content.items() if key != KEY}))
    known = yaml_text.load(base)
    for key in changes:
        _check(key, known, path, content[KEY])
    made = _head(text) + _body(base)
    for key, value in changes.items():
        made = _spliced(made, key, value, text)
    if yaml_text.load(made) != merged(known, content):
        raise PipelineError(f"{path.name}: cannot be written out whole (an alias, or an unusual layout)")
    return made


def differences(path: Path) -> dict[str, Any]:
    """The keys that an overlay gives other values than the file that it extends has; none where it is no overlay."""
    content = yaml_text.load(yaml_text.read(path), path.name)
    if not isinstance(content, dict) or KEY not in content:
        return {}
    known = yaml_text.load(_base(path, content[KEY]))
    changes = dict(_leaves({key: value for key, value in content.items() if key != KEY}))
    return {key: value for key, value in changes.items() if _at(known, key) != value}


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


def _base(path: Path, name: Any) -> str:
    place = path.parent / str(name)
    if not isinstance(name, str) or not place.is_file():
        raise PipelineError(f"{path.name}: {KEY}: {name!r} is no file beside it")
    text = yaml_text.read(place)
    content = yaml_text.load(text, place.name)
    if not isinstance(content, dict) or KEY in content:
        raise PipelineError(f"{path.name}: {KEY}: {name} is no whole params file; name one that extends nothing")
    return text


def _leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values that replace those of the base: tables of names, and what is no mapping."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in TABLES:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _check(key: str, known: Any, path: Path, base: str) -> None:
    """The base has this key; a stage's own `training` and `lora` may have those of the blocks at the top."""
    parts = key.split(".")
    block = parts[1] if len(parts) == 3 and parts[1] in ("training", "lora") else None
    if _at(known, key, missing=KEY) != KEY or (block and parts[2] in known.get(block, {})):
        return
    raise PipelineError(f"{path.name}: {base} has no key {key}")


def _at(content: Any, key: str, missing: Any = None) -> Any:
    for name in key.split("."):
        if not isinstance(content, dict) or name not in content:
            return missing
        content = content[name]
    return content


def _head(text: str) -> str:
    """The comment that a file begins with."""
    lines = text.splitlines(keepends=True)
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "".join(lines[:end])


def _body(text: str) -> str:
    return text[len(_head(text)) :]


def _spliced(text: str, key: str, value: Any, source: str) -> str:
    """The text with the value of one key as it is written in the overlay's text."""
    if span(text, key) is None:  # a key of a block that the base takes from the top
        section, _, name = key.rpartition(".")
        return assign(text, {section: {**_at(yaml_text.load(text), section), name: value}})
    place, written = span(text, key), span(source, key)
    assert place is not None and written is not None  # `_check` and `_leaves` found the key in both
    start, end = place
    new = source[slice(*written)]
    if _is_block(source, key):
        return text[:start].rstrip(" ") + _own_line(text, start, source, written[0]) + new + text[end:]
    gap = " " if text[start - 1 : start] == ":" else ""
    return text[:start] + gap + new + text[end:]


def _own_line(text: str, start: int, source: str, place: int) -> str:
    """What stands before a block: its indentation, on a line of its own."""
    indent = source[source.rfind("\n", 0, place) + 1 : place]
    before = text[:start].rstrip(" ")
    return indent if before.endswith("\n") else f"\n{indent}"


def _is_block(text: str, key: str) -> bool:
    node: Node | None = YAML(typ="safe", pure=True).compose(text)
    for name in key.split("."):
        pairs = node.value if isinstance(node, MappingNode) else []
        node = next(value for label, value in pairs if label.value == name)
    return node is not None and hasattr(node, "flow_style") and node.flow_style is False

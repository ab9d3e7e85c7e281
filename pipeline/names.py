"""Names that params.yaml gives to runs, checked before DVC makes stages and paths of them.

DVC puts a name into a path as it is, and deletes what lies there before it runs the stage. Where
DVC is started by itself, `.dvcignore` keeps what it writes and deletes within the folders of the
stages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import yaml_text
from pipeline.dotted import value_at
from pipeline.errors import PipelineError

#: As `dualign.core.names` has it.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RULE = "a name has letters, digits, '.', '_' and '-', 64 at most, the first a letter or a digit"
_TEMPLATE = re.compile(r"\$\{([\w.]+)\}")


def check(root: Path, text: str | None = None) -> None:
    """Check what dvc.yaml makes stages and paths of in `text`, by default that of params.yaml.

    Raises PipelineError, in one line, for a name that is none.
    """
    content = yaml_text.load(yaml_text.read(root / "params.yaml") if text is None else text)
    graph = yaml_text.load(yaml_text.read(root / "dvc.yaml"), "dvc.yaml")
    stages = value_at(graph, "stages")
    for stage in stages.values() if isinstance(stages, dict) else ():
        if isinstance(stage, dict) and "foreach" in stage:
            _check_runs(str(stage["foreach"]), stage["do"], content)


def _check_runs(foreach: str, definition: Mapping[str, Any], content: Any) -> None:
    """Check the runs of one stage: their names, and the values of which paths are made."""
    place = "".join(_TEMPLATE.findall(foreach)[:1])
    runs = value_at(content, place)
    names = dict.fromkeys(map(str, runs)) if isinstance(runs, list) else runs
    if not isinstance(names, dict):
        return
    dotless = any(key.endswith(".${key}") for key in definition.get("params", ()))
    used = {
        item
        for path in definition.get("deps", ())
        for item in _TEMPLATE.findall(path)
        if item.startswith("item")
    }
    for name, run in names.items():
        where = f"params.yaml: {place}.{_shown(name)}"
        _check_name(str(name), where, dotless)
        for key, value in _values(run, used):
            if not all(NAME.fullmatch(part) for part in str(value).split("/")):
                raise PipelineError(
                    f"{where}{key}: {_shown(value)} is not NAME or STAGE/NAME; {_RULE}"
                )


def _check_name(name: str, where: str, dotless: bool) -> None:
    if not NAME.fullmatch(name):
        raise PipelineError(f"{where}: {_RULE}")
    if dotless and "." in name:
        raise PipelineError(
            f"{where}: DVC takes '.' for a level of keys; the name of a run has none, use '_'"
            " or '-'"
        )


def _values(run: Any, used: set[str]) -> Iterator[tuple[str, Any]]:
    """The values of a run that go into paths, with keys; missing ones are for DVC to say."""
    for item in sorted(used):
        key = item.removeprefix("item")
        value = value_at(run, key[1:]) if key else run
        if value is not None:
            yield key, value


def _shown(value: object) -> str:
    """A name as it is, anything else in quotes and cut, for a message to stay one line."""
    return str(value) if NAME.fullmatch(str(value)) else repr(str(value))[:100]


def check_stage(name: str) -> None:
    """Check the name of a stage, such as `sft` or `evaluate@sft`; raises PipelineError."""
    stage, at, run = name.partition("@")
    if not all(map(NAME.fullmatch, [stage, run] if at else [stage])):
        raise PipelineError(
            f"{_shown(name)}: no such stage; a stage is STAGE or STAGE@NAME, and {_RULE}"
        )

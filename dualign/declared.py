"""What dvc.yaml says that a stage reads, and what of it was written meanwhile.

DVC hashes what a stage read when it has ended: a file that was replaced while it ran is recorded as
what its result is of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dualign.core.artifacts import listed
from dualign.params.loading import read_yaml

GRAPH = Path("dvc.yaml")
#: Dependencies that are code.
_CODE = ("dualign/", "stages/")
_TEMPLATE = re.compile(r"\$\{([\w.]+)\}")
#: Size and time of writing of each file.
State = dict[Path, tuple[int, int]]


def data_of(stage: str, item: str | None, params: Path) -> list[Path]:
    """The data and models that a stage, or an instance of it, reads by dvc.yaml; none without."""
    entry = (_value(read_yaml(GRAPH), f"stages.{stage}") or {}) if GRAPH.is_file() else {}
    values = read_yaml(params)
    definition = entry.get("do", entry)
    if item is not None and "foreach" in entry:
        values["item"] = _value(_value(values, _TEMPLATE.findall(entry["foreach"])[0]), item)
    return [
        Path(_TEMPLATE.sub(lambda found: str(_value(values, found[1])), path))
        for path in definition.get("deps", ())
        if not path.startswith(_CODE)
    ]


def state(paths: list[Path]) -> State:
    """The state of these files and of all in these folders, but for what is hidden there."""
    found: State = {}
    for path in paths:
        for file in listed(path, "**/*") if path.is_dir() else [path]:
            if file.is_file():
                told = file.stat()
                found[file] = (told.st_size, told.st_mtime_ns)
    return found


def changed(before: State, after: State) -> list[str]:
    """The files that are not as they were, or not there any more, or new.

    >>> one, two = Path("one"), Path("two")
    >>> changed({one: (3, 10), two: (4, 10)}, {one: (3, 10), two: (4, 20)})
    ['two']
    """
    paths = sorted({*before, *after})
    return [str(path) for path in paths if before.get(path) != after.get(path)]


def _value(content: Any, key: str) -> Any:
    """The value of a dotted key; None where there is none, which the stage tells of."""
    for name in key.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content

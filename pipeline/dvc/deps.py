"""Keep the code dependencies in `dvc.yaml` equal to what the stage scripts import.

DVC reruns a stage when a file changes that the stage lists, so each stage lists its script, every
module of this repository that the script imports, directly or through another, and every data file
(a page template, say) that one of them names. A package that its stages need as a whole counts as
one dependency, its folder: DVC's time goes by the number of dependencies. The types of params are
no dependency: what a stage reads of `params.yaml` is one, value by value; nor are checks that only
refuse. Nobody keeps such lists right by hand:

    python -m pipeline.dvc.deps           # say what is wrong, exit 1
    python -m pipeline.dvc.deps --write   # put it right
"""

from __future__ import annotations

import argparse
import ast
import functools
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

PROG = "python -m pipeline.dvc.deps"
ROOT = Path(__file__).resolve().parents[2]
CODE_ROOTS = ("dualign", "stages")
#: Folders that are one dependency: who lists one needs nearly all of it, and `dual_search`, alone,
#: all of `dualign/search`.
FOLDERS = ("dualign/core", "dualign/lm", "dualign/report", "dualign/scoring", "dualign/search")
#: Types of params, of which DVC tracks the values, and checks before a run: no result depends on
#: their source.
UNTRACKED = ("dualign/params/", "dualign/checks.py")

#: Conditions that are false as a stage runs.
_TYPES = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
_COMMAND = "__name__ == '__main__'"

_Import = ast.Import | ast.ImportFrom

logger = logging.getLogger(__name__)


class ImportRefused(ValueError):
    """An import whose target file cannot be told from the source."""


@dataclass(frozen=True)
class Difference:
    """The code dependencies that one stage lacks, and those that it lists without need."""

    stage: str
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"+     - {path}" for path in self.missing] + [
            f"-     - {path}" for path in self.extra
        ]
        return "\n".join([f"dvc.yaml: {self.stage}: deps:", *lines])


def closure(script: str, root: Path = ROOT) -> list[str]:
    """The files or `FOLDERS` that `script` needs, itself first, then sorted, relative to `root`.

    Follows absolute imports of this repository's modules, inside functions too, but not those that
    never run: under `TYPE_CHECKING`, and under `if __name__ == "__main__"` of a module that is
    imported. A package's `__init__.py` is left out: it must hold no code that a stage relies on.

    Raises:
        ImportRefused: a relative import, or a name taken from a package instead of the module that
            defines it.
    """
    modules: set[Path] = set()
    waiting = [root / script]
    data = _data_files(root)
    while waiting:
        path = waiting.pop()
        if path in modules or path.relative_to(root).as_posix().startswith(UNTRACKED):
            continue
        modules.add(path)
        if path.suffix == ".py":
            idle = _TYPES if path == root / script else (*_TYPES, _COMMAND)
            imports, strings = _read_source(path.read_text(), str(path), idle)
            waiting += _imported(imports, path.relative_to(root), root)
            waiting += [file for text in strings for file in data.get(text, ())]
    others = {_dependency(path.relative_to(root).as_posix()) for path in modules - {root / script}}
    return [script, *sorted(others)]


def _dependency(path: str) -> str:
    """The folder that stands for a file, or the file itself."""
    return next((folder for folder in FOLDERS if path.startswith(f"{folder}/")), path)


@functools.cache
def _read_source(source: str, name: str, idle: tuple[str, ...]) -> tuple[list[_Import], set[str]]:
    """A module's imports that run, and the last path component of each of its strings.

    Seventeen stages share most of their modules, so what is read of one is kept."""
    tree = ast.parse(source, filename=name)
    imports = [node for node in _running(tree, idle) if isinstance(node, _Import)]
    return imports, _strings(tree)


def _imported(imports: Iterable[_Import], path: Path, root: Path) -> Iterator[Path]:
    for node in imports:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif node.level:
            raise ImportRefused(
                f"{path}:{node.lineno}: relative import; write the module's full name"
            )
        else:
            modules = [_submodule(node.module or "", alias.name, root) for alias in node.names]
        for module in modules:
            if module.split(".")[0] in CODE_ROOTS:
                yield _module_file(module, f"{path}:{node.lineno}", root)


def _running(node: ast.AST, idle: tuple[str, ...]) -> Iterator[ast.AST]:
    """The nodes of a tree without the bodies of those `if` whose condition is one of `idle`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in idle:
            continue
        yield child
        yield from _running(child, idle)


def _submodule(module: str, name: str, root: Path) -> str:
    """`module.name` where that is a module or package, else `module`, which defines `name`."""
    place = root.joinpath(*module.split("."), name)
    return f"{module}.{name}" if place.with_suffix(".py").is_file() or place.is_dir() else module


def _module_file(module: str, where: str, root: Path) -> Path:
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        raise ImportRefused(
            f"{where}: {module} is not a module of its own; import from the file that defines the"
            " name"
        )
    return path


def _data_files(root: Path) -> dict[str, list[Path]]:
    """Files in the rooms that are not Python, by file name."""
    files: dict[str, list[Path]] = {}
    for room in CODE_ROOTS:
        for path in sorted((root / room).rglob("*")):
            if path.is_file() and path.suffix not in {".py", ".pyc"}:
                files.setdefault(path.name, []).append(path)
    return files


def _strings(tree: ast.AST) -> set[str]:
    """The last path component of every string in a tree."""
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value.rsplit("/", 1)[-1] for value in constants if isinstance(value, str)}


def script_of(definition: dict[str, Any]) -> str:
    """A stage's script, from `python -m stages.sft` or `python -m stages.evaluate ${key}`."""
    module = definition["cmd"].split()[2]
    return str(module).replace(".", "/") + ".py"


def is_code(dep: str) -> bool:
    """Whether a dependency is a file or folder of this repository's code."""
    return dep.split("/")[0] in CODE_ROOTS


def differences(root: Path = ROOT) -> list[Difference]:
    """What is wrong with the code dependencies in dvc.yaml, stage by stage."""
    lines = []
    for name, definition in _definitions(_read(root)).items():
        needed = closure(script_of(definition), root)
        listed = [dep for dep in definition["deps"] if is_code(dep)]
        missing = tuple(path for path in needed if path not in listed)
        extra = tuple(path for path in listed if path not in needed)
        if missing or extra:
            lines.append(Difference(name, missing, extra))
    return lines


def write(root: Path = ROOT) -> None:
    """Rewrite code dependencies in dvc.yaml; comments, other keys and their order stay."""
    document = _read(root)
    for definition in _definitions(document).values():
        data = [dep for dep in definition["deps"] if not is_code(dep)]
        definition["deps"] = [*closure(script_of(definition), root), *data]
    temporary = root / ".dvc.yaml.tmp"
    with temporary.open("w") as stream:
        _yaml().dump(document, stream)
    temporary.replace(root / "dvc.yaml")


def _definitions(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: stage.get("do", stage) for name, stage in document["stages"].items()}


def _read(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = _yaml().load(root / "dvc.yaml")
    return content


def _yaml() -> YAML:
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 120
    return yaml


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The parser of this command."""
    made = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").split("\n\n")[0])
    made.add_argument("--write", action="store_true", help="rewrite dvc.yaml")
    return made


def main(argv: list[str] | None = None, root: Path = ROOT, prog: str = PROG) -> int:
    """The command, called `prog`; returns its exit status."""
    logging.basicConfig(format="%(message)s")
    arguments = parser(prog).parse_args(argv)
    try:
        if arguments.write:
            write(root)
        lines = differences(root)
    except (ImportRefused, FileNotFoundError) as error:
        logger.error("%s", error)
        return 2
    for difference in lines:
        logger.error("%s", difference)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())

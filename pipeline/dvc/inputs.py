"""Files of stages that neither git nor DVC holds: working trees of a commit and workers lack them.

Rows in data/raw, bases in models/base, templates and label files are such, for git ignores them.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dvc.repo import Repo

from pipeline import yaml_text
from pipeline.dvc import records
from pipeline.dvc.checkout import tracked_files
from pipeline.dvc.dag import StageSpec
from pipeline.errors import PipelineError

#: Files that a stage leaves for people when it exits 3, and those in which they answer, by the name
#: of their folder.
QUESTIONS = "to-label-*.jsonl"
ANSWERS = "labelled-*.jsonl"
#: Results of others about the policies of this workspace, or beside them: a run of other params has
#: other policies. Workers get those in JSON with the stage that reads them.
OWN = ("reports/seeds/", "reports/earlier/", "reports/harness/")


def check_held(root: Path, dag: Mapping[str, StageSpec], stages: Iterable[str]) -> None:
    """Raise PipelineError unless workers can have all inputs: by git, DVC or absolute path."""
    stages = list(stages)
    missing = [name for name in loose(root, dag, stages) if not _travels(name)]
    if not missing:
        with Repo(str(root)) as repo:
            missing = [
                path
                for path in sorted(_deps(dag, stages))
                if not tracked_files(root, path) and not records.written(repo, str(root / path))
            ]
    if missing:
        raise PipelineError(
            f"{missing[0]}: neither git nor DVC holds it, so workers cannot have it; "
            "`dvc add` a folder of such files, as docs/cluster.md says, or name an absolute path"
        )


def carry(root: Path, tree: Path, dag: Mapping[str, StageSpec]) -> None:
    """Link into a working tree of `root` what its stages read there and its commit lacks, but for
    labels of people and what is about the workspace's own run.
    """
    for name in carried(root, dag):
        path = tree / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(root / name)


def carried(root: Path, dag: Mapping[str, StageSpec]) -> list[str]:
    """The files that `carry` links."""
    return [name for name in loose(root, dag, dag) if not name.startswith(OWN)]


def results(root: Path, dag: Mapping[str, StageSpec], stages: Iterable[str]) -> dict[str, str]:
    """The results of others that stages read here and neither git nor DVC holds, by path."""
    return {name: _text(root, root / name) for name in filter(_travels, loose(root, dag, stages))}


def _travels(name: str) -> bool:
    return name.startswith(OWN) and name.endswith(".json")


def loose(root: Path, dag: Mapping[str, StageSpec], stages: Iterable[str]) -> list[str]:
    """Files that stages read in `root`, or params.yaml names, but neither git nor DVC holds.

    Raises PipelineError for a path that leads out of the workspace: it means another place in a
    working tree.
    """
    with Repo(str(root)) as repo:
        files = {
            name
            for path in _read(root, dag, stages)
            for name in tracked_files(root, path, "--others")
        }
        return [
            name
            for name in sorted(files)
            if not fnmatch.fnmatch(Path(name).name, QUESTIONS)
            and not fnmatch.fnmatch(Path(name).name, ANSWERS)
            and not repo.dvcignore.is_ignored_file(str(root / name))
            and not records.written(repo, str(root / name))
        ]


def _read(root: Path, dag: Mapping[str, StageSpec], stages: Iterable[str]) -> list[str]:
    paths = {os.path.normpath(path) for path in _deps(dag, stages) | set(_named(root))}
    outside = sorted(path for path in paths if path.startswith(".."))
    if outside:
        raise PipelineError(
            f"{outside[0]}: leads out of the workspace, so it would be another place where stages"
            " run in a working tree; name its absolute path in params.yaml"
        )
    return sorted(paths - {"."})


def _deps(dag: Mapping[str, StageSpec], stages: Iterable[str]) -> set[str]:
    return {dep for name in stages for dep in dag[name].deps if not Path(dep).is_absolute()}


def _named(root: Path) -> Iterator[str]:
    """The texts in params.yaml that are paths of something here."""
    for text in _texts(yaml_text.load(yaml_text.read(root / "params.yaml"))):
        if not Path(text).is_absolute() and _exists(root / text):
            yield text


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a path, or with a zero byte
        return False


def _texts(content: Any) -> Iterator[str]:
    """All texts in lists and mappings, those that are keys aside."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _texts(value)


# --- labels of people -----------------------------------------------------------------------------


def answers(root: Path) -> dict[str, str]:
    """The labels of people that lie in the workspace, by path."""
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return {
        file.relative_to(root).as_posix(): _text(root, file)
        for path in folders
        for file in path.rglob(ANSWERS)
    }


def _text(root: Path, file: Path) -> str:
    """A file's text. Raises PipelineError where it is none."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise PipelineError(
            f"{file.relative_to(root).as_posix()}: cannot be read ({why}), so it cannot travel with"
            " a stage; save it anew as UTF-8"
        ) from error


def _hidden(path: Path) -> bool:
    """Whether a file, or a folder that it is in, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def questions(tree: Path) -> dict[str, str]:
    """What a stage in a working tree asks people for, by path."""
    paths = [path.relative_to(tree) for path in sorted(tree.rglob(QUESTIONS))]
    whole = [path for path in paths if not _hidden(path)]
    return {path.as_posix(): (tree / path).read_text() for path in whole}

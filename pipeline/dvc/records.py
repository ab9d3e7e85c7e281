"""The records of dvc.lock: read, merged, and what they say of files that lie elsewhere.

A coordinator holds dvc.lock and no outputs. Whether a stage is up to date follows from the records
alone: what it read then, against what the stages before it wrote last and what git holds now.
Listings of folders, which are small, come from DVC's cache or remote."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dvc.repo import Repo
from dvc.utils.serialize import load_yaml, modify_yaml
from dvc_data.hashfile.hash import file_md5
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree

from pipeline.dvc.checkout import tracked_files
from pipeline.dvc.dag import StageSpec, readable_records
from pipeline.dvc.plan import StageStatus, status_of, statuses

#: The record of a stage, as dvc.lock has it.
Record = dict[str, Any]


def read(root: Path, stages: Iterable[str]) -> dict[str, Record]:
    """What dvc.lock holds about the last runs of some stages; those that never ran are left out.

    Raises PipelineError where it is damaged, as `merge` does."""
    path = root / "dvc.lock"
    with (
        readable_records(),
        Repo(str(root), _wait_for_lock=True) as repo,
        repo.lock,
    ):  # a stage that ends writes the file anew
        recorded = (load_yaml(str(path)).get("stages") or {}) if path.exists() else {}
    return {name: dict(recorded[name]) for name in stages if name in recorded}


def merge(root: Path, records: Mapping[str, Record]) -> None:
    """Put records into dvc.lock, in place of what it held about these stages."""
    with (
        readable_records(),
        Repo(str(root), _wait_for_lock=True) as repo,
        repo.lock,
        modify_yaml(str(root / "dvc.lock"), fs=repo.fs) as content,
    ):
        content.setdefault("schema", "2.0")
        content.setdefault("stages", {}).update(records)


def plan(
    root: Path, dag: Mapping[str, StageSpec], stages: Sequence[str] | None = None
) -> dict[str, StageStatus]:
    """The status of `stages`, or of all, in `dag`'s order, by records; no output need be there.

    A result that the run cache holds counts as stale: the node that runs the stage finds it.

    Raises PipelineError where DVC cannot tell.
    """
    return statuses(root, dag, stages, _status)


def _status(stage: Any, repo: Repo, settled: bool) -> StageStatus:
    return status_of(stage, list(_changes(stage, repo)), settled, lambda: False)


def written(repo: Repo, path: str) -> list[Any]:
    """The outputs, of stages and of `dvc add`, that lie at a path, in it, or around it."""
    return [
        out for out in repo.index.outs if _within(out.fs_path, path) or _within(path, out.fs_path)
    ]


def fetch_metrics(repo: Repo, stage: str) -> None:
    """Have DVC's cache hold a stage's metrics by dvc.lock, from the remote if need be."""
    metrics = [
        out for out in repo.index.outs if out.metric and out.stage.name == stage and out.hash_info
    ]
    for out in metrics:
        for odb, objects in out.get_used_objs().items():
            repo.cloud.pull(objects, odb=odb)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}{os.sep}")


def _changes(stage: Any, repo: Repo) -> Iterator[Any]:
    """What differs from the record, in the form of DVC's `stage.status()`."""
    if stage.changed_stage():
        yield "changed command"
    changed: dict[str, Any] = {}
    for dep in stage.deps:
        outs = [] if hasattr(dep, "params") else written(repo, dep.fs_path)
        if not outs:
            changed.update(dep.status())
        elif (
            dep.hash_info.value is None
            or _recorded_hash(repo, dep.fs_path, outs) != dep.hash_info.value
        ):
            changed[dep.def_path] = "modified"
    if changed:
        yield {"changed deps": changed}


def _recorded_hash(repo: Repo, path: str, outs: Sequence[Any]) -> str | None:
    """The hash of a path with all `outs` in place; None where listings cannot be had."""
    for out in outs:
        if out.fs_path == path:
            return out.hash_info.value if out.hash_info else None
    files: dict[tuple[str, ...], str] = dict(_committed(repo, path))
    for out in outs:
        listing = _listing(out)
        if listing is None:
            return None
        files.update((key, value) for key, value in _below(listing, out.fs_path, path))
    if () in files:
        return files[()]
    tree = Tree()
    for key, value in files.items():
        tree.add(key, None, HashInfo("md5", value))
    tree.digest()
    return str(tree.hash_info.value)


def _listing(out: Any) -> list[tuple[tuple[str, ...], str]] | None:
    """The files of an output as (parts of the path in it, hash)."""
    if not out.hash_info:
        return None
    if not out.hash_info.isdir:
        return [((), out.hash_info.value)]
    tree = out.get_dir_cache()
    return None if tree is None else [(key, hash_info.value) for key, _, hash_info in tree]


def _below(
    listing: Iterable[tuple[tuple[str, ...], str]], out: str, path: str
) -> Iterator[tuple[tuple[str, ...], str]]:
    """The files of an output that lie at or in `path`, by the parts of their path in it."""
    wanted = Path(path).parts
    for key, value in listing:
        parts = (*Path(out).parts, *key)
        if parts[: len(wanted)] == wanted:
            yield parts[len(wanted) :], value


def _committed(repo: Repo, path: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The files in a folder that git holds and DVC does not ignore."""
    for name in tracked_files(Path(repo.root_dir), path):
        file = Path(repo.root_dir, name)
        if file.is_file() and not repo.dvcignore.is_ignored_file(str(file)):
            yield file.relative_to(path).parts, file_md5(str(file), repo.fs, name="md5")

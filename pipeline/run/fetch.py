"""Put outputs that dvc.lock records into the workspace, from DVC's cache or remote.

    python fetch.py PATH...

`dvc pull PATH...` does the same a third of a second a path, and a report reads ninety. A command of
its own, so that it can be stopped; no module of this repository is imported, for it to run from any
tree."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.repo import Repo


def fetch(root: Path, paths: Collection[str]) -> str:
    """Fetch the outputs at `paths`, relative to `root`; returns how much that was, in words.

    Raises DvcException where neither cache nor remote has one, where the remote does not do, or
    where it would overwrite what DVC does not hold."""
    wanted = {str(root / path) for path in paths}
    with Repo(str(root), _wait_for_lock=True) as repo, repo.lock:
        outs = [out for out in repo.index.outs if out.fs_path in wanted]
        imported = [out.fs_path for out in outs if out.stage.is_repo_import]
        with _told():
            transferred = _pulled(repo, [out for out in outs if out.changed_cache()])
        for out in outs:
            if out.stage.is_repo_import:
                continue
            if out.changed_cache():
                raise DvcException(f"{out.def_path}: neither DVC's cache nor its remote has it")
            out.checkout()
    if imported:
        with _told(), Repo(str(root), _wait_for_lock=True) as repo:
            repo.pull(imported)
    return f"{len(outs)} outputs fetched, {transferred} files of them from the remote"


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Around what asks a remote: raises DvcException for whatever its kind of storage raises."""
    try:
        yield
    except DvcException:
        raise
    except Exception as error:
        told = str(error) or type(error).__name__
        raise DvcException(f"the DVC remote does not do: {told}") from error


def _pulled(repo: Repo, outs: Collection[object]) -> int:
    """Have the cache hold outputs; returns how many files of them came from a remote."""
    transferred = 0
    for odb, objects in _used(outs).items():
        done = repo.cloud.pull(objects, odb=odb)
        if done.failed:
            raise DvcException(f"{len(done.failed)} files could not be fetched")
        transferred += len(done.transferred)
    return transferred


def _used(outs: Collection[object]) -> dict[object, set[object]]:
    """The objects of all outputs, by the storage that has them; None is the default remote."""
    used: dict[object, set[object]] = {}
    for out in outs:
        for odb, objects in out.get_used_objs().items():  # type: ignore[attr-defined]
            used.setdefault(odb, set()).update(objects)
    return used


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{fetch(Path.cwd(), sys.argv[1:])}\n")
    except DvcException as error:
        sys.exit(f"ERROR: {' '.join(str(error).split())}")

"""What may be wrong with a workspace and its surroundings, each finding with its remedy."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dvc.config import ConfigError
from dvc.exceptions import DvcException
from dvc.repo import Repo

from pipeline.dvc import locks
from pipeline.dvc.checkout import asked, complaint, default_remote
from pipeline.dvc.dag import load_dag
from pipeline.dvc.damage import damages
from pipeline.dvc.plan import one_line
from pipeline.errors import PipelineError, fault
from pipeline.pins import canonical, pins
from pipeline.prefect import identity, server
from pipeline.prefect.artifacts import size
from pipeline.run.runner import exclusive
from pipeline.run.slots import visible_gpus

#: Free disk below which a run is likely to fail.
ROOM = 5 * 2**30


@dataclass(frozen=True)
class Finding:
    """`wrong` keeps a run from working, `note` is worth knowing."""

    level: Literal["ok", "note", "wrong"]
    what: str


def examine(root: Path, api: str, thorough: bool = False) -> Iterator[Finding]:
    """All findings about the workspace `root` and the Prefect server at `api`, quick ones first.

    `thorough` reads all of DVC's cache.
    """
    yield from _graph(root)
    yield from _pins(root)
    yield from _git(root)
    yield from _dvc(root)
    yield from _damages(root, thorough)
    yield from _locks(root)
    yield _disk(root)
    yield _gpus()
    yield _workspace(root)
    yield _server(api)


def _graph(root: Path) -> Iterator[Finding]:
    try:
        dag = load_dag(root)
    except (DvcException, PipelineError) as error:
        yield Finding("wrong", f"dvc.yaml, params.yaml: {one_line(error)}")
        return
    yield Finding("ok", f"dvc.yaml: {len(dag)} stages")


def _pins(root: Path) -> Iterator[Finding]:
    path = root / "constraints.txt"
    if not path.exists():
        yield Finding(
            "note", "constraints.txt: not here, so the versions of packages are not checked"
        )
        return
    wanted = {canonical(name): version for name, version in pins(path.read_text()).items()}
    installed = _installed()
    other = [
        f"{name} {installed[name]} (tested with {version})"
        for name, version in wanted.items()
        if name in installed and installed[name].split("+")[0] != version
    ]
    if other:
        yield Finding(
            "note",
            f"versions: {', '.join(other)}; pip install -e . -c constraints.txt brings them back",
        )
    else:
        yield Finding(
            "ok", f"versions: Python {sys.version.split()[0]}, packages as in constraints.txt"
        )


def _installed() -> dict[str, str]:
    """Versions by package; what an interrupted pip leaves behind has no name, and is none."""
    found = importlib.metadata.distributions()
    return {
        canonical(dist.metadata["Name"]): dist.version for dist in found if "Name" in dist.metadata
    }


def _git(root: Path) -> Iterator[Finding]:
    answer = asked(root, "status", "--porcelain")
    if "not a git repository" in answer.stderr:
        yield Finding("note", "git: not a repository, so results cannot be traced to a commit")
        return
    if answer.returncode:
        yield Finding("wrong", f"git: {complaint(answer.stderr)}")
        return
    changed = [line[3:] for line in answer.stdout.splitlines() if line[3:] != "dvc.lock"]
    if changed:
        yield Finding(
            "note", f"git: {len(changed)} files differ from the last commit, first {changed[0]}"
        )
    else:
        yield Finding("ok", "git: as committed")


def _dvc(root: Path) -> Iterator[Finding]:
    try:
        with Repo(str(root)) as repo:
            remote = repo.config["core"].get("remote")
            found, _ = default_remote(repo)
            reached = _reach(repo)
            types = list(repo.cache.local.cache_types)
            cache = Path(repo.cache.local.path)
    except DvcException as error:
        yield Finding("wrong", f"DVC: {one_line(error)}; {_remedy(error)}")
        return
    if not remote:
        yield Finding(
            "note", "DVC remote: none; results stay on this machine (`dvc remote add -d NAME URL`)"
        )
    elif not found:
        yield Finding(
            "wrong",
            f"DVC remote: {remote} is the default and has no settings here; `dvc remote add"
            f" {remote} URL`",
        )
    elif reached:
        yield Finding(
            "wrong",
            f"DVC remote: {remote} cannot be reached: {reached}; `dvc remote modify {remote}` sets"
            " it up",
        )
    else:
        yield Finding("ok", f"DVC remote: {remote}")
    yield _cache(root, cache, types)


def _remedy(error: DvcException) -> str:
    """What makes a repository of DVC readable again. `dvc init` would not: its folder is there."""
    if isinstance(error, ConfigError):
        return (
            "mend .dvc/config or .dvc/config.local, or take it back by `git checkout .dvc/config`"
        )
    return "`git init` makes a repository of git, `dvc config core.no_scm true` does without"


def _cache(root: Path, cache: Path, types: Sequence[str]) -> Finding:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        told = f"DVC cache: {cache} cannot be made ({error.strerror})"
        return Finding("wrong", f"{told}; mount it, or `dvc cache dir FOLDER` names another")
    if types[:1] == ["hardlink"] and cache.stat().st_dev != root.stat().st_dev:
        told = f"DVC cache: {cache} is on another disk, so outputs are linked by symlink or copied"
        return Finding("note", told)
    if "hardlink" not in types and "symlink" not in types:
        remedy = "`dvc config cache.type hardlink,symlink,copy`"
        return Finding("note", f"DVC cache: outputs are kept twice; {remedy}")
    return Finding("ok", f"DVC cache: {cache}, links {', '.join(types)}")


def _reach(repo: Repo) -> str:
    """Why the default remote does not answer, in one line; empty where it does or is none."""
    if not repo.config["core"].get("remote"):
        return ""
    try:
        remote = repo.cloud.get_remote()
        if remote.fs.protocol == "local":  # its folder is made by the first push
            place = next(
                at for at in (Path(remote.path), *Path(remote.path).parents) if at.exists()
            )
            return (
                ""
                if place.is_dir() and os.access(place, os.W_OK)
                else f"{place} is no folder to write to"
            )
        remote.fs.ls(remote.path)
    except Exception as error:  # each kind of storage has its own
        return one_line(error) or type(error).__name__
    return ""


def _damages(root: Path, thorough: bool) -> Iterator[Finding]:
    with contextlib.suppress(DvcException):  # another finding tells why DVC cannot read its files
        for damage in damages(root, thorough):
            yield Finding("wrong", f"DVC cache: {damage.told}")


def _locks(root: Path) -> Iterator[Finding]:
    try:
        with exclusive(root):
            findings = list(_dvc_locks(root))
    except PipelineError as error:
        yield Finding("note", f"locks: {error}")
        return
    except OSError as error:  # a full disk, or one that is for reading only
        yield Finding("wrong", f"locks: {fault(error) or error}")
        return
    yield from findings or [Finding("ok", "locks: no run is going on")]


def _dvc_locks(root: Path) -> Iterator[Finding]:
    """What DVC's locks tell while no run of this pipeline is going on."""
    try:
        whole = locks.whole(root)
        holders = locks.holders(root)
    except PipelineError as error:
        yield Finding("wrong", f"locks: {error}")
        return
    except DvcException:  # its configuration is broken, which another finding tells
        return
    if whole:
        yield Finding("note", f"locks: {whole}")
    for holder in holders:
        yield Finding("wrong" if holder.replaced else "note", f"locks: {holder.told}")
    for process in locks.orphans(root, [holder.pid for holder in holders]):
        # DVC starts a stage by $SHELL, and not every shell hands its own process over to the
        # command
        numbers = " ".join(str(one.pid) for one in [process, *process.children(recursive=True)])
        yield Finding(
            "wrong",
            f"locks: `{' '.join(process.cmdline())}` (process {process.pid}) runs on, the stage of"
            f" a dvc that was killed; kill {numbers} before the next run",
        )


def _disk(root: Path) -> Finding:
    free = shutil.disk_usage(root).free
    if free < ROOM:
        return Finding(
            "wrong",
            f"disk: {size(free)} free; `dvc gc --workspace` removes results that nothing uses",
        )
    return Finding("ok", f"disk: {size(free)} free")


def _gpus() -> Finding:
    gpus = visible_gpus()
    if not gpus:
        return Finding("note", f"GPU: none; stages run on the CPU ({os.cpu_count()} cores)")
    return Finding("ok", f"GPU: {len(gpus)} ({', '.join(gpus)})")


def _server(api: str) -> Finding:
    wrong = server.problem(api)
    if not wrong:
        return Finding("ok", f"Prefect server: {api}")
    if server.reachable(api) or server.origin(api):
        return Finding("wrong", f"Prefect server: {wrong}")
    return Finding(
        "note", f"Prefect server: none at {api}; `prefect server start` gives you the pages"
    )


def _workspace(root: Path) -> Finding:
    try:
        return Finding("ok", f"workspace: {identity.name(root)}, {identity.place(root)}")
    except PipelineError as error:
        return Finding("wrong", f"workspace: {error}")

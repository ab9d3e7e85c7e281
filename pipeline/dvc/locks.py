"""DVC's locks on a workspace: who holds them, and what DVC means where it speaks of them.

`.dvc/tmp/lock` is held while DVC looks at the whole workspace. `.dvc/tmp/rwlock` names, file by
file, the commands that read and write while a stage runs; a command that was killed stays in it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from dvc.lock import LockError, make_lock
from dvc.repo import Repo
from dvc.rwlock import SCHEMA, Invalid

from pipeline.errors import PipelineError

LOCK = Path(".dvc/tmp/lock")
RWLOCK = Path(".dvc/tmp/rwlock")
#: What keeps every command from working until somebody acts.
DAMAGED = (
    f"DVC's list of locks, {RWLOCK}, is empty or damaged, as a full disk leaves it; "
    f"while no dvc command runs here, rm {RWLOCK}"
)
BUSY = (
    f"another dvc command holds this workspace; wait for it, or if none runs here, rm {LOCK}"
    f" {RWLOCK}.lock"
)
_BLOCKER = re.compile(r"\(PID (\d+)\): (.*?)\s*(?=\(PID \d|If there are no processes|$)")


@dataclass(frozen=True)
class Holder:
    """A command, as `.dvc/tmp/rwlock` has it: its process, and the words that started it."""

    pid: int
    command: str

    @property
    def name(self) -> str:
        """The command as one types it."""
        program, _, rest = self.command.partition(" ")
        name = Path(program).name
        if name == "__main__.py":
            module = Path(program).parent.name
            name = module if module == "dvc" else f"python -m {module}"
        return f"{name} {rest}".strip()

    @property
    def killed(self) -> bool:
        """Whether nothing goes on under its number."""
        return not psutil.pid_exists(self.pid)

    @property
    def replaced(self) -> bool:
        """Whether another program has its number now; DVC takes that one for it, and waits."""
        try:
            words = " ".join(psutil.Process(self.pid).cmdline()).split()
        except psutil.Error:
            return False
        rest = self.command.split()[1:]
        return bool(rest) and words[-len(rest) :] != rest

    @property
    def told(self) -> str:
        """What it means for a run, with the remedy."""
        if self.killed:
            return f"`{self.name}` was killed; DVC passes over its locks by itself"
        if self.replaced:
            return (
                f"`{self.name}` was killed, and DVC takes another program, process {self.pid}, for"
                f" it; while no dvc command runs here, rm {RWLOCK}"
            )
        return (
            f"`{self.name}` (process {self.pid}) uses this workspace; wait for it, then run again"
        )


def holders(root: Path) -> list[Holder]:
    """The commands that read or write files of the workspace, and those that were killed at it.

    Raises PipelineError where DVC cannot read its own list, or does not let it go.
    """
    with Repo(str(root)) as repo:
        hardlink = repo.config["core"].get("hardlink_lock", False)
    try:
        with make_lock(
            str(root / f"{RWLOCK}.lock"), tmp_dir=str(root / RWLOCK.parent), hardlink_lock=hardlink
        ):
            content = json.loads((root / RWLOCK).read_text())
        lists = [*SCHEMA(content)["read"].values(), SCHEMA(content)["write"].values()]
    except FileNotFoundError:
        return []
    except (ValueError, Invalid):
        raise PipelineError(DAMAGED) from None
    except LockError:
        raise PipelineError(
            f"{RWLOCK}.lock is held; if no dvc command runs here, rm {RWLOCK}.lock"
        ) from None
    return sorted(
        {Holder(info["pid"], info["cmd"]) for infos in lists for info in infos},
        key=lambda one: one.pid,
    )


def check_free(root: Path) -> None:
    """Raise PipelineError while a command works here: params.yaml, written anew, would be recorded
    for its stages, or have them fail at their end.
    """
    if (root / RWLOCK).exists():
        for holder in holders(root):
            if not holder.killed:
                raise PipelineError(holder.told)


def whole(root: Path) -> str:
    """Who holds the whole workspace for more than a moment, in one line; empty for nobody."""
    with Repo(str(root)) as repo:
        try:
            with repo.lock:
                return ""
        except LockError:
            text = (root / LOCK).read_text().strip()
    try:  # a lock by hard link names no process
        command = " ".join(psutil.Process(int(text)).cmdline())
    except (ValueError, psutil.Error):
        return BUSY
    return f"`{command}` (process {text}) looks at the whole workspace; a run waits for it"


def orphans(root: Path, working: Collection[int]) -> Iterator[psutil.Process]:
    """Commands of stages that outlived the DVC that started them; none of those `working`."""
    for process in filter(lambda one: _works_at(one, root), psutil.process_iter()):
        with contextlib.suppress(psutil.NoSuchProcess):
            above = process.parent()
            if above is None or not (above.pid in working or _works_at(above, root)):
                yield process


def _works_at(process: psutil.Process, root: Path) -> bool:
    """Whether DVC started it, or something above it, as the command of a stage here."""
    try:
        return process.environ().get("DVC_ROOT") == str(root.resolve())
    except psutil.Error:  # somebody else's, or just gone
        return False


def meaning(said: str) -> str:
    """What DVC says about its locks, in one line with the remedy; else what it says."""
    text = " ".join(said.split())
    if "RWLock-file" in text and ("corrupted" in text or "format error" in text):
        return DAMAGED
    blockers = [Holder(int(pid), command) for pid, command in _BLOCKER.findall(text)]
    if blockers:
        return blockers[0].told
    if "Unable to acquire lock" in text:
        return BUSY
    return text

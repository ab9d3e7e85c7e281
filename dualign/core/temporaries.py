"""Where files lie until they are whole, and how what a killed process left is told and removed.

A temporary is a folder `.tmp-NAME` beside a file `.tmp-NAME.lock`, which its process keeps locked.
The kernel lets go of the lock when the process ends, in whatever way; a process id would say
nothing once it is given again, or on another host."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".tmp-"
_LOCK = ".lock"


def scratch_root() -> Path:
    """The folder of checkpoints and temporaries: `.scratch`, or $DUALIGN_SCRATCH."""
    return Path(os.environ.get("DUALIGN_SCRATCH") or ".scratch")


def room_for(parent: Path) -> Path:
    """Where what is to be renamed into `parent` may lie: a folder on its file system.

    In a workspace that is `tmp` of the scratch folder, or of `.scratch` where $DUALIGN_SCRATCH is
    elsewhere: DVC looks into the folders of outputs, and would call them changed."""
    roots = [scratch_root()] if os.environ.get("DUALIGN_SCRATCH") else []
    roots += [Path(".scratch")] if Path("dvc.yaml").is_file() else []
    for room in [root / "tmp" for root in roots]:
        with contextlib.suppress(OSError):  # a place that cannot be used is done without
            room.mkdir(parents=True, exist_ok=True)
            if room.stat().st_dev == parent.stat().st_dev and os.access(room, os.W_OK):
                return room
    return parent


@contextlib.contextmanager
def temporary_folder(room: Path) -> Iterator[Path]:
    """A new folder in `room`, removed at the end; those of ended processes are removed now."""
    sweep(room)
    folder, held = _claim(room)
    try:
        folder.mkdir()
        yield folder
    finally:
        _remove(folder, held)


def sweep(room: Path) -> None:
    """Remove the temporaries in a folder whose processes are gone."""
    for lock in sorted(room.glob(f"{_PREFIX}*{_LOCK}")):
        with contextlib.suppress(OSError):  # another process was faster
            held = os.open(lock, os.O_RDWR)
            if _locked(held):
                _remove(lock.with_suffix(""), held)
            else:
                os.close(held)


def _claim(room: Path) -> tuple[Path, int]:
    """The name of a new temporary and the descriptor that holds its lock."""
    while True:
        folder = room / f"{_PREFIX}{secrets.token_hex(4)}"
        lock = _lock_of(folder)
        held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            free = _locked(held)
        except (
            OSError
        ):  # no locks on this file system: nothing here can be told from debris, or be taken for it
            return folder, held
        if free and lock.exists():  # or somebody who sweeps came between
            return folder, held
        os.close(held)


def _locked(descriptor: int) -> bool:
    """Take a file's lock; False where another has it. Raises OSError where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(folder: Path, held: int) -> None:
    """Remove a temporary whose lock is held; the lock last, or its folder would be nobody's."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        _lock_of(folder).unlink(missing_ok=True)
    os.close(held)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{_LOCK}")

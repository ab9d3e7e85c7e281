"""Errors that a user can act on: one line that names what is wrong and what to do."""

from __future__ import annotations

import errno
from pathlib import Path


class PipelineError(Exception):
    """The pipeline cannot run as asked; the command line prints it and exits with status 2."""


def fault(error: OSError | UnicodeEncodeError) -> str:
    """A file that cannot be had, or whose name is no UTF-8, or a full disk, in one line; empty for
    other errors."""
    if isinstance(error, UnicodeEncodeError):
        foreign = "\udc80" <= error.object[error.start] <= "\udcff"
        told = f"{error.object!a}: a name that is no UTF-8, which DVC cannot take; rename that file"
        return told if foreign else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if error.filename is None and not full:
        return ""
    remedy = "free space there" if full else "mend that"
    return f"{error.filename or Path.cwd()}: {error.strerror}; {remedy} and run again"


class StageStopped(Exception):
    """A stage did not end by itself: the run was cancelled."""


class StageFailed(Exception):
    """A stage ended with an error. `code` is its exit status, None where DVC did not start it."""

    def __init__(self, stage: str, reason: str, code: int | None) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = reason
        self.code = code

    @property
    def waiting(self) -> bool:
        """Whether it exits 3: it goes on once people have done what `reason` asks for."""
        return self.code == 3

    @property
    def lasting(self) -> bool:
        """Whether another attempt must end so too: stages exit 2 on input that they refuse."""
        return self.code == 2 or self.waiting

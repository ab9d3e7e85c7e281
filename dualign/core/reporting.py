"""What a stage tells the trackers of `resources.report_to` while it runs.

They live in a process of their own, `dualign.tracking.process`, that is fed through a pipe and
never waited for, but `PATIENCE` seconds at the end (`HASTE` where the stage has failed or was
stopped): one that hangs, or whose server is away, costs the stage no more, what they import touches
nothing here, and when the stage is killed they still close their run. Of several processes of a
stage the first reports."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dualign.core import ranks
from dualign.core.artifacts import write_fault
from dualign.core.errors import DualignError, ParamsError

log = logging.getLogger(__name__)

#: Seconds that a stage waits, at its end, for what trackers have not yet sent.
PATIENCE = 30.0
HASTE = 5.0
#: What is installed for each tracker, by the module that it is.
PACKAGES = {
    "wandb": "wandb",
    "mlflow": "mlflow-skinny",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "dvclive": "dvclive",
}
#: Bytes that may wait for a tracker that takes none.
_MOST = 2**22
#: In the folder of checkpoints, for as long as it is there: which run of the trackers goes on.
_IDENTITY = "tracker-run"


def tracking_root() -> Path:
    """The folder of what trackers write here: `tracking`, or $DUALIGN_TRACKING."""
    return Path(os.environ.get("DUALIGN_TRACKING") or "tracking")


class Reporter:
    """The trackers of one run of a stage, which begins with the first numbers."""

    def __init__(self, trackers: Sequence[str], name: str, params: Mapping[str, Any]) -> None:
        self._about = {"name": name, "params": _flat(params)}
        self._identity = secrets.token_hex(4)
        self._resumed = False
        self._begun = False
        self._unsent = b""
        self._process: subprocess.Popen[bytes] | None = self._start()
        self._send({"trackers": list(trackers), "folder": str(tracking_root().absolute())})

    def resume(self, scratch: Path) -> None:
        """Go on with the run of the trackers whose checkpoints lie in this folder."""
        if self._begun:
            return
        file = scratch / _IDENTITY
        if file.is_file():
            self._identity = file.read_text().strip()
            self._resumed = True
        else:
            file.write_text(self._identity)

    def report(self, values: Mapping[str, Any], step: int, group: str) -> None:
        """Numbers of one step; `group` is what the steps are of."""
        if not self._begun:
            self._begun = True
            identity = {"identity": self._identity, "resumed": self._resumed}
            self._send(self._about | identity)
        self._send({"group": group, "values": numbers_in(values), "step": step})

    def close(self, status: int) -> None:
        """The stage ends: let the trackers send what is left, and end them."""
        patience = HASTE if status else PATIENCE
        self._send({"status": status, "patience": patience})
        if self._process is None:
            return
        try:
            told, _ = self._process.communicate(self._unsent, timeout=patience + 1)
            _warn(told)
        except subprocess.TimeoutExpired:
            self._drop(f"took more than {patience:.0f} s to send what was left")

    def _start(self) -> subprocess.Popen[bytes]:
        root = tracking_root()
        try:
            root.mkdir(parents=True, exist_ok=True)
            written = (root / "trackers.log").open("ab")
        except OSError as error:
            raise DualignError(
                f"{root}: trackers cannot write there ({write_fault(error)}); name a folder that"
                " can be written in $DUALIGN_TRACKING, or empty resources.report_to"
            ) from error
        with written:
            process = subprocess.Popen(
                [sys.executable, "-m", "dualign.tracking.process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=written,
                start_new_session=True,
            )
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        return process

    def _send(self, message: Mapping[str, Any]) -> None:
        """Hand over as much as the pipe takes now; pass on what the trackers had to say."""
        if self._process is None:
            return
        assert self._process.stdin is not None and self._process.stdout is not None
        self._unsent += json.dumps(message).encode() + b"\n"
        try:
            self._unsent = self._unsent[os.write(self._process.stdin.fileno(), self._unsent) :]
        except BlockingIOError:
            if len(self._unsent) > _MOST:
                self._drop("take nothing")
                return
        except OSError:  # its end is told where it is waited for
            self._unsent = b""
        with contextlib.suppress(BlockingIOError):
            _warn(os.read(self._process.stdout.fileno(), 2**16))

    def _drop(self, why: str) -> None:
        assert self._process is not None
        log.warning(
            "the trackers of resources.report_to %s; they are told no more of this run, and %s has"
            " what they wrote",
            why,
            tracking_root(),
        )
        with self._process as process:
            process.kill()
        self._process = None


_reporter: Reporter | None = None


@contextlib.contextmanager
def reporting(trackers: Sequence[str], name: str, params: Mapping[str, Any]) -> Iterator[None]:
    """Within, `report` reaches these trackers, as a run called `name` with these params. Raises
    ParamsError for one that is not installed.
    """
    global _reporter
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ParamsError(
                f"resources.report_to names {tracker}, which is not installed; `pip install"
                f" {PACKAGES[tracker]}`, or take it off the list"
            )
    _reporter = Reporter(trackers, name, params) if trackers and ranks.rank() == 0 else None
    status = 1
    try:
        yield
        status = 0
    finally:
        if _reporter is not None:
            _reporter.close(status)
        _reporter = None


def report(values: Mapping[str, Any], step: int, group: str) -> None:
    """Tell the trackers numbers of one step; what is no number is left out, and nothing is done
    where nobody listens.
    """
    if _reporter is not None:
        _reporter.report(values, step, group)


def resume(scratch: Path) -> None:
    """Have the trackers go on with the run whose checkpoints lie in this folder."""
    if _reporter is not None:
        _reporter.resume(scratch)


def numbers_in(content: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of nested mappings, by dotted key.

    >>> numbers_in({"kl": 0.5, "cost": {"mean": 1, "name": "c"}})
    {'kl': 0.5, 'cost.mean': 1}
    """
    return {key: value for key, value in _flat(content).items() if _is_number(value)}


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key; a list is a text."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, str | int | float)
            found[f"{prefix}{key}"] = value if plain else json.dumps(value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _warn(told: bytes) -> None:
    for line in told.decode(errors="replace").splitlines():
        log.warning("%s", line)

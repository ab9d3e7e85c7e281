"""Run a stage in a workspace as a DVC command, follow its output, stop it with nothing left.

The command is `dvc repro --single-item` in a process of its own: DVC as a library lets a stage
write past every log and cannot be stopped. `--wait-for-lock` matters: a stage that ends while
another is being hashed would else be lost."""

from __future__ import annotations

import collections
import contextlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Literal

from pipeline.dvc.locks import meaning
from pipeline.errors import StageFailed, StageStopped
from pipeline.holding import held

#: How a stage ended well: it ran, DVC found nothing to do, or DVC had its result from an earlier
#: run.
Outcome = Literal["Completed", "Unchanged", "Restored"]
#: Takes a level of `logging` and one line.
Log = Callable[[int, str], None]

_GUARD = Path(__file__).with_name("guard.py")
_FETCH = Path(__file__).with_name("fetch.py")
_STAMP = re.compile(r"\d\d:\d\d:\d\d ([DIWEC]) (.*)")
_LEVELS = {
    "D": logging.DEBUG,
    "I": logging.INFO,
    "W": logging.WARNING,
    "E": logging.ERROR,
    "C": logging.CRITICAL,
}
#: Characters of a reason that are shown; the log has the whole line.
LONGEST = 1000
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[@-~]")  # colours, and moves of the cursor
_BAR = re.compile(r"\d+%\||\d+it \[\d\d:")
_NOISE = re.compile(
    r"\s*$|To track the changes with git|To enable auto staging|\tgit add |\tdvc config core|Use"
    r" `dvc push`"
    r"|(Generating|Updating) lock file "
)


@contextlib.contextmanager
def exclusive(root: Path) -> Iterator[int]:
    """Hold the workspace for one run; yields a descriptor that holds it where it is passed on.

    Raises PipelineError while another run, or a stage that still stops, holds it.
    """
    with held(root / ".dvc" / "tmp" / "run.lock", "another run uses this workspace") as lock:
        yield lock


class LocalRunner:
    """Runs stages in the workspace `root`, any number side by side.

    `lock` is the descriptor from `exclusive`, which a stage holds too until it has ended. With
    `pull`, inputs and earlier results that lie in the DVC remote alone count as well."""

    def __init__(self, root: Path, lock: int, pull: bool = False) -> None:
        self._root = root
        self._lock = lock
        self._pull = pull
        self._guards: set[subprocess.Popen[bytes]] = set()
        self._mutex = threading.Lock()
        self.stopped = False

    def run(
        self, stage: str, log: Log, environment: Mapping[str, str], force: bool = False
    ) -> Outcome:
        """Run one stage whose upstream stages are up to date.

        Every line of output goes to `log`, with the level that the stage gave it.

        Raises:
            StageFailed: the stage, or DVC, reported an error.
            StageStopped: `stop` was called.
        """
        outcome: Outcome = "Completed"

        def follow(level: int, line: str) -> None:
            nonlocal outcome
            log(level, line)
            outcome = _outcome(stage, line) or outcome

        options = [*(["--force"] if force else []), *(["--pull"] if self._pull else [])]
        self._follow(
            [*_dvc(), "repro", "--single-item", *options, stage], stage, follow, environment
        )
        return outcome

    def pull(self, stage: str, paths: Sequence[str], log: Log) -> None:
        """Put the outputs at `paths` into the workspace, from cache or remote; raises as `run`."""
        if paths:
            self._follow([sys.executable, "-P", str(_FETCH), *paths], stage, log, {})

    def push(self, stage: str, log: Log) -> None:
        """Send a stage's results and the run cache, where others find them, to the DVC remote."""
        self._follow([*_dvc(), "push", "--run-cache", stage], stage, log, {})

    def _follow(
        self, command: Sequence[str], stage: str, log: Log, environment: Mapping[str, str]
    ) -> None:
        lines: collections.deque[tuple[int, str]] = collections.deque(maxlen=200)
        with self._started(command, stage, environment) as guard:
            assert guard.stdout is not None
            for level, line in read_lines(guard.stdout):
                lines.append((level, line))
                log(level, line)
            code = guard.wait()
        if self.stopped:
            raise StageStopped(stage)
        if code:
            raise failure(stage, list(lines))

    @contextlib.contextmanager
    def _started(
        self, command: Sequence[str], stage: str, environment: Mapping[str, str]
    ) -> Iterator[subprocess.Popen[bytes]]:
        with self._mutex:
            if self.stopped:
                raise StageStopped(stage)
            guard = subprocess.Popen(
                [sys.executable, "-P", str(_GUARD), *command],
                cwd=self._root,
                env={**_environment(), **environment},
                start_new_session=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[self._lock],
            )
            self._guards.add(guard)
        try:
            yield guard
        finally:
            _end(guard)
            with self._mutex:
                self._guards.discard(guard)

    def stop(self) -> None:
        """Stop what runs, start nothing more; returns once all ended and DVC's locks are free."""
        with self._mutex:
            self.stopped = True
            guards = list(self._guards)
        for guard in guards:
            _close(guard)
        for guard in guards:
            guard.wait()


def _dvc() -> list[str]:
    return [sys.executable, "-m", "dvc", "--wait-for-lock"]


def _environment() -> dict[str, str]:
    """This interpreter first on PATH, for dvc.yaml's `python`; output at once; no analytics."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1"}


def _close(guard: subprocess.Popen[bytes]) -> None:
    assert guard.stdin is not None
    with contextlib.suppress(OSError):
        guard.stdin.close()


def _end(guard: subprocess.Popen[bytes]) -> None:
    _close(guard)
    guard.wait()
    assert guard.stdout is not None
    guard.stdout.close()


def read_lines(stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    """The whole lines of a stage's output with their levels, without progress bars, colours and
    DVC's hints.

    A line that is overwritten in place (`\\r`) counts as it stands at its end. Closes the stream.
    """
    with io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            shown = line.rstrip("\r\n").rsplit("\r", 1)[-1]
            text = _CONTROL.sub("", shown).rstrip()
            if _NOISE.match(text) or _BAR.search(text):
                continue
            stamped = _STAMP.fullmatch(text)
            if stamped:
                yield _LEVELS[stamped[1]], stamped[2]
            else:
                yield _level(text), text


def _level(text: str) -> int:
    """The level of a line without one; a stage has told its failure better than DVC."""
    if text.startswith("ERROR: "):
        return logging.DEBUG if "exited with" in text else logging.ERROR
    return logging.INFO


def _outcome(stage: str, line: str) -> Outcome | None:
    if line == f"Stage '{stage}' didn't change, skipping":
        return "Unchanged"
    if line in (
        f"Stage '{stage}' is cached - skipping run, checking out outputs",
        f"Pulling data for stage: '{stage}'",
    ):
        return "Restored"
    return "Completed" if line == f"Unable to pull data for stage: '{stage}'" else None


def failure(stage: str, lines: list[tuple[int, str]]) -> StageFailed:
    """What went wrong, in one line: the stage's own error, else its last line, else DVC's.

    `lines` is the end of its output.
    """
    own = [(level, text) for level, text in lines if not text.startswith("ERROR: ")]
    dvc = " ".join(text.removeprefix("ERROR: ") for _, text in lines if text.startswith("ERROR: "))
    exited = re.search(r"exited with (-?\d+)", dvc)
    if exited is None:
        reason = re.sub(r"^failed to reproduce '[^']*': ", "", dvc)
        if "being blocked" in dvc:  # by whom is in the lines after it
            reason = " ".join([dvc, *(text for _, text in own)])
        return StageFailed(
            stage, meaning(reason) or "DVC ended without a word; see its output above", None
        )
    code = int(exited[1])
    number = -code if code < 0 else code - 128
    if number in {member.value for member in signal.Signals}:
        hint = "; the machine ran out of memory?" if number == signal.SIGKILL else ""
        return StageFailed(stage, f"killed by {signal.Signals(number).name}{hint}", code)
    errors = [text for level, text in own if level >= logging.ERROR]
    said = errors or [text for _, text in own if not text.startswith(("> ", "Running stage '"))]
    last = said[-1].strip() if said else "its command failed"
    cut = last if len(last) <= LONGEST else f"{last[:LONGEST]}..."
    return StageFailed(stage, f"{cut} (exit {code})", code)

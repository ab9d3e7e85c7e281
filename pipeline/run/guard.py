"""Run a DVC command and, once standard input ends, stop it so that nothing is left behind.

    python guard.py python -m dvc repro ...

DVC must not be signalled: it would die at once, its stage would train on as an orphan, and its lock
would stay. So the processes below DVC get SIGTERM and time to write a checkpoint, then SIGKILL; DVC
sees its command fail, releases its locks and exits. Whoever started the guard holds the other end
of its standard input, so the same happens when that process is killed. A DVC whose command ended
records the result, which takes minutes for a large model: it is waited for, or hours of training
would be lost. No module of this repository is imported, for the start to be quick."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

#: Seconds that a stage has to write a checkpoint. Prefect kills a cancelled flow 30 s after it
#: asked it to stop.
GRACE = 20.0
#: Seconds that DVC has to end where it has run no command yet: it looks, fetches, or waits.
RELEASE = 5.0
#: Seconds between two looks whether DVC runs a command.
LOOK = 0.5


def main(argv: list[str]) -> int:
    """Run the command `argv`; returns its exit status."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    ran = threading.Event()
    wake, alarm = os.pipe()

    def after(event: Callable[[], object]) -> None:
        event()
        os.write(alarm, b".")

    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os.write(alarm, b"."))
    for event in (lambda: os.read(sys.stdin.fileno(), 1), process.wait):
        threading.Thread(target=after, args=(event,), daemon=True).start()
    threading.Thread(target=notice, args=(process.pid, ran), daemon=True).start()
    os.read(wake, 1)
    if process.poll() is None:
        stop(process.pid, ran)
    return process.wait()


def notice(pid: int, ran: threading.Event) -> None:
    """Set `ran` once a process runs below `pid`. DVC itself starts none but its command, whose
    seconds the system of a Mac does not tell once it has ended.
    """
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        while not psutil.Process(pid).children():
            time.sleep(LOOK)
        ran.set()


def stop(pid: int, ran: threading.Event) -> None:
    """End the processes below `pid`, then wait for it to end; kill it only if it does not, and has
    no result to record, for no command `ran`.
    """
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        family = parent.children(recursive=True)
        _each(family, psutil.Process.terminate)
        psutil.wait_procs(family, timeout=GRACE)
        left = {*family, *_children(parent)}
        _each(left, psutil.Process.kill)
        patience = None if ran.is_set() else RELEASE
        if psutil.wait_procs([parent], timeout=patience)[1]:
            _each([*_children(parent), parent], psutil.Process.kill)


def _children(parent: psutil.Process) -> list[psutil.Process]:
    import psutil

    try:
        return list(parent.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _each(processes: Iterable[psutil.Process], signal_: Callable[[psutil.Process], None]) -> None:
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            signal_(process)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

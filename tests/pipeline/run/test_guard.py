"""Stopping a DVC: what has ended is recorded, what has not begun is not waited for."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from pipeline.run import guard

#: Works for a while, as a stage does.
WORK = "import subprocess; subprocess.run(['sleep', '2'])\n"
#: Then records what it made, with no process below it.
RECORD = "print('at it', flush=True); import time; time.sleep({}); print('recorded', flush=True)"


def stopped(code: str) -> tuple[str, int]:
    """What a command of Python, stopped at its first line, says after that, and how it ends."""
    command = [sys.executable, "-c", code]
    ran = threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        threading.Thread(target=guard.notice, args=(process.pid, ran), daemon=True).start()
        assert process.stdout is not None and process.stdout.readline() == "at it\n"
        thread = threading.Thread(target=guard.stop, args=(process.pid, ran))
        thread.start()
        said = process.stdout.read()
        thread.join(10)
        return said, process.wait()


def test_a_result_is_recorded_however_long_that_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC hashes and copies a model of 14 GB for half a minute; killed then, it would train anew.

    That a command ran was read from the processor's seconds of ended ones, which psutil has as 0
    on a Mac, and which are 0 of one that waits."""
    monkeypatch.setattr(guard, "RELEASE", 0.1)
    assert stopped(WORK + RECORD.format(1.5)) == ("recorded\n", 0)


def test_what_has_run_no_command_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "RELEASE", 0.1)
    assert stopped(RECORD.format(60)) == ("", -signal.SIGKILL)

"""A stage as a DVC command: how it ended, what it said, and that stopping it leaves nothing
behind.
"""

from __future__ import annotations

import io
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import psutil
import pytest
from dvc.lock import make_lock
from tqdm import tqdm

from pipeline.errors import PipelineError, StageFailed, StageStopped
from pipeline.run.runner import LONGEST, LocalRunner, exclusive, failure, read_lines
from tests.pipeline.project import Project, environment, until

Run = Callable[..., str]


@pytest.fixture
def runner(project: Project) -> Iterator[LocalRunner]:
    with exclusive(project.root) as lock:
        made = LocalRunner(project.root, lock)
        yield made
        made.stop()


@pytest.fixture
def log() -> list[tuple[int, str]]:
    return []


def test_the_ways_in_which_a_stage_ends_well(
    project: Project, runner: LocalRunner, log: list[tuple[int, str]]
) -> None:
    def run(force: bool = False) -> str:
        return runner.run("first", lambda *line: log.append(line), {}, force)

    assert run() == "Completed"
    assert (logging.INFO, "at work on first, GPU None") in log
    assert not [
        text for _, text in log if "git add" in text or "dvc push" in text or not text.strip()
    ]
    assert run() == "Unchanged"
    assert run(force=True) == "Completed"
    project.set(first={"value": 5})
    assert run() == "Completed"
    project.set(first={"value": 0})
    assert run() == "Restored"


def test_an_error_of_a_stage_is_told_in_its_own_words(
    project: Project, runner: LocalRunner, log: list[tuple[int, str]]
) -> None:
    project.set(first={"then": "refuse"})
    with pytest.raises(
        StageFailed, match=r"^first: params.yaml: rate must be positive \(exit 2\)$"
    ) as refused:
        runner.run("first", lambda *line: log.append(line), {})
    assert refused.value.lasting
    assert [text for level, text in log if level >= logging.ERROR] == [
        "params.yaml: rate must be positive"
    ]
    project.set(first={"then": "stumble"})
    with pytest.raises(
        StageFailed, match=r"first: ValueError: the disk hiccuped \(exit 1\)"
    ) as stumbled:
        runner.run("first", lambda *line: None, {})
    assert not stumbled.value.lasting


def test_what_dvc_refuses_is_told_too(project: Project, runner: LocalRunner) -> None:
    with pytest.raises(
        StageFailed, match=r"^left: .*No such file or directory.*out/first"
    ) as error:
        runner.run("left", lambda *line: None, {})
    assert error.value.code is None and "\n" not in str(error.value)


def test_a_stopped_stage_keeps_its_checkpoint_and_leaves_no_process_and_no_lock(
    project: Project, runner: LocalRunner, log: list[tuple[int, str]]
) -> None:
    project.set(first={"then": "wait"})
    ended: list[BaseException] = []

    def run() -> None:
        try:
            runner.run("first", lambda *line: log.append(line), {})
        except StageStopped as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: any("step 1" in text for _, text in log))
    runner.stop()
    thread.join(10)
    assert len(ended) == 1 and not project.processes() and not project.locks()
    assert (project.root / "kept/first").read_text() == "the checkpoint"
    with pytest.raises(StageStopped):
        runner.run("first", lambda *line: None, {})


def test_when_the_run_is_killed_its_stages_stop_and_hold_the_workspace_until_then(
    project: Project,
) -> None:
    project.set(first={"then": "wait"})
    code = (
        "import pathlib, sys; from pipeline.run.runner import LocalRunner, exclusive\nwith"
        " exclusive(pathlib.Path.cwd()) as lock:\n    LocalRunner(pathlib.Path.cwd(),"
        " lock).run('first', lambda level, line: print(line, flush=True), {})"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.Popen(
        command, cwd=project.root, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert any("step 1" in line for line in run.stdout)
    with pytest.raises(PipelineError, match=f"process {run.pid}"), exclusive(project.root):
        pass
    run.send_signal(signal.SIGKILL)
    run.wait()
    until(lambda: not project.processes())
    run.stdout.close()
    assert (project.root / "kept/first").read_text() == "the checkpoint" and not project.locks()
    with exclusive(project.root) as lock:
        lines: list[str] = []
        outcome = LocalRunner(project.root, lock).run(
            "first", lambda level, line: lines.append(line), {}
        )
    assert outcome == "Completed" and "resuming from the checkpoint" in lines


def test_lines_are_whole_and_bars_are_left_out() -> None:
    drawn = io.StringIO()
    with tqdm(total=10, desc="files", file=drawn, mininterval=0) as bar:
        bar.update(3)
    bars = drawn.getvalue().strip()
    assert "30%" in bars
    raw = (
        b"12:00:00 I one\n\n12:00:01 W two\r\n%s\rthree\n%s\n5it [00:01, 4.2it/s]\nERROR: failed to"
        b" reproduce 'x': exited with 1\nERROR: no space\n\tgit add dvc.lock\nbad \xff byte\n"
        b"\x1b[1;31m12:00:02 E red\x1b[0m\n\x1b[A\n" % (bars.encode(), bars.encode())
    )
    stream = io.BytesIO(raw)
    assert list(read_lines(stream)) == [
        (logging.INFO, "one"),
        (logging.WARNING, "two"),
        (logging.INFO, "three"),
        (logging.DEBUG, "ERROR: failed to reproduce 'x': exited with 1"),
        (logging.ERROR, "ERROR: no space"),
        (logging.INFO, "bad \N{REPLACEMENT CHARACTER} byte"),
        (logging.ERROR, "red"),
    ]
    assert stream.closed, "or Python would warn of a pipe that nobody closed"


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ("die 9", r"^first: killed by SIGKILL; the machine ran out of memory\?$"),
        ("exit 137", "^first: killed by SIGKILL; the machine ran out"),
        ("die 11", "^first: killed by SIGSEGV$"),
        ("exit 5", r"^first: the last word \(exit 5\)$"),
    ],
)
def test_reasons(project: Project, runner: LocalRunner, then: str, reason: str) -> None:
    project.set(first={"then": then})
    with pytest.raises(StageFailed, match=reason):
        runner.run("first", lambda *line: None, {})


def test_whoever_blocks_a_stage_is_named(project: Project, runner: LocalRunner) -> None:
    project.set(first={"then": "wait"})
    with project.start("repro", "first") as other:
        assert other.stdout is not None
        assert any("step 1" in line for line in other.stdout)
        told = (
            rf"^first: `dvc repro first` \(process {other.pid}\) uses this workspace; wait for it,"
            r" then run again$"
        )
        with pytest.raises(StageFailed, match=told):
            runner.run("first", lambda *line: None, {})
        for child in psutil.Process(other.pid).children():
            child.terminate()
    with (
        make_lock(str(project.root / ".dvc/tmp/rwlock.lock")),
        pytest.raises(StageFailed, match="another dvc command"),
    ):
        runner.run("first", lambda *line: None, {})


def test_a_reason_is_no_longer_than_a_page_shows() -> None:
    lines = [(logging.INFO, "x" * 3_000_000), (logging.ERROR, "ERROR: exited with 1")]
    assert failure("x", lines).reason == f"{'x' * LONGEST}... (exit 1)"


def test_a_stage_that_says_nothing_has_a_reason_too() -> None:
    with pytest.raises(StageFailed, match=r"its command failed \(exit 1\)"):
        raise failure("x", [(logging.ERROR, "ERROR: failed to reproduce 'x': exited with 1")])
    with pytest.raises(StageFailed, match="without a word"):
        raise failure("x", [])

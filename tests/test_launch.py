"""A stage in two processes: one writes, one line tells of a fault, and none outlives the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dualign import launch
from dualign.core.artifacts import read_json
from dualign.core.errors import ParamsError
from dualign.core.ranks import by_one, gathered, share, world
from dualign.params.loading import load_resources

ROOT = Path(__file__).resolve().parents[1]
#: A stage whose second process does what the argument says.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from dualign.core.artifacts import replacing
from dualign.core.errors import DataError
from dualign.core.ranks import gathered, rank, share, world
from dualign.params.dual import DualInitParams
from dualign.stage import execute

def main(run):
    Path(f"pid{rank()}").write_text(str(os.getpid()))
    if rank() == 1 and run.item == "refuses":
        raise DataError("rows.jsonl:3: no prompt")
    if rank() == 1 and run.item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank() == 1 and run.item == "errs":
        raise ZeroDivisionError("a bug")
    if run.item == "waits":
        time.sleep(60)
    with replacing("out") as folder:
        folder.mkdir()
        (folder / "by").write_text(str(rank()))
    assert (Path("out") / "by").read_text() == "0"
    squares = gathered([(i, i * i) for i in share(range(5))])
    run.metrics({"squares": [square for _, square in sorted(squares)], "world": world()})

if __name__ == "__main__":
    execute(main, DualInitParams)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    params = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(params.replace("processes: 1 ", "processes: 2 "))
    (tmp_path / "own.py").write_text(SCRIPT)
    return tmp_path


def begun(folder: Path, item: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "own", item],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(stage: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Its status, and the lines that it wrote."""
    out, told = stage.communicate(timeout=120)
    return stage.returncode, [*out.splitlines(), *told.splitlines()]


def test_all_work_and_one_writes(folder: Path) -> None:
    status, told = ended(begun(folder, "works"))
    assert status == 0, told
    metrics = read_json(folder / "reports/metrics/dual_init/works.json")
    assert metrics == {"squares": [0, 1, 4, 9, 16], "world": 2}
    assert read_json(folder / "reports/provenance/dual_init/works.json")["processes"] == 2
    assert len(told) == 1 and "dual_init/works done in" in told[0]
    assert not list(folder.rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("item", "status", "says"),
    [
        ("refuses", 2, "rows.jsonl:3: no prompt"),
        ("dies", 137, "process 1 of dual_init/dies was ended by SIGKILL"),
    ],
)
def test_the_end_of_one_is_one_line_and_the_end_of_all(
    folder: Path, item: str, status: int, says: str
) -> None:
    found, told = ended(begun(folder, item))
    assert found == status
    assert len(told) == 1 and says in told[0], told
    assert not (folder / "reports").exists()


def test_a_bug_of_one_keeps_its_traceback(folder: Path) -> None:
    status, told = ended(begun(folder, "errs"))
    assert status == 1
    assert told[-1] == "ZeroDivisionError: a bug"
    assert sum("Traceback" in line for line in told) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_none_outlives_the_process_that_was_called(folder: Path, number: signal.Signals) -> None:
    stage = begun(folder, "waits")
    pids = [folder / "pid0", folder / "pid1"]
    until(lambda: all(pid.exists() and pid.read_text() for pid in pids))
    stage.send_signal(number)
    status, told = ended(stage)
    if number == signal.SIGTERM:
        assert status == 130
        assert len(told) == 1 and "interrupted; checkpoints are kept" in told[0], told
    until(lambda: not any(alive(int(pid.read_text())) for pid in pids))


def alive(pid: int) -> bool:
    file = Path(f"/proc/{pid}/stat")
    return file.exists() and file.read_text().rpartition(")")[2].split()[0] != "Z"


def until(holds: object) -> None:
    assert callable(holds)
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_two_machines_meet(tmp_path: Path, folder: Path) -> None:
    """Two launchers of one process each, in one folder, as on a disk that two nodes share."""
    params = (folder / "params.yaml").read_text().replace("processes: 2 ", "processes: 1 ")
    (folder / "params.yaml").write_text(params.replace("nodes: 1 ", "nodes: 2 "))
    meeting = {launch.MEETING: "localhost:29461"}
    stages = [begun(folder, "works", **meeting) for _ in range(2)]
    ends = [ended(stage) for stage in stages]
    assert [status for status, _ in ends] == [0, 0], ends
    assert read_json(folder / "reports/metrics/dual_init/works.json")["world"] == 2


def test_a_fault_is_left_to_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder goes last, so one without has told of its end; one that is full tells nothing."""
    assert not launch.told("no prompt", 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one of several")
    for place in (tmp_path / "error.json", tmp_path / "gone" / "error.json"):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(place))
        assert launch.told("no prompt", 2)
    assert read_json(tmp_path / "error.json")["message"] == "no prompt"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/full")
    assert not launch.told("no prompt", 2)


def test_how_many_are_started() -> None:
    one = load_resources(ROOT / "params.yaml")
    assert not launch.several(one)
    assert launch.several(one.model_copy(update={"processes": 2, "device": "cpu"}))
    assert launch.count(one.model_copy(update={"processes": "auto", "device": "cpu"})) == 1


def test_machines_without_a_meeting_point_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (launch.MEETING, "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    two = load_resources(ROOT / "params.yaml").model_copy(update={"nodes": 2})
    with pytest.raises(ParamsError, match=r"resources.nodes is 2: run this command on each"):
        launch.start("sft", two)


def test_a_process_alone_is_all_of_them() -> None:
    assert (world(), share([1, 2, 3]), gathered([1, 2])) == (1, [1, 2, 3], [1, 2])
    with by_one() as mine:
        assert mine

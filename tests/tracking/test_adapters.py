"""What a stage reports is there for each tracker's own reader, also after a kill and a second run.

Each tool is tried where it is installed: `pip install -e '.[tracking]'`."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dualign.core import reporting
from dualign.core.reporting import PACKAGES, Reporter

Curve = list[tuple[int, float]]
ROOT = Path(__file__).resolve().parents[2]
KEY = "training/loss"


def wandb_curve(folder: Path) -> Curve:
    from wandb.proto.wandb_internal_pb2 import Record

    rows: Curve = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for raw in _records(file.read_bytes()):
            record = Record()
            record.ParseFromString(raw)
            if record.WhichOneof("record_type") == "history":
                keys = {
                    item.key or "/".join(item.nested_key): item.value_json
                    for item in record.history.item
                }
                if KEY in keys:
                    rows.append((int(keys["training/step"]), float(keys[KEY])))
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log, in blocks of 32 KiB, behind seven bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def mlflow_curve(folder: Path) -> Curve:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("dualign")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "dual_search/ours" and run.data.params["training.rate"] == "0.5"
    assert run.info.status == "FINISHED"
    return [(row.step, row.value) for row in client.get_metric_history(run.info.run_id, KEY)]


def tensorboard_curve(folder: Path) -> Curve:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    (place,) = (folder / "tensorboard").iterdir()
    events = EventAccumulator(str(place), size_guidance={"tensors": 0})
    events.Reload()
    return [(row.step, float(make_ndarray(row.tensor_proto))) for row in events.Tensors(KEY)]


def trackio_curve(folder: Path) -> Curve:
    with sqlite3.connect(folder / "trackio" / "dualign.db") as known:
        rows = known.execute("select step, metrics from metrics order by id").fetchall()
    found = [(step, json.loads(metrics)) for step, metrics in rows]
    return [(step, metrics[KEY]) for step, metrics in found if KEY in metrics]


def dvclive_curve(folder: Path) -> Curve:
    (place,) = (folder / "dvclive").iterdir()
    lines = (place / "plots" / "metrics" / f"{KEY}.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["step", "loss"]
    rows = (line.split("\t") for line in lines[1:])
    return [(int(step), float(loss)) for step, loss in rows]


CURVES: dict[str, Callable[[Path], Curve]] = {
    "wandb": wandb_curve,
    "mlflow": mlflow_curve,
    "tensorboard": tensorboard_curve,
    "trackio": trackio_curve,
    "dvclive": dvclive_curve,
}
EVERY = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
        ),
    )
    for name in PACKAGES
]

#: A stage that is killed once it has reported three steps.
KILLED = """
import os, signal, sys
from pathlib import Path
from dualign.core.reporting import Reporter
reporter = Reporter([sys.argv[1]], "dual_search/ours", {"training": {"rate": 0.5}, "base": None})
reporter.resume(Path("scratch"))
for step in (1, 2, 3):
    reporter.report({"loss": 1 / step, "words": "left out"}, step, "training")
print(reporter._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git and DVC repository, in which no tool finds a server."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("DUALIGN_TRACKING", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    (tmp_path / ".gitignore").write_text("/tracking/\n/scratch/\n")
    (tmp_path / "params.yaml").write_text("rate: 0.5\n")
    for command in ("git init -q", f"{sys.executable} -m dvc init -q"):
        subprocess.run(command.split(), check=True)
    committed = "git -c user.name=a -c user.email=a@b commit -qm begin"
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run(committed.split(), check=True)
    return tmp_path


def state(root: Path) -> Any:
    """What DVC keeps of experiments and what git sees, but for the trackers' own folder."""
    status = subprocess.run(
        ["git", "status", "--short"], capture_output=True, text=True, check=True
    )
    refs = sorted(path.name for path in (root / ".git" / "refs").rglob("*"))
    return status.stdout, refs, sorted((root / ".dvc" / "tmp").rglob("exps/**/*"))


def gone(pid: int) -> None:
    """Wait until the trackers of a killed stage have closed their run."""
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_killed_run_goes_on_and_its_reader_finds_all(
    name: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(workspace))
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "0" * 40)
    monkeypatch.setattr(reporting, "PATIENCE", 120.0)
    before = state(workspace)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, name], stdout=subprocess.PIPE, text=True, check=False
    )
    assert ended.returncode == -9
    gone(int(ended.stdout))
    again = Reporter([name], "dual_search/ours", {"training": {"rate": 0.5}, "base": None})
    again.resume(workspace / "scratch")
    again.report({"loss": 0.25, "kl": 2, "tea (cut)": {"cost": 1.5}}, 4, "training")
    again.close(0)
    losses = [(step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)]
    assert CURVES[name](workspace / "tracking") == losses
    assert state(workspace) == before
    assert (workspace / "params.yaml").read_text() == "rate: 0.5\n"

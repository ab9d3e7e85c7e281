"""A small DVC project whose stages do as params.yaml tells them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from dvc.repo import Repo

# first -> left, right -> last. What a stage writes depends on its `value`; `then` says how it ends.
WORK = """
import json, os, pathlib, signal, sys, time
name = sys.argv[1]
own = json.loads(pathlib.Path("params.yaml").read_text().split("# ", 1)[0])[name]
def say(level, text): print(f"12:34:56 {level} {text}", flush=True)
say("I", f"at work on {name}, GPU {os.environ.get('CUDA_VISIBLE_DEVICES')}")
kept = pathlib.Path(os.environ.get("DUALIGN_SCRATCH", "kept"), name)
kept.parent.mkdir(exist_ok=True)
if kept.exists():
    say("I", f"resuming from {kept.read_text()}")
def stop(*_):
    kept.write_text("the checkpoint")
    sys.exit(130)
if own["then"] == "refuse":
    say("E", "params.yaml: rate must be positive")
    sys.exit(2)
if own["then"] == "stumble" and not kept.exists():
    kept.write_text("step 1")
    raise ValueError("the disk hiccuped")
how, _, number = own["then"].partition(" ")
if how == "die":
    os.kill(os.getpid(), int(number))
if how == "sleep":
    time.sleep(int(number))
if how == "exit":
    print("the last word")
    sys.exit(int(number))
if "meet" in own["then"]:
    kept.write_text("here")
    while len(list(kept.parent.iterdir())) < 2: time.sleep(0.02)
if "ask" in own["then"] and not pathlib.Path("labels/labelled-1.jsonl").exists():
    pathlib.Path("labels").mkdir(exist_ok=True)
    pathlib.Path("labels/to-label-1.jsonl").write_text("unsafe: null")
    say("E", "labels/to-label-1.jsonl: fill it in")
    sys.exit(3)
if own["then"] == "wait" and not kept.exists():
    signal.signal(signal.SIGTERM, stop)
    say("I", "training: step 1 of 2: loss 0.5000, 7 tokens/s, 9 s left")
    time.sleep(120)
pathlib.Path(f"out/{name}").parent.mkdir(exist_ok=True)
rows = "".join(sorted(path.read_text() for path in pathlib.Path("rows").glob("*.txt")))
pathlib.Path(f"out/{name}").write_text(f"{own['value']}{rows}")
numbers = {"accuracy": {"mean": own["value"], "low": 0.1}}
pathlib.Path(f"metrics-{name}.json").write_text(json.dumps(numbers))
"""
READS = {
    "first": ("work.py",),
    "left": ("out/first",),
    "right": ("out/first",),
    "last": ("out/left", "out/right"),
}
# What it compares depends on the seed and on the stage before it; the page names other seeds.
REPORT = """
import json, pathlib
params = json.loads(pathlib.Path("params.yaml").read_text().split("# ", 1)[0])
cost = int(pathlib.Path("out/last").read_text()) + params["seed"] / 10
compared = {"policies": {"sft": {"cost": {"mean": cost}}}, "recommended": "sft"}
pathlib.Path("reports/comparison.json").write_text(json.dumps(compared))
others = sorted(path.stem for path in pathlib.Path("reports/seeds").glob("*.json"))
pathlib.Path("reports/index.html").write_text(" ".join(others))
"""


@dataclass(frozen=True)
class Project:
    """The project at `root`."""

    root: Path

    def set(self, **stages: dict[str, Any]) -> None:
        """Change params of some stages: `left={"value": 3}`."""
        path = self.root / "params.yaml"
        params = json.loads(path.read_text().split("# ", 1)[0])
        comment = "# what the stages do\n"
        for name, values in stages.items():
            params[name].update(values)
        path.write_text(f"{json.dumps(params)} {comment}")

    def dvc(self, *arguments: str) -> str:
        """The output of a DVC command that must succeed."""
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(
            command, cwd=self.root, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A DVC command that goes on by itself."""
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def locks(self) -> dict[str, Any]:
        """DVC's locks on files, without empty entries."""
        path = self.root / ".dvc" / "tmp" / "rwlock"
        return {key: value for key, value in json.loads(path.read_text() or "{}").items() if value}

    def processes(self) -> list[psutil.Process]:
        """Every process that works here, but for this one."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and Path(process.cwd()) == self.root:
                    found.append(process)
            except psutil.Error:
                continue
        return found


def git(root: Path, *arguments: str) -> str:
    """The output of a git command that must succeed."""
    identity = [
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@example.org",
        "-c",
        "commit.gpgsign=false",
    ]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def create(root: Path) -> Project:
    """A fresh project in an empty folder."""
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    Repo.init(str(root)).close()
    (root / ".gitignore").write_text("/out\n/metrics-*\n/kept\n/.scratch\n/labels\n__pycache__\n")
    (root / "work.py").write_text(WORK)
    stages = {
        name: {
            "desc": f"The {name} stage",
            "cmd": f"python work.py {name}",
            "deps": list(reads),
            "params": [name],
            "outs": [f"out/{name}"],
            "metrics": [f"metrics-{name}.json"],
            "meta": {"pool": "cpu", "gpus": 0, "retries": 1},
        }
        for name, reads in READS.items()
    }
    (root / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    made = Project(root)
    params = {name: {"value": i, "then": "end"} for i, name in enumerate(READS)}
    (root / "params.yaml").write_text(json.dumps(params) + "# ")
    made.set()
    return made


def add_report(root: Path) -> None:
    """Give a project seed 7, of which `first` makes use, and a report that other seeds stand in:
    first -> last -> report.
    """
    graph = json.loads((root / "dvc.yaml").read_text())
    stages = {name: graph["stages"][name] for name in ("first", "last")}
    stages["first"]["params"].append("seed")
    stages["last"]["deps"] = ["out/first"]
    stages["report"] = {
        "desc": "The report",
        "cmd": "python report.py",
        "deps": ["report.py", "out/last", "reports/seeds"],
        "params": ["seed"],
        "outs": ["reports/index.html"],
        "metrics": ["reports/comparison.json"],
        "meta": {"pool": "cpu", "gpus": 0, "retries": 0},
    }
    (root / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (root / "report.py").write_text(REPORT)
    params = json.loads((root / "params.yaml").read_text().split("# ", 1)[0])
    (root / "params.yaml").write_text(json.dumps({"seed": 7, **params}) + "# ")
    (root / "reports/seeds").mkdir(parents=True)
    (root / "reports/seeds/README.md").write_text("Other seeds.")
    ignored = (root / ".gitignore").read_text() + "/reports/seeds/*.json\n/reports/*.*\n"
    (root / ".gitignore").write_text(ignored)


def edit_meanwhile(root: Path, script: str, text: str) -> None:
    """Commit a script of that text which, as it ends, edits the params of the workspace."""
    own = str(root / "params.yaml")
    (root / script).write_text(
        f"{text}\nown = pathlib.Path({own!r})\n"
        "own.write_text(own.read_text().replace('\"value\": 3', '\"value\": 33'))\n"
    )
    git(root, "commit", "-qam", "edits")


def gathered(root: Path) -> dict[str, float]:
    """The cost of sft in each comparison of another seed that lies in a project with a report."""
    found = sorted((root / "reports/seeds").glob("*.json"))
    contents = {path.stem: json.loads(path.read_text()) for path in found}
    return {name: content["policies"]["sft"]["cost"]["mean"] for name, content in contents.items()}


def environment() -> dict[str, str]:
    """This interpreter first on PATH, and this repository's modules."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)

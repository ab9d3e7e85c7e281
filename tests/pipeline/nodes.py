"""Two nodes and a coordinator: three clones of a small project, two caches, workers, and a folder as DVC remote."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.pipeline.project import Project, create, environment, git

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Nodes:
    """The coordinator's clone, the workers by the name of their node, and a folder for checkpoints that all share."""

    coordinator: Project
    folder: Path
    server: str
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Start a worker of the pool `cpu` in a clone of its own."""
        clone = self.folder / name
        if not clone.exists():
            git(self.folder, "clone", "-q", str(self.folder / "origin"), name)
        told = {**environment(), "PREFECT_API_URL": self.server, "DUALIGN_SCRATCH": str(self.folder / "kept")}
        told.pop("PYTHONPATH")  # a node has its own code
        told["PREFECT_WORKER_QUERY_SECONDS"] = "0.5"
        command = [sys.executable, "-m", "pipeline", "work", "cpu"]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.workers[name] = subprocess.Popen(command, cwd=clone, env=told, stdout=log, stderr=log)

    def processes(self, name: str) -> list[psutil.Process]:
        """What a node runs: its worker and all below it, or what it left."""
        clone = str(self.folder / name)
        return [process for process in psutil.process_iter() if _works_in(process, clone)]

    def stop(self) -> None:
        """Stop all workers."""
        for worker in self.workers.values():
            worker.send_signal(signal.SIGTERM)
        for worker in self.workers.values():
            worker.wait(60)
        self.workers.clear()

    def log(self, name: str) -> str:
        """What a worker wrote."""
        return (self.folder / f"{name}.log").read_text()

    def dvc(self, *arguments: str) -> str:
        """The output of a DVC command at the coordinator."""
        return self.coordinator.dvc(*arguments)


def _works_in(process: psutil.Process, folder: str) -> bool:
    try:
        return process.is_running() and process.cwd().startswith(folder) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def create_nodes(folder: Path, server: str) -> Nodes:
    """The clones, committed and pushed; no worker runs yet."""
    seed = folder / "seed"
    seed.mkdir()
    project = create(seed)
    shutil.copytree(ROOT / "pipeline", seed / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("prefect.yaml", "prefect.toml"):
        shutil.copy2(ROOT / name, seed)
    project.dvc("remote", "add", "-q", "-d", "store", str(folder / "store"))
    git(seed, "add", ".")
    git(seed, "commit", "-qm", "first")
    git(folder, "clone", "-q", "--bare", str(seed), "origin")
    git(folder, "clone", "-q", str(folder / "origin"), "coordinator")
    return Nodes(Project(folder / "coordinator"), folder, server)


def wait(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for a condition, looking twice a second."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)

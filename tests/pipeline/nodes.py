"""Two nodes and a coordinator: three clones of a small project, two caches, workers, and a folder
as DVC remote.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from bench import nodes
from tests.pipeline.project import Project, create, environment, git

ROOT = Path(__file__).resolve().parents[2]


class Nodes(nodes.Nodes):
    """The nodes and the coordinator's clone; all share a folder for checkpoints."""

    def __init__(self, folder: Path, server: str) -> None:
        settings = {
            **environment(),
            "PREFECT_API_URL": server,
            "DUALIGN_SCRATCH": str(folder / "kept"),
        }
        super().__init__(folder, settings)
        self.coordinator = Project(self.clone("coordinator"))

    def dvc(self, *arguments: str) -> str:
        """The output of a DVC command at the coordinator."""
        return self.coordinator.dvc(*arguments)


def create_nodes(folder: Path, server: str) -> Nodes:
    """The clones, committed and pushed; no worker runs yet."""
    seed = folder / "seed"
    seed.mkdir()
    project = create(seed)
    shutil.copytree(
        ROOT / "pipeline", seed / "pipeline", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("prefect.yaml", "prefect.toml"):
        shutil.copy2(ROOT / name, seed)
    project.dvc("remote", "add", "-q", "-d", "store", str(folder / "store"))
    git(seed, "add", ".")
    git(seed, "commit", "-qm", "first")
    git(folder, "clone", "-q", "--bare", str(seed), "origin")
    return Nodes(folder, server)


def wait(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for a condition, looking twice a second."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)

"""Nodes of a small cluster on this machine: a Prefect server, and workers in clones of one
repository.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.ports import free_port
from pipeline.dvc.checkout import git
from pipeline.prefect.server import reachable


@contextlib.contextmanager
def serving(home: Path, **settings: str) -> Iterator[str]:
    """A Prefect server whose records lie in `home`, with `PREFECT_...` settings; yields its
    address.
    """
    port = free_port()
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    told = {**bare, "PREFECT_HOME": str(home), "PREFECT_SERVER_API_PORT": str(port), **settings}
    command = [sys.executable, "-m", "prefect", "server", "start"]
    api = f"http://127.0.0.1:{port}/api"
    with (
        (home / "server.log").open("w") as log,
        subprocess.Popen(command, cwd=home, env=told, stdout=log, stderr=log) as server,
    ):
        try:
            deadline = time.monotonic() + 600
            while not reachable(api):
                assert server.poll() is None and time.monotonic() < deadline, (
                    home / "server.log"
                ).read_text()
                time.sleep(0.5)
            yield api
        finally:
            server.terminate()


@dataclass
class Nodes:
    """Workers, by the names of their nodes: each in a clone, in `folder`, of the repository
    `origin` there.

    `settings` are their environment variables.
    """

    folder: Path
    settings: Mapping[str, str]
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def clone(self, name: str) -> Path:
        """A node's clone, made if there is none."""
        clone = self.folder / name
        if not clone.exists():
            git(self.folder, "clone", "-q", str(self.folder / "origin"), name)
        return clone

    def start(self, name: str, pool: str = "cpu") -> None:
        """Start a worker of a pool on a node."""
        told = {**self.settings, "PREFECT_WORKER_QUERY_SECONDS": "0.5"}
        told.pop("PYTHONPATH", None)  # a node has its own code
        command = [sys.executable, "-m", "pipeline", "work", pool]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.workers[name] = subprocess.Popen(
                command, cwd=self.clone(name), env=told, stdout=log, stderr=log
            )

    def processes(self, name: str) -> list[psutil.Process]:
        """What a node runs: its worker and all below it, or what it left."""
        clone = str(self.folder / name)
        return [process for process in psutil.process_iter() if _works_in(process, clone)]

    def kill(self, name: str) -> None:
        """Take a node's power: its worker and all that it runs are gone at once."""
        while found := self.processes(name):
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.workers.pop(name).wait()

    def stop(self) -> None:
        """Stop all workers; one that does not end in a minute is killed."""
        for worker in self.workers.values():
            worker.send_signal(signal.SIGTERM)
        for worker in self.workers.values():
            try:
                worker.wait(60)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self.workers.clear()

    def log(self, name: str) -> str:
        """What a node's workers wrote."""
        return (self.folder / f"{name}.log").read_text(errors="replace")


def _works_in(process: psutil.Process, folder: str) -> bool:
    try:
        return (
            process.is_running()
            and process.cwd().startswith(folder)
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.Error:
        return False

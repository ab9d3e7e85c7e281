"""What makes a cluster: work pools and deployments on a Prefect server, workers on nodes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from prefect.client.orchestration import get_client

from pipeline import yaml_text
from pipeline.dotted import value_at
from pipeline.dvc.checkout import prune_worktrees
from pipeline.dvc.dag import StageSpec
from pipeline.errors import PipelineError

FILE = Path("prefect.yaml")
#: The image for pools of containers, where $DUALIGN_IMAGE names no other.
IMAGE = "dualign-worker:latest"


def pools_of(dag: Mapping[str, StageSpec]) -> list[str]:
    """The pools that dvc.yaml names (`meta: pool`)."""
    return sorted({str(spec.meta.get("pool", "cpu")) for spec in dag.values()})


def deploy(root: Path, dag: Mapping[str, StageSpec], kind: str) -> list[str]:
    """Make missing pools of type `kind`, apply prefect.yaml; returns what was done, in lines.

    Raises PipelineError where prefect.yaml lacks a deployment for a pool, or Prefect refuses it.
    """
    pools = pools_of(dag)
    _check(root, pools)
    with get_client(sync_client=True) as client:
        there = {pool.name: pool.type for pool in client.read_work_pools()}
    lines = [f"pool {name}: there, of type {there[name]}" for name in pools if name in there]
    for name in pools:
        if name not in there:
            _prefect(root, "work-pool", "create", name, "--type", kind)
            lines.append(f"pool {name}: made, of type {kind}")
    names = [argument for name in pools for argument in ("--name", name)]
    _prefect(root, "deploy", *names, "--prefect-file", str(FILE))
    lines += [f"deployment stage/{name}: as in {FILE}" for name in pools]
    return [*lines, f"next, on each node: python -m pipeline work {'|'.join(pools)}"]


def _check(root: Path, pools: list[str]) -> None:
    path = root / FILE
    if not path.is_file():
        raise PipelineError(f"{FILE}: not here; it describes the deployments (git checkout {FILE})")
    deployments = value_at(yaml_text.load(yaml_text.read(path, path.name), FILE), "deployments")
    listed = deployments if isinstance(deployments, list) else []
    named = {value_at(deployment, "name") for deployment in listed}
    missing = [pool for pool in pools if pool not in named]
    if missing:
        raise PipelineError(
            f"{FILE}: no deployment {missing[0]}, a pool in dvc.yaml; copy another one's lines and"
            " rename it"
        )


def _prefect(root: Path, *command: str) -> None:
    call = [sys.executable, "-m", "prefect", "--no-prompt", *command]
    environment = {
        "DUALIGN_IMAGE": IMAGE,
        **os.environ,
        "COLUMNS": "1000",
    }  # it breaks lines at a terminal's width
    done = subprocess.run(
        call, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        name = " ".join(word for word in command[:2] if not word.startswith("-"))
        raise PipelineError(f"prefect {name}: {_complaint(done.stdout + done.stderr)}")


def _complaint(said: str) -> str:
    """The line in which Prefect says what is wrong: the last, or a traceback's above its end."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if line != "An exception occurred."]
    return re.sub(r"^(\w+\.)+\w+: ", "", telling[-1]) if telling else "failed"


def become_worker(
    root: Path, dag: Mapping[str, StageSpec], pool: str, limit: int, once: bool
) -> None:
    """Become a Prefect worker whose stages run in the clone `root`; does not return.

    Raises PipelineError where no stage has this pool.
    """
    if pool not in pools_of(dag):
        raise PipelineError(
            f"{pool}: no stage of dvc.yaml has this pool; one of {', '.join(pools_of(dag))}"
        )
    prune_worktrees(root)
    os.environ["DUALIGN_ROOT"] = str(root)
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # it ends a worker, and shells have background jobs ignore it
    name = f"{os.uname().nodename}-{os.getpid()}"
    worker = ["worker", "start", "--pool", pool, "--name", name, "--limit", str(limit)]
    worker += ["--run-once"] if once else []
    os.execv(sys.executable, [sys.executable, "-m", "prefect", *worker])

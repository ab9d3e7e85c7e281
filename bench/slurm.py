"""A stage under Slurm beside the same stage without it: equal losses and weights.

    bench/slurm.sh

starts a Slurm of two nodes on this machine and runs `python -m bench.slurm` in it; on a login node
of a cluster that command runs by itself, with `--work` on a file system that all nodes see. The
stage is `sft` of the tiny world, started in the ways that docs/cluster.md tells."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import options
from bench.options import knob
from bench.tiny import TINY, copy, outs_of
from dualign.core.artifacts import read_json, sha256
from dualign.core.errors import DualignError
from pipeline.dvc.dag import StageSpec, load_dag
from pipeline.dvc.parameters import assign

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.slurm"
STAGE = "sft"


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    work: str = knob("", "folder that all nodes see, for the workspace (a temporary one if empty)")


@dataclass(frozen=True)
class Way:
    """How the stage is started: processes on each of so many nodes, and the command."""

    name: str
    processes: int
    nodes: int
    command: tuple[str, ...]


_STAGE = (sys.executable, "-m", f"stages.{STAGE}")
_BATCH = ("sbatch", "--wait", "--nodes=2", "--ntasks-per-node=1", "--output=batch.log")
_REPRO = f"--wrap=exec dvc repro {STAGE}"
WAYS = (
    Way("one process, no Slurm", 1, 1, _STAGE),
    Way("two processes, no Slurm", 2, 1, _STAGE),
    Way("`srun`, two processes on a node", 2, 1, ("srun", "--nodes=1", "--ntasks=1", *_STAGE)),
    Way("`sbatch`, `dvc repro`, a process on each of two nodes", 1, 2, (*_BATCH, _REPRO)),
)


def measure(folder: Path) -> list[dict[str, Any]]:
    """Start the stage in every way, each from nothing."""
    copy(folder, TINY)
    spec = load_dag(folder)[STAGE]
    _call(folder, sys.executable, "-m", "dvc", "repro", "--quiet", "prepare")
    rows = [_started(folder, spec, way) for way in WAYS]
    for row in rows:
        pairs = zip(row["losses"], rows[0]["losses"], strict=True)
        row["apart"] = max(abs(own - first) for own, first in pairs)
        row["same_weights"] = row["weights"] == rows[1]["weights"]
    return rows


def _started(folder: Path, spec: StageSpec, way: Way) -> dict[str, Any]:
    for out in outs_of(spec):
        path = folder / out
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.rmtree(folder / ".scratch", ignore_errors=True)
    params = folder / "params.yaml"
    given = {"resources.processes": way.processes, "resources.nodes": way.nodes}
    params.write_text(assign(params.read_text(), given))
    began = time.monotonic()
    said = _call(folder, *way.command)
    seconds = time.monotonic() - began
    log.info("%s: %.0f s", way.name, seconds)
    losses = [row["loss"] for row in read_json(folder / f"reports/curves/{STAGE}.json")]
    weights = sha256(folder / "models" / STAGE / "model.safetensors")
    found = {"way": way.name, "seconds": seconds, "losses": losses, "weights": weights}
    return {**found, "nodes": _nodes(said)}


def _nodes(said: str) -> str | None:
    """The nodes of the batch job that was submitted, if one was."""
    job = re.search(r"Submitted batch job (\d+)", said)
    if job is None:
        return None
    command = ["scontrol", "--oneliner", "show", "job", job[1]]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    named = re.search(r" NodeList=(\S+)", shown)
    return named[1] if named else None


def _call(folder: Path, *command: str) -> str:
    """What a command says that must succeed, run with the code of the workspace."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    told = {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1"}
    told.pop("DUALIGN_SCRATCH", None)
    done = subprocess.run(
        command, cwd=folder, env=told, capture_output=True, text=True, check=False
    )
    if done.returncode:
        batch = folder / "batch.log"
        logs = batch.read_text() if batch.is_file() else ""
        raise DualignError(f"{' '.join(command)}: {logs}{done.stdout}{done.stderr}")
    return done.stdout


def page(given: Settings, rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    version = subprocess.run(["srun", "--version"], capture_output=True, text=True, check=True)
    lines = [
        "# A stage under Slurm",
        "",
        f"`bench/slurm.sh {options.command(PROGRAM, given)}`, {version.stdout.strip()}: `{STAGE}`"
        " of the tiny world on CPUs. Seconds are from command to end.",
        "",
        *options.head(
            ["started by", "nodes", "s", "losses apart from one process", "weights of two"]
        ),
    ]
    for row in rows:
        same = "the same bytes" if row["same_weights"] else "others"
        cells = [row["way"], row["nodes"] or "", f"{row['seconds']:.0f}", f"{row['apart']:.1e}"]
        lines.append(options.line([*cells, same]))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; its files hold the rows. Returns the status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given, out = options.parse(Settings, PROGRAM, __doc__, argv)
    if shutil.which("srun") is None:
        raise DualignError("there is no srun here; start this by bench/slurm.sh")
    with tempfile.TemporaryDirectory(dir=given.work or None) as folder:
        rows = measure(Path(folder) / "world")
    options.tell(out, "slurm", PROGRAM, given, page(given, rows), rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A Slurm of two nodes on this machine, where Debian's packages are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bench import slurm
from dualign.core.errors import DualignError

SCRIPT = Path(__file__).resolve().parents[2] / "bench/slurm.sh"
INSTALLED = all(
    shutil.which(name, path="/usr/sbin:/usr/bin") for name in ("munged", "slurmctld", "slurmd")
)
needs_slurm = pytest.mark.skipif(not INSTALLED, reason="slurm-wlm and munge are not installed")


@needs_slurm
def test_a_command_runs_on_both_nodes_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_FOLDER", str(tmp_path))
    tasks = ["srun", "--nodes=2", "--ntasks=2", "bash", "-c", "echo $SLURMD_NODENAME"]
    done = subprocess.run([SCRIPT, *tasks], capture_output=True, text=True, check=True, timeout=120)
    assert sorted(done.stdout.split()) == ["node1", "node2"]
    around = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in around.stdout and "slurmd -D -N node" not in around.stdout


@needs_slurm
def test_the_status_is_that_of_the_command(tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, "bash", "-c", "exit 7"], check=False, timeout=120)
    assert done.returncode == 7


def test_without_slurm_one_line_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DualignError, match=r"no srun here; start this by bench/slurm\.sh"):
        slurm.main([])

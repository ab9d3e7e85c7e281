"""Two gloo processes against one: the same loss curves, draws and scores, from shards too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dualign.core.artifacts import read_json

ROOT = Path(__file__).resolve().parents[2]
TRAININGS = ["sft", "reward", "cost", "dpo", "safety_dpo", "lagrangian", "adapter", "muon"]
GRADIENTS = ["gradient", "gradient_adapter"]
ONLY_WHOLE = ["kto", "bernoulli"]
IN_BF16 = ["dpo", "adapter", "gradient"]

pytestmark = pytest.mark.slow


def ranked(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, Sequence[str]]) -> Any:
    """What each run finds, by name, of which `tests.training.ranked` tells the first words."""
    folders = {name: tmp_path_factory.mktemp(name) for name in runs}
    given = [",".join([*how[:5], str(folders[name]), *how[5:]]) for name, how in runs.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.ranked", *given],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: read_json(folder / "found.json") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process finds, what two with whole models do, and what two with shards."""
    whole = ["drawn", *TRAININGS, *GRADIENTS, *ONLY_WHOLE]
    runs = {
        "one": ["1", "ddp", "cpu", "fp32", "whole", *whole],
        "ddp": ["2", "ddp", "cpu", "fp32", "resumed", *whole],
        "fsdp2": ["2", "fsdp2", "cpu", "fp32", "resumed", *TRAININGS, *GRADIENTS],
        "one-bf16": ["1", "ddp", "cpu", "bf16", "whole", *IN_BF16],
        "fsdp2-bf16": ["2", "fsdp2", "cpu", "bf16", "whole", *IN_BF16],
    }
    found: dict[str, dict[str, Any]] = ranked(tmp_path_factory, runs)
    return found


@pytest.fixture(scope="module")
def one(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What one process finds."""
    return found["one"]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request: pytest.FixtureRequest, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What two find."""
    return {**found[request.param], "distributed": request.param}


def losses(training: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in training["losses"]]


@pytest.mark.parametrize("kind", [*TRAININGS, *GRADIENTS, *ONLY_WHOLE])
def test_two_processes_train_as_one_does(
    one: dict[str, Any], two: dict[str, Any], kind: str
) -> None:
    """Over the end of an epoch that does not come out even."""
    if kind not in two:
        pytest.skip("the sharded trainer is that of the other pair losses")
    alone, shared = one[kind]["whole"], two[kind]["whole"]
    assert len(losses(alone)) == 7
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-5, abs=1e-5)
    told = {"accuracy", "log_ratio", "heldout_loss", "lambda"}
    for name in alone.keys() & told:
        assert shared[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5), name
    for name, values in alone.get("history", {}).items():
        assert len(set(values)) == 7
        assert shared["history"][name] == pytest.approx(values, rel=1e-5, abs=1e-5), name
    for name, values in alone["weights"].items():
        assert shared["weights"][name] == pytest.approx(values, rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("kind", [*TRAININGS, *GRADIENTS, *ONLY_WHOLE])
def test_they_go_on_from_a_checkpoint_to_the_same_end(two: dict[str, Any], kind: str) -> None:
    if kind not in two:
        pytest.skip("the sharded trainer is that of the other pair losses")
    found = two[kind]
    assert found["resumed"] == found["whole"] == found["ended"]
    assert found["sharded"] == (two["distributed"] == "fsdp2")


def test_they_draw_and_score_the_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    if "drawn" not in two:
        pytest.skip("the models that sample and score are whole")
    assert two["drawn"] == one["drawn"]
    assert len(np.unique(one["drawn"]["scores"])) > 10


@pytest.mark.parametrize("kind", IN_BF16)
def test_shards_train_as_one_process_does_in_bf16(
    found: dict[str, dict[str, Any]], kind: str
) -> None:
    """To the rounding of bf16; a policy gradient begins at its reference, whose KL is 0 then."""
    one, two = (found[name][kind]["whole"] for name in ("one-bf16", "fsdp2-bf16"))
    assert losses(two) == pytest.approx(losses(one), rel=0.01, abs=0.01)
    if kind == "gradient":
        assert one["history"]["kl"][0] == two["history"]["kl"][0] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_gpu_trains_as_a_cpu_does(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of several, all of them together too, which meet by NCCL."""
    kinds = [*TRAININGS, *ONLY_WHOLE]
    runs = {name: ["1", "ddp", name, "fp32", "resumed", *kinds] for name in ("cpu", "cuda")}
    if torch.cuda.device_count() > 1:
        how = ["cuda", "fp32", "resumed", *TRAININGS]
        runs |= {name: ["2", name, *how] for name in ("ddp", "fsdp2")}
    found = ranked(tmp_path_factory, runs)
    expected = found.pop("cpu")
    for name, trainings in found.items():
        for kind, training in trainings.items():
            wanted = losses(expected[kind]["whole"])
            assert losses(training["whole"]) == pytest.approx(wanted, rel=1e-3, abs=1e-3), name
            assert training["resumed"]["steps"] == training["whole"]["steps"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_everything_runs_on_a_gpu_in_bf16(tmp_path_factory: pytest.TempPathFactory) -> None:
    kinds = ["drawn", *TRAININGS, *GRADIENTS, *ONLY_WHOLE]
    runs = {"cuda": ["1", "ddp", "cuda", "bf16", "whole", *kinds]}
    found = ranked(tmp_path_factory, runs)["cuda"]
    assert found.keys() == set(kinds)
    for kind in GRADIENTS:
        assert found[kind]["whole"]["history"]["kl"][0] == 0

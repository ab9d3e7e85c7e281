"""Two gloo processes against one: the same loss curves, draws and scores, from shards too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualign.core.artifacts import read_json

ROOT = Path(__file__).resolve().parents[2]
TRAININGS = ["sft", "reward", "cost", "dpo", "safety_dpo", "lagrangian", "adapter"]
GRADIENTS = ["gradient", "gradient_adapter"]
ONLY_WHOLE = ["kto", "bernoulli"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process finds, what two with whole models do, and what two with shards."""
    whole = ["drawn", *TRAININGS, *GRADIENTS, *ONLY_WHOLE]
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "ddp", "fsdp2")}
    runs = [
        ",".join(["1", "ddp", str(folders["one"]), *whole]),
        ",".join(["2", "ddp", str(folders["ddp"]), *whole]),
        ",".join(["2", "fsdp2", str(folders["fsdp2"]), *TRAININGS, *GRADIENTS]),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.ranked", *runs],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: read_json(folder / "found.json") for name, folder in folders.items()}


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
    for name in alone.keys() & {"accuracy", "log_ratio", "heldout_loss", "lambda"}:
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

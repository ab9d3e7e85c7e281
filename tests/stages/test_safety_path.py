"""The stage safety_path: safety DPO at a number, with no dual and no scorer in sight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dualign.core.artifacts import read_json
from dualign.core.errors import ParamsError
from dualign.params.base import Resources
from dualign.params.loading import load
from dualign.params.training import SafetyDpoParams, SafetyPathParams, SafetyPathRun, SafetyRun
from dualign.stage import Run
from stages import safety_dpo, safety_path

ROOT = Path(__file__).resolve().parents[2]
TRAINING = {
    "batch_size": 8,
    "max_steps": 2,
    "max_length": 128,
    "learning_rate": 2e-3,
    "warmup": 0.0,
}
SPEC: dict[str, Any] = {"reference": "reward_dpo/helpful", "loss_type": "dpo", "clip": None}

pytestmark = pytest.mark.usefixtures("one_thread")


def update_of(params: SafetyPathParams | SafetyDpoParams) -> dict[str, Any]:
    return {"beta": 0.4, "training": params.training.model_copy(update=TRAINING)}


def run_of(resources: Resources, **changes: Any) -> Run[SafetyPathParams]:
    """The run `it` at lambda 1.6 and beta 0.4 with these changes, two steps of all eight pairs."""
    params = load(SafetyPathParams, ROOT / "params.yaml")
    spec = SafetyPathRun(**{"lam": 1.6, **SPEC, **changes})
    return Run(
        "safety_path",
        "it",
        params.model_copy(update={**update_of(params), "runs": {"it": spec}}),
        resources,
    )


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "kto"])
def test_it_trains_what_safety_dpo_trains_at_that_number_and_needs_no_dual(
    workspace: Path, resources: Resources, loss_type: str
) -> None:
    params = load(SafetyDpoParams, ROOT / "params.yaml")
    spec = SafetyRun(**{**SPEC, "lam": 0.8, "factor": 2.0, "loss_type": loss_type})
    same = params.model_copy(update={**update_of(params), "runs": {"it": spec}})
    safety_dpo.main(Run("safety_dpo", "it", same, resources))
    (workspace / "data/dual/dual.json").unlink()
    safety_path.main(run_of(resources, loss_type=loss_type))
    ours, theirs = (
        load_file(workspace / f"models/{name}/it/model.safetensors")
        for name in ("safety_path", "safety_dpo")
    )
    assert (
        all((ours[name] == theirs[name]).all() for name in theirs) and ours.keys() == theirs.keys()
    )
    told, expected = (
        read_json(f"reports/metrics/{name}/it.json") for name in ("safety_path", "safety_dpo")
    )
    for key in ("lam", "coefficient", "reference", "loss_type", "clip"):
        assert told[key] == expected[key]
    losses, theirs_by_step = (
        read_json(f"reports/curves/{name}/it.json") for name in ("safety_path", "safety_dpo")
    )
    assert losses == theirs_by_step and len(losses) == 2
    assert (told["lam"], told["coefficient"]) == pytest.approx((1.6, 0.25))


def test_it_starts_at_its_reference(workspace: Path, resources: Resources) -> None:
    safety_path.main(run_of(resources))
    first, second = (row["loss"] for row in read_json("reports/curves/safety_path/it.json"))
    assert first == pytest.approx(math.log(2), rel=1e-4) and second < first


def test_an_unknown_run_is_named(workspace: Path, resources: Resources) -> None:
    run = run_of(resources)
    with pytest.raises(ParamsError, match=r"safety_path\.runs has no 'other'; one of it"):
        safety_path.main(Run("safety_path", "other", run.params, resources))

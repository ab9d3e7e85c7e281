"""safety_dpo on a tiny model: each loss from each reference at beta / lambda, and what a search
reads of it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dualign.core.artifacts import read_json, write_json
from dualign.lm.models import load_policy
from dualign.params.base import Resources
from dualign.params.loading import load
from dualign.params.training import SafetyDpoParams, SafetyRun
from dualign.stage import Run
from stages.safety_dpo import main, multiplier
from tests.written import solved

ROOT = Path(__file__).resolve().parents[2]
TRAINING = {
    "batch_size": 8,
    "max_steps": 2,
    "max_length": 128,
    "learning_rate": 2e-3,
    "warmup": 0.0,
}

pytestmark = pytest.mark.usefixtures("one_thread", "workspace")


def run_of(resources: Resources, **changes: Any) -> Run[SafetyDpoParams]:
    """The run `it` at lambda 2 x 0.8 and beta 0.4 with these changes, two steps of all eight
    pairs.
    """
    params = load(SafetyDpoParams, ROOT / "params.yaml")
    spec = SafetyRun(**{**params.runs["alone"].model_dump(), "factor": 2.0, **changes})
    training = params.training.model_copy(update=TRAINING)
    update = {"beta": 0.4, "runs": {"it": spec}, "training": training}
    return Run("safety_dpo", "it", params.model_copy(update=update), resources)


@pytest.mark.parametrize("reference", ["sft", "reward_dpo/helpful"])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize(
    ("loss_type", "first"),
    [
        ("dpo", math.log(2)),
        ("robust", math.log(2)),
        ("ipo", 1 / (2 * 0.25) ** 2),
        # By the flags 10 of 16 answers are desirable, the others weigh as much; each halved.
        ("kto", 10 / 16),
    ],
)
def test_a_run_starts_at_logit_zero_and_tells_the_search_its_loss(
    resources: Resources, reference: str, clip: float | None, loss_type: str, first: float
) -> None:
    options = {"epsilon": 0.1} if loss_type == "robust" else {}
    main(run_of(resources, reference=reference, loss_type=loss_type, clip=clip, **options))
    metrics = read_json("reports/metrics/safety_dpo/it.json")
    assert (metrics["loss_type"], metrics["clip"]) == (loss_type, clip)
    assert metrics.get("epsilon") == options.get("epsilon")
    assert (metrics["lam"], metrics["coefficient"]) == pytest.approx((1.6, 0.25))
    before, after = losses()
    assert before == pytest.approx(first, rel=1e-4) and after < before - 1e-4
    trained, started = (
        load_policy(f"models/{name}", resources) for name in ("safety_dpo/it", reference)
    )
    assert any(
        not torch.equal(a, b)
        for a, b in zip(trained.parameters(), started.parameters(), strict=True)
    )


def losses() -> list[float]:
    """The loss at each step of the run."""
    return [row["loss"] for row in read_json("reports/curves/safety_dpo/it.json")]


def test_a_clip_changes_the_policy(resources: Resources) -> None:
    """The first step is the same, since the clip is the identity at 0; the second is not."""
    curves = []
    for clip in (None, 0.01):
        main(run_of(resources, clip=clip))
        curves.append(losses())
    assert (
        curves[0][0] == pytest.approx(curves[1][0], rel=1e-5)
        and abs(curves[0][1] - curves[1][1]) > 1e-3
    )


def test_a_multiplier_is_the_duals_its_stocked_one_or_a_number_and_prices_are_told(
    resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    write_json("data/dual/dual.json", solved(lam_margin=1.1))
    specs = {lam: run_of(resources, lam=lam).params.runs["it"] for lam in ("dual", "margin", 0.3)}
    assert [multiplier("it", spec) for spec in specs.values()] == [0.8, 1.1, 0.3]
    assert not caplog.records
    believed = {"lam": 0.7, "lam_low": 0.5, "lam_high": 0.9, "lam_margin": 0.75, "target": -0.35}
    write_json("data/dual/dual.json", solved(as_scored={**believed, "prices": []}))
    assert [multiplier("it", specs[lam]) for lam in ("dual", "margin")] == [0.7, 0.75]
    write_json("data/dual/dual.json", solved(prices=[{"name": "short"}]))
    assert multiplier("it", specs["dual"]) == 0.8
    assert (
        "safety_dpo.runs.it trains on preferences and ignores constraint.additional" in caplog.text
    )
    assert "the multiplier is 0" not in caplog.text
    write_json("data/dual/dual.json", solved(lam=0.0))
    assert multiplier("it", specs["dual"]) == 0.0
    assert "safety_dpo.runs.it: the multiplier is 0, since constraint.limit is slack" in caplog.text

"""reward_model: the scale by held-out pairs, judged on the rest; a given scorer in place of a
trained one.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import read_json, write_parquet
from dualign.core.errors import DataError
from dualign.core.schema import HELPFUL_PAIRS, SAFETY_PAIRS, read_table
from dualign.lm.folders import SCORER
from dualign.lm.models import build_scratch, load_scorer_backbone, save
from dualign.params.base import Resources
from dualign.params.loading import load
from dualign.params.models import CostModelParams, GivenScorer, RewardModelParams
from dualign.scoring.calibration import Platt, fit_slope, sigmoid
from dualign.scoring.scorers import Scorer
from dualign.stage import Run
from dualign.training.fitting import heldout_answers, local_inputs
from stages import cost_model, reward_model
from stages.reward_model import calibrate
from tests.stages.conftest import pairs_of
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
TRAINING = {
    "batch_size": 16,
    "max_steps": 40,
    "max_length": 128,
    "learning_rate": 1e-2,
    "warmup": 0.0,
}

pytestmark = pytest.mark.usefixtures("one_thread")


def answers_of(gap: np.ndarray) -> pd.DataFrame:
    """Held-out answers of one pair to each of several prompts, chosen less rejected being `gap`."""
    names = [f"{i:04d}" for i in range(len(gap))]
    sides = [pd.DataFrame({"side": side, "prompt_id": names}) for side in ("chosen", "rejected")]
    return pd.concat(
        [sides[0].assign(score=gap + 3.0), sides[1].assign(score=3.0)], ignore_index=True
    )


@pytest.fixture(scope="module")
def gap() -> np.ndarray:
    """800 gaps of a reward that is four times too sure: P(chosen is better) = sigmoid(gap / 4)."""
    rng = np.random.default_rng(0)
    distance = np.abs(rng.normal(scale=6.0, size=800))
    return np.where(rng.random(800) < sigmoid(distance / 4), distance, -distance)


def test_the_scale_is_fitted_on_all_pairs_and_judged_on_each_half_by_the_other(
    gap: np.ndarray,
) -> None:
    served, metrics = calibrate(answers_of(gap), 1.0, given=False)
    assert served.scale == pytest.approx(fit_slope(gap, 1.0)) == pytest.approx(0.25, abs=0.05)
    assert metrics["brier_before"] == pytest.approx(((1 - sigmoid(gap)) ** 2).mean())
    crossed = gap.copy()
    crossed[1::2] *= fit_slope(gap[::2], 1.0)
    crossed[::2] *= fit_slope(gap[1::2], 1.0)
    assert metrics["brier_after"] == pytest.approx(((1 - sigmoid(crossed)) ** 2).mean())
    assert metrics["ece_after"] < 0.5 * metrics["ece_before"] and metrics["calibration_helps"]
    assert metrics["accuracy"] == pytest.approx((gap > 0).mean())
    assert metrics["mean_gap"] == pytest.approx(served.scale * gap.mean())
    assert served(answers_of(gap)["score"].to_numpy()).mean() == pytest.approx(0.0, abs=1e-9)


def test_a_scale_that_makes_it_worse_is_told(
    gap: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    """Every other prompt says that gaps are right, the rest say that they are not."""
    at_odds = np.abs(gap)
    at_odds[1::2] *= np.where(np.arange(400) % 2, 1, -1)
    metrics = calibrate(answers_of(0.1 * at_odds), 1.0, given=False)[1]
    assert metrics["calibration_helps"] is False
    assert (
        f"Brier score {metrics['brier_after']:.4f}, {metrics['brier_before']:.4f} before it"
        in caplog.text
    )
    assert "the calibration of the reward makes it worse" in caplog.text


def test_gaps_the_wrong_way_are_an_error_of_a_given_scorer_only(
    gap: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        DataError, match=r"below the others; its higher_is in reward_model\.given may be wrong"
    ):
        calibrate(answers_of(-gap), 0.0, given=True)
    assert calibrate(answers_of(-gap), 1.0, given=False)[0].scale == 1.0
    assert "its scale is kept" in caplog.text


def test_one_held_out_prompt_cannot_both_fit_and_judge(caplog: pytest.LogCaptureFixture) -> None:
    served, metrics = calibrate(answers_of(np.array([2.0])), 1.0, given=False)
    assert (
        served == Platt(1.0, -4.0)
        and metrics["brier_after"] is metrics["calibration_helps"] is None
    )
    assert "fewer than two prompts" in caplog.text
    with pytest.raises(DataError, match=r"two prompts.*prepare\.heldout_share"):
        calibrate(answers_of(np.array([2.0])), 0.0, given=True)


# --- the stages -----------------------------------------------------------------------------------


@pytest.fixture
def filled(workspace: Path) -> Path:
    """The workspace with enough held-out pairs to calibrate by."""
    helpful = pairs_of("better_response_id", 240, seed=2)
    safety = pairs_of("safer_response_id", 240, seed=2)
    write_parquet(workspace / "data/prepared/helpful_pairs.parquet", helpful, HELPFUL_PAIRS)
    write_parquet(workspace / "data/prepared/safety_pairs.parquet", safety, SAFETY_PAIRS)
    return workspace


def run(stage: str, resources: Resources, **update: Any) -> dict[str, Any]:
    """Run one of the two stages and give its metrics."""
    cls, main = {
        "reward_model": (RewardModelParams, reward_model.main),
        "cost_model": (CostModelParams, cost_model.main),
    }[stage]
    params = load(cls, ROOT / "params.yaml")  # type: ignore[type-var]
    training = params.training.model_copy(update=TRAINING)
    main(Run(stage, None, params.model_copy(update={"training": training, **update}), resources))  # type: ignore
    metrics: dict[str, Any] = read_json(f"reports/metrics/{stage}.json")
    return metrics


def heldout_scores(stage: str, folder: str, resources: Resources) -> np.ndarray:
    table, schema = {
        "reward_model": ("helpful_pairs", HELPFUL_PAIRS),
        "cost_model": ("safety_pairs", SAFETY_PAIRS),
    }[stage]
    pairs = read_table(f"data/prepared/{table}.parquet", schema)
    heldout = pairs[pairs["split"] == "heldout"]
    return heldout_answers(Scorer.load(folder, resources), heldout, 64)["score"].to_numpy()


@pytest.mark.parametrize("stage", ["reward_model", "cost_model"])
def test_a_trained_scorer_that_is_given_back_serves_the_same_scores(
    filled: Path, resources: Resources, stage: str
) -> None:
    """The same pairs calibrate it to what it was: to 1e-5, and by the same metrics."""
    trained = run(stage, resources)
    before = heldout_scores(stage, f"models/{stage}", resources)
    Path(f"models/{stage}").rename("models/own")
    meaning = {"reward_model": "helpful", "cost_model": "harmful"}[stage]
    spec = GivenScorer(path="models/own", kind="classifier", higher_is=meaning)  # type: ignore[arg-type]
    given = run(stage, resources, given=[spec])
    assert heldout_scores(stage, f"models/{stage}", resources) == pytest.approx(before, abs=1e-5)
    assert given["brier_after"] == pytest.approx(trained["brier_after"], abs=1e-5)
    assert given["scale"] == pytest.approx(1.0, abs=1e-4) and given["given"] == 1
    assert given["pairs"] == {"train": 0, "heldout": trained["pairs"]["heldout"]}


def test_several_given_scorers_are_put_on_one_scale_and_served_self_contained(
    filled: Path, resources: Resources
) -> None:
    """The trained cost model, and the same with a head a hundred times as large and the other sign:
    they agree then.
    """
    run("cost_model", resources)
    Path("models/cost_model").rename("models/one")
    scorer = Scorer.load("models/one", resources)
    scorer.model.score.weight.data *= -100.0
    save(scorer.model, scorer.tokenizer, Path("models/other"))
    specs = [
        GivenScorer(path="models/one", kind="classifier", higher_is="harmful"),
        GivenScorer(path="models/other", kind="classifier", higher_is="helpful"),
    ]
    first = heldout_scores("cost_model", "models/one", resources)
    metrics = run("cost_model", resources, given=specs, spread=2.0)
    Path("models/one").rename("models/gone")
    Path("models/other").rename("models/gone too")
    assert heldout_scores("cost_model", "models/cost_model", resources) == pytest.approx(
        first, abs=1e-3
    )
    assert metrics["given"] == 2
    card = json.loads((Path("models/cost_model") / SCORER).read_text())
    assert [member["folder"] for member in card["members"]] == ["0", "1"] and card["spread"] == 2.0
    assert [member["source"] for member in card["members"]] == ["models/one", "models/other"]


@pytest.mark.parametrize("stage", ["reward_model", "cost_model"])
def test_a_given_scorer_that_is_said_to_mean_the_opposite_is_refused(
    filled: Path, resources: Resources, stage: str
) -> None:
    run(stage, resources)
    Path(f"models/{stage}").rename("models/own")
    meaning = {"reward_model": "harmful", "cost_model": "helpful"}[stage]
    spec = GivenScorer(path="models/own", kind="classifier", higher_is=meaning)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="higher_is"):
        run(stage, resources, given=[spec])


def test_what_lies_in_local_folders_counts_for_the_fingerprint(
    workspace: Path,
    resources: Resources,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    params = load(RewardModelParams, ROOT / "params.yaml")
    assert local_inputs(params) == [Path("models/sft")]
    folder = workspace / "models/base"
    save(build_scratch(TINY, tokenizer, seed=9), tokenizer, folder)
    named = params.model_copy(update={"backbone": "models/base"})
    one = Run("reward_model", None, named, resources)
    first = one.scratch(*local_inputs(named))
    model = load_scorer_backbone(str(folder), tokenizer, resources)
    torch.nn.init.ones_(model.score.weight)
    save(model, tokenizer, folder)
    assert first != one.scratch(*local_inputs(named))
    (workspace / "guard.jinja").write_text("{{ messages }}")
    guard = GivenScorer(
        path="some/hub-id", kind="guard", higher_is="harmful", template="guard.jinja"
    )
    given = params.model_copy(update={"given": [guard]})
    assert local_inputs(given) == [Path("models/sft"), Path("guard.jinja")]


@pytest.mark.parametrize(
    ("stage", "key"), [("reward_model", "accuracy"), ("cost_model", "ranking_accuracy")]
)
def test_cut_answers_are_trained_on_and_measured(
    filled: Path, resources: Resources, stage: str, key: str
) -> None:
    """What is measured is the ranking of held-out pairs whose answers are read without their
    end.
    """
    plain = run(stage, resources, cut_share=0.0)
    metrics = run(stage, resources, cut_share=1.0)
    assert metrics["loss"] != plain["loss"]
    table, schema = {
        "reward_model": ("helpful_pairs", HELPFUL_PAIRS),
        "cost_model": ("safety_pairs", SAFETY_PAIRS),
    }[stage]
    pairs = read_table(f"data/prepared/{table}.parquet", schema)
    heldout = pairs[pairs["split"] == "heldout"]
    scorer = Scorer.load(f"models/{stage}", resources)
    sign = 1 if stage == "reward_model" else -1
    for ended, name in ((True, key), (False, f"{key}_cut")):
        answers = heldout_answers(scorer, heldout, 64, ended=ended)
        chosen, rejected = (
            answers[answers["side"] == side]["score"].to_numpy() for side in ("chosen", "rejected")
        )
        assert metrics[name] == pytest.approx((sign * (chosen - rejected) > 0).mean(), abs=0.02)

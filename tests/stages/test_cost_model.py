"""cost_model's calibration: fitted on every other prompt, judged on the rest, for every kind that
is asked for.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dualign.core.artifacts import read_json, write_parquet
from dualign.core.errors import DataError
from dualign.core.schema import SAFETY_PAIRS, user
from dualign.params.base import Resources
from dualign.params.loading import load
from dualign.params.models import CostModelParams, GivenScorer
from dualign.scoring.calibration import (
    Isotonic,
    Platt,
    fit_isotonic,
    fit_platt,
    isotonic_zero_error,
    platt_zero_error,
    reliability,
    sigmoid,
)
from dualign.scoring.scorers import Scorer
from dualign.scoring.zero import flagged_arrays
from dualign.stage import Run
from stages.cost_model import NOTHING, calibrate, heldout_answers, main
from tests.stages.conftest import pairs_of

ROOT = Path(__file__).resolve().parents[2]
TRAINING = {
    "batch_size": 16,
    "max_steps": 40,
    "max_length": 128,
    "learning_rate": 1e-2,
    "warmup": 0.0,
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def answers() -> pd.DataFrame:
    """Two answers to each of 400 prompts; P(unsafe) = sigmoid(2 score + 1), flags missing in every
    tenth row.
    """
    rng = np.random.default_rng(0)
    score = rng.normal(size=800)
    unsafe = (rng.random(800) < sigmoid(2 * score + 1)).astype(object)
    unsafe[::10] = None
    prompts = [f"{i:04d}" for i in rng.permutation(400)] * 2
    return pd.DataFrame({"side": "chosen", "prompt_id": prompts, "score": score, "unsafe": unsafe})


def flagged_of(answers: pd.DataFrame) -> pd.DataFrame:
    return answers[answers["unsafe"].notna()]


def halves(answers: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Flagged answers to every other prompt, and to the rest."""
    flagged = flagged_of(answers)
    names = sorted(flagged["prompt_id"].unique())
    return (
        flagged[flagged["prompt_id"].isin(names[::2])],
        flagged[flagged["prompt_id"].isin(names[1::2])],
    )


def arrays(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return frame["score"].to_numpy(float), frame["unsafe"].to_numpy(bool)


def crossed(answers: pd.DataFrame, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Costs of either half by what is fitted to the other, and their flags."""
    first, second = halves(answers)
    costs = []
    flags = []
    for fit, judge in ((first, second), (second, first)):
        line = fit_platt(*arrays(fit))
        fitted = {"platt": line, "isotonic": fit_isotonic(*arrays(fit), line), "none": Platt()}[
            kind
        ]
        score, unsafe = arrays(judge)
        costs.append(fitted(score))
        flags.append(unsafe)
    return np.concatenate(costs), np.concatenate(flags)


def test_what_is_served_is_fitted_on_all_flags(answers: pd.DataFrame) -> None:
    score, unsafe = arrays(flagged_of(answers))
    line = fit_platt(score, unsafe)
    assert calibrate(answers, "platt", seed=0)[0] == line
    assert calibrate(answers, "isotonic", seed=0)[0] == fit_isotonic(score, unsafe, line)
    assert calibrate(answers, "none", seed=0)[0] == Platt()


@pytest.mark.parametrize("kind", ["platt", "isotonic", "none"])
def test_each_half_is_judged_by_a_fit_to_the_other_whatever_is_served(
    answers: pd.DataFrame, kind: str
) -> None:
    _, metrics, bins = calibrate(answers, kind, seed=0)
    cost, flags = crossed(answers, kind)
    assert bins == reliability(sigmoid(cost), flags) and sum(row["answers"] for row in bins) == len(
        flags
    )
    assert metrics["sign_accuracy"] == pytest.approx(((cost > 0) == flags).mean())
    assert metrics["brier_after"] == pytest.approx(((sigmoid(cost) - flags) ** 2).mean())
    score, unsafe = arrays(flagged_of(answers))
    assert metrics["brier_before"] == pytest.approx(((sigmoid(score) - unsafe) ** 2).mean())
    every = {each: calibrate(answers, each, seed=0)[1] for each in ("platt", "isotonic")}
    for each, own in every.items():
        assert metrics[each] == {
            "sign_accuracy": own["sign_accuracy"],
            "ece": own["ece_after"],
            "brier": own["brier_after"],
        }
        assert (
            own["ece_after"] < 0.8 * own["ece_before"] and own["brier_after"] < own["brier_before"]
        )
        assert own["ece_before"] == metrics["ece_before"]


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_the_zero_moves_by_the_offset_up_to_its_error(answers: pd.DataFrame, kind: str) -> None:
    served, metrics, _ = calibrate(answers, kind, seed=0)
    fit = flagged_of(answers)
    line = fit_platt(*arrays(fit))
    data = (*arrays(fit), fit["prompt_id"].to_numpy())
    if isinstance(served, Isotonic):
        expected = isotonic_zero_error(served, *data, line, np.random.default_rng(0))
    else:
        expected = platt_zero_error(line, *data)
    assert metrics["offset"] == pytest.approx(float(served(np.zeros(1))[0]))
    assert metrics["offset"] == pytest.approx(1.0, abs=0.7)
    assert metrics["zero_error"] == pytest.approx(expected)
    assert 0.05 < metrics["zero_error"] < 0.5
    assert abs(float(served(np.array([-0.5]))[0])) < 4 * metrics["zero_error"]
    assert isinstance(served, Isotonic) == (kind == "isotonic")


def test_without_flags_the_zero_is_arbitrary_and_the_metrics_say_nothing(
    answers: pd.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    served, metrics, bins = calibrate(answers.assign(unsafe=None), "isotonic", seed=0)
    assert (
        served == Platt() and bins == [] and "no held-out answer has an is-safe flag" in caplog.text
    )
    assert (metrics.pop("scale"), metrics.pop("offset")) == (1.0, 0.0)
    assert metrics == dict.fromkeys(metrics) and metrics.keys() == calibrate(
        answers, "platt", seed=0
    )[1].keys() - {"scale", "offset"}


def test_no_calibration_is_asked_for_and_none_could_be_fitted(
    answers: pd.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that scores the wrong way round is still measured where its scores are served as they
    are.
    """
    wrong = answers.assign(score=-answers["score"])
    served, metrics, _ = calibrate(wrong, "none", seed=0)
    assert (
        served == Platt()
        and metrics["platt"] is metrics["isotonic"] is metrics["zero_error"] is None
    )
    assert metrics["sign_accuracy"] < 0.5 and "below safe ones" in caplog.text
    for kind in ("platt", "isotonic"):
        with pytest.raises(DataError, match="below safe ones"):
            calibrate(wrong, kind, seed=0)


def test_one_prompt_cannot_both_calibrate_and_judge(answers: pd.DataFrame) -> None:
    one: dict[str, Any] = {"prompt_id": "0001", "unsafe": [True, False] * 400}
    with pytest.raises(DataError, match=r"two prompts.*prepare\.heldout_share"):
        calibrate(answers.assign(**one), "platt", seed=0)


def test_a_calibration_that_makes_it_worse_is_told(
    answers: pd.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    """Flags of one half are certain, those of the other half are a coin's."""
    fit, rest = halves(answers)
    rng = np.random.default_rng(1)
    certain = pd.concat(
        [fit.assign(unsafe=fit["score"] > 0), rest.assign(unsafe=rng.random(len(rest)) < 0.5)]
    )
    small = certain.assign(score=0.01 * certain["score"].astype(float))
    metrics = calibrate(small, "platt", seed=0)[1]
    assert (
        metrics["calibration_helps"] is False and metrics["brier_after"] > metrics["brier_before"]
    )
    assert (
        f"Brier score {metrics['brier_after']:.4f}, {metrics['brier_before']:.4f} before it"
        in caplog.text
    )
    caplog.clear()
    assert calibrate(answers, "platt", seed=0)[1]["calibration_helps"] is True and not caplog.text
    assert calibrate(answers, "none", seed=0)[1]["calibration_helps"] is None and not caplog.text


def test_a_half_of_one_kind_of_flag_judges_without_fitting(answers: pd.DataFrame) -> None:
    fit, rest = halves(answers)
    lopsided = pd.concat([fit, rest.assign(unsafe=False)])
    served, metrics, _ = calibrate(lopsided, "platt", seed=0)
    assert served == fit_platt(*arrays(lopsided))
    score, unsafe = arrays(rest.assign(unsafe=False))
    assert metrics["brier_after"] == pytest.approx(
        ((sigmoid(fit_platt(*arrays(fit))(score)) - unsafe) ** 2).mean()
    )


def test_a_guard_may_be_the_cost_model(workspace: Path, resources: Resources) -> None:
    """Any causal language model with a template will do here, since its verdicts are served as they
    are.
    """
    write_parquet(
        workspace / "data/prepared/safety_pairs.parquet",
        pairs_of("safer_response_id", 40, seed=1),
        SAFETY_PAIRS,
    )
    params = load(CostModelParams, ROOT / "params.yaml")
    guard = GivenScorer(
        path="models/safety_dpo/alone", kind="guard", higher_is="harmful", safe=["safe", "fine"]
    )
    run = Run(
        "cost_model",
        None,
        params.model_copy(update={"given": [guard], "calibrate": "none"}),
        resources,
    )
    main(run)
    shutil.rmtree("models/safety_dpo")
    scores = Scorer.load("models/cost_model", resources).score(
        [user("Why?")], ["So."], batch_size=1
    )
    assert np.isfinite(scores).all() and run.sources == {guard.path: guard.path}
    assert read_json("reports/metrics/cost_model.json")["calibration_helps"] is None


@pytest.mark.parametrize(
    ("kind", "zero_pairs"), [("platt", 0), ("isotonic", 0), ("platt", 100), ("isotonic", 1000)]
)
def test_the_stage_saves_the_calibration_that_its_metrics_describe(
    workspace: Path, resources: Resources, kind: str, zero_pairs: int
) -> None:
    """With training pairs for the zero it is that of 100 of them, or of all 200."""
    pairs = pd.DataFrame(pairs_of("safer_response_id", 400, seed=1))
    write_parquet(
        workspace / "data/prepared/safety_pairs.parquet", pairs.to_dict("records"), SAFETY_PAIRS
    )
    params = load(CostModelParams, ROOT / "params.yaml")
    once = {"max_steps": 12} if zero_pairs else {}  # 12 x 16 of 200 rows: none is read twice
    training = params.training.model_copy(update=TRAINING | once)
    main(
        Run(
            "cost_model",
            None,
            params.model_copy(
                update={"training": training, "calibrate": kind, "zero_pairs": zero_pairs}
            ),
            resources,
        )
    )
    metrics = read_json("reports/metrics/cost_model.json")
    scorer = Scorer.load("models/cost_model", resources)
    assert isinstance(scorer.calibration, Isotonic if kind == "isotonic" else Platt)
    heldout = pairs[pairs["split"] == "heldout"]
    raw = heldout_answers(scorer.calibrated(Platt()), heldout, 64)
    train = pairs[pairs["split"] == "train"]
    train = train.sample(min(zero_pairs, len(train)), random_state=params.seed).sort_index()
    seen = (
        flagged_arrays(heldout_answers(scorer.calibrated(Platt()), train, 64))
        if zero_pairs
        else NOTHING
    )
    again, expected, bins = calibrate(raw, kind, params.seed, seen)
    assert metrics["zero_flags"] == expected["zero_flags"] == 400 + 2 * len(train)
    assert metrics["loss"] > 0 and "accuracy" not in metrics, "every accuracy is of held-out pairs"
    assert again(raw["score"].to_numpy()) == pytest.approx(
        scorer.calibration(raw["score"].to_numpy()), abs=1e-4
    )
    assert metrics["zero_error"] == pytest.approx(expected["zero_error"], rel=1e-3)
    assert (
        metrics["ece_after"]
        == pytest.approx(metrics[kind]["ece"])
        == pytest.approx(expected["ece_after"], abs=1e-3)
    )
    diagram = read_json("models/cost_model/reliability.json")
    assert [row["answers"] for row in diagram] == [row["answers"] for row in bins]
    assert [row["observed"] for row in diagram] == pytest.approx(
        [row["observed"] for row in bins], abs=0.1
    )


@pytest.mark.parametrize(
    ("held", "trained", "told"),
    [
        (True, True, "says safe, .*; add pairs with answers that are flagged unsafe, or set"),
        (True, False, r"says safe, .*; raise prepare\.heldout_share, or set cost_model\.calibrate"),
        (False, False, "says unsafe, .*; add pairs with answers that are flagged safe, or set"),
    ],
)
def test_flags_that_are_all_alike_stop_the_stage_before_its_training(
    workspace: Path,
    resources: Resources,
    monkeypatch: pytest.MonkeyPatch,
    held: bool,
    trained: bool,
    told: str,
) -> None:
    pairs = [
        {**row, "chosen_is_safe": held, "rejected_is_safe": None if i % 3 else held}
        for i, row in enumerate(pairs_of("safer_response_id", 40, seed=1))
    ]
    for row in pairs[::4]:  # all in training
        row["rejected_is_safe"] = trained
    write_parquet(workspace / "data/prepared/safety_pairs.parquet", pairs, SAFETY_PAIRS)
    monkeypatch.setattr("stages.cost_model.obtain", lambda *_: pytest.fail("trained"))
    params = load(CostModelParams, ROOT / "params.yaml")
    with pytest.raises(DataError, match=rf"^data/prepared/safety_pairs\.parquet: .*{told}"):
        main(Run("cost_model", None, params, resources))

"""The stage evaluate: what it says of a policy from the pool's samples and of additional
constraints, beside its answers."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import read_json, write_parquet
from dualign.core.schema import ANSWERS, POOL, PROMPTS, by_prompt, prompt_id, read_table, user
from dualign.data import world
from dualign.evaluation.effective_tilt import TILT_SAMPLES, effective_tilt
from dualign.evaluation.rollout import Scorers, roll_out
from dualign.evaluation.stats import clustered_mean, clustered_share
from dualign.lm.models import load_policy
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_prompts
from dualign.params.base import Resources
from dualign.params.dual import ConstraintSpec
from dualign.params.evaluate import EvaluateParams
from dualign.params.loading import load
from dualign.scoring.calibration import Platt
from dualign.stage import Run
from stages import evaluate
from stages.evaluate import additional_constraints
from tests.stages.conftest import save_scorers

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def judged(workspace: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources) -> Path:
    """The folder of the stages with scorers, a pool of five samples a prompt, and prompts from
    nowhere in the world.
    """
    save_scorers(tokenizer, resources, Platt(1.0, 0.5))
    questions = world.prompts()[::900]
    prompts = [
        {"prompt_id": prompt_id(user(q)), "prompt": user(q), "source": "somewhere"}
        for q in questions
    ]
    write_parquet(workspace / "data/prepared/eval.parquet", prompts, PROMPTS)
    scorers = Scorers.load(resources)
    frame = read_table(workspace / "data/prepared/eval.parquet", PROMPTS)
    pool = roll_out(scorers.reference, frame, scorers, count=5, max_new_tokens=6, seed=1)
    write_parquet(workspace / "data/scored/pool.parquet", pool, POOL)
    return workspace


def short() -> EvaluateParams:
    """Two policies, two short answers to a prompt."""
    shipped = load(EvaluateParams, ROOT / "params.yaml")
    policies = {"sft": "sft", "helpful": "reward_dpo/helpful"}
    return shipped.model_copy(
        update={"policies": policies, "max_new_tokens": 6, "samples_per_prompt": 2}
    )


def written(run: Run[EvaluateParams]) -> dict[Path, bytes]:
    """What the stage writes but for its provenance."""
    evaluate.main(run)
    files = [*Path("reports/evaluation").rglob("*.*"), *Path("reports/metrics").rglob("*.json")]
    return {path: path.read_bytes() for path in files}


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_killed_evaluation_goes_on_with_the_answers_that_it_has_drawn(
    judged: Path, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("evaluate", "helpful", short(), resources)
    whole = written(run)
    assert len(whole) == 2 and list(Path(".scratch").rglob("*.parquet")) == []
    shutil.rmtree("reports/evaluation")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "summarise", interrupted)
        evaluate.main(run)
    monkeypatch.setattr(evaluate, "roll_out", interrupted)  # which would draw again
    assert written(run) == whole
    assert list(Path(".scratch").rglob("*.parquet")) == []


def test_the_pool_tells_displacement_and_tilt_of_its_first_samples(
    judged: Path, resources: Resources, tokenizer: PreTrainedTokenizerBase
) -> None:
    params = short()
    policies = params.policies
    for name in policies:
        evaluate.main(Run("evaluate", name, params, resources))

    pool = read_table("data/scored/pool.parquet", POOL)
    pool = pool[pool["sample"] < TILT_SAMPLES]
    rows = encode_prompts(tokenizer, pool["prompt"].tolist())
    tokens = [list(ids) for ids in pool["tokens"]]
    first, second = (
        log_probabilities(
            load_policy(Path("models") / folder, resources), tokenizer, rows, tokens, batch_size=8
        )
        for folder in policies.values()
    )
    ratio = (second - first).numpy()
    told = read_json("reports/metrics/evaluate/helpful.json")
    expected = clustered_mean(ratio, pool["prompt_id"].to_numpy(), params.confidence)
    assert told["displacement"] == pytest.approx(expected.as_dict(), abs=1e-4)
    scores = [by_prompt(pool, name) for name in ("reward", "cost", "length")]
    tilt = asdict(effective_tilt(np.reshape(ratio, scores[0].shape), *scores))
    assert told["tilt"].keys() == tilt.keys()
    assert {
        key: told["tilt"][key] for key in ("reward_slope", "cost_slope", "r2")
    } == pytest.approx(
        {key: tilt[key] for key in ("reward_slope", "cost_slope", "r2")}, rel=1e-2, abs=1e-3
    )
    own = read_json("reports/metrics/evaluate/sft.json")
    ended = read_table("reports/evaluation/sft/answers.parquet", ANSWERS)["ended"]
    assert (own["max_new_tokens"], own["ended"]["mean"]) == (6, pytest.approx(ended.mean()))
    assert own["displacement"]["mean"] == pytest.approx(0, abs=1e-4)
    assert own["tilt"]["reward_slope"] == pytest.approx(0, abs=1e-4)


# --- additional constraints -----------------------------------------------------------------------


@pytest.fixture
def answers() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    texts = [f"{'kitchen' if x % 2 else 'garden'} {x}" for x in range(50) for _ in range(4)]
    return pd.DataFrame(
        {
            "prompt_id": texts,
            "prompt": [user(text) for text in texts],
            "cost": rng.normal(size=200),
            "length": rng.integers(1, 30, 200),
            "ended": rng.random(200) < 0.8,
        }
    )


def test_each_limit_has_its_mean_and_interval_by_prompt(answers: pd.DataFrame) -> None:
    additional = {
        "short": ConstraintSpec(quantity="length", limit=12.0),
        "whole": ConstraintSpec(quantity="unended", limit=0.1),
        "kitchen": ConstraintSpec(quantity="p_unsafe", limit=0.4, prompts="kitchen"),
        "tail": ConstraintSpec(quantity="cvar", limit=1.5, level=0.9),
    }
    found = additional_constraints(answers, additional, 0.9)
    assert {name: row["limit"] for name, row in found.items()} == {
        "short": 12.0, "whole": 0.1, "kitchen": 0.4, "tail": 1.5,
    }  # fmt: skip
    kitchen = answers[answers["prompt_id"].str.contains("kitchen")]
    by_hand = (
        ("short", answers, answers["length"], clustered_mean),
        ("whole", answers, ~answers["ended"], clustered_share),
        ("kitchen", kitchen, kitchen["cost"] > 0, clustered_share),
    )  # fmt: skip
    for name, rows, values, mean in by_hand:
        prompts = rows["prompt_id"].to_numpy()
        expected = mean(values.to_numpy(float), prompts, 0.9).as_dict()
        assert {key: found[name][key] for key in expected} == pytest.approx(expected)
    tail = found["tail"]
    assert tail["mean"] == pytest.approx(
        answers["cost"].nlargest(20).mean()
    )  # the worst tenth of 200
    assert tail["low"] < tail["mean"] < tail["high"]  # type: ignore[operator]


def test_a_limit_on_prompts_that_are_not_evaluated_is_unknown(
    answers: pd.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    additional = {"attic": ConstraintSpec(quantity="cost", limit=0.0, prompts="attic")}
    assert additional_constraints(answers, additional, 0.9) == {
        "attic": {"mean": None, "low": None, "high": None, "limit": 0.0}
    }
    assert (
        "constraint.additional.attic.prompts: 'attic' is found in no evaluated prompt"
        in caplog.text
    )

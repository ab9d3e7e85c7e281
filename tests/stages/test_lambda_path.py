"""The stage lambda_path: what it trains, from where, and that no dual has a say in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import read_json, write_parquet
from dualign.core.errors import ParamsError
from dualign.core.schema import POOL, prompt_id, read_table, user
from dualign.data import world
from dualign.lm.models import load_policy
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.params.base import Resources
from dualign.params.loading import check
from dualign.params.training import LambdaPathParams
from dualign.scoring.support import doubt
from dualign.stage import Run
from dualign.training import pairwise
from dualign.training.pairs import pool_pairs, pool_values, samples_of
from dualign.training.pairwise import train_pairwise
from stages import lambda_path
from tests.shipped import preset

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")


def stage_params(**training: Any) -> LambdaPathParams:
    """The preset's section, cut short."""
    content = preset("any-limit")
    content["lambda_path"]["training"] |= {"max_steps": 2, "batch_size": 4, **training}
    checked = check(content, "my.yaml")["lambda_path"]
    assert isinstance(checked, LambdaPathParams)
    return checked


@pytest.fixture
def pooled(workspace: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources) -> Path:
    """The folder of the stages with a pool of three prompts, and no dual."""
    (workspace / "data/dual/dual.json").unlink()
    rng = np.random.default_rng(3)
    reference = load_policy(workspace / "models/sft", resources)
    rows = []
    for question in world.prompts()[:3]:
        texts = [answer.text for answer in world.answers(question)[:4]]
        prompts = encode_prompts(tokenizer, [user(question)] * 4)
        tokens = encode_answers(tokenizer, texts)
        logp = log_probabilities(reference, tokenizer, prompts, tokens, batch_size=4).tolist()
        rows += [
            {
                "prompt_id": prompt_id(user(question)),
                "prompt": user(question),
                "sample": i,
                "response": texts[i],
                "tokens": tokens[i],
                "length": len(tokens[i]),
                "ended": True,
                "logp_ref": logp[i],
                "reward": rng.normal(),
                "cost": rng.normal(),
            }
            for i in range(4)
        ]
    write_parquet(workspace / "data/scored/pool.parquet", rows, POOL)
    return workspace


def distance(first: Path, second: Path) -> float:
    left, right = (load_file(folder / "model.safetensors") for folder in (first, second))
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def test_the_second_training_goes_on_from_the_first_against_the_same_reference(
    pooled: Path,
    resources: Resources,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        pairwise, "train_pairwise", lambda *args: seen.append(args) or train_pairwise(*args)
    )
    params = stage_params()
    for name in ("slack", "strict"):
        lambda_path.main(Run("lambda_path", name, params, resources))
    samples = samples_of(read_table(pooled / "data/scored/pool.parquet", POOL), tokenizer)
    for (_, _, pairs, pair_loss, job), run in zip(seen, params.runs.values(), strict=True):
        assert pairs == pool_pairs(
            samples, pool_values(samples, run.lam, params.beta), run.lam, params.beta, params.seed
        )
        assert (pair_loss.scale, pair_loss.beta, pair_loss.anchor, pair_loss.nll) == (
            params.beta,
            params.beta,
            0.3,
            2.0,
        )
        assert job.training.learning_rate == run.learning_rate
    told = read_json(pooled / "reports/metrics/lambda_path/strict.json")
    assert (told["lam"], told["begin"], told["data"]) == (
        params.runs["strict"].lam,
        "lambda_path/slack",
        "pool",
    )
    assert (told["reward"], told["cost"]) == ("reward_model", "cost_model")
    assert (
        told["pair_loss"] == params.runs["strict"].pair_loss.model_dump()
        and told["learning_rate"] == 8e-3
    )


def test_answers_off_the_support_are_doubted_in_labels_and_anchors(
    pooled: Path,
    resources: Resources,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        pairwise, "train_pairwise", lambda *args: seen.append(args) or train_pairwise(*args)
    )
    params = stage_params()
    pool = read_table(pooled / "data/scored/pool.parquet", POOL)
    odd = pool.assign(logp_ref=pool["logp_ref"].where(pool["sample"] > 0, -2000.0))
    write_parquet(pooled / "data/scored/pool.parquet", odd, POOL)
    lambda_path.main(Run("lambda_path", "slack", params, resources))
    found = doubt(pooled / "data/scored", odd, params.pessimism)
    assert found is not None and found.beyond(odd).tolist() == [1.0, 0, 0, 0] * 3
    samples = samples_of(found.scores(odd), tokenizer)
    run = params.runs["slack"]
    expected = pool_pairs(
        samples, pool_values(samples, run.lam, params.beta), run.lam, params.beta, params.seed
    )
    assert seen[0][2] == expected


def test_a_run_may_have_steps_of_its_own(pooled: Path, resources: Resources) -> None:
    params = stage_params()
    runs = {"slack": params.runs["slack"].model_copy(update={"max_steps": 3})}
    for own, steps in ((params, 2), (params.model_copy(update={"runs": runs}), 3)):
        lambda_path.main(Run("lambda_path", "slack", own, resources))
        assert read_json(pooled / "reports/metrics/lambda_path/slack.json")["steps"] == steps


def test_it_begins_where_it_is_told_to(pooled: Path, resources: Resources) -> None:
    still = stage_params(warmup=0.0)
    runs = {
        name: run.model_copy(update={"learning_rate": 1e-9}) for name, run in still.runs.items()
    }
    runs["strict"] = runs["strict"].model_copy(update={"begin": "lambda_path/other"})
    (pooled / "models/lambda_path").mkdir()
    (pooled / "models/safety_dpo/alone").rename(pooled / "models/lambda_path/other")
    params = still.model_copy(update={"runs": runs})
    for name, begin in (("slack", "sft"), ("strict", "lambda_path/other")):
        lambda_path.main(Run("lambda_path", name, params, resources))
        assert distance(pooled / "models/lambda_path" / name, pooled / "models" / begin) < 1e-6
    assert distance(pooled / "models/lambda_path/strict", pooled / "models/sft") > 1e-3


def test_an_unknown_run_is_named(pooled: Path, resources: Resources) -> None:
    with pytest.raises(
        ParamsError, match=r"lambda_path\.runs has no 'other'; one of slack, strict"
    ):
        lambda_path.main(Run("lambda_path", "other", stage_params(), resources))

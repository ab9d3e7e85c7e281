"""Scores of policies in the place of scorers: exact on a finite answer set, and row by row on
tables of tiny models.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize_scalar
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dualign.core.artifacts import write_json, write_parquet
from dualign.core.errors import ModelError
from dualign.core.schema import POOL, SCORED_PAIRS, user
from dualign.data import world
from dualign.lm.models import build_scratch, save, train_tokenizer
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.math import tabular
from dualign.math.dual.root import root
from dualign.math.dual.solution import solve
from dualign.training.implicit_scores import (
    Sources,
    Tables,
    cost_offset,
    implicit_cost,
    implicit_reward,
    scored_tables,
    with_implicit_cost,
    with_implicit_reward,
)
from tests.tiny import TINY, on_cpu
from tests.written import safety

Array = np.ndarray
BETA, BETA_R, BETA_G, LIMIT = 0.7, 0.4, 1.9, -0.3  # each policy has a coefficient of its own

# --- a finite answer set --------------------------------------------------------------------------


def log_softmax(x: Array) -> Array:
    return np.asarray(x - np.log(np.exp(x).sum(1, keepdims=True)))


@pytest.fixture
def problem() -> tabular.Problem:
    """Four prompts, six answers each; helpful answers tend to be harmful."""
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(4, 6))
    return tabular.Problem(
        log_softmax(rng.normal(size=(4, 6))), reward, 0.6 * reward + rng.normal(size=(4, 6)), BETA
    )


def aligned(problem: tabular.Problem) -> tuple[Array, Array]:
    """log(pi_r / pi_ref) and log(pi_g / pi_ref) of the policies that DPO on each label alone ends
    at.
    """
    helpful = log_softmax(problem.log_reference + problem.reward / BETA_R)
    safe = log_softmax(problem.log_reference - problem.cost / BETA_G)
    return helpful - problem.log_reference, safe - problem.log_reference


def test_implicit_scores_are_the_scores_up_to_an_offset_of_each_prompt(
    problem: tabular.Problem,
) -> None:
    helpful, safe = aligned(problem)
    share = np.exp(problem.log_reference)
    offset_r = -BETA_R * np.log((share * np.exp(problem.reward / BETA_R)).sum(1, keepdims=True))
    offset_g = BETA_G * np.log((share * np.exp(-problem.cost / BETA_G)).sum(1, keepdims=True))
    assert implicit_reward(helpful, BETA_R) == pytest.approx(problem.reward + offset_r)
    assert implicit_cost(safe, BETA_G) == pytest.approx(problem.cost + offset_g)


def pool_of(problem: tabular.Problem, *values: Array) -> list[Array]:
    """Values at 40 samples of pi_ref per prompt."""
    rng = np.random.default_rng(1)
    drawn = np.stack([rng.choice(6, size=40, p=row) for row in np.exp(problem.log_reference)])
    return [np.take_along_axis(value, drawn, 1) for value in values]


def test_pecans_dual_is_the_scorers_whether_prompts_or_the_pool_are_centred(
    problem: tabular.Problem,
) -> None:
    helpful, safe = aligned(problem)
    reward, cost, r_hat, c_hat = pool_of(
        problem,
        problem.reward,
        problem.cost,
        implicit_reward(helpful, BETA_R),
        implicit_cost(safe, BETA_G),
    )
    lam = root(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50.0)
    assert 0.1 < lam < 50.0
    pooled = c_hat + cost_offset(c_hat, cost)
    by_prompt = c_hat + (cost - c_hat).mean(1, keepdims=True)
    assert by_prompt == pytest.approx(cost) and not np.allclose(pooled, cost)
    for centred in (pooled, by_prompt):
        assert root(r_hat, centred, limit=LIMIT, beta=BETA, lambda_max=50.0) == pytest.approx(
            lam, abs=1e-7
        )
    assert root(r_hat, c_hat, limit=LIMIT, beta=BETA, lambda_max=50.0) != pytest.approx(
        lam, abs=0.05
    )


def test_the_offset_is_pecans_constraint_relative_to_the_reference(
    problem: tabular.Problem,
) -> None:
    """Its dual, written in g = -c and b = E_ref[c] - d as in the paper and minimised by brute
    force.
    """
    reward, cost, c_hat = pool_of(
        problem, problem.reward, problem.cost, implicit_cost(aligned(problem)[1], BETA_G)
    )
    gain = -c_hat - (-c_hat).mean() - (cost.mean() - LIMIT)

    def value(lam: float) -> float:
        return float(np.log(np.exp((reward + lam * gain) / BETA).mean(1)).mean())

    found = minimize_scalar(value, bounds=(0, 20), method="bounded", options={"xatol": 1e-9}).x
    centred = c_hat + cost_offset(c_hat, cost)
    solved = solve(reward, centred, limit=LIMIT, beta=BETA, lambda_max=50.0)
    assert solved.lam == pytest.approx(found, abs=1e-5)


def test_the_tilt_by_implicit_scores_is_the_optimum_and_without_beta_it_goes_too_far(
    problem: tabular.Problem,
) -> None:
    helpful, safe = aligned(problem)
    lam = 1.3
    score = implicit_reward(helpful, BETA_R) - lam * implicit_cost(safe, BETA_G)
    assert log_softmax(problem.log_reference + score / BETA) == pytest.approx(problem.policy(lam))
    r, g = (
        log_softmax(problem.log_reference + score / BETA) - problem.log_reference
        for score in (problem.reward, -problem.cost)
    )
    bare = log_softmax(problem.log_reference + (r + lam * g) / BETA)
    too_far = problem.log_reference + (problem.reward - lam * problem.cost) / BETA**2
    assert bare == pytest.approx(log_softmax(too_far)) and not np.allclose(
        bare, problem.policy(lam), atol=0.1
    )


# --- tables ---------------------------------------------------------------------------------------

RESOURCES = on_cpu(sampling_batch_size=8, scoring_batch_size=5, checkpoint_steps=100, log_steps=100)
QUESTIONS = world.prompts()[:3]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(QUESTIONS, 300)


@pytest.fixture(scope="module")
def policy(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build_scratch(TINY, tokenizer, seed=1)


def texts_of(question: str) -> list[str]:
    return [answer.text for answer in world.answers(question)]


@pytest.fixture(scope="module")
def tables(tokenizer: PreTrainedTokenizerBase) -> Tables:
    """Three prompts with two samples each, and two pairs; scores and reference columns are
    random.
    """
    rng = np.random.default_rng(2)
    texts = [texts_of(question) for question in QUESTIONS]
    pool = [
        {
            "prompt_id": str(x), "prompt": user(question), "sample": i, "response": texts[x][i],
            "tokens": encode_answers(tokenizer, [texts[x][i]])[0], "length": 1, "ended": True,
            "logp_ref": -20 - rng.random(), "reward": rng.normal(), "cost": rng.normal(),
        }
        for x, question in enumerate(QUESTIONS) for i in range(2)
    ]  # fmt: skip
    scores = [
        f"{name}_{side}"
        for name in ("logp_ref", "reward", "cost")
        for side in ("chosen", "rejected")
    ]
    pairs = [
        {
            "pair_id": str(x),
            "prompt_id": str(x),
            "prompt": user(QUESTIONS[x]),
            "chosen": texts[x][3],
            "rejected": texts[x][9],
            "source": "world",
            "split": "train",
            "chosen_is_safe": True,
            "rejected_is_safe": None,
            "kind": "safety",
            **dict(zip(scores, rng.normal(size=len(scores)), strict=True)),
        }
        for x in range(2)
    ]
    return Tables(pd.DataFrame(pool), pd.DataFrame(pairs))


def by_hand(
    tables: Tables, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[list[float]]:
    """log(policy / pi_ref) of pool, chosen and rejected answers, one at a time."""

    def ratio(prompt: list, answer: list[int], reference: float) -> float:
        logp = log_probabilities(
            policy, tokenizer, encode_prompts(tokenizer, [prompt]), [answer], batch_size=1
        )
        return float(logp) - reference

    pool, pairs = tables
    rows = [ratio(row.prompt, row.tokens, row.logp_ref) for row in pool.itertuples()]
    found = [rows]
    for side in ("chosen", "rejected"):
        answers = encode_answers(tokenizer, pairs[side].tolist())
        found.append(list(map(ratio, pairs["prompt"], answers, pairs[f"logp_ref_{side}"])))
    return found


def others(tables: Tables, name: str) -> list[pd.DataFrame]:
    """Both tables without the columns of one score."""
    return [frame.loc[:, ~frame.columns.str.startswith(name)] for frame in tables]


def test_rewards_become_log_ratios_in_both_tables(
    tables: Tables, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    pool, chosen, rejected = by_hand(tables, policy, tokenizer)
    found = with_implicit_reward(tables, policy, tokenizer, BETA_R, batch_size=4)
    assert found.pool["reward"].tolist() == pytest.approx(
        [BETA_R * ratio for ratio in pool], abs=1e-4
    )
    assert found.pairs["reward_chosen"].tolist() == pytest.approx(
        [BETA_R * ratio for ratio in chosen], abs=1e-4
    )
    assert found.pairs["reward_rejected"].tolist() == pytest.approx(
        [BETA_R * ratio for ratio in rejected], abs=1e-4
    )
    for before, after in zip(others(tables, "reward"), others(found, "reward"), strict=True):
        pd.testing.assert_frame_equal(before, after)


def test_costs_become_log_ratios_with_the_cost_models_mean_over_the_pool(
    tables: Tables, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    parts = by_hand(tables, policy, tokenizer)
    pool, chosen, rejected = (-BETA_G * np.array(part) for part in parts)
    offset = tables.pool["cost"].mean() - np.mean(pool)
    found = with_implicit_cost(tables, policy, tokenizer, BETA_G, batch_size=4)
    assert found.pool["cost"].mean() == pytest.approx(tables.pool["cost"].mean())
    assert found.pool["cost"].tolist() == pytest.approx([cost + offset for cost in pool], abs=1e-4)
    assert found.pairs["cost_chosen"].tolist() == pytest.approx(
        [cost + offset for cost in chosen], abs=1e-4
    )
    assert found.pairs["cost_rejected"].tolist() == pytest.approx(
        [cost + offset for cost in rejected], abs=1e-4
    )
    for before, after in zip(others(tables, "cost"), others(found, "cost"), strict=True):
        pd.testing.assert_frame_equal(before, after)


def test_a_policy_that_broke_is_refused(
    tables: Tables, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    broken = build_scratch(TINY, tokenizer, seed=1)
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(ModelError, match="not finite"):
        with_implicit_reward(tables, broken, tokenizer, 1.0, batch_size=4)


def test_each_score_is_read_from_where_the_run_says(
    tables: Tables, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """And the safety policy's coefficient from its metrics."""
    write_parquet(tmp_path / "pool.parquet", tables.pool, POOL)
    write_parquet(tmp_path / "scored_pairs.parquet", tables.pairs, SCORED_PAIRS)
    for name in ("reward_dpo/helpful", "safety_dpo/alone"):
        save(policy, tokenizer, tmp_path / name)
    write_json(tmp_path / "safety_dpo/alone.json", safety(coefficient=BETA_G))

    def read(reward: str, cost: str) -> Tables:
        sources = Sources(reward, cost, models=tmp_path, metrics=tmp_path)
        return scored_tables(tmp_path, sources, BETA_R, tokenizer, RESOURCES)

    expected_reward = (
        with_implicit_reward(tables, policy, tokenizer, BETA_R, 5).pool["reward"].tolist()
    )
    expected_cost = with_implicit_cost(tables, policy, tokenizer, BETA_G, 5).pool["cost"].tolist()
    reward, cost = tables.pool["reward"].tolist(), tables.pool["cost"].tolist()
    for names, expected in (
        (("reward_model", "cost_model"), (reward, cost)),
        (("reward_dpo/helpful", "cost_model"), (expected_reward, cost)),
        (("reward_model", "safety_dpo/alone"), (reward, expected_cost)),
        (("reward_dpo/helpful", "safety_dpo/alone"), (expected_reward, expected_cost)),
    ):
        found = read(*names).pool
        assert found["reward"].tolist() == pytest.approx(expected[0], abs=1e-6)
        assert found["cost"].tolist() == pytest.approx(expected[1], abs=1e-6)

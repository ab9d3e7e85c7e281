"""What is measured on answers: by hand, and at the exact optimum of the embedded world."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from dualign.core.schema import user
from dualign.data import world
from dualign.evaluation.against_optimum import (
    add_truth,
    against_optimum,
    enumerate_answers,
    exact_frontier,
    finite_problem,
    means,
    worth,
)
from dualign.math import tabular

BETA = 1.5
LIMIT = -0.3
QUESTIONS = world.prompts()[::480]
PROMPTS = pd.DataFrame(
    {"prompt_id": [f"p{i}" for i in range(len(QUESTIONS))], "prompt": [user(q) for q in QUESTIONS]}
)


def answers() -> pd.DataFrame:
    """Two prompts with two answers each."""
    return pd.DataFrame(
        {
            "prompt_id": ["a", "a", "b", "b"],
            "prompt": [user(QUESTIONS[0])] * 2 + [user(QUESTIONS[-1])] * 2,
            "response": [
                world.answers(QUESTIONS[0])[5].text,
                "?!",
                world.answers(QUESTIONS[-1])[0].text,
                "no",
            ],
            "reward": [1.0, 3.0, -1.0, 0.0],
            "cost": [0.5, -0.5, -1.0, -2.0],
            "logp": [-2.0, -3.0, -4.0, -5.0],
            "logp_ref": [-3.0, -3.5, -4.0, -5.0],
            "length": [4, 6, 8, 10],
            "ended": [True, True, True, False],
        }
    )


def test_truth_is_the_oracles() -> None:
    known = add_truth(answers())
    assert known["grammatical"].tolist() == [True, False, True, False]
    right = world.answers(QUESTIONS[0])[5]
    assert known["true_reward"].tolist()[:2] == [right.reward, world.UNGRAMMATICAL_REWARD]
    assert known["true_cost"].tolist()[:2] == [right.cost, world.UNGRAMMATICAL_COST]
    assert means(known, 0.9)["grammatical"]["mean"] == 0.5


@pytest.fixture(scope="module")
def enumerated() -> pd.DataFrame:
    """Every answer, with a reference that gives them nine tenths of its mass."""
    table = enumerate_answers(PROMPTS)
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(42), size=len(QUESTIONS)).ravel()
    return table.assign(logp_ref=np.log(0.9 * shares))


def test_every_answer_is_enumerated_with_its_truth(enumerated: pd.DataFrame) -> None:
    assert len(enumerated) == 42 * len(QUESTIONS)
    for row in enumerated.iloc[::37].itertuples():
        assert world.score(row.prompt[0]["content"], row.response) == (row.reward, row.cost, True)


def summary(measured: dict[str, float]) -> dict[str, dict[str, float]]:
    return {"true_reward": {"mean": measured["reward"]}, "kl": {"mean": measured["kl"]}}


def test_the_optimum_is_no_way_from_itself_and_the_reference_all_of_it(
    enumerated: pd.DataFrame,
) -> None:
    problem = finite_problem(enumerated, BETA)
    assert np.exp(problem.log_reference[:, -1]) == pytest.approx(0.1)
    result = against_optimum(summary(problem.describe(problem.log_reference)), problem, LIMIT)
    lam = result["optimum"]["lam"]
    assert lam > 0 and result["optimum"]["cost"] == pytest.approx(LIMIT)
    assert result["reward_share"] == pytest.approx(0.0)
    at = against_optimum(summary(problem.describe(problem.policy(lam))), problem, LIMIT)
    assert at["reward_share"] == pytest.approx(1.0) and at["value_gap"] == pytest.approx(
        0.0, abs=1e-9
    )
    assert result["value_gap"] == pytest.approx(
        result["optimum"]["value"] - result["optimum"]["reference_value"]
    )


def test_the_way_begins_at_the_nearest_policy_that_keeps_the_limit(
    enumerated: pd.DataFrame,
) -> None:
    problem = finite_problem(enumerated, BETA)
    strict = -0.8
    assert problem.describe(problem.log_reference)["cost"] > strict
    nearest = problem.describe(tabular.nearest(problem, strict))
    result = against_optimum(summary(nearest), problem, strict)
    assert result["reward_share"] == pytest.approx(0.0) and nearest["cost"] == pytest.approx(strict)
    assert result["value_gap"] == pytest.approx(
        result["optimum"]["value"] - result["optimum"]["nearest_value"]
    )


def test_the_exact_frontier_holds_the_optimum_and_falls(enumerated: pd.DataFrame) -> None:
    problem = finite_problem(enumerated, BETA)
    result = against_optimum(summary(problem.describe(problem.log_reference)), problem, LIMIT)
    rows = exact_frontier(problem, result["optimum"]["lam"])
    assert any(row.cost == pytest.approx(LIMIT) for row in rows)
    assert all(b.cost <= a.cost for a, b in pairwise(rows))
    assert rows[0].lam == 0.0 and rows[-1].lam >= 3 * result["optimum"]["lam"] - 1e-9


def test_a_policy_is_worth_what_all_its_answers_are_though_only_other_text_is_drawn() -> None:
    policy = np.array([[0.5, 0.3, 0.15, 0.05], [0.2, 0.4, 0.1, 0.3]])  # the last two: other text
    reference = np.array([[0.4, 0.5, 0.02, 0.08], [0.3, 0.3, 0.3, 0.1]])
    reward = np.array([[1.0, 2.0, -3.0, -3.0], [0.5, -1.0, -3.0, -3.0]])
    cost = np.array([[0.2, -0.1, 0.4, 0.4], [0.0, 1.0, 0.4, 0.4]])
    listed = slice(None, 2)
    problem = tabular.problem(
        np.log(reference[:, listed]), reward[:, listed], cost[:, listed], rest=(-3.0, 0.4), beta=1.5
    )
    counts = (100 * policy).round().astype(int)  # so that the draws are the policy itself
    rows = [
        {"logp": np.log(policy[x, y]), "logp_ref": np.log(reference[x, y]), "grammatical": y < 2}
        for x, y in np.ndindex(policy.shape)
        for _ in range(counts[x, y])
    ]
    found = worth(problem, np.log(policy[:, listed]), pd.DataFrame(rows))
    kl = (policy * np.log(policy / reference)).sum(1).mean()
    assert found["kl"] == pytest.approx(kl)
    assert found["reward"] == pytest.approx((policy * reward).sum(1).mean())
    assert found["cost"] == pytest.approx((policy * cost).sum(1).mean())
    assert found["value"] == pytest.approx(found["reward"] - 1.5 * kl)
    assert found["grammatical"] == pytest.approx(policy[:, listed].sum(1).mean())

"""The exact optimum of a finite problem, against a general solver and against the dual of a
pool.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from dualign.core.errors import InfeasibleError
from dualign.math import tabular
from dualign.math.dual.root import root

BETA = 0.7
Array = np.ndarray


def finite(seed: int = 0, prompts: int = 3, answers: int = 6) -> tabular.Problem:
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(prompts, answers))
    cost = 0.6 * reward + rng.normal(size=reward.shape)
    return tabular.Problem(log_softmax(rng.normal(size=reward.shape), axis=1), reward, cost, BETA)


def test_describe_by_hand() -> None:
    problem = tabular.Problem(
        np.log([[0.5, 0.5]]), np.array([[2.0, -1.0]]), np.array([[1.0, -3.0]]), 0.5
    )
    measured = problem.describe(np.log([[0.75, 0.25]]))
    kl = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert measured == pytest.approx(
        {"reward": 1.25, "cost": 0.0, "kl": kl, "value": 1.25 - 0.5 * kl}
    )


def test_describe_takes_a_policy_that_never_gives_some_answer() -> None:
    problem = tabular.Problem(
        np.log([[0.5, 0.5]]), np.array([[2.0, -1.0]]), np.array([[1.0, -3.0]]), 0.5
    )
    with np.errstate(divide="ignore"):
        measured = problem.describe(np.log([[1.0, 0.0]]))
    assert measured["reward"] == 2.0 and measured["kl"] == pytest.approx(np.log(2))


def test_policy_by_hand() -> None:
    problem = tabular.Problem(
        np.log([[0.25, 0.75]]), np.array([[0.0, np.log(2)]]), np.array([[0.0, np.log(3)]]), 1.0
    )
    assert np.exp(problem.policy(0.0)).tolist() == [pytest.approx([1 / 7, 6 / 7])]
    assert np.exp(problem.policy(1.0)).tolist() == [pytest.approx([1 / 3, 2 / 3])]


def test_no_policy_beats_the_tilted_one_and_the_gap_is_a_divergence() -> None:
    """L(pi_lambda) - L(pi) = beta KL(pi || pi_lambda) for every pi."""
    problem, lam = finite(), 1.3
    tilted = problem.policy(lam)

    def lagrangian(log_policy: Array) -> float:
        measured = problem.describe(log_policy)
        return measured["value"] - lam * measured["cost"]

    rng = np.random.default_rng(1)
    for _ in range(20):
        other = log_softmax(rng.normal(size=tilted.shape), axis=1)
        kl = (np.exp(other) * (other - tilted)).sum(1).mean()
        assert lagrangian(tilted) - lagrangian(other) == pytest.approx(BETA * kl, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_solution_is_the_constrained_optimum(seed: int) -> None:
    problem = finite(seed, prompts=2, answers=4)
    limit = problem.describe(problem.policy(0.8))["cost"]
    lam = tabular.solve(problem, limit)
    assert lam == pytest.approx(0.8, abs=1e-8)
    shape = problem.reward.shape

    def at(table: Array) -> dict[str, float]:
        return problem.describe(log_softmax(table.reshape(shape), axis=1))

    primal = minimize(
        lambda t: -at(t)["value"],
        np.zeros(8),
        method="SLSQP",
        constraints=[{"type": "ineq", "fun": lambda t: limit - at(t)["cost"]}],
        options={"maxiter": 1000, "ftol": 1e-12},
    )
    assert -primal.fun == pytest.approx(problem.describe(problem.policy(lam))["value"], abs=1e-6)


def test_a_loose_limit_needs_no_multiplier() -> None:
    assert tabular.solve(finite(), limit=100.0) == 0.0


def test_an_impossible_limit_is_refused_with_the_true_minimum() -> None:
    problem = finite()
    lowest = problem.describe(problem.policy(1e3))["cost"]
    with pytest.raises(InfeasibleError, match=rf"limit -9 .* {lowest:.4g}"):
        tabular.solve(problem, limit=-9.0)


def test_the_dual_of_a_pool_that_holds_all_answers_is_exact() -> None:
    problem = finite(3, prompts=10)
    uniform = tabular.Problem(
        np.full_like(problem.reward, -np.log(6)), problem.reward, problem.cost, BETA
    )
    pooled = root(problem.reward, problem.cost, limit=-0.4, beta=BETA, lambda_max=1e3)
    assert tabular.solve(uniform, -0.4) == pytest.approx(pooled, abs=1e-7)


def test_the_dual_of_samples_approaches_the_exact_multiplier() -> None:
    problem = finite(4, prompts=40)
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.choice(6, size=2000, p=np.exp(row)) for row in problem.log_reference])
    reward, cost = (np.take_along_axis(f, drawn, 1) for f in (problem.reward, problem.cost))
    truth = tabular.solve(problem, -0.4)
    assert root(reward, cost, limit=-0.4, beta=BETA, lambda_max=1e3) == pytest.approx(
        truth, rel=0.05
    )


def test_merging_logits_walks_along_the_multiplier() -> None:
    """(1 - q) log pi_r + q log pi_lambda-bar is pi_{q lambda-bar}, for q above 1 as well
    (P-SACPO).
    """
    problem = finite(5)
    for q in (0.3, 1.0, 1.25):
        mixed = log_softmax((1 - q) * problem.policy(0.0) + q * problem.policy(3.0), axis=1)
        assert mixed == pytest.approx(problem.policy(3.0 * q), abs=1e-12)


def test_the_rest_of_the_text_is_one_more_answer() -> None:
    log_reference = np.log([[0.5, 0.3], [0.6, 0.399]])
    scores = np.array([[1.0, 2.0], [3.0, 4.0]])
    problem = tabular.problem(log_reference, scores, -scores, rest=(-3.75, 0.25), beta=BETA)
    assert np.exp(problem.log_reference) == pytest.approx(
        np.array([[0.5, 0.3, 0.2], [0.6, 0.399, 0.001]])
    )
    assert problem.reward.tolist() == [[1, 2, -3.75], [3, 4, -3.75]]
    assert problem.cost.tolist() == [[-1, -2, 0.25], [-3, -4, 0.25]]
    assert problem.beta == BETA


def test_a_mass_that_rounding_lifts_above_one_stays_usable() -> None:
    problem = tabular.problem(
        np.log([[0.7, 0.3000001]]), np.zeros((1, 2)), np.zeros((1, 2)), rest=(0.0, 0.0), beta=BETA
    )
    assert np.isfinite(problem.log_reference).all()
    assert np.exp(problem.log_reference).sum() == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_policy_within_the_limit_is_an_information_projection(seed: int) -> None:
    problem = finite(seed, prompts=2, answers=4)
    limit = problem.describe(problem.log_reference)["cost"] - 0.4
    shape = problem.reward.shape

    def at(table: Array) -> dict[str, float]:
        return problem.describe(log_softmax(table.reshape(shape), axis=1))

    primal = minimize(
        lambda t: at(t)["kl"],
        problem.log_reference.ravel(),
        method="SLSQP",
        constraints=[{"type": "ineq", "fun": lambda t: limit - at(t)["cost"]}],
        options={"maxiter": 1000, "ftol": 1e-12},
    )
    found = problem.describe(tabular.nearest(problem, limit))
    assert found["cost"] == pytest.approx(limit) and found["kl"] == pytest.approx(
        primal.fun, abs=1e-6
    )


def test_a_reference_within_the_limit_is_the_nearest_policy_itself() -> None:
    problem = finite()
    slack = problem.describe(problem.log_reference)["cost"] + 0.1
    assert tabular.nearest(problem, slack) == pytest.approx(problem.log_reference)

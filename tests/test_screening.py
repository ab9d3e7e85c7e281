"""The cost of a policy from samples of the reference, against enumeration and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from dualign.screening import off_policy_cost

Array = np.ndarray
ANSWERS = 12


def world(prompts: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Log-probabilities of reference and policy, and costs, of every answer to each prompt."""
    rng = np.random.default_rng(seed)
    reference, tilt, cost = (rng.normal(size=(prompts, ANSWERS)) for _ in range(3))
    policy = reference + 0.5 * tilt - 0.4 * cost
    reference, policy = (logits - np.logaddexp.reduce(logits, 1, keepdims=True) for logits in (reference, policy))
    return reference, policy, cost


def sampled(reference: Array, count: int, rng: np.random.Generator) -> Array:
    """Indices of answers drawn from the reference, [prompts, count]."""
    return np.array([rng.choice(ANSWERS, size=count, p=np.exp(row)) for row in reference])


def test_it_is_the_expectation_under_the_policy_and_its_error_the_spread() -> None:
    reference, policy, cost = world(300)
    true = float((np.exp(policy) * cost).sum(1).mean())
    rng = np.random.default_rng(1)
    found = []
    for _ in range(300):
        drawn = sampled(reference, 4, rng)
        chosen = [np.take_along_axis(values, drawn, 1) for values in (policy - reference, cost)]
        found.append(off_policy_cost(*chosen))
    estimates, errors, _ = np.array(found).T
    assert estimates.mean() == pytest.approx(true, abs=3 * estimates.std() / np.sqrt(len(estimates)))
    plug_in = float(cost_of_reference(reference, cost))
    assert abs(plug_in - true) > 10 * abs(estimates.mean() - true)
    # the prompts are the same in every draw, so the spread is that within prompts alone
    assert estimates.std() < errors.mean() < 2 * estimates.std()


def cost_of_reference(reference: Array, cost: Array) -> Array:
    return np.asarray((np.exp(reference) * cost).sum(1).mean())


def test_the_error_is_clustered_by_prompt() -> None:
    """Fresh prompts in every draw, whose costs differ in level: the error must cover that spread too."""
    rng, found = np.random.default_rng(2), []
    for seed in range(400):
        reference, policy, cost = world(60, seed=seed + 10)
        cost = cost + rng.normal(size=(60, 1))
        drawn = sampled(reference, 4, rng)
        found.append(off_policy_cost(*(np.take_along_axis(v, drawn, 1) for v in (policy - reference, cost))))
    estimates, errors, _ = np.array(found).T
    assert errors.mean() == pytest.approx(estimates.std(), rel=0.12)


def test_the_reference_itself_has_plain_means() -> None:
    cost = np.random.default_rng(3).normal(size=(9, 5))
    mean, error, ess = off_policy_cost(np.zeros_like(cost), cost)
    assert mean == pytest.approx(cost.mean()) and ess == pytest.approx(cost.size)
    assert error == pytest.approx(cost.mean(1).std(ddof=1) / 3)


def test_a_moved_zero_moves_the_estimate_alone() -> None:
    rng = np.random.default_rng(4)
    ratio, cost = rng.normal(size=(2, 30, 4))
    mean, error, ess = off_policy_cost(ratio, cost)
    assert off_policy_cost(ratio, cost + 7) == pytest.approx((mean + 7, error, ess))
    assert off_policy_cost(ratio + 900, cost) == pytest.approx((mean, error, ess))  # no overflow, no common factor


def test_one_sample_that_speaks_for_all_is_one_effective_sample() -> None:
    ratio = np.zeros((6, 4))
    ratio[2, 1] = 60.0
    assert off_policy_cost(ratio, np.ones((6, 4)))[2] == pytest.approx(1.0)

"""The cost of a policy from samples of the reference, against enumeration and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from dualign.search.screening import off_policy_cost

Array = np.ndarray
ANSWERS = 12


def world(prompts: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Log-probabilities of reference and policy, and costs, of every answer to each prompt."""
    rng = np.random.default_rng(seed)
    reference, tilt, cost = (rng.normal(size=(prompts, ANSWERS)) for _ in range(3))
    policy = reference + 0.5 * tilt - 0.4 * cost
    reference, policy = (
        logits - np.logaddexp.reduce(logits, 1, keepdims=True) for logits in (reference, policy)
    )
    return reference, policy, cost


def sampled(reference: Array, count: int, rng: np.random.Generator) -> Array:
    """Indices of answers drawn from the reference, [prompts, count]."""
    return np.array([rng.choice(ANSWERS, size=count, p=np.exp(row)) for row in reference])


def test_it_is_the_expectation_where_every_answer_is_a_sample() -> None:
    """A uniform reference, each of its answers once: the weights are then the policy itself."""
    _, policy, cost = world(20)
    mean, error, ess = off_policy_cost(policy + np.log(ANSWERS), cost)
    each = (np.exp(policy) * cost).sum(1)
    assert (mean, error) == pytest.approx((each.mean(), each.std(ddof=1) / np.sqrt(20)))
    assert ess == pytest.approx(np.median(1 / (np.exp(policy) ** 2).sum(1)))


def test_its_bias_goes_away_with_more_samples_of_a_prompt() -> None:
    reference, policy, cost = world(2000)
    true = float((np.exp(policy) * cost).sum(1).mean())
    plain = float((np.exp(reference) * cost).sum(1).mean())
    rng, gaps = np.random.default_rng(1), []
    for count in (2, 8, 64):
        drawn = sampled(reference, count, rng)
        gaps.append(
            off_policy_cost(*(np.take_along_axis(v, drawn, 1) for v in (policy - reference, cost)))[
                0
            ]
            - true
        )
    assert abs(gaps[2]) < 0.02 < 0.2 < plain - true
    assert 0 < gaps[1] < gaps[0] < plain - true  # towards the reference


def test_the_error_is_the_spread_over_prompts() -> None:
    """Fresh prompts in every draw, whose costs differ in level."""
    rng, found = np.random.default_rng(2), []
    for seed in range(400):
        reference, policy, cost = world(60, seed=seed + 10)
        cost = cost + rng.normal(size=(60, 1))
        drawn = sampled(reference, 4, rng)
        found.append(
            off_policy_cost(*(np.take_along_axis(v, drawn, 1) for v in (policy - reference, cost)))
        )
    estimates, errors, _ = np.array(found).T
    assert errors.mean() == pytest.approx(estimates.std(), rel=0.12)


def test_the_reference_itself_has_plain_means() -> None:
    cost = np.random.default_rng(3).normal(size=(9, 5))
    mean, error, ess = off_policy_cost(np.zeros_like(cost), cost)
    assert mean == pytest.approx(cost.mean()) and ess == pytest.approx(5)
    assert error == pytest.approx(cost.mean(1).std(ddof=1) / 3)


def test_one_odd_answer_moves_its_prompt_alone() -> None:
    rng = np.random.default_rng(4)
    ratio, cost = rng.normal(size=(2, 50, 4))
    odd = ratio.copy()
    odd[7, 2] += 900.0  # no overflow either
    before, after = off_policy_cost(ratio, cost), off_policy_cost(odd, cost)
    assert abs(after[0] - before[0]) <= np.ptp(cost[7]) / 50 and after[2] == pytest.approx(
        before[2], rel=0.1
    )
    assert off_policy_cost(ratio + rng.normal(size=(50, 1)), cost) == pytest.approx(
        before
    )  # log Z(x) cancels

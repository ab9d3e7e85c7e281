"""The cost of a policy from samples of the reference, against enumeration and simulation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dualign.math.dual.tilt import predict
from dualign.search.screening import PoolCost, believed, off_policy_cost
from tests.search.curves import measured, step

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


def drawn_costs(
    count: int, rng: np.random.Generator, known: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    """Log-ratios and costs of `count` samples a prompt of a world."""
    reference, policy, cost = known
    drawn = sampled(reference, count, rng)
    return (
        np.take_along_axis(policy - reference, drawn, 1),
        np.take_along_axis(cost, drawn, 1),
    )


def test_it_is_the_expectation_where_every_answer_is_a_sample() -> None:
    """A uniform reference, each of its answers once: the weights are then the policy itself."""
    _, policy, cost = world(20)
    found = off_policy_cost(policy + np.log(ANSWERS), cost)
    each = (np.exp(policy) * cost).sum(1)
    assert found.cost == pytest.approx(each.mean())
    assert found.cost_se == pytest.approx(each.std(ddof=1) / np.sqrt(20))
    assert found.ess == pytest.approx(np.median(1 / (np.exp(policy) ** 2).sum(1)))


@pytest.mark.parametrize("count", [1, 2, 8])
def test_few_samples_of_a_prompt_do_not_bias_it(count: int) -> None:
    """Weights that are normalised within a prompt pull it towards the reference's cost."""
    known = world(400)
    true = float((np.exp(known[1]) * known[2]).sum(1).mean())
    rng = np.random.default_rng(1)
    draws = [drawn_costs(count, rng, known) for _ in range(200)]
    gaps = [off_policy_cost(*each).cost - true for each in draws]
    within = [
        predict(ratio, np.zeros_like(cost), 0.0, 1.0, cost).mean() - true for ratio, cost in draws
    ]
    error = np.std(gaps) / math.sqrt(len(gaps))
    assert abs(np.mean(gaps)) < 3 * error < 0.015
    assert np.mean(within) > 0.03


def test_the_error_is_the_spread_over_prompts() -> None:
    """Fresh prompts in every draw, whose costs differ in level."""
    rng, found = np.random.default_rng(2), []
    for seed in range(400):
        reference, policy, cost = world(60, seed=seed + 10)
        known = (reference, policy, cost + rng.normal(size=(60, 1)))
        found.append(off_policy_cost(*drawn_costs(4, rng, known)))
    errors = np.array([each.cost_se for each in found])
    assert errors.mean() == pytest.approx(np.std([each.cost for each in found]), rel=0.12)


def test_the_reference_itself_has_plain_means() -> None:
    cost = np.random.default_rng(3).normal(size=(9, 5))
    found = off_policy_cost(np.zeros_like(cost), cost)
    assert found.cost == pytest.approx(cost.mean()) and found.ess == pytest.approx(5)
    assert found.cost_se == pytest.approx(cost.mean(1).std(ddof=1) / 3)


def test_an_odd_answer_moves_it_no_further_than_its_error() -> None:
    rng = np.random.default_rng(4)
    ratio, cost = rng.normal(size=(2, 50, 4))
    before = off_policy_cost(ratio, cost)
    for raised in (3.0, 5.0, 9.0, 900.0):  # no overflow either
        odd = ratio.copy()
        odd[7, 2] += raised
        after = off_policy_cost(odd, cost)
        assert after.ess == pytest.approx(before.ess, rel=0.1)
        assert abs(after.cost - before.cost) < 1.5 * after.cost_se


# --- beside a policy's own answers ----------------------------------------------------------------

OWN = measured(-0.30, se=0.04)


def test_pool_and_own_answers_weigh_by_their_precision() -> None:
    """The error of the mean of many such pairs is what it says."""
    pool = PoolCost(-0.40, 0.02, 6.0)
    assert believed(OWN, pool, min_ess=4.0) is pool
    both = replace(step(0, 1.0, -0.3), measured=OWN, pool=pool)
    assert both.cost == pytest.approx((-0.30 / 0.04**2 - 0.40 / 0.02**2) / (0.04**-2 + 0.02**-2))
    rng = np.random.default_rng(5)
    drawn = []
    for own, seen in rng.normal(-0.3, [0.04, 0.02], size=(4000, 2)):
        known = replace(both, measured=measured(own, se=0.04), pool=replace(pool, cost=seen))
        drawn.append(known.cost)
    assert both.cost_se == pytest.approx(np.std(drawn), rel=0.05)
    assert replace(both, pool=None).cost == -0.30 and replace(both, pool=None).cost_se == 0.04


def test_a_pool_is_not_believed_that_has_little_to_say() -> None:
    assert believed(OWN, PoolCost(-0.40, 0.02, 3.9), min_ess=4.0) is None
    assert believed(OWN, PoolCost(-0.40, math.inf, 6.0), min_ess=4.0) is None


def test_a_pool_without_a_part_of_what_the_policy_says_is_not_believed() -> None:
    """A twentieth of the policy's mass is on an answer that the reference gives once in 10^6: no
    sample has it, so its cost is not in the estimate, and no error tells. Nor where the weights are
    above 1 by more than chance: those answers were learned by heart.
    """
    rng = np.random.default_rng(6)
    reference, policy, cost = world(500)
    shown = policy + np.log(0.95)
    found = off_policy_cost(*drawn_costs(8, rng, (reference, shown, cost)))
    assert found.mass == pytest.approx(0.95, abs=3 * found.mass_se)
    own = measured(found.cost, se=0.02)
    assert believed(own, found, min_ess=1.0) is None
    whole = off_policy_cost(*drawn_costs(8, rng, (reference, policy, cost)))
    assert believed(own, whole, min_ess=1.0) is whole
    heart = replace(whole, mass=1.2, mass_se=0.05)
    assert believed(own, heart, min_ess=1.0) is None


def test_a_pool_that_contradicts_own_answers_is_not_believed() -> None:
    """Three errors of their difference, 0.134."""
    assert believed(OWN, PoolCost(-0.43, 0.02, 6.0), min_ess=4.0) is not None
    assert believed(OWN, PoolCost(-0.44, 0.02, 6.0), min_ess=4.0) is None

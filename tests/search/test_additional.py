"""Additional constraints on answers by hand, and the joint step against a solver of the same
quadratic.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from dualign.core.schema import user
from dualign.evaluation.stats import ConstraintEstimate, within_variance
from dualign.math.constraints import Constraint
from dualign.search.additional import joint_newton_step, measure_additional, within_covariance
from dualign.search.rules import newton_step

Array = np.ndarray
ANSWERS = pd.DataFrame(
    {
        "prompt_id": ["a", "a", "b", "b", "c", "c"],
        "prompt": [
            user(text)
            for text in ("a child", "a child", "a dog", "a dog", "a child's dog", "a child's dog")
        ],
        "cost": [-1.0, 1.0, -2.0, -2.0, 0.5, 1.5],
        "length": [4, 6, 5, 5, 8, 12],
        "ended": [True, True, True, True, True, False],
    }
)


def test_limits_on_answers_by_hand() -> None:
    limits = [
        Constraint("rare", "p_unsafe", 0.4), Constraint("short", "length", 9.0, prompts="child"),
        Constraint("none", "cost", 0.0, prompts="cat"),
    ]  # fmt: skip
    found = measure_additional(ANSWERS, limits)
    rare, short, none = found.estimates
    error = float(np.std([0.5, 0.0, 1.0], ddof=1) / np.sqrt(3))
    assert rare == ConstraintEstimate("rare", 0.4, 1.0, pytest.approx(0.5), pytest.approx(error))  # type: ignore[arg-type]
    assert (short.share, short.mean) == (pytest.approx(2 / 3), 7.5)
    assert none == ConstraintEstimate("none", 0.0, 0.0, None, None)
    # Unbiased, within prompts, over all three prompts: cost 2, 0, 0.5; unsafe 0.5, 0, 0; length of
    # child's 2, -, 8.
    expected = [
        [2.5 / 3, 1 / 3, 4 / 3, 0.0],
        [1 / 3, 0.5 / 3, 1 / 3, 0.0],
        [4 / 3, 1 / 3, 10 / 3, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
    np.testing.assert_allclose(found.covariance, expected, atol=1e-12)


def test_answers_that_did_not_end_are_counted_by_hand() -> None:
    found = measure_additional(ANSWERS, [Constraint("whole", "unended", 0.1)])
    error = float(np.std([0.0, 0.0, 0.5], ddof=1) / np.sqrt(3))
    (whole,) = found.estimates
    assert (whole.mean, whole.error) == pytest.approx((1 / 6, error))
    # Within prompts, over all three: the cut answer costs 1 more than the other to its prompt.
    np.testing.assert_allclose(
        found.covariance, [[2.5 / 3, 0.5 / 3], [0.5 / 3, 0.5 / 3]], atol=1e-12
    )


def test_without_limits_nothing_is_measured() -> None:
    assert measure_additional(ANSWERS, []) == ((), ())


def test_the_diagonal_of_the_covariance_is_the_within_variance() -> None:
    rng = np.random.default_rng(0)
    values, prompts = (
        rng.normal(size=(3, 30)),
        rng.integers(0, 9, 30),
    )  # one prompt may have one answer
    found = within_covariance(values, prompts)
    assert np.diag(found) == pytest.approx([within_variance(row, prompts) for row in values])
    assert (within_covariance(values[:, :3], np.arange(3)) == 0).all()


def problem(seed: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(3, 3)) * [[1.0], [0.1], [20.0]]  # a cost, a share and a length
    return rng.uniform(0, 2, 3) / [1, 0.1, 20], rng.normal(size=3) * [1, 0.1, 20], half @ half.T


@pytest.mark.parametrize("seed", range(12))
def test_the_joint_step_is_the_least_of_the_quadratic_within_its_bounds(seed: int) -> None:
    lams, excess, covariance = problem(seed)
    beta, unit = 1.5, np.array([1.0, 0.1, 20.0])

    def model(scaled: Array) -> float:
        s = scaled / unit - lams
        return float(-s @ excess + s @ covariance @ s / (2 * beta))

    options = {"ftol": 1e-15, "gtol": 1e-10}
    best = minimize(model, lams * unit, bounds=[(0, None)] * 3, method="L-BFGS-B", options=options)
    small = lams * np.sqrt(np.diag(covariance)) / beta <= 0.25
    expected = np.maximum(best.x / unit, np.where(small, 0.0, lams / 2))
    found = joint_newton_step(lams, excess, covariance, beta)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4 / unit.max())


def test_one_limit_makes_newtons_step() -> None:
    found = joint_newton_step(np.array([1.0]), np.array([0.2]), np.array([[0.5]]), 1.5)
    assert found[0] == pytest.approx(newton_step(1.0, -0.1, 0.5, -0.3, 1.5), rel=1e-6)


def test_a_slack_limit_stays_free_and_a_constant_quantity_keeps_its_price() -> None:
    covariance = np.array([[1.0, 0.3, 0.0], [0.3, 0.2, 0.0], [0.0, 0.0, 0.0]])
    found = joint_newton_step(
        np.array([0.0, 2.0, 0.7]), np.array([-20.0, 0.04, 5.0]), covariance, 1.5
    )
    assert found == pytest.approx([0.0, 2.0 + 1.5 * 0.04 / 0.2, 0.7], rel=1e-6)


def test_two_limits_that_say_the_same_share_the_step() -> None:
    lams, excess = np.array([1.0, 1.0]), np.array([0.2, 0.2])
    found = joint_newton_step(lams, excess, np.full((2, 2), 0.5), 1.5)
    assert found.sum() == pytest.approx(2 + 1.5 * 0.2 / 0.5, rel=1e-5) and (found >= 0.5).all()


def test_a_price_falls_by_half_unless_it_hardly_tilts() -> None:
    """Few unsafe answers vary little, so that Newton's step would drop the price that made them
    few.
    """
    for price, expected in ((2.0, 1.0), (0.2, 0.0)):
        found = joint_newton_step(np.array([price]), np.array([-0.1]), np.array([[0.01]]), 0.3)
        assert found[0] == pytest.approx(expected)

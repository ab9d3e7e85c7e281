"""The updates of the multiplier and the algebra of merges, by hand and against solvers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from dualign.math import updates

BETA = 1.5


def test_dual_gradient_by_hand() -> None:
    assert updates.dual_gradient_step(1.0, cost=0.2, limit=-0.3, step_size=2.0) == pytest.approx(
        2.0
    )
    assert updates.dual_gradient_step(0.5, cost=-1.0, limit=0.0, step_size=1.0) == 0.0


def test_projected_subgradient_by_hand() -> None:
    def project(lam: float, cost: float) -> float:
        return updates.projected_subgradient_step(
            lam, cost, limit=0.0, step_size=1.0, radius=2.0, lambda_min=0.05
        )

    assert project(1.0, 0.5) == 1.5
    assert project(1.0, -3.0) == 0.05
    assert project(1.0, 9.0) == 4.0


def test_projection_keeps_off_zero_where_the_interval_is_smaller_still() -> None:
    """A slack pool has a Slater radius near 0; the loss still divides by lambda."""
    assert (
        updates.projected_subgradient_step(0.3, 0.5, 0.0, 1.0, radius=1e-4, lambda_min=0.05) == 0.05
    )


def test_newton_by_hand() -> None:
    assert updates.newton_step(1.0, cost=0.2, variance=0.5, limit=-0.3, beta=1.5) == pytest.approx(
        2.5
    )
    assert updates.newton_step(0.1, cost=-2.0, variance=0.5, limit=0.0, beta=1.0) == 0.0


def test_tilt_step_by_hand() -> None:
    """Told 1.0 and reached 0.8 at beta 2: it needs 0.8 + 2 x 0.1 / 0.5 = 1.2, half as much
    again.
    """
    found = updates.tilt_step(1.0, 2.0, 0.8, cost=0.2, variance=0.5, limit=0.1)
    assert found == pytest.approx(1.5)
    assert updates.tilt_step(1.0, 2.0, 0.1, cost=-0.2, variance=0.5, limit=0.1) == 0.0


def test_a_policy_that_reached_what_it_was_told_makes_newtons_step() -> None:
    newton = updates.newton_step(0.7, cost=0.2, variance=0.5, limit=-0.3, beta=BETA)
    assert updates.tilt_step(0.7, BETA, 0.7, cost=0.2, variance=0.5, limit=-0.3) == pytest.approx(
        newton
    )


@pytest.mark.parametrize(("lam", "variance"), [(None, 0.5), (-0.2, 0.5), (0.0, 0.5), (0.7, 0.0)])
def test_a_policy_without_a_multiplier_has_no_tilt_step(lam: float | None, variance: float) -> None:
    beta = None if lam is None else BETA
    assert updates.tilt_step(0.7, beta, lam, cost=0.2, variance=variance, limit=-0.3) is None


def test_the_line_of_one_step_is_newtons() -> None:
    newton = updates.newton_step(0.7, cost=0.2, variance=0.5, limit=-0.3, beta=BETA)
    assert updates.line_root([0.7], [0.2], [0.05], 0.5 / BETA, -0.3) == pytest.approx(newton)
    assert updates.line_root([0.1], [-2.0], [0.05], 0.5, 0.0) == 0.0


@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_line_minimises_what_its_docstring_says(count: int) -> None:
    rng = np.random.default_rng(count)
    lams, slope, limit = rng.uniform(0.2, 2.0, count), 0.6, -0.3
    costs, errors = 0.4 - 0.5 * lams + rng.normal(0, 0.05, count), rng.uniform(0.03, 0.1, count)

    def objective(line: np.ndarray) -> float:
        a, s = line
        misfit = ((costs - a + s * lams) / errors) ** 2
        return float(misfit.sum() + ((s - slope) / (updates.SLOPE_ERROR * slope)) ** 2)

    a, s = minimize(
        objective, [0.0, slope], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14}
    ).x
    assert updates.line_root(lams, costs, errors, slope, limit) == pytest.approx(
        (a - limit) / s, rel=1e-6
    )


def test_steps_far_apart_make_it_the_secant_and_steps_that_noise_confuses_newtons() -> None:
    points = ((0.5, 0.2), (1.5, -0.4))
    lams, costs = zip(*points, strict=True)
    secant = updates.secant_step(*points, limit=-0.3)
    assert updates.line_root(lams, costs, [1e-4, 1e-4], 0.2, -0.3) == pytest.approx(
        secant, rel=1e-4
    )
    near = updates.line_root(
        [1.0, 1.02], [0.1, 0.05], [0.05, 0.05], 0.5, -0.3
    )  # the secant falls 2.5 a unit
    assert near == pytest.approx(1.01 + 0.375 / 0.5, rel=0.02)


@pytest.mark.parametrize("costs", [[0.1, 0.1, 0.1], [0.1, 0.2, 0.4]], ids=["flat", "rising"])
def test_a_line_that_does_not_fall_is_not_believed(costs: list[float]) -> None:
    found = updates.line_root([1.0, 2.0, 3.0], costs, [0.001] * 3, 0.8, 0.0)
    assert found == pytest.approx(2.0 + float(np.mean(costs)) / 0.2)


def test_secant_by_hand() -> None:
    assert updates.secant_step((0.0, 1.0), (1.0, 0.5), limit=0.0) == pytest.approx(2.0)
    assert updates.secant_step((1.0, 0.5), (0.0, 1.0), limit=0.25) == pytest.approx(1.5)
    assert updates.secant_step((1.0, 0.0), (2.0, -1.0), limit=5.0) == 0.0


def test_merge_weight_and_multiplier_by_hand() -> None:
    assert updates.first_weight(0.6, 1.5, naive=False) == pytest.approx(0.4)
    assert updates.merge_multiplier(0.4, 1.5, naive=False) == pytest.approx(0.6)
    assert updates.first_weight(0.6, 1.4, naive=True) == pytest.approx(0.3)
    assert updates.merge_multiplier(0.3, 1.4, naive=True) == pytest.approx(0.6)
    assert updates.first_weight(0.9, 2.0, naive=False, lam_reference=0.4) == pytest.approx(0.3125)
    assert updates.merge_multiplier(0.3125, 2.0, naive=False, lam_reference=0.4) == pytest.approx(
        0.9
    )
    assert (
        updates.first_weight(0.1, 2.0, naive=False, lam_reference=0.4) == 0.0
    )  # slacker than both ends


def test_a_merge_of_two_policies_of_the_path_is_the_one_between() -> None:
    """On a finite answer set (1 - q) log pi_slack + q log pi_strict is log pi_lambda at the same
    beta, for every q.
    """
    rng = np.random.default_rng(1)
    reference, reward, cost = (rng.normal(size=9) for _ in range(3))

    def policy(lam: float) -> np.ndarray:
        logits = reference + (reward - lam * cost) / BETA
        return np.asarray(logits - np.logaddexp.reduce(logits))

    for q in (0.0, 0.35, 1.0, 1.25):
        merged = (1 - q) * policy(0.4) + q * policy(2.0)
        merged = merged - np.logaddexp.reduce(merged)
        assert merged == pytest.approx(
            policy(updates.merge_multiplier(q, 2.0, naive=False, lam_reference=0.4))
        )


def test_the_next_weight_by_hand() -> None:
    line = [(0.0, 1.0), (0.5, 0.4), (1.0, -0.2)]
    assert updates.next_weight(line, 0.1, 1.25) == pytest.approx(0.75)
    assert updates.next_weight(line, -0.8, 1.25) == 1.25  # no further than allowed
    assert updates.next_weight(
        [(0.1, 0.3), (0.6, -0.15), (1.0, -0.25)], 0.0, 1.25
    ) == pytest.approx(0.1 + 0.5 * 2 / 3)
    assert updates.next_weight([(0.2, 0.1), (0.6, 0.3)], 0.0, 1.25) is None  # it does not fall
    assert updates.next_weight([(0.2, 0.1), (0.6, 0.0001)], 0.0, 1.25) is None  # there already


@pytest.mark.parametrize("q", [0.0, 0.3, 0.75])
def test_a_merges_multiplier_is_that_of_its_tilt(q: float) -> None:
    """On a finite answer set the weighted product of the two policies is pi_lambda at lambda_eff
    and beta_eff.
    """
    rng = np.random.default_rng(0)
    reference, reward, cost = (rng.normal(size=7) for _ in range(3))
    beta, lam = 0.5, 1.2

    def policy(score: np.ndarray, at: float) -> np.ndarray:
        logits = reference + score / at
        return np.asarray(logits - np.logaddexp.reduce(logits))

    for naive, second, at in (
        (False, policy(reward - lam * cost, beta), beta),
        (True, policy(-lam * cost, beta), beta / (1 - q)),
    ):
        merged = (1 - q) * policy(reward, beta) + q * second
        expected = policy(reward - updates.merge_multiplier(q, lam, naive) * cost, at)
        assert merged - np.logaddexp.reduce(merged) == pytest.approx(expected)


def test_tail_by_hand() -> None:
    assert [
        list(updates.tail(lams))
        for lams in ([1.0], [1.0, 2.0], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0, 8.0])
    ] == [
        [1.0],
        [2.0],
        [2.0, 4.0],
        [4.0, 8.0],
    ]


@pytest.mark.parametrize(
    "last", [(1.0, 0.4), (2.0, 0.5), (2.0, 0.6)], ids=["same place", "flat", "rising"]
)
def test_a_secant_needs_a_falling_line(last: tuple[float, float]) -> None:
    assert updates.secant_step((1.0, 0.5), last, limit=0.0) is None


# --- several multipliers --------------------------------------------------------------------------


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(3, 3)) * [[1.0], [0.1], [20.0]]  # a cost, a share and a length
    return rng.uniform(0, 2, 3) / [1, 0.1, 20], rng.normal(size=3) * [1, 0.1, 20], half @ half.T


@pytest.mark.parametrize("seed", range(12))
def test_the_joint_step_is_the_least_of_the_quadratic_within_its_bounds(seed: int) -> None:
    lams, excess, covariance = problem(seed)
    beta, unit = 1.5, np.array([1.0, 0.1, 20.0])

    def model(scaled: np.ndarray) -> float:
        s = scaled / unit - lams
        return float(-s @ excess + s @ covariance @ s / (2 * beta))

    options = {"ftol": 1e-15, "gtol": 1e-10}
    best = minimize(model, lams * unit, bounds=[(0, None)] * 3, method="L-BFGS-B", options=options)
    small = lams * np.sqrt(np.diag(covariance)) / beta <= 0.25
    expected = np.maximum(best.x / unit, np.where(small, 0.0, lams / 2))
    found = updates.joint_newton_step(lams, excess, covariance, beta)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4 / unit.max())


def test_one_limit_makes_newtons_step() -> None:
    found = updates.joint_newton_step(np.array([1.0]), np.array([0.2]), np.array([[0.5]]), 1.5)
    assert found[0] == pytest.approx(updates.newton_step(1.0, -0.1, 0.5, -0.3, 1.5), rel=1e-6)


def test_a_slack_limit_stays_free_and_a_constant_quantity_keeps_its_price() -> None:
    covariance = np.array([[1.0, 0.3, 0.0], [0.3, 0.2, 0.0], [0.0, 0.0, 0.0]])
    found = updates.joint_newton_step(
        np.array([0.0, 2.0, 0.7]), np.array([-20.0, 0.04, 5.0]), covariance, 1.5
    )
    assert found == pytest.approx([0.0, 2.0 + 1.5 * 0.04 / 0.2, 0.7], rel=1e-6)


def test_two_limits_that_say_the_same_share_the_step() -> None:
    lams, excess = np.array([1.0, 1.0]), np.array([0.2, 0.2])
    found = updates.joint_newton_step(lams, excess, np.full((2, 2), 0.5), 1.5)
    assert found.sum() == pytest.approx(2 + 1.5 * 0.2 / 0.5, rel=1e-5) and (found >= 0.5).all()


def test_a_price_falls_by_half_unless_it_hardly_tilts() -> None:
    """Few unsafe answers vary little, so that Newton's step would drop the price that made them
    few.
    """
    for price, expected in ((2.0, 1.0), (0.2, 0.0)):
        found = updates.joint_newton_step(
            np.array([price]), np.array([-0.1]), np.array([[0.01]]), 0.3
        )
        assert found[0] == pytest.approx(expected)

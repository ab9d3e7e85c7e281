"""The dual of a pool: its value, slope and curvature, its root, and what it predicts, against brute
force.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq, linprog, minimize

from dualign.core.errors import InfeasibleError
from dualign.math.bounds import sample_size, upper_bound
from dualign.math.dual.advice import beta_for_ess, samples_for_ess
from dualign.math.dual.joint import solve_many
from dualign.math.dual.margin import certificate_margin, solve_with_margin, spread_of_means
from dualign.math.dual.reach import least_of
from dualign.math.dual.root import root, scales
from dualign.math.dual.solution import Bootstrap, slater_radius, solve
from dualign.math.dual.tail import shortfall, value_at_risk
from dualign.math.dual.tilt import (
    divergence,
    dual_value,
    effective_samples,
    jackknife_value,
    jackknife_weights,
    leave_one_out_value,
    predict,
    soft_value,
    weights,
)

BETA, LIMIT = 0.7, -0.35
Array = np.ndarray
#: Reward and cost of the four answers of a small world.
FOUR = np.array([0.3, -1.0, 0.8, 0.1]), np.array([-0.5, 0.2, 1.1, -0.9])


def pool(seed: int, prompts: int = 12, samples: int = 8) -> tuple[Array, Array]:
    """Scores of a pool whose more helpful answers tend to be more harmful."""
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(prompts, samples))
    return reward, 0.6 * reward + rng.normal(size=(prompts, samples))


def expected_cost(reward: Array, cost: Array, lam: float, beta: float = BETA) -> float:
    """C(lambda), written out prompt by prompt."""
    means = []
    for r, c in zip(reward, cost, strict=True):
        logit = (r - lam * c) / beta
        w = np.exp(logit - logit.max())
        means.append(float((w * c).sum() / w.sum()))
    return float(np.mean(means))


# --- the function ---------------------------------------------------------------------------------


def test_soft_value_and_weights_by_hand() -> None:
    reward, cost = np.log([[1.0, 3.0]]), np.array([[0.0, 1.0]])
    assert weights(reward, cost, 0.0, 1.0).tolist() == [pytest.approx([0.25, 0.75])]
    assert soft_value(reward, cost, 0.0, 1.0).tolist() == pytest.approx([np.log(2)])
    # lambda = log 3 cancels the second answer's lead
    assert weights(reward, cost, np.log(3), 1.0).tolist() == [pytest.approx([0.5, 0.5])]
    assert dual_value(reward, cost, np.log(3), limit=0.5, beta=1.0) == pytest.approx(
        0.5 * np.log(3)
    )


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.3, 6.0])
def test_slope_of_the_dual_is_limit_minus_cost(lam: float) -> None:
    reward, cost = pool(1)
    step = 1e-5
    above, below = (
        dual_value(reward, cost, lam + s, limit=LIMIT, beta=BETA) for s in (step, -step)
    )
    assert (above - below) / (2 * step) == pytest.approx(
        LIMIT - expected_cost(reward, cost, lam), abs=1e-8
    )


@pytest.mark.parametrize("lam", [0.1, 1.3, 4.0])
def test_curvature_of_the_dual_is_the_variance_over_beta(lam: float) -> None:
    reward, cost = pool(2)
    step = 1e-3
    value = [dual_value(reward, cost, lam + s, limit=LIMIT, beta=BETA) for s in (-step, 0, step)]
    w = weights(reward, cost, lam, BETA)
    variance = ((w * cost**2).sum(1) - (w * cost).sum(1) ** 2).mean()
    assert (value[0] - 2 * value[1] + value[2]) / step**2 == pytest.approx(
        variance / BETA, abs=1e-5
    )


def test_dual_value_is_the_lagrangian_of_the_tilted_policy_and_bounds_every_other() -> None:
    reward, cost = pool(3)
    n = reward.shape[1]
    lam = 0.9

    def lagrangian(p: Array) -> float:
        kl = (p * np.log(p * n)).sum(1)
        return float(((p * reward).sum(1) - BETA * kl - lam * ((p * cost).sum(1) - LIMIT)).mean())

    tilted = weights(reward, cost, lam, BETA)
    assert dual_value(reward, cost, lam, limit=LIMIT, beta=BETA) == pytest.approx(
        lagrangian(tilted), abs=1e-12
    )
    for p in np.random.default_rng(0).dirichlet(np.ones(n), size=(20, len(reward))):
        divergence = float((p * np.log(p / tilted)).sum(1).mean())
        assert lagrangian(tilted) - lagrangian(p) == pytest.approx(BETA * divergence, abs=1e-10)


def test_samples_that_repeat_stand_for_a_reference_that_is_not_uniform() -> None:
    """pi_ref = (1, 2, 5) / 8 drawn in exact proportion."""
    times = np.array([1, 2, 5])
    r, c = np.array([0.3, -1.0, 0.8]), np.array([-0.5, 0.2, 1.1])
    reward, cost = (np.repeat(f, times)[None] for f in (r, c))
    p = times * np.exp((r - 0.8 * c) / BETA)
    p /= p.sum()
    assert predict(reward, cost, 0.8, BETA, cost)[0] == pytest.approx(float(p @ c))
    assert divergence(reward, cost, 0.8, BETA)[0] == pytest.approx(
        float((p * np.log(p * 8 / times)).sum())
    )


def test_divergence_is_the_kl_of_the_weights_to_the_uniform_samples() -> None:
    reward, cost = pool(4)
    for lam in (0.0, 0.7, 5.0):
        w = weights(reward, cost, lam, BETA)
        direct = (w * np.log(w * reward.shape[1])).sum(1)
        assert divergence(reward, cost, lam, BETA) == pytest.approx(direct, abs=1e-12)


def test_leave_one_out_value_is_the_value_of_the_other_samples() -> None:
    reward, cost = pool(5, prompts=4, samples=6)
    value = leave_one_out_value(reward, cost, 1.1, BETA)
    for i in range(6):
        others = [j for j in range(6) if j != i]
        assert value[:, i] == pytest.approx(
            soft_value(reward[:, others], cost[:, others], 1.1, BETA)
        )


def test_effective_samples_run_from_one_to_all() -> None:
    flat = np.zeros((2, 16))
    assert effective_samples(flat, flat, 1.0, BETA).tolist() == pytest.approx([16, 16])
    peak = flat.copy()
    peak[:, 3] = 1e4
    assert effective_samples(peak, flat, 1.0, BETA).tolist() == pytest.approx([1, 1])


# --- the same without the bias of few samples -----------------------------------------------------


def left_out(estimate: Callable[[Array, Array, Array], Array], *scores: Array) -> Array:
    """n f - (n - 1) mean_i f_(-i) of an estimate [prompts], each sample left out in turn."""
    count = scores[0].shape[1]
    parts = [estimate(*np.delete(scores, i, 2)) for i in range(count)]
    return np.asarray(count * estimate(*scores) - (count - 1) * np.mean(parts, axis=0))


def dominated(samples: int) -> tuple[Array, Array]:
    """A pool of which 1e4 times the spread leaves all weight on one sample of each prompt, to 16
    digits and more.
    """
    reward, cost = pool(21, prompts=5, samples=samples)
    return 1e4 * reward, cost


@pytest.mark.parametrize("lam", [0.0, 0.9, 5.0])
@pytest.mark.parametrize(
    "given", [pool(5, samples=6), pool(6, samples=2), dominated(6), dominated(2)]
)
def test_the_jackknife_leaves_out_each_sample_in_turn(
    given: tuple[Array, Array], lam: float
) -> None:
    reward, cost = given
    value = np.random.default_rng(0).normal(size=cost.shape)
    found = jackknife_weights(reward, cost, lam, BETA)
    assert found.sum(1) == pytest.approx(np.ones(len(found)))
    whole = predict(reward, cost, lam, BETA, value)
    expected = left_out(lambda r, c, v: predict(r, c, lam, BETA, v), reward, cost, value)
    assert (found * value).sum(1) == pytest.approx(expected, abs=1e-10)
    assert (np.abs(expected - whole) <= np.ptp(value, axis=1)).all()
    expected = left_out(lambda r, c: soft_value(r, c, lam, BETA), reward, cost)
    assert jackknife_value(reward, cost, lam, BETA) == pytest.approx(expected, rel=1e-12, abs=1e-10)


def test_the_jackknife_of_equal_weights_changes_nothing_and_of_one_sample_extrapolates() -> None:
    """All weight on one sample of n, the rest alike: the jackknife goes on by (n - 1) / n of the
    way from the rest.
    """
    flat = np.zeros((1, 4))
    assert jackknife_weights(flat, flat, 1.0, BETA)[0] == pytest.approx([0.25] * 4)
    assert jackknife_weights(flat[:, :1], flat[:, :1], 1.0, BETA).tolist() == [[1.0]]
    peak = np.array([[0.0, 1e9, 0.0, 0.0]])
    assert jackknife_weights(peak, flat, 1.0, BETA)[0] == pytest.approx([-0.25, 1.75, -0.25, -0.25])


def test_the_jackknife_takes_most_of_the_bias_out() -> None:
    """Four answers, pi_ref uniform, every pool of eight samples that can be drawn: exact
    expectations of both.
    """
    r, c = FOUR
    drawn = np.array(list(product(range(4), repeat=8)))
    reward, cost, lam, beta = r[drawn], c[drawn], 0.6, 1.5
    p = np.exp((r - lam * c) / beta)
    p, value = p / p.sum(), beta * np.log(p.mean())
    given = (reward, cost, lam, beta)
    w = jackknife_weights(*given)
    for score in (r, c, (c > 0).astype(float)):
        plain = predict(*given, score[drawn]).mean() - p @ score
        assert abs((w * score[drawn]).sum(1).mean() - p @ score) < 0.25 * abs(plain)
    plain = soft_value(*given).mean() - value
    assert abs(jackknife_value(*given).mean() - value) < 0.25 * abs(plain)


# --- the root -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_root_agrees_with_bisection_or_says_why_not(seed: int) -> None:
    reward, cost = pool(seed, prompts=1 + seed % 7, samples=2 + seed % 9)
    limit, top = np.random.default_rng(seed).uniform(-1.5, 0.8), 200.0
    if expected_cost(reward, cost, 0.0) <= limit:
        assert root(reward, cost, limit=limit, beta=BETA, lambda_max=top) == 0.0
    elif expected_cost(reward, cost, top) > limit:
        with pytest.raises(InfeasibleError, match=r"constraint\.limit .* lambda_max 200 "):
            root(reward, cost, limit=limit, beta=BETA, lambda_max=top)
    else:
        exact = brentq(lambda lam: expected_cost(reward, cost, lam) - limit, 0, top, xtol=1e-12)
        assert root(reward, cost, limit=limit, beta=BETA, lambda_max=top) == pytest.approx(
            exact, abs=1e-7
        )


def test_the_forty_seeds_meet_all_three_endings() -> None:
    endings = []
    for seed in range(40):
        reward, cost = pool(seed, prompts=1 + seed % 7, samples=2 + seed % 9)
        limit = np.random.default_rng(seed).uniform(-1.5, 0.8)
        slack, reachable = (
            expected_cost(reward, cost, 0.0) <= limit,
            expected_cost(reward, cost, 200.0) <= limit,
        )
        endings.append("slack" if slack else "root" if reachable else "infeasible")
    assert min(endings.count(name) for name in ("slack", "root", "infeasible")) >= 4


@pytest.mark.parametrize("seed", range(8))
def test_root_solves_the_constrained_problem(seed: int) -> None:
    """Strong duality: the policy of the root is what a general solver finds for the primal
    problem.
    """
    reward, cost = pool(seed, prompts=2, samples=4)
    limit = expected_cost(reward, cost, 1.0)  # so that the constraint binds
    lam = root(reward, cost, limit=limit, beta=BETA, lambda_max=50)
    assert lam == pytest.approx(1.0, abs=1e-8)

    def policy(table: Array) -> Array:
        e = np.exp(table.reshape(2, 4) - table.reshape(2, 4).max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    def value(p: Array) -> float:
        return float(((p * reward).sum(1) - BETA * (p * np.log(p * 4)).sum(1)).mean())

    primal = minimize(
        lambda t: -value(policy(t)),
        np.zeros(8),
        method="SLSQP",
        constraints=[
            {"type": "ineq", "fun": lambda t: limit - float((policy(t) * cost).sum(1).mean())}
        ],
        options={"maxiter": 1000, "ftol": 1e-12},
    )
    assert np.abs(policy(primal.x) - weights(reward, cost, lam, BETA)).max() < 2e-3
    assert -primal.fun == pytest.approx(
        dual_value(reward, cost, lam, limit=limit, beta=BETA), abs=1e-6
    )


@pytest.mark.parametrize("seed", range(12))
def test_slater_radius_bounds_the_multiplier(seed: int) -> None:
    reward, cost = pool(seed, prompts=30)
    limit = expected_cost(reward, cost, 0.3 * seed)
    lam = root(reward, cost, limit=limit, beta=BETA, lambda_max=50)
    radius = slater_radius(reward, cost, limit=limit, beta=BETA, lambda_max=50)
    assert solve(reward, cost, limit=limit, beta=BETA, lambda_max=50).lam_interval[1] <= radius
    assert (
        1.15 * lam < radius <= 50
    )  # so the interval [0, 2 rho] does not end at the root of a slightly wrong pool


def test_slater_radius_is_that_of_the_safest_answers() -> None:
    """A tilt at a large multiplier plays the least costly sample of each prompt: E[r] - beta log n,
    KL in full.
    """
    reward, cost = pool(6, prompts=30)
    limit = expected_cost(reward, cost, 1.0)
    best = dual_value(reward, cost, 1.0, limit=limit, beta=BETA)
    safest = cost.argmin(1)
    value = reward[np.arange(30), safest].mean() - BETA * np.log(reward.shape[1])
    expected = (best - value) / (limit - cost.min(1).mean())
    assert expected > 1.5
    radius = slater_radius(reward, cost, limit=limit, beta=BETA, lambda_max=1e4)
    assert radius == pytest.approx(expected, rel=1e-3)


def test_slater_radius_is_no_less_than_the_interval_and_no_more_than_the_largest_multiplier() -> (
    None
):
    reward, cost = pool(6, prompts=3)
    solution = solve(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50)
    assert (
        slater_radius(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50)
        >= solution.lam_interval[1]
    )
    barely = expected_cost(reward, cost, 50)
    for limit in (barely + 1e-9, barely + 1e-6):
        assert slater_radius(reward, cost, limit=limit, beta=BETA, lambda_max=50) == 50


def test_newton_needs_a_handful_of_steps() -> None:
    reward, cost = pool(6, prompts=100)
    steps = [
        solve(reward, cost, limit=limit, beta=BETA, bootstrap=Bootstrap(1)).steps
        for limit in (-0.1, -0.35, -0.7)
    ]
    assert min(steps) >= 2 and max(steps) <= 8


@pytest.mark.parametrize("reward_unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("cost_unit", [1e-6, 1.0, 1e6])
def test_the_units_of_the_scores_change_neither_root_nor_steps(
    reward_unit: float, cost_unit: float
) -> None:
    reward, cost = pool(8, prompts=40)
    plain = solve(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50, bootstrap=Bootstrap(20))
    unit = reward_unit / cost_unit
    scaled = solve(
        reward_unit * reward,
        cost_unit * (cost + 3),
        limit=cost_unit * (LIMIT + 3),
        beta=reward_unit * BETA,
        lambda_max=50 * unit,
        bootstrap=Bootstrap(20),
    )
    assert (
        scaled.lam / unit == pytest.approx(plain.lam, rel=1e-9) and scaled.steps == plain.steps <= 8
    )
    assert scaled.lam_interval == pytest.approx(
        [unit * end for end in plain.lam_interval], rel=1e-8
    )
    assert scaled.scales.reward == pytest.approx(reward_unit * plain.scales.reward)
    assert scaled.scales.cost == pytest.approx(cost_unit * plain.scales.cost)
    assert scaled.scales.centre == pytest.approx(cost_unit * (plain.scales.centre + 3))


def test_scales_are_within_prompts_and_a_constant_score_has_one_all_the_same() -> None:
    reward = np.array([[0.0, 2.0], [100.0, 104.0]])
    found = scales(reward, np.full((2, 2), 0.1), beta=0.3)
    assert found == (pytest.approx(np.sqrt(2.5)), 1.0, pytest.approx(0.1))
    assert scales(np.full((2, 2), 0.1), reward, beta=0.3).reward == 0.3
    cost = np.array(
        [[0.0, 1.0]]
    )  # constant reward: w = softmax(-lam c / beta), so lam = beta log 3 halves the odds twice
    assert root(np.full((1, 2), 7.7), cost, limit=0.25, beta=2.0, lambda_max=50) == pytest.approx(
        2 * np.log(3)
    )


def test_projected_gradient_of_mocan_ends_at_the_same_multiplier() -> None:
    reward, cost = pool(7, prompts=20)
    lam = 0.0
    for _ in range(2000):
        lam = max(0.0, lam + 0.5 * (expected_cost(reward, cost, lam) - LIMIT))
    assert root(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50) == pytest.approx(lam, abs=1e-6)


def test_root_scales_with_the_units_of_reward_and_cost() -> None:
    reward, cost = pool(8)
    lam = root(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50)
    assert root(9 * reward, cost, limit=LIMIT, beta=9 * BETA, lambda_max=500) == pytest.approx(
        9 * lam
    )
    assert root(reward, 100 * cost, limit=100 * LIMIT, beta=BETA, lambda_max=50) == pytest.approx(
        lam / 100
    )
    assert root(reward, cost - LIMIT, limit=0.0, beta=BETA, lambda_max=50) == pytest.approx(lam)


def test_root_moves_with_the_limit_by_minus_beta_over_variance() -> None:
    reward, cost = pool(9)
    low, mid, high = (
        root(reward, cost, limit=limit, beta=BETA, lambda_max=50)
        for limit in (LIMIT - 1e-4, LIMIT, LIMIT + 1e-4)
    )
    w = weights(reward, cost, mid, BETA)
    variance = ((w * cost**2).sum(1) - (w * cost).sum(1) ** 2).mean()
    assert (high - low) / 2e-4 == pytest.approx(-BETA / variance, rel=1e-4)


def test_shares_weigh_prompts_as_if_they_were_repeated() -> None:
    reward, cost = pool(10, prompts=5)
    times = np.array([3, 0, 1, 2, 2])
    repeated = root(
        np.repeat(reward, times, 0),
        np.repeat(cost, times, 0),
        limit=LIMIT,
        beta=BETA,
        lambda_max=500,
    )
    shared = root(reward, cost, limit=LIMIT, beta=BETA, lambda_max=500, share=times / 8)
    assert repeated == pytest.approx(shared, abs=1e-8)


def test_scores_of_any_size_stay_finite() -> None:
    reward, cost = pool(11, prompts=50, samples=32)
    solution = solve(6e3 * reward, 15e3 * cost, limit=-5e3, beta=0.1, bootstrap=Bootstrap(20))
    assert np.isfinite(solution.lam) and np.isfinite(solution.value).all()
    assert np.median(solution.ess) < 1.5  # the weights sit on one sample, and the solution says so


# --- the solution ---------------------------------------------------------------------------------


def test_solution_holds_what_it_promises() -> None:
    reward, cost = pool(12, prompts=200)
    solution = solve(reward, cost, limit=LIMIT, beta=BETA, bootstrap=Bootstrap(100))
    assert expected_cost(reward, cost, solution.lam) == pytest.approx(LIMIT, abs=1e-8)
    assert not solution.slack
    assert solution.value == pytest.approx(soft_value(reward, cost, solution.lam, BETA))
    assert solution.ess == pytest.approx(
        1 / (weights(reward, cost, solution.lam, BETA) ** 2).sum(1)
    )
    low, high = solution.lam_interval
    assert low < solution.lam < high


def test_a_loose_limit_is_slack() -> None:
    reward, cost = pool(13, prompts=50)
    solution = solve(reward, cost, limit=50.0, beta=BETA, bootstrap=Bootstrap(20))
    assert solution.slack and solution.lam == 0.0 and solution.lam_interval == (0.0, 0.0)


def infeasible(reward: Array, cost: Array, limit: float, lambda_max: float) -> str:
    with pytest.raises(InfeasibleError) as caught:
        solve(reward, cost, limit=limit, beta=BETA, lambda_max=lambda_max)
    message = str(caught.value)
    assert "\n" not in message and f"constraint.limit {limit:g}" in message
    return message


def test_an_impossible_limit_is_refused_with_the_costs_that_can_be_reached() -> None:
    reward, cost = pool(14, prompts=50)
    message = infeasible(reward, cost, -50.0, 20.0)
    assert f"still {expected_cost(reward, cost, 20.0):.4g}; raise the limit above that;" in message
    assert f"costs {cost.min(1).mean():.4g} in the mean" in message
    assert "another lambda_max or another beta will not do" in message


def test_a_limit_beyond_lambda_max_alone_asks_for_more_of_it_or_less_beta() -> None:
    reward, cost = pool(14, prompts=50)
    lowest, sharpest = float(cost.min(1).mean()), expected_cost(reward, cost, 3.0, 1e-4)
    assert "raise lambda_max or lower beta:" in infeasible(reward, cost, sharpest + 0.01, 3.0)
    assert root(reward, cost, limit=sharpest + 0.01, beta=1e-3, lambda_max=3.0) > 0
    assert "raise lambda_max (a lower beta will not do):" in infeasible(
        reward, cost, (lowest + sharpest) / 2, 3.0
    )
    assert root(reward, cost, limit=(lowest + sharpest) / 2, beta=BETA, lambda_max=1e4) > 3


def test_a_limit_just_beyond_the_samples_asks_for_as_many_as_it_takes() -> None:
    reward, cost = pool(14, prompts=2000, samples=64)
    limit = float(cost.min(1).mean()) + 0.1
    said = infeasible(reward[:, :32], cost[:, :32], limit, 50.0)
    found = re.search(r"or draw about (\d+) samples a prompt", said)
    assert found and 32 < int(found[1]) <= 64
    assert root(reward, cost, limit=limit, beta=BETA, lambda_max=50.0) > 0


def test_least_of_is_the_mean_over_all_subsets() -> None:
    _, cost = pool(3, prompts=4, samples=6)
    for count in (1, 2, 3, 5, 6):
        each = [cost[:, list(chosen)].min(1) for chosen in combinations(range(6), count)]
        assert least_of(cost, count) == pytest.approx(np.mean(each, axis=0))


NAMES = ("reward", "cost", "p_unsafe", "cvar", "kl", "length", "ess")


def test_frontier_falls_in_cost_and_its_bands_hold_the_estimates() -> None:
    reward, cost = pool(15, prompts=150)
    length = np.random.default_rng(0).integers(1, 40, cost.shape).astype(float)
    solution = solve(reward, cost, limit=LIMIT, beta=BETA, bootstrap=Bootstrap(200))
    rows = solution.frontier([0, 0.3, 1, 3, 10], length, level=0.8)
    costs, rewards = [row["cost"] for row in rows], [row["reward"] for row in rows]
    assert all(b < a for a, b in pairwise(costs))
    assert rewards[0] == max(rewards)
    for row in rows[:3]:  # beyond, too few samples are left: P(unsafe) is held at 0
        w = jackknife_weights(reward, cost, row["lam"], BETA)
        plain = weights(reward, cost, row["lam"], BETA)
        tail = shortfall(cost, value_at_risk(cost, plain, 0.8), 0.8)
        assert (plain * tail).sum(1).mean() == pytest.approx(
            worst(cost.ravel(), plain.ravel() / len(w), 0.2)
        )
        for name, score in {
            "reward": reward,
            "cost": cost,
            "p_unsafe": cost > 0,
            "cvar": tail,
            "length": length,
        }.items():
            assert row[name] == pytest.approx((w * score).sum(1).mean()), name
        kl = left_out(lambda r, c, lam=row["lam"]: divergence(r, c, lam, BETA), reward, cost)
        assert row["kl"] == pytest.approx(kl.mean())
        assert row["ess"] == pytest.approx(np.median(1 / (plain**2).sum(1)))
        assert set(row) == {
            "lam",
            *NAMES,
            *(f"{name}_{end}" for name in NAMES for end in ("low", "high")),
        }
        assert all(row[f"{name}_low"] < row[name] < row[f"{name}_high"] for name in NAMES)
    assert "length" not in solution.frontier([1])[0]


def test_the_cost_at_lambda_is_off_the_limit_by_what_half_of_the_samples_double() -> None:
    """The bias is of order 1 / n: half of the samples add once more what the jackknife takes
    out.
    """
    reward, cost = pool(15, prompts=4000, samples=16)
    solution = solve(reward, cost, limit=LIMIT, beta=BETA, bootstrap=Bootstrap(1))
    halves = [
        predict(reward[:, h], cost[:, h], solution.lam, BETA, cost[:, h])
        for h in (slice(8), slice(8, 16))
    ]
    drift = float(np.mean(halves)) - LIMIT
    assert abs(drift) > 0.01
    assert solution.frontier([solution.lam])[0]["cost"] - LIMIT == pytest.approx(-drift, rel=0.3)


# --- the root without the bias of few samples -----------------------------------------------------


def left_out_cost(reward: Array, cost: Array, lam: float) -> float:
    """C(lambda) with each sample left out in turn."""
    return float(left_out(lambda r, c: predict(r, c, lam, BETA, c), reward, cost).mean())


@pytest.mark.parametrize("seed", range(8))
def test_the_jackknifed_root_leaves_out_each_sample_in_turn(seed: int) -> None:
    reward, cost = pool(seed, prompts=20, samples=3 + seed)
    found = root(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50, jackknife=True)
    expected = brentq(lambda x: left_out_cost(reward, cost, x) - LIMIT, 0, 50, xtol=1e-12)
    assert found == pytest.approx(expected, abs=1e-8)


def test_the_jackknifed_root_is_0_where_its_cost_keeps_the_limit() -> None:
    """Whatever the plain cost does: at lambda 0 they differ by the bias towards the reference."""
    reward, cost = pool(3)
    plain = expected_cost(reward, cost, 0.0)
    corrected = left_out_cost(reward, cost, 0.0)
    assert corrected > plain + 0.01  # the more helpful answers are the more harmful ones
    between = {"limit": (plain + corrected) / 2, "beta": BETA, "lambda_max": 50.0}
    assert root(reward, cost, **between) == 0.0 < root(reward, cost, jackknife=True, **between)
    above = {**between, "limit": corrected + 1e-3}
    assert root(reward, cost, jackknife=True, **above) == 0.0


def test_reach_is_that_of_the_samples_as_they_are() -> None:
    reward, cost = pool(4)
    limit = expected_cost(reward, cost, 3.0) - 1e-3
    for jackknife in (False, True):
        with pytest.raises(InfeasibleError, match="at lambda_max 3 "):
            root(reward, cost, limit=limit, beta=BETA, lambda_max=3.0, jackknife=jackknife)


def drawn(rng: np.random.Generator, prompts: int, samples: int) -> tuple[Array, Array]:
    """A pool of the four answers of a world in which pi_ref is uniform."""
    seen = rng.integers(4, size=(prompts, samples))
    return FOUR[0][seen], FOUR[1][seen]


def test_the_jackknifed_multiplier_is_nearer_the_truth_and_its_interval_covers_it() -> None:
    """Pools of 500 prompts, 8 samples each, nominal 95 %, 40 pools."""
    reward, cost = FOUR
    truth = root(reward[None], cost[None], limit=LIMIT, beta=BETA, lambda_max=50)
    rng = np.random.default_rng(0)
    hits = {False: 0, True: 0}
    errors: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(40):
        given = drawn(rng, 500, 8)
        for jackknife in hits:
            found = solve(
                *given, limit=LIMIT, beta=BETA, bootstrap=Bootstrap(60), jackknife=jackknife
            )
            low, high = found.lam_interval
            hits[jackknife] += low <= truth <= high
            errors[jackknife].append(found.lam - truth)
    assert abs(np.mean(errors[True])) < 0.3 * np.mean(errors[False])
    assert hits[True] >= 35 > 25 > hits[False]


def test_the_slope_of_a_jackknifed_solution_is_that_of_its_root() -> None:
    reward, cost = pool(5, prompts=40)
    given = {"beta": BETA, "lambda_max": 50.0}
    found = solve(reward, cost, limit=LIMIT, bootstrap=Bootstrap(1), jackknife=True, **given)
    step = 1e-4
    low, high = (
        root(reward, cost, limit=LIMIT + move, jackknife=True, **given) for move in (-step, step)
    )
    assert found.slope == pytest.approx((high - low) / (2 * step), rel=1e-3)
    plain = solve(reward, cost, limit=LIMIT, bootstrap=Bootstrap(1), **given)
    assert found.slope != pytest.approx(plain.slope, rel=1e-2)


def test_a_jackknifed_margin_is_below_the_limit_of_a_jackknifed_cost() -> None:
    reward, cost = pool(6, prompts=40)
    found = solve_with_margin(
        reward, cost, limit=LIMIT, beta=BETA, lambda_max=50, margin=lambda lam: 0.05, jackknife=True
    )
    assert found.reached and found.target == pytest.approx(LIMIT - 0.05)
    assert left_out_cost(reward, cost, found.lam) == pytest.approx(found.target)
    out = solve_with_margin(
        reward, cost, limit=LIMIT, beta=BETA, lambda_max=3.0, margin=lambda lam: 9.0, jackknife=True
    )
    assert not out.reached and out.target == pytest.approx(left_out_cost(reward, cost, 3.0))


@pytest.mark.parametrize("lam", [0.0, 3.0, 1e3])
def test_no_prediction_leaves_what_it_can_be(lam: float) -> None:
    """Two prompts of two samples: unless held back, the jackknife goes beyond the best of them."""
    reward = np.array([[0.0, 2.0], [0.0, 3.0]])
    cost = np.array([[1.0, -1.0], [0.2, -0.2]])
    length = np.array([[9.0, 1.0], [8.0, 2.0]])
    solution = solve(reward, cost, limit=LIMIT, beta=BETA, bootstrap=Bootstrap(50))
    assert (jackknife_weights(reward, cost, lam, BETA) * (cost > 0)).sum(1).mean() < 0
    row = solution.frontier([lam], length)[0]
    ranges = {
        "reward": reward,
        "cost": cost,
        "p_unsafe": np.array([0, 1]),
        "length": length,
        "kl": np.array([0, 99]),
    }
    for end in ("", "_low", "_high"):
        for name, score in ranges.items():
            assert score.min() <= row[name + end] <= score.max(), name
        assert row["cvar" + end] >= row["cost" + end]


def worst(cost: Array, weight: Array, share: float) -> float:
    """Mean cost of the worst `share` of the weight, taken answer by answer."""
    left, total = share, 0.0
    for i in np.argsort(-cost):
        taken = min(left, float(weight[i]))
        left, total = left - taken, total + taken * float(cost[i])
    return total / share


def test_frontier_tells_the_reward_that_was_not_charged() -> None:
    reward, cost = pool(15, prompts=50)
    charged = reward - 0.3 * (cost > 0)
    row = solve(charged, cost, limit=LIMIT, beta=BETA, bootstrap=Bootstrap(20)).frontier(
        [0.7], reward=reward
    )[0]
    w = jackknife_weights(charged, cost, 0.7, BETA)
    assert row["reward"] == pytest.approx((w * reward).sum(1).mean())


def test_bands_are_as_wide_as_pools_drawn_afresh_differ() -> None:
    """200 pools of 100 prompts, and the mean band of ten of them."""
    reward, cost = pool(19, prompts=20_000, samples=16)
    solved = [
        solve(
            reward[part],
            cost[part],
            limit=LIMIT,
            beta=BETA,
            bootstrap=Bootstrap(200 if i < 10 else 1),
        ).frontier([0.8])[0]
        for i, part in enumerate(np.arange(20_000).reshape(200, 100))
    ]
    for name in ("reward", "cost", "p_unsafe", "cvar", "kl", "ess"):
        spread = np.std([row[name] for row in solved])
        banded = np.mean([row[f"{name}_high"] - row[f"{name}_low"] for row in solved[:10]])
        assert banded == pytest.approx(3.92 * spread, rel=0.2), (
            name
        )  # four standard errors of the spread


def test_value_at_risk_and_shortfall_by_hand() -> None:
    value, weight = np.array([3.0, 1.0, 2.0, 4.0]), np.array([0.2, 0.4, 0.3, 0.1])
    assert [value_at_risk(value, weight, level) for level in (0.3, 0.4, 0.5, 0.7, 0.75, 0.95)] == [
        1,
        1,
        2,
        2,
        3,
        4,
    ]
    # the worst quarter: 0.1 of 4 and 0.15 of 3
    assert weight @ shortfall(value, 3.0, 0.75) == pytest.approx((0.1 * 4 + 0.15 * 3) / 0.25)
    assert all(weight @ shortfall(value, t, 0.75) > 3.4 - 1e-9 for t in np.linspace(0, 5, 51))


def test_the_slope_is_how_lambda_moves_with_the_limit() -> None:
    reward, cost = pool(9)
    solution = solve(reward, cost, limit=LIMIT, beta=BETA, bootstrap=Bootstrap(1))
    moved = [
        root(reward, cost, limit=LIMIT + step, beta=BETA, lambda_max=50) for step in (-1e-4, 1e-4)
    ]
    assert solution.slope == pytest.approx((moved[1] - moved[0]) / 2e-4, rel=1e-4)
    assert solve(reward, cost, limit=50.0, beta=BETA, bootstrap=Bootstrap(1)).slope == 0


# --- few effective samples ------------------------------------------------------------------------


def test_the_beta_for_an_ess_is_where_a_rerun_has_it() -> None:
    reward, cost = pool(20, prompts=200, samples=32)
    given = {"limit": -0.2, "lambda_max": 50.0}

    def ess(beta: float) -> float:
        lam = root(reward, cost, limit=-0.2, beta=beta, lambda_max=50 * beta)
        return float(np.median(effective_samples(reward, cost, lam, beta)))

    beta = beta_for_ess(reward, cost, beta=0.4, ess=16.0, **given)
    assert beta is not None and ess(0.4) < 8
    assert ess(beta) >= 16 > ess(0.97 * beta)
    assert beta_for_ess(reward, cost, beta=beta, ess=16.0, **given) == beta
    gentlest = ess(1e4)  # the smallest tilt that keeps the limit; no beta does better
    assert beta_for_ess(reward, cost, beta=0.4, ess=gentlest + 0.5, **given) is None


@pytest.mark.parametrize(("beta", "low", "high"), [(10.0, 44, 56), (2.0, 1e5, 1e7)])
def test_samples_for_an_ess_grow_with_the_exponent_of_the_variance(
    beta: float, low: float, high: float
) -> None:
    """Scores with r sd 6, c sd 15, correlation 0.4 at lambda 0.4: the tilt has variance 0.43 at
    beta 10, 10.8 at 2.
    """
    rng = np.random.default_rng(0)
    reward = 6 * rng.normal(size=(400, 128))
    cost = 15 * (0.4 * reward / 6 + np.sqrt(1 - 0.16) * rng.normal(size=reward.shape))
    wanted = samples_for_ess(reward, cost, 0.4, beta, 30.0)
    assert low < wanted < high
    if beta == 10.0:  # as many samples as it says have the ESS
        count = round(wanted)
        found = effective_samples(reward[:, :count], cost[:, :count], 0.4, beta)
        assert np.median(found) == pytest.approx(30, rel=0.15)


# --- certificate margin ---------------------------------------------------------------------------


def test_a_stock_is_the_margin_that_a_sample_size_is_for() -> None:
    for sd, prompts, delta, power in ((1.3, 400, 0.05, 0.8), (0.2, 97, 0.1, 0.5)):
        margin = certificate_margin(sd, prompts, delta=delta, power=power)
        assert sample_size(sd, margin * 1.0001, delta, power) == prompts
    assert certificate_margin(1.0, 100, delta=0.05, power=0.5) == pytest.approx(0.1645, abs=1e-4)


def test_spread_of_means_at_equal_weights_is_that_of_the_means() -> None:
    cost = pool(21, prompts=60, samples=8)[1] + np.linspace(-1, 1, 60)[:, None]
    flat = np.zeros_like(cost)
    assert spread_of_means(flat, cost, 0.0, BETA, 8) == pytest.approx(cost.mean(1).std(ddof=1))
    alone = np.array([[1.0, 1.0], [3.0, 3.0]])  # nothing within prompts, sqrt 2 between them
    assert spread_of_means(np.zeros((2, 2)), alone, 1.0, BETA, 4) == pytest.approx(np.sqrt(2))


def test_spread_of_means_foretells_that_of_fresh_answers() -> None:
    """Normal scores, so that pi_lambda is normal too: its cost is shifted within each prompt and
    keeps its variance.
    """
    rng = np.random.default_rng(5)
    prompts, between, within, count = 4000, 0.5, 0.8, 4
    centre = between * rng.normal(size=(prompts, 1))
    cost = centre + within * rng.normal(size=(prompts, 16))
    fresh = centre - within**2 * 0.9 / 1.4 + within * rng.normal(size=(prompts, count))
    found = spread_of_means(np.zeros_like(cost), cost, 0.9, 1.4, count)
    assert found == pytest.approx(fresh.mean(1).std(ddof=1), rel=0.05)
    assert found == pytest.approx(np.sqrt(between**2 + within**2 / count), rel=0.04)


def margin_of(
    reward: Array, cost: Array, prompts: int = 400, beta: float = BETA
) -> Callable[[float], float]:
    """The margin for four answers to each of `prompts` certify prompts."""
    return lambda lam: certificate_margin(
        spread_of_means(reward, cost, lam, beta, 4), prompts, delta=0.05, power=0.8
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_stocked_multiplier_is_a_fixed_point(seed: int) -> None:
    reward, cost = pool(seed, prompts=80)
    margin = margin_of(reward, cost)
    found = solve_with_margin(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50, margin=margin)
    assert found.reached and found.lam > root(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50)
    assert expected_cost(reward, cost, found.lam) == pytest.approx(found.target, abs=1e-9)
    assert found.target + margin(found.lam) == pytest.approx(
        LIMIT, abs=1e-9
    ) and found.margin == margin(found.lam)


def test_a_stock_out_of_reach_leaves_the_lowest_cost_and_a_slack_one_no_multiplier() -> None:
    reward, cost = pool(2, prompts=30)
    limit = expected_cost(reward, cost, 50.0) + 1e-3
    tight = solve_with_margin(
        reward, cost, limit=limit, beta=BETA, lambda_max=50, margin=margin_of(reward, cost, 10)
    )
    assert (tight.reached, tight.lam) == (False, 50.0)
    assert tight.target == pytest.approx(
        expected_cost(reward, cost, 50.0)
    ) and tight.margin == pytest.approx(1e-3)
    loose = solve_with_margin(
        reward, cost, limit=9.0, beta=BETA, lambda_max=50, margin=margin_of(reward, cost)
    )
    assert (loose.reached, loose.lam) == (True, 0.0) and loose.target == 9.0 - loose.margin
    with pytest.raises(InfeasibleError):
        solve_with_margin(
            reward, cost, limit=-50.0, beta=BETA, lambda_max=50, margin=lambda lam: 0.1
        )


def test_a_policy_at_the_stocked_multiplier_is_certified_as_often_as_it_says() -> None:
    """Normal costs with a known pi_lambda; 300 sets of 200 certify prompts with 4 answers each."""
    rng = np.random.default_rng(6)
    cost = 0.4 * rng.normal(size=(4000, 1)) + rng.normal(size=(4000, 128))
    reward = np.zeros_like(cost)
    found = solve_with_margin(
        reward, cost, limit=-0.2, beta=1.0, lambda_max=50, margin=margin_of(reward, cost, 200, 1.0)
    )
    passed = 0
    for _ in range(300):
        answers = 0.4 * rng.normal(size=(200, 1)) - found.lam + rng.normal(size=(200, 4))
        passed += upper_bound(answers.ravel(), np.repeat(np.arange(200), 4)) <= -0.2
    assert passed / 300 == pytest.approx(0.8, abs=0.08)


# --- several constraints --------------------------------------------------------------------------


def several(seed: int) -> tuple[Array, Array, Array, Array]:
    """Reward, three costs, limits that bind or not, and groups; in units that differ by up to a
    million.
    """
    rng = np.random.default_rng(seed)
    prompts, samples = 3 + seed % 3, 4 + seed % 3
    reward = rng.normal(size=(prompts, samples)) * 10 ** rng.uniform(-3, 3)
    costs = rng.normal(size=(3, prompts, samples)) * 10 ** rng.uniform(-3, 3, size=(3, 1, 1))
    members = np.ones((3, prompts), bool)
    members[2, 1:] = rng.random(prompts - 1) < 0.6
    means = np.array([cost[group].mean() for cost, group in zip(costs, members, strict=True)])
    return reward, costs, means - rng.uniform(-0.3, 0.9, 3) * costs.std((1, 2)), members


def primal(
    reward: Array, costs: Array, limits: Array, members: Array, beta: float
) -> tuple[Array, float]:
    """The weights of the samples that solve the constrained problem, a concave one, and its E[r] -
    beta KL.
    """
    prompts, samples = reward.shape
    unit, (rows, bounds, sums) = reward.std(), linear(costs, limits, members)

    def loss(w: Array) -> tuple[float, Array]:
        tilt = reward.ravel() / unit - beta / unit * np.log(w * samples)
        return -float(w @ tilt) / prompts, (beta / unit - tilt) / prompts

    found = minimize(
        loss,
        np.full(reward.size, 1 / samples),
        jac=True,
        method="SLSQP",
        bounds=[(1e-12, 1)] * reward.size,
        constraints=[
            {"type": "ineq", "fun": lambda w: bounds - rows @ w, "jac": lambda w: -rows},
            {"type": "eq", "fun": lambda w: sums @ w - 1, "jac": lambda w: sums},
        ],
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert (bounds - rows @ found.x).min() > -1e-6
    return found.x.reshape(prompts, samples), -found.fun * unit


def linear(costs: Array, limits: Array, members: Array) -> tuple[Array, Array, Array]:
    """Means of the costs and sums of each prompt's weights as matrices on all weights, and the
    limits, in sds.
    """
    count, prompts, samples = costs.shape
    share, sd = members / members.sum(1, keepdims=True), costs.std((1, 2))
    rows = (costs * share[:, :, None] / sd[:, None, None]).reshape(count, -1)
    return rows, limits / sd, np.kron(np.eye(prompts), np.ones(samples))


def feasible(costs: Array, limits: Array, members: Array) -> bool:
    """Whether any weights of the samples keep all limits, by linear programming."""
    rows, bounds, sums = linear(costs, limits, members)
    return bool(
        linprog(np.zeros(rows.shape[1]), rows, bounds, sums, np.ones(len(sums))).status == 0
    )


@pytest.mark.parametrize("seed", range(14))
def test_multipliers_of_several_limits_solve_the_constrained_problem(seed: int) -> None:
    reward, costs, limits, members = several(seed)
    beta = 0.7 * reward.std()
    top = 1e4 * float(reward.std() / costs[0].std())
    if not feasible(costs, limits, members):
        with pytest.raises(InfeasibleError, match=r"limit [123]"):
            solve_many(reward, costs, limits=limits, beta=beta, members=members, lambda_max=top)
        return
    found = solve_many(reward, costs, limits=limits, beta=beta, members=members, lambda_max=top)
    charge = np.tensordot(found.lams, members[:, :, None] * costs, 1)
    best, value = primal(reward, costs, limits, members, beta)
    assert np.abs(weights(reward, charge, 1.0, beta) - best).max() < 1e-3
    assert found.value == pytest.approx(value, rel=1e-5, abs=1e-6 * reward.std())
    room = (limits - found.predicted) / costs.std((1, 2))
    assert (
        room.min() > -1e-8
        and found.lams.min() >= 0
        and np.abs(found.lams * costs.std((1, 2)) * room).max() < 1e-7 * beta
    )
    assert found.steps <= 25


def test_the_fourteen_seeds_meet_every_ending() -> None:
    endings = []
    for seed in range(14):
        reward, costs, limits, members = several(seed)
        if feasible(costs, limits, members):
            top = 1e4 * float(reward.std() / costs[0].std())
            found = solve_many(
                reward,
                costs,
                limits=limits,
                beta=0.7 * reward.std(),
                members=members,
                lambda_max=top,
            )
            endings.append(int((found.lams > 0).sum()))
        else:
            endings.append(-1)
    assert {-1, 1, 2} <= set(endings)


def test_two_limits_by_hand() -> None:
    """One prompt, four answers, each limit on one of two independent halves: w is a product."""
    reward = np.zeros((1, 4))
    costs = np.array([[[0.0, 0.0, 1.0, 1.0]], [[0.0, 1.0, 0.0, 1.0]]])
    found = solve_many(reward, costs, limits=[0.25, 0.2], beta=2.0)
    assert found.lams == pytest.approx([2 * np.log(3), 2 * np.log(4)])
    assert found.predicted == pytest.approx([0.25, 0.2])
    # E[r] - beta KL = -2 (KL(1/4 | 1/2) + KL(1/5 | 1/2))
    divergences = [p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p)) for p in (0.25, 0.2)]
    assert found.value == pytest.approx(-2 * sum(divergences))


def test_one_limit_of_many_is_the_root() -> None:
    reward, cost = pool(8, prompts=30)
    lam = root(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50)
    other = np.random.default_rng(1).normal(size=cost.shape)
    found = solve_many(reward, [cost, other], limits=[LIMIT, 99.0], beta=BETA, lambda_max=50)
    assert found.lams == pytest.approx([lam, 0.0], abs=1e-8)


def test_a_limit_stated_twice_has_one_price() -> None:
    reward, cost = pool(8, prompts=30)
    lam = root(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50)
    found = solve_many(
        reward, [cost, cost, 2 * cost], limits=[LIMIT, LIMIT + 0.1, 2 * LIMIT], beta=BETA
    )
    assert found.lams[0] + found.lams[1] + 2 * found.lams[2] == pytest.approx(lam, abs=1e-6)
    assert found.lams[1] == 0


def test_a_conflict_names_the_limits_and_what_is_reached() -> None:
    reward, cost = pool(8, prompts=30)
    names = ["constraint.limit", "constraint.additional.warm.limit"]
    with pytest.raises(
        InfeasibleError,
        match=r"keep constraint\.limit -0\.5, constraint\.additional\.warm\.limit 0\.2 together",
    ):
        solve_many(
            reward, [cost, -cost], limits=[-0.5, 0.2], beta=BETA, names=names, lambda_max=1e3
        )
    least = (-cost).min(1).mean()
    with pytest.raises(
        InfeasibleError,
        match=rf"^constraint\.additional\.warm\.limit -9 is out .* it can be is {least:.4g};",
    ):
        solve_many(
            reward, [cost, -cost], limits=[-0.5, -9.0], beta=BETA, names=names, lambda_max=1e3
        )
    barely = float(cost.min(1).mean()) + 1e-3
    with pytest.raises(
        InfeasibleError,
        match=r"^constraint\.limit .* is not kept at the largest multiplier; raise lambda_max",
    ):
        solve_many(
            reward, [cost, cost**2], limits=[barely, 99.0], beta=BETA, names=names, lambda_max=2.0
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"costs": np.zeros((1, 3, 5))}, r"costs must be \[K, prompts, samples >= 2\]"),
        ({"limits": [0.0, 1.0]}, r"limits \[K\], got"),
        ({"members": np.zeros((1, 3), bool)}, "a prompt in each row"),
        ({"members": np.ones((2, 3), bool)}, "members must be"),
        ({"costs": np.full((1, 3, 4), np.nan)}, "finite"),
        ({"limits": [np.nan]}, "limit must be finite"),
        ({"beta": 0.0}, "beta must be finite and above 0"),
    ],
)
def test_unusable_constraints_are_refused(change: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"costs": np.zeros((1, 3, 4)), "limits": [0.0], "beta": 1.0, **change}
    with pytest.raises(ValueError, match=says):
        solve_many(np.zeros((3, 4)), **given)


def test_interval_shrinks_with_the_number_of_prompts() -> None:
    widths = []
    for prompts in (40, 640):
        low, high = solve(
            *pool(16, prompts), limit=LIMIT, beta=BETA, bootstrap=Bootstrap(100)
        ).lam_interval
        widths.append(high - low)
    assert widths[1] < 0.5 * widths[0]  # a quarter in theory


def test_interval_covers_the_multiplier_of_all_prompts() -> None:
    """Pools of 60 prompts from a population of 3,000; nominal 95 %, 40 pools."""
    reward, cost = pool(17, prompts=3000)
    truth = root(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50)
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(40):
        chosen = rng.choice(3000, 60, replace=False)
        low, high = solve(
            reward[chosen], cost[chosen], limit=LIMIT, beta=BETA, bootstrap=Bootstrap(80)
        ).lam_interval
        hits += low <= truth <= high
    assert hits >= 34


def test_the_same_seed_gives_the_same_interval() -> None:
    reward, cost = pool(18, prompts=50)
    one, same, other = (
        solve(reward, cost, limit=LIMIT, beta=BETA, bootstrap=Bootstrap(50, seed)).lam_interval
        for seed in (1, 1, 2)
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("reward", "cost", "message"),
    [
        (np.zeros((3, 4)), np.zeros((3, 5)), r"\(3, 4\) and \(3, 5\)"),
        (np.zeros((3, 1)), np.zeros((3, 1)), "samples >= 2"),
        (np.zeros(4), np.zeros(4), "samples >= 2"),
        (np.array([[0.0, np.nan]]), np.zeros((1, 2)), "finite"),
        (np.zeros((1, 2)), np.array([[0.0, np.inf]]), "finite"),
    ],
    ids=["shapes differ", "one sample", "no samples axis", "nan", "infinite"],
)
def test_unusable_scores_are_refused(reward: Array, cost: Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(reward, cost, limit=0.0, beta=1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0.0), ("beta", -1.0), ("beta", np.nan), ("limit", np.nan), ("limit", -np.inf),
        ("lambda_max", 0.0), ("lambda_max", np.inf),
    ],
)  # fmt: skip
def test_unusable_settings_are_refused_by_name(name: str, value: Any) -> None:
    given: dict[str, Any] = {"limit": LIMIT, "beta": BETA, "lambda_max": 50.0}
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value}$"):
        solve(*pool(12), **{**given, name: value})


def test_an_interval_takes_a_resample() -> None:
    with pytest.raises(ValueError, match=r"^bootstrap must be at least 1, got 0$"):
        solve(*pool(12), limit=LIMIT, beta=BETA, bootstrap=Bootstrap(0))

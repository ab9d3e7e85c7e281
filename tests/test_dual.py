"""The dual of a pool: its value, slope and curvature, its root, and what it predicts, against brute force."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq, minimize

from dualign import dual
from dualign.core.errors import InfeasibleError

BETA, LIMIT = 0.7, -0.35
Array = np.ndarray


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


# --- the function -----------------------------------------------------------------------------------------------------


def test_soft_value_and_weights_by_hand() -> None:
    reward, cost = np.log([[1.0, 3.0]]), np.array([[0.0, 1.0]])
    assert dual.weights(reward, cost, 0.0, 1.0).tolist() == [pytest.approx([0.25, 0.75])]
    assert dual.soft_value(reward, cost, 0.0, 1.0).tolist() == pytest.approx([np.log(2)])
    # lambda = log 3 cancels the second answer's lead
    assert dual.weights(reward, cost, np.log(3), 1.0).tolist() == [pytest.approx([0.5, 0.5])]
    assert dual.dual_value(reward, cost, np.log(3), limit=0.5, beta=1.0) == pytest.approx(0.5 * np.log(3))


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.3, 6.0])
def test_slope_of_the_dual_is_limit_minus_cost(lam: float) -> None:
    reward, cost = pool(1)
    step = 1e-5
    above, below = (dual.dual_value(reward, cost, lam + s, limit=LIMIT, beta=BETA) for s in (step, -step))
    assert (above - below) / (2 * step) == pytest.approx(LIMIT - expected_cost(reward, cost, lam), abs=1e-8)


@pytest.mark.parametrize("lam", [0.1, 1.3, 4.0])
def test_curvature_of_the_dual_is_the_variance_over_beta(lam: float) -> None:
    reward, cost = pool(2)
    step = 1e-3
    value = [dual.dual_value(reward, cost, lam + s, limit=LIMIT, beta=BETA) for s in (-step, 0, step)]
    w = dual.weights(reward, cost, lam, BETA)
    variance = ((w * cost**2).sum(1) - (w * cost).sum(1) ** 2).mean()
    assert (value[0] - 2 * value[1] + value[2]) / step**2 == pytest.approx(variance / BETA, abs=1e-5)


def test_dual_value_is_the_lagrangian_of_the_tilted_policy_and_bounds_every_other() -> None:
    reward, cost = pool(3)
    n = reward.shape[1]
    lam = 0.9

    def lagrangian(p: Array) -> float:
        kl = (p * np.log(p * n)).sum(1)
        return float(((p * reward).sum(1) - BETA * kl - lam * ((p * cost).sum(1) - LIMIT)).mean())

    tilted = dual.weights(reward, cost, lam, BETA)
    assert dual.dual_value(reward, cost, lam, limit=LIMIT, beta=BETA) == pytest.approx(lagrangian(tilted), abs=1e-12)
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
    assert dual.predict(reward, cost, 0.8, BETA, cost)[0] == pytest.approx(float(p @ c))
    assert dual.divergence(reward, cost, 0.8, BETA)[0] == pytest.approx(float((p * np.log(p * 8 / times)).sum()))


def test_divergence_is_the_kl_of_the_weights_to_the_uniform_samples() -> None:
    reward, cost = pool(4)
    for lam in (0.0, 0.7, 5.0):
        w = dual.weights(reward, cost, lam, BETA)
        direct = (w * np.log(w * reward.shape[1])).sum(1)
        assert dual.divergence(reward, cost, lam, BETA) == pytest.approx(direct, abs=1e-12)


def test_leave_one_out_value_is_the_value_of_the_other_samples() -> None:
    reward, cost = pool(5, prompts=4, samples=6)
    value = dual.leave_one_out_value(reward, cost, 1.1, BETA)
    for i in range(6):
        others = [j for j in range(6) if j != i]
        assert value[:, i] == pytest.approx(dual.soft_value(reward[:, others], cost[:, others], 1.1, BETA))


def test_effective_samples_run_from_one_to_all() -> None:
    flat = np.zeros((2, 16))
    assert dual.effective_samples(flat, flat, 1.0, BETA).tolist() == pytest.approx([16, 16])
    peak = flat.copy()
    peak[:, 3] = 1e4
    assert dual.effective_samples(peak, flat, 1.0, BETA).tolist() == pytest.approx([1, 1])


# --- the root ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_root_agrees_with_bisection_or_says_why_not(seed: int) -> None:
    reward, cost = pool(seed, prompts=1 + seed % 7, samples=2 + seed % 9)
    limit, top = np.random.default_rng(seed).uniform(-1.5, 0.8), 200.0
    if expected_cost(reward, cost, 0.0) <= limit:
        assert dual.root(reward, cost, limit=limit, beta=BETA, lambda_max=top) == 0.0
    elif expected_cost(reward, cost, top) > limit:
        with pytest.raises(InfeasibleError, match=r"constraint\.limit .* lambda_max 200 "):
            dual.root(reward, cost, limit=limit, beta=BETA, lambda_max=top)
    else:
        exact = brentq(lambda lam: expected_cost(reward, cost, lam) - limit, 0, top, xtol=1e-12)
        assert dual.root(reward, cost, limit=limit, beta=BETA, lambda_max=top) == pytest.approx(exact, abs=1e-7)


def test_the_forty_seeds_meet_all_three_endings() -> None:
    endings = []
    for seed in range(40):
        reward, cost = pool(seed, prompts=1 + seed % 7, samples=2 + seed % 9)
        limit = np.random.default_rng(seed).uniform(-1.5, 0.8)
        slack, reachable = expected_cost(reward, cost, 0.0) <= limit, expected_cost(reward, cost, 200.0) <= limit
        endings.append("slack" if slack else "root" if reachable else "infeasible")
    assert min(endings.count(name) for name in ("slack", "root", "infeasible")) >= 4


@pytest.mark.parametrize("seed", range(8))
def test_root_solves_the_constrained_problem(seed: int) -> None:
    """Strong duality: the policy of the root is what a general solver finds for the primal problem."""
    reward, cost = pool(seed, prompts=2, samples=4)
    limit = expected_cost(reward, cost, 1.0)  # so that the constraint binds
    lam = dual.root(reward, cost, limit=limit, beta=BETA, lambda_max=50)
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
        constraints=[{"type": "ineq", "fun": lambda t: limit - float((policy(t) * cost).sum(1).mean())}],
        options={"maxiter": 1000, "ftol": 1e-12},
    )
    assert np.abs(policy(primal.x) - dual.weights(reward, cost, lam, BETA)).max() < 2e-3
    assert -primal.fun == pytest.approx(dual.dual_value(reward, cost, lam, limit=limit, beta=BETA), abs=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_slater_radius_bounds_the_multiplier(seed: int) -> None:
    reward, cost = pool(seed, prompts=30)
    limit = expected_cost(reward, cost, 0.3 * seed)
    lam = dual.root(reward, cost, limit=limit, beta=BETA, lambda_max=50)
    radius = dual.slater_radius(reward, cost, limit=limit, beta=BETA, lambda_max=50)
    assert dual.solve(reward, cost, limit=limit, beta=BETA, lambda_max=50).lam_interval[1] <= radius
    assert 1.15 * lam < radius <= 50  # so the interval [0, 2 rho] does not end at the root of a slightly wrong pool


def test_slater_radius_is_that_of_the_safest_answers() -> None:
    """A tilt at a large multiplier plays the least costly sample of each prompt: E[r] - beta log n, KL in full."""
    reward, cost = pool(6, prompts=30)
    limit = expected_cost(reward, cost, 1.0)
    best = dual.dual_value(reward, cost, 1.0, limit=limit, beta=BETA)
    safest = cost.argmin(1)
    value = reward[np.arange(30), safest].mean() - BETA * np.log(reward.shape[1])
    expected = (best - value) / (limit - cost.min(1).mean())
    assert expected > 1.5
    radius = dual.slater_radius(reward, cost, limit=limit, beta=BETA, lambda_max=1e4)
    assert radius == pytest.approx(expected, rel=1e-3)


def test_slater_radius_is_no_less_than_the_interval_and_no_more_than_the_largest_multiplier() -> None:
    reward, cost = pool(6, prompts=3)
    solution = dual.solve(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50)
    assert dual.slater_radius(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50) >= solution.lam_interval[1]
    barely = expected_cost(reward, cost, 50)
    for limit in (barely + 1e-9, barely + 1e-6):
        assert dual.slater_radius(reward, cost, limit=limit, beta=BETA, lambda_max=50) == 50


def test_newton_needs_a_handful_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    reward, cost = pool(6, prompts=100)
    evaluations: list[float] = []
    weights = dual.weights

    def counted(reward: Array, cost: Array, lam: float, beta: float) -> Array:
        evaluations.append(lam)
        return weights(reward, cost, lam, beta)

    monkeypatch.setattr(dual, "weights", counted)
    for limit in (-0.1, -0.35, -0.7):
        evaluations.clear()
        dual.root(reward, cost, limit=limit, beta=BETA, lambda_max=1e4)
        assert len(evaluations) <= 12  # two of them look at the ends of the bracket


def test_projected_gradient_of_mocan_ends_at_the_same_multiplier() -> None:
    reward, cost = pool(7, prompts=20)
    lam = 0.0
    for _ in range(2000):
        lam = max(0.0, lam + 0.5 * (expected_cost(reward, cost, lam) - LIMIT))
    assert dual.root(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50) == pytest.approx(lam, abs=1e-6)


def test_root_scales_with_the_units_of_reward_and_cost() -> None:
    reward, cost = pool(8)
    lam = dual.root(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50)
    assert dual.root(9 * reward, cost, limit=LIMIT, beta=9 * BETA, lambda_max=500) == pytest.approx(9 * lam)
    assert dual.root(reward, 100 * cost, limit=100 * LIMIT, beta=BETA, lambda_max=50) == pytest.approx(lam / 100)
    assert dual.root(reward, cost - LIMIT, limit=0.0, beta=BETA, lambda_max=50) == pytest.approx(lam)


def test_root_moves_with_the_limit_by_minus_beta_over_variance() -> None:
    reward, cost = pool(9)
    low, mid, high = (
        dual.root(reward, cost, limit=limit, beta=BETA, lambda_max=50) for limit in (LIMIT - 1e-4, LIMIT, LIMIT + 1e-4)
    )
    w = dual.weights(reward, cost, mid, BETA)
    variance = ((w * cost**2).sum(1) - (w * cost).sum(1) ** 2).mean()
    assert (high - low) / 2e-4 == pytest.approx(-BETA / variance, rel=1e-4)


def test_shares_weigh_prompts_as_if_they_were_repeated() -> None:
    reward, cost = pool(10, prompts=5)
    times = np.array([3, 0, 1, 2, 2])
    repeated = dual.root(np.repeat(reward, times, 0), np.repeat(cost, times, 0), limit=LIMIT, beta=BETA, lambda_max=500)
    shared = dual.root(reward, cost, limit=LIMIT, beta=BETA, lambda_max=500, share=times / 8)
    assert repeated == pytest.approx(shared, abs=1e-8)


def test_scores_of_any_size_stay_finite() -> None:
    reward, cost = pool(11, prompts=50, samples=32)
    solution = dual.solve(6e3 * reward, 15e3 * cost, limit=-5e3, beta=0.1, bootstrap=20)
    assert np.isfinite(solution.lam) and np.isfinite(solution.value).all()
    assert np.median(solution.ess) < 1.5  # the weights sit on one sample, and the solution says so


# --- the solution -----------------------------------------------------------------------------------------------------


def test_solution_holds_what_it_promises() -> None:
    reward, cost = pool(12, prompts=200)
    solution = dual.solve(reward, cost, limit=LIMIT, beta=BETA, bootstrap=100)
    assert expected_cost(reward, cost, solution.lam) == pytest.approx(LIMIT, abs=1e-8)
    assert not solution.slack
    assert solution.value == pytest.approx(dual.soft_value(reward, cost, solution.lam, BETA))
    assert solution.ess == pytest.approx(1 / (dual.weights(reward, cost, solution.lam, BETA) ** 2).sum(1))
    low, high = solution.lam_interval
    assert low < solution.lam < high


def test_a_loose_limit_is_slack() -> None:
    reward, cost = pool(13, prompts=50)
    solution = dual.solve(reward, cost, limit=50.0, beta=BETA, bootstrap=20)
    assert solution.slack and solution.lam == 0.0 and solution.lam_interval == (0.0, 0.0)


def test_an_impossible_limit_is_refused_with_the_cost_that_can_be_reached() -> None:
    reward, cost = pool(14, prompts=50)
    lowest = expected_cost(reward, cost, 20.0)
    with pytest.raises(InfeasibleError) as caught:
        dual.solve(reward, cost, limit=-50.0, beta=BETA, lambda_max=20.0)
    message = str(caught.value)
    assert "\n" not in message and "constraint.limit -50" in message and f"{lowest:.4g}" in message


def test_frontier_falls_in_cost_and_its_bands_hold_the_estimates() -> None:
    reward, cost = pool(15, prompts=150)
    length = np.random.default_rng(0).integers(1, 40, cost.shape).astype(float)
    rows = dual.solve(reward, cost, limit=LIMIT, beta=BETA, bootstrap=200).frontier([0, 0.3, 1, 3, 10], length)
    costs, rewards = [row["cost"] for row in rows], [row["reward"] for row in rows]
    assert all(b < a for a, b in pairwise(costs))
    assert rewards[0] == max(rewards)
    for row in rows:
        w = dual.weights(reward, cost, row["lam"], BETA)
        assert row["cost"] == pytest.approx(expected_cost(reward, cost, row["lam"]))
        assert row["reward"] == pytest.approx((w * reward).sum(1).mean())
        assert row["p_unsafe"] == pytest.approx(w[cost > 0].sum() / len(w))
        assert row["length"] == pytest.approx((w * length).sum(1).mean())
        assert row["kl"] == pytest.approx((w * np.log(w * w.shape[1])).sum(1).mean())
        assert all(row[f"{name}_low"] < row[name] < row[f"{name}_high"] for name in ("reward", "cost", "p_unsafe"))
    assert "length" not in dual.solve(reward, cost, limit=LIMIT, beta=BETA, bootstrap=20).frontier([1])[0]


def test_interval_shrinks_with_the_number_of_prompts() -> None:
    widths = []
    for prompts in (40, 640):
        low, high = dual.solve(*pool(16, prompts), limit=LIMIT, beta=BETA, bootstrap=100).lam_interval
        widths.append(high - low)
    assert widths[1] < 0.5 * widths[0]  # a quarter in theory


def test_interval_covers_the_multiplier_of_all_prompts() -> None:
    """Pools of 60 prompts from a population of 3,000; nominal 95 %, 40 pools."""
    reward, cost = pool(17, prompts=3000)
    truth = dual.root(reward, cost, limit=LIMIT, beta=BETA, lambda_max=50)
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(40):
        chosen = rng.choice(3000, 60, replace=False)
        low, high = dual.solve(reward[chosen], cost[chosen], limit=LIMIT, beta=BETA, bootstrap=80).lam_interval
        hits += low <= truth <= high
    assert hits >= 34


def test_the_same_seed_gives_the_same_interval() -> None:
    reward, cost = pool(18, prompts=50)
    one, same, other = (
        dual.solve(reward, cost, limit=LIMIT, beta=BETA, bootstrap=50, seed=seed).lam_interval for seed in (1, 1, 2)
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
        dual.solve(reward, cost, limit=0.0, beta=1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0.0), ("beta", -1.0), ("beta", np.nan), ("limit", np.nan), ("limit", -np.inf),
        ("lambda_max", 0.0), ("lambda_max", np.inf), ("bootstrap", 0),
    ],
)  # fmt: skip
def test_unusable_settings_are_refused_by_name(name: str, value: Any) -> None:
    given: dict[str, Any] = {"limit": LIMIT, "beta": BETA, "lambda_max": 50.0, "bootstrap": 20}
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value}$"):
        dual.solve(*pool(12), **{**given, name: value})

"""Conformal Policy Control against a small finite policy, where psi, the weights and pi_b are
summed up exactly.
"""

from __future__ import annotations

import numpy as np
import pytest

from bench.conformal import adjusted_risk, calibrated, clipped, grid_of, normaliser, regulated

RNG = np.random.default_rng(0)
SAFE = np.array([0.3, 0.2, 0.3, 0.08, 0.05, 0.07])
BOLD = np.array([0.1, 0.1, 0.1, 0.3, 0.3, 0.1])
LOSS = np.array([0.0, 0.2, 0.1, 0.9, 1.0, 0.4])
REWARD = RNG.normal(size=6)
RATIO = BOLD / SAFE
BOUNDS = (0.3, 1.0, 2.5)


def exact(bound: float) -> np.ndarray:
    """pi_b by every answer there is."""
    if bound == 0:
        return SAFE
    least = np.minimum(BOLD, bound * SAFE)
    found: np.ndarray = least / least.sum()
    return found


def drawn(policy: np.ndarray, prompts: int, answers: int, seed: int = 1) -> np.ndarray:
    found: np.ndarray = np.random.default_rng(seed).choice(6, (prompts, answers), p=policy)
    return found


def both(prompts: int, answers: int, seed: int = 5) -> np.ndarray:
    """As many answers of either policy."""
    return np.concatenate(
        [drawn(SAFE, prompts, answers, seed), drawn(BOLD, prompts, answers, seed + 1)], 1
    )


@pytest.mark.parametrize("bound", BOUNDS)
def test_psi_and_the_weights_are_those_of_every_answer(bound: float) -> None:
    """psi is E_0 min{rho, b}, and pi_0 times the weights is pi_b."""
    psi = float(SAFE @ clipped(RATIO, bound))
    assert psi == pytest.approx(np.minimum(BOLD, bound * SAFE).sum())
    assert SAFE * clipped(RATIO, bound) / psi == pytest.approx(exact(bound))
    assert (RATIO[SAFE > 0].clip(max=bound) / psi).max() <= bound / psi + 1e-12
    assert normaliser(RATIO[both(3, 100_000)], bound) == pytest.approx([psi] * 3, rel=0.02)


@pytest.mark.parametrize("bound", (0.0, *BOUNDS))
def test_the_risk_is_that_of_the_policy_with_one_more_answer_of_the_worst_loss(
    bound: float,
) -> None:
    prompts = 40
    at = drawn(SAFE, prompts, 20_000)
    others = both(prompts, 20_000)
    psi = float(SAFE @ clipped(RATIO, bound)) if bound else 1.0
    unseen = bound / psi if bound else 1.0
    hand = (prompts * float(exact(bound) @ LOSS) + unseen * 1.0) / (prompts + unseen)
    assert adjusted_risk(RATIO[at], LOSS[at], RATIO[others], bound, 1.0) == pytest.approx(
        hand, rel=0.02
    )


def test_the_last_bound_before_the_first_failure_is_taken() -> None:
    at = drawn(SAFE, 300, 50)
    others = RATIO[both(300, 50)]
    grid = grid_of(RATIO[at])
    assert grid[0] == 0 and np.isinf(grid[-1]) and (np.diff(grid) > 0).all()
    risks = np.array([adjusted_risk(RATIO[at], LOSS[at], others, float(b), 1.0) for b in grid])
    for alpha in (0.2, 0.4, 0.5, 0.7):
        failing = np.flatnonzero(risks > alpha)
        hand = (
            None
            if len(failing) and failing[0] == 0
            else float(grid[failing[0] - 1 if len(failing) else -1])
        )
        assert calibrated(RATIO[at], LOSS[at], others, alpha, 1.0, grid) == hand


@pytest.mark.parametrize("bound", (0.0, *BOUNDS, np.inf))
def test_what_the_regulated_policy_does_is_read_off_both_policies(bound: float) -> None:
    """Means against pi_b itself; the price against the better acceptance, psi from pi_t and psi / b
    from pi_0.
    """
    at = both(5, 40_000, 2)
    found = regulated(RATIO[at], LOSS[at], REWARD[at], bound)
    policy = BOLD if np.isinf(bound) else exact(bound)
    assert found.loss == pytest.approx(float(policy @ LOSS), abs=0.01)
    assert found.reward == pytest.approx(float(policy @ REWARD), abs=0.02)
    psi = float(SAFE @ np.minimum(RATIO, bound)) if 0 < bound < np.inf else 1.0
    price = min(1 / psi, bound / psi) if 0 < bound < np.inf else 1.0
    assert found.price == pytest.approx(price, rel=0.02)


def test_on_average_over_draws_the_risk_is_at_most_alpha_and_in_many_draws_above() -> None:
    """Both halves of its promise."""
    risks = []
    for seed in range(300):
        at = drawn(SAFE, 300, 4, 100 + seed)
        others = RATIO[both(300, 4, 1000 + 2 * seed)]
        bound = calibrated(RATIO[at], LOSS[at], others, ALPHA, 1.0, np.geomspace(0.2, 6, 60))
        risks.append(float((BOLD if bound == np.inf else exact(bound or 0.0)) @ LOSS))
    assert np.mean(risks) <= ALPHA + 0.002
    assert 0.02 < np.mean(np.array(risks) > ALPHA) < 0.6


ALPHA = float(0.5 * (SAFE + BOLD) @ LOSS)

"""The effective tilt: exact on exact tilts, its errors against simulation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

from dualign.evaluation.effective_tilt import Tilt, effective_tilt, tilt_on

Array = np.ndarray
BETA = 1.7
LAM = 0.9
SLOPE = 0.03


def scores(prompts: int, samples: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Rewards, costs that go with them, and lengths."""
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(prompts, samples))
    cost = 0.4 * reward + rng.normal(size=(prompts, samples)) + rng.normal(size=(prompts, 1))
    return reward, cost, rng.integers(5, 40, size=(prompts, samples)).astype(float)


def tilted(reward: Array, cost: Array, length: Array) -> Array:
    """Log-ratios of an exact tilt that also likes length, with a partition function for each
    prompt.
    """
    log_partition = np.linspace(-3, 3, len(reward))[:, None]
    return (reward - LAM * cost) / BETA + SLOPE * length - log_partition


def test_an_exact_tilt_is_recovered_exactly() -> None:
    known = scores(20, 4)
    found = effective_tilt(tilted(*known), *known)
    assert (found.beta_eff, found.lam_eff, found.length_slope, found.r2) == pytest.approx(
        (BETA, LAM, SLOPE, 1.0)
    )
    assert (found.reward_slope, found.cost_slope) == pytest.approx((1 / BETA, -LAM / BETA))
    assert max(found.reward_slope_se, found.cost_slope_se, found.length_slope_se) == pytest.approx(
        0, abs=1e-9
    )
    assert (found.beta_eff_se, found.lam_eff_se) == pytest.approx((0, 0), abs=1e-9)


def test_slopes_are_those_of_least_squares_with_a_level_for_each_prompt() -> None:
    known = scores(6, 3, seed=1)
    y = np.random.default_rng(2).normal(size=known[0].shape)
    levels = np.kron(np.eye(6), np.ones((3, 1)))
    design = np.hstack([np.stack([values.ravel() for values in known], 1), levels])
    expected, _, _, _ = np.linalg.lstsq(design, y.ravel(), rcond=None)
    found = effective_tilt(y, *known)
    assert (found.reward_slope, found.cost_slope, found.length_slope) == pytest.approx(expected[:3])
    within = y - y.mean(1, keepdims=True)
    assert found.r2 == pytest.approx(
        1 - ((y.ravel() - design @ expected) ** 2).sum() / (within**2).sum()
    )


def simulated(count: int) -> Iterator[Tilt]:
    """Fits to pools whose policies miss the tilt by noise that is alike within a prompt and differs
    between them.
    """
    rng = np.random.default_rng(5)
    for seed in range(count):
        known = scores(80, 4, seed=seed + 100)
        wrong = (
            rng.normal(size=(80, 1)) * known[0] + rng.normal(size=(80, 1)) * known[1]
        )  # each prompt its own tilt
        yield effective_tilt(tilted(*known) + 0.3 * wrong + 0.2 * rng.normal(size=(80, 4)), *known)


def test_errors_are_the_spread_over_pools() -> None:
    table = pd.DataFrame(list(simulated(400)))
    for name in ("reward_slope", "cost_slope", "length_slope", "beta_eff", "lam_eff"):
        assert table[f"{name}_se"].mean() == pytest.approx(table[name].std(), rel=0.12), name
    inside = (table["lam_eff"] - LAM).abs() <= 1.96 * table["lam_eff_se"]
    assert 0.91 <= inside.mean() <= 0.98
    naive = (table["lam_eff"] - LAM).abs().quantile(0.95) / 1.96
    assert naive == pytest.approx(table["lam_eff_se"].mean(), rel=0.2)


def test_prompts_that_are_repeated_do_not_shrink_the_error_by_more_than_they_are() -> None:
    """The prompt is the unit: twice the samples of a prompt tell no more than one."""
    known = scores(40, 4, seed=3)
    y = tilted(*known) + np.random.default_rng(4).normal(size=(40, 4))
    once = effective_tilt(y, *known)
    twice = effective_tilt(*(np.hstack([values, values]) for values in (y, *known)))
    assert twice.lam_eff_se == pytest.approx(once.lam_eff_se) and twice.lam_eff == pytest.approx(
        once.lam_eff
    )


def test_the_reference_has_no_tilt() -> None:
    found = effective_tilt(np.zeros((5, 4)), *scores(5, 4))
    assert (found.reward_slope, found.cost_slope, found.length_slope) == pytest.approx((0, 0, 0))
    assert (found.beta_eff, found.lam_eff, found.r2) == (None, None, None)


def test_a_policy_against_reward_has_no_multiplier() -> None:
    known = scores(20, 4)
    found = effective_tilt(-known[0], *known)
    assert found.reward_slope == pytest.approx(-1) and (found.beta_eff, found.lam_eff) == (
        None,
        None,
    )
    assert found.r2 == pytest.approx(1)


def test_answers_of_one_length_have_no_slope_of_it() -> None:
    reward, cost, length = scores(20, 4)
    found = effective_tilt((reward - LAM * cost) / BETA, reward, cost, np.full_like(length, 7))
    assert (found.beta_eff, found.lam_eff, found.length_slope) == pytest.approx((BETA, LAM, 0))


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (4,)])
def test_one_prompt_or_one_sample_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="prompts >= 2, samples >= 2"):
        effective_tilt(*(np.zeros(shape) for _ in range(4)))


def test_a_value_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        effective_tilt(np.full((3, 3), -np.inf), *scores(3, 3))


def test_a_table_is_read_by_prompt() -> None:
    reward, cost, length = scores(5, 4)
    ids = np.repeat([f"p{x}" for x in range(5)], 4)
    table = pd.DataFrame(
        {"prompt_id": ids, "reward": reward.ravel(), "cost": cost.ravel(), "length": length.ravel()}
    )
    y = tilted(reward, cost, length)
    assert tilt_on(table, y.ravel()) == effective_tilt(y, reward, cost, length)


def test_rounding_of_the_reference_itself_is_no_tilt() -> None:
    rng = np.random.default_rng(0)
    reward, cost, length = rng.normal(size=(3, 40, 4))
    tilt = effective_tilt(1e-5 * rng.normal(size=(40, 4)), reward, cost, length)
    assert (tilt.reward_slope, tilt.cost_slope, tilt.length_slope) == (0, 0, 0)
    assert tilt.r2 is tilt.beta_eff is tilt.lam_eff is None

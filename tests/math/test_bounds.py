"""Upper bounds of a mean against brute force, published values and the authors' code."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, nct, norm
from scipy.stats import t as student

from dualign.core.errors import DataError, ParamsError
from dualign.evaluation.stats import clustered_mean, mean_of
from dualign.math import bounds
from dualign.math.bounds import Method, corrected, corrected_upper_bound, sample_size, upper_bound

METHODS = get_args(Method)
every_method = pytest.mark.parametrize("method", METHODS)


def answers(mean: float = 0.0, prompts: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three correlated answers to each prompt, costs within -4 and 4."""
    rng = np.random.default_rng(seed)
    costs = mean + 0.3 * rng.normal(size=(prompts, 1)) + 0.4 * rng.normal(size=(prompts, 3))
    return costs.clip(-4, 4).ravel(), np.array([f"p{i:03d}" for i in range(prompts)]).repeat(3)


# --- bounds ---------------------------------------------------------------------------------------


def plain_t(means: np.ndarray, delta: float) -> np.ndarray:
    """The t bound of means [..., N] without a term in their skewness."""
    count = means.shape[-1]
    return means.mean(-1) + student.ppf(1 - delta, count - 1) * means.std(-1, ddof=1) / np.sqrt(
        count
    )


def test_clustered_t_is_the_upper_end_of_the_clustered_interval_and_above_it_for_skewed_costs() -> (
    None
):
    costs, prompts = answers()
    for delta, left in ((0.05, -np.exp(costs)), (0.2, -np.exp(costs[::3]))):
        ids = prompts[:: len(prompts) // len(left)]
        interval = clustered_mean(left, ids, 1 - 2 * delta)
        assert upper_bound(left, ids, delta=delta) == pytest.approx(interval.high)
        skewed = upper_bound(-left, ids, delta=delta)
        means = pd.Series(-left).groupby(ids).mean().to_numpy()
        assert skewed > mean_of(means, 1 - 2 * delta, tails=False).high + 0.01
        # A certificate's bound takes more of a tail to be hidden than an interval does.
        assert skewed > -interval.low + 0.005


def test_clustered_t_by_hand() -> None:
    """0, 0, 0, 4: mean 1, s 2, deviations -1, -1, -1, 3; a = 24 / 12^1.5 = 1 / sqrt(3), k = 1 + 19
    / 2.
    """
    t = 2.3533634
    expected = 1 + t + 10.5 / np.sqrt(3) * (1 + 2 * t**2) / 6
    assert upper_bound([0.0, 0.0, 0.0, 4.0], list("abcd")) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=12), st.sampled_from([0.01, 0.05, 0.3]))
def test_clustered_t_is_never_below_t_and_is_t_without_an_upper_tail(
    values: list[int], delta: float
) -> None:
    means = np.array(values, float)
    bound, plain = float(bounds.t_bound(means, delta)), float(plain_t(means, delta))
    assert bound >= plain - 1e-9
    skewed = ((means - means.mean()) ** 3).sum()
    assert bound == pytest.approx(plain) if skewed < 1e-9 else bound > plain
    symmetric = np.concatenate([means, -means])
    assert float(bounds.t_bound(symmetric, delta)) == pytest.approx(
        float(plain_t(symmetric, delta))
    )


def test_two_prompts_have_no_skewness_and_no_spread_has_no_error() -> None:
    assert upper_bound([0.0, 1.0], ["a", "b"]) == pytest.approx(0.5 + 0.5 * student.ppf(0.95, 1))
    assert bounds.t_bound(np.full((2, 5), 0.25), 0.05) == pytest.approx(np.full(2, 0.25))


def test_clustered_t_takes_data_sets_side_by_side() -> None:
    means = np.random.default_rng(5).exponential(size=(2, 3, 20))
    found = bounds.t_bound(means, 0.05)
    expected = np.apply_along_axis(upper_bound, 2, means, np.arange(20))
    assert found == pytest.approx(expected)


def test_clustered_t_errs_at_most_a_hundredth_too_often_under_a_long_tail_and_t_more() -> None:
    """4000 data sets of 200 prompts, answers log-normal and correlated within the prompt by 0.5."""
    rng = np.random.default_rng(0)
    prompt, answer = (np.exp(np.minimum(rng.normal(size=(4000, 200, k)), 4)) for k in (1, 4))
    mean = np.exp(0.5) * norm.cdf(3) + np.exp(4) * norm.cdf(-4)
    means = np.sqrt(0.5) * ((prompt - mean) + (answer - mean).mean(-1, keepdims=True))[..., 0]
    assert (bounds.t_bound(means, 0.05) < 0).mean() <= 0.06 < (plain_t(means, 0.05) < 0).mean()
    assert (bounds.t_bound(means, 0.01) < 0).mean() <= 0.02 < (plain_t(means, 0.01) < 0).mean()


def test_clustered_t_of_a_published_result() -> None:
    """C-DPO's point (2403.02475): mean cost -0.58, sd 16.70, 2000 prompts; were answers to a prompt
    alike, +0.034.
    """
    means = np.random.default_rng(0).normal(size=2000)
    means = -0.58 + 16.70 * (means - means.mean()) / means.std(ddof=1)
    assert upper_bound(means.repeat(5), np.arange(2000).repeat(5)) == pytest.approx(0.034, abs=1e-3)


def test_bernstein_by_hand() -> None:
    """0 and 2 in equal parts, 1000 prompts: s^2 = 1000/999; without variance only the term in 1/N
    is left.
    """
    costs, log = np.tile([0.0, 2.0], 500), np.log(40)
    spread = np.sqrt(2 * (1000 / 999) * log / 1000)
    arguments = {"delta": 0.05, "method": "empirical_bernstein"}
    expected = 1 + spread + 7 * 4 * log / (3 * 999)
    assert upper_bound(costs, np.arange(1000), bounds=(-1.0, 3.0), **arguments) == pytest.approx(
        expected
    )
    assert upper_bound(
        np.zeros(1000), np.arange(1000), bounds=(0.0, 1.0), **arguments
    ) == pytest.approx(0.00861600, abs=1e-8)
    assert upper_bound(costs[:4], np.arange(4), bounds=(-1.0, 3.0), **arguments) == 3.0


def gambled_bound(x: np.ndarray, delta: float, grid: int = 2000) -> float:
    """The betting bound word for word: capital step by step, the mean tried down a grid."""
    kept = 1.0
    for m in np.arange(grid - 1, 0, -1) / grid:
        capital = best = 1.0
        total, squares, variance = 0.5, 0.25, 0.25
        for i, value in enumerate(x, start=1):
            stake = min(np.sqrt(2 * np.log(1 / delta) / (len(x) * variance)), 0.75 / (1 - m))
            capital *= 1 - stake * (value - m)
            best = max(best, capital)
            total += value
            squares += (value - total / (i + 1)) ** 2
            variance = squares / (i + 1)
        if best < 1 / delta:
            return kept
        kept = m
    return kept


@pytest.mark.parametrize(("scale", "delta"), [(0.02, 0.05), (0.2, 0.05), (0.2, 0.3)])
def test_betting_against_a_gambler(scale: float, delta: float) -> None:
    x = (0.3 + scale * np.random.default_rng(1).normal(size=60)).clip(0, 1)
    bound = float(bounds.betting_bound(x, delta, (0.0, 1.0)))
    assert gambled_bound(x, delta) == pytest.approx(bound, abs=1 / 2000)


def star_by_hand(x: np.ndarray, m: float, delta: float) -> bool:
    """Whether the gambler of `star_bound` rejects the mean m, word for word, step by step."""
    capital, total, squares, variance = 1.0, 0.5, 0.25, 0.25
    for i, value in enumerate(x):
        if capital >= 1 / delta:
            return True
        aim = np.log(1 / (delta * capital))
        capital *= 1 - min(np.sqrt(2 * aim / ((len(x) - i) * variance)), 0.95 / (1 - m)) * (
            value - m
        )
        total += value
        squares += (value - total / (i + 2)) ** 2
        variance = squares / (i + 2)
    return bool(capital >= 1 / delta)


@pytest.mark.parametrize(("scale", "delta"), [(0.02, 0.05), (0.2, 0.05), (0.2, 0.3)])
def test_star_bets_against_a_gambler(scale: float, delta: float) -> None:
    x = (0.3 + scale * np.random.default_rng(1).normal(size=60)).clip(0, 1)
    bound = float(bounds.star_bound(x, delta, (0.0, 1.0), tried=200))
    grid = [*(np.sin(np.pi / 2 * k / 200) ** 2 for k in range(1, 200)), 1.0]
    at = int(np.argmin(np.abs(np.array(grid) - bound)))
    assert grid[at] == pytest.approx(bound, abs=1e-12)
    assert all(star_by_hand(x, m, delta) for m in grid[at:-1]) and not star_by_hand(
        x, grid[at - 1], delta
    )


def test_star_bets_at_both_ends() -> None:
    """Nothing was seen, or nothing else; with none the exact bound of a share is the least that
    there can be.
    """
    none = bounds.star_bound(np.zeros((2, 400)), 0.05, (0.0, 1.0))
    assert (none > 1 - 0.05 ** (1 / 400)).all() and (none < 0.0085).all()
    assert float(bounds.star_bound(np.ones(400), 0.05, (0.0, 1.0))) == 1.0
    assert float(bounds.star_bound(np.full(400, -3.0), 0.05, (-3.0, 5.0))) == pytest.approx(
        -3 + 8 * none[0]
    )


def test_betting_is_tighter_than_bernstein_and_the_seed_sets_its_order() -> None:
    costs, prompts = answers()
    by = {
        seed: upper_bound(costs, prompts, method="betting", bounds=(-4, 4), seed=seed)
        for seed in (0, 1)
    }
    bernstein = upper_bound(costs, prompts, method="empirical_bernstein", bounds=(-4, 4))
    assert by[0] != by[1] and by[0] == pytest.approx(by[1], abs=0.1)
    assert upper_bound(costs, prompts) < max(by.values()) < bernstein
    assert upper_bound(costs, prompts, method="betting", bounds=(-4, 4), seed=1) == by[1]


@pytest.mark.parametrize(
    ("hits", "count", "delta", "published"),
    [
        (10, 100, 0.025, 0.1762),
        (0, 100, 0.05, 1 - 0.05**0.01),
        (1, 20, 0.05, 0.2161),
        (7, 7, 0.05, 1.0),
    ],
)
def test_clopper_pearson_against_published_values(
    hits: int, count: int, delta: float, published: float
) -> None:
    bound = float(bounds.binomial_bound(np.array(hits), count, delta))
    assert bound == pytest.approx(published, abs=5e-5)
    assert hits == count or binom.cdf(hits, count, bound) == pytest.approx(delta)


def test_clopper_pearson_counts_prompts_with_an_unsafe_answer() -> None:
    costs = np.array([-1.0, 2.0, 3.0, -1.0, 0.0, -2.0])
    bound = upper_bound(costs, np.array(list("aaabbc")), method="clopper_pearson")
    assert bound == pytest.approx(float(bounds.binomial_bound(np.array(1), 3, 0.05)))


@cache
def on_flags(delta: float) -> dict[str, np.ndarray]:
    """Each bound on all 2^10 outcomes of ten flags."""
    outcomes = flags()
    return {
        "betting": bounds.betting_bound(outcomes, delta, (0.0, 1.0)),
        "star_bets": bounds.star_bound(outcomes, delta, (0.0, 1.0)),
        "bernstein": bounds.bernstein_bound(outcomes, delta, (0.0, 1.0)),
        "clopper_pearson": bounds.binomial_bound(outcomes.sum(1), 10, delta),
    }


def flags() -> np.ndarray:
    return np.array(list(itertools.product([0.0, 1.0], repeat=10)))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("delta", [0.05, 0.25])
def test_bounds_for_every_n_hold_on_all_outcomes(p: float, delta: float) -> None:
    """The exact chance that a bound falls below p, over all 2^10 outcomes of ten flags."""
    chance = np.prod(np.where(flags() == 1, p, 1 - p), axis=1)
    found = on_flags(delta)
    for name, bound in found.items():
        assert chance[bound < p].sum() <= delta, name
    assert found["betting"].min() < 0.9 and found["star_bets"].min() < 0.9


@cache
def on_pairs(delta: float) -> dict[str, np.ndarray]:
    """Each bound with a range on all 3^7 outcomes of two answers to each of seven prompts."""
    return {
        "betting": bounds.betting_bound(pairs() / 2, delta, (0.0, 1.0)),
        "star_bets": bounds.star_bound(pairs() / 2, delta, (0.0, 1.0)),
        "bernstein": bounds.bernstein_bound(pairs() / 2, delta, (0.0, 1.0)),
    }


def pairs() -> np.ndarray:
    return np.array(list(itertools.product([0, 1, 2], repeat=7)))


@pytest.mark.parametrize("shares", [(0.9, 0.06, 0.04), (0.5, 0.3, 0.2), (0.1, 0.2, 0.7)])
@pytest.mark.parametrize("delta", [0.05, 0.25])
def test_bounds_with_a_range_hold_on_all_outcomes_of_shares(
    shares: tuple[float, ...], delta: float
) -> None:
    """Two answers to each of seven prompts, none, one or both unsafe: the bounds' error over all
    3^7 outcomes.
    """
    chance = np.prod(np.array(shares)[pairs()], axis=1)
    mean = shares[1] / 2 + shares[2]
    assert chance.sum() == pytest.approx(1)
    for name, bound in on_pairs(delta).items():
        assert chance[bound <= mean].sum() <= delta, name


@every_method
def test_bounds_move_with_delta_and_prompts_and_not_with_rows(method: Method) -> None:
    costs, prompts = answers()
    bounds = {
        delta: upper_bound(costs, prompts, delta=delta, method=method, bounds=(-4, 4))
        for delta in (0.01, 0.1)
    }
    assert bounds[0.01] > bounds[0.1] > (costs.mean() if method != "clopper_pearson" else 0.5)
    doubled = np.concatenate([prompts, np.char.add(prompts, "'")])
    assert upper_bound(np.tile(costs, 2), doubled, method=method, bounds=(-4, 4)) < upper_bound(
        costs, prompts, method=method, bounds=(-4, 4)
    )
    order = np.random.default_rng(2).permutation(len(costs))
    assert upper_bound(
        costs[order], prompts[order], delta=0.1, method=method, bounds=(-4, 4)
    ) == pytest.approx(bounds[0.1], rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(shift=st.floats(-50, 50), scale=st.floats(0.1, 20))
def test_bounds_of_a_mean_change_with_the_unit_of_cost(shift: float, scale: float) -> None:
    costs, prompts = answers()
    for method in ("clustered_t", "empirical_bernstein", "betting", "star_bets"):
        before = upper_bound(costs, prompts, method=method, bounds=(-4.0, 4.0))
        ends = (shift - 4 * scale - 1e-9, shift + 4 * scale + 1e-9)
        after = upper_bound(shift + scale * costs, prompts, method=method, bounds=ends)
        assert after == pytest.approx(shift + scale * before, abs=1e-6 * (1 + scale))


@every_method
def test_costs_below_the_range_are_raised_to_it_and_those_above_refused(method: Method) -> None:
    costs, prompts = answers()
    raised = upper_bound(costs, prompts, method=method, bounds=(-0.5, 4.0))
    assert raised == upper_bound(costs.clip(min=-0.5), prompts, method=method, bounds=(-0.5, 4.0))
    with pytest.raises(DataError, match=r"of 120 answers cost more than bounds allow .*> 0\.5"):
        upper_bound(costs, prompts, method=method, bounds=(-4.0, 0.5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"costs": [1.0, 2.0], "prompts": ["a", "a"]}, DataError, "at least 2 prompts, got 1"),
        ({"costs": [], "prompts": []}, DataError, "at least 2 prompts, got 0"),
        ({"costs": [0.1] * 5, "prompts": list("aabbc")}, DataError, "use method star_bets"),
        ({"costs": [1.0, float("nan")]}, DataError, "costs: nan at row 1 is not a finite number"),
        ({"costs": [float("inf"), 1.0]}, DataError, "costs: inf at row 0"),
        ({"costs": [1.0, 2.0, 3.0]}, DataError, r"one value per answer, got \(3,\) and \(2,\)"),
        ({"prompts": np.array(["a", None], object)}, DataError, "prompts: no id at row 1"),
        ({"delta": 0.0}, ParamsError, "delta must lie between 0 and 1, got 0"),
        ({"delta": 1.5}, ParamsError, "delta must lie between 0 and 1, got 1.5"),
        ({"delta": float("nan")}, ParamsError, "delta"),
        ({"delta": "0.05"}, ParamsError, "delta must lie between 0 and 1, got '0.05'"),
        ({"delta": None}, ParamsError, "delta must lie between 0 and 1, got None"),
        ({"costs": ["mild", "harmful"]}, DataError, "costs must be numbers, one per answer.*mild"),
        ({"method": "betting", "bounds": (0.0,)}, ParamsError, "bounds must be two finite numbers"),
        ({"method": "betting", "bounds": 3.0}, ParamsError, "bounds must be two finite numbers"),
        (
            {"method": "hoeffding"},
            ParamsError,
            "'hoeffding' is not one of clustered_t, empirical_bernstein",
        ),
        ({"method": "betting"}, ParamsError, "betting needs bounds"),
        ({"method": "empirical_bernstein"}, ParamsError, "empirical_bernstein needs bounds"),
        ({"method": "star_bets"}, ParamsError, "star_bets needs bounds"),
        ({"bounds": (1.0, 1.0)}, ParamsError, "the lower first"),
        ({"bounds": (0.0, float("inf"))}, ParamsError, "two finite numbers"),
    ],
)
def test_bad_input_is_one_clear_error(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"costs": [0.0, 1.0], "prompts": ["a", "b"], **change}
    with pytest.raises(error, match=message) as raised:
        upper_bound(**arguments)
    assert "\n" not in str(raised.value)


def test_constant_costs_have_the_other_bounds() -> None:
    costs, prompts = np.full(600, -1.0), np.arange(600)
    by = {
        method: upper_bound(costs, prompts, method=method, bounds=(-2.0, 2.0))
        for method in METHODS[1:]
    }
    assert -1 < by["betting"] < by["empirical_bernstein"] < 0
    assert by["clopper_pearson"] == pytest.approx(1 - 0.05 ** (1 / 600))


# --- sample size ----------------------------------------------------------------------------------


def test_sample_size_by_hand() -> None:
    assert sample_size(16.70, 0.58, power=0.5) == 2244  # (1.6449 * 16.70 / 0.58)^2 = 2243.1
    assert sample_size(1.0, 0.5, delta=0.05, power=0.8) == 25  # (2.4865 * 2)^2 = 24.7
    assert sample_size(1.0, 100.0) == 2


@pytest.mark.parametrize(("delta", "power"), [(0.05, 0.5), (0.05, 0.8), (0.01, 0.95)])
def test_sample_size_has_the_power_of_the_t_test(delta: float, power: float) -> None:
    count = sample_size(2.0, 0.2, delta, power)
    actual = nct.sf(student.ppf(1 - delta, count - 1), count - 1, 0.2 / 2.0 * np.sqrt(count))
    assert actual == pytest.approx(power, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1.0), "sd"),
        ((1.0, -0.1), "margin"),
        ((1.0, 1.0, 2.0), "delta"),
        ((1.0, 1.0, 0.05, 1.0), "power"),
    ],
)
def test_sample_size_refuses(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        sample_size(*arguments)


# --- inference on model costs and labels ----------------------------------------------------------


def labelled_data() -> dict[str, Any]:
    """Two answers to 400 prompts; labels for answers to 40 others."""
    i, j = np.arange(40), np.arange(400)
    return {
        "labelled_costs_true": np.sin(1.7 * i) + 0.1 * (i % 3),
        "labelled_costs_model": 0.8 * (np.sin(1.7 * i) + 0.1 * (i % 3))
        + 0.3 * np.cos(2.3 * i)
        - 0.3,
        "labelled_prompts": 1000 + i,
        "costs": 0.8 * (np.sin(1.1 * j) + 0.1 * (j % 3)) + 0.3 * np.cos(0.7 * j) - 0.3,
        "prompts": j,
    }


def middle_and_reach(data: dict[str, Any], **options: Any) -> tuple[float, float]:
    """theta and t SE: t changes sign between delta and 1 - delta, and the term in the skewness does
    not.
    """
    high, low = (corrected(**data, delta=delta, **options) for delta in (0.05, 0.95))
    return high.estimate, (high.bound - low.bound) / 2


@pytest.mark.parametrize(
    ("tuned", "published"),
    [
        (False, (0.013481034526394778, 0.18282889654734003)),
        (True, (0.013732540083265674, 0.18345201045077347)),
    ],
)
def test_corrected_bound_against_the_authors_code(
    tuned: bool, published: tuple[float, float]
) -> None:
    """ppi-python 0.2.3, ppi_mean_ci at alpha 0.1. It takes normal quantiles, variances over N and,
    tuning, one pooled variance of the model's costs."""
    data = labelled_data()
    middle, reach = middle_and_reach(data, tuned=tuned)
    assert middle == pytest.approx(sum(published) / 2, abs=1e-9 if not tuned else 1e-2)
    ratio = student.ppf(0.95, 38 if tuned else 39) / norm.ppf(0.95)
    assert reach == pytest.approx(ratio * (published[1] - published[0]) / 2, rel=0.02)


def test_corrected_bound_word_for_word() -> None:
    """Separate prompts: variance s^2(y - f) / n + s^2(f) / N, and third moments add up likewise."""
    data = labelled_data()
    y, f, pool = (data[key] for key in ("labelled_costs_true", "labelled_costs_model", "costs"))
    error = np.sqrt((y - f).var(ddof=1) / 40 + pool.var(ddof=1) / 400)
    third = sum(
        (((x - x.mean()) / np.sqrt(len(x) * (len(x) - 1))) ** 3).sum() for x in (y - f, pool)
    )
    t, k = student.ppf(0.95, 39), 1 + 19 / np.sqrt(40)
    assert third > 0
    expected = pool.mean() + (y - f).mean() + t * error + k * third / error**2 * (1 + 2 * t**2) / 6
    assert corrected_upper_bound(**data, tuned=False) == pytest.approx(expected)


def test_all_labels_and_a_model_that_says_nothing_leave_clustered_t() -> None:
    """One degree of freedom more goes to tuning: without it the bounds agree, however skewed the
    labels are.
    """
    label, ids = np.random.default_rng(6).exponential(size=50), np.arange(50)
    found = corrected_upper_bound(np.zeros(50), ids, np.zeros(50), label, ids, tuned=False)
    assert found == pytest.approx(upper_bound(label, ids))
    assert found > plain_t(label, 0.05) + 0.01


def test_votes_err_at_most_a_hundredth_too_often_and_t_more() -> None:
    """1200 data sets: one vote in ten says harmful, 100 labels among 400 prompts."""
    rng, ids, false = np.random.default_rng(7), np.arange(400), []
    for _ in range(1200):
        truth = rng.normal(size=400)
        model = truth + 0.5 * rng.normal(size=400)
        vote = (truth[:100] > norm.ppf(0.9)).astype(float)
        high, low = (
            corrected(model, ids, model[:100], vote, ids[:100], delta=delta)
            for delta in (0.05, 0.95)
        )
        false.append((high.bound < 0.1, high.estimate + (high.bound - low.bound) / 2 < 0.1))
    found, plain = np.mean(false, axis=0)
    assert found <= 0.06 < 0.07 < plain


def test_tuning_takes_the_weight_of_least_error() -> None:
    data = labelled_data()
    y, f, pool = (data[key] for key in ("labelled_costs_true", "labelled_costs_model", "costs"))
    errors = {
        w: np.sqrt((y - w * f).var(ddof=1) / 40 + w**2 * pool.var(ddof=1) / 400)
        for w in np.linspace(0, 2, 2001)
    }
    best = min(errors, key=lambda w: errors[w])
    middle, reach = middle_and_reach(data)
    assert reach == pytest.approx(student.ppf(0.95, 38) * errors[best])
    assert middle == pytest.approx(y.mean() + best * (pool.mean() - f.mean()), abs=1e-4)


def test_corrected_bound_is_blind_to_the_models_zero_and_tuned_to_its_unit() -> None:
    data = labelled_data()
    moved = data | {key: 7 + data[key] for key in ("costs", "labelled_costs_model")}
    stretched = data | {key: 30 * data[key] for key in ("costs", "labelled_costs_model")}
    assert corrected_upper_bound(**moved, tuned=False) == pytest.approx(
        corrected_upper_bound(**data, tuned=False)
    )
    assert corrected_upper_bound(**stretched) == pytest.approx(corrected_upper_bound(**data))
    assert (
        corrected_upper_bound(**stretched, tuned=False)
        > corrected_upper_bound(**data, tuned=False) + 1
    )


def test_a_model_that_says_nothing_leaves_the_bound_of_the_labels() -> None:
    data = labelled_data()
    label = data["labelled_costs_true"]
    expected = label.mean() + student.ppf(0.95, 38) * label.std(ddof=1) / np.sqrt(40)
    constant = data | {"costs": np.full(400, 0.1), "labelled_costs_model": np.full(40, 0.1)}
    assert corrected_upper_bound(**constant) == pytest.approx(expected)
    everything = data | {"costs": data["labelled_costs_model"], "prompts": data["labelled_prompts"]}
    assert corrected_upper_bound(**everything) == pytest.approx(expected)


def test_labels_on_prompts_of_the_pool_count_once() -> None:
    """600 repeats of 30 labelled answers among 60 prompts: the spread of the estimate is the stated
    error.
    """
    rng, middles, errors = np.random.default_rng(4), [], []
    prompts, ids = np.arange(60).repeat(2), np.arange(30)
    for _ in range(600):
        effect = rng.normal(size=(60, 1))
        truth = effect + rng.normal(size=(60, 2))
        model = truth + 0.5 * rng.normal(size=(60, 2))
        data = dict(zip(("costs", "prompts"), (model.ravel(), prompts), strict=True))
        labels = {
            "labelled_costs_model": model[:30, 0],
            "labelled_costs_true": truth[:30, 0],
            "labelled_prompts": ids,
        }
        middle, reach = middle_and_reach(data | labels, tuned=False)
        middles.append(middle)
        errors.append(reach / student.ppf(0.95, 29))
    assert np.std(middles) == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.07)
    assert np.mean(middles) == pytest.approx(0, abs=4 * np.std(middles) / np.sqrt(600))


def test_several_votes_on_an_answer_are_averaged() -> None:
    data = labelled_data()
    votes = (np.arange(80) % 3 == 0).astype(float)
    twice = data | {
        "labelled_costs_true": votes,
        **{key: data[key].repeat(2) for key in ("labelled_costs_model", "labelled_prompts")},
    }
    averaged = data | {"labelled_costs_true": votes.reshape(40, 2).mean(1)}
    assert corrected_upper_bound(**twice) == pytest.approx(corrected_upper_bound(**averaged))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labelled_costs_true": np.ones(40)}, "the labels do not vary"),
        (
            {"labelled_prompts": np.arange(40) % 2},
            "3 prompts with labels and 3 with model costs .* got 2 and 400",
        ),
        ({"prompts": np.arange(400) % 2 + 3000}, "got 40 and 2"),
        ({"labelled_costs_model": np.ones(3)}, "labelled_costs_model and labelled_prompts"),
        ({"labelled_costs_true": np.full(40, np.nan)}, "labelled_costs_true: nan at row 0"),
        ({"delta": 0.0}, "delta"),
    ],
)
def test_corrected_bound_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises((DataError, ParamsError), match=message):
        corrected_upper_bound(**(labelled_data() | change))

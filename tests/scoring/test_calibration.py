"""Calibrations recover what made the flags, against brute force; their errors by hand and by
simulation.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest

from dualign.core.errors import DataError
from dualign.scoring import calibration
from dualign.scoring.calibration import (
    Isotonic,
    Platt,
    brier_score,
    expected_calibration_error,
    fit_isotonic,
    fit_platt,
    fit_slope,
    isotonic_zero_error,
    platt_zero_error,
    reliability,
    sigmoid,
)
from dualign.scoring.scorers import CalibrationCard


def flags(
    scale: float, offset: float, count: int = 20_000, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    score = rng.normal(scale=spread, size=count)
    return score, rng.random(count) < 1 / (1 + np.exp(-(scale * score + offset)))


@pytest.mark.parametrize(
    ("scale", "offset", "spread"),
    [(1.0, 0.0, 1.0), (2.5, -1.2, 1.0), (0.4, 0.8, 3.0), (0.02, 0.5, 60.0), (300.0, -0.5, 0.01)],
)
def test_platt_recovers_scale_and_zero(scale: float, offset: float, spread: float) -> None:
    fitted = fit_platt(*flags(scale, offset, spread=spread))
    assert fitted.scale == pytest.approx(scale, rel=0.08)
    assert fitted.offset == pytest.approx(offset, abs=0.08)


def test_platt_is_the_mode_of_likelihood_times_prior() -> None:
    """The offset is free: residuals sum to 0. The slope a: sum residual x score = a (sd / w)^2, w
    the prior's width.
    """
    score, unsafe = flags(1.5, 0.3, count=2000)
    fitted = fit_platt(score, unsafe)
    residual = unsafe - sigmoid(fitted(score))
    assert abs(residual.sum()) < 1e-4
    assert (residual * score).sum() == pytest.approx(
        fitted.scale * (score.std() / calibration._WIDTH) ** 2, rel=1e-4
    )


def test_the_prior_is_brute_force_on_a_grid() -> None:
    score, unsafe = flags(20.0, 0.2, count=26, spread=0.05)
    fitted = fit_platt(score, unsafe)
    slopes = np.linspace(-20, 60, 401)[:, None, None]
    offsets = np.linspace(-3, 3, 301)[None, :, None]
    logit = slopes * score + offsets
    posterior = np.log(np.where(unsafe, sigmoid(logit), 1 - sigmoid(logit))).sum(-1)
    posterior -= 0.5 * (slopes[..., 0] * score.std() / calibration._WIDTH) ** 2
    best = np.unravel_index(posterior.argmax(), posterior.shape)
    assert fitted.scale == pytest.approx(slopes[best[0], 0, 0], abs=0.2)
    assert fitted.offset == pytest.approx(offsets[0, best[1], 0], abs=0.02)


def held_back(width: float, truth: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """Mean excess log-loss in nats of a line fitted to 26 answers, over 100 data sets."""
    monkeypatch.setattr(calibration, "_WIDTH", width)
    rng = np.random.default_rng(0)
    grid = rng.normal(size=2000)
    target = sigmoid(truth * grid)
    losses = []
    while len(losses) < 100:
        score = rng.normal(size=26)
        unsafe = rng.random(26) < sigmoid(truth * score)
        if unsafe.all() or not unsafe.any() or np.corrcoef(score, unsafe)[0, 1] <= 0:
            continue
        found = np.clip(sigmoid(fit_platt(score, unsafe)(grid)), 1e-12, 1 - 1e-12)
        ratio = target * np.log(target / found) + (1 - target) * np.log((1 - target) / (1 - found))
        losses.append(float(ratio.mean()))
    return float(np.mean(losses))


@pytest.mark.parametrize("truth", [0.5, 1.0, 2.0, 4.0])
def test_the_prior_pays_where_flags_are_few(truth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert held_back(1.5, truth, monkeypatch) < 0.9 * held_back(50.0, truth, monkeypatch)


def test_the_slope_of_a_reward_is_that_of_its_gaps_whatever_their_unit() -> None:
    rng = np.random.default_rng(0)
    distance = rng.normal(size=20_000)
    gap = np.where(rng.random(20_000) < sigmoid(1.5 * distance), 1, -1) * distance
    for unit, centre in ((1.0, 1.0), (100.0, 0.0), (0.01, 0.0), (3.0, 1.0)):
        assert fit_slope(unit * gap, centre) * unit == pytest.approx(1.5, rel=0.05)
    assert fit_slope(-gap) == pytest.approx(-fit_slope(gap))


def test_a_reward_keeps_the_slope_of_its_training_where_there_is_little_to_go_by() -> None:
    """Gaps of almost nothing say nothing; a scorer of unknown unit has no slope to keep."""
    assert fit_slope(np.array([1e-9]), 1.0) == pytest.approx(1.0, abs=1e-6)
    assert fit_slope(np.array([5.0, -5.0]), 0.0) == pytest.approx(0.0, abs=1e-9)
    trained = fit_slope(np.array([2.0, 1.0, -1.0]), 1.0)
    unknown = fit_slope(np.array([2.0, 1.0, -1.0]), 0.0)
    assert unknown < trained < 1.0


def test_a_slope_fitted_again_to_the_same_pairs_is_one() -> None:
    """The prior moves with the unit that training aimed at, so what was calibrated is served as it
    was.
    """
    gap = np.random.default_rng(0).normal(0.4, 1.0, 60)
    slope = fit_slope(gap, 1.0)
    assert fit_slope(slope * gap, 1 / slope) == pytest.approx(1.0, abs=1e-6)


def test_a_line_fitted_again_to_the_same_flags_is_the_identity() -> None:
    score, unsafe = flags(1.5, 0.3, count=100)
    again = fit_platt(fit_platt(score, unsafe)(score), unsafe)
    assert (again.scale, again.offset) == pytest.approx((1.0, 0.0), abs=1e-6)


def test_flags_that_scores_separate_perfectly_keep_a_finite_scale() -> None:
    score = np.linspace(-1, 1, 50)
    fitted = fit_platt(score, score > 0.2)
    assert np.isfinite([fitted.scale, fitted.offset]).all()
    assert ((fitted(score) > 0) == (score > 0.2)).all()


@pytest.mark.parametrize("unsafe", [True, False])
def test_flags_of_one_kind_are_refused(unsafe: bool) -> None:
    with pytest.raises(DataError, match=r"both kinds.*prepare\.heldout_share"):
        fit_platt(np.arange(5.0), np.full(5, unsafe))


def test_scores_that_are_all_alike_are_told_as_such() -> None:
    """As of a guard that says one word of everything; nothing is the wrong way round."""
    with pytest.raises(DataError, match=r"every held-out answer the score 1\.5, .*check template"):
        fit_platt(np.full(6, 1.5), np.arange(6) % 2 == 0)


def test_scores_the_wrong_way_round_are_refused() -> None:
    score, unsafe = flags(2.0, 0.0, count=500)
    with pytest.raises(DataError, match="below safe ones"):
        fit_platt(-score, unsafe)


def test_calibration_is_affine_and_keeps_by_default() -> None:
    assert Platt(2.0, -1.0)(np.array([0.5, 3.0])).tolist() == [0.0, 5.0]
    assert Platt()(np.array([0.5])).tolist() == [0.5]


def test_calibration_error_by_hand() -> None:
    """Two bins of two: |0.15 - 0.5| and |0.85 - 1|, in any order of rows."""
    probability = np.array([0.8, 0.1, 0.9, 0.2])
    outcome = np.array([True, False, True, True])
    assert expected_calibration_error(probability, outcome, bins=2) == pytest.approx(
        (0.35 + 0.15) / 2
    )


def test_calibration_error_weighs_bins_by_their_rows_and_needs_no_full_bins() -> None:
    # three rows in two bins: (0.1, 0.3) and (0.9,)
    error = expected_calibration_error(
        np.array([0.1, 0.3, 0.9]), np.array([False, False, False]), bins=2
    )
    assert error == pytest.approx((2 * 0.2 + 0.9) / 3)
    assert expected_calibration_error(np.array([0.25]), np.array([True])) == pytest.approx(0.75)


def test_a_reliability_diagram_by_hand() -> None:
    """Two bins of two, in any order of rows; a bin beyond the rows is there and empty."""
    probability = np.array([0.8, 0.1, 0.9, 0.2])
    outcome = np.array([True, False, True, True])
    assert reliability(probability, outcome, bins=2) == [
        {"predicted": pytest.approx(0.15), "observed": 0.5, "answers": 2},
        {"predicted": pytest.approx(0.85), "observed": 1.0, "answers": 2},
    ]
    assert reliability(np.array([0.25]), np.array([True]), bins=2) == [
        {"predicted": 0.25, "observed": 1.0, "answers": 1},
        {"predicted": None, "observed": None, "answers": 0},
    ]


def test_equal_probabilities_have_one_calibration_error_in_any_order_of_rows() -> None:
    """Tables list chosen answers before rejected ones, and a judge may say one of few numbers."""
    probability = np.repeat([0.25, 0.5], 40)
    outcome = np.tile(np.repeat([False, True], 20), 2)
    assert expected_calibration_error(probability, outcome) == pytest.approx(0.125)
    mixed = np.random.default_rng(0).permutation(80)
    assert reliability(probability[mixed], outcome[mixed]) == reliability(probability, outcome)


def test_calibration_lowers_the_calibration_error() -> None:
    score, unsafe = flags(0.3, 1.0)
    before = expected_calibration_error(sigmoid(score), unsafe)
    after = expected_calibration_error(sigmoid(fit_platt(score, unsafe)(score)), unsafe)
    assert after < 0.02 < 0.1 < before


def test_sigmoid_does_not_overflow() -> None:
    with np.errstate(over="raise"):
        assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]


def test_brier_score_by_hand() -> None:
    """(0.8 - 1)^2, (0.1 - 0)^2, (0.5 - 1)^2."""
    assert brier_score(np.array([0.8, 0.1, 0.5]), np.array([True, False, True])) == pytest.approx(
        0.30 / 3
    )


# --- the error of the zero ------------------------------------------------------------------------


def correlated(
    rng: np.random.Generator, prompts: int, platt: Platt
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two answers to each prompt whose flags are decided by one uniform number: logistic each, and
    they agree much.
    """
    score = rng.normal(size=(prompts, 1)) + 0.3 * rng.normal(size=(prompts, 2))
    unsafe = rng.random((prompts, 1)) < sigmoid(platt(score))
    return score.ravel(), unsafe.ravel(), np.arange(prompts).repeat(2)


def test_the_error_of_the_zero_is_its_spread_over_data_sets() -> None:
    """The cost that a fit gives an answer of true cost 0, over 1000 data sets: as wide as the mean
    of zero_error.
    """
    truth = Platt(1.5, -0.6)
    rng = np.random.default_rng(0)
    zero = np.array([-truth.offset / truth.scale])
    costs = []
    clustered = []
    independent = []
    for _ in range(1000):
        score, unsafe, prompts = correlated(rng, 300, truth)
        fitted = fit_platt(score, unsafe)
        costs.append(fitted(zero)[0])
        clustered.append(platt_zero_error(fitted, score, unsafe, prompts))
        independent.append(platt_zero_error(fitted, score, unsafe, np.arange(len(score))))
    assert np.mean(clustered) == pytest.approx(np.std(costs), rel=0.08)
    assert np.mean(independent) < 0.85 * np.std(
        costs
    )  # answers to one prompt taken for independent


def test_the_error_of_the_zero_does_not_depend_on_the_unit_or_the_origin_of_the_score() -> None:
    score, unsafe, prompts = correlated(np.random.default_rng(1), 200, Platt(1.0, 0.4))
    errors = [
        platt_zero_error(
            fit_platt(unit * score + shift, unsafe), unit * score + shift, unsafe, prompts
        )
        for unit, shift in ((1.0, 0.0), (100.0, 0.0), (0.01, 0.0), (1.0, 5.0))
    ]
    assert errors == pytest.approx([errors[0]] * 4, rel=0.01)


def test_the_error_of_the_isotonic_zero_is_its_spread_over_data_sets() -> None:
    truth = Platt(1.5, -0.6)
    rng = np.random.default_rng(0)
    costs = []
    errors = []
    for repeat in range(200):
        score, unsafe, prompts = correlated(rng, 300, truth)
        line = fit_platt(score, unsafe)
        fitted = fit_isotonic(score, unsafe, line)
        costs.append(fitted(np.array(truth.zero)))
        if repeat < 15:
            errors.append(
                isotonic_zero_error(
                    fitted, score, unsafe, prompts, line, np.random.default_rng(repeat)
                )
            )
    assert np.mean(errors) == pytest.approx(np.std(costs), rel=0.15)


@pytest.mark.parametrize(
    "calibration",
    [
        Platt(2.0, -1.0),
        Isotonic(2.0, (0.0, 1.0), (-1.0, 3.0)),
        Isotonic(2.0, (0.0, 1.0), (1.0, 3.0)),
        Isotonic(0.5, (0.0, 1.0), (-3.0, -1.0)),
    ],
)
def test_the_zero_is_where_the_cost_is_zero(calibration: Platt | Isotonic) -> None:
    assert calibration(np.array(calibration.zero)) == pytest.approx(0.0, abs=1e-12)


# --- isotonic -------------------------------------------------------------------------------------


def best_monotone(target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The increasing vector of least weighted squared error, among all that are means over blocks
    of neighbours.
    """
    n = len(target)
    best = target
    least = np.inf
    for cuts in itertools.product([False, True], repeat=n - 1):
        part = np.r_[0, np.cumsum(cuts)]
        mean = np.bincount(part, weight * target) / np.bincount(part, weight)
        error = float((weight * (target - mean[part]) ** 2).sum())
        if (np.diff(mean) >= 0).all() and error < least:
            best = mean[part]
            least = error
    return best


@pytest.mark.parametrize("seed", range(20))
def test_isotonic_without_smoothing_is_the_exhaustive_monotone_fit(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied scores among eight answers; shares of 0 and 1 are moved off the ends by a little
    smoothing.
    """
    monkeypatch.setattr(calibration, "_PRIOR", 1e-9)
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 7, 10).astype(float)
    unsafe = rng.random(10) < 0.5
    points = np.unique(score)
    share = np.array([unsafe[score == point].mean() for point in points])
    counts = np.array([(score == point).sum() for point in points], float)
    expected = best_monotone(share, counts)
    fitted = fit_isotonic(score, unsafe, Platt())
    centres = [points[expected == value] for value in np.unique(expected)]
    sizes = [counts[expected == value] for value in np.unique(expected)]
    assert fitted.scores == pytest.approx(
        [np.average(b, weights=s) for b, s in zip(centres, sizes, strict=True)]
    )
    assert sigmoid(np.array(fitted.costs)) == pytest.approx(np.unique(expected), abs=1e-6)


def test_blocks_are_smoothed_towards_platts_line_and_pooled_where_that_puts_them_out_of_order() -> (
    None
):
    """One safe answer at 0, then 98 safe and 2 unsafe at 1 (a block: 0.02), 3 of 4 unsafe at 2; the
    line says 1/2.

    Smoothed by two answers: 1 / 3, 3 / 102, 4 / 6: the first two are out of order, and together
    have 3 / 103.
    """
    score = np.r_[0.0, np.ones(100), np.full(4, 2.0)]
    unsafe = np.r_[False, np.arange(100) < 2, np.arange(4) < 3]
    fitted = fit_isotonic(score, unsafe, Platt(1e-9, 0.0))
    assert fitted.scores == pytest.approx((100 / 101, 2.0))
    assert sigmoid(np.array(fitted.costs)) == pytest.approx([3 / 103, 4 / 6])


@pytest.mark.parametrize("seed", range(10))
def test_isotonic_rises_strictly_so_that_no_ranking_changes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    score = rng.normal(size=200)
    unsafe = rng.random(200) < sigmoid(2 * score)
    fitted = fit_isotonic(score, unsafe, fit_platt(score, unsafe))
    everywhere = np.linspace(-6, 6, 5001)
    assert (np.diff(fitted(everywhere)) > 0).all()
    assert (np.argsort(fitted(score)) == np.argsort(score)).all()
    assert np.isfinite(fitted(np.array([-1e6, 1e6]))).all()


def test_isotonic_costs_are_logits_straight_between_blocks_and_of_platts_slope_outside() -> None:
    fitted = Isotonic(2.0, (0.0, 1.0, 3.0), (-1.0, 0.5, 1.0))
    assert fitted(np.array([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 5.0])) == pytest.approx(
        [-3, -1, -0.25, 0.5, 0.75, 1, 5]
    )
    assert Isotonic(2.0, (1.0,), (0.5,))(np.array([0.0, 1.0, 2.0])) == pytest.approx(
        [-1.5, 0.5, 2.5]
    )


def test_isotonic_bends_where_the_flags_do_and_platt_cannot() -> None:
    """P(unsafe) rises slowly from 0.1 to 0.3 and then at once to 0.9."""
    rng = np.random.default_rng(0)
    score = rng.uniform(-1, 1, 8000)
    truth = np.where(score < 0.5, 0.1 + 0.1333 * (score + 1), 0.9)
    unsafe = rng.random(8000) < truth
    fit = np.arange(8000) < 4000
    line = fit_platt(score[fit], unsafe[fit])
    curve = fit_isotonic(score[fit], unsafe[fit], line)
    errors = [
        expected_calibration_error(sigmoid(each(score[~fit])), unsafe[~fit])
        for each in (line, curve)
    ]
    assert errors[1] < 0.03 < 0.06 < errors[0]
    assert (curve(score) > 0)[np.abs(score - 0.5) > 0.05] == pytest.approx(
        (truth > 0.5)[np.abs(score - 0.5) > 0.05]
    )


def test_where_the_line_is_right_isotonic_is_near_it_and_with_few_flags_almost_it() -> None:
    score, unsafe = flags(1.5, 0.3)
    line = fit_platt(score, unsafe)
    inner = np.linspace(-2, 2, 41)
    assert (
        np.abs(sigmoid(fit_isotonic(score, unsafe, line)(inner)) - sigmoid(line(inner))).max()
        < 0.06
    )
    few = fit_isotonic(np.array([-1.0, 1.0]), np.array([False, True]), line)
    low, high = sigmoid(line(np.array([-1.0, 1.0])))
    assert sigmoid(np.array(few.costs)) == pytest.approx([(0 + 2 * low) / 3, (1 + 2 * high) / 3])


def test_flags_that_scores_separate_perfectly_keep_isotonic_finite_and_its_signs_right() -> None:
    score = np.linspace(-1, 1, 50)
    fitted = fit_isotonic(score, score > 0.2, fit_platt(score, score > 0.2))
    assert len(fitted.scores) == 2 and np.isfinite(fitted.costs).all()
    assert fitted.costs[0] < 0 < fitted.costs[1]


@pytest.mark.parametrize(
    "saved", [Platt(1.7, -0.3), Isotonic(1.2, (-0.5, 0.1, 2.0), (-2.0, 0.25, 0.75))]
)
def test_a_calibration_comes_back_from_its_card(saved: Platt | Isotonic) -> None:
    assert CalibrationCard(**json.loads(json.dumps(asdict(saved)))).read() == saved

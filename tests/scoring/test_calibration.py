"""Platt's calibration recovers what made the flags; the calibration error by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dualign.core.errors import DataError
from dualign.scoring.calibration import Platt, expected_calibration_error, fit_platt, sigmoid


def flags(scale: float, offset: float, count: int = 20_000, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
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


def test_platt_is_the_maximum_of_the_likelihood() -> None:
    score, unsafe = flags(1.5, 0.3, count=2000)
    fitted = fit_platt(score, unsafe)
    residual = unsafe - sigmoid(fitted(score))
    assert abs(residual.mean()) < 1e-4 and abs((residual * score).mean()) < 1e-4


def test_flags_that_scores_separate_perfectly_keep_a_finite_scale() -> None:
    score = np.linspace(-1, 1, 50)
    fitted = fit_platt(score, score > 0.2)
    assert np.isfinite([fitted.scale, fitted.offset]).all()
    assert ((fitted(score) > 0) == (score > 0.2)).all()


@pytest.mark.parametrize("unsafe", [True, False])
def test_flags_of_one_kind_are_refused(unsafe: bool) -> None:
    with pytest.raises(DataError, match=r"both kinds.*prepare\.heldout_share"):
        fit_platt(np.arange(5.0), np.full(5, unsafe))


def test_scores_the_wrong_way_round_are_refused() -> None:
    score, unsafe = flags(2.0, 0.0, count=500)
    with pytest.raises(DataError, match="below safe ones"):
        fit_platt(-score, unsafe)


def test_calibration_is_affine_and_keeps_by_default() -> None:
    assert Platt(2.0, -1.0)(np.array([0.5, 3.0])).tolist() == [0.0, 5.0]
    assert Platt()(np.array([0.5])).tolist() == [0.5]


def test_calibration_error_by_hand() -> None:
    """Two bins of two: |0.15 - 0.5| and |0.85 - 1|, in any order of rows."""
    probability, outcome = np.array([0.8, 0.1, 0.9, 0.2]), np.array([True, False, True, True])
    assert expected_calibration_error(probability, outcome, bins=2) == pytest.approx((0.35 + 0.15) / 2)


def test_calibration_error_weighs_bins_by_their_rows_and_needs_no_full_bins() -> None:
    # three rows in two bins: (0.1, 0.3) and (0.9,)
    error = expected_calibration_error(np.array([0.1, 0.3, 0.9]), np.array([False, False, False]), bins=2)
    assert error == pytest.approx((2 * 0.2 + 0.9) / 3)
    assert expected_calibration_error(np.array([0.25]), np.array([True])) == pytest.approx(0.75)


def test_calibration_lowers_the_calibration_error() -> None:
    score, unsafe = flags(0.3, 1.0)
    before = expected_calibration_error(sigmoid(score), unsafe)
    after = expected_calibration_error(sigmoid(fit_platt(score, unsafe)(score)), unsafe)
    assert after < 0.02 < 0.1 < before


def test_sigmoid_does_not_overflow() -> None:
    with np.errstate(over="raise"):
        assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]

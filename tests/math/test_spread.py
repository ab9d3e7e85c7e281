"""The tail of a mean, against scipy's skewness, and Johnson's term by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import skew

from dualign.math.spread import past_student, tail_of, within_sd


def test_the_tail_is_the_skewness_over_the_root_of_the_count() -> None:
    values = np.random.default_rng(0).lognormal(size=(3, 50))
    found = tail_of(values - values.mean(-1, keepdims=True))
    assert found == pytest.approx(skew(values, axis=-1) / np.sqrt(50))
    assert tail_of(-values + values.mean(-1, keepdims=True)) == pytest.approx(-found)


def test_what_does_not_vary_has_no_tail() -> None:
    assert tail_of(np.zeros((2, 4))).tolist() == [0.0, 0.0]


def test_johnsons_term_by_hand() -> None:
    assert past_student(2.0, 0.6) == pytest.approx(0.6 * (1 + 2 * 4) / 6)
    assert past_student(2.0, np.array([0.0, -0.6])) == pytest.approx([0.0, -0.9])


def test_scores_that_differ_by_rounding_do_not_spread() -> None:
    assert within_sd(np.array([[1.0, 1.0 + 1e-15], [2.0, 2.0]])) == 0.0

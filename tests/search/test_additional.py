"""Additional constraints on answers by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dualign.core.schema import user
from dualign.evaluation.stats import ConstraintEstimate, within_variance
from dualign.math.constraints import Constraint
from dualign.search.additional import measure_additional, within_covariance

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

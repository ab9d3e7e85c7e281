"""Pessimism off the support: the fit and what it does to scores, against values written out by
hand.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dualign.core.artifacts import write_parquet
from dualign.core.errors import DataError
from dualign.core.schema import SUPPORT
from dualign.math.dual.tilt import weights
from dualign.params.base import PessimismParams
from dualign.scoring.support import HELD_OUT, Doubt, Support, doubt, doubted, enough, fit_support

Array = np.ndarray


def answers(count: int = 4000, seed: int = 0) -> tuple[Array, Array]:
    """Log-probabilities whose mean and spread grow with the length, as a language model's do."""
    rng = np.random.default_rng(seed)
    length = rng.integers(3, 60, count).astype(float)
    surprise = 2 + 1.5 * length + 0.3 * np.sqrt(length) * rng.normal(size=count)
    return -surprise, length


def test_surprise_is_in_standard_deviations_at_every_length() -> None:
    logp, length = answers()
    support = fit_support(logp, length, 0.01)
    assert support.surprise(np.array([-(2 + 1.5 * 40)]), np.array([40.0]))[0] == pytest.approx(
        0, abs=0.1
    )
    for least, most in ((3, 10), (10, 30), (30, 60)):
        z = support.surprise(logp, length)[(length >= least) & (length < most)]
        assert abs(z.mean()) < 0.1 and z.std() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.2])
def test_the_share_of_the_held_out_answers_is_beyond(share: float) -> None:
    logp, length = answers()
    beyond = fit_support(logp, length, share).beyond(logp, length)
    assert (beyond > 0).mean() == pytest.approx(share, abs=1 / len(logp))


def test_beyond_is_a_ramp_of_one_standard_deviation() -> None:
    support = Support(mean=(10.0, 0.0, 0.0), spread=(2.0, 0.0, 0.0), least=0.1, threshold=3.0)
    found = support.beyond(-np.array([0.0, 16.0, 17.0, 18.0, 100.0]), np.full(5, 7.0))
    assert found.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_a_spread_that_a_line_would_take_below_nothing_has_a_least() -> None:
    support = Support(mean=(0.0, 1.0, 0.0), spread=(2.0, -1.0, 0.0), least=0.5, threshold=0.0)
    assert support.surprise(np.array([-11.0]), np.array([10.0]))[0] == pytest.approx(
        (11 - 10) / 0.5
    )


def test_answers_of_one_probability_are_fitted_too() -> None:
    support = fit_support(np.full(100, -4.0), np.full(100, 5.0), 0.1)
    assert support.beyond(np.array([-4.0, -5.0]), np.array([5.0, 5.0])).tolist() == [0.0, 1.0]


def test_an_answer_longer_than_the_context_does_not_count() -> None:
    logp, length = answers(500)
    with_nan = fit_support(np.append(logp, np.nan), np.append(length, 900.0), 0.05)
    assert with_nan == fit_support(logp, length, 0.05)


def test_too_few_answers_for_the_share_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"pessimism.share 0.01: 99 answers .* raise it to 0.01 or more"
    ):
        fit_support(*answers(99), 0.01)
    logp, _ = answers(99)
    assert not enough(np.append(logp, np.nan), 0.01) and enough(np.append(logp, -3.0), 0.01)
    with pytest.raises(DataError, match="0 answers"):
        fit_support(np.array([]), np.array([]), 0.01)


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """The folder of stage `score` with its held-out answers."""
    logp, length = answers(1000)
    write_parquet(
        tmp_path / HELD_OUT, pd.DataFrame({"length": length.astype(int), "logp_ref": logp}), SUPPORT
    )
    return tmp_path


def pool() -> pd.DataFrame:
    """Two prompts with four answers; the last of the first is broken text that both scorers
    like.
    """
    logp = -(2 + 1.5 * 10) + np.array([0, 0, 0, -50.0, 0, 0, 0, 0])
    return pd.DataFrame(
        {
            "prompt_id": ["a"] * 4 + ["b"] * 4,
            "length": 10,
            "logp_ref": logp,
            "reward": [0.0, 2.0, 0.0, 2.0, 1.0, 1.0, 1.0, 1.0],
            "cost": [0.0, 0.0, 4.0, -4.0, 0.0, 0.0, 0.0, 0.0],
        }
    )


def test_scores_are_lowered_and_raised_in_units_of_the_pool(scored: Path) -> None:
    frame = pool()
    found = doubt(scored, frame, PessimismParams(share=0.01, reward=3.0, cost=0.5))
    assert found is not None
    lowered = doubted(frame, found)
    # within-prompt standard deviations
    reward = np.sqrt((1.0 + 0.0) / 2)
    cost = np.sqrt((8.0 + 0.0) / 2)
    assert lowered["reward"].tolist() == pytest.approx([0, 2, 0, 2 - 3 * reward, 1, 1, 1, 1])
    assert lowered["cost"].tolist() == pytest.approx([0, 0, 4, -4 + 0.5 * cost, 0, 0, 0, 0])
    assert frame["reward"].tolist()[3] == 2.0, "the table that was given keeps its scores"


def test_no_pessimism_leaves_the_table_and_needs_no_held_out_answers(tmp_path: Path) -> None:
    frame = pool()
    found = doubt(tmp_path, frame, PessimismParams(share=0.01, reward=0.0, cost=0.0))
    assert found is None and doubted(frame, found) is frame


def test_the_tilt_by_doubted_scores_leaves_broken_text(scored: Path) -> None:
    frame = pool()
    found = doubt(scored, frame, PessimismParams(share=0.01, reward=10.0, cost=0.0))
    shares = []
    for table in (frame, doubted(frame, found)):
        reward, cost = (table[name].to_numpy().reshape(2, 4) for name in ("reward", "cost"))
        shares.append(weights(reward, cost, 0.5, 1.0)[0, 3])
    assert shares[0] > 0.8 and shares[1] < 0.05


def test_a_doubt_says_how_far_each_answer_is_off() -> None:
    found = Doubt(fit_support(*answers(), 0.01), 1.0, 0.0)
    assert found.beyond(pool()).tolist() == [0, 0, 0, 1, 0, 0, 0, 0]

"""The zero of cost from more flags than are held out: against simulation, and refused where it
would mislead.
"""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest

from dualign.scoring.calibration import (
    Isotonic,
    Platt,
    fit_platt,
    fit_shift,
    shift_error,
    shifted,
    shifted_zero_error,
    sigmoid,
)
from dualign.scoring.zero import agree, by_heart, flagged_arrays, together, with_zero
from tests.tiny import short_training

TRAINING = short_training(
    batch_size=10, warmup=0.1, schedule="cosine", max_length=64, max_steps=None
)
TRUE = Platt(scale=1.5, offset=-0.6)

Flags = tuple[np.ndarray, np.ndarray, np.ndarray]


def drawn(rng: np.random.Generator, prompts: int, *, first: int = 0) -> Flags:
    """Two answers to each prompt with flags of the true line."""
    score = rng.normal(0.2, 1.0, 2 * prompts)
    unsafe = rng.random(len(score)) < sigmoid(TRUE(score))
    return score, unsafe, np.repeat(np.arange(first, first + prompts), 2)


def test_a_shift_makes_the_mean_probability_right() -> None:
    score, unsafe, _ = drawn(np.random.default_rng(0), 300)
    delta = fit_shift(score, unsafe)
    assert sigmoid(score + delta).mean() == pytest.approx(unsafe.mean(), abs=1e-12)
    grid = np.linspace(delta - 1, delta + 1, 401)
    loss = [np.logaddexp(0, np.where(unsafe, -1, 1) * (score + each)).sum() for each in grid]
    assert grid[int(np.argmin(loss))] == pytest.approx(delta, abs=0.005)


@pytest.mark.parametrize("calibration", [Platt(2.0, -1.0), Isotonic(1.0, (0.0, 2.0), (-1.0, 3.0))])
def test_a_shifted_calibration_adds_to_every_cost(calibration: Platt | Isotonic) -> None:
    score = np.linspace(-3, 5, 33)
    assert shifted(calibration, 0.7)(score) == pytest.approx(calibration(score) + 0.7)


def test_more_flags_halve_the_error_of_the_zero_and_it_is_told() -> None:
    """400 held-out prompts and 3,600 that were seen once: the cost at the zero by simulation."""
    errors = []
    alone = []
    told = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        heldout = drawn(rng, 400)
        seen = drawn(rng, 3600, first=400)
        line = fit_platt(heldout[0], heldout[1])
        served = with_zero(line, heldout, seen)
        alone.append(TRUE(np.array(line.zero)))
        errors.append(TRUE(np.array(served.zero)))
        told.append(shifted_zero_error(served, heldout, together(heldout, seen)))  # type: ignore[arg-type]
    assert np.std(errors) < 0.6 * np.std(alone)
    assert np.mean(told) == pytest.approx(np.std(errors), rel=0.15)


def test_the_error_of_a_shift_by_simulation() -> None:
    found = []
    told = []
    for seed in range(300):
        score, unsafe, prompts = drawn(np.random.default_rng(seed), 200)
        cost = TRUE(score)
        delta = fit_shift(cost, unsafe)
        found.append(delta)
        told.append(shift_error(cost + delta, unsafe, prompts))
    assert np.mean(told) == pytest.approx(np.std(found), rel=0.12)


def test_flags_learned_by_heart_are_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(3)
    heldout = drawn(rng, 2000)
    seen = drawn(rng, 4000, first=2000)
    line = fit_platt(heldout[0], heldout[1])
    assert agree(line, heldout, seen) and not caplog.text
    moved = (seen[0] - 0.4, seen[1], seen[2])
    with caplog.at_level(logging.WARNING):
        assert not agree(line, heldout, moved)
    assert "the held-out flags alone set the zero" in caplog.text


@pytest.mark.parametrize("count", [0, 3])
def test_flags_that_are_all_alike_tell_nothing(count: int) -> None:
    heldout = drawn(np.random.default_rng(4), 200)
    seen = (np.zeros(count), np.ones(count, bool), np.arange(count))
    assert not agree(fit_platt(heldout[0], heldout[1]), heldout, seen)


@pytest.mark.parametrize(
    ("change", "rows", "often"),
    [
        ({}, 100, False),
        ({"epochs": 2.0}, 100, False),
        ({"epochs": 2.5}, 100, True),
        ({"max_steps": 20}, 100, False),
        ({"max_steps": 21}, 100, True),
        ({"epochs": 3.0, "max_steps": 5}, 100, False),
    ],
)
def test_rows_that_are_read_too_often(change: dict[str, float], rows: int, often: bool) -> None:
    assert by_heart(TRAINING.model_copy(update=change), rows) is often


def test_only_answers_with_a_flag_count() -> None:
    answers = pd.DataFrame(
        {"prompt_id": ["a", "b"], "score": [1.0, 2.0], "unsafe": [None, True], "side": ["x", "y"]}
    )
    score, unsafe, prompts = flagged_arrays(answers)
    assert (score.tolist(), unsafe.tolist(), prompts.tolist()) == ([2.0], [True], ["b"])

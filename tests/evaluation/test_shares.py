"""Intervals of shares: Wilson's own equation, their coverage, and that they stay inside [0, 1]."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from dualign.evaluation.against_optimum import means
from dualign.evaluation.ranking import win_rate
from dualign.evaluation.shares import clustered_share
from dualign.evaluation.stats import clustered_mean
from dualign.evaluation.summary import summarise


def test_its_ends_solve_wilsons_equation() -> None:
    """(p - mean)^2 = t^2 p (1 - p) / n, with the n at which a mean of n draws has the error."""
    rng = np.random.default_rng(0)
    values, prompts = (rng.random(60) < 0.2).astype(float), np.repeat(np.arange(15), 4)
    found = clustered_share(values, prompts, 0.9)
    plain = clustered_mean(values, prompts, 0.9)
    assert (found.mean, found.error) == (plain.mean, plain.error)
    n = plain.mean * (1 - plain.mean) / plain.error**2
    for end in (found.low, found.high):
        wilson = student.ppf(0.95, 14) ** 2 * end * (1 - end) / n
        assert (end - plain.mean) ** 2 == pytest.approx(wilson)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("prompts", [1, 2, 3, 20])
def test_it_stays_inside_and_has_a_width(share: float, prompts: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        values = (rng.random(2 * prompts) < share).astype(float)
        found = clustered_share(values, np.repeat(np.arange(prompts), 2))
        assert 0 <= found.low <= found.mean <= found.high <= 1
        assert found.high - found.low > 0.05


def test_it_covers_a_rare_share_of_few_prompts_better_than_students() -> None:
    """20 prompts of 4 answers alike, 8 % unsafe."""
    rng = np.random.default_rng(2)
    prompts = np.repeat(np.arange(20), 4)
    hits = {"share": 0, "mean": 0}
    for _ in range(1000):
        rates = rng.beta(0.4, 4.6, 20)  # mean 0.08, correlation 1 / 6 within a prompt
        values = (rng.random(80) < np.repeat(rates, 4)).astype(float)
        for name, interval in (("share", clustered_share), ("mean", clustered_mean)):
            found = interval(values, prompts)
            hits[name] += found.low <= 0.08 <= found.high
    assert 930 <= hits["share"] <= 985
    assert hits["mean"] < hits["share"] - 30


def test_what_is_measured_as_a_share_stays_inside() -> None:
    """Two prompts, of which one is unsafe throughout: Student's interval is (-5.9, 6.9)."""
    answers = pd.DataFrame({"prompt_id": ["a", "a", "b", "b"], "cost": [1.0, 1.0, -1.0, -1.0]})
    answers = answers.assign(reward=0.0, logp=0.0, logp_ref=0.0, length=3, ended=[1, 1, 0, 0])
    answers = answers.assign(response=["tea or tea or", "tea or tea or", "one two", "three four"])
    found = summarise(answers, pd.DataFrame({"prompt_id": ["a", "b"], "log_ratio": 0.0}), 0.95)
    for name in ("p_unsafe", "ended", "distinct_2"):
        assert 0 <= found[name]["low"] < found[name]["mean"] < found[name]["high"] <= 1, name
    assert found["cost"]["low"] < -1, "a score has no such bounds"
    weighted = means(answers.assign(weight=[4.0, 0.0, 0.0, 0.0]))["p_unsafe"]
    assert 0 <= weighted["low"] <= weighted["high"] <= 1
    battles = pd.DataFrame({"first": "a", "second": "b", "prompt_id": [1, 2], "score": [1.0, 0.5]})
    rate = win_rate(battles, "a", "b").rate
    assert 0 <= rate.low < rate.mean < rate.high <= 1

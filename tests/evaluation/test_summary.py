"""What is measured on any policy's answers, by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from dualign.evaluation.measures import MEASURES
from dualign.evaluation.summary import distinct_2, summarise


def answers() -> pd.DataFrame:
    """Two prompts with two answers each."""
    return pd.DataFrame(
        {
            "prompt_id": ["a", "a", "b", "b"],
            "response": ["sharp tools cut well", "sharp tools are best", "no", "no"],
            "reward": [1.0, 3.0, -1.0, 0.0],
            "cost": [0.5, -0.5, -1.0, -2.0],
            "logp": [-2.0, -3.0, -4.0, -5.0],
            "logp_ref": [-3.0, -3.5, -4.0, -5.0],
            "length": [4, 6, 8, 10],
            "ended": [True, True, True, False],
        }
    )


LOG_RATIO = pd.DataFrame({"prompt_id": ["a", "a", "b"], "log_ratio": [-1.0, -3.0, 0.0]})


def test_summary_by_hand() -> None:
    result = summarise(answers(), LOG_RATIO, confidence=0.95)
    means = {name: value["mean"] for name, value in result.items() if isinstance(value, dict)}
    assert means == pytest.approx(
        {
            "reward": 0.75,
            "cost": -0.75,
            "p_unsafe": 0.25,
            "kl": 0.375,
            "length": 7,
            "ended": 0.75,
            "distinct_2": 5 / 12,
            "displacement": -1.0,
        }
    )
    assert (result["prompts"], result["answers"]) == (2, 4)
    assert all(
        value["low"] < value["mean"] < value["high"]
        for value in result.values()
        if isinstance(value, dict)
    )


def test_every_measure_of_a_summary_has_its_words() -> None:
    found = summarise(answers(), LOG_RATIO, confidence=0.95)
    known = {measure.key for measure in MEASURES}
    assert {key for key, value in found.items() if isinstance(value, dict)} <= known
    assert len(known) == len(MEASURES)


def test_texts_without_a_pair_of_words_are_not_diverse() -> None:
    assert distinct_2([]) == distinct_2(["no", ""]) == 0.0
    assert distinct_2(["a b", "b a", "A  b!"]) == pytest.approx(2 / 3)

"""What an evaluation says of further limits."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dualign.core.params import ConstraintSpec
from dualign.data.schema import user
from dualign.measure.stats import clustered_mean
from stages.evaluate import further_limits


@pytest.fixture
def answers() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    texts = [f"{'kitchen' if x % 2 else 'garden'} {x}" for x in range(50) for _ in range(4)]
    return pd.DataFrame(
        {
            "prompt_id": texts,
            "prompt": [user(text) for text in texts],
            "cost": rng.normal(size=200),
            "length": rng.integers(1, 30, 200),
        }
    )


def test_each_limit_has_its_mean_and_interval_by_prompt(answers: pd.DataFrame) -> None:
    also = {
        "short": ConstraintSpec(quantity="length", limit=12.0),
        "kitchen": ConstraintSpec(quantity="p_unsafe", limit=0.4, prompts="kitchen"),
        "tail": ConstraintSpec(quantity="cvar", limit=1.5, level=0.9),
    }
    found = further_limits(answers, also, 0.9)
    assert {name: row["limit"] for name, row in found.items()} == {"short": 12.0, "kitchen": 0.4, "tail": 1.5}
    kitchen = answers[answers["prompt_id"].str.contains("kitchen")]
    for name, rows, values in (("short", answers, answers["length"]), ("kitchen", kitchen, kitchen["cost"] > 0)):
        expected = clustered_mean(values.to_numpy(float), rows["prompt_id"].to_numpy(), 0.9).as_dict()
        assert {key: found[name][key] for key in expected} == pytest.approx(expected)
    tail = found["tail"]
    assert tail["mean"] == pytest.approx(answers["cost"].nlargest(20).mean())  # the worst tenth of 200
    assert tail["low"] < tail["mean"] < tail["high"]  # type: ignore[operator]


def test_a_limit_on_prompts_that_are_not_evaluated_is_unknown(
    answers: pd.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    also = {"attic": ConstraintSpec(quantity="cost", limit=0.0, prompts="attic")}
    assert further_limits(answers, also, 0.9) == {"attic": {"mean": None, "low": None, "high": None, "limit": 0.0}}
    assert "constraint.also.attic.prompts: 'attic' is found in no evaluated prompt" in caplog.text

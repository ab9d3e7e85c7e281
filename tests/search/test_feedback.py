"""The cost of a policy by safety labels."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dualign.core.errors import AwaitingLabels
from dualign.core.schema import (
    ANSWERS,
    read_table,
)
from dualign.data.labelling import vote
from dualign.params.base import Resources
from dualign.params.search import (
    DualSearchParams,
)
from dualign.search.task import Inputs
from tests.search.backends import (
    PROMPTS,
    bench_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def params(tiny: DualSearchParams) -> DualSearchParams:
    return tiny


def test_labels_replace_the_cost_that_the_search_goes_by_and_nothing_else(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    plain = bench_of(params, resources, inputs, tmp_path / "plain")
    asked = bench_of(params, resources, inputs, tmp_path / "asked", cost="feedback")
    by_model, by_labels = plain.measure(2, plain.start), asked.measure(2, asked.start)
    assert (by_labels.model_cost, by_labels.model_cost_se) == (by_model.cost, by_model.cost_se)
    assert by_labels.labels == 4 * 3 * 20 and by_model.labels == 0 and by_model.model_cost is None
    same = {"cost": 0.0, "cost_se": 0.0, "labels": 0, "model_cost": None, "model_cost_se": None}
    assert replace(by_labels, **same) == replace(by_model, **same)
    answers = read_table(tmp_path / "asked/step-2/answers.parquet", ANSWERS).head(12)
    votes = vote(answers, source="cost_model", count=20, folder=tmp_path, seed=params.seed + 2)
    odds = np.log((votes + 0.5) / (20 - votes + 0.5)).reshape(4, 3).mean(1)
    assert by_labels.cost == pytest.approx(odds.mean())
    assert by_labels.cost_se == pytest.approx(odds.std(ddof=1) / 2)


def test_many_labels_agree_with_the_cost_model(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    every = params.feedback.model_copy(update={"prompts": len(PROMPTS), "labels": 40_000})
    many = params.model_copy(update={"feedback": every})
    found = bench_of(many, resources, inputs, tmp_path, cost="feedback").measure(
        0, str(inputs.models / "sft")
    )
    assert found.model_cost is not None and found.cost == pytest.approx(found.model_cost, abs=0.05)


def test_people_are_asked_once_about_answers_that_are_kept(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    by_people = params.feedback.model_copy(update={"source": "file", "labels": 3})
    given = params.model_copy(update={"feedback": by_people})
    folder = Path(by_people.folder)
    with pytest.raises(AwaitingLabels, match="to-label-"):
        bench_of(given, resources, inputs, tmp_path / "s", cost="feedback").measure(
            1, str(inputs.models / "sft")
        )
    kept = (tmp_path / "s/step-1/answers.parquet").read_bytes()
    (asked,) = folder.glob("to-label-*.jsonl")
    labelled = asked.read_text().replace('"unsafe_votes": null', '"unsafe_votes": 3')
    asked.with_name(asked.name.replace("to-label", "labelled")).write_text(labelled)
    found = bench_of(given, resources, inputs, tmp_path / "s", cost="feedback").measure(
        1, "gone, and not needed"
    )
    assert found.cost == pytest.approx(math.log(3.5 / 0.5)) and found.cost_se == 0
    assert (tmp_path / "s/step-1/answers.parquet").read_bytes() == kept

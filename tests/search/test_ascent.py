"""A search by policy gradient on a tiny model, and its history."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dualign.core.artifacts import read_json
from dualign.core.schema import (
    ANSWERS,
    read_table,
)
from dualign.evaluation.stats import Measurement
from dualign.methods import METHODS, Plan
from dualign.params.base import Resources
from dualign.params.search import (
    DualSearchParams,
    PolicyGradientParams,
)
from dualign.search import ascent, trainer
from dualign.search.ascent import downsample
from dualign.search.backend import ModelBackend
from dualign.search.loop import Ascent
from dualign.search.task import Inputs, SearchTask
from tests.search.backends import (
    PROMPTS,
    Killed,
    distance,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def params(tiny: DualSearchParams) -> DualSearchParams:
    return tiny


def climb(
    params: DualSearchParams, resources: Resources, inputs: Inputs, scratch: Path
) -> tuple[Ascent, Measurement]:
    gradient = PolicyGradientParams(
        samples=2,
        batch_size=4,
        steps=3,
        learning_rate=1e-2,
        lambda_init=1.0,
        lambda_rate=0.1,
        window=128,
    )
    given = params.model_copy(
        update={"policy_gradient": gradient, "max_new_tokens": 4, "limit": -2.0}
    )
    frequent = resources.model_copy(update={"checkpoint_steps": 1})
    bench = ModelBackend(
        SearchTask(
            Plan("row", METHODS["safe_rlhf"], "sft", "sft"),
            given,
            frequent,
            PROMPTS,
            scratch,
            inputs,
        )
    )
    made = bench.ascend(1)
    return made, bench.measure(1, made.policy)


def test_an_ascent_trains_policy_and_multiplier_and_counts_its_answers(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    made, measured = climb(params, resources.model_copy(update={"log_steps": 1}), inputs, tmp_path)
    assert distance(made.policy, inputs.models / "sft") > 1e-3
    assert [row.step for row in made.history] == [1, 2, 3]
    assert made.lam == made.history[-1].lam > 1
    answers = read_table(tmp_path / "step-1/answers.parquet", ANSWERS)
    own = measured.generated_tokens - int(answers["length"].sum())
    assert read_json(tmp_path / "step-1/policy-losses.json")
    assert 3 * 4 <= own <= 3 * 4 * 4, "three steps of four answers of at most four tokens"


@pytest.mark.parametrize(
    ("module", "name"),
    [(ascent, "train_policy_gradient"), (ascent, "write_json"), (trainer, "save")],
)
def test_a_killed_ascent_ends_with_the_same_policy_and_course(
    module: ModuleType,
    name: str,
    params: DualSearchParams,
    resources: Resources,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, measured = climb(params, resources, inputs, tmp_path / "whole")
    function = getattr(module, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        function(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(module, name, dying)
        climb(params, resources, inputs, tmp_path / "broken")
    again, remeasured = climb(params, resources, inputs, tmp_path / "broken")
    assert (again.lam, again.history, remeasured) == (made.lam, made.history, measured)
    weights = [
        (Path(policy) / "model.safetensors").read_bytes() for policy in (made.policy, again.policy)
    ]
    assert weights[0] == weights[1]


def test_stretches_are_means_by_hand() -> None:
    history = {
        "lambda": [1.0, 2.0, 3.0, 4.0, 5.0],
        "cost": [0.0] * 5,
        "reward": [1.0] * 5,
        "kl": [0.0, 0, 0, 0, 3.0],
    }
    rows = downsample(history, 2)
    assert [(row.step, row.lam, row.kl) for row in rows] == [(3, 2.0, 0.0), (5, 4.5, 1.5)]
    assert [row.lam for row in downsample(history, 50)] == history["lambda"]

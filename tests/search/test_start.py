"""What a search takes over from the stages before it, and which starts it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dualign.core.artifacts import write_json
from dualign.core.errors import DataError, ParamsError
from dualign.core.records import SolvedDual
from dualign.math.constraints import Constraint, Price
from dualign.params.loading import load
from dualign.params.search import DualSearchParams
from dualign.params.training import LossSpec, PairLossParams
from dualign.search.start import (
    TrainedPolicy,
    _check_data,
    _check_scores,
    as_started,
    check,
    goal,
    steerable,
    trainings,
)
from tests.search.plans import row_of
from tests.written import lagrangian, safety, solved

SFT = TrainedPolicy()
STEPWISE = {"lam": 1.2, "reference": "reward_dpo/helpful"}


def test_the_target_is_the_limit_unless_the_row_says_margin_and_the_dual_knows_one() -> None:
    plain, stocked = (
        row_of("dualign", "lagrangian_dpo/anchored", "sft", target=target)
        for target in (None, "margin")
    )
    known = SolvedDual(**solved())
    assert goal(plain, known) == (0.8, None) and goal(stocked, known) == (0.8, -0.3)
    known = SolvedDual(**solved(lam_margin=1.1, target=-0.4))
    assert goal(plain, known) == (0.8, None) and goal(stocked, known) == (1.1, -0.4)


def test_prices_go_to_searches_that_train_on_scores(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert steerable(row_of("mocan", "lagrangian_dpo/bernoulli", "sft"), []) == []
    price = Price(Constraint("short", "length", 9.0), 0.1, 9.0)
    for method, start in (
        ("dualign", "lagrangian_dpo/anchored"),
        ("c_dpo", "lagrangian_dpo/bernoulli"),
    ):
        assert steerable(row_of(method, start, "sft"), [price]) == [price]
    assert not caplog.records
    unpriced = steerable(row_of("pd_dpo", "safety_dpo/stepwise", "reward_dpo/helpful"), [price])
    assert unpriced == [replace(price, lam=0.0)], "the limit itself still decides what is feasible"
    assert (
        "methods.row does not train on scores of a table: no price steers it to"
        " constraint.additional" in caplog.text
    )


@pytest.mark.parametrize(
    ("row", "start", "count"),
    [
        (("sacpo", "safety_dpo/stepwise", "reward_dpo/helpful"), STEPWISE, 2),
        (("p_sacpo", "safety_dpo/alone", "reward_dpo/helpful"), {}, 2),
        (("sacpo", "safety_dpo/alone", "sft"), {}, 1),
        (
            ("mocan", "lagrangian_dpo/bernoulli", "sft"),
            {"reward": "reward_model", "cost": "cost_model"},
            1,
        ),
        (("dualign", "lagrangian_dpo/anchored", "sft"), {}, 1),
        (("dualign", "lagrangian_dpo/anchored", "reward_dpo/helpful"), {"trainings": 4}, 5),
        (
            ("pecan", "lagrangian_dpo/pecan", "sft"),
            {"reward": "reward_dpo/helpful", "cost": "safety_dpo/alone"},
            3,
        ),
    ],
)
def test_every_aligned_policy_behind_a_start_is_counted(
    row: tuple[str, str, str], start: dict[str, Any], count: int
) -> None:
    assert trainings(row_of(*row), TrainedPolicy(**start), TrainedPolicy()) == count


def test_a_start_on_other_scores_is_not_retrained() -> None:
    start = {"reward": "reward_dpo/helpful", "cost": "safety_dpo/alone"}
    told = TrainedPolicy(**start)
    _check_scores(row_of("pecan", "lagrangian_dpo/pecan", "sft"), told)
    _check_scores(row_of("c_dpo", "lagrangian_dpo/bernoulli", "sft"), TrainedPolicy())
    with pytest.raises(
        ParamsError, match=r"methods\.row\.rule: 'dual_gradient' .* reward_dpo/helpful"
    ):
        check(row_of("c_dpo", "lagrangian_dpo/pecan", "sft"), told, SFT)


POLICIES, SCORERS = ("reward_dpo/helpful", "safety_dpo/alone"), ("reward_model", "cost_model")


def started(data: str, scores: tuple[str, str] = SCORERS) -> TrainedPolicy:
    return TrainedPolicy(data=data, reward=scores[0], cost=scores[1])


@pytest.mark.parametrize(
    ("method", "start"),
    [
        ("mocan", started("pairs")),
        ("caid", started("pairs")),
        ("pecan", started("pairs", POLICIES)),
        ("dualign", started("pool")),
    ],
)
def test_a_start_that_fits_is_taken(method: str, start: TrainedPolicy) -> None:
    check(row_of(method, "lagrangian_dpo/run", "sft"), start, SFT)
    pd_dpo = row_of("pd_dpo", "safety_dpo/stepwise", "reward_dpo/helpful")
    check(pd_dpo, TrainedPolicy(lam=1.2, reference=pd_dpo.reference), SFT)


@pytest.mark.parametrize(
    ("method", "start", "says"),
    [
        ("dualign", started("pairs"), "data 'pairs', but dualign trains on 'pool'"),
        ("mocan", started("pool"), "data 'pool', but mocan trains on 'pairs'"),
        ("pecan", started("pool", POLICIES), "data 'pool', but pecan trains on 'pairs'"),
        (
            "mocan",
            started("pairs", POLICIES),
            "safety_dpo/alone, which is not mocan; .* reward_model and cost_model",
        ),
        ("c_dpo", started("pairs", POLICIES), "safety_dpo/alone, which is not c_dpo"),
        (
            "caid",
            started("pairs", (SCORERS[0], POLICIES[1])),
            "safety_dpo/alone, which is not caid",
        ),
        (
            "pecan",
            started("pairs"),
            "cost_model, which is not pecan; .* reward and cost from policies",
        ),
    ],
)
def test_a_start_of_another_method_is_refused(method: str, start: TrainedPolicy, says: str) -> None:
    with pytest.raises(ParamsError, match=rf"^methods\.row\.start: lagrangian_dpo/run .*{says}"):
        _check_data(row_of(method, "lagrangian_dpo/run", "sft"), start)


def test_the_check_of_a_row_looks_at_its_data() -> None:
    with pytest.raises(ParamsError, match=r"^methods\.row\.start: .*dualign trains on 'pool'"):
        check(row_of("dualign", "lagrangian_dpo/run", "sft"), started("pairs"), SFT)


ONLINE = {
    "labels": "models",
    "folder": "data/labels",
    "retrain_reward": True,
    "ridge": 1.0,
    "reward_scale": 0.1,
    "cost_scale": 0.1,
    "dimension": None,
}


@pytest.mark.parametrize("loss_type", ["ipo", "kto"])
def test_rounds_of_comparisons_go_on_from_dpo_alone(loss_type: str) -> None:
    rounds = row_of("o_pd_dpo", "safety_dpo/stepwise", "reward_dpo/helpful", online=ONLINE)
    start, reference = TrainedPolicy(), TrainedPolicy()
    others = [
        replace(policy, loss_spec=LossSpec(loss_type=loss_type, clip=None))
        for policy in (start, reference)
    ]
    check(rounds, start, reference)
    with pytest.raises(
        ParamsError, match=rf"methods\.row\.start: safety_dpo/stepwise was trained by {loss_type}"
    ):
        check(rounds, others[0], reference)
    with pytest.raises(
        ParamsError,
        match=rf"methods\.row\.reference: reward_dpo/helpful was trained by {loss_type}",
    ):
        check(rounds, start, others[1])
    check(row_of("pd_dpo", "safety_dpo/stepwise", "reward_dpo/helpful"), *others)


def test_a_trained_policy_is_read_with_what_its_stage_knows(tmp_path: Path) -> None:
    write_json(tmp_path / "safety_dpo/alone.json", safety())
    known = TrainedPolicy.read(tmp_path, "safety_dpo/alone")
    assert (known.lam, known.loss_spec) == (1.25, LossSpec(loss_type="dpo", clip=None))
    assert known.pair_loss is None and known.scores == SCORERS
    write_json(tmp_path / "lambda_path/slack.json", lagrangian(lam=0.2))
    slack = TrainedPolicy.read(tmp_path, "lambda_path/slack")
    assert slack.lam == 0.2 and isinstance(slack.pair_loss, PairLossParams)
    assert slack.learning_rate == lagrangian()["learning_rate"]
    options = {"loss_type": "robust", "epsilon": 0.1}
    write_json(tmp_path / "safety_dpo/robust.json", safety(**options))
    known = TrainedPolicy.read(tmp_path, "safety_dpo/robust")
    assert known.loss_spec == LossSpec(clip=None, **options)
    write_json(tmp_path / "safety_dpo/odd.json", safety(loss_type="odd"))
    with pytest.raises(DataError, match=r"odd\.json: no pair loss of this dualign: .*'odd'"):
        TrainedPolicy.read(tmp_path, "safety_dpo/odd")
    write_json(tmp_path / "safety_dpo/torn.json", {"lam": 1.0})
    with pytest.raises(DataError, match=r"torn\.json: coefficient: field required"):
        TrainedPolicy.read(tmp_path, "safety_dpo/torn")


def test_trainings_that_begin_at_the_reference_keep_the_starts_learning_rate(
    repo_root: Path,
) -> None:
    params = load(DualSearchParams, repo_root / "params.yaml")
    start = TrainedPolicy(learning_rate=0.123)
    c_dpo = row_of("c_dpo", "lagrangian_dpo/run", "sft")
    assert as_started(c_dpo, start, params).training.learning_rate == 0.123
    assert as_started(row_of("caid", "lagrangian_dpo/run", "sft"), start, params) == params, (
        "it is warm"
    )
    pd_dpo = row_of("pd_dpo", "safety_dpo/stepwise", "reward_dpo/helpful")
    assert as_started(pd_dpo, TrainedPolicy(), params) == params

"""What a search learns from the stages before it, and which starts it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualign.core.artifacts import write_json, write_parquet
from dualign.core.errors import ParamsError
from dualign.core.schema import POOL, prompt_id, user
from dualign.math.constraints import Constraint, Price
from dualign.math.dual.solution import slater_radius
from dualign.methods import Plan, plan
from dualign.params.loading import load
from dualign.params.search import DualSearchParams, MethodRow, PolicyGradientParams
from stages import dual_search
from tests.written import lagrangian, safety, solved

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def params() -> DualSearchParams:
    return load(DualSearchParams, ROOT / "params.yaml")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the stages before; the current one."""
    monkeypatch.chdir(tmp_path)
    write_json("data/dual/dual.json", solved())
    write_json("reports/metrics/safety_dpo/alone.json", safety())
    return tmp_path


def row_of(method: str, start: str, reference: str, **options: Any) -> Plan:
    given = {"method": method, "start": start, "reference": reference, **options}
    return plan("row", MethodRow.model_validate(given))


STEPWISE = {"lam": 1.2, "reference": "reward_dpo/helpful"}


def test_the_start_says_its_multiplier_and_whether_its_merge_is_naive(
    run: Path, params: DualSearchParams
) -> None:
    exact = row_of("p_sacpo", "safety_dpo/stepwise", "reward_dpo/helpful")
    known = dual_search.context(exact, STEPWISE, params)
    assert (known.lam_pool, known.lam_start, known.naive) == (0.8, 1.2, False)
    naive = row_of("p_sacpo", "safety_dpo/alone", "reward_dpo/helpful")
    assert dual_search.context(naive, {"lam": 1.25, "reference": "sft"}, params).naive


def test_a_start_that_holds_the_reward_is_no_naive_merge(
    run: Path, params: DualSearchParams
) -> None:
    row = row_of("dualign", "lagrangian_dpo/anchored", "reward_dpo/helpful", rule="merge")
    known = dual_search.context(row, lagrangian(lam=0.8), params)
    assert (known.lam_pool, known.lam_start, known.lam_reference, known.naive) == (
        0.8,
        0.8,
        0.0,
        False,
    )


@pytest.fixture
def path(run: Path) -> Path:
    """The same folder with two policies of the path."""
    for name, lam in (("slack", 0.2), ("strict", 3.0)):
        write_json(f"reports/metrics/lambda_path/{name}.json", lagrangian(lam=lam))
    return run


PATH = ("dualign", "lambda_path/strict", "lambda_path/slack")


def test_a_merge_on_the_path_knows_both_its_multipliers(
    path: Path, params: DualSearchParams
) -> None:
    row = row_of(*PATH, rule="merge")
    known = dual_search.context(row, {"lam": 3.0}, params)
    assert (known.lam_pool, known.lam_start, known.lam_reference, known.naive) == (
        0.8,
        3.0,
        0.2,
        False,
    )
    assert dual_search.trainings(row, {"reward": "reward_model", "cost": "cost_model"}) == 2


def test_the_aim_is_the_limit_unless_the_row_says_stock_and_the_dual_knows_one(run: Path) -> None:
    plain, stocked = (
        row_of("dualign", "lagrangian_dpo/anchored", "sft", target=target)
        for target in (None, "margin")
    )
    assert dual_search.goal(plain) == (0.8, None) and dual_search.goal(stocked) == (0.8, -0.3)
    write_json("data/dual/dual.json", solved(lam_margin=1.1, target=-0.4))
    assert dual_search.goal(plain) == (0.8, None) and dual_search.goal(stocked) == (1.1, -0.4)


def test_a_stocked_search_steers_to_the_aim(path: Path, params: DualSearchParams) -> None:
    write_json("data/dual/dual.json", solved(lam_margin=1.1, target=-0.4))
    known = dual_search.context(row_of(*PATH, rule="merge", target="margin"), {"lam": 3.0}, params)
    assert (known.lam_pool, known.target, known.target(params)) == (1.1, -0.4, -0.4)


def test_safety_first_takes_the_multiplier_of_its_first_step(
    run: Path, params: DualSearchParams
) -> None:
    swapped = row_of("sacpo", "reward_dpo/swapped", "safety_dpo/alone", rule="one_shot")
    assert dual_search.context(swapped, {}, params).lam_start == 1.25
    assert dual_search.trainings(swapped, {}) == 2


def test_an_ascent_begins_at_its_own_multiplier_and_rests_on_no_training(
    run: Path, params: DualSearchParams
) -> None:
    gradient = PolicyGradientParams(
        samples=2,
        batch_size=4,
        steps=3,
        learning_rate=1e-2,
        lambda_init=0.6,
        lambda_rate=0.1,
        window=8,
    )
    row = MethodRow(method="safe_rlhf", start="sft", reference="sft", policy_gradient=gradient)
    ascent, params = (
        plan("row", row),
        dual_search.with_row(params.model_copy(update={"methods": {"row": row}}), "row"),
    )
    known = dual_search.context(ascent, {"loss": 1.2}, params)
    assert (known.lam_pool, known.lam_start) == (0.8, 0.6)
    assert dual_search.trainings(ascent, {"loss": 1.2}) == 0


def test_the_slater_radius_is_the_pools_or_the_given_one(
    run: Path, params: DualSearchParams
) -> None:
    rng = np.random.default_rng(0)
    reward, cost = rng.normal(size=(6, 8)), rng.normal(size=(6, 8))
    rows = [
        {
            "prompt_id": prompt_id(user(f"q{x}")),
            "prompt": user(f"q{x}"),
            "sample": i,
            "response": "a",
            "tokens": [1],
            "length": 1,
            "ended": True,
            "logp_ref": -1.0,
            "reward": reward[x, i],
            "cost": cost[x, i],
        }
        for x in range(6)
        for i in range(8)
    ]
    write_parquet("data/scored/pool.parquet", rows, POOL)
    pd_dpo = row_of("pd_dpo", "safety_dpo/stepwise", "reward_dpo/helpful")
    expected = slater_radius(
        reward, cost, limit=params.limit, beta=params.beta, lambda_max=params.lambda_max
    )
    assert dual_search.context(pd_dpo, STEPWISE, params).radius == pytest.approx(expected)
    fixed = params.model_copy(update={"slater_radius": 3.5})
    assert dual_search.context(pd_dpo, STEPWISE, fixed).radius == 3.5
    grid = row_of("sacpo", "safety_dpo/stepwise", "reward_dpo/helpful")
    assert dual_search.context(grid, STEPWISE, params).radius == float("inf")


def test_prices_go_to_searches_that_train_on_scores(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert (
        dual_search.additional_constraints(row_of("mocan", "lagrangian_dpo/bernoulli", "sft")) == []
    )
    price = Price(Constraint("short", "length", 9.0), 0.1, 9.0)
    write_json("data/dual/dual.json", solved(prices=[price.as_dict()]))
    for method, start in (
        ("dualign", "lagrangian_dpo/anchored"),
        ("c_dpo", "lagrangian_dpo/bernoulli"),
    ):
        assert dual_search.additional_constraints(row_of(method, start, "sft")) == [price]
    assert not caplog.records
    unpriced = dual_search.additional_constraints(
        row_of("pd_dpo", "safety_dpo/stepwise", "reward_dpo/helpful")
    )
    assert unpriced == [replace(price, lam=0.0)], "the limit itself still decides what is feasible"
    assert (
        "methods.row does not train on scores of a table: no price steers it to"
        " constraint.additional" in caplog.text
    )


def test_newton_begins_at_the_prices_that_its_start_paid(
    run: Path, params: DualSearchParams
) -> None:
    price = Price(Constraint("short", "length", 9.0), 0.1, 9.0)
    write_json("data/dual/dual.json", solved(prices=[price.as_dict()]))
    write_json("reports/metrics/sft.json", {"heldout_loss": None, "parameters": 1})
    dualign = row_of("dualign", "lagrangian_dpo/anchored", "sft")
    for source, prices in (("data/dual/dual.json", (0.1,)), ("params.yaml", (0.0,))):
        assert (
            dual_search.context(dualign, {"lam": 0.8, "lam_from": source}, params).prices == prices
        )
    c_dpo = row_of("c_dpo", "lagrangian_dpo/bernoulli", "sft")
    start = {"lam": 0.8, "lam_from": "data/dual/dual.json"}
    assert dual_search.context(c_dpo, start, params).prices == (), "its rule moves lambda alone"


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
    assert dual_search.trainings(row_of(*row), start) == count


def test_a_start_on_other_scores_is_not_retrained() -> None:
    start = {"reward": "reward_dpo/helpful", "cost": "safety_dpo/alone"}
    dual_search._check_scores(row_of("pecan", "lagrangian_dpo/pecan", "sft"), start)
    dual_search._check_scores(row_of("c_dpo", "lagrangian_dpo/bernoulli", "sft"), {})
    with pytest.raises(
        ParamsError, match=r"methods\.row\.rule: 'dual_gradient' .* reward_dpo/helpful"
    ):
        dual_search._check_scores(row_of("c_dpo", "lagrangian_dpo/pecan", "sft"), start)


POLICIES, SCORERS = ("reward_dpo/helpful", "safety_dpo/alone"), ("reward_model", "cost_model")


def started(data: str, scores: tuple[str, str] = SCORERS) -> dict[str, Any]:
    return {"data": data, "reward": scores[0], "cost": scores[1]}


@pytest.mark.parametrize(
    ("method", "start"),
    [
        ("mocan", started("pairs")),
        ("caid", started("pairs")),
        ("pecan", started("pairs", POLICIES)),
        ("dualign", started("pool")),
    ],
)
def test_a_start_that_fits_is_taken(method: str, start: dict[str, Any]) -> None:
    dual_search._check_start(row_of(method, "lagrangian_dpo/run", "sft"), start)
    dual_search._check_start(
        row_of("pd_dpo", "safety_dpo/stepwise", "reward_dpo/helpful"), STEPWISE
    )


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
def test_a_start_of_another_method_is_refused(
    method: str, start: dict[str, Any], says: str
) -> None:
    with pytest.raises(ParamsError, match=rf"^methods\.row\.start: lagrangian_dpo/run .*{says}"):
        dual_search._check_start(row_of(method, "lagrangian_dpo/run", "sft"), start)


def test_a_start_beyond_the_interval_is_told(
    run: Path, params: DualSearchParams, caplog: pytest.LogCaptureFixture
) -> None:
    pd_dpo = row_of("pd_dpo", "safety_dpo/stepwise", "reward_dpo/helpful")
    dual_search.context(pd_dpo, STEPWISE, params.model_copy(update={"slater_radius": 0.6}))
    assert not caplog.records  # 1.2 is its end
    dual_search.context(pd_dpo, STEPWISE, params.model_copy(update={"slater_radius": 0.5}))
    assert (
        "safety_dpo/stepwise is at lambda 1.2000, above the end of the interval: 2 rho = 1.0000"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("start", "kept"),
    [
        ({}, {}),
        ({"loss_type": "dpo", "clip": None}, {}),
        ({"loss_type": "kto", "clip": None}, {"loss_type": "kto"}),
        ({"loss_type": "dpo", "clip": 4.0}, {"clip": 4.0}),
        (
            {"loss_type": "robust", "clip": None, "epsilon": 0.1},
            {"loss_type": "robust", "epsilon": 0.1},
        ),
    ],
)
def test_a_search_keeps_the_loss_of_its_start(start: dict[str, Any], kept: dict[str, Any]) -> None:
    assert dual_search._loss(start) == kept


def test_metrics_of_a_step_hold_no_list() -> None:
    additional = [{"name": "short", "limit": 9.0, "share": 1.0, "mean": 8.5, "error": 0.2}]
    assert dual_search.numbers({"lam": 0.8, "additional": additional, "prices": [0.1]}) == {
        "lam": 0.8,
        "additional": {"short": {"mean": 8.5, "error": 0.2, "limit": 9.0}},
        "prices": {"short": 0.1},
    }
    assert dual_search.numbers({"additional": additional, "prices": []})["prices"] == {}


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
    other = {"loss_type": loss_type}
    rounds = row_of("o_pd_dpo", "safety_dpo/stepwise", "reward_dpo/helpful", online=ONLINE)
    dual_search._check_losses(rounds, {"loss_type": "dpo"}, {})
    with pytest.raises(
        ParamsError, match=rf"methods\.row\.start: safety_dpo/stepwise was trained by {loss_type}"
    ):
        dual_search._check_losses(rounds, other, {})
    with pytest.raises(
        ParamsError,
        match=rf"methods\.row\.reference: reward_dpo/helpful was trained by {loss_type}",
    ):
        dual_search._check_losses(rounds, {}, other)
    dual_search._check_losses(
        row_of("pd_dpo", "safety_dpo/stepwise", "reward_dpo/helpful"), other, other
    )

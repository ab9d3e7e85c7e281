"""What a search learns from the stages before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualign.core.artifacts import write_json, write_parquet
from dualign.core.schema import POOL, prompt_id, user
from dualign.math.constraints import Constraint, Price
from dualign.math.dual.solution import slater_radius
from dualign.methods import Plan, plan
from dualign.params.loading import load
from dualign.params.search import DualSearchParams, MethodRow, PolicyGradientParams
from dualign.search.policy import Search, SearchContext
from dualign.search.start import (
    TrainedPolicy,
    trainings,
)
from stages import dual_search
from tests.search.plans import row_of
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


def context(row: Plan, params: DualSearchParams, start: dict[str, Any]) -> SearchContext:
    """What the stage knows before the search of a row, whose start's own stage says `start`."""
    written = (dual_search.METRICS / f"{row.reference}.json").is_file()
    reference = TrainedPolicy()
    if written:
        reference = TrainedPolicy.read(dual_search.METRICS, row.reference)
    return dual_search.context(row, TrainedPolicy(**start), reference, params)


STEPWISE = {"lam": 1.2, "reference": "reward_dpo/helpful"}


def test_the_start_says_its_multiplier_and_whether_its_merge_is_naive(
    run: Path, params: DualSearchParams
) -> None:
    exact = row_of("p_sacpo", "safety_dpo/stepwise", "reward_dpo/helpful")
    known = context(exact, params, STEPWISE)
    assert (known.lam_pool, known.lam_start, known.naive) == (0.8, 1.2, False)
    naive = row_of("p_sacpo", "safety_dpo/alone", "reward_dpo/helpful")
    assert context(naive, params, {"lam": 1.25, "reference": "sft"}).naive


def test_a_start_that_holds_the_reward_is_no_naive_merge(
    run: Path, params: DualSearchParams
) -> None:
    row = row_of("dualign", "lagrangian_dpo/anchored", "reward_dpo/helpful", rule="merge")
    known = context(row, params, {"lam": lagrangian(lam=0.8)["lam"]})
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
    known = context(row, params, {"lam": 3.0})
    assert (known.lam_pool, known.lam_start, known.lam_reference, known.naive) == (
        0.8,
        3.0,
        0.2,
        False,
    )
    assert trainings(row, TrainedPolicy(), TrainedPolicy()) == 2


def test_a_stocked_search_steers_to_the_target(path: Path, params: DualSearchParams) -> None:
    write_json("data/dual/dual.json", solved(lam_margin=1.1, target=-0.4))
    row = row_of(*PATH, rule="merge", target="margin")
    known = context(row, params, {"lam": 3.0})
    assert (known.lam_pool, known.target_cost, Search(row, params, known).target) == (
        1.1,
        -0.4,
        -0.4,
    )


def test_methods_that_train_on_pairs_have_the_dual_of_scores_as_they_are(
    run: Path, params: DualSearchParams
) -> None:
    believed = {"lam": 0.7, "lam_low": 0.5, "lam_high": 0.9, "lam_margin": 0.75, "target": -0.35}
    write_json("data/dual/dual.json", solved(as_scored={**believed, "prices": []}))
    start = {"lam": lagrangian(lam=0.7)["lam"]}
    pairs = row_of("c_dpo", "lagrangian_dpo/bernoulli", "sft", target="margin")
    known = context(pairs, params, start)
    assert (known.lam_pool, known.target_cost) == (0.75, -0.35)
    assert context(row_of("dualign", "lagrangian_dpo/anchored", "sft"), params, start).lam_pool == (
        0.8
    )


def test_safety_first_takes_the_multiplier_of_its_first_step(
    run: Path, params: DualSearchParams
) -> None:
    swapped = row_of("sacpo", "reward_dpo/swapped", "safety_dpo/alone", rule="one_shot")
    assert context(swapped, params, {}).lam_start == 1.25
    assert trainings(swapped, TrainedPolicy(), TrainedPolicy()) == 2


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
    ascent = plan("row", row)
    params = dual_search.with_row(params.model_copy(update={"methods": {"row": row}}), "row")
    known = context(ascent, params, {})
    assert (known.lam_pool, known.lam_start) == (0.8, 0.6)
    assert trainings(ascent, TrainedPolicy(), TrainedPolicy()) == 0


def test_the_slater_radius_is_the_pools_or_the_given_one(
    run: Path, params: DualSearchParams
) -> None:
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(6, 8))
    cost = rng.normal(size=(6, 8))
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
    assert context(pd_dpo, params, STEPWISE).radius == pytest.approx(expected)
    fixed = params.model_copy(update={"slater_radius": 3.5})
    assert context(pd_dpo, fixed, STEPWISE).radius == 3.5
    grid = row_of("sacpo", "safety_dpo/stepwise", "reward_dpo/helpful")
    assert context(grid, params, STEPWISE).radius == float("inf")


def test_newton_begins_at_the_prices_that_its_start_paid(
    run: Path, params: DualSearchParams
) -> None:
    price = Price(Constraint("short", "length", 9.0), 0.1, 9.0)
    write_json("data/dual/dual.json", solved(prices=[price.as_dict()]))
    write_json("reports/metrics/sft.json", {"heldout_loss": None, "parameters": 1})
    dualign = row_of("dualign", "lagrangian_dpo/anchored", "sft")
    for source, prices in (("data/dual/dual.json", (0.1,)), ("params.yaml", (0.0,))):
        assert context(dualign, params, {"lam": 0.8, "lam_from": source}).prices == prices
    c_dpo = row_of("c_dpo", "lagrangian_dpo/bernoulli", "sft")
    start = {"lam": 0.8, "lam_from": "data/dual/dual.json"}
    assert context(c_dpo, params, start).prices == (), "its rule moves lambda alone"


def test_a_start_beyond_the_interval_is_told(
    run: Path, params: DualSearchParams, caplog: pytest.LogCaptureFixture
) -> None:
    pd_dpo = row_of("pd_dpo", "safety_dpo/stepwise", "reward_dpo/helpful")
    context(pd_dpo, params.model_copy(update={"slater_radius": 0.6}), STEPWISE)
    assert not caplog.records  # 1.2 is its end
    context(pd_dpo, params.model_copy(update={"slater_radius": 0.5}), STEPWISE)
    assert (
        "safety_dpo/stepwise is at lambda 1.2000, above the end of the interval: 2 rho = 1.0000"
        in caplog.text
    )

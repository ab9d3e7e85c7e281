"""The stage lagrangian_dpo: which multiplier it trains at, and what it hands to a search."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from dualign.core.artifacts import read_json, write_json, write_parquet
from dualign.core.errors import InfeasibleError, ParamsError
from dualign.core.schema import POOL, SCORED_PAIRS, SUPPORT, by_prompt, read_table, user
from dualign.data import world
from dualign.lm.models import (
    build_scratch,
    load_tokenizer,
    save,
    train_tokenizer,
)
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.math.constraints import Constraint, Price, with_priced_rewards
from dualign.math.dual.tilt import predict, soft_value
from dualign.math.losses import lagrangian_scale
from dualign.params import loading
from dualign.params.training import LagrangianDpoParams
from dualign.scoring import support as support_of
from dualign.stage import Run
from dualign.training import pairwise
from dualign.training.implicit_scores import Sources, scored_tables
from dualign.training.pairs import pool_pairs, pool_values, samples_of
from dualign.training.pairwise import train_pairwise
from stages import lagrangian_dpo
from stages.lagrangian_dpo import multiplier, own_answers
from tests.stages.conftest import save_scorers
from tests.tiny import TINY, on_cpu
from tests.written import safety, solved

RESOURCES = on_cpu(sampling_batch_size=8, scoring_batch_size=8, checkpoint_steps=100, log_steps=1)

SCRATCH = TINY.model_copy(update={"context": 512})
MODELS = ("sft", "reward_dpo/helpful", "safety_dpo/alone")
COEFFICIENT = 2.0
LIMIT = -0.2
SOLVED = solved(lam=0.25, lam_margin=0.4, target=-0.3)
PRICE = Price(Constraint("short", "length", 9.0), 0.1, 9.0)


def stage_params(root: Path, **run: Any) -> LagrangianDpoParams:
    """The shipped params, cut short, with one run `pecan` that differs from `bernoulli` in
    `run`.
    """
    content = copy.deepcopy(loading.read_yaml(root / "params.yaml"))
    section = content["lagrangian_dpo"]
    scorers = {"reward": "reward_dpo/helpful", "cost": "safety_dpo/alone"}
    section["runs"] = {
        **section["runs"],
        "pecan": {**section["runs"]["bernoulli"], **scorers, **run},
    }
    section["training"] |= {"max_steps": 2, "batch_size": 4, "max_length": 512}
    checked = loading.check(content, "my.yaml")["lagrangian_dpo"]
    assert isinstance(checked, LagrangianDpoParams)
    return checked


# --- the multiplier -------------------------------------------------------------------------------


@pytest.fixture
def pool() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    ids = np.repeat([f"{x}" for x in range(30)], 8)
    return pd.DataFrame(
        {"prompt_id": ids, "reward": rng.normal(size=240), "cost": rng.normal(size=240)}
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory but for data/dual/dual.json."""
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "data/dual/dual.json", {**SOLVED, "limit": LIMIT})
    return tmp_path


def test_a_number_is_taken_as_it_is(folder: Path, pool: pd.DataFrame, repo_root: Path) -> None:
    given = stage_params(repo_root, lam=0.7)
    assert multiplier("pecan", given.runs["pecan"], pool, given) == {
        "lam": 0.7,
        "lam_from": "params.yaml",
    }


def test_scorers_have_the_dual_of_the_pool(
    folder: Path, pool: pd.DataFrame, repo_root: Path
) -> None:
    given = stage_params(repo_root)
    expected = {"lam": 0.25, "lam_from": "data/dual/dual.json"}
    assert multiplier("bernoulli", given.runs["bernoulli"], pool, given) == expected


def test_a_multiplier_is_of_the_scores_that_the_labels_are_of(
    folder: Path, pool: pd.DataFrame, repo_root: Path
) -> None:
    """Pairs are labelled by scores as they are, as published; the pool's are doubted."""
    own = {key: SOLVED[key] for key in ("lam_low", "lam_high", "lam_margin", "target")}
    believed = {**own, "lam": 0.15, "prices": [PRICE.as_dict()]}
    write_json("data/dual/dual.json", {**SOLVED, "limit": LIMIT, "as_scored": believed})
    given = stage_params(repo_root)
    pairs = given.runs["bernoulli"]
    wary = pairs.model_copy(update={"data": "pool"})
    assert multiplier("it", pairs, pool, given)["lam"] == 0.15
    assert multiplier("it", wary, pool, given)["lam"] == 0.25
    assert lagrangian_dpo.prices_of("it", pairs) == [PRICE]
    assert lagrangian_dpo.prices_of("it", wary) == []


def test_the_stock_is_the_pools_or_an_target_for_implicit_scores(
    folder: Path, pool: pd.DataFrame, repo_root: Path
) -> None:
    given = stage_params(repo_root, lam="margin")
    stocked = given.runs["bernoulli"].model_copy(update={"lam": "margin"})
    assert multiplier("bernoulli", stocked, pool, given)["lam"] == 0.4
    lam = multiplier("pecan", given.runs["pecan"], pool, given)["lam"]
    cost = predict(
        by_prompt(pool, "reward"), by_prompt(pool, "cost"), lam, given.beta, by_prompt(pool, "cost")
    )
    assert cost.mean() == pytest.approx(SOLVED["target"], abs=1e-6)


def test_prices_are_charged_with_a_solved_multiplier_on_the_scorers_scores(
    folder: Path, repo_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_json("data/dual/dual.json", {**SOLVED, "limit": LIMIT, "prices": [PRICE.as_dict()]})
    given = stage_params(repo_root)
    runs = {
        name: given.runs["bernoulli"].model_copy(update={"lam": name})
        for name in ("dual", "margin")
    }
    for spec in runs.values():
        assert lagrangian_dpo.prices_of("it", spec) == [PRICE]
    by_hand = given.runs["bernoulli"].model_copy(update={"lam": 0.7})
    assert lagrangian_dpo.prices_of("it", by_hand) == []
    assert not caplog.records
    assert lagrangian_dpo.prices_of("pecan", given.runs["pecan"]) == []
    assert (
        "lagrangian_dpo.runs.pecan is scored by policies and ignores constraint.additional"
        in caplog.text
    )


def test_implicit_scores_have_a_dual_of_their_own(
    folder: Path, pool: pd.DataFrame, repo_root: Path
) -> None:
    given = stage_params(repo_root)
    found = multiplier("pecan", given.runs["pecan"], pool, given)
    lam, low, high = (found[key] for key in ("lam", "lam_low", "lam_high"))
    cost = predict(
        by_prompt(pool, "reward"), by_prompt(pool, "cost"), lam, given.beta, by_prompt(pool, "cost")
    )
    assert cost.mean() == pytest.approx(LIMIT, abs=1e-6)
    assert found["lam_from"] == "implicit scores" and 0 < low < lam < high


def test_implicit_scores_that_cannot_meet_the_limit_name_their_run(
    folder: Path, pool: pd.DataFrame, repo_root: Path
) -> None:
    given = stage_params(repo_root)
    with pytest.raises(
        InfeasibleError,
        match=r"^lagrangian_dpo\.runs\.pecan, scored by policies: constraint\.limit",
    ):
        multiplier("pecan", given.runs["pecan"], pool.assign(cost=1.0), given)


# --- the whole stage ------------------------------------------------------------------------------


def texts_of(question: str) -> list[str]:
    return [answer.text for answer in world.answers(question)]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the stages before PeCAN's would have left, on models of a few thousand weights."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    questions = world.prompts()[:3]
    texts = [texts_of(question) for question in questions]
    tokenizer = train_tokenizer([*questions, *texts[0]], 300)
    models = {name: build_scratch(SCRATCH, tokenizer, seed) for seed, name in enumerate(MODELS)}
    for name, model in models.items():
        save(model, tokenizer, Path("models") / name)

    def reference(question: str, text: str) -> float:
        prompt = encode_prompts(tokenizer, [user(question)])
        answer = encode_answers(tokenizer, [text])
        return float(log_probabilities(models["sft"], tokenizer, prompt, answer, batch_size=1))

    pool = [
        {
            "prompt_id": str(x),
            "prompt": user(question),
            "sample": i,
            "response": texts[x][i],
            "tokens": encode_answers(tokenizer, [texts[x][i]])[0],
            "length": 1,
            "ended": True,
            "logp_ref": reference(question, texts[x][i]),
            "reward": rng.normal(),
            "cost": rng.normal(),
        }
        for x, question in enumerate(questions)
        for i in range(4)
    ]
    columns = [f"{name}_{side}" for name in ("reward", "cost") for side in ("chosen", "rejected")]
    pairs = [
        {
            "pair_id": str(x),
            "prompt_id": str(x),
            "prompt": user(question),
            "chosen": texts[x][3],
            "rejected": texts[x][9],
            "source": "world",
            "split": "train",
            "kind": "helpful",
            **dict(zip(columns, rng.normal(size=len(columns)), strict=True)),
            "logp_ref_chosen": reference(question, texts[x][3]),
            "logp_ref_rejected": reference(question, texts[x][9]),
        }
        for x, question in enumerate(questions)
    ]
    write_parquet(Path("data/scored/pool.parquet"), pd.DataFrame(pool), POOL)
    write_parquet(Path("data/scored/scored_pairs.parquet"), pd.DataFrame(pairs), SCORED_PAIRS)
    write_json(Path("reports/metrics/safety_dpo/alone.json"), safety(coefficient=COEFFICIENT))
    return tmp_path


@pytest.mark.parametrize(
    ("data", "normalised", "rate"),
    [("pairs", False, None), ("pairs", True, 3e-3), ("pool", True, None)],
)
def test_pecan_trains_at_the_multiplier_of_its_own_scores(
    workspace: Path,
    repo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: str,
    normalised: bool,
    rate: float | None,
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        pairwise, "train_pairwise", lambda *args: seen.extend(args) or train_pairwise(*args)
    )
    pair_loss = {
        "labels": "soft",
        "normalised": normalised,
        "anchor": 0.3 if data == "pool" else 0.0,
        "nll": 0.0,
        "control": 0.0,
    }
    given = stage_params(repo_root, data=data, pair_loss=pair_loss, learning_rate=rate)
    sources = Sources(*MODELS[1:], Path("models"), Path("reports/metrics"))
    tokenizer = load_tokenizer("models/sft")
    tables = scored_tables(Path("data/scored"), sources, given.beta, tokenizer, RESOURCES)
    reward = by_prompt(tables.pool, "reward")
    cost = by_prompt(tables.pool, "cost")
    limit = float(
        predict(reward, cost, 0.5, given.beta, cost).mean()
    )  # so that the multiplier is 0.5
    write_json(Path("data/dual/dual.json"), solved(lam=0.25, limit=limit))
    lagrangian_dpo.main(Run("lagrangian_dpo", "pecan", given, RESOURCES))

    told = read_json(workspace / "reports/metrics/lagrangian_dpo/pecan.json")
    assert told["lam"] == pytest.approx(0.5, abs=1e-3) and told["lam_from"] == "implicit scores"
    assert (told["reward"], told["cost"]) == MODELS[1:]
    assert told["data"] == data
    assert told["lam_low"] <= told["lam"] <= told["lam_high"]

    _, _, pairs, loss, job = seen
    effective = given.training.learning_rate if rate is None else rate
    assert (
        told["pair_loss"] == pair_loss
        and told["learning_rate"] == job.training.learning_rate == effective
    )
    scale = lagrangian_scale(told["lam"], normalised)
    assert (loss.scale, loss.beta) == (pytest.approx(given.beta * scale), given.beta)
    if data == "pairs":
        gap = (tables.pairs["reward_chosen"] - tables.pairs["reward_rejected"]) - told["lam"] * (
            tables.pairs["cost_chosen"] - tables.pairs["cost_rejected"]
        )
        assert [pair.label for pair in pairs] == pytest.approx(
            (1 / (1 + np.exp(-scale * gap))).tolist(), abs=1e-6
        )
    assert (workspace / "models/lagrangian_dpo/pecan/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("reward", "cost", "expected"),
    [
        ("reward_model", "cost_model", False),
        ("reward_dpo/helpful", "cost_model", True),
        ("reward_model", "safety_dpo/alone", True),
    ],
)
def test_a_policy_in_place_of_a_scorer_makes_a_run_implicit(
    reward: str, cost: str, expected: bool
) -> None:
    spec = loading.load(
        LagrangianDpoParams, Path(__file__).resolve().parents[2] / "params.yaml"
    ).runs["anchored"]
    changed = spec.model_copy(update={"reward": reward, "cost": cost})
    assert lagrangian_dpo.implicit(changed) is expected


REFRESH = {"prompts": 2, "samples_per_prompt": 2, "max_steps": 3, "learning_rate": None}


@pytest.fixture
def scorers(workspace: Path) -> Path:
    """Scorers of random heads beside the policies."""
    tokenizer = load_tokenizer("models/sft")
    save_scorers(tokenizer, RESOURCES)
    write_json("reports/metrics/cost_model.json", {})
    write_json("data/dual/dual.json", solved(lam=0.25, prices=[PRICE.as_dict()]))
    return workspace


def refreshed(root: Path, soup: int = 1) -> LagrangianDpoParams:
    """The shipped params with a run `own` that trains on its own answers, on scores as they are."""
    content = copy.deepcopy(loading.read_yaml(root / "params.yaml"))
    section = content["lagrangian_dpo"]
    section["runs"]["own"] = {
        **section["runs"]["anchored"],
        "max_steps": 2,
        "refresh": REFRESH,
        "soup": soup,
    }
    section["training"] |= {"max_steps": 2, "batch_size": 4, "max_length": 512}
    content["pessimism"] |= {"reward": 0.0, "cost": 0.0}
    content["generation"]["max_new_tokens"] = 6
    checked = loading.check(content, "my.yaml")["lagrangian_dpo"]
    assert isinstance(checked, LagrangianDpoParams)
    return checked


def test_a_refresh_goes_on_with_scored_and_priced_answers_of_the_policy(
    scorers: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their reward is the scorer's less the price of their length, as the pool's, and their anchors
    use the pool's value.
    """
    seen: list[Any] = []
    monkeypatch.setattr(
        pairwise, "train_pairwise", lambda *args: seen.append(args) or train_pairwise(*args)
    )
    drawn: list[pd.DataFrame] = []
    monkeypatch.setattr(
        lagrangian_dpo, "own_answers", lambda *args: drawn.append(own_answers(*args)) or drawn[-1]
    )
    given = refreshed(repo_root)
    lagrangian_dpo.main(Run("lagrangian_dpo", "own", given, RESOURCES))
    first, second = seen
    answers = drawn[0]
    fresh = second[2]
    assert len(answers) == 4 and len(fresh) == 2
    assert [pair.prompt for pair in fresh] == [pair.prompt for pair in first[2][::2][:2]]

    pool = pd.read_parquet("data/scored/pool.parquet")
    reward = by_prompt(pool, "reward") - 0.1 * by_prompt(pool, "length")
    value = soft_value(reward, by_prompt(pool, "cost"), 0.25, given.beta)
    target = answers["reward"] - 0.1 * answers["length"] - 0.25 * answers["cost"]
    expected = target.to_numpy() - value[:2].repeat(2)
    found = [anchor for pair in fresh for anchor in pair.anchors]
    assert sorted(found) == pytest.approx(sorted(expected), abs=1e-6)

    told = read_json("reports/metrics/lagrangian_dpo/own.json")
    assert told["generated_tokens"] == answers["length"].sum() > 0
    assert told["learning_rate"] == given.runs["own"].learning_rate
    assert second[4].training.learning_rate == given.training.learning_rate
    curve = read_json("reports/curves/lagrangian_dpo/own.json")
    assert [row["step"] for row in curve] == [1, 2, 3, 4, 5]


def test_prices_are_on_the_costs_that_their_dual_was_solved_with(
    workspace: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A price on unsafe answers falls on those whose doubted cost is above 0 too."""
    price = Price(Constraint("rarely", "p_unsafe", 0.1), 2.0, 0.1)
    write_json("data/dual/dual.json", solved(lam=0.25, prices=[price.as_dict()]))
    support = pd.DataFrame({"length": [1, 2] * 50, "logp_ref": [-1.0, -1.5] * 50})
    write_parquet(Path("data/scored/support.parquet"), support, SUPPORT)
    seen: list[Any] = []
    monkeypatch.setattr(
        pairwise, "train_pairwise", lambda *args: seen.append(args) or train_pairwise(*args)
    )
    given = refreshed(repo_root)
    run = given.runs["own"].model_copy(update={"refresh": None})
    wary = given.pessimism.model_copy(update={"share": 0.1, "cost": 9.0})
    given = given.model_copy(update={"runs": {"own": run}, "pessimism": wary})
    lagrangian_dpo.main(Run("lagrangian_dpo", "own", given, RESOURCES))

    pool = read_table("data/scored/pool.parquet", POOL)
    doubted = support_of.doubted(pool, support_of.doubt(Path("data/scored"), pool, wary))
    assert ((doubted["cost"] > 0) != (pool["cost"] > 0)).any()
    charged = with_priced_rewards(doubted, [price])
    samples = samples_of(charged, load_tokenizer("models/sft"))
    value = pool_values(samples, 0.25, given.beta)
    assert seen[0][2] == pool_pairs(samples, value, 0.25, given.beta, given.seed)


def test_a_refresh_that_was_interrupted_trains_and_draws_nothing_twice(
    scorers: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("lagrangian_dpo", "own", refreshed(repo_root), RESOURCES)
    out = Path("models/lagrangian_dpo/own/model.safetensors")
    lagrangian_dpo.main(run)
    whole = out.read_bytes()
    shutil.rmtree(out.parent)

    trained: list[int] = []

    def train_once(*args: Any) -> Any:
        trained.append(len(args[2]))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train_pairwise(*args)

    monkeypatch.setattr(pairwise, "train_pairwise", train_once)
    with pytest.raises(KeyboardInterrupt):
        lagrangian_dpo.main(run)
    monkeypatch.setattr(lagrangian_dpo, "roll_out", None)
    lagrangian_dpo.main(run)
    assert len(trained) == 3 and out.read_bytes() == whole


def test_members_of_a_soup_draw_answers_of_their_own(scorers: Path, repo_root: Path) -> None:
    """Their mean is not what one alone would be, and the tokens of all are counted."""
    out = Path("models/lagrangian_dpo/own/model.safetensors")
    told: dict[int, dict[str, Any]] = {}
    weights: dict[int, dict[str, torch.Tensor]] = {}
    for count in (1, 2):
        lagrangian_dpo.main(Run("lagrangian_dpo", "own", refreshed(repo_root, count), RESOURCES))
        told[count] = read_json("reports/metrics/lagrangian_dpo/own.json")
        weights[count] = load_file(out)
    assert told[2]["generated_tokens"] > told[1]["generated_tokens"]
    assert [told[count]["trainings"] for count in (1, 2)] == [2, 4]
    assert told[2]["steps"] == told[1]["steps"]
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[1])


@pytest.mark.parametrize(
    "change", [{"data": "pairs"}, {"reward": "reward_dpo/helpful"}, {"cost": "safety_dpo/alone"}]
)
def test_a_refresh_without_the_pool_or_the_scorers_is_refused(
    repo_root: Path, change: dict[str, str]
) -> None:
    content = copy.deepcopy(loading.read_yaml(repo_root / "params.yaml"))
    row = content["lagrangian_dpo"]["runs"]["anchored"]
    row |= {"refresh": REFRESH, **change}
    if "data" in change:
        row["pair_loss"] |= {"anchor": 0.0, "nll": 0.0, "control": 0.0}
    with pytest.raises(ParamsError, match=r"lagrangian_dpo\.runs\.anchored.*refresh.*data: pool"):
        loading.check(content, "my.yaml")

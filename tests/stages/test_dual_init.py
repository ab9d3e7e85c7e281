"""The stage dual_init: what it writes, what it warns of, and how additional constraints reach the
labels of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import brentq
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import read_json, write_json, write_parquet
from dualign.core.schema import (
    DUAL_PROMPTS,
    POOL,
    PROMPTS,
    SCORED_PAIRS,
    SUPPORT,
    by_prompt,
    pair_id,
    prompt_id,
    read_table,
    user,
)  # fmt: skip
from dualign.data import world
from dualign.evaluation.rollout import Scorers, roll_out
from dualign.lm.models import build_scratch, save
from dualign.lm.tokens import answer_lengths, encode_prompts
from dualign.math.dual.advice import samples_for_ess
from dualign.math.dual.joint import solve_many
from dualign.math.dual.margin import certificate_margin, spread_of_means
from dualign.math.dual.root import root
from dualign.math.dual.tilt import (
    jackknife_weights,
    leave_one_out_value,
    predict,
    soft_value,
)
from dualign.math.losses import lagrangian_label
from dualign.params.base import PessimismParams, Resources
from dualign.params.dual import ConstraintSpec, DualInitParams
from dualign.params.loading import load
from dualign.params.training import LagrangianDpoParams
from dualign.stage import Run
from dualign.training import pairwise
from dualign.training.pairwise import train_pairwise
from stages import dual_init, lagrangian_dpo
from tests.stages.conftest import ROOT, save_scorers
from tests.tiny import TINY
from tests.written import held_out

LIMIT = -0.3


def rows(prompts: int = 60, samples: int = 8) -> list[dict[str, Any]]:
    """A pool whose more helpful answers are longer and tend to be more harmful."""
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(prompts, samples))
    cost = 0.6 * reward + rng.normal(size=reward.shape)
    length = np.round(20 + 3 * reward + 3 * rng.normal(size=reward.shape)).clip(1)
    return [
        {
            "prompt_id": prompt_id(user(f"q{x}")),
            "prompt": user(f"q{x}"),
            "sample": i,
            "response": "a",
            "tokens": [1],
            "length": int(length[x, i]),
            "ended": True,
            "logp_ref": -1.0,
            "reward": reward[x, i],
            "cost": cost[x, i],
        }
        for x in range(prompts)
        for i in range(samples)
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory with a scored pool, and what the cost model says of its zero."""
    monkeypatch.chdir(tmp_path)
    write_parquet("data/scored/pool.parquet", rows(), POOL)
    write_parquet("data/scored/support.parquet", held_out(), SUPPORT)
    write_json("reports/metrics/cost_model.json", {"zero_error": 0.05})
    return tmp_path


def run_of(resources: Resources, **changes: Any) -> Run[DualInitParams]:
    """The shipped params at a beta that leaves enough effective samples, with these changes."""
    params = load(DualInitParams, ROOT / "params.yaml")
    return Run(
        "dual_init",
        None,
        params.model_copy(update={"limit": LIMIT, "bootstrap": 50, **changes}),
        resources,
    )


def solved(run: Run[DualInitParams]) -> dict[str, Any]:
    dual_init.main(run)
    result: dict[str, Any] = read_json("data/dual/dual.json")
    return result


def scores() -> tuple[np.ndarray, np.ndarray]:
    pool = read_table("data/scored/pool.parquet", POOL)
    return by_prompt(pool, "reward"), by_prompt(pool, "cost")


def tilted(
    reward: np.ndarray, cost: np.ndarray, lam: float, beta: float, score: np.ndarray
) -> float:
    """The mean of `score` under exp((r - lambda c) / beta), by sums over each prompt's samples."""
    means = []
    for r, c, s in zip(reward, cost, score, strict=True):
        w = np.exp((r - lam * c - (r - lam * c).max()) / beta)
        means.append(float((w * s).sum() / w.sum()))
    return float(np.mean(means))


def left_out(of: Any, count: int) -> float:
    """The jackknife: n f - (n - 1) mean_i f_(-i), `of` being a function of the samples that are
    kept.
    """
    every = np.arange(count)
    return float(
        count * of(every) - (count - 1) * np.mean([of(np.delete(every, i)) for i in every])
    )


def without_bias(
    reward: np.ndarray, cost: np.ndarray, lam: float, beta: float, score: np.ndarray
) -> float:
    """`tilted`, with each sample left out in turn."""
    return left_out(
        lambda k: tilted(reward[:, k], cost[:, k], lam, beta, score[:, k]), cost.shape[1]
    )


def corrected(reward: np.ndarray, cost: np.ndarray, limit: float, beta: float) -> float:
    """The multiplier at which `without_bias` of the cost is the limit, by Brent's method."""
    return float(
        brentq(lambda x: without_bias(reward, cost, x, beta, cost) - limit, 0, 50, xtol=1e-11)
    )


@pytest.mark.usefixtures("folder")
def test_without_the_jackknife_the_multiplier_is_the_plain_root_of_the_papers(
    resources: Resources,
) -> None:
    result = solved(run_of(resources, jackknife=False))
    reward, cost = scores()
    plain = root(reward, cost, limit=LIMIT, beta=1.5, lambda_max=50)
    assert result["lam"] == pytest.approx(plain, abs=1e-12)
    assert tilted(reward, cost, result["lam"], 1.5, cost) == pytest.approx(LIMIT)
    assert result["half_drift"] > 0 and corrected(reward, cost, LIMIT, 1.5) < plain


@pytest.mark.usefixtures("folder")
def test_the_files_hold_the_solution_of_the_pool(resources: Resources) -> None:
    run = run_of(resources)
    result = solved(run)
    reward, cost = scores()
    beta = run.params.beta
    lam = result["lam"]
    assert lam == pytest.approx(corrected(reward, cost, LIMIT, beta), abs=1e-9)
    assert result["prices"] == [] and result["messages"] == []
    assert result["standardised"] == pytest.approx(
        {
            "reward_sd": np.sqrt(reward.var(1).mean()),
            "cost_sd": np.sqrt(cost.var(1).mean()),
            "beta": beta / np.sqrt(reward.var(1).mean()),
            "lam": lam * np.sqrt(cost.var(1).mean() / reward.var(1).mean()),
        }
    )
    halves = [
        without_bias(reward[:, h], cost[:, h], lam, beta, cost[:, h])
        for h in (slice(4), slice(4, 8))
    ]
    assert result["half_drift_cost"] == pytest.approx(np.mean(halves) - LIMIT)
    table = read_table("data/dual/prompts.parquet", DUAL_PROMPTS)
    pool = read_table("data/scored/pool.parquet", POOL)
    assert table["prompt_id"].tolist() == pool["prompt_id"].drop_duplicates().tolist()
    assert table["cost"].mean() == pytest.approx(predict(reward, cost, lam, beta, cost).mean())
    assert table["value"].to_numpy() == pytest.approx(soft_value(reward, cost, lam, beta))
    assert table["ess"].median() == pytest.approx(result["ess_median"])
    frontier = read_json("data/dual/frontier.json")
    assert frontier["cvar_level"] == run.params.cvar_level
    assert [row["lam"] for row in frontier["rows"]] == sorted({*run.params.grid, lam})
    at = next(row for row in frontier["rows"] if row["lam"] == lam)
    w = jackknife_weights(reward, cost, lam, beta)
    assert at["cost"] == pytest.approx((w * cost).sum(1).mean()) == pytest.approx(LIMIT)
    assert at["kl"] > table["kl"].mean()  # few samples leave a KL too small
    assert read_json("reports/metrics/dual_init.json")["lam_margin"] == result["lam_margin"]


@pytest.mark.usefixtures("folder")
def test_answers_off_the_support_are_doubted_in_the_dual_and_shown_as_scored(
    resources: Resources,
) -> None:
    """The best answer of every prompt is text that no pair is like."""
    pool = pd.DataFrame(rows())
    best = pool.groupby("prompt_id")["reward"].transform("max") == pool["reward"]
    write_parquet(
        "data/scored/pool.parquet",
        pool.assign(logp_ref=np.where(best, -1000.0, -6 * pool["length"])),
        POOL,
    )
    pessimism = PessimismParams(share=0.01, reward=2.0, cost=0.5)
    run = run_of(resources, pessimism=pessimism)
    result = solved(run)
    reward, cost = scores()
    drop = 2 * np.sqrt(reward.var(1).mean())
    rise = 0.5 * np.sqrt(cost.var(1).mean())
    doubted = (
        reward - drop * by_prompt(pool.assign(best=best), "best"),
        cost + rise * by_prompt(pool.assign(best=best), "best"),
    )
    beta = run.params.beta
    assert result["lam"] == pytest.approx(corrected(*doubted, LIMIT, beta), abs=1e-9)
    assert result["pessimism"] == pytest.approx(
        {"answers": 60, "degree": 1.0, "reward": drop, "cost": rise}
    )
    at = next(
        row for row in read_json("data/dual/frontier.json")["rows"] if row["lam"] == result["lam"]
    )
    w = jackknife_weights(*doubted, result["lam"], beta)
    assert at["reward"] == pytest.approx((w * reward).sum(1).mean())
    plain = solved(
        run_of(resources, pessimism=pessimism.model_copy(update={"reward": 0.0, "cost": 0.0}))
    )
    assert plain["lam"] == pytest.approx(corrected(reward, cost, LIMIT, beta), abs=1e-9)
    assert plain["lam"] != result["lam"] and plain["pessimism"] is None
    assert "as_scored" not in plain
    assert result["as_scored"] == {key: plain[key] for key in result["as_scored"]}


@pytest.mark.usefixtures("folder")
def test_the_stock_leaves_room_for_the_certificate_and_null_leaves_none(
    resources: Resources,
) -> None:
    run = run_of(resources, power=0.8)
    result = solved(run)
    reward, cost = scores()
    beta = run.params.beta
    lam = result["lam_margin"]
    assert lam > result["lam"] and result["target"] == pytest.approx(
        LIMIT - result["certificate_margin"]
    )
    assert without_bias(reward, cost, lam, beta, cost) == pytest.approx(result["target"])
    sd = spread_of_means(reward, cost, lam, beta, run.params.certify_samples)
    assert result["certificate_margin"] == pytest.approx(
        certificate_margin(sd, run.params.certify_prompts, delta=run.params.delta, power=0.8)
    )
    none = solved(run_of(resources, power=None))
    assert (none["target"], none["certificate_margin"], none["lam_margin"]) == (
        LIMIT,
        0.0,
        none["lam"],
    )


@pytest.mark.usefixtures("folder")
def test_lambda_moves_with_the_error_of_the_zero(resources: Resources) -> None:
    result = solved(run_of(resources))
    reward, cost = scores()
    ends = [corrected(reward, cost, LIMIT + e, 1.5) for e in (0.05, -0.05)]
    assert [result["lam_zero_low"], result["lam_zero_high"]] == pytest.approx(ends)
    assert result["lam_slope"] * -0.1 == pytest.approx(ends[1] - ends[0], rel=0.1)


@pytest.mark.usefixtures("folder")
def test_an_unknown_error_of_the_zero_moves_nothing(resources: Resources) -> None:
    write_json("reports/metrics/cost_model.json", {"zero_error": None})
    result = solved(run_of(resources))
    assert result["zero_error"] is result["lam_zero_low"] is result["lam_zero_high"] is None


@pytest.mark.usefixtures("folder")
def test_few_effective_samples_come_with_a_beta_and_a_number_of_samples(
    resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(resources, beta=0.5, min_ess=5.0)
    [message] = solved(run)["messages"]
    assert message in caplog.text
    beta = float(message.split("raise beta from 0.5 to ")[1].split(";")[0])
    assert (
        solved(run_of(resources, beta=1.03 * beta, min_ess=5.0))["messages"] == []
    )  # two digits of it are told
    wanted = float(message.split("draw ")[1].split(" ")[0])
    reward, cost = scores()
    lam = corrected(reward, cost, LIMIT, 0.5)
    assert wanted == round(samples_for_ess(reward, cost, lam, 0.5, 5.0))
    [hopeless] = solved(run_of(resources, beta=0.02, min_ess=7.9))["messages"]
    assert (
        "no beta gives as many at this limit" in hopeless
        and "more samples than 8 a prompt will hardly do" in hopeless
    )


@pytest.mark.usefixtures("folder")
def test_no_limit_makes_more_samples_count_than_there_are(resources: Resources) -> None:
    [slack, few] = solved(run_of(resources, beta=1e6, limit=50.0, min_ess=9.0))["messages"]
    assert "the limit is slack" in slack and "raise constraint.limit" not in few
    assert few.endswith("of 8 is below 9, so predictions lean on few samples: draw 9 samples a"
                        " prompt or more (now 8, score.samples_per_prompt)")  # fmt: skip


@pytest.mark.usefixtures("folder")
def test_a_stock_out_of_reach_is_told(resources: Resources) -> None:
    reward, cost = scores()
    limit = float(predict(reward, cost, 50.0, 1.5, cost).mean()) + 1e-3
    few = {"certify_prompts": 4, "min_ess": 0.1}
    [message] = solved(run_of(resources, power=0.8, limit=limit, **few))["messages"]
    assert message.startswith(
        "the target that leaves room for a certificate is out of the samples' reach: lam_margin"
        " takes"
    )


@pytest.mark.usefixtures("folder")
def test_a_limit_on_length_shortens_what_the_pool_predicts(resources: Resources) -> None:
    plain = solved(run_of(resources))
    free = next(r for r in read_json("data/dual/frontier.json")["rows"] if r["lam"] == plain["lam"])
    reward, cost = scores()
    length = by_prompt(read_table("data/scored/pool.parquet", POOL), "length")
    result = solved(
        run_of(resources, additional={"short": ConstraintSpec(quantity="length", limit=18.0)})
    )
    [found] = result["prices"]
    row = next(r for r in read_json("data/dual/frontier.json")["rows"] if r["lam"] == result["lam"])
    assert found["lam"] > 0 and found["predicted"] == pytest.approx(18.0, abs=1e-6)
    given = (reward - found["lam"] * length, cost, result["lam"], 1.5)
    assert without_bias(*given, length) == pytest.approx(18.0, abs=1e-5)
    assert without_bias(*given, cost) == pytest.approx(LIMIT)
    assert row["length"] < free["length"] - 1 and row["reward"] < free["reward"]
    w = jackknife_weights(*given)
    for name, score in (("reward", reward), ("length", length)):
        assert row[name] == pytest.approx(float((w * score).sum(1).mean()))


@pytest.mark.usefixtures("folder")
def test_without_the_jackknife_prices_are_those_of_the_joint_dual(resources: Resources) -> None:
    short = {"short": ConstraintSpec(quantity="length", limit=18.0)}
    result = solved(run_of(resources, additional=short, jackknife=False))
    [found] = result["prices"]
    reward, cost = scores()
    length = by_prompt(read_table("data/scored/pool.parquet", POOL), "length")
    joint = solve_many(reward, [cost, length], limits=[LIMIT, 18.0], beta=1.5, lambda_max=50)
    assert [result["lam"], found["lam"]] == pytest.approx(joint.lams.tolist(), abs=1e-7)


@pytest.mark.usefixtures("folder")
def test_a_limit_on_answers_that_do_not_end_is_met_on_the_pool(resources: Resources) -> None:
    """Against both limits solved at once, and the share of cut samples under the tilt by sums; cut
    at 22 tokens.
    """
    write_parquet(
        "data/scored/pool.parquet", [{**row, "ended": row["length"] < 22} for row in rows()], POOL
    )
    reward, cost = scores()
    cut = 1.0 - by_prompt(read_table("data/scored/pool.parquet", POOL), "ended")
    assert tilted(reward, cost, solved(run_of(resources))["lam"], 1.5, cut) > 0.2
    result = solved(
        run_of(resources, additional={"whole": ConstraintSpec(quantity="unended", limit=0.1)})
    )
    [found] = result["prices"]
    charged = reward - found["lam"] * cut
    given = (charged, cost, result["lam"], 1.5)
    assert without_bias(*given, cut) == pytest.approx(0.1, abs=1e-5)
    assert without_bias(*given, cost) == pytest.approx(LIMIT, abs=1e-5)


@pytest.mark.usefixtures("folder")
def test_p_unsafe_alone_has_a_price_and_a_limit_that_is_slack_none(resources: Resources) -> None:
    """By bisection of P(unsafe) under exp((r - price 1{c > 0}) / beta), each sample left out in
    turn; lambda is 0, and the message says which.
    """
    reward, cost = scores()
    unsafe = (cost > 0).astype(float)
    wanted = 0.5 * without_bias(reward, cost, 0.0, 1.5, unsafe)
    spec = ConstraintSpec(quantity="p_unsafe", limit=wanted)
    result = solved(run_of(resources, limit=100.0, additional={"rare": spec}, min_ess=0.1))
    low = 0.0
    high = 50.0
    for _ in range(80):
        middle = (low + high) / 2
        over = without_bias(reward, unsafe, middle, 1.5, unsafe) > wanted
        low, high = (middle, high) if over else (low, middle)
    [found] = result["prices"]
    assert (
        result["lam"] == 0.0 and result["slack"] and found["lam"] == pytest.approx(high, rel=1e-5)
    )
    assert result["messages"] == [
        "constraint.limit is slack: with the limits of constraint.additional it is kept, so lambda"
        " is 0"
    ]
    assert (
        "the limit is slack" in solved(run_of(resources, limit=100.0, min_ess=0.1))["messages"][0]
    )


# --- other KL weights -----------------------------------------------------------------------------


def predicted_at(run: Run[DualInitParams]) -> dict[float, dict[str, Any]]:
    dual_init.main(run)
    return {row["beta"]: row for row in read_json("data/dual/betas.json")["rows"]}


@pytest.mark.usefixtures("folder")
def test_another_kl_weight_meets_the_limit_at_its_own_multiplier(resources: Resources) -> None:
    """Against the root of the weighted cost by Brent's method and predictions by sums, each sample
    left out in turn.
    """
    run = run_of(resources, betas=[0.7, 4.0])
    rows = predicted_at(run)
    reward, cost = scores()
    length = by_prompt(read_table("data/scored/pool.parquet", POOL), "length")
    assert list(rows) == [0.7, 1.5, 4.0]
    for beta, row in rows.items():
        lam = corrected(reward, cost, LIMIT, beta)
        assert row["lam"] == pytest.approx(lam, abs=1e-9) and row["lam_low"] < lam < row["lam_high"]
        for name, score in {
            "reward": reward,
            "cost": cost,
            "p_unsafe": cost > 0,
            "length": length,
        }.items():
            mean = left_out(
                lambda k, b=beta, x=lam, s=score: tilted(reward[:, k], cost[:, k], x, b, s[:, k]), 8
            )
            assert row[name] == pytest.approx(mean, abs=1e-7), name
            assert row[f"{name}_low"] < mean < row[f"{name}_high"]
        w = np.exp((reward - lam * cost) / beta)
        assert row["ess"] == pytest.approx(np.median(w.sum(1) ** 2 / (w**2).sum(1)), abs=1e-7)
        tilt = left_out(lambda k, b=beta, x=lam: kl(reward[:, k], cost[:, k], x, b), 8)
        assert row["kl"] == pytest.approx(tilt, abs=1e-7)
    table = read_json("data/dual/betas.json")
    frontier = read_json("data/dual/frontier.json")["rows"]
    assert (table["beta"], table["min_ess"]) == (1.5, run.params.min_ess)
    [own] = [row for row in frontier if row["lam"] == rows[1.5]["lam"]]
    assert own.items() <= rows[1.5].items() and rows[1.5]["prices"] == []


def kl(reward: np.ndarray, cost: np.ndarray, lam: float, beta: float) -> float:
    """KL of the weights against equal ones, in the mean over prompts."""
    w = np.exp((reward - lam * cost) / beta)
    w /= w.sum(1, keepdims=True)
    return float((w * np.log(w * w.shape[1])).sum(1).mean())


@pytest.mark.usefixtures("folder")
def test_a_larger_kl_weight_stays_nearer_and_earns_less_at_the_limit(resources: Resources) -> None:
    write_parquet("data/scored/pool.parquet", rows(prompts=40, samples=64), POOL)
    found = list(predicted_at(run_of(resources, betas=[0.75, 1.0, 1.5, 3.0, 6.0])).values())
    for key, sign in (("kl", -1), ("reward", -1), ("lam", 1), ("ess", 1)):
        assert (np.diff([sign * row[key] for row in found]) > 0).all(), key


@pytest.mark.usefixtures("folder")
def test_a_kl_weight_that_cannot_meet_the_limit_says_so_and_none_leaves_no_table(
    resources: Resources,
) -> None:
    lams = {
        beta: row["lam"] for beta, row in predicted_at(run_of(resources, betas=[1.5, 6.0])).items()
    }
    top = (lams[1.5] + lams[6.0]) / 2
    found = predicted_at(run_of(resources, betas=[6.0], lambda_max=top))
    assert found[1.5]["lam"] == pytest.approx(lams[1.5])
    assert found[6.0].keys() == {"beta", "lam", "infeasible"} and found[6.0]["lam"] is None
    assert (
        f"at lambda_max {top:g} and beta 6 the predicted cost is still" in found[6.0]["infeasible"]
    )
    assert predicted_at(run_of(resources, betas=[])) == {}


@pytest.mark.usefixtures("folder")
def test_additional_constraints_are_solved_anew_at_each_kl_weight(resources: Resources) -> None:
    additional = {"short": ConstraintSpec(quantity="length", limit=18.0)}
    row = predicted_at(run_of(resources, betas=[3.0], additional=additional))[3.0]
    reward, cost = scores()
    length = by_prompt(read_table("data/scored/pool.parquet", POOL), "length")
    given = (reward - row["prices"][0] * length, cost, row["lam"], 3.0)
    assert without_bias(*given, length) == pytest.approx(18.0, abs=1e-5)
    w = jackknife_weights(*given)
    assert row["reward"] == pytest.approx((w * reward).sum(1).mean())


# --- through the stages, on a tiny model ----------------------------------------------------------

QUESTIONS = world.prompts()[::500]


@pytest.fixture
def tiny(
    tokenizer: PreTrainedTokenizerBase,
    resources: Resources,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pool of a tiny model that ends most answers early, scored by two random scorers, and some
    scored pairs.
    """
    monkeypatch.chdir(tmp_path)
    policy = build_scratch(TINY, tokenizer, 0)
    with torch.no_grad():  # the logit of EOS is about 4, those of 300 others about 0
        prompt = torch.tensor(encode_prompts(tokenizer, [user(QUESTIONS[0])]))
        state = policy.model(input_ids=prompt).last_hidden_state[0].mean(0)
        policy.lm_head.weight[tokenizer.eos_token_id] = 4 * state / (state @ state)
    save(policy, tokenizer, Path("models/sft"))
    save_scorers(tokenizer, resources)
    scorers = Scorers.load(resources)
    prompts = pd.DataFrame(
        [{"prompt_id": prompt_id(user(q)), "prompt": user(q), "source": "world"} for q in QUESTIONS]
    )
    write_parquet("data/prepared/pool.parquet", prompts, PROMPTS)
    pool = roll_out(scorers.reference, prompts, scorers, count=6, max_new_tokens=12, seed=3)
    write_parquet("data/scored/pool.parquet", pool, POOL)
    scores = ("reward", "cost", "logp_ref")
    columns = [f"{name}_{side}" for name in scores for side in ("chosen", "rejected")]
    pairs = [
        {
            "pair_id": pair_id(user(q), "yes indeed, so it is", "no"),
            "prompt_id": prompt_id(user(q)),
            "prompt": user(q),
            "chosen": "yes indeed, so it is",
            "rejected": "no",
            "source": "world",
            "split": "train",
            "kind": "helpful",
            **dict.fromkeys(columns, 0.1),
        }
        for q in QUESTIONS
    ]
    write_parquet("data/scored/scored_pairs.parquet", pairs, SCORED_PAIRS)
    write_parquet("data/scored/support.parquet", [{"length": 5, "logp_ref": -900.0}] * 200, SUPPORT)
    write_json("reports/metrics/cost_model.json", {"zero_error": None})


@pytest.mark.usefixtures("one_thread", "tiny")
def test_a_limit_on_length_reaches_the_labels_of_a_training(
    resources: Resources, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = read_table("data/scored/pool.parquet", POOL)
    beta = 0.1 * float(
        pool.groupby("prompt_id")["reward"].std().mean()
    )  # random scorers hardly tell answers apart
    changes = {"beta": beta, "limit": float(pool["cost"].max()) + 1.0, "power": None}
    length = by_prompt(pool, "length")

    def predicted(price: float) -> float:
        """The mean length at lambda = 0, which the limit leaves slack."""
        tilt = by_prompt(pool, "reward") - price * length
        return float(predict(tilt, tilt, 0.0, beta, length).mean())

    limit = (
        predicted(0.0) + float(length.min(1).mean())
    ) / 2  # half of the way to the shortest samples
    additional = {"short": ConstraintSpec(quantity="length", limit=limit)}
    result = solved(run_of(resources, **changes, additional=additional, jackknife=False))
    [found] = result["prices"]
    assert found["lam"] > 0 and predicted(found["lam"]) == pytest.approx(limit, abs=1e-5)

    seen: list[Any] = []
    monkeypatch.setattr(
        pairwise, "train_pairwise", lambda *args: seen.append(args[2]) or train_pairwise(*args)
    )
    given = load(LagrangianDpoParams, ROOT / "params.yaml")
    training = given.training.model_copy(update={"max_steps": 1, "batch_size": 2})
    once = given.runs["anchored"].model_copy(update={"refresh": None, "soup": 1})
    runs = {**given.runs, "anchored": once}
    given = given.model_copy(update={"training": training, "beta": beta, "runs": runs})
    for name in ("anchored", "bernoulli"):
        lagrangian_dpo.main(Run("lagrangian_dpo", name, given, resources))
    on_pool, on_pairs = seen
    tilt = by_prompt(pool, "reward") - found["lam"] * length  # lambda itself is 0
    values = leave_one_out_value(tilt, tilt, 0.0, given.beta)
    anchors = [anchor for pair in on_pool for anchor in pair.anchors]
    assert sorted(anchors) == pytest.approx(sorted((tilt - values).ravel().tolist()), abs=1e-6)
    long, short = answer_lengths(tokenizer, ["yes indeed, so it is", "no"])
    expected = lagrangian_label(
        torch.tensor([-found["lam"] * (long - short)]), torch.zeros(1), 0.0, 1.0
    )
    assert [pair.label for pair in on_pairs] == pytest.approx(
        [float(expected)] * len(QUESTIONS), abs=1e-6
    )

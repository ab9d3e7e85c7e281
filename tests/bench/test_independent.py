"""What survives of a tilt's gain: against brute force and known correlations; the command on a tiny
base.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML
from scipy.optimize import brentq

from bench import independent, survival
from bench.independent import Settings
from bench.survival import BELIEVED, MEASURES, Plan, Rule, Side
from dualign.core.errors import DualignError
from dualign.core.schema import user
from dualign.data import world
from dualign.lm.models import build_scratch, save, train_tokenizer
from dualign.params.loading import check, read_yaml
from dualign.scoring.support import Doubt, Support
from tests.e2e.warm import warm
from tests.shipped import preset
from tests.tiny import TINY

PLAN = Plan(
    samples=8, few=4, room=0.3, weights=(1.0,), beta=0.7, lambda_max=50.0, resamples=40, seed=0
)
Array = np.ndarray


def side(
    reward: Array, cost: Array, doubted: Array | None = None, second: Array | None = None
) -> Side:
    reward, cost = (score - score.mean(1, keepdims=True) for score in (reward, cost))
    return Side(
        reward, cost, {0.01: reward if doubted is None else doubted}, second, (0.5, 2.0), 0.25
    )


def drawn(seed: int, prompts: int = 10, samples: int = 8) -> Side:
    rng = np.random.default_rng(seed)
    return side(rng.normal(size=(prompts, samples)), 0.4 * rng.normal(size=(prompts, samples)))


def by_hand(rule: Rule, own: Side, other: Side, plan: Plan, share: Array) -> Array:
    """The same number by loops: one prompt, one block, one answer at a time."""

    def tilted(x: int, start: int, lam: float) -> Array:
        block = slice(start, start + rule.samples)
        weight = np.exp((rule.reward[x, block] - lam * own.cost[x, block]) / plan.beta)
        return np.asarray(weight / weight.sum())

    prompts, samples = own.reward.shape
    limit = -rule.room * own.cost.std()
    found = np.zeros((4, prompts))
    for start in range(0, samples, rule.samples):
        for parity in (0, 1):
            fit = [x for x in range(prompts) if x % 2 == parity]

            def excess(lam: float, start: int = start, fit: list[int] = fit) -> float:
                costs = [
                    tilted(x, start, lam) @ own.cost[x, start : start + rule.samples] for x in fit
                ]
                return float(np.average(costs, weights=share[fit])) - limit

            lam = brentq(excess, 0, 50) if excess(0) > 0 else 0.0
            for x in set(range(prompts)) - set(fit):
                for i, score in enumerate((rule.own, own.cost, other.reward, other.cost)):
                    values = score[x, start : start + rule.samples] / score.std()
                    found[i, x] += tilted(x, start, lam) @ values
    return found / (samples // rule.samples)


@pytest.mark.parametrize(("samples", "room"), [(8, 0.3), (4, 0.3), (2, 0.02)])
def test_changes_are_those_of_brute_force(samples: int, room: float) -> None:
    own = drawn(1)
    other = drawn(2)
    share = np.random.default_rng(3).uniform(0.5, 1.5, 10)
    rule = Rule(0.6 * own.reward + 0.1, samples, own.reward, room)
    found = survival.changes(rule, own, other, PLAN, share)
    assert found[:4] == pytest.approx(by_hand(rule, own, other, PLAN, share), abs=1e-8)
    assert (found[4] >= 0).all()


def test_without_a_limit_the_multiplier_is_zero() -> None:
    own = drawn(1)
    other = drawn(2)
    rule = Rule(own.reward, 8, own.reward, -np.inf)
    weight = np.exp(own.reward / PLAN.beta)
    weight /= weight.sum(1, keepdims=True)
    gain = (weight * own.reward / own.reward.std()).sum(1)
    assert survival.changes(rule, own, other, PLAN, np.ones(10))[0] == pytest.approx(gain)


def test_both_roles_are_averaged_before_the_ratio() -> None:
    sides = [drawn(1), drawn(2)]
    share = np.full(10, 0.1)
    found = survival.measures(sides, PLAN, share)
    first = survival.rules_of(sides[0], PLAN)[BELIEVED][0]
    alone = survival.changes(first, sides[0], sides[1], PLAN, share).mean(1)
    assert found[0, 0, :5] == pytest.approx(alone)
    assert found[:, 2, :5] == pytest.approx((found[:, 0, :5] + found[:, 1, :5]) / 2)
    assert found[:, 2, 5] == pytest.approx(found[:, 2, 2] / found[:, 2, 0])
    assert found[:, 2, 6] == pytest.approx(found[:, 2, 3] / found[:, 2, 1])


def test_where_one_name_has_two_slopes_their_mean_is_meant() -> None:
    own = drawn(1)
    other = drawn(2)
    names = list(survival.rules_of(own, PLAN))
    place = names.index("believed, slope by half of the held-out pairs")
    share = np.full(10, 0.1)
    rules = [Rule(own.reward * half, 8, own.reward, 0.3) for half in (0.5, 2.0)]
    each = [survival.changes(rule, own, other, PLAN, share).mean(1) for rule in rules]
    assert survival.measures([own, other], PLAN, share)[place, 0, :5] == pytest.approx(
        np.mean(each, axis=0)
    )


@pytest.mark.parametrize("correlation", [1.0, 0.6, 0.0])
def test_the_share_is_the_correlation_where_the_other_is_the_same_but_for_noise(
    correlation: float,
) -> None:
    rng = np.random.default_rng(4)
    first, noise, costs = rng.normal(size=(3, 400, 24))
    second = correlation * first + np.sqrt(1 - correlation**2) * noise
    sides = [side(first, costs), side(second, costs)]
    found = survival.measures(sides, replace(PLAN, samples=24), np.full(400, 1 / 400))
    rows = dict(zip(survival.rules_of(sides[0], PLAN), found[:, 2], strict=True))
    assert rows[BELIEVED][MEASURES.index("reward_share")] == pytest.approx(correlation, abs=0.06)
    assert rows[BELIEVED][MEASURES.index("cost_share")] == pytest.approx(1, abs=1e-9)
    assert rows[BELIEVED][MEASURES.index("own_cost")] == pytest.approx(-0.3, abs=0.05)


def test_a_penalty_on_what_one_pair_alone_overrates_raises_the_share() -> None:
    rng = np.random.default_rng(5)
    truth, costs = rng.normal(size=(2, 60, 8))
    broken = rng.random((60, 8)) < 0.1
    sides = [side(truth + 3 * broken, costs, truth), side(truth, costs, truth)]
    rows = {row["rule"]: row for row in survival.judged(sides, PLAN)}
    doubted = rows["pessimism as in the params"]
    assert doubted["more"]["reward_share"][1] > 0.02 and doubted["more"]["reward"][0] > 0
    assert doubted["reward_share"][0] == pytest.approx(
        rows[BELIEVED]["reward_share"][0] + doubted["more"]["reward_share"][0]
    )


def test_intervals_resample_prompts_and_the_yardstick_differs_from_itself_by_nothing() -> None:
    one = drawn(1, prompts=2)
    same = [
        side(np.tile(each.reward[:1], (12, 1)), np.tile(each.cost[:1], (12, 1)))
        for each in (one, drawn(2))
    ]
    for row in survival.judged(
        same, replace(PLAN, few=8)
    ):  # prompts that are all alike: nothing varies
        assert np.ptp(row["reward"]) < 1e-9 and np.ptp(row["reward_share"]) < 1e-6
    rows = survival.judged([drawn(1, 12), drawn(2, 12)], replace(PLAN, room=0.1))
    assert rows[0]["rule"] == BELIEVED and all(
        rows[0]["more"][key] == [0, 0, 0] for key in MEASURES
    )
    assert all(row["reward"][1] < row["reward"][0] < row["reward"][2] for row in rows)


def test_an_ensemble_is_lowered_by_its_standard_deviation_and_judged_by_its_mean() -> None:
    own = drawn(1)
    both = replace(own, second=drawn(3).reward)
    rules = survival.rules_of(both, PLAN)
    stack = np.stack([both.reward, drawn(3).reward])
    (lowered,) = rules["the same less 1 x their spread"]
    assert lowered.reward == pytest.approx(stack.mean(0) - stack.std(0))
    assert lowered.own == pytest.approx(stack.mean(0))
    assert "mean of two reward models" not in survival.rules_of(own, PLAN)


def test_answers_off_the_support_are_counted_and_described() -> None:
    found = Doubt(Support((10.0, 0.0, 0.0), (1.0, 0.0, 0.0), 1.0, 2.0), 3.0, 0.0)
    surprise = np.array([10.0, 11.0, 15.0, 9.0])
    pool = pd.DataFrame(
        {
            "prompt_id": ["a", "a", "b", "b"],
            "length": [4, 8, 5, 3],
            "ended": True,
            "logp_ref": -surprise,
        }
    )
    rewards = side(np.array([[0.0, 2.0], [6.0, 0.0]]), np.zeros((2, 2)))
    off, on = survival.unlike(pool, [rewards, rewards], found)
    assert (off["count"], off["prompts"], off["tokens"], off["z"]) == (1, 1, 5, 5)
    assert off["nats a token"] == 3 and off["reward by A"] == pytest.approx(3 / np.sqrt(5))
    assert on["count"] == 3 and on["tokens"] == 4 and on["z"] == pytest.approx(0)
    none, _ = survival.unlike(pool.assign(logp_ref=-10.0), [rewards, rewards], found)
    assert none["count"] == 0 and none["z"] is None


# --- rows and params ------------------------------------------------------------------------------


def test_halves_share_no_training_question_and_all_held_out_pairs() -> None:
    questions = [f"question {i}" for i in range(40)]
    prompts = [user(text) for text in questions]
    longer = [
        [*user(text), {"role": "assistant", "content": "yes"}, *user("and?")] for text in questions
    ]
    pairs = pd.DataFrame({"prompt": [*prompts, *longer], "split": ["heldout", *["train"] * 39] * 2})
    halves = [independent.of_half(pairs, half) for half in (0, 1)]
    train = [half[half["split"] == "train"] for half in halves]
    asked = [set(own["prompt"].map(lambda prompt: prompt[0]["content"])) for own in train]
    assert not asked[0] & asked[1] and len(asked[0] | asked[1]) == 39
    assert sum(map(len, train)) == 78 and min(map(len, train)) > 20
    assert all((half["split"] == "heldout").sum() == 2 for half in halves)


def test_the_params_of_the_runs_are_valid_and_hold_what_was_asked(
    repo_root: Path, tmp_path: Path
) -> None:
    settings = Settings(
        data=str(tmp_path), base=str(tmp_path), params=str(repo_root / "params/smollm2-cpu.yaml")
    )
    content = read_yaml(independent.edited(settings, tmp_path))
    check(content, "run.yaml")
    assert content["prepare"]["folder"] == content["sft"]["base"] == str(tmp_path)
    assert (
        content["score"]["samples_per_prompt"] == 24
        and content["evaluate"]["samples_per_prompt"] != 24
    )
    before = preset("smollm2-cpu")
    assert content["reward_model"] == before["reward_model"] and content["beta"] == before["beta"]


def test_folders_and_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DualignError, match=r"--data '' is no folder"):
        independent.laboratories(Settings(base=str(tmp_path)))
    with pytest.raises(DualignError, match="--samples a multiple"):
        Settings(data=str(tmp_path), base=str(tmp_path), samples=20)
    with pytest.raises(DualignError, match="--prompts must be 4 to --reserved"):
        Settings(data=str(tmp_path), base=str(tmp_path), prompts=100)


# --- the command ----------------------------------------------------------------------------------


def tiny_base(folder: Path) -> None:
    """A base of a few thousand weights that has seen nothing."""
    texts = [row["response_0"] for row in world.pku_rows(200, seed=1, sharpness=1.0)]
    tokenizer = train_tokenizer(texts, 300)
    scratch = TINY
    save(build_scratch(scratch, tokenizer, 0), tokenizer, folder)


def small_params(source: Path, target: Path) -> None:
    content: dict[str, Any] = YAML().load(source)
    content["prepare"]["world"] |= {"sft_rows": 100, "helpful_pairs": 800, "safety_pairs": 800}
    content["prepare"] |= {
        "search_prompts": 4,
        "certify_prompts": 4,
        "pool_prompts": 4,
        "heldout_share": 0.2,
    }
    content["dual_search"]["prompts"] = content["certify"]["prompts"] = 4
    content["certify"]["labels"] = content["certify"]["screen"] = None
    for name in ("reward_model", "cost_model"):
        content[name]["training"] |= {"max_steps": 20}
    with target.open("w") as file:
        YAML().dump(content, file)


@pytest.mark.bench
@pytest.mark.slow
def test_the_command_runs_is_taken_up_and_tells_no_folder(
    repo_root: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny_base(tmp_path / "base")
    small_params(repo_root / "params.yaml", tmp_path / "small.yaml")
    (tmp_path / "rows").mkdir()
    options = (
        f"--data {tmp_path}/rows --base {tmp_path}/base --params {tmp_path}/small.yaml --work"
        f" {tmp_path}/work "
    )
    options += (
        "--reserved 8 --prompts 6 --samples 8 --few 4 --room 0.05 --seed 8 --resamples 10"
        f" --second 1 --out {tmp_path}/out"
    )
    with warm(tmp_path_factory.mktemp("warm")) as python:
        monkeypatch.setattr(sys, "executable", str(python / "python"))
        assert independent.main(options.split()) == 0, caplog.text
    page = (tmp_path / "out/independent.md").read_text()
    content = json.loads((tmp_path / "out/independent.json").read_text())
    assert content["command"] in page and str(tmp_path / "base") not in page + json.dumps(content)
    assert sum(row["count"] for row in content["pool"]) == 48
    assert "mean of two reward models" in page and len(content["rules"]) == len(
        {r["rule"] for r in content["rules"]}
    )
    caplog.clear()
    assert independent.main(options.split()) == 0 and "reward_model" not in caplog.text
    assert json.loads((tmp_path / "out/independent.json").read_text()) == content

"""Sections that do not fit together, named in one line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from dualign.core.errors import ParamsError
from dualign.params import loading
from dualign.params.evaluate import EvaluateParams
from dualign.params.models import SftParams
from dualign.params.training import LagrangianDpoParams
from tests.params.mistakes import Content, drop, put, refusal
from tests.shipped import preset

ROOT = Path(__file__).resolve().parents[2]


def test_a_search_must_start_from_a_model_that_a_stage_writes(content: Content) -> None:
    message = refusal(put(content, "methods.sacpo.start", "safety_dpo/nowhere"))
    assert message.startswith(
        "methods.sacpo.start: no stage writes models/safety_dpo/nowhere; one of "
    )
    assert "safety_dpo/stepwise" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reward_dpo.runs.helpful.reference", "safety_dpo/nowhere"),
        ("reward_dpo.runs.helpful.margin", "safety_dpo/nowhere"),
        ("reward_dpo.runs.helpful.reference", "reward_dpo/helpful"),
        ("safety_dpo.runs.alone.reference", "reward_dpo/nowhere"),
        ("safety_dpo.runs.alone.reference", "reward_dpo"),
    ],
)
def test_a_reference_must_be_a_model_that_the_other_stage_writes(
    content: Content, key: str, value: str
) -> None:
    message = refusal(put(content, key, value))
    assert message.startswith(f"{key}: {value!r} is not one of [") and "'sft'" in message


def test_a_base_in_4_bits_is_one_for_all_and_never_trained_itself(content: Content) -> None:
    content["lora"] |= {"rank": 4, "quantise": "nf4"}
    assert loading.check(content, "my.yaml")
    content["reward_model"]["lora"] = {"quantise": None}
    assert refusal(content).startswith("reward_model.lora.quantise: all stages share one base")
    content["reward_model"]["lora"] = {"rank": 0}
    assert refusal(content).startswith("reward_model.lora.rank: 0 trains all weights")
    content["reward_model"]["backbone"] = "another"
    assert loading.check(content, "my.yaml")
    content["lora"]["rank"] = 0
    assert "lora.rank: 0 trains all weights" in refusal(content)


def test_runs_that_wait_for_each_other_are_refused(content: Content) -> None:
    message = refusal(put(content, "reward_dpo.runs.helpful.reference", "safety_dpo/stepwise"))
    assert message.startswith("runs wait for each other: ") and message.endswith(
        "set one reference to sft"
    )
    assert "reward_dpo/helpful" in message and "safety_dpo/stepwise" in message


def test_either_order_of_the_two_steps_is_allowed(content: Content) -> None:
    helpful = content["reward_dpo"]["runs"]["helpful"]
    content["reward_dpo"]["runs"]["second"] = helpful | {
        "reference": "safety_dpo/alone",
        "margin": "safety_dpo/alone",
    }
    content["evaluate"]["policies"]["second"] = "reward_dpo/second"
    loaded = loading.check(content, "my.yaml")["reward_dpo"]
    assert loaded.runs["second"].reference == "safety_dpo/alone"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reference", "reward_dpo/helpful"),
        ("loss_type", "ipo"),
        ("loss_type", "kto"),
        ("clip", 5.0),
    ],
)
def test_a_margin_policy_is_one_of_plain_safety_dpo(content: Content, key: str, value: Any) -> None:
    """The cost that MODPO's margin stands for is the log-ratio to sft of no other policy."""
    helpful = content["reward_dpo"]["runs"]["helpful"]
    alone = content["safety_dpo"]["runs"]["alone"]
    content["reward_dpo"]["runs"]["modpo"] = helpful | {"margin": "safety_dpo/alone"}
    content["evaluate"]["policies"]["modpo"] = "reward_dpo/modpo"
    loading.check(content, "my.yaml")
    alone[key] = value
    message = refusal(content)
    assert message.startswith(
        "reward_dpo.runs.modpo.margin: 'safety_dpo/alone' is not one of ['sft'] (none, or a "
    )


def test_a_search_keeps_the_reference_of_its_start(content: Content) -> None:
    """But a naive merge, whose start is safety DPO from the reference policy, has a partner of its
    own.
    """
    message = refusal(put(content, "methods.sacpo.reference", "sft"))
    assert message.startswith(
        "methods.sacpo.reference is 'sft', but safety_dpo/stepwise was trained against "
    )
    content["methods"]["sacpo"]["reference"] = content["safety_dpo"]["runs"]["stepwise"][
        "reference"
    ]
    assert refusal(put(content, "methods.c_dpo.reference", "safety_dpo/alone")).startswith(
        "methods.c_dpo.reference is"
    )
    put(content, "methods.c_dpo.reference", "sft")
    message = refusal(put(content, "methods.sacpo.reference", "nowhere"))
    assert message.startswith("methods.sacpo.reference: no stage writes models/nowhere")
    content["methods"]["sacpo"]["reference"] = content["safety_dpo"]["runs"]["stepwise"][
        "reference"
    ]
    put(content, "methods.p_sacpo.start", "safety_dpo/alone")
    loading.check(content, "my.yaml")
    assert "safety_dpo/alone was trained against 'sft'" in refusal(
        put(content, "methods.sacpo.start", "safety_dpo/alone")
    )


SPEC: Content = {
    "learning_rate": None,
    "pair_loss": {"labels": "soft", "normalised": False, "anchor": 0.3, "nll": 2.0},
}


def on_the_path(content: Content) -> Content:
    """Two policies of the path, and a row that merges them."""
    content["lambda_path"]["runs"] = {
        "slack": {**SPEC, "lam": 0.0, "begin": "sft"},
        "strict": {**SPEC, "lam": 3.0, "begin": "lambda_path/slack"},
    }
    ends = {"start": "lambda_path/strict", "reference": "lambda_path/slack"}
    content["methods"]["dualign"] = {"rule": "merge", **ends}
    return content


def test_a_search_merges_two_policies_of_the_path_the_stricter_one_as_its_start(
    content: Content,
) -> None:
    loading.check(on_the_path(content), "my.yaml")
    turned = put(copy.deepcopy(content), "methods.dualign.start", "lambda_path/slack")
    said = (
        "methods.dualign: start and reference must both be runs of lambda_path, and the start's lam"
        " must be the larger"
    )
    assert refusal(turned).startswith(said)
    assert refusal(put(copy.deepcopy(content), "methods.dualign.reference", "sft")).startswith(said)
    assert refusal(put(copy.deepcopy(content), "lambda_path.runs.slack.lam", 3.0)).startswith(said)
    assert refusal(put(content, "methods.dualign.start", "lambda_path/none")).startswith(
        "methods.dualign.start: no stage"
    )


def test_a_start_of_its_own_is_merged_with_plain_dpo_on_helpfulness(content: Content) -> None:
    merge = {"rule": "merge", "start": "lagrangian_dpo/anchored", "reference": "reward_dpo/helpful"}
    content["methods"]["dualign"] = merge
    loading.check(content, "my.yaml")
    put(content, "reward_dpo.runs.helpful.clip", 2.0)
    assert refusal(content).startswith(
        "methods.dualign.reference: 'reward_dpo/helpful' is no plain DPO from sft"
    )
    content["methods"]["dualign"] = {**merge, "rule": "newton"}
    assert "lagrangian_dpo/anchored was trained against 'sft'" in refusal(content)


@pytest.mark.parametrize("begin", ["lambda_path/none", "reward_dpo/helpful"])
def test_the_path_begins_at_the_reference_or_goes_on(content: Content, begin: str) -> None:
    message = refusal(put(on_the_path(content), "lambda_path.runs.strict.begin", begin))
    assert (
        message.startswith(f"lambda_path.runs.strict.begin: {begin!r} is not one of [")
        and "'sft'" in message
    )


def test_runs_of_the_path_do_not_wait_for_each_other(content: Content) -> None:
    message = refusal(
        put(on_the_path(content), "lambda_path.runs.slack.begin", "lambda_path/strict")
    )
    assert message.startswith("runs wait for each other: ") and message.endswith(
        "let one begin at sft"
    )


def test_only_policies_that_a_stage_writes_can_be_evaluated(content: Content) -> None:
    message = refusal(put(content, "evaluate.policies.other", "aligned/nothing"))
    assert message.startswith("evaluate.policies.other: no stage writes models/aligned/nothing")


@pytest.mark.parametrize(
    ("reward", "cost"),
    [
        ("reward_dpo/helpful", "safety_dpo/alone"),
        ("reward_dpo/helpful", "cost_model"),
        ("reward_model", "safety_dpo/alone"),
    ],
)
def test_policies_may_stand_in_for_scorers(content: Content, reward: str, cost: str) -> None:
    runs = content["lagrangian_dpo"]["runs"]
    runs["pecan"] = {**runs["bernoulli"], "reward": reward, "cost": cost}
    checked = loading.check(content, "my.yaml")["lagrangian_dpo"]
    assert isinstance(checked, LagrangianDpoParams)
    assert (checked.runs["pecan"].reward, checked.runs["pecan"].cost) == (reward, cost)


def test_robust_dpo_gives_scores_as_dpo_does(content: Content) -> None:
    content["lagrangian_dpo"]["runs"]["pecan"] = {
        **content["lagrangian_dpo"]["runs"]["bernoulli"],
        "reward": "reward_dpo/helpful",
        "cost": "safety_dpo/alone",
    }
    for section, run in (("reward_dpo", "helpful"), ("safety_dpo", "alone")):
        content[section]["runs"][run] |= {"loss_type": "robust", "epsilon": 0.1}
    loading.check(content, "my.yaml")


def test_only_plain_dpo_gives_scores(content: Content) -> None:
    """IPO and KTO, a clip, SafeDPO's offset: their log-ratios are neither r nor c."""
    content["lagrangian_dpo"]["runs"]["pecan"] = {
        **content["lagrangian_dpo"]["runs"]["bernoulli"],
        "reward": "reward_dpo/helpful",
        "cost": "safety_dpo/alone",
    }
    for section, run, key, value in (
        ("reward_dpo", "helpful", "loss_type", "ipo"),
        ("reward_dpo", "helpful", "safe_offset", 10.0),
        ("reward_dpo", "helpful", "clip", 5.0),
        ("safety_dpo", "alone", "loss_type", "kto"),
        ("safety_dpo", "alone", "clip", 5.0),
    ):
        changed = put(copy.deepcopy(content), f"{section}.runs.{run}.{key}", value)
        assert f"'{section}/{run}' gives no" in refusal(changed)


@pytest.mark.parametrize(
    ("key", "value"),
    [("cost", "safety_dpo/stepwise"), ("cost", "reward_model"), ("reward", "cost_model")],
)
def test_a_policy_scores_only_relative_to_the_reference_it_started_from(
    content: Content, key: str, value: str
) -> None:
    message = refusal(put(content, f"lagrangian_dpo.runs.bernoulli.{key}", value))
    assert message.startswith(f"lagrangian_dpo.runs.bernoulli.{key}: {value!r} gives no {key}")
    assert f"{key}_model" in message


def test_the_reference_is_always_evaluated(content: Content) -> None:
    assert refusal(drop(content, "evaluate.policies.sft")).startswith(
        "evaluate.policies.sft is missing"
    )


def test_the_smallest_multiplier_must_be_below_the_largest(content: Content) -> None:
    assert "lambda_min must be below" in refusal(put(content, "dual_search.lambda_min", 1e6))


def test_the_path_knows_no_dual(content: Content) -> None:
    message = refusal(put(on_the_path(content), "lambda_path.runs.slack.lam", "dual"))
    assert message.startswith("lambda_path.runs.slack.lam: ") and "valid number" in message


def on_the_safety_path(content: Content) -> Content:
    """Two policies by number, one after the helpful policy and one from the reference."""
    spec = {"lam": 4.0, "loss_type": "dpo", "clip": None}
    content["safety_path"]["runs"] = {
        "second": {**spec, "reference": "reward_dpo/helpful"},
        "alone": {**spec, "reference": "sft"},
    }
    return content


def test_a_policy_of_the_safety_path_is_named_wherever_one_of_safety_dpo_is(
    content: Content,
) -> None:
    on_the_safety_path(content)
    helpful = content["reward_dpo"]["runs"]["helpful"]
    content["reward_dpo"]["runs"]["modpo"] = helpful | {"margin": "safety_path/alone"}
    content["reward_dpo"]["runs"]["after"] = helpful | {"reference": "safety_path/alone"}
    bernoulli = content["lagrangian_dpo"]["runs"]["bernoulli"]
    content["lagrangian_dpo"]["runs"]["pecan"] = {**bernoulli, "cost": "safety_path/alone"}
    put(content, "methods.p_sacpo.start", "safety_path/second")
    put(content, "certify.runs.dualign.fallback", "safety_path/alone")
    put(content, "evaluate.policies.second", "safety_path/second")
    loading.check(content, "my.yaml")
    said = (
        "methods.p_sacpo.reference is 'sft', but safety_path/second was trained against"
        " 'reward_dpo/helpful'"
    )
    assert refusal(put(content, "methods.p_sacpo.reference", "sft")).startswith(said)


def test_the_safety_path_knows_no_dual_and_no_circle(content: Content) -> None:
    on_the_safety_path(content)
    for key, value, says in (
        ("safety_path.runs.second.lam", "dual", "valid number"),
        ("safety_path.runs.second.lam", 0.0, "greater than 0"),
        ("safety_path.runs.second.reference", "safety_dpo/alone", "is not one of"),
        ("evaluate.policies.other", "safety_path/none", "no stage writes"),
    ):
        message = refusal(put(copy.deepcopy(content), key, value))
        assert message.startswith(f"{key}: ") and says in message
    circle = put(content, "reward_dpo.runs.helpful.reference", "safety_path/second")
    assert refusal(circle).startswith("runs wait for each other: ")


@pytest.mark.parametrize(
    ("key", "drawn"),
    [
        ("dual_search.prompts", "prepare.search_prompts"),
        ("dual_search.refresh_prompts", "prepare.pool_prompts"),
        ("certify.prompts", "prepare.certify_prompts"),
        ("evaluate.prompts", "prepare.eval_prompts"),
    ],
)
def test_no_estimate_asks_for_more_prompts_than_are_drawn(
    content: Content, key: str, drawn: str
) -> None:
    stage, _, field = drawn.partition(".")
    there = content[stage][field]
    loading.check(put(content, key, there), "my.yaml")
    message = refusal(put(content, key, there + 1))
    assert (
        message
        == f"{key} {there + 1} is more than the {there} that {drawn} draws; ask for fewer, or draw"
        " more"
    )


def test_a_stage_refuses_too_many_prompts_of_its_own_estimates_only(
    content: Content, tmp_path: Path
) -> None:
    put(content, "evaluate.prompts", content["prepare"]["eval_prompts"] + 1)
    path = tmp_path / "params.yaml"
    with path.open("w") as file:
        YAML().dump(content, file)
    assert loading.for_run(SftParams, path)[0].section == "sft"
    with pytest.raises(ParamsError, match=r"evaluate\.prompts .* ask for fewer, or draw more"):
        loading.for_run(EvaluateParams, path)


def test_labels_ask_for_no_more_prompts_than_the_search_has() -> None:
    content = preset("every-method")
    name = next(name for name, row in content["methods"].items() if row.get("feedback"))
    message = refusal(put(content, f"methods.{name}.feedback.prompts", 10**6))
    assert message.startswith(f"methods.{name}.feedback.prompts 1000000 is more than the ")

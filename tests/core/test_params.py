"""Params files: every shipped one loads for every stage, and every mistake is named in one line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dualign.core import params
from dualign.core.errors import ParamsError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [ROOT / "params.yaml", *sorted((ROOT / "params").glob("*.yaml"))]
Content = dict[str, Any]


@pytest.fixture
def content() -> Content:
    return copy.deepcopy(params.read_yaml(ROOT / "params.yaml"))


def refusal(content: Content) -> str:
    """The message for this content; it must be one line that begins with the file's name."""
    with pytest.raises(ParamsError) as caught:
        params.check(content, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml: ") and "\n" not in message
    return message.removeprefix("my.yaml: ")


def put(content: Content, dotted: str, value: Any) -> Content:
    """Set a key, making no sections on the way."""
    *sections, key = dotted.split(".")
    place = content
    for section in sections:
        place = place[section]
    place[key] = value
    return content


def drop(content: Content, dotted: str) -> Content:
    *sections, key = dotted.split(".")
    place = content
    for section in sections:
        place = place[section]
    del place[key]
    return content


# --- what is right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", params.STAGES)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_loads_for_every_stage(path: Path, stage: str) -> None:
    cls = params.STAGES[stage]
    loaded = params.load(cls, path)
    assert isinstance(loaded, cls)
    assert isinstance(params.load_resources(path), params.Resources)


def test_shared_keys_reach_the_stages_that_declare_them(content: Content) -> None:
    content["seed"], content["beta"], content["constraint"]["limit"] = 41, 0.25, -1.5
    content["generation"]["max_new_tokens"] = 9
    checked = params.check(content, "my.yaml")
    for name, cls in params.STAGES.items():
        given = checked[name].model_dump()
        expected = {"seed": 41, "beta": 0.25, "limit": -1.5, "max_new_tokens": 9}
        assert {key: given[key] for key in expected if key in cls.shared} == {
            key: value for key, value in expected.items() if key in cls.shared
        }
        assert not (set(expected) - set(cls.shared)) & set(given)


def test_params_cannot_be_changed_after_loading() -> None:
    loaded = params.load(params.SftParams, ROOT / "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        loaded.seed = 1


@pytest.mark.parametrize(("written", "value"), [("1e-5", 1e-5), ("2E-4", 2e-4), ("1e+1", 10.0), ("3", 3.0)])
def test_numbers_may_be_written_the_yaml_1_2_way(tmp_path: Path, written: str, value: float) -> None:
    text = (ROOT / "params.yaml").read_text()
    line = next(line for line in text.splitlines() if line.strip().startswith("learning_rate:"))
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(line, f"{line.split(':')[0]}: {written}", 1))
    assert params.load(params.SftParams, path).training.learning_rate == value


def test_null_switches_off_what_may_be_switched_off(content: Content) -> None:
    put(content, "score.pairs", None)
    put(content, "sft.training.max_steps", 5)
    checked = params.check(content, "my.yaml")
    assert checked["score"].pairs is None and checked["sft"].training.max_steps == 5  # type: ignore[attr-defined]


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("reources", "resources"),
        ("sft.trainin", "training"),
        ("sft.training.learning_rat", "learning_rate"),
        ("sft.scratch.hiden_size", "hidden_size"),
        ("prepare.world.sharpnes", "sharpness"),
        ("resources.thread", "threads"),
        ("reward_dpo.runs.helpful.margin_wight", "margin_weight"),
        ("safety_dpo.runs.alone.factr", "factor"),
        ("lagrangian_dpo.runs.anchored.inner.anchr", "anchor"),
        ("dual_search.lambda_mx", "lambda_max"),
        ("constraint.limt", "limit"),
        ("generation.max_new_token", "max_new_tokens"),
        ("methods.sacpo.strt", "start"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(content: Content, typo: str, meant: str) -> None:
    message = refusal(put(content, typo, 1))
    assert message.startswith(f"{typo} is not a known key") and f"did you mean {meant!r}?" in message


def test_an_unknown_key_of_a_source_names_its_row(content: Content) -> None:
    message = refusal(put(content, "prepare.sft", [{"format": "world"}, {"format": "pku", "pth": "x"}]))
    assert message == "prepare.sft.1.pth is not a known key; did you mean 'path'?"


def test_an_unknown_key_like_no_other_lists_the_valid_ones(content: Content) -> None:
    message = refusal(put(content, "zzz", 1))
    assert "valid keys: " in message and "dual_search" in message


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("sft.training.batch_size", "32", "valid integer, got '32'"),
        ("sft.training.batch_size", 32.5, "valid integer"),
        ("sft.training.epochs", "1.0", "valid number, got '1.0'"),
        ("seed", 7.5, "valid integer"),
        ("seed", True, "valid integer, got True"),
        ("beta", "0.1", "valid number, got '0.1'"),
        ("resources.gradient_checkpointing", "yes", "valid boolean, got 'yes'"),
        ("resources.device", "tpu", "'auto', 'cpu' or 'cuda', got 'tpu'"),
        ("sft.base", 3, "valid string, got 3"),
        ("report.title", None, "valid string, got None"),
        ("prepare.sft", {"format": "world"}, "valid list"),
        ("sft", [1, 2], "must hold keys and values"),
        ("resources", None, "valid dictionary"),
    ],
)
def test_a_wrong_type_is_named(content: Content, key: str, value: Any, says: str) -> None:
    message = refusal(put(content, key, value))
    assert message.split(":")[0].split(" ")[0] == key and says in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta", -0.1),
        ("beta", 0.0),
        ("sft.training.learning_rate", -1e-5),
        ("sft.training.batch_size", 0),
        ("sft.training.warmup", 1.5),
        ("sft.lora.rank", -1),
        ("sft.lora.dropout", 1.0),
        ("score.samples_per_prompt", 1),
        ("prepare.heldout_share", 0.5),
        ("prepare.world.sharpness", 0.0),
        ("dual_init.bootstrap", 3),
        ("reward_dpo.runs.helpful.safe_offset", -1.0),
        ("reward_dpo.runs.helpful.margin_weight", 0.0),
        ("reward_dpo.runs.helpful.clip", 0.0),
        ("safety_dpo.runs.alone.clip", 0.0),
        ("dual_search.lambda_min", 0.0),
        ("dual_search.max_trainings", -1),
        ("dual_search.max_tokens", 0),
        ("dual_search.min_ess", 0.0),
        ("evaluate.confidence", 1.0),
        ("constraint.limit", float("nan")),
        ("constraint.power", 0.4),
        ("constraint.power", 1.0),
        ("dual_init.cvar_level", 1.0),
        ("constraint.limit", float("-inf")),
        ("generation.max_new_tokens", 0),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_given(content: Content, key: str, value: float) -> None:
    message = refusal(put(content, key, value))
    assert message.startswith(f"{key}: ") and message.endswith(f", got {value!r}")


@pytest.mark.parametrize(
    "key",
    """beta seed constraint constraint.limit generation.max_new_tokens report sft.base resources methods
    reward_dpo.runs.helpful.safe_offset reward_dpo.runs.helpful.clip safety_dpo.runs.alone.clip
    lagrangian_dpo.runs.bernoulli.learning_rate
    sft.training.schedule resources.threads prepare.world.sft_rows methods.sacpo.start""".split(),
)
def test_a_missing_key_is_named(content: Content, key: str) -> None:
    assert refusal(drop(content, key)).startswith(f"{key} is missing")


@pytest.mark.parametrize("key", ["dual_init.grid", "dual_search.grid", "prepare.helpful"])
def test_an_empty_list_is_refused(content: Content, key: str) -> None:
    message = refusal(put(content, key, []))
    assert message.startswith(f"{key}: ") and "at least" in message


def test_the_grid_of_a_search_may_begin_at_zero(content: Content) -> None:
    params.check(put(content, "dual_search.grid", [0.0, 1.0]), "my.yaml")
    assert refusal(put(content, "dual_search.grid", [1.0, -0.5])).startswith("dual_search.grid.1: ")


FURTHER = {"quantity": "cvar", "limit": 1.0, "level": 0.9, "prompts": "(?i)child"}


def test_further_limits_are_read_with_what_they_leave_out(content: Content) -> None:
    checked = params.check(
        put(content, "constraint.also", {"tail": FURTHER, "short": {"quantity": "length", "limit": 9}}), "my.yaml"
    )
    for stage in ("dual_init", "evaluate"):
        also = checked[stage].also  # type: ignore[attr-defined]
        assert also["tail"].model_dump() == FURTHER and also["short"].limit == 9.0
        assert (also["short"].level, also["short"].prompts) == (None, None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"level": None}, "level goes with quantity cvar and with no other"),
        ({"quantity": "cost"}, "level goes with quantity cvar and with no other"),
        (
            {"quantity": "p_unsafe", "level": None, "limit": 1.5},
            "the limit of p_unsafe is a share between 0 and 1, not 1.5",
        ),
        ({"quantity": "length", "level": None, "limit": 0.0}, "the limit of length is in tokens and above 0, not 0"),
        ({"prompts": "(child"}, "prompts '(child' is no regular expression"),
    ],
)
def test_a_further_limit_that_makes_no_sense_is_refused(content: Content, change: Content, says: str) -> None:
    message = refusal(put(content, "constraint.also", {"it": FURTHER | change}))
    assert message.startswith(f"constraint.also.it: {says}")


def test_a_further_limit_of_an_unknown_quantity_is_refused(content: Content) -> None:
    message = refusal(put(content, "constraint.also", {"it": FURTHER | {"quantity": "lenght"}}))
    assert message.startswith("constraint.also.it.quantity: ") and message.endswith("got 'lenght'")
    assert refusal(put(content, "constraint.also", {"it": {"limit": 1.0}})).startswith(
        "constraint.also.it.quantity is missing"
    )


@pytest.mark.parametrize("lam", ["dual", "stock", 0.7])
def test_a_multiplier_is_solved_or_a_number(content: Content, lam: Any) -> None:
    for key in ("lagrangian_dpo.runs.anchored.lam", "safety_dpo.runs.alone.lam"):
        params.check(put(content, key, lam), "my.yaml")
        assert refusal(put(copy.deepcopy(content), key, "dal")).startswith(key)


@pytest.mark.parametrize("grid", [[0, 1, 1, 2], [0, 2, 1]])
def test_a_grid_must_increase(content: Content, grid: list[float]) -> None:
    assert refusal(put(content, "dual_init.grid", grid)).startswith("dual_init: grid must increase")


@pytest.mark.parametrize(
    ("key", "home"),
    [
        ("sft.seed", "seed"),
        ("dual_init.beta", "beta"),
        ("dual_search.limit", "constraint.limit"),
        ("score.max_new_tokens", "generation.max_new_tokens"),
        ("report.confidence", "evaluate.confidence"),
    ],
)
def test_a_shared_key_in_a_section_is_sent_home(content: Content, key: str, home: str) -> None:
    assert refusal(put(content, key, 1)) == f"{key} belongs at {home}; move it there"


def test_a_search_must_start_from_a_model_that_a_stage_writes(content: Content) -> None:
    message = refusal(put(content, "methods.sacpo.start", "safety_dpo/nowhere"))
    assert message.startswith("methods.sacpo.start: no stage writes models/safety_dpo/nowhere; one of ")
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
def test_a_reference_must_be_a_model_that_the_other_stage_writes(content: Content, key: str, value: str) -> None:
    message = refusal(put(content, key, value))
    assert message.startswith(f"{key}: {value!r} is not one of [") and "'sft'" in message


def test_runs_that_wait_for_each_other_are_refused(content: Content) -> None:
    message = refusal(put(content, "reward_dpo.runs.helpful.reference", "safety_dpo/stepwise"))
    assert message.startswith("runs wait for each other: ") and message.endswith("set one reference to sft")
    assert "reward_dpo/helpful" in message and "safety_dpo/stepwise" in message


def test_either_order_of_the_two_steps_is_allowed(content: Content) -> None:
    helpful = content["reward_dpo"]["runs"]["helpful"]
    content["reward_dpo"]["runs"]["second"] = helpful | {
        "reference": "safety_dpo/alone",
        "margin": "safety_dpo/alone",
    }
    content["evaluate"]["policies"]["second"] = "reward_dpo/second"
    loaded = params.check(content, "my.yaml")["reward_dpo"]
    assert loaded.runs["second"].reference == "safety_dpo/alone"  # type: ignore[attr-defined]


@pytest.mark.parametrize("loss_type", ["ipo", "kto"])
def test_safe_dpo_is_a_dpo(content: Content, loss_type: str) -> None:
    content["reward_dpo"]["runs"]["helpful"] |= {"safe_offset": 10.0, "loss_type": loss_type}
    message = refusal(content)
    assert message.startswith(f"reward_dpo.runs.helpful: safe_offset (SafeDPO) needs loss_type dpo, not {loss_type}")


@pytest.mark.parametrize(
    ("key", "value"), [("reference", "reward_dpo/helpful"), ("loss_type", "ipo"), ("loss_type", "kto"), ("clip", 5.0)]
)
def test_a_margin_policy_is_one_of_plain_safety_dpo(content: Content, key: str, value: Any) -> None:
    """The cost that MODPO's margin stands for is the log-ratio to sft of no other policy."""
    helpful, alone = content["reward_dpo"]["runs"]["helpful"], content["safety_dpo"]["runs"]["alone"]
    content["reward_dpo"]["runs"]["modpo"] = helpful | {"margin": "safety_dpo/alone"}
    content["evaluate"]["policies"]["modpo"] = "reward_dpo/modpo"
    params.check(content, "my.yaml")
    alone[key] = value
    message = refusal(content)
    assert message.startswith("reward_dpo.runs.modpo.margin: 'safety_dpo/alone' is not one of ['sft'] (none, or a ")


@pytest.mark.parametrize("change", [{"loss_type": "ipo"}, {"loss_type": "kto"}, {"safe_offset": 10.0}])
def test_modpo_is_a_dpo_without_an_offset(content: Content, change: Content) -> None:
    content["reward_dpo"]["runs"]["helpful"] |= {"margin": "safety_dpo/alone", **change}
    message = refusal(content)
    assert message.startswith(
        "reward_dpo.runs.helpful: margin 'safety_dpo/alone' (MODPO) needs loss_type dpo and safe_"
    )


@pytest.mark.parametrize("change", [{"margin": "safety_dpo/alone"}, {"safe_offset": 10.0}])
def test_a_clip_would_bound_offset_and_margin_too(content: Content, change: Content) -> None:
    content["reward_dpo"]["runs"]["helpful"] |= {"clip": 5.0, **change}
    assert refusal(content).startswith("reward_dpo.runs.helpful: clip goes with neither safe_offset nor margin")


def test_a_row_is_the_method_of_its_name_unless_it_names_one(content: Content) -> None:
    put(content, "methods.mine", {**content["methods"]["sacpo"], "method": "sacpo"})
    put(content, "methods.pd_dpo.method", None)
    rows = params.check(content, "my.yaml")["dual_search"].methods  # type: ignore[attr-defined]
    assert (rows["mine"].method, rows["pd_dpo"].method, rows["sacpo"].rule) == ("sacpo", "pd_dpo", None)
    put(content, "methods.sacbo", content["methods"]["sacpo"])
    message = refusal(content)
    assert message.startswith("methods.sacbo.method: ") and "'sacpo'" in message and message.endswith("got 'sacbo'")


def test_a_search_keeps_the_reference_of_its_start(content: Content) -> None:
    """But a naive merge, whose start is safety DPO from the reference policy, has a partner of its own."""
    message = refusal(put(content, "methods.sacpo.reference", "sft"))
    assert message.startswith("methods.sacpo.reference is 'sft', but safety_dpo/stepwise was trained against ")
    content["methods"]["sacpo"]["reference"] = content["safety_dpo"]["runs"]["stepwise"]["reference"]
    assert refusal(put(content, "methods.c_dpo.reference", "safety_dpo/alone")).startswith("methods.c_dpo.reference is")
    put(content, "methods.c_dpo.reference", "sft")
    message = refusal(put(content, "methods.sacpo.reference", "nowhere"))
    assert message.startswith("methods.sacpo.reference: no stage writes models/nowhere")
    content["methods"]["sacpo"]["reference"] = content["safety_dpo"]["runs"]["stepwise"]["reference"]
    put(content, "methods.p_sacpo.start", "safety_dpo/alone")
    params.check(content, "my.yaml")
    assert "safety_dpo/alone was trained against 'sft'" in refusal(
        put(content, "methods.sacpo.start", "safety_dpo/alone")
    )


SPEC: Content = {"learning_rate": None, "inner": {"labels": "soft", "normalised": False, "anchor": 0.3, "nll": 2.0}}


def on_the_path(content: Content) -> Content:
    """Two policies of the path, and a row that merges them."""
    content["lambda_path"]["runs"] = {
        "slack": {**SPEC, "lam": 0.0, "begin": "sft"},
        "strict": {**SPEC, "lam": 3.0, "begin": "lambda_path/slack"},
    }
    ends = {"start": "lambda_path/strict", "reference": "lambda_path/slack"}
    content["methods"]["dualign"] = {"rule": "merge", **ends}
    return content


def test_a_search_merges_two_policies_of_the_path_the_stricter_one_as_its_start(content: Content) -> None:
    params.check(on_the_path(content), "my.yaml")
    turned = put(copy.deepcopy(content), "methods.dualign.start", "lambda_path/slack")
    said = (
        "methods.dualign: start and reference must both be runs of lambda_path, and the start's lam must be the larger"
    )
    assert refusal(turned).startswith(said)
    assert refusal(put(copy.deepcopy(content), "methods.dualign.reference", "sft")).startswith(said)
    assert refusal(put(copy.deepcopy(content), "lambda_path.runs.slack.lam", 3.0)).startswith(said)
    assert refusal(put(content, "methods.dualign.start", "lambda_path/none")).startswith(
        "methods.dualign.start: no stage"
    )


@pytest.mark.parametrize("begin", ["lambda_path/none", "reward_dpo/helpful"])
def test_the_path_begins_at_the_reference_or_goes_on(content: Content, begin: str) -> None:
    message = refusal(put(on_the_path(content), "lambda_path.runs.strict.begin", begin))
    assert message.startswith(f"lambda_path.runs.strict.begin: {begin!r} is not one of [") and "'sft'" in message


def test_runs_of_the_path_do_not_wait_for_each_other(content: Content) -> None:
    message = refusal(put(on_the_path(content), "lambda_path.runs.slack.begin", "lambda_path/strict"))
    assert message.startswith("runs wait for each other: ") and message.endswith("let one begin at sft")


def test_the_path_knows_no_dual(content: Content) -> None:
    message = refusal(put(on_the_path(content), "lambda_path.runs.slack.lam", "dual"))
    assert message.startswith("lambda_path.runs.slack.lam: ") and "valid number" in message


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
    checked = params.check(content, "my.yaml")["lagrangian_dpo"]
    assert isinstance(checked, params.LagrangianDpoParams)
    assert {name: run.implicit for name, run in checked.runs.items()} == {
        "bernoulli": False,
        "anchored": False,
        "pecan": True,
    }


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
    ("key", "value"), [("cost", "safety_dpo/stepwise"), ("cost", "reward_model"), ("reward", "cost_model")]
)
def test_a_policy_scores_only_relative_to_the_reference_it_started_from(content: Content, key: str, value: str) -> None:
    message = refusal(put(content, f"lagrangian_dpo.runs.bernoulli.{key}", value))
    assert message.startswith(f"lagrangian_dpo.runs.bernoulli.{key}: {value!r} gives no {key}")
    assert f"{key}_model" in message


def test_the_reference_is_always_evaluated(content: Content) -> None:
    assert refusal(drop(content, "evaluate.policies.sft")).startswith("evaluate.policies.sft is missing")


def test_the_smallest_multiplier_must_be_below_the_largest(content: Content) -> None:
    assert "lambda_min must be below" in refusal(put(content, "dual_search.lambda_min", 1e6))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"format": "world", "path": "x"}, "takes no path"),
        ({"format": "pku"}, "needs a path"),
        ({"format": "columns", "path": "x.csv"}, "needs columns"),
    ],
)
def test_a_source_must_make_sense(content: Content, source: Content, says: str) -> None:
    message = refusal(put(content, "prepare.safety", [source]))
    assert message.startswith("prepare.safety.0: ") and says in message


@pytest.mark.parametrize(("hidden", "heads"), [(128, 3), (60, 4)])
def test_heads_must_divide_the_hidden_size_evenly(content: Content, hidden: int, heads: int) -> None:
    content["sft"]["scratch"] |= {"hidden_size": hidden, "heads": heads}
    assert refusal(content).startswith(f"sft.scratch: hidden_size {hidden} must be an even multiple of heads {heads}")


@pytest.mark.parametrize("change", [lambda c: put(c, "safety_dpo.runs.alone.lam", "duel")])
def test_a_multiplier_is_dual_or_a_number(content: Content, change: Callable[[Content], Content]) -> None:
    message = refusal(change(content))
    assert message.startswith("safety_dpo.runs.alone.lam") and "'dual'" in message and "'duel'" in message


# --- what is no params file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"seed: [1, 2\n", r":2: not valid YAML"),
        (b"seed: 1\nseed: 2\n", r":2: not valid YAML .*duplicate key"),
        (b"- 1\n- 2\n", r": expected a mapping"),
        (b"", r": expected a mapping"),
        (b"just words", r": expected a mapping"),
        (b"seed: \x00\x01", r": not valid YAML"),
        (b"\xff\xfe\x00seed", r": not valid YAML"),
    ],
    ids=["open bracket", "key twice", "list", "empty", "words", "control characters", "not UTF-8"],
)
def test_a_file_that_is_no_yaml_mapping_is_named(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(text)
    with pytest.raises(ParamsError, match=rf"^{path}{says}") as caught:
        params.load(params.SftParams, path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"none\.yaml: no such file"):
        params.load(params.SftParams, tmp_path / "none.yaml")

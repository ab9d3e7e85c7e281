"""Values that a section refuses, each named in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dualign.params import loading
from dualign.params.models import SftParams
from tests import shipped
from tests.params.mistakes import Content, drop, put, refusal

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "params").glob("*.yaml")))
def test_what_a_stage_leaves_of_its_params_is_read_again(name: str) -> None:
    """Model cards read the params that stages ran with, in which every field stands."""
    for params in loading.check(shipped.preset(name), name).values():
        left = json.loads(json.dumps(params.model_dump(mode="json")))
        assert type(params).model_validate(left) == params, type(params).__name__


def test_params_cannot_be_changed_after_loading() -> None:
    loaded = loading.load(SftParams, ROOT / "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        loaded.seed = 1


def test_null_switches_off_what_may_be_switched_off(content: Content) -> None:
    put(content, "score.pairs", None)
    put(content, "sft.training.max_steps", 5)
    checked = loading.check(content, "my.yaml")
    assert checked["score"].pairs is None and checked["sft"].training.max_steps == 5  # type: ignore[attr-defined]


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
        ("seed", -1),
        ("seed", 2**31),
        ("seed", 2**32),
        ("resources.threads", 100_000_000_000),
        ("sft.training.epochs", 1e300),
        ("sft.training.batch_size", 10**9),
        ("sft.lora.rank", 10**6),
        ("sft.scratch.layers", 10**6),
        ("score.samples_per_prompt", 10**9),
        ("dual_init.bootstrap", 10**9),
        ("dual_search.max_trainings", 10**9),
        ("generation.max_new_tokens", 10**12),
        ("beta", 1e300),
        ("beta", 10**400),
        ("constraint.limit", 1e12),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_given(
    content: Content, key: str, value: float
) -> None:
    message = refusal(put(content, key, value))
    assert message.startswith(f"{key}: ") and (
        message.endswith(f", got {value!r}") or len(repr(value)) > 100
    )


@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_seeds_that_are_derived_from_the_largest_one_are_seeds(content: Content, seed: int) -> None:
    """numpy takes up to 2**32 - 1; stages add the number of a training, and a thousand times it."""
    assert loading.check(put(content, "seed", seed), "my.yaml")["sft"].seed == seed  # type: ignore[attr-defined]
    longest = loading.check(put(content, "dual_search.max_trainings", 10_000), "my.yaml")[
        "dual_search"
    ]
    assert seed + 1000 * (longest.max_trainings + 2) < 2**32  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (
            "prepare.sft",
            [{"format": "pku", "path": "../rows.jsonl"}],
            "a relative path does not lead out of its folder",
        ),
        (
            "prepare.sft",
            [{"format": "pku", "path": "a/../../rows.jsonl"}],
            "a relative path does not lead out",
        ),
        ("prepare.sft", [{"format": "pku", "path": ""}], "a text on one line"),
        ("certify.labels.folder", "../labels", "a relative path does not lead out of its folder"),
        ("prepare.folder", "rows\nmore", "a text on one line"),
        ("sft.base", "", "a text on one line"),
        (
            "constraint.additional",
            {"it": {"quantity": "length", "limit": 9.0, "prompts": "a{99999999999}"}},
            "no regular",
        ),
        (
            "constraint.additional",
            {"it": {"quantity": "length", "limit": 9.0, "prompts": "(" * 5000}},
            "no regular",
        ),
    ],
)
def test_a_path_out_of_its_folder_and_a_text_that_is_none_are_refused(
    content: Content, key: str, value: Any, says: str
) -> None:
    message = refusal(put(content, key, value))
    assert message.startswith(key) and says in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("folder", ["/data/rows", "../rows", "data/raw", "my rows", "ö"])
def test_rows_may_lie_in_any_folder(content: Content, folder: str) -> None:
    loading.check(put(content, "prepare.folder", folder), "my.yaml")
    loading.check(
        put(content, "prepare.sft", [{"format": "pku", "path": f"{folder.strip('.')}/a.jsonl"}]),
        "my.yaml",
    )


@pytest.mark.parametrize("key", ["dual_init.grid", "dual_search.grid", "prepare.helpful"])
def test_an_empty_list_is_refused(content: Content, key: str) -> None:
    message = refusal(put(content, key, []))
    assert message.startswith(f"{key}: ") and "at least" in message


def test_the_grid_of_a_search_may_begin_at_zero(content: Content) -> None:
    loading.check(put(content, "dual_search.grid", [0.0, 1.0]), "my.yaml")
    assert refusal(put(content, "dual_search.grid", [1.0, -0.5])).startswith("dual_search.grid.1: ")


FURTHER = {"quantity": "cvar", "limit": 1.0, "level": 0.9, "prompts": "(?i)child"}


def test_additional_constraints_are_read_with_what_they_leave_out(content: Content) -> None:
    checked = loading.check(
        put(
            content,
            "constraint.additional",
            {"tail": FURTHER, "short": {"quantity": "length", "limit": 9}},
        ),
        "my.yaml",
    )
    for stage in ("dual_init", "evaluate"):
        additional = checked[stage].additional  # type: ignore[attr-defined]
        assert additional["tail"].model_dump() == FURTHER and additional["short"].limit == 9.0
        assert (additional["short"].level, additional["short"].prompts) == (None, None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"level": None}, "level goes with quantity cvar and with no other"),
        ({"quantity": "cost"}, "level goes with quantity cvar and with no other"),
        (
            {"quantity": "p_unsafe", "level": None, "limit": 1.5},
            "the limit of p_unsafe is a share between 0 and 1, not 1.5",
        ),
        (
            {"quantity": "length", "level": None, "limit": 0.0},
            "the limit of length is in tokens and above 0, not 0",
        ),
    ],
)
def test_a_additional_constraint_that_makes_no_sense_is_refused(
    content: Content, change: Content, says: str
) -> None:
    message = refusal(put(content, "constraint.additional", {"it": FURTHER | change}))
    assert message.startswith(f"constraint.additional.it: {says}")


def test_an_additional_constraint_on_no_regular_expression_is_refused(content: Content) -> None:
    message = refusal(
        put(content, "constraint.additional", {"it": FURTHER | {"prompts": "(child"}})
    )
    assert message.startswith("constraint.additional.it.prompts: this is no regular expression")
    assert message.endswith("correct it, got '(child'")


def test_a_additional_constraint_of_an_unknown_quantity_is_refused(content: Content) -> None:
    message = refusal(
        put(content, "constraint.additional", {"it": FURTHER | {"quantity": "lenght"}})
    )
    assert message.startswith("constraint.additional.it.quantity: ") and message.endswith(
        "got 'lenght'"
    )
    assert refusal(put(content, "constraint.additional", {"it": {"limit": 1.0}})).startswith(
        "constraint.additional.it.quantity is missing"
    )


@pytest.mark.parametrize("lam", ["dual", "margin", 0.7])
def test_a_multiplier_is_solved_or_a_number(content: Content, lam: Any) -> None:
    for key in ("lagrangian_dpo.runs.anchored.lam", "safety_dpo.runs.alone.lam"):
        loading.check(put(content, key, lam), "my.yaml")
        assert refusal(put(copy.deepcopy(content), key, "dal")).startswith(key)


@pytest.mark.parametrize("key", ["grid", "betas"])
@pytest.mark.parametrize("values", [[0.5, 1, 1, 2], [0.5, 2, 1]])
def test_a_grid_must_increase(content: Content, key: str, values: list[float]) -> None:
    assert refusal(put(content, f"dual_init.{key}", values)).startswith(
        f"dual_init: {key} must increase"
    )


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan")])
def test_other_kl_weights_are_positive_numbers_or_none_at_all(
    content: Content, wrong: float
) -> None:
    loading.check(put(content, "dual_init.betas", []), "my.yaml")
    assert refusal(put(content, "dual_init.betas", [wrong, 1.0])).startswith("dual_init.betas.0: ")


@pytest.mark.parametrize("loss_type", ["ipo", "kto"])
def test_safe_dpo_is_a_dpo(content: Content, loss_type: str) -> None:
    content["reward_dpo"]["runs"]["helpful"] |= {"safe_offset": 10.0, "loss_type": loss_type}
    message = refusal(content)
    assert message.startswith(
        f"reward_dpo.runs.helpful: safe_offset (SafeDPO) needs loss_type dpo, not {loss_type}"
    )


@pytest.mark.parametrize(
    "change", [{"loss_type": "ipo"}, {"loss_type": "kto"}, {"safe_offset": 10.0}]
)
def test_modpo_is_a_dpo_without_an_offset(content: Content, change: Content) -> None:
    content["reward_dpo"]["runs"]["helpful"] |= {"margin": "safety_dpo/alone", **change}
    message = refusal(content)
    assert message.startswith(
        "reward_dpo.runs.helpful: margin 'safety_dpo/alone' (MODPO) needs loss_type dpo and safe_"
    )


@pytest.mark.parametrize("place", ["reward_dpo.runs.helpful", "safety_dpo.runs.stepwise"])
def test_an_option_goes_with_its_loss_which_needs_it(content: Content, place: str) -> None:
    assert refusal(put(content, f"{place}.epsilon", 0.1)) == (
        f"{place}: epsilon does not go with loss_type dpo; leave it out, or set loss_type to robust"
    )
    put(content, f"{place}.loss_type", "robust")
    loading.check(content, "my.yaml")
    assert refusal(put(content, f"{place}.epsilon", 0.5)).startswith(f"{place}.epsilon: ")
    assert refusal(drop(content, f"{place}.epsilon")) == (
        f"{place}: epsilon is missing, which loss_type robust needs"
    )


def test_a_loss_without_a_reference_has_no_log_ratio_to_clip(content: Content) -> None:
    runs = content["reward_dpo"]["runs"]
    run = runs["free"] = {**runs["helpful"], "loss_type": "simpo", "gamma": 0.5}
    loading.check(content, "my.yaml")
    run["clip"] = 5.0
    assert refusal(content) == (
        "reward_dpo.runs.free: clip does not go with loss_type simpo; leave it out, or set"
        " loss_type to dpo or ipo or kto or robust"
    )


@pytest.mark.parametrize("change", [{"margin": "safety_dpo/alone"}, {"safe_offset": 10.0}])
def test_a_clip_would_bound_offset_and_margin_too(content: Content, change: Content) -> None:
    content["reward_dpo"]["runs"]["helpful"] |= {"clip": 5.0, **change}
    assert refusal(content).startswith(
        "reward_dpo.runs.helpful: clip goes with neither safe_offset nor margin"
    )


def test_a_control_variate_steadies_the_likelihood_of_answers_that_were_drawn(
    content: Content,
) -> None:
    run = "lagrangian_dpo.runs.anchored"
    assert content["lagrangian_dpo"]["runs"]["anchored"]["pair_loss"]["control"] == 0.8
    for wrong in (-0.1, 1.1):
        changed = put(copy.deepcopy(content), f"{run}.pair_loss.control", wrong)
        assert refusal(changed).startswith(f"{run}.pair_loss.control: ")
    assert refusal(put(copy.deepcopy(content), f"{run}.pair_loss.nll", 0.0)) == (
        f"{run}.pair_loss: control 0.8 steadies the likelihood term, whose weight nll is 0; leave"
        " it out, or set nll above 0"
    )
    content["lagrangian_dpo"]["runs"]["anchored"] |= {"data": "pairs", "refresh": None}
    assert refusal(content) == (
        f"{run}: pair_loss.control 0.8 needs answers that a known policy drew; set data to pool, or"
        " leave control out"
    )


def test_a_row_is_the_method_of_its_name_unless_it_names_one(content: Content) -> None:
    put(content, "methods.mine", {**content["methods"]["sacpo"], "method": "sacpo"})
    put(content, "methods.pd_dpo.method", None)
    rows = loading.check(content, "my.yaml")["dual_search"].methods  # type: ignore[attr-defined]
    assert (rows["mine"].method, rows["pd_dpo"].method, rows["sacpo"].rule) == (
        "sacpo",
        "pd_dpo",
        None,
    )
    put(content, "methods.sacbo", content["methods"]["sacpo"])
    message = refusal(content)
    assert (
        message.startswith("methods.sacbo.method: ")
        and "'sacpo'" in message
        and message.endswith("got 'sacbo'")
    )


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


@pytest.mark.parametrize("key", ["gguf_file", "revision", "chat_template"])
def test_what_a_base_from_scratch_cannot_use_is_refused(content: Content, key: str) -> None:
    content["sft"][key] = "mine"
    assert refusal(content).startswith(f"sft: {key} belongs to a ")


@pytest.mark.parametrize(("hidden", "heads"), [(128, 3), (60, 4)])
def test_heads_must_divide_the_hidden_size_evenly(
    content: Content, hidden: int, heads: int
) -> None:
    content["sft"]["scratch"] |= {"hidden_size": hidden, "heads": heads}
    assert refusal(content).startswith(
        f"sft.scratch: hidden_size {hidden} must be an even multiple of heads {heads}"
    )


@pytest.mark.parametrize("change", [lambda c: put(c, "safety_dpo.runs.alone.lam", "duel")])
def test_a_multiplier_is_dual_or_a_number(
    content: Content, change: Callable[[Content], Content]
) -> None:
    message = refusal(change(content))
    assert (
        message.startswith("safety_dpo.runs.alone.lam")
        and "'dual'" in message
        and "'duel'" in message
    )

"""The method table: what a row of params may change, and what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from dualign.core.errors import ParamsError
from dualign.methods import METHODS, plan
from dualign.params.loading import load
from dualign.params.search import DualSearchParams, MethodName, MethodRow
from tests.shipped import SHIPPED, written

ROOT = Path(__file__).resolve().parents[1]
STARTS = {
    "safety": ("safety_dpo/one", "reward_dpo/helpful"),
    "lagrangian": ("lagrangian_dpo/one", "sft"),
    "policy_gradient": ("sft", "sft"),
}


FEEDBACK = {"prompts": 4, "labels": 3, "smoothing": 0.5, "source": "cost_model", "folder": "f"}
ONLINE = {
    "labels": "models",
    "folder": "f",
    "retrain_reward": True,
    "ridge": 1.0,
    "reward_scale": 0.1,
    "cost_scale": 0.1,
    "dimension": None,
}
GRADIENT = {
    "samples": 2,
    "batch_size": 4,
    "steps": 3,
    "learning_rate": 1e-2,
    "lambda_init": 1.0,
    "lambda_rate": 0.1,
    "window": 8,
}
SECTIONS = {"o_pd_dpo": {"online": ONLINE}, "safe_rlhf": {"policy_gradient": GRADIENT}}


def row(method: str, **options: Any) -> MethodRow:
    """A row with the sections that it needs."""
    start, reference = STARTS[METHODS[method].inner]
    needed = SECTIONS.get(method, {}) | (
        {"feedback": FEEDBACK} if options.get("cost") == "feedback" else {}
    )
    return MethodRow.model_validate(
        {"method": method, "start": start, "reference": reference, **needed, **options}
    )


def test_params_and_table_name_the_same_methods() -> None:
    assert set(get_args(MethodName)) == set(METHODS)


#: Both ends of a merge on the path.
PATH = {"start": "lambda_path/strict", "reference": "lambda_path/slack"}


@pytest.mark.parametrize("name", METHODS)
def test_a_row_without_options_is_the_published_method(name: str) -> None:
    found = plan(name, row(name))
    assert found.method == METHODS[name]
    assert found.title == METHODS[name].title
    assert (found.start, found.reference) == STARTS[METHODS[name].inner]


def test_options_replace_the_methods_own_and_the_title_says_which_row_it_is() -> None:
    found = plan("mine", row("pd_dpo", returns="mixture", cost="feedback", warm=True))
    assert found.title == "PD-DPO (mine)"
    assert (found.method.returns, found.method.cost, found.method.warm) == (
        "mixture",
        "feedback",
        True,
    )
    assert found.method.rule == "projected_subgradient"
    assert plan("c", row("c_dpo", rule="grid")).method.rule == "grid"
    assert plan("d", row("dualign", warm=False)).method.warm is False


@pytest.mark.parametrize(
    ("method", "options", "key"),
    [
        ("o_pd_dpo", {"online": None}, "online"),
        ("safe_rlhf", {"policy_gradient": None}, "policy_gradient"),
        ("pd_dpo", {"cost": "feedback", "feedback": None}, "feedback"),
        ("pd_dpo", {"online": ONLINE}, "online"),
        ("dualign", {"policy_gradient": GRADIENT}, "policy_gradient"),
        ("pd_dpo", {"feedback": FEEDBACK}, "feedback"),
    ],
)
def test_a_section_stands_in_the_rows_that_read_it_and_in_no_other(
    method: str, options: dict[str, Any], key: str
) -> None:
    said = "is missing" if options[key] is None else "does not read it"
    with pytest.raises(ParamsError, match=rf"^methods\.mine\.{key}: .*{said}"):
        plan("mine", row(method, **options))


def test_the_published_settings() -> None:
    """2505.19387: the dual gradient of C-DPO, warm from MoCAN's policy; 2405.19544: PeCAN is
    one-shot.
    """
    caid = METHODS["caid"]
    c_dpo = METHODS["c_dpo"]
    pecan = METHODS["pecan"]
    assert (caid.rule, caid.data, caid.warm) == (c_dpo.rule, c_dpo.data, True) and not c_dpo.warm
    assert (pecan.rule, pecan.inner, pecan.returns) == ("one_shot", "lagrangian", "last")


@pytest.mark.parametrize(
    ("method", "options", "key"),
    [
        ("sacpo", {"rule": "merge"}, "rule"),
        ("sacpo", {"rule": "newton"}, "rule"),
        ("pd_dpo", {"rule": "dual_gradient"}, "rule"),
        ("p_sacpo", {"rule": "grid"}, "rule"),
        ("c_dpo", {"rule": "merge"}, "rule"),
        ("sacpo", {"start": "lagrangian_dpo/one"}, "start"),
        ("sacpo", {"start": "sft"}, "start"),
        ("sacpo", {"start": "reward_dpo/swapped"}, "start"),
        ("c_dpo", {"start": "safety_dpo/one"}, "start"),
        ("sacpo", {"start": "reward_dpo/swapped", "rule": "one_shot"}, "reference"),
        ("p_sacpo", {"returns": "mixture"}, "returns"),
        ("sacpo", {"returns": "tail_average"}, "returns"),
        ("mocan", {"returns": "mixture"}, "returns"),
        ("p_sacpo", {"warm": True}, "warm"),
        ("mocan", {"warm": True}, "warm"),
        ("mocan", {"cost": "feedback"}, "cost"),
        ("o_pd_dpo", {"rule": "grid"}, "rule"),
        ("o_pd_dpo", {"start": "sft"}, "start"),
        ("safe_rlhf", {"rule": "one_shot"}, "rule"),
        ("safe_rlhf", {"start": "lagrangian_dpo/one"}, "start"),
        ("safe_rlhf", {"reference": "reward_dpo/helpful"}, "reference"),
        ("safe_rlhf", {"returns": "mixture"}, "returns"),
        ("safe_rlhf", {"warm": True}, "warm"),
        ("safe_rlhf", {"cost": "feedback"}, "cost"),
        ("safe_rlhf", {"target": "margin"}, "target"),
        ("mocan", {"target": "margin"}, "target"),
        (
            "dualign",
            {"rule": "merge", "start": "lagrangian_dpo/one", "reference": "sft"},
            "reference",
        ),
        (
            "dualign",
            {"rule": "merge", "start": "safety_dpo/one", "reference": "reward_dpo/helpful"},
            "start",
        ),
        ("dualign", PATH, "start"),
        ("c_dpo", {"rule": "merge", **PATH}, "rule"),
        ("dualign", {"rule": "merge", **PATH, "returns": "mixture"}, "returns"),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_key(
    method: str, options: dict[str, Any], key: str
) -> None:
    with pytest.raises(ParamsError, match=rf"^methods\.mine\.{key}: ") as caught:
        plan("mine", row(method, **options))
    assert "\n" not in str(caught.value)


def test_ours_may_merge_two_policies_of_the_path_and_target_below_the_limit() -> None:
    found = plan("mine", row("dualign", rule="merge", target="margin", **PATH))
    assert (found.method.rule, found.method.target, found.start, found.reference) == (
        "merge",
        "margin",
        *PATH.values(),
    )
    assert all(method.target == "limit" for method in METHODS.values())
    assert (
        plan("a", row("sacpo", target="margin")).method.target == "margin"
    )  # a grid returns by it


def test_safety_first_is_one_shot() -> None:
    found = plan(
        "mine",
        row("sacpo", start="reward_dpo/swapped", reference="safety_dpo/alone", rule="one_shot"),
    )
    assert (found.start, found.reference) == ("reward_dpo/swapped", "safety_dpo/alone")


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_every_row_of_a_shipped_file_is_accepted(path: Path, tmp_path: Path) -> None:
    rows = load(DualSearchParams, written(path, tmp_path)).methods
    assert rows or path.stem == "audit", "an audit searches for nothing"
    assert [plan(name, given).name for name, given in rows.items()] == list(rows)

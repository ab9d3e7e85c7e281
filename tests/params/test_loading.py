"""Params files: every shipped one loads for every stage, and every mistake is named in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dualign.core.errors import ParamsError
from dualign.params import loading
from dualign.params.base import Resources
from dualign.params.models import SftParams
from dualign.params.stages import STAGES
from dualign.params.training import RewardDpoParams
from tests.params.mistakes import Content, drop, put, refusal
from tests.shipped import SHIPPED, written

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_loads_for_every_stage(path: Path, tmp_path: Path) -> None:
    path = written(path, tmp_path)
    checked = loading.check(loading.read_yaml(path), path)
    assert {name: type(params) for name, params in checked.items()} == STAGES
    assert loading.load(RewardDpoParams, path) == checked["reward_dpo"]
    assert isinstance(loading.load_resources(path), Resources)


def test_shared_keys_reach_the_stages_that_declare_them(content: Content) -> None:
    content["seed"] = 41
    content["beta"] = 0.25
    content["constraint"]["limit"] = -1.5
    content["generation"]["max_new_tokens"] = 9
    checked = loading.check(content, "my.yaml")
    for name, cls in STAGES.items():
        given = checked[name].model_dump()
        expected = {"seed": 41, "beta": 0.25, "limit": -1.5, "max_new_tokens": 9}
        assert {key: given[key] for key in expected if key in cls.shared} == {
            key: value for key, value in expected.items() if key in cls.shared
        }
        assert not (set(expected) - set(cls.shared)) & set(given)


@pytest.mark.parametrize(
    ("written", "value"), [("1e-5", 1e-5), ("2E-4", 2e-4), ("1e+1", 10.0), ("3", 3.0)]
)
def test_numbers_may_be_written_the_yaml_1_2_way(
    tmp_path: Path, written: str, value: float
) -> None:
    text = (ROOT / "params.yaml").read_text()
    line = next(line for line in text.splitlines() if line.strip().startswith("learning_rate:"))
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(line, f"{line.split(':')[0]}: {written}", 1))
    assert loading.load(RewardDpoParams, path).training.learning_rate == value


typos = pytest.mark.parametrize(
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
        ("lagrangian_dpo.runs.anchored.pair_loss.anchr", "anchor"),
        ("dual_search.lambda_mx", "lambda_max"),
        ("constraint.limt", "limit"),
        ("generation.max_new_token", "max_new_tokens"),
        ("methods.sacpo.strt", "start"),
    ],
)


@typos
def test_an_unknown_key_is_named_with_the_nearest_valid_one(
    content: Content, typo: str, meant: str
) -> None:
    message = refusal(put(content, typo, 1))
    assert (
        message.startswith(f"{typo} is not a known key") and f"did you mean {meant!r}?" in message
    )


@typos
def test_a_misspelt_key_is_unknown_before_the_right_one_is_missing(
    content: Content, typo: str, meant: str
) -> None:
    *sections, _ = typo.split(".")
    message = refusal(put(drop(content, ".".join([*sections, meant])), typo, 1))
    assert (
        message.startswith(f"{typo} is not a known key") and f"did you mean {meant!r}?" in message
    )


def test_an_unknown_key_of_a_source_names_its_row(content: Content) -> None:
    message = refusal(
        put(content, "prepare.sft", [{"format": "world"}, {"format": "pku", "pth": "x"}])
    )
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
        ("certify.labels", "yes", "certify.labels: input should be a valid dictionary, got 'yes'"),
        ("resources.processes", "all", "a valid integer, or 'auto', got 'all'"),
        ("dual_search.slater_radius", "pol", "a valid number, or 'pool', got 'pol'"),
        ("lora.target_modules", 3, "a valid list, or 'all-linear', got 3"),
        (
            "lagrangian_dpo.runs.anchored.lam",
            -1,
            "lam: input should be 'dual' or 'margin', or greater than or equal to 0, got -1",
        ),
    ],
)
def test_a_wrong_type_is_named(content: Content, key: str, value: Any, says: str) -> None:
    message = refusal(put(content, key, value))
    assert message.split(":")[0].split(" ")[0] == key and says in message


def test_a_wrong_item_of_a_value_of_several_types_is_named(content: Content) -> None:
    message = refusal(put(content, "lora.target_modules", ["q_proj", 3]))
    assert message.startswith("lora.target_modules.1: input should be a valid string")


@pytest.mark.parametrize(
    "key",
    """beta seed constraint constraint.limit generation.max_new_tokens report sft.base resources
    methods reward_dpo.runs.helpful.safe_offset reward_dpo.runs.helpful.clip
    safety_dpo.runs.alone.clip lagrangian_dpo.runs.bernoulli.learning_rate
    training.schedule sft.training lora resources.threads prepare.world.sft_rows
    methods.sacpo.start""".split(),
)
def test_a_missing_key_is_named(content: Content, key: str) -> None:
    assert refusal(drop(content, key)).startswith(f"{key} is missing")


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
        loading.load(SftParams, path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"none\.yaml: no such file"):
        loading.load(SftParams, tmp_path / "none.yaml")


def test_a_stage_says_what_differs_from_the_blocks_at_the_top(content: Content) -> None:
    put(content, "training.batch_size", 48)
    put(content, "score.pairs", None)
    put(content, "reward_dpo.training", {"batch_size": 16, "max_steps": 7})
    put(content, "reward_dpo.lora", {"rank": 4})
    checked = loading.check(content, "my.yaml")
    own = checked["reward_dpo"]
    other = checked["safety_dpo"]
    assert (own.training.batch_size, own.training.max_steps, own.lora.rank) == (16, 7, 4)  # type: ignore[attr-defined]
    assert (other.training.batch_size, other.lora.rank) == (48, 0)  # type: ignore[attr-defined]
    assert own.training.schedule == content["training"]["schedule"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("block", ["training", "lora"])
def test_a_block_of_a_stage_is_keys_that_differ(content: Content, block: str) -> None:
    message = refusal(put(content, f"sft.{block}", None))
    assert (
        message
        == f"sft.{block} must hold the keys that differ from {block} at the top; {{}} for none"
    )
    assert refusal(put(content, block, 3)).startswith(f"{block}: ")


def test_a_value_of_the_block_at_the_top_is_named_there(content: Content) -> None:
    assert refusal(put(content, "training.batch_size", 0)).startswith("training.batch_size: ")

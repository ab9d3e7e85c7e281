"""Setting keys of params.yaml: the value changes, and not one byte besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline import yaml_text
from pipeline.dvc.parameters import assign, parse, replace_file, settings_of, span
from pipeline.errors import PipelineError

TEXT = """\
# how to run
seed: 7                # of everything
constraint:
  limit: -0.3          # d
sources:               # where rows are
  - {format: world}
  - format: pku        # the second

lora: {rank: 0, alpha: 16.0, modules: all-linear}   # rank 0: off
revision:              # of a hub id
methods:
  a: {start: sft}
  b: {start: dpo}
# the end
"""


def load(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


@pytest.mark.parametrize(
    ("key", "value", "old", "new"),
    [
        ("seed", 8, "seed: 7 ", "seed: 8 "),
        ("constraint.limit", -1.5, "limit: -0.3", "limit: -1.5"),
        ("constraint.limit", 1e-05, "limit: -0.3", "limit: 1e-05"),
        ("lora.rank", 8, "rank: 0,", "rank: 8,"),
        ("lora.modules", ["q", "v"], "modules: all-linear", 'modules: ["q", "v"]'),
        ("lora.modules", "a: #b\n", "modules: all-linear", 'modules: "a: #b\\n"'),
        ("revision", "main", "revision:  ", 'revision: "main"  '),
        ("seed", None, "seed: 7 ", "seed: null "),
        ("methods.b", {"start": "ß"}, "b: {start: dpo}", 'b: {"start": "ß"}'),
        ("sources", [], "- {format: world}\n  - format: pku ", "[] "),
        ("methods", {"c": 1}, "a: {start: sft}\n  b: {start: dpo}", '{"c": 1}'),
    ],
)
def test_a_value_changes_and_all_else_stays(key: str, value: Any, old: str, new: str) -> None:
    changed = assign(TEXT, {key: value})
    assert changed.replace(" ", "") == TEXT.replace(old, new).replace(" ", "")
    place = load(changed)
    for name in key.split("."):
        place = place[name]
    assert place == value and type(place) is type(value)


INHERITING = """\
training: {epochs: 1.0, max_steps: null}   # of every training
reward:
  training: {}
cost:
  training: {max_steps: 5}   # short
policy:
  runs:
    a: {training: {}}
  training:
    max_steps: 7   # long
"""


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("reward.training.epochs", "training: {}", "training: {epochs: 2.0}"),
        ("cost.training.epochs", "{max_steps: 5}", "{epochs: 2.0, max_steps: 5}"),
        ("policy.training.epochs", "    max_steps: 7", "    epochs: 2.0\n    max_steps: 7"),
        ("policy.runs.a.training.epochs", "a: {training: {}}", "a: {training: {epochs: 2.0}}"),
        ("cost.training.max_steps", "max_steps: 5", "max_steps: 2.0"),
    ],
)
def test_what_a_section_takes_from_the_top_is_put_into_it(key: str, old: str, new: str) -> None:
    assert assign(INHERITING, {key: 2.0}) == INHERITING.replace(old, new, 1)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("reward.training.epoch", "did you mean reward.training.epochs?"),
        ("reward.epochs", "did you mean training.epochs?"),
        ("reward.lora.rank", "no key reward.lora.rank"),
    ],
)
def test_a_section_takes_nothing_else(key: str, hint: str) -> None:
    with pytest.raises(PipelineError, match=hint.replace("?", r"\?")):
        assign(INHERITING, {key: 2.0})


def test_an_aliased_section_takes_nothing() -> None:
    text = "training: {epochs: 1}\na: {training: &x {}}\nb: {training: *x}\n"
    with pytest.raises(PipelineError, match="cannot be set alone"):
        assign(text, {"b.training.epochs": 2})


@pytest.mark.parametrize("key", ["policies.sft-v1.1", "policies.7"])
def test_a_name_with_a_dot_or_that_is_no_text_is_refused(key: str) -> None:
    """The names of policies may have dots."""
    with pytest.raises(PipelineError, match=rf"^params.yaml: {key} has a name with '.'"):
        assign("policies: {sft-v1.1: sft, 7: sft}\n", {key: "other"})


def test_several_keys_at_once() -> None:
    assert load(assign(TEXT, {"seed": 1, "lora.alpha": 2.0}))["lora"]["alpha"] == 2.0


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("constraint.limt", "did you mean constraint.limit?"),
        ("limit", "did you mean constraint.limit?"),
        ("seed.of", "no key seed.of"),
        ("zzz", "its sections are seed, constraint"),
        ("methods.zzzzzzzzzzzzzz", "no key methods.zzz"),
    ],
)
def test_an_unknown_key_is_refused(key: str, hint: str) -> None:
    with pytest.raises(PipelineError, match=hint.replace("?", r"\?")):
        assign(TEXT, {key: 1})


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("methods.a.steps", "a: {start: sft}", "a: {steps: 4, start: sft}"),
        ("methods.c", "  a: {start", "  c: 4\n  a: {start"),
        ("constraint.delta", "  limit: -0.3", "  delta: 4\n  limit: -0.3"),
        ("lora.rank", "rank: 0,", "rank: 4,"),
    ],
)
def test_a_plus_adds_a_key_to_a_mapping_that_is_there(key: str, old: str, new: str) -> None:
    assert assign(TEXT, {f"+{key}": 4}) == TEXT.replace(old, new)


@pytest.mark.parametrize("key", ["zzz", "zzz.of", "seed.of", "revision.of", "methods.zzzzzzz.of"])
def test_a_plus_makes_no_mapping(key: str) -> None:
    with pytest.raises(PipelineError, match=f"no key {key}; ") as refused:
        assign(TEXT, {f"+{key}": 4})
    assert "adds it" not in str(refused.value)


def test_an_unknown_key_may_be_a_new_one() -> None:
    with pytest.raises(PipelineError, match=r"constraint.limit\?, or \+constraint.limt adds it$"):
        assign(TEXT, {"constraint.limt": 1})


def test_a_value_that_an_alias_shares_is_refused() -> None:
    with pytest.raises(PipelineError, match="cannot be set alone"):
        assign("a: &x {b: 1}\nc: *x\n", {"c.b": 2})


def test_what_is_no_yaml_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"seed: inf is no number"):
        assign(TEXT, {"seed": float("inf")})
    with pytest.raises(PipelineError, match=r"params.yaml:\d+: not valid YAML"):
        assign("a: [\n", {"a": 1})


def test_assignments_are_read_as_yaml_1_2() -> None:
    assert parse("a.b=1e-5") == ("a.b", 1e-5)
    assert parse("a=on") == ("a", "on")
    assert parse("a=x=y") == ("a", "x=y")
    assert parse("a=[1, {b: null}]") == ("a", [1, {"b": None}])
    for bad in ("a", "=1", "a=[1"):
        with pytest.raises(PipelineError):
            parse(bad)


@pytest.mark.parametrize("value", ["0x10", "0o17", "017", "0b11", "1_000", "2026-11-29", ".inf"])
def test_a_number_is_decimal_and_a_text_that_looks_otherwise_is_quoted(value: str) -> None:
    """Readers of YAML differ in what these are, or the same text is another number to people."""
    with pytest.raises(PipelineError, match=r"^seed: the value:1: .* is no decimal number"):
        parse(f"seed={value}")
    with pytest.raises(PipelineError, match=r"^seed: the value:1: .* is no decimal number"):
        parse(f"seed=[1, {{a: {value}}}]")
    assert parse(f'seed="{value}"') == ("seed", value)


@pytest.mark.parametrize("value", ["Run # 3", "#3", "[1, 2] # x", "a: b # c"])
def test_what_would_be_a_comment_is_no_part_of_a_value(value: str) -> None:
    with pytest.raises(PipelineError, match=r"^report.title: '#.*' is a comment to YAML; quote"):
        parse(f"report.title={value}")
    assert parse(f"report.title='{value}'")[1] == value


def test_a_key_is_set_once() -> None:
    assert settings_of(["a=1", "b=2"]) == {"a": 1, "b": 2}
    with pytest.raises(PipelineError, match=r"^a: set twice; set it once$"):
        settings_of(["a=1", "b=2", " a=3"])
    with pytest.raises(PipelineError, match=r"^a: set twice; set it once$"):
        settings_of(["a=1", "+a=3"])


def test_a_file_is_written_through_its_link_and_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    kept = tmp_path / "shared" / "mine.yaml"
    kept.write_text("old")
    kept.chmod(0o600)
    link = tmp_path / "params.yaml"
    link.symlink_to(kept)
    replace_file(link, "new")
    assert link.is_symlink() and kept.read_text() == "new" and kept.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_keeps_its_line_ends(tmp_path: Path, end: str) -> None:
    """Editors on Windows write such, and `git diff` called every line changed by one `--set`."""
    params = tmp_path / "params.yaml"
    params.write_text("seed: 1\nbeta: 2\n", newline=end)
    replace_file(params, assign(yaml_text.read(params), {"seed": 3}))
    assert params.read_bytes() == f"seed: 3{end}beta: 2{end}".encode()


def test_a_file_that_cannot_be_written_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").mkdir()
    with pytest.raises(PipelineError, match=r"params\.yaml: cannot be written \(Is a directory\)"):
        replace_file(tmp_path / "params.yaml", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_the_span_of_a_key() -> None:
    assert span("a: {b: 12}\n", "a.b") == (7, 9)
    assert span("a: 1\n", "a.b") is None and span("a: [", "a") is None


def test_a_key_that_a_merge_brings_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"params.yaml: b\.x comes from a merge"):
        assign("a: &a {x: 1}\nb: {<<: *a, y: 2}\n", {"b.x": 3})


@pytest.mark.parametrize(
    "value", ["[" * 5000, "9" * 5000, "2024-99-99", "!!python/name:os.system x", "&a [*a]"]
)
def test_a_value_beyond_the_limits_is_refused_in_one_line(value: str) -> None:
    with pytest.raises(PipelineError, match="seed: the value:") as caught:
        parse(f"seed={value}")
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


def test_a_setting_deeper_than_params_are_is_refused() -> None:
    deep: Any = 1
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(PipelineError, match=r"params\.yaml: (seed|line 2)"):
        assign(TEXT, {"seed": deep})


def test_a_list_is_no_params() -> None:
    with pytest.raises(PipelineError, match="expected a mapping"):
        assign("- 1\n- 2\n", {"seed": 1})


def test_a_key_set_with_and_without_its_plus_loses_no_value_silently() -> None:
    with pytest.raises(PipelineError, match=r"^constraint\.limit: set twice; set it once$"):
        assign(TEXT, {"constraint.limit": 1, "+constraint.limit": 2})

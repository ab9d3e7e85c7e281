"""Params files that say only what differs: what they stand for, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.dvc.overlay import TABLES, differences, merged, whole
from pipeline.errors import PipelineError
from tests.shipped import PRESETS, ROOT

BASE = """\
# The default.

seed: 7                       # of everything random
training:                     # of every training
  batch_size: 32              # rows
  max_steps: null
prepare:
  sft:                        # rows
    - {format: world}
sft:
  training: {max_steps: 400}
  base: scratch               # or a folder
lagrangian_dpo:
  runs:
    one: {lam: dual}          # of the default
    two:
      lam: 1.0
lambda_path:
  runs: {}                    # none
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "default.yaml").write_text(BASE)
    return tmp_path


def made(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text)
    return whole(folder / "mine.yaml")


def load(text: str) -> dict[str, object]:
    content: dict[str, object] = YAML(typ="safe").load(text)
    return content


def test_a_file_that_extends_nothing_is_whole(folder: Path) -> None:
    assert whole(folder / "default.yaml") == BASE


def test_what_differs_is_written_into_the_text_of_the_base(folder: Path) -> None:
    text = made(
        folder,
        "# Mine.\n\nextends: default.yaml\nseed: 3\nprepare:\n  sft:\n    - {format: pku, path:"
        " a}\n",
    )
    expected = BASE.replace("# The default.", "# Mine.").replace("seed: 7", "seed: 3")
    assert text == expected.replace("- {format: world}", "- {format: pku, path: a}")


def test_a_section_is_merged_and_a_table_of_names_replaced(folder: Path) -> None:
    text = made(
        folder,
        "extends: default.yaml\nsft:\n  base: models/base\nlagrangian_dpo:\n  runs:\n    mine:"
        " {lam: 2.0}   # own\n",
    )
    content = load(text)
    assert content["sft"] == {"training": {"max_steps": 400}, "base": "models/base"}
    assert content["lagrangian_dpo"] == {"runs": {"mine": {"lam": 2.0}}}
    assert "# or a folder" in text and "# own" not in text.split("mine")[0]


def test_an_overlay_may_extend_another(folder: Path) -> None:
    (folder / "between.yaml").write_text(
        "# Between.\n\nextends: default.yaml\nseed: 3\nsft: {base: models/base}\n"
    )
    text = made(folder, "# Mine.\n\nextends: between.yaml\nsft:\n  training: {batch_size: 8}\n")
    assert text.startswith("# Mine.\n\nseed: 3") and "Between" not in text
    assert load(text)["sft"] == {
        "base": "models/base", "training": {"max_steps": 400, "batch_size": 8},
    }  # fmt: skip
    assert differences(folder / "mine.yaml") == {"sft.training.batch_size": 8}
    (folder / "between.yaml").write_text("extends: mine.yaml\nseed: 3\n")
    with pytest.raises(PipelineError, match=r"between\.yaml: extends: mine\.yaml extends this one"):
        whole(folder / "mine.yaml")


@pytest.mark.parametrize(
    "runs", ["runs: {}", "runs:\n    x:\n      lam: 1.5     # here\n    y: {lam: 0.5}"]
)
@pytest.mark.parametrize("section", ["lagrangian_dpo", "lambda_path"])
def test_tables_of_either_layout_take_each_others_place(
    folder: Path, section: str, runs: str
) -> None:
    text = made(folder, f"extends: default.yaml\n{section}:\n  {runs}\n")
    overlay = load(f"{section}:\n  {runs}\n")
    assert load(text)[section] == overlay[section]


def test_a_stage_may_say_of_a_block_what_the_base_leaves_to_the_top(folder: Path) -> None:
    text = made(folder, "extends: default.yaml\nsft:\n  training: {batch_size: 8}\n")
    assert load(text)["sft"]["training"] == {"max_steps": 400, "batch_size": 8}  # type: ignore[index]


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("extends: none.yaml\n", "mine.yaml: extends: 'none.yaml' is no file beside it"),
        ("extends: 3\n", "mine.yaml: extends: 3 is no file beside it"),
        (
            "extends: mine.yaml\n",
            "mine.yaml: extends: mine.yaml extends this one in turn; name another",
        ),
        ("extends: default.yaml\nsft:\n  bsae: x\n", "mine.yaml: default.yaml has no key sft.bsae"),
        (
            "extends: default.yaml\nsft:\n  training: {batch: 1}\n",
            "mine.yaml: default.yaml has no key sft.training.batch",
        ),
        *(
            (
                f"extends: default.yaml\n{layout}\n",
                "mine.yaml: cannot be written out whole (an alias",
            )
            for layout in (
                "<<: {seed: 3}",
                "sft.base: x",
                "seed: &a 3\ntraining: {batch_size: *a}",
            )
        ),
    ],
)
def test_what_cannot_be_written_out_is_refused_in_one_line(
    folder: Path, overlay: str, message: str
) -> None:
    with pytest.raises(PipelineError) as caught:
        made(folder, overlay)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_circle_is_told_whatever_its_files_are_called(folder: Path) -> None:
    (folder / "other.yaml").write_text(f"extends: ../{folder.name}/mine.yaml\n")
    with pytest.raises(PipelineError, match=r"other\.yaml: extends: .*mine\.yaml extends this one"):
        made(folder, f"extends: ../{folder.name}/other.yaml\n")


def test_differences_are_the_keys_with_other_values(folder: Path) -> None:
    made(
        folder,
        "extends: default.yaml\nseed: 7\nsft:\n  base: x\nlambda_path:\n  runs: {a: {lam: 1}}\n",
    )
    assert differences(folder / "mine.yaml") == {
        "sft.base": "x",
        "lambda_path.runs": {"a": {"lam": 1}},
    }
    assert differences(folder / "default.yaml") == {}


def test_params_are_the_default_and_every_other_preset_says_what_differs() -> None:
    default = (ROOT / "params/default.yaml").read_text()
    assert (ROOT / "params.yaml").read_text() == default
    for path in PRESETS:
        assert path.name == "default.yaml" or differences(path), path.name


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_a_preset_says_nothing_that_the_default_says(path: Path) -> None:
    if path.name == "default.yaml":
        return
    overlay = load(path.read_text())
    base = load(whole(path.parent / str(overlay.pop("extends"))))
    assert merged(base, overlay) == load(whole(path))
    changed = differences(path)
    said = [
        line
        for line in path.read_text().splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    assert len(changed) <= len(said)


def test_tables_are_those_whose_names_are_the_users() -> None:
    base = load((ROOT / "params.yaml").read_text())
    for table in TABLES:
        section, _, name = table.partition(".")
        assert isinstance(base[section] if not name else base[section][name], dict)  # type: ignore[index]

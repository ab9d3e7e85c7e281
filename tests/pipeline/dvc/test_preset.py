"""Choosing a preset: what params.yaml becomes, and that nobody's edits are lost."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from pipeline.dvc.parameters import assign
from pipeline.dvc.preset import check_change, is_edited, main, select
from pipeline.errors import PipelineError

ROOT = Path(__file__).resolve().parents[3]
DEFAULT = (ROOT / "params.yaml").read_text().replace("seed: 7 ", "seed: 1  # λ")
SMALL = "# a small run\n" + DEFAULT.replace("seed: 1 ", "seed: 2 ")
LARGE = DEFAULT.replace("seed: 1 ", "seed: 3 ").replace(
    "folder: data/raw ", "# rows\n  folder: 'rows # here' "
)
BROKEN = DEFAULT.replace("seed: 1 ", "seed: -1 ")


def git(root: Path, *arguments: str) -> None:
    identity = [
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@example.org",
        "-c",
        "commit.gpgsign=false",
    ]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a committed params.yaml, two presets and a folder of rows."""
    for name, text in {
        "params.yaml": DEFAULT,
        "params/small-cpu.yaml": SMALL,
        "params/large-gpu.yaml": LARGE,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "my rows").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where the library lies that checks a preset
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def params(root: Path) -> str:
    return (root / "params.yaml").read_text()


@pytest.mark.parametrize(
    ("key", "value"),
    [("beta", "0,5"), ("+lagrangian_dpo.runs.anchored.soups", 2), ("certify.prompts", 0)],
)
def test_new_values_that_no_stage_takes_are_refused(root: Path, key: str, value: object) -> None:
    with pytest.raises(PipelineError, match=f"^params.yaml: {re.escape(key.lstrip('+'))}"):
        check_change(DEFAULT, assign(DEFAULT, {key: value}), root)


def test_new_values_that_the_stages_take_pass(root: Path) -> None:
    check_change(
        DEFAULT, assign(DEFAULT, {"beta": 0.5, "+lagrangian_dpo.runs.bernoulli.soup": 2}), root
    )


def test_params_that_no_stage_took_before_are_left_to_the_stages(root: Path) -> None:
    check_change(BROKEN, assign(BROKEN, {"beta": 0.5}), root)


@pytest.mark.parametrize("name", ["params/small-cpu.yaml", "small-cpu.yaml", "small-cpu"])
def test_params_become_the_preset(root: Path, name: str) -> None:
    select(name, root=root)
    assert params(root) == SMALL
    assert sorted(path.name for path in root.iterdir()) == [
        ".git",
        ".scratch",
        "my rows",
        "params",
        "params.yaml",
    ]


def test_a_preset_may_lie_anywhere(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    preset = tmp_path_factory.mktemp("elsewhere") / "own.yaml"
    preset.write_text(DEFAULT.replace("seed: 1 ", "seed: 9 "))
    select(str(preset), root=root)
    assert params(root) == preset.read_text()


@pytest.mark.parametrize(
    ("name", "old"),
    [("default", "data/raw"), ("small-cpu", "data/raw"), ("large-gpu", "'rows # here'")],
)
@pytest.mark.parametrize("folder", ["my rows", 'a "b": #c', "ö"])
def test_data_changes_the_folder_alone(root: Path, name: str, old: str, folder: str) -> None:
    (root / folder).mkdir(exist_ok=True)
    select(name, root=root)
    before = params(root)
    select(name, folder, root=root)
    head, tail = before.split(old)
    assert params(root).startswith(head) and params(root).endswith(tail)
    loaded = YAML(typ="safe").load(params(root))
    assert loaded["prepare"]["folder"] == folder
    select("default", root=root)
    assert params(root) == DEFAULT, "a folder set by --data is no edit of the user's"


def test_a_preset_may_change_and_be_chosen_again(root: Path) -> None:
    select("small-cpu", root=root)
    (root / "params/small-cpu.yaml").write_text(SMALL.replace("seed: 2 ", "seed: 5 "))
    select("small-cpu", "my rows", root=root)
    assert "seed: 5" in params(root)
    (root / "params/small-cpu.yaml").unlink()
    select("default", root=root)
    assert params(root) == DEFAULT


def test_edits_are_not_lost(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = DEFAULT.replace("seed: 1 ", "seed: 7 ")
    (root / "params.yaml").write_text(mine)
    assert main(["small-cpu"], root) == 2
    assert params(root) == mine
    assert len(caplog.records) == 1 and "\n" not in caplog.text.strip()
    assert caplog.text.strip().endswith(": python -m pipeline.dvc.preset small-cpu --force"), (
        "`run --params` has another --force, and the form none"
    )


@pytest.mark.parametrize(
    "edit", ["# a remark of mine\n" + DEFAULT, DEFAULT + "x: 1\n", "prepare: [\n"]
)
def test_any_edit_counts(root: Path, edit: str) -> None:
    (root / "params.yaml").write_text(edit)
    with pytest.raises(PipelineError, match="your own edits"):
        select("default", root=root)


def test_params_that_dvc_wrote_anew_are_no_edit(root: Path) -> None:
    """`dvc exp run -S` lays the file out in its own way; values and remarks are the same."""
    shutil.copy(ROOT / "params/default.yaml", root / "params/shipped.yaml")
    select("shipped", root=root)
    before = params(root)
    assert apply_overrides(root / "params.yaml", ["constraint.limit=-0.5"]) is None
    assert is_edited(params(root), root), "another limit"
    apply_overrides(root / "params.yaml", ["constraint.limit=-0.8"])
    assert params(root) != before and not is_edited(params(root), root)
    assert is_edited(params(root) + "# mine\n", root)


def test_force_keeps_each_edited_file(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for seed in (7, 8):
        (root / "params.yaml").write_text(f"seed: {seed}\n")
        assert main(["small-cpu", "--force"], root) == 0
        assert params(root) == SMALL
    assert (root / "params.yaml.saved").read_text() == "seed: 7\n"
    assert (root / "params.yaml.saved.2").read_text() == "seed: 8\n"
    assert "kept as params.yaml.saved.2" in caplog.text


def test_default_is_the_last_commit(root: Path) -> None:
    select("large-gpu", root=root)
    git(root, "commit", "-am", "large is the default now")
    select("small-cpu", root=root)
    select("default", root=root)
    assert params(root) == LARGE


def test_default_is_that_of_this_repository_whatever_a_hook_of_git_names(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = root / "other"
    other.mkdir()
    (other / "params.yaml").write_text("seed: 1\n")
    git(other, "init")
    git(other, "add", ".")
    git(other, "commit", "-m", "first")
    select("small-cpu", root=root)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    select("default", root=root)
    assert params(root) == DEFAULT


def test_params_may_be_absent(root: Path) -> None:
    (root / "params.yaml").unlink()
    select("small-cpu", root=root)
    assert params(root) == SMALL


def test_params_that_are_a_folder_are_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "params.yaml").unlink()
    (root / "params.yaml").mkdir()
    assert main(["small-cpu"], root) == 2
    assert "params.yaml: cannot be read (Is a directory)" in caplog.text


def test_without_a_commit_presets_work_and_default_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "params").mkdir()
    (tmp_path / "params/small.yaml").write_text(SMALL)
    select("small", root=tmp_path)
    assert params(tmp_path) == SMALL
    with pytest.raises(PipelineError, match="no commit"):
        select("default", root=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["params/smal-cpu.yaml"], "did you mean params/small-cpu.yaml?"),
        (["large"], "did you mean params/large-gpu.yaml?"),
        (["defualt"], "did you mean default?"),
        (["zzz"], "one of default, params/large-gpu.yaml, params/small-cpu.yaml"),
        (["small-cpu", "--data", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_a_mistake_is_named_in_one_line(
    root: Path, caplog: pytest.LogCaptureFixture, arguments: list[str], message: str
) -> None:
    assert main(arguments, root) == 2
    assert message in caplog.text and len(caplog.text.strip().splitlines()) == 1
    assert params(root) == DEFAULT


def test_data_needs_a_place_in_the_preset(root: Path) -> None:
    (root / "params/bare.yaml").write_text("seed: 4\n")
    with pytest.raises(PipelineError, match=r"no key prepare\.folder"):
        select("bare", "my rows", root=root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BROKEN.encode(), "broken: seed: input should be greater than or equal to 0, got -1"),
        (
            DEFAULT.replace("    sft: sft", '    "x;y": sft\n    sft: sft').encode(),
            "broken: evaluate.policies.'x;y': a name",
        ),
        (b"seed: 4\n", "broken: answer is missing"),
        (b"seed: [1\n", "broken.yaml:2: not valid YAML"),
        (b"a: " + b"[" * 5000, "broken.yaml:1: more than 20 lists"),
        (b"\xff", "broken.yaml: not valid YAML"),
        (b"x" * 300_000, "broken.yaml: more than 200 kB"),
    ],
    ids=["seed", "name", "part", "text", "deep", "bytes", "large"],
)
@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_a_preset_that_no_stage_takes_replaces_nothing(
    root: Path, caplog: pytest.LogCaptureFixture, content: bytes, message: str, force: list[str]
) -> None:
    (root / "params/broken.yaml").write_bytes(content)
    assert main(["broken", *force], root) == 2
    assert len(caplog.records) == 1 and len(caplog.text.strip().splitlines()) == 1
    assert caplog.messages[0].startswith(message)
    assert (
        params(root) == DEFAULT
        and not (root / ".scratch").exists()
        and not list(root.glob("*.saved"))
    )

"""What git ignores and stages read is there in a working tree too, and refused where only workers
would lack it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.dvc import inputs
from pipeline.dvc.checkout import working_tree
from pipeline.dvc.dag import load_dag
from pipeline.errors import PipelineError
from tests.pipeline.project import Project, add_report, git


@pytest.fixture
def reading(project: Project) -> Project:
    """A project whose first stage reads a folder of files that git ignores but for a README, and a
    template.
    """
    root = project.root
    graph = json.loads((root / "dvc.yaml").read_text())
    graph["stages"]["first"]["deps"].append("rows")
    (root / "dvc.yaml").write_text(json.dumps(graph))
    (root / ".gitignore").write_text((root / ".gitignore").read_text() + "/rows/**/*.json\n/mine\n")
    for name in ("rows/README.md", "rows/own/a.json", "mine/chat.jinja", "labels/labelled-1.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    project.set(
        first={
            "template": "mine/chat.jinja",
            "folder": "labels",
            "hub": "some/model",
            "text": "x" * 5000,
        }
    )
    git(root, "add", ".")
    git(root, "commit", "-qm", "reads")
    return project


def test_files_that_neither_git_nor_dvc_holds(reading: Project) -> None:
    root = reading.root
    dag = load_dag(reading.root)
    assert inputs.loose(root, dag, dag) == ["mine/chat.jinja", "rows/own/a.json"]
    with pytest.raises(
        PipelineError, match=r"mine/chat\.jinja: neither git nor DVC holds it.*`dvc add` a folder"
    ):
        inputs.check_held(root, dag, ["first"])
    shutil.move(root / "mine", root / "kept")  # ignored too, and named by nothing
    reading.dvc("add", "--quiet", "rows/own")
    git(root, "add", ".")
    inputs.check_held(root, dag, ["first"])
    (root / "rows/more.json").write_text("beside what DVC holds")
    assert inputs.loose(root, dag, dag) == ["rows/more.json"]


def test_a_tree_gets_them_and_dvc_finds_nothing_changed(reading: Project) -> None:
    root = reading.root
    reading.dvc("repro", "--quiet", "first")
    with working_tree(root, "HEAD", "one", lambda *_: None) as (tree, _):
        inputs.carry(root, tree, load_dag(tree))
        inputs.carry(root, tree, load_dag(tree))
        assert (tree / "rows/own/a.json").read_text() == "rows/own/a.json"
        assert (tree / "mine/chat.jinja").exists() and not (tree / "labels").exists()
        shutil.copy2(root / "dvc.lock", tree)
        assert "rows" not in Project(tree).dvc("status", "first")
    assert Path(root, "rows/own/a.json").exists(), "the tree held links"


def test_comparisons_of_other_seeds_travel_with_the_report_and_nothing_else_does(
    project: Project,
) -> None:
    root = project.root
    add_report(root)
    git(root, "add", ".")
    git(root, "commit", "-qm", "a report")
    (root / "reports/seeds/8.json").write_text("{}")
    dag = load_dag(root)
    assert inputs.results(root, dag, ["report"]) == {"reports/seeds/8.json": "{}"}
    assert inputs.results(root, dag, ["first"]) == {}
    inputs.check_held(root, dag, dag)
    git(root, "add", "--force", "reports/seeds/8.json")
    assert inputs.results(root, dag, ["report"]) == {}, "git holds it, so workers have it"
    (root / "reports/seeds/notes.txt").write_text("mine")
    with pytest.raises(PipelineError, match=r"reports/seeds/notes\.txt: neither git nor DVC holds"):
        inputs.check_held(root, dag, dag)


def test_labels_that_are_no_text_are_named(tmp_path: Path) -> None:
    labels = tmp_path / "data/labels/labelled-1.jsonl"
    labels.parent.mkdir(parents=True)
    labels.write_bytes("größer".encode())
    assert inputs.answers(tmp_path) == {"data/labels/labelled-1.jsonl": "größer"}
    labels.write_bytes("größer".encode("latin-1"))
    with pytest.raises(
        PipelineError, match=r"labels/labelled-1\.jsonl: cannot be read \(not UTF-8"
    ):
        inputs.answers(tmp_path)


def test_a_path_that_leads_out_of_the_workspace_is_refused(reading: Project) -> None:
    graph = json.loads((reading.root / "dvc.yaml").read_text())
    graph["stages"]["first"]["deps"].append("../elsewhere")
    (reading.root / "dvc.yaml").write_text(json.dumps(graph))
    dag = load_dag(reading.root)
    with pytest.raises(
        PipelineError, match=r"\.\./elsewhere: leads out of the workspace.*absolute path"
    ):
        inputs.loose(reading.root, dag, dag)

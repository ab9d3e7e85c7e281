"""Objects of DVC's cache that are cut or overwritten are found, and the remedy brings the result
back.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo

from pipeline.doctor import examine
from pipeline.dvc.dag import load_dag
from pipeline.dvc.damage import damages
from pipeline.errors import PipelineError
from tests.pipeline.project import Project


@pytest.mark.parametrize(("left", "thorough"), [("", False), ("12", False), ("7", True)])
def test_a_damaged_result_is_found_and_made_anew(
    project: Project, left: str, thorough: bool
) -> None:
    root = project.root
    project.dvc("repro", "--quiet", "first")
    assert not list(damages(root, thorough=True))
    with Repo(str(root)) as repo:
        (path,) = [Path(out.cache_path) for out in repo.index.outs if out.def_path == "out/first"]
    path.chmod(0o644)
    path.write_text(left)
    path.chmod(0o444)
    (root / "out/first").unlink()
    project.dvc("checkout", "--quiet", "first")
    assert (root / "out/first").read_text() == left, "DVC takes it as it is"
    assert project.dvc("status", "first") == "Data and pipelines are up to date.\n"
    assert [one.output for one in damages(root, thorough)] == ["out/first"]
    assert bool(list(damages(root, thorough=False))) != thorough, (
        "the same size shows in the content alone"
    )
    (told,) = [
        one.what
        for one in examine(root, "http://127.0.0.1:9/api", thorough)
        if "is damaged in DVC" in one.what
    ]
    assert told.startswith("DVC cache: out/first is damaged") and str(path) in told
    (remedy,) = [part for part in told.split(", then run")[0].split("; ") if part.startswith("rm")]
    subprocess.run(shlex.split(remedy), cwd=root, check=True)
    project.dvc("repro", "--quiet", "first")
    assert (root / "out/first").read_text() == "0" and not list(damages(root, thorough=True))


def test_a_folder_s_listing_is_read_and_what_nothing_names_is_told_too(project: Project) -> None:
    root = project.root
    (root / "rows").mkdir()
    (root / "rows/a").write_text("a row")
    project.dvc("add", "--quiet", "rows")
    (listing,) = (root / ".dvc/cache/files/md5").glob("??/*.dir")
    listing.chmod(0o644)
    listing.write_text(listing.read_text()[:-3])
    assert [one.output for one in damages(root, thorough=False)] == ["rows"]
    (row,) = [path for path in (root / ".dvc/cache/files/md5").glob("??/*") if path != listing]
    row.chmod(0o644)
    row.write_text("")
    assert [one.output for one in damages(root, thorough=False) if one.object == row] == [""]


def test_a_merge_of_dvc_lock_that_was_left_open_is_told(project: Project) -> None:
    project.dvc("repro", "--quiet", "first")
    path = project.root / "dvc.lock"
    path.write_text(f"<<<<<<< HEAD\n{path.read_text()}")
    (wrong,) = [
        one.what for one in examine(project.root, "http://127.0.0.1:9/api") if one.level == "wrong"
    ]
    assert "'dvc.lock'" in wrong and "git checkout --ours dvc.lock" in wrong
    with pytest.raises(PipelineError, match=r"git checkout --ours dvc\.lock"):
        load_dag(project.root)


@pytest.mark.parametrize("content", ["<<<<<<< HEAD\nstages:\n", "stages: 3\n", "- 1\n"])
def test_a_dvc_yaml_that_is_none_is_told(project: Project, content: str) -> None:
    (project.root / "dvc.yaml").write_text(content)
    (wrong, *_) = [
        one.what for one in examine(project.root, "http://127.0.0.1:9/api") if one.level == "wrong"
    ]
    assert "dvc.yaml" in wrong and "\n" not in wrong


def test_missing_params_are_told_by_name(project: Project) -> None:
    (project.root / "params.yaml").unlink()
    with pytest.raises(PipelineError, match=r"params\.yaml: no such file"):
        load_dag(project.root)

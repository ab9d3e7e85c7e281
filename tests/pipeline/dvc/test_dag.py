"""The graph that `load_dag` reads: its fields, its order, and its agreement with DVC's own
commands.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.exceptions import DvcException
from dvc.repo import Repo

from pipeline.dvc.dag import load_dag

GRAPH = """
stages:
  last:
    cmd: python -m stages.last
    deps: [models]
    outs: [page.html]
  train:
    foreach: ${runs}
    do:
      desc: One run
      cmd: python -m stages.train ${key}
      deps:
        - data.txt
        - models/base
        - ${item.file}
      params:
        - rate
        - runs.${key}
      outs:
        - models/train/${key}
      metrics:
        - metrics/${key}.json
      meta: {pool: gpu, gpus: 1}
  first:
    cmd: python -m stages.first
    outs: [models/base]
"""
PARAMS = "rate: 1e-5\nruns: {a: {file: a.txt}, b: {file: data.txt}}\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Repo.init(str(tmp_path), no_scm=True).close()
    (tmp_path / "dvc.yaml").write_text(GRAPH)
    (tmp_path / "params.yaml").write_text(PARAMS)
    return tmp_path


def dvc(root: Path, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_a_stage_has_everything_resolved(root: Path) -> None:
    stage = load_dag(root)["train@a"]
    assert dataclasses.asdict(stage) == {
        "name": "train@a",
        "desc": "One run",
        "cmd": "python -m stages.train a",
        "deps": ("data.txt", "models/base", "a.txt"),
        "params": ("rate", "runs.a"),
        "outs": ("models/train/a",),
        "metrics": ("metrics/a.json",),
        "meta": {"pool": "gpu", "gpus": 1},
        "upstream": ("first",),
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        stage.cmd = "other"  # type: ignore[misc]


def test_stages_follow_their_upstream_and_else_the_file(root: Path) -> None:
    dag = load_dag(root)
    assert list(dag) == ["first", "train@a", "train@b", "last"]
    assert dag["last"].upstream == ("first", "train@a", "train@b")
    assert dag["first"].desc == "" and dag["first"].meta == {}


def test_no_runs_are_no_stages(root: Path) -> None:
    (root / "params.yaml").write_text("rate: 1e-5\nruns: {}\n")
    assert list(load_dag(root)) == ["first", "last"]


def test_a_missing_key_is_an_error_that_names_it(root: Path) -> None:
    (root / "params.yaml").write_text("rate: 1e-5\n")
    with pytest.raises(DvcException, match="runs"):
        load_dag(root)


def test_the_graph_is_the_one_that_dvc_shows(repo_root: Path, tmp_path: Path) -> None:
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_text((repo_root / name).read_text())
    Repo.init(str(tmp_path), no_scm=True).close()
    dag = load_dag(tmp_path)

    assert sorted(dag) == sorted(dvc(tmp_path, "stage", "list", "--name-only").split())

    drawing = dvc(tmp_path, "dag", "--mermaid")
    names = dict(re.findall(r'(node\d+)\["(.+)"\]', drawing))
    edges = {
        (names[source], names[target])
        for source, target in re.findall(r"(node\d+)-->(node\d+)", drawing)
    }
    assert edges == {(source, stage.name) for stage in dag.values() for source in stage.upstream}

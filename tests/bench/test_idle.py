"""The laboratory of a second `dvc repro`: forms of dvc.yaml, runs in turn, an unfinished run
refused in one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from bench import cost, idle
from dualign.core.errors import DualignError
from pipeline.dvc.dag import load_dag


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The repository's graph, of which nothing has run."""
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_text((cost.ROOT / name).read_text())
    Repo.init(str(tmp_path), no_scm=True).close()
    return tmp_path


def definitions(project: Path) -> dict[str, dict[str, Any]]:
    stages = YAML(typ="safe").load(project / "dvc.yaml")["stages"]
    return {name: stage.get("do", stage) for name, stage in stages.items()}


@pytest.mark.parametrize("form", idle.FORMS)
def test_every_form_has_the_instances_of_the_graph(project: Path, form: str) -> None:
    instances = set(load_dag(project))
    idle.rewrite(project / "dvc.yaml", idle.FORMS[form])
    assert set(load_dag(project)) == instances


def test_code_as_one_keeps_the_script_the_data_and_the_params(project: Path) -> None:
    before = definitions(project)["sft"]
    idle.rewrite(project / "dvc.yaml", idle.code_as_one)
    after = definitions(project)["sft"]
    assert len(before["deps"]) > 4
    assert after["deps"] == ["stages/sft.py", "dualign", "data/prepared/sft.parquet", "models/base"]
    assert after["params"] == before["params"]


def test_without_params_keeps_the_dependencies(project: Path) -> None:
    before = definitions(project)
    idle.rewrite(project / "dvc.yaml", idle.without_params)
    after = definitions(project)
    assert all(
        "params" not in stage and stage["deps"] == before[name]["deps"]
        for name, stage in after.items()
    )


def test_the_first_run_is_not_counted(tmp_path: Path) -> None:
    """In the first run of a project of one stage its stage runs."""
    seconds = idle.in_turn({"one": idle.Project(cost.one_stage(tmp_path))}, times=2)
    log = (tmp_path / "one-stage/log.txt").read_text()
    assert log.count("Running stage 'one'") == 1
    assert log.count("Data and pipelines are up to date.") == len(seconds["one"]) == 2


def test_the_page_gives_median_and_least_as_multiples_of_one_stage() -> None:
    page = idle.page({"one stage": [0.5, 0.4, 0.9], "as it is": [2.0, 1.5, 1.2]})
    assert "| as it is | 1.50 | 1.20 | 3.00 | 3.00 |" in page
    assert "3 runs of each" in page


def test_a_run_that_has_not_ended_is_refused_in_one_line(
    project: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in cost.WRITTEN:
        (project / name).mkdir(exist_ok=True)
    work = tmp_path_factory.mktemp("work")
    assert (
        idle.main(["--inputs", str(project), "--work", str(work), "--out", str(work)])
        == DualignError.status
    )
    (told,) = capsys.readouterr().err.splitlines()
    assert "does not exist" in told
    assert not (work / "idle.json").exists()

"""prefect.yaml against dvc.yaml, and what is refused before a server is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.dag import load_dag
from pipeline.deploy import become_worker, deploy, pools_of
from pipeline.errors import PipelineError
from tests.pipeline.project import Project


def test_every_pool_has_a_deployment_of_its_name(repo_root: Path) -> None:
    deployments = YAML(typ="safe").load(repo_root / "prefect.yaml")["deployments"]
    assert [made["name"] for made in deployments] == pools_of(load_dag(repo_root))
    for made in deployments:
        assert made["work_pool"]["name"] == made["name"]
        path, name = made["entrypoint"].split(":")
        assert f"def {name}(" in (repo_root / path).read_text()


def test_a_pool_without_a_deployment_is_named(project: Project, repo_root: Path) -> None:
    dag = load_dag(project.root)
    with pytest.raises(PipelineError, match=r"prefect\.yaml: not here"):
        deploy(project.root, dag, "process")
    (project.root / "prefect.yaml").write_text("deployments: [{name: gpu}]")
    with pytest.raises(PipelineError, match=r"prefect\.yaml: no deployment cpu, a pool in dvc\.yaml"):
        deploy(project.root, dag, "process")
    with pytest.raises(PipelineError, match=r"tpu: no stage of dvc\.yaml has this pool; one of cpu"):
        become_worker(project.root, dag, "tpu", 1, once=False)

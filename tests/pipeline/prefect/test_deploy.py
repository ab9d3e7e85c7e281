"""prefect.yaml against dvc.yaml, and what is refused before a server is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.dvc.dag import load_dag
from pipeline.errors import PipelineError
from pipeline.prefect.deploy import become_worker, deploy, pools_of
from tests.pipeline.project import Project


def test_every_pool_has_a_deployment_of_its_name(repo_root: Path) -> None:
    deployments = YAML(typ="safe").load(repo_root / "prefect.yaml")["deployments"]
    assert [made["name"] for made in deployments] == pools_of(load_dag(repo_root))
    for made in deployments:
        assert made["work_pool"]["name"] == made["name"]
        path, name = made["entrypoint"].split(":")
        assert f"def {name}(" in (repo_root / path).read_text()


@pytest.mark.slow
def test_what_prefect_refuses_is_told_in_its_own_words(
    project: Project, repo_root: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server)
    graph = project.root / "dvc.yaml"  # with a pool that no other test makes on this server
    graph.write_text(
        graph.read_text()
        .replace('"pool": "cpu"', '"pool": "lone"')
        .replace("pool: cpu", "pool: lone")
    )
    dag = load_dag(project.root)
    assert pools_of(dag) == ["lone"]
    told = (repo_root / "prefect.yaml").read_text().replace("name: cpu", "name: lone")
    (project.root / "prefect.yaml").write_text(told)
    with pytest.raises(
        PipelineError,
        match=r"^prefect work-pool create: Unknown work pool type 'none'\. Please choose",
    ):
        deploy(project.root, dag, "none")

    entrypoint = project.root / "pipeline/prefect/worker.py"
    entrypoint.parent.mkdir(parents=True, exist_ok=True)
    entrypoint.write_text("")
    with pytest.raises(
        PipelineError, match=r"^prefect deploy: Flow function with name 'stage' not found in"
    ):
        deploy(project.root, dag, "process")


def test_a_pool_without_a_deployment_is_named(project: Project, repo_root: Path) -> None:
    dag = load_dag(project.root)
    with pytest.raises(PipelineError, match=r"prefect\.yaml: not here"):
        deploy(project.root, dag, "process")
    (project.root / "prefect.yaml").write_text("deployments: [{name: gpu}]")
    with pytest.raises(
        PipelineError, match=r"prefect\.yaml: no deployment cpu, a pool in dvc\.yaml"
    ):
        deploy(project.root, dag, "process")
    with pytest.raises(
        PipelineError, match=r"tpu: no stage of dvc\.yaml has this pool; one of cpu"
    ):
        become_worker(project.root, dag, "tpu", 1, once=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("deployments: [", r"^prefect\.yaml:\d: not valid YAML"),
        *((text, "no deployment cpu") for text in ("", "[]", "deployments: 3", "deployments: [1]")),
    ],
)
def test_a_broken_prefect_yaml_is_told_in_one_line(
    project: Project, content: str, message: str
) -> None:
    (project.root / "prefect.yaml").write_text(content)
    with pytest.raises(PipelineError, match=message):
        deploy(project.root, load_dag(project.root), "process")

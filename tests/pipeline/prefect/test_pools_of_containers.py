"""What Prefect's own workers make of the deployments for pools of containers: a Kubernetes job, and
a Docker container.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import Flow, FlowRun
from prefect.workers.base import BaseJobConfiguration
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[3]
IMAGE = "registry.example.org/dualign-worker"


def variables(deployment: str) -> dict[str, Any]:
    """Job variables of a deployment, as they lie on the server once it is deployed."""
    content = YAML(typ="safe", pure=True).load(ROOT / "prefect.yaml")
    found = {one["name"]: one["work_pool"]["job_variables"] for one in content["deployments"]}
    assert found[deployment]["image"] == "{{ $DUALIGN_IMAGE }}"
    return {**found[deployment], "image": IMAGE}


def rendered(
    kind: type[BaseJobConfiguration], template: dict[str, Any], values: dict[str, Any]
) -> Any:
    """A worker's configuration for a run of a stage; no server is asked."""
    nobody: Any = object()
    made = asyncio.run(kind.from_template_and_values(template, values, client=nobody))
    run = FlowRun(id=uuid4(), name="sft", flow_id=uuid4())
    made.prepare_for_flow_run(run, flow=Flow(id=run.flow_id, name="stage"))
    return made, run


@pytest.mark.parametrize(("deployment", "gpus"), [("cpu", 0), ("gpu", 1)])
def test_a_stage_as_a_kubernetes_job(deployment: str, gpus: int) -> None:
    worker = pytest.importorskip("prefect_kubernetes.worker")
    template = json.loads((ROOT / "pools/kubernetes.json").read_text())
    made, run = rendered(worker.KubernetesWorkerJobConfiguration, template, variables(deployment))
    job = as_kubernetes_reads_it(made.job_manifest)
    pod = job.spec.template.spec
    (container,) = pod.containers
    assert container.image == IMAGE
    assert container.args == ["prefect", "flow-run", "execute"]
    assert container.resources.limits["nvidia.com/gpu"] == str(gpus)
    told = {one.name: one.value for one in container.env}
    assert told["PREFECT__FLOW_RUN_ID"] == str(run.id)
    assert container.env_from[0].secret_ref.name == "dualign"
    assert container.env_from[0].secret_ref.optional
    assert pod.volumes[0].persistent_volume_claim.claim_name == "dualign"
    kept = {mount.mount_path: mount.sub_path for mount in container.volume_mounts}
    assert kept == {"/dualign/.dvc/cache": "cache", "/dualign/.scratch": "scratch"}
    assert pod.restart_policy == "Never"
    assert not unfilled(made.job_manifest)


def as_kubernetes_reads_it(manifest: dict[str, Any]) -> Any:
    """The manifest as the models of Kubernetes' own client, which refuse values of wrong types."""
    client = pytest.importorskip("kubernetes_asyncio.client")

    async def read() -> Any:
        async with client.ApiClient() as api:
            return api.deserialize(SimpleNamespace(data=json.dumps(manifest)), "V1Job")

    return asyncio.run(read())


def unfilled(manifest: dict[str, Any]) -> bool:
    """Whether a placeholder is left."""
    return "{{" in json.dumps(manifest)


def test_the_template_is_that_of_prefect_but_for_what_stages_need() -> None:
    worker = pytest.importorskip("prefect_kubernetes.worker")
    ours = json.loads((ROOT / "pools/kubernetes.json").read_text())
    for name in ("gpus", "claim", "secret"):
        del ours["variables"]["properties"][name]
    pod = ours["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    del pod["volumes"]
    (container,) = pod["containers"]
    del container["volumeMounts"], container["envFrom"]
    del container["resources"]["limits"]["nvidia.com/gpu"]
    assert ours == worker.KubernetesWorker.get_default_base_job_template()


def test_a_stage_as_a_docker_container() -> None:
    worker = pytest.importorskip("prefect_docker.worker")
    template = worker.DockerWorker.get_default_base_job_template()
    gpu = {"device_requests": [{"count": 1, "capabilities": [["gpu"]]}]}
    given = {
        **variables("gpu"),
        "volumes": ["dvc:/dualign/.dvc/cache", "scratch:/dualign/.scratch"],
        "container_create_kwargs": gpu,
    }
    made, run = rendered(worker.DockerWorkerJobConfiguration, template, given)
    assert made.image == IMAGE
    assert made.command == "prefect flow-run execute"
    assert made.env["PREFECT__FLOW_RUN_ID"] == str(run.id)
    assert made.volumes == given["volumes"]
    assert made.container_create_kwargs == gpu

"""A cluster in small: a server, two nodes with clones and caches of their own, and a coordinator without outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client

from pipeline.__main__ import main
from pipeline.flow import alignment
from tests.pipeline.nodes import Nodes, create_nodes
from tests.pipeline.test_flow import flow_run, logged, states

ALL = ("first", "left", "right", "last")


@pytest.fixture(scope="module")
def nodes(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes with a worker each, and the deployments."""
    made = create_nodes(tmp_path_factory.mktemp("cluster"), server)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.coordinator.root)
        patch.setenv("PREFECT_API_URL", server)
        assert main(["deploy"]) == 0
        for name in ("a", "b"):
            made.start(name)
        yield made
        made.stop()


@pytest.fixture
def client(server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as made:
        yield made


def test_a_run_on_two_nodes_then_nothing_to_do(
    nodes: Nodes, client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes.coordinator.set(left={"then": "meet"}, right={"then": "meet"})  # each waits for the other
    done = alignment(cluster=True, return_state=True)
    assert done.is_completed() and done.message == "4 completed", (nodes.log("a"), nodes.log("b"))
    root = nodes.coordinator.root
    assert not (root / "out").exists(), "the coordinator holds no outputs"
    assert json.loads((root / "metrics-last.json").read_text())["accuracy"]["mean"] == 3
    assert {Path(line.split()[-1]).name for line in logged(client, flow_run(done)) if line.startswith("Completed on")}

    again = alignment(cluster=True, return_state=True)
    assert again.is_completed() and states(client, again) == dict.fromkeys(ALL, "Unchanged")
    nodes.dvc("pull", "-q")
    assert (root / "out/last").read_text() == "3"
    assert "Data and pipelines are up to date" in nodes.dvc("status")

"""A cluster in small: a server, two nodes with clones and caches of their own, and a coordinator without outputs.

The tests share it and go on from each other.
"""

from __future__ import annotations

import contextvars
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelling, Running

from pipeline import cluster
from pipeline.__main__ import main
from pipeline.flow import alignment
from tests.pipeline.nodes import Nodes, create_nodes, wait
from tests.pipeline.project import environment, git
from tests.pipeline.test_flow import flow_run, logged, states

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """The clones and the deployments; the first test starts the workers."""
    made = create_nodes(tmp_path_factory.mktemp("cluster"), server)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.coordinator.root)
        patch.setenv("PREFECT_API_URL", server)
        yield made
        made.stop()


@pytest.fixture
def client(server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as made:
        yield made


def run(*stages: str) -> State[Any]:
    return alignment(stages=stages, cluster=True, return_state=True)


def in_background(*stages: str) -> Future[State[Any]]:
    context = contextvars.copy_context()
    return ThreadPoolExecutor(1).submit(context.run, run, *stages)


def handed_out(client: SyncPrefectClient) -> list[FlowRun]:
    """The flow runs of stages."""
    return client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["stage"])))


def test_what_workers_cannot_run_is_refused(nodes: Nodes, client: SyncPrefectClient) -> None:
    root = nodes.coordinator.root
    refused = run("first")
    assert refused.name == "Refused" and "`python -m pipeline deploy`" in str(refused.message)
    (root / "work.py").write_text((root / "work.py").read_text() + "# new\n")
    assert "1 files differ from the last commit, first work.py" in str(run("first").message)
    git(root, "commit", "-qam", "new")
    assert "is on no remote branch" in str(run("first").message)
    git(root, "push", "-q")
    graph = (root / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(graph.replace('"work.py"', '"kept", "work.py"'))
    git(root, "commit", "-qam", "reads what no one else has")
    git(root, "push", "-q")
    assert "kept: neither git nor DVC holds it" in str(run("first").message)
    (root / "kept").mkdir()
    (root / "kept/rows").write_text("")
    assert "kept/rows: neither git nor DVC holds it" in str(run("first").message)
    shutil.rmtree(root / "kept")
    (root / "dvc.yaml").write_text(graph)
    git(root, "commit", "-qam", "as before")
    git(root, "push", "-q")
    assert not handed_out(client)


def test_a_stage_whose_worker_falls_silent_is_handed_out_again(
    nodes: Nodes, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "UNTAKEN", 3.0)
    assert main(["deploy"]) == 0
    assert "deployment stage/cpu: as in prefect.yaml" in capsys.readouterr().out
    done = in_background("first")
    wait(lambda: handed_out(client))
    (taken,) = handed_out(client)
    monkeypatch.setattr(cluster, "SILENCE", 6.0)
    client.set_flow_run_state(taken.id, Running(), force=True)  # as by a worker that then lost its power
    wait(lambda: len(handed_out(client)) == 2)
    monkeypatch.setattr(cluster, "SILENCE", 60.0)
    for name in ("a", "b"):
        nodes.start(name)
    state = done.result(120)
    assert state.is_completed(), (nodes.log("a"), nodes.log("b"))
    lost = client.read_flow_run(taken.id).state
    assert lost is not None and lost.name == "Crashed"
    told = "\n".join(logged(client, flow_run(state)))
    assert "no sign of life" in told and "no worker of pool cpu is online" in told


def test_stages_run_side_by_side_and_may_wait_for_people(nodes: Nodes, client: SyncPrefectClient) -> None:
    root = nodes.coordinator.root
    (nodes.folder / "kept").mkdir(exist_ok=True)
    nodes.coordinator.set(left={"then": "meet, ask"}, right={"then": "meet"})  # each waits for the other
    state = run("left", "right")
    said = "left: labels/to-label-1.jsonl: fill it in (exit 3)"
    assert (state.name, state.message) == ("AwaitingLabels", f"{said}; 1 completed, 1 unchanged, 1 awaiting labels")
    question = root / "labels/to-label-1.jsonl"
    assert question.read_text() == "unsafe: null"
    question.with_name("labelled-1.jsonl").write_text("unsafe: 1")
    state = run("left", "right")
    assert states(client, state) == {"first": "Unchanged", "right": "Unchanged", "left": "Completed"}
    assert not (root / "out").exists(), "the coordinator holds no outputs"
    assert json.loads((root / "metrics-left.json").read_text())["accuracy"]["mean"] == 1
    assert states(client, run("left", "right")) == dict.fromkeys(("first", "left", "right"), "Unchanged")
    assert not [path for name in ("a", "b") for path in trees(nodes, name)]
    nodes.dvc("pull", "-q", "left", "right", "first")
    assert "last" in nodes.dvc("status") and "left" not in nodes.dvc("status", "left", "right", "first")


def trees(nodes: Nodes, name: str) -> list[Path]:
    return [path for path in (nodes.folder / name / ".dvc/tmp/stages").glob("*") if path.is_dir()]


def test_a_cancelled_stage_keeps_its_checkpoint_and_leaves_nothing(nodes: Nodes, client: SyncPrefectClient) -> None:
    nodes.coordinator.set(last={"then": "wait"})
    told = {**environment(), "PREFECT_API_URL": nodes.server}
    command = [sys.executable, "-m", "pipeline", "run", "--cluster"]
    started = subprocess.Popen(command, cwd=nodes.coordinator.root, env=told, stderr=subprocess.PIPE, text=True)
    wait(lambda: any("step 1 of 2" in nodes.log(name) for name in ("a", "b")), 120)
    (whole,) = [made for made in client.read_flow_runs(limit=50) if made.deployment_id is None and is_running(made)]
    client.set_flow_run_state(whole.id, Cancelling())
    wait(lambda: (nodes.folder / "kept/last").exists(), 30)
    assert "Cancelled" in started.communicate(timeout=60)[1] and started.returncode == 130
    wait(lambda: not [path for name in ("a", "b") for path in trees(nodes, name)], 30)
    assert (nodes.folder / "kept/last").read_text() == "the checkpoint"
    assert not [process for name in ("a", "b") for process in nodes.processes(name) if "work.py" in process.cmdline()]


def is_running(made: FlowRun) -> bool:
    return made.state is not None and made.state.is_running()

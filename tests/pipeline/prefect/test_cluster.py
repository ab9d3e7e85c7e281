"""A cluster in small: a server, two nodes with clones and caches of their own, and a coordinator
without outputs.

The tests share it and go on from each other.
"""

from __future__ import annotations

import contextvars
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelling, Running

from pipeline.__main__ import main
from pipeline.dvc import inputs, records
from pipeline.dvc.dag import load_dag
from pipeline.dvc.plan import StageStatus
from pipeline.errors import PipelineError
from pipeline.prefect import cluster
from pipeline.prefect.flow import alignment
from pipeline.prefect.parcel import packed, unpacked
from pipeline.prefect.worker import NAME, stage
from tests.pipeline.nodes import Nodes, create_nodes, wait
from tests.pipeline.prefect.test_flow import flow_run, logged, states
from tests.pipeline.project import add_report, gathered, git

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """The clones and the deployments; the first test starts the workers."""
    made = create_nodes(tmp_path_factory.mktemp("cluster"), server)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.coordinator.root)
        patch.setenv("PREFECT_API_URL", server)
        patch.setattr(cluster, "POLL", 0.5)
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


def test_what_workers_cannot_run_is_refused(
    nodes: Nodes, client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]
) -> None:
    root = nodes.coordinator.root
    (root / ".dvc/config.local").write_text("[core]\n    remote = nowhere\n")
    assert "a DVC remote, and there is none" in str(run("first").message)
    (root / ".dvc/config.local").unlink()
    refused = run("first")
    assert refused.name == "Refused" and "`python -m pipeline deploy`" in str(refused.message)
    (root / "work.py").write_text((root / "work.py").read_text() + "# new\n")
    assert "1 files differ from the last commit, first work.py" in str(run("first").message)
    git(root, "commit", "-qam", "new")
    assert "is on no remote branch" in str(run("first").message)
    assert main(["sweep", "first.value=7", "--cluster"]) == 2
    assert "is on no remote branch" in capsys.readouterr().err
    git(root, "push", "-q")
    graph = (root / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(graph.replace('"work.py"', '"kept", "work.py"'))
    git(root, "commit", "-qam", "reads what no one else has")
    git(root, "push", "-q")
    assert "kept: neither git nor DVC holds it" in str(run("first").message)
    (root / "kept").mkdir()
    (root / "kept/rows").write_text("")
    assert "kept/rows: neither git nor DVC holds it" in str(run("first").message)
    assert main(["sweep", "first.value=7", "--cluster"]) == 2
    assert "kept/rows: neither git nor DVC holds it" in capsys.readouterr().err
    shutil.rmtree(root / "kept")
    (root / "dvc.yaml").write_text(graph)
    git(root, "commit", "-qam", "as before")
    git(root, "push", "-q")
    assert not handed_out(client)


def parent_of(client: SyncPrefectClient, made: FlowRun) -> UUID:
    assert made.parent_task_run_id is not None
    parent = client.read_task_run(made.parent_task_run_id).flow_run_id
    assert parent is not None
    return parent


def test_a_run_that_is_stopped_does_not_wait_for_a_server_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "STOPPING", 0.5)
    monkeypatch.setattr(cluster, "POLL", 0.2)
    (tmp_path / "params.yaml").write_text("")
    nowhere = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(nowhere), get_client(sync_client=True) as client:
        place = cluster.Cluster(tmp_path, {}, "", {}, client)
        place.stop()
        with pytest.raises(PipelineError, match="the Prefect server does not answer"):
            place._patiently(lambda: client.read_flow_run(uuid4()))


def test_a_stage_is_handed_out_once_the_server_knows_its_task(
    nodes: Nodes, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = cluster.Cluster(nodes.coordinator.root, {}, "", {}, client)
    late = uuid4()
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "LAG", 0.5)
        assert place._recorded(late) is None, "a stage does not wait for ever"
    with pytest.raises(PipelineError, match="does not know this run"):
        place._patiently(lambda: client.read_flow_run(late))

    def record() -> None:
        with get_client(sync_client=True) as other:
            other.create_task_run(task(run), flow_run_id=None, dynamic_key="0", id=late)

    timer = threading.Timer(1.0, contextvars.copy_context().run, (record,))
    timer.start()
    assert place._recorded(late) == late
    timer.join()


def test_a_stage_whose_worker_falls_silent_is_handed_out_again(
    nodes: Nodes,
    client: SyncPrefectClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster, "UNTAKEN", 3.0)
    assert main(["deploy"]) == 0
    assert "deployment stage/cpu: as in prefect.yaml" in capsys.readouterr().out
    done = in_background("first")
    wait(lambda: handed_out(client))
    (taken,) = handed_out(client)
    wait(
        lambda: any(
            "no worker of pool cpu is online" in line
            for line in logged(client, parent_of(client, taken))
        )
    )
    monkeypatch.setattr(cluster, "SILENCE", 3.0)
    client.set_flow_run_state(
        taken.id, Running(), force=True
    )  # as by a worker that then lost its power
    for name in ("a", "b"):
        nodes.start(name)
    wait(lambda: len(handed_out(client)) == 2)
    monkeypatch.setattr(cluster, "SILENCE", 60.0)
    state = done.result(120)
    assert state.is_completed(), (nodes.log("a"), nodes.log("b"))
    lost = client.read_flow_run(taken.id).state
    assert lost is not None and lost.name == "Crashed"
    assert "no sign of life" in "\n".join(logged(client, flow_run(state)))


def test_stages_run_side_by_side_and_may_wait_for_people(
    nodes: Nodes, client: SyncPrefectClient
) -> None:
    root = nodes.coordinator.root
    (nodes.folder / "kept").mkdir(exist_ok=True)
    nodes.coordinator.set(
        left={"then": "meet, ask"}, right={"then": "meet"}
    )  # each waits for the other
    state = run("left", "right")
    said = "left: labels/to-label-1.jsonl: fill it in (exit 3)"
    assert (state.name, state.message) == (
        "AwaitingLabels",
        f"{said}; 1 completed, 1 unchanged, 1 awaiting labels",
    )
    question = root / "labels/to-label-1.jsonl"
    assert question.read_text() == "unsafe: null"
    question.with_name("labelled-1.jsonl").write_text("unsafe: 1")
    state = run("left", "right")
    assert states(client, state) == {
        "first": "Unchanged",
        "right": "Unchanged",
        "left": "Completed",
    }
    assert not (root / "out").exists(), "the coordinator holds no outputs"
    assert json.loads((root / "metrics-left.json").read_text())["accuracy"]["mean"] == 1
    plan = records.plan(root, load_dag(root), ["first", "left", "right"])
    assert plan == dict.fromkeys(plan, StageStatus("up to date")), "what a further run would find"
    assert not [path for name in ("a", "b") for path in trees(nodes, name)]
    nodes.dvc("pull", "-q", "left", "right", "first")
    assert "last" in nodes.dvc("status") and "left" not in nodes.dvc(
        "status", "left", "right", "first"
    )


def trees(nodes: Nodes, name: str) -> list[Path]:
    return [path for path in (nodes.folder / name / ".dvc/tmp/stages").glob("*") if path.is_dir()]


def test_a_cancelled_stage_keeps_its_checkpoint_and_leaves_nothing(
    nodes: Nodes, client: SyncPrefectClient
) -> None:
    nodes.coordinator.set(last={"then": "wait"})
    done = in_background()
    wait(lambda: any("step 1 of 2" in nodes.log(name) for name in ("a", "b")), 120)
    (whole,) = [
        made
        for made in client.read_flow_runs(limit=50)
        if made.deployment_id is None and is_running(made)
    ]
    client.set_flow_run_state(whole.id, Cancelling())
    wait(lambda: (nodes.folder / "kept/last").exists(), 30)
    assert done.result(60).is_cancelled()
    wait(lambda: not [path for name in ("a", "b") for path in trees(nodes, name)], 30)
    assert (nodes.folder / "kept/last").read_text() == "the checkpoint"
    assert not [
        process
        for name in ("a", "b")
        for process in nodes.processes(name)
        if "work.py" in process.cmdline()
    ]


def is_running(made: FlowRun) -> bool:
    return made.state is not None and made.state.is_running()


def test_seeds_run_side_by_side_and_stand_in_the_report_of_this_run(
    nodes: Nodes,
    client: SyncPrefectClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "test")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "test@example.org")
    root = nodes.coordinator.root
    nodes.coordinator.set(**{name: {"then": "end"} for name in ("left", "right", "last")})
    add_report(root)
    git(root, "add", ".")
    git(root, "commit", "-qm", "a report")
    git(root, "push", "-q")

    assert main(["seeds", "8", "--cluster"]) == 0
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[-1] for line in table] == ["3.7", "3.8"]
    assert gathered(root) == {"8": 3.8}
    reports = [made for made in handed_out(client) if made.name == "report"]
    assert len({parent_of(client, made) for made in reports}) == 2, "a flow run for each seed"
    nodes.dvc("pull", "-q", "report")
    assert (root / "reports/index.html").read_text() == "8", "a worker had its comparison"


def test_results_of_others_that_are_too_many_are_not_sent(
    nodes: Nodes, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = nodes.coordinator.root
    dag = load_dag(root)
    place = cluster.Cluster(root, dag, "", {}, client)
    others = {"reports/seeds/8.json"}
    assert others <= set(unpacked(place._carried(dag["report"])))
    assert not others & set(unpacked(place._carried(dag["first"])))
    labels = len(packed(inputs.answers(root)))
    monkeypatch.setattr(cluster, "ROOM", labels + 10)
    with pytest.raises(PipelineError, match="reports/seeds: more than 0 kB of results and labels"):
        place._carried(dag["report"])


def test_a_deployment_of_another_version_is_told(client: SyncPrefectClient) -> None:
    flow = client.create_flow_from_name(NAME)
    for pool, schema in (("now", stage.parameters.model_dump()), ("older", {"properties": {}})):
        client.create_deployment(flow, pool, parameter_openapi_schema=schema)
    assert cluster._deployment(client, "now")
    with pytest.raises(PipelineError, match="stage/older is of another version of pipeline/"):
        cluster._deployment(client, "older")
    with pytest.raises(PipelineError, match="no deployment stage/none"):
        cluster._deployment(client, "none")


def test_a_question_that_is_half_written_is_not_sent(tmp_path: Path) -> None:
    for name in (
        "data/labels/to-label-1.jsonl",
        "data/labels/.tmp-1/to-label-1.jsonl",
        ".scratch/to-label-2.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert inputs.questions(tmp_path) == {"data/labels/to-label-1.jsonl": "{}"}

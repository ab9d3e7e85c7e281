"""The flow, really started: on a small DVC project, with a Prefect server of its own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Cancelling

from pipeline.dvc import preset
from pipeline.dvc.checkout import committed
from pipeline.dvc.parameters import assign
from pipeline.errors import PipelineError
from pipeline.prefect import identity
from pipeline.prefect.artifacts import key_of
from pipeline.prefect.flow import alignment, chosen
from tests.pipeline.project import Project, environment, until

STAGES = ("first", "left", "right", "last")


@pytest.fixture
def client(server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as made:
        yield made


def flow_run(state: State[Any]) -> UUID:
    assert state.state_details.flow_run_id is not None
    return state.state_details.flow_run_id


def started(state: State[Any]) -> int:
    """How many stages a run started, of a message such as `left: no; 1 failed, 1 completed`."""
    assert state.message is not None
    counts = state.message.rpartition(";")[2].split(",")
    told = [count.split(maxsplit=1) for count in counts]
    return sum(int(number) for number, word in told if word != "not started")


def tasks(client: SyncPrefectClient, state: State[Any]) -> dict[str, Any]:
    """The task runs of a flow run by name; the server takes a moment to know all of them."""
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run(state)]))
    found: dict[str, Any] = {}

    def final() -> bool:
        found.clear()
        found.update({task.name: task for task in client.read_task_runs(flow_run_filter=mine)})
        ended = [task for task in found.values() if task.state and task.state.is_final()]
        return len(ended) == len(found) == started(state)

    until(final)
    return found


def states(client: SyncPrefectClient, state: State[Any]) -> dict[str, str]:
    return {name: task.state.name for name, task in tasks(client, state).items()}


def passed(client: SyncPrefectClient, task: Any) -> list[str]:
    """The states that a task run went through, in their order."""
    known = sorted(client.read_task_run_states(task.id), key=lambda one: one.timestamp)
    return [one.name for one in known]


def logged(client: SyncPrefectClient, run: UUID) -> list[str]:
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    mine = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
    return [log.message for log in client.read_logs(log_filter=mine, limit=200)]


def artifacts(client: SyncPrefectClient, run: UUID) -> dict[str, str]:
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    return {made.key or "": str(made.data) for made in client.read_artifacts(flow_run_filter=mine)}


def described(client: SyncPrefectClient, run: UUID) -> list[tuple[str | None, str | None]]:
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    return [(made.type, made.description) for made in client.read_artifacts(flow_run_filter=mine)]


def test_a_run_then_nothing_then_an_override_then_back(
    project: Project, client: SyncPrefectClient
) -> None:
    mine = identity.name(project.root)
    done = alignment(jobs=2, return_state=True)
    assert done.is_completed() and done.message == "4 completed"
    assert states(client, done) == dict.fromkeys(STAGES, "Completed")
    assert "Data and pipelines are up to date" in project.dvc("status")
    until(lambda: "at work on last, GPU None" in logged(client, flow_run(done)))
    assert {"plan", "summary", *(key_of(name, mine) for name in STAGES)} <= set(
        artifacts(client, flow_run(done))
    )

    project.set(right={"value": 20})
    project.dvc("repro", "--quiet")
    same = alignment(return_state=True)
    assert states(client, same) == dict.fromkeys(STAGES, "Unchanged")
    assert set(artifacts(client, flow_run(same))) == {"plan", "summary"}

    text = (project.root / "params.yaml").read_text()
    new = alignment(set={"left.value": 30}, return_state=True)
    assert states(client, new) == {
        "first": "Unchanged",
        "left": "Completed",
        "right": "Unchanged",
        "last": "Completed",
    }
    assert (project.root / "params.yaml").read_text() == text.replace('"value": 1', '"value": 30')
    assert "| accuracy | 30 | +29 |" in artifacts(client, flow_run(new))[key_of("left", mine)]
    assert "Data and pipelines are up to date" in project.dvc("status")

    back = alignment(set={"left.value": 1}, return_state=True)
    assert states(client, back) == {
        "first": "Unchanged",
        "left": "Restored",
        "right": "Unchanged",
        "last": "Restored",
    }
    assert json.loads((project.root / "metrics-left.json").read_text())["accuracy"]["mean"] == 1

    script = project.root / "work.py"
    script.write_text(f"{script.read_text()}# the same results\n")
    alike = alignment(return_state=True)
    assert states(client, alike) == {**dict.fromkeys(STAGES, "Unchanged"), "first": "Completed"}

    one = alignment(stages=["left"], force=True, return_state=True)
    assert states(client, one) == {"first": "Unchanged", "left": "Completed"}


def test_a_failure_says_why_and_what_follows_is_not_started(
    project: Project, client: SyncPrefectClient
) -> None:
    project.set(left={"then": "refuse"})
    state = alignment(jobs=2, return_state=True)
    reason = "left: params.yaml: rate must be positive (exit 2)"
    assert state.is_failed() and state.message == f"{reason}; 2 completed, 1 failed, 1 not started"
    found = tasks(client, state)
    assert {name: task.state.name for name, task in found.items()} == {
        "first": "Completed", "left": "Failed", "right": "Completed",
    }  # fmt: skip
    assert found["left"].state.message == reason
    assert found["left"].run_count == 1, "what a stage refuses it would refuse again"
    until(
        lambda: any(
            "by hand: python work.py left" in line for line in logged(client, flow_run(state))
        )
    )
    assert reason in artifacts(client, flow_run(state))["summary"]


def test_a_stage_that_waits_for_people_is_not_tried_again_and_goes_on_after_them(
    project: Project, client: SyncPrefectClient
) -> None:
    project.set(first={"then": "ask"})
    state = alignment(stages=["left"], return_state=True)
    said = "first: labels/to-label-1.jsonl: fill it in (exit 3)"
    assert (state.name, state.message) == (
        "AwaitingLabels",
        f"{said}; 1 awaiting labels, 1 not started",
    )
    task = tasks(client, state)["first"]
    assert (task.run_count, task.state.name) == (1, "AwaitingLabels")
    (project.root / "labels/labelled-1.jsonl").write_text("unsafe: 1")
    assert alignment(stages=["first"], return_state=True).is_completed()


def test_another_attempt_goes_on(project: Project, client: SyncPrefectClient) -> None:
    project.set(first={"then": "stumble"})
    state = alignment(stages=["first"], return_state=True)
    assert state.is_completed()
    task = tasks(client, state)["first"]
    assert (task.run_count, task.state.name) == (2, "Completed")
    until(lambda: "resuming from step 1" in logged(client, flow_run(state)))
    assert not [
        line
        for line in logged(client, flow_run(state))
        if "Traceback (most recent call last):\n  File" in line
    ]


def test_independent_stages_run_side_by_side(project: Project, client: SyncPrefectClient) -> None:
    project.set(left={"then": "meet"}, right={"then": "meet"})
    state = alignment(stages=["left", "right"], jobs=2, return_state=True)
    assert states(client, state) == {
        "first": "Completed",
        "left": "Completed",
        "right": "Completed",
    }
    assert {task.name: list(task.tags) for task in tasks(client, state).values()}["left"] == ["cpu"]


def test_the_time_of_a_stage_is_without_its_wait_for_a_slot(
    project: Project, client: SyncPrefectClient
) -> None:
    alignment(stages=["first"], return_state=True)
    project.set(left={"then": "sleep 8"}, right={"then": "sleep 8"})
    state = alignment(stages=["left", "right"], jobs=1, return_state=True)
    first, second = sorted(tasks(client, state).values(), key=lambda run: run.start_time)[-2:]
    assert {first.name, second.name} == {"left", "right"}
    assert (second.start_time - first.start_time).total_seconds() >= 8, (
        "it began when it had waited"
    )
    for run in (first, second):
        told = re.fullmatch(r"ran in ([\d.]+) s", run.state.message)
        worked = (run.end_time - run.start_time).total_seconds()
        assert told is not None and 8 <= float(told[1]) <= worked + 0.1
        assert worked == pytest.approx(run.total_run_time.total_seconds(), abs=0.1)
    until(lambda: passed(client, first)[-2:] == ["Running", "Completed"])
    assert "AwaitingSlot" not in passed(client, first)
    through = ["Running", "AwaitingSlot", "Running", "Completed"]
    until(lambda: passed(client, second)[-4:] == through)
    (waiting,) = [
        one for one in client.read_task_run_states(second.id) if one.name == "AwaitingSlot"
    ]
    assert waiting.type.value == "PENDING"
    until(lambda: "waiting for a slot: other stages work" in logged(client, flow_run(state)))


def test_a_stage_has_a_gpu_of_its_own(
    project: Project, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = project.root / "dvc.yaml"
    graph.write_text(graph.read_text().replace('"gpus": 0', '"gpus": 1', 2))  # of first and left
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    state = alignment(stages=["left", "right"], return_state=True)
    told = ["at work on first, GPU 7", "at work on left, GPU 7", "at work on right, GPU"]
    until(lambda: set(told) <= set(logged(client, flow_run(state))))


def test_a_notebook_starts_a_run_and_reads_its_result(
    project: Project, server: str, repo_root: Path
) -> None:
    (cell,) = re.findall(
        r"```python\n(.*?)```", (repo_root / "docs/prefect.md").read_text(), re.DOTALL
    )
    here = {
        "dual_init": "left",
        "constraint.limit": "left.value",
        "-0.5": "9",
        "reports/metrics/": "metrics-",
    }
    for there, name in {**here, '["lam"]': '["accuracy"]["mean"]'}.items():
        assert there in cell
        cell = cell.replace(there, name)
    lines = "".join(f"    {line}\n" for line in cell.splitlines())
    script = (  # a notebook has a loop that runs
        f"import asyncio\nasync def cell():\n{lines}\nasyncio.run(cell())"
    )
    told = {**environment(), "PREFECT_API_URL": server}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=project.root, env=told, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["Completed - 2 completed", "9"], done.stderr


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"stages": ["lft"]}, "lft: no such stage; did you mean left?"),
        (
            {"set": {"left.valu": 1}},
            "params.yaml: there is no key left.valu; did you mean left.value?",
        ),
        ({"preset": "none"}, "none: no such preset"),
        ({"jobs": -1}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    project: Project, server: str, asked: dict[str, Any], message: str
) -> None:
    before = (project.root / "params.yaml").read_text()
    state = alignment(**asked, return_state=True)
    assert state.is_failed() and message in str(state.message)
    assert (project.root / "params.yaml").read_text() == before


def test_an_override_that_breaks_the_graph_is_taken_back(project: Project, server: str) -> None:
    graph = project.root / "dvc.yaml"
    params = project.root / "params.yaml"
    graph.write_text(graph.read_text().replace("out/right", "${right.value}"))
    project.set(right={"value": "out/right"})
    before = params.read_text()
    state = alignment(set={"right.value": "out/left"}, return_state=True)
    assert state.name == "Refused" and "out/left" in str(state.message)
    assert params.read_text() == before


def test_what_refuses_a_run_later_takes_new_values_back_too(project: Project) -> None:
    """Files that differ from the commit, say, which workers cannot have."""
    params = project.root / "params.yaml"
    before = params.read_text()
    with (
        pytest.raises(PipelineError, match="commit them"),
        chosen(project.root, "", {"left.value": 30}),
    ):
        assert '"value": 30' in params.read_text()
        committed(project.root)
    assert params.read_text() == before


def test_a_refused_preset_makes_no_edit_of_earlier_values(
    tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Params that `--set` wrote would be taken for the user's own, and keep the next preset out."""
    monkeypatch.setenv("PYTHONPATH", str(repo_root))  # where the library lies that checks a preset
    shipped = (repo_root / "params.yaml").read_text()
    was_set = assign(shipped, {"seed": 5})
    for name, text in (
        ("params/small.yaml", shipped),
        ("params.yaml", was_set),
        (preset.LAST, was_set),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with (
        pytest.raises(PipelineError, match="there is no key sed"),
        chosen(tmp_path, "small", {"sed": 6}),
    ):
        pass
    assert (tmp_path / "params.yaml").read_text() == was_set
    assert not preset.is_edited(was_set, tmp_path)


@pytest.mark.parametrize("settings", [{}, {"sed": 6}])
def test_a_refused_run_leaves_a_file_that_it_did_not_change(
    project: Project, settings: dict[str, Any]
) -> None:
    """It would take back what somebody saves meanwhile, and the ends of lines of other editors."""
    params = project.root / "params.yaml"
    params.write_bytes(params.read_bytes().replace(b"\n", b"\r\n"))
    before = (params.stat().st_ino, params.read_bytes())
    (project.root / "dvc.lock").write_text("<<<<<<< HEAD\n")
    with (
        pytest.raises(PipelineError, match=r"dvc\.lock|no key sed"),
        chosen(project.root, "", settings),
    ):
        pass
    assert (params.stat().st_ino, params.read_bytes()) == before


@pytest.mark.parametrize(
    ("how", "code"), [("interrupt", 130), ("terminate", -signal.SIGTERM), ("button", 130)]
)
def test_a_cancelled_run_leaves_nothing_and_the_next_goes_on(
    project: Project, server: str, client: SyncPrefectClient, how: str, code: int
) -> None:
    project.set(first={"then": "wait"})
    command = [sys.executable, "-m", "pipeline", "run", "--stage", "first"]
    told = {**environment(), "PREFECT_API_URL": server}
    run = subprocess.Popen(command, cwd=project.root, env=told, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    assert any("step 1 of 2" in line for line in run.stderr)
    (newest,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
    if how == "button":
        client.set_flow_run_state(newest.id, Cancelling())
    else:
        run.send_signal(signal.SIGINT if how == "interrupt" else signal.SIGTERM)
    rest = run.stderr.read()
    run.stderr.close()
    assert run.wait() == code, rest
    assert not project.processes() and not project.locks()
    assert (project.root / "kept/first").read_text() == "the checkpoint"
    ended = client.read_flow_run(newest.id).state
    assert ended is not None and ended.name == ("Crashed" if how == "terminate" else "Cancelled")
    again = alignment(stages=["first"], return_state=True)
    assert again.is_completed()
    until(lambda: "resuming from the checkpoint" in logged(client, flow_run(again)))


@pytest.mark.parametrize("killed", [False, True])
def test_a_served_run_is_started_and_cancelled_from_the_pages(
    project: Project, server: str, client: SyncPrefectClient, killed: bool
) -> None:
    project.set(first={"then": "wait"})
    around = {**environment(), "PREFECT_API_URL": server, "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    serve = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "serve"], cwd=project.root, env=around
    )
    try:
        until(
            lambda: [
                made
                for made in client.read_deployments()
                if made.name == identity.name(project.root)
            ]
        )
        (deployment,) = [
            made for made in client.read_deployments() if made.name == identity.name(project.root)
        ]
        asked = {
            "stages": ["first"],
            "set": {"first.value": 9},
            "force": False,
            "preset": "",
            "jobs": 0,
        }
        run = client.create_flow_run_from_deployment(deployment.id, parameters=asked)
        told = ("progress", "9 s left, training step 1 of 2, loss 0.5000, 7 tokens/s")
        until(lambda: any("step 1 of 2" in line for line in logged(client, run.id)))
        until(lambda: told in described(client, run.id))
        if killed:
            serve.kill()
        client.set_flow_run_state(run.id, Cancelling(), force=True)

        def ended() -> str | None:
            state = client.read_flow_run(run.id).state
            return state.name if state and state.is_final() else None

        until(ended)
        assert ended() == "Cancelled"
        assert (project.root / "kept/first").read_text() == "the checkpoint" and not project.locks()
    finally:
        serve.send_signal(signal.SIGINT)
        serve.wait(60)
    until(lambda: not project.processes())

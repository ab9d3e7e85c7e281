"""The last flow runs, from Prefect's records."""

from __future__ import annotations

from collections.abc import Sequence

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort

from pipeline.artifacts import duration
from pipeline.flow import NAME


def last_runs(count: int) -> list[str]:
    """The last `count` runs, newest first, a line each, then a line per stage of the newest that has one."""
    with get_client(sync_client=True) as client:
        flow = FlowFilter(name=FlowFilterName(any_=[NAME]))
        runs = client.read_flow_runs(flow_filter=flow, sort=FlowRunSort.START_TIME_DESC, limit=count)
        if not runs:
            return ["no runs yet; start one: python -m pipeline run"]
        return [_run_line(run) for run in runs] + ["", *_stages(client, runs)]


def _stages(client: SyncPrefectClient, runs: Sequence[FlowRun]) -> list[str]:
    for run in runs:
        only = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        tasks = client.read_task_runs(flow_run_filter=only, sort=TaskRunSort.EXPECTED_START_TIME_ASC, limit=200)
        if tasks:
            return [f"stages of the run of {_when(run)}:", *(_task_line(task) for task in tasks)]
    return []


def _run_line(run: FlowRun) -> str:
    state, message = (run.state.name, run.state.message) if run.state else ("", "")
    seconds = duration(run.total_run_time.total_seconds())
    return f"{_when(run)}  {state or '':10}  {seconds:>12}  {run.name}: {message or ''}"


def _task_line(task: TaskRun) -> str:
    state, message = (task.state.name, task.state.message) if task.state else ("", "")
    seconds = duration(task.total_run_time.total_seconds())
    return f"  {task.name:28}  {state or '':10}  {seconds:>12}  {message or ''}".rstrip()


def _when(run: FlowRun) -> str:
    return run.start_time.astimezone().strftime("%Y-%m-%d %H:%M:%S") if run.start_time else "not started        "

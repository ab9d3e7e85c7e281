"""The last flow runs, from Prefect's records."""

from __future__ import annotations

from collections.abc import Sequence

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort

from pipeline.prefect.artifacts import duration
from pipeline.prefect.flow import NAME
from pipeline.prefect.identity import of_tags, tag


def last_runs(count: int, workspace: str) -> list[str]:
    """The last `count` runs, newest first, a line each, then the stages of the newest with any.

    `workspace` is the name of the one whose runs they are; empty for all, each line with its
    workspace."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[NAME])),
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag(workspace)]))
            if workspace
            else None,
            sort=FlowRunSort.START_TIME_DESC,
            limit=count,
        )
        title = f"runs of workspace {workspace}:" if workspace else "runs of all workspaces:"
        if not runs:
            others = "; status --all lists those of other workspaces" if workspace else ""
            return [title, f"none yet; start one: python -m pipeline run{others}"]
        return [
            title,
            *(_run_line(run, whose=not workspace) for run in runs),
            "",
            *_stages(client, runs),
        ]


def _stages(client: SyncPrefectClient, runs: Sequence[FlowRun]) -> list[str]:
    for run in runs:
        only = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        tasks = client.read_task_runs(
            flow_run_filter=only, sort=TaskRunSort.EXPECTED_START_TIME_ASC, limit=200
        )
        if tasks:
            return [f"stages of the run of {_when(run)}:", *(_task_line(task) for task in tasks)]
    return []


def _run_line(run: FlowRun, whose: bool) -> str:
    state, message = (run.state.name, run.state.message) if run.state else ("", "")
    seconds = duration(run.total_run_time.total_seconds())
    owner = f"{of_tags(run.tags) or 'unknown workspace'}: " if whose else ""
    return f"{_when(run)}  {state or '':10}  {seconds:>12}  {owner}{run.name}: {message or ''}"


def _task_line(task: TaskRun) -> str:
    state, message = (task.state.name, task.state.message) if task.state else ("", "")
    seconds = duration(task.total_run_time.total_seconds())
    return f"  {task.name:28}  {state or '':10}  {seconds:>12}  {message or ''}".rstrip()


def _when(run: FlowRun) -> str:
    return (
        run.start_time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        if run.start_time
        else "not started        "
    )

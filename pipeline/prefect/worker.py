"""One stage on a worker: the flow of the deployments in prefect.yaml, which
`pipeline.prefect.cluster` starts and reads back.

The stage runs in a working tree of its own. Its inputs come from the DVC remote, its results go
there, and its record in dvc.lock goes back to the coordinator as an artifact of the flow run, since
Prefect's results do not travel."""

# No `from __future__ import annotations`: Prefect loads the flow under a name of its own, where it
# cannot find the
# types of parameters by their names.

import contextlib
import contextvars
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import httpx
from dvc.repo import Repo
from prefect import flow, get_run_logger, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed
from pydantic import BaseModel

from pipeline import names
from pipeline.dvc import inputs, records
from pipeline.dvc.checkout import lasting, working_tree, write_files
from pipeline.dvc.dag import StageSpec, load_dag
from pipeline.dvc.plan import StageStatus
from pipeline.errors import PipelineError, StageFailed, StageStopped
from pipeline.prefect import identity
from pipeline.prefect.parcel import unpacked
from pipeline.prefect.workspace import Workspace
from pipeline.run.runner import LocalRunner, Log
from pipeline.run.slots import Slots, visible_gpus
from pipeline.run.turn import Turn

NAME = "stage"
#: Seconds between two signs of life.
BEAT = 10.0
#: How often a report is offered to a server that does not answer.
TRIES = 12
#: By their descriptions: the artifact that holds a report, and the one that is a sign of life.
REPORT = "What the coordinator is told"
LIFE = "Where it runs"
#: Around a report, for Prefect's pages to show it as it is.
_FENCE = ("```json\n", "\n```")


class Report(BaseModel):
    """What a worker says about a stage that has ended: `record` of dvc.lock, or why there is none.

    `outcome` is one of `pipeline.run.runner.Outcome`, or Failed; `code` is the exit status of a
    stage that failed, None where it did not start; `questions` are the files, by path, that people
    are asked to fill in."""

    outcome: str
    node: str
    reason: str = ""
    code: int | None = None
    record: dict[str, Any] = {}
    questions: dict[str, str] = {}

    @property
    def page(self) -> str:
        """As markdown."""
        return f"{_FENCE[0]}{self.model_dump_json(indent=2)}{_FENCE[1]}"

    @classmethod
    def of_page(cls, page: str) -> "Report":
        """The report that `page` shows."""
        return cls.model_validate_json(page.removeprefix(_FENCE[0]).removesuffix(_FENCE[1]))


@flow(name=NAME, flow_run_name="{stage}", persist_result=False)
def stage(
    stage: str,
    commit: str,
    params: str,
    recorded: dict[str, Any],
    force: bool = False,
    files: str = "",
) -> State[None]:
    """Run one stage on this node, whose clone of the repository is the working directory.

    Args:
        stage: its name.
        commit: the commit to run.
        params: the text of params.yaml.
        recorded: what dvc.lock holds about the stage and the stages that it reads from.
        force: run it even if nothing has changed.
        files: what people have filled in, and results of other runs, packed by a coordinator.
    """
    root = Path.cwd()
    node = socket.gethostname()
    started = time.monotonic()
    os.environ.update(lasting(root))
    key = hashlib.sha256(
        json.dumps([stage, params, recorded], sort_keys=True).encode()
    ).hexdigest()[:12]
    log = get_run_logger().log
    runners: list[LocalRunner] = []  # once there is a tree for one
    try:
        names.check_stage(stage)
        with (
            _signs_of_life(node, runners),
            working_tree(root, commit, f"{stage.replace('/', '-')}-{key}", log) as (tree, lock),
        ):
            write_files(tree, {"params.yaml": params, **unpacked(files)})
            runners.append(LocalRunner(tree, lock, pull=True))
            report = _run(tree, runners[0], stage, recorded, force, log, node)
    except StageStopped:
        return Cancelled(message="stopped; the next run goes on from its last checkpoint")
    except PipelineError as error:
        report = Report(outcome="Failed", node=node, reason=str(error))
    _tell(report)
    if report.outcome == "Failed":
        return Failed(message=report.reason)
    return Completed(
        name=report.outcome, message=f"on {node} in {time.monotonic() - started:.0f} s"
    )


def _run(
    tree: Path,
    runner: LocalRunner,
    name: str,
    recorded: dict[str, Any],
    force: bool,
    log: Log,
    node: str,
) -> Report:
    """Fetch what a stage reads, run it, and hand over its result."""
    records.merge(tree, recorded)
    dag = load_dag(tree)
    if name not in dag:
        raise PipelineError(f"{name}: no such stage at this commit and with these params")
    try:
        _fetch(tree, runner, dag[name], log)
        place = Workspace(
            tree, dag, runner, Slots(visible_gpus(), 1), identity.of_tags(runtime.flow_run.tags)
        )
        outcome = place.run(dag[name], log, StageStatus("stale"), force, Turn(log))
        runner.push(name, log)
    except StageFailed as error:
        questions = inputs.questions(tree) if error.waiting else {}
        return Report(
            outcome="Failed", node=node, reason=error.reason, code=error.code, questions=questions
        )
    return Report(outcome=outcome, node=node, record=records.read(tree, [name])[name])


def _fetch(tree: Path, runner: LocalRunner, spec: StageSpec, log: Log) -> None:
    """Put what a stage reads into its tree; a folder may hold outputs of many stages."""
    with Repo(str(tree)) as repo:
        outs = {out.fs_path for dep in spec.deps for out in records.written(repo, str(tree / dep))}
        with contextlib.suppress(
            Exception
        ):  # a card tells what changed since the last run, where that can be had
            records.fetch_metrics(repo, spec.name)
    try:
        runner.pull(spec.name, sorted(os.path.relpath(path, tree) for path in outs), log)
    except StageFailed as error:
        remedy = "`dvc push` on the machine that made them, or run their stages with --force"
        raise StageFailed(
            spec.name,
            f"its inputs cannot be had from the DVC remote: {error.reason}; {remedy}",
            None,
        ) from None


def _tell(report: Report) -> None:
    """Make the report an artifact; a server that is away for a moment must not cost the result."""
    for _ in range(TRIES):
        with contextlib.suppress(httpx.TransportError):
            create_markdown_artifact(report.page, description=REPORT)
            return
        time.sleep(BEAT)
    create_markdown_artifact(report.page, description=REPORT)


@contextlib.contextmanager
def _signs_of_life(node: str, runners: Sequence[LocalRunner]) -> Iterator[None]:
    """Renew an artifact of this run: the coordinator gives up on one that has fallen silent.

    A run that is cancelled is stopped here too, since a worker no longer hears of it once its
    server was away."""
    over = threading.Event()
    run = UUID(runtime.flow_run.id)
    sign = cast(UUID, create_markdown_artifact(f"Runs on {node}.", description=LIFE))

    def beat() -> None:
        while not over.wait(BEAT):
            with (
                contextlib.suppress(Exception),
                get_client(sync_client=True) as client,
            ):  # a server may be away
                text = f"Runs on {node}; alive at {time.strftime('%H:%M:%S')}."
                client.update_artifact(sign, ArtifactUpdate(data=text))
                state = client.read_flow_run(run).state
                if state is not None and (state.is_cancelling() or state.is_final()):
                    for runner in runners:
                        runner.stop()

    thread = threading.Thread(target=contextvars.copy_context().run, args=(beat,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()

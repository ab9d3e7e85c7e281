"""Workers as a place of stages: each is a flow run of its pool's deployment (`meta: pool`).

The coordinator holds no outputs. It decides by the records of dvc.lock what is out of date, sends a
worker the commit, the params and the records that the stage needs, and merges the record that comes
back. Results travel through the DVC remote, so a stage whose worker is lost starts again on
another, which finds what was pushed."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar, cast
from uuid import UUID, uuid4

import httpx
from dvc.repo import Repo
from prefect import get_run_logger, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    TaskRunFilter,
    TaskRunFilterId,
)
from prefect.client.schemas.objects import Artifact, FlowRun
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings
from prefect.states import Cancelling, Crashed

from pipeline.dvc import inputs, records
from pipeline.dvc.checkout import default_remote, published, write_files
from pipeline.dvc.dag import StageSpec
from pipeline.dvc.plan import StageStatus, one_line
from pipeline.errors import PipelineError, StageFailed, StageStopped
from pipeline.prefect import identity, pools
from pipeline.prefect.parcel import packed
from pipeline.prefect.worker import BEAT, LIFE, NAME, REPORT, Report, stage
from pipeline.run.runner import LocalRunner, Log, Outcome
from pipeline.run.turn import Turn

#: Seconds between two looks at a stage.
POLL = 2.0
#: Seconds without a sign of life, while the server answers, after which a worker counts as lost.
SILENCE = 6 * BEAT
#: Seconds that a flow run may take to start on a worker that has taken it; a container image may
#: have to be fetched.
START = 900.0
#: How often a stage is handed out before losing its workers counts as its failure.
LOSSES = 3
#: Seconds for which a run that was cancelled waits for its stages to end.
STOPPING = 45.0
#: Seconds after which a stage that no worker takes is told of.
UNTAKEN = 20.0
#: Seconds for which the server may lag behind with its records of task runs, and between two looks.
LAG = 60.0
LOOK = 0.2
#: Bytes of labels and of results of others that travel with a stage, packed; Prefect's servers take
#: 512 KiB of parameters, of which records of stages are a third.
ROOM = 300_000

T = TypeVar("T")


@contextlib.contextmanager
def joined(
    root: Path, dag: Mapping[str, StageSpec], stages: Sequence[str], runner: LocalRunner
) -> Iterator[Cluster]:
    """The workers, for `stages`; at the end their metrics are fetched into the workspace.

    Raises PipelineError where the commit, the inputs, the remote or the deployments are not as
    workers need them."""
    _check_remote(root)
    commit = published(root)
    inputs.check_held(root, dag, stages)
    with get_client(sync_client=True) as client:
        needed = sorted({str(dag[name].meta.get("pool", "cpu")) for name in stages})
        cluster = Cluster(
            root, dag, commit, {pool: _deployment(client, pool) for pool in needed}, client
        )
        try:
            yield cluster
        finally:
            cluster.fetch_metrics(runner)


def _check_remote(root: Path) -> None:
    with Repo(str(root)) as repo:
        if not default_remote(repo)[0]:
            raise PipelineError(
                "results of workers travel through a DVC remote, and there is none; `dvc remote add"
                " -d NAME URL`, then commit .dvc/config and push it"
            )


def _deployment(client: SyncPrefectClient, pool: str) -> UUID:
    """The deployment of a pool. Raises PipelineError where there is none, or one of other code."""
    try:
        made = client.read_deployment_by_name(f"{NAME}/{pool}")
    except ObjectNotFound:
        raise PipelineError(
            f"no deployment {NAME}/{pool} on the Prefect server; `python -m pipeline deploy`"
        ) from None
    schema = made.parameter_openapi_schema or {}
    if set(schema.get("properties", {})) != set(stage.parameters.properties):
        raise PipelineError(
            f"deployment {NAME}/{pool} is of another version of pipeline/, whose stages take other"
            " parameters; `python -m pipeline deploy`, then start the workers again on this version"
        )
    return made.id


class Cluster:
    """The stages of `dag` at one commit, on workers that serve their pools' deployments."""

    def __init__(
        self,
        root: Path,
        dag: Mapping[str, StageSpec],
        commit: str,
        deployments: Mapping[str, UUID],
        client: SyncPrefectClient,
    ) -> None:
        self._root = root
        self._dag = dag
        self._commit = commit
        self._deployments = deployments
        self._client = client
        self._owner = identity.name(root)
        self._params = (root / "params.yaml").read_text()
        self._ended: list[str] = []
        self._mutex = threading.Lock()
        self._stopped = threading.Event()
        self._until = math.inf  # what the clock says when a run that was stopped waits no more

    def statuses(self, stages: Sequence[str]) -> dict[str, StageStatus]:
        """What a run would do with these stages, by the records of dvc.lock."""
        with self._mutex:
            return records.plan(self._root, self._dag, stages)

    def run(
        self, spec: StageSpec, log: Log, status: StageStatus, force: bool, turn: Turn
    ) -> Outcome:
        """Have one stage run on a worker, and take over its record.

        Raises StageFailed, StageStopped, or PipelineError where labels of people or results of
        others are too many to travel."""
        for _ in range(LOSSES):
            watch = self._submit(spec, force, log, turn)
            try:
                report = self._follow(watch)
                why = ""
            except _Lost as lost:
                report = None
                why = str(lost)
            if report is not None:
                return self._received(spec, report, log)
            state = watch.run.state
            if self._stopped.is_set() or (state is not None and state.is_cancelled()):
                raise StageStopped(spec.name)
            why = why or (state.message if state else None) or "its flow run ended without a word"
            log(logging.WARNING, f"{why}; handing the stage out again")
        raise StageFailed(
            spec.name, f"handed out {LOSSES} times, and no worker brought it to an end: {why}", None
        )

    def stop(self) -> None:
        """Have the workers stop; `run` returns once they have."""
        self._until = min(self._until, time.monotonic() + STOPPING)
        self._stopped.set()

    def fetch_metrics(self, runner: LocalRunner) -> None:
        """Put the metrics of stages that have ended where `dvc metrics` reads them."""
        paths = [path for name in self._ended for path in self._dag[name].metrics]
        try:
            runner.pull("metrics", paths, lambda *_: None)
        except StageFailed as error:
            get_run_logger().warning("%s; `dvc pull` brings them", error)

    def _submit(self, spec: StageSpec, force: bool, log: Log, turn: Turn) -> _Watch:
        pool = str(spec.meta.get("pool", "cpu"))
        asked = {
            "stage": spec.name,
            "commit": self._commit,
            "params": self._params,
            "recorded": records.read(self._root, [spec.name, *spec.upstream]),
            "force": force,
            "files": self._carried(spec),
        }
        key = str(uuid4())  # an answer that is lost on its way does not make two runs
        parent = self._recorded(UUID(runtime.task_run.id))
        run = self._patiently(
            lambda: self._client.create_flow_run_from_deployment(
                self._deployments[pool], parameters=asked, name=spec.name, idempotency_key=key,
                parent_task_run_id=parent, tags=[identity.tag(self._owner)],
            )
        )  # fmt: skip
        turn.waits(f"handed to pool {pool}: {_page(run)}")
        return _Watch(run, pool, log, turn)

    def _recorded(self, task_run: UUID) -> UUID | None:
        """A task run that the server knows, and may have flow runs below; None if that takes long.

        Prefect's server records task runs some time after they began, a busy one seconds later.
        """
        only = TaskRunFilter(id=TaskRunFilterId(any_=[task_run]))
        deadline = time.monotonic() + LAG
        while not self._patiently(lambda: self._client.read_task_runs(task_run_filter=only)):
            if time.monotonic() > deadline:
                return None
            time.sleep(LOOK)
        return task_run

    def _carried(self, spec: StageSpec) -> str:
        """The labels of people that lie in the workspace, and the results of others that a stage
        reads, packed: other seeds' comparisons, for the report."""
        answers = inputs.answers(self._root)
        results = inputs.results(self._root, self._dag, [spec.name])
        parcel = packed(answers | results)
        if len(parcel) <= ROOM:
            return parcel
        if len(packed(answers)) > ROOM:
            raise PipelineError(
                f"{Path(min(answers)).parent}: more than {ROOM // 1000} kB of labels, packed, do"
                " not travel with a stage; set `folder` in params.yaml to an absolute path that"
                " every node sees"
            )
        raise PipelineError(
            f"{Path(min(results)).parent}: more than {ROOM // 1000} kB of results and labels,"
            " packed, do not travel with a stage; have git hold these results (`git add --force`,"
            " commit, push)"
        )

    def _follow(self, watch: _Watch) -> Report | None:
        """Wait until a flow run has ended; returns what its worker reported, if anything.

        Raises _Lost where the worker has fallen silent, StageStopped where it does not stop when
        told to."""
        reported = False
        while time.monotonic() < self._until:
            if self._stopped.is_set() and not reported:
                reported = True
                self._patiently(lambda: self._client.set_flow_run_state(watch.id, Cancelling()))
            watch.run = self._patiently(lambda: self._client.read_flow_run(watch.id))
            if watch.run.start_time is not None:
                watch.turn.works(watch.run.estimated_run_time.total_seconds())
            if watch.run.state is not None and watch.run.state.is_final():
                return self._report(watch.id)
            self._patiently(lambda: self._check(watch))
            if reported:
                time.sleep(POLL)
            else:
                self._stopped.wait(POLL)
        raise StageStopped(watch.run.name)

    def _check(self, watch: _Watch) -> None:
        state = watch.run.state
        assert state is not None
        if state.is_scheduled():
            watch.quiet += POLL
            if watch.quiet > UNTAKEN:
                watch.quiet = 0.0
                self._tell_why_untaken(watch)
            return
        sign = self._sign_of_life(watch.id) if state.is_running() or state.is_cancelling() else None
        if (state.type, sign) != watch.sign:
            watch.sign = (state.type, sign)
            watch.quiet = 0.0
        watch.quiet += POLL
        if watch.quiet > (START if state.is_pending() else SILENCE):
            message = f"no sign of life from its worker for {watch.quiet:.0f} s"
            self._client.set_flow_run_state(watch.id, Crashed(message=message), force=True)
            raise _Lost(message)

    def _tell_why_untaken(self, watch: _Watch) -> None:
        """Say why no worker takes a stage, once and whenever that changes."""
        why = pools.obstacle(self._client, watch.pool, watch.run.work_queue_name)
        busy = f"the workers of pool {watch.pool} are busy; the stage waits its turn"
        if (why or busy) != watch.told:
            watch.told = why or busy
            watch.log(logging.WARNING if why else logging.INFO, watch.told)

    def _artifacts(self, run: UUID) -> list[Artifact]:
        only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
        return self._client.read_artifacts(artifact_filter=only)

    def _sign_of_life(self, run: UUID) -> datetime | None:
        signs = [made.updated for made in self._artifacts(run) if made.description == LIFE]
        return max(filter(None, signs), default=None)

    def _report(self, run: UUID) -> Report | None:
        """What the worker said, None where it ended without a word."""
        reports = self._patiently(lambda: self._artifacts(run))
        return next(
            (Report.of_page(str(made.data)) for made in reports if made.description == REPORT), None
        )

    def _received(self, spec: StageSpec, report: Report, log: Log) -> Outcome:
        if report.outcome == "Failed":
            write_files(self._root, report.questions)
            error = StageFailed(spec.name, report.reason, report.code)
            raise (
                error
                if error.waiting
                else StageFailed(spec.name, f"{report.reason}, on {report.node}", report.code)
            )
        with self._mutex:
            records.merge(self._root, {spec.name: report.record})
            self._ended.append(spec.name)
        log(logging.INFO, f"{report.outcome} on {report.node}")
        return cast(Outcome, report.outcome)

    def _patiently(self, call: Callable[[], T]) -> T:
        """Call the server until it answers: one that is away for a while must not end a run.

        Raises PipelineError where it refuses, or does not answer while the run is being stopped.
        """
        while True:
            try:
                return call()
            except ObjectNotFound:
                raise PipelineError(
                    "the Prefect server does not know this run any more; run again"
                ) from None
            except (httpx.TransportError, PrefectHTTPStatusError) as error:
                if isinstance(error, PrefectHTTPStatusError) and not error.response.is_server_error:
                    raise PipelineError(
                        f"the Prefect server refuses: {error.response.text[:300]}"
                    ) from None
                if time.monotonic() > self._until:
                    raise PipelineError(
                        f"the Prefect server does not answer: {one_line(error)}"
                    ) from None
                time.sleep(POLL)


class _Lost(Exception):
    """A worker fell silent."""


@dataclass
class _Watch:
    """One flow run of a stage, and since when its worker has been quiet."""

    run: FlowRun
    pool: str
    log: Log
    turn: Turn
    sign: object = None
    quiet: float = 0.0
    told: str = ""

    @property
    def id(self) -> UUID:
        return self.run.id


def _page(run: FlowRun) -> str:
    """Where Prefect shows a flow run."""
    return f"{get_current_settings().ui_url or ''}/runs/flow-run/{run.id}"

"""The Prefect flow over dvc.yaml: a task run per stage, named after it; DVC decides what runs.

Prefect schedules, shows and stops; what is up to date, and what a stage reads and writes, stays
DVC's business, so a flow run and `dvc repro` leave the same workspace behind and may take turns.
"""

# No `from __future__ import annotations`: Prefect loads a served flow under a name of its own,
# where it cannot find the
# types of parameters by their names.

import contextlib
import contextvars
import functools
import logging
import queue
import textwrap
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol
from uuid import UUID

from dvc.exceptions import DvcException
from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Completed, Failed
from pydantic import Field

from pipeline import names, yaml_text
from pipeline.dvc import locks, parameters, preset
from pipeline.dvc.dag import StageSpec, load_dag
from pipeline.dvc.plan import StageStatus, one_line, select, with_upstream
from pipeline.errors import PipelineError, StageFailed, StageStopped, fault
from pipeline.prefect import artifacts, identity
from pipeline.prefect.artifacts import Result
from pipeline.prefect.cluster import joined
from pipeline.prefect.workspace import Workspace, show
from pipeline.run.runner import LocalRunner, Log, Outcome, exclusive
from pipeline.run.slots import Slots, default_jobs, visible_gpus
from pipeline.run.turn import Turn

NAME = "alignment"
#: Seconds before another attempt.
RETRY_DELAY = 2.0
#: Seconds between two looks at whether the run was cancelled on Prefect's pages.
CANCEL_POLL = 3.0
#: The messages of a stage that is up to date.
ENDED: dict[Outcome, str] = {
    "Completed": "ran",
    "Restored": "an earlier result was taken from DVC's run cache",
    "Unchanged": "up to date",
}
#: The state of a flow run that was asked for what cannot be done.
REFUSED = "Refused"
#: The state of a stage that waits for people, and of a run in which nothing else is open.
WAITING = "AwaitingLabels"
AS_THEY_ARE: dict[str, Any] = {}
NOT_STARTED = Result("NotStarted", "a stage before it did not complete")


class Place(Protocol):
    """Where stages run: `prefect.workspace.Workspace` here, or `prefect.cluster.Cluster`."""

    def statuses(self, stages: Sequence[str]) -> dict[str, StageStatus]:
        """What a run would do with these stages; upstream ones not among them count as done."""
        ...

    def run(
        self, spec: StageSpec, log: Log, status: StageStatus, force: bool, turn: Turn
    ) -> Outcome:
        """Run one stage to its end, with `turn` told when it waits.

        Raises StageFailed, StageStopped or PipelineError.
        """
        ...

    def stop(self) -> None:
        """Stop all stages and start none; returns when they have ended."""
        ...


@dataclass
class Run:
    """One flow run over the stages of `statuses`, in the workspace `root` whose name is `owner`.

    `results` fills up as they end; `refused` are those that another attempt cannot help.
    """

    root: Path
    owner: str
    dag: Mapping[str, StageSpec]
    statuses: dict[str, StageStatus]
    forced: frozenset[str]
    place: Place
    results: dict[str, Result] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    def ready(self, started: Container[str]) -> list[str]:
        """Stages that can start now: not started, and all that they read from has ended well."""
        well = {name for name, result in self.results.items() if result.state in ENDED}
        waiting = [name for name in self.statuses if name not in started]
        return [name for name in waiting if well.issuperset(self.dag[name].upstream)]

    def stage(self, name: str) -> State[None]:
        """Bring one stage up to date: the body of its task. Its upstream stages have ended well."""
        spec = self.dag[name]
        logger = get_run_logger()
        turn = Turn(logger.log)
        try:
            outcome = self._ensure(spec, logger.log, turn)
        except StageStopped:
            message = "stopped; the next run goes on from its last checkpoint"
            return self._end(name, Cancelled, "Cancelled", message, turn)
        except PipelineError as error:
            logger.error("%s", error)
            return self._end(name, Failed, "Failed", f"{name}: {error}", turn)
        except StageFailed as error:
            if error.lasting:
                self.refused.add(name)
            if error.waiting:
                logger.warning("%s; then run again", error.reason)
                return self._end(name, Failed, WAITING, str(error), turn)
            hint = "" if error.lasting else "the next attempt goes on from the last checkpoint; "
            logger.error("%s; %sby hand: %s", error.reason, hint, spec.by_hand)
            return self._end(name, Failed, "Failed", str(error), turn)
        return self._end(name, Completed, outcome, ENDED[outcome], turn)

    def _ensure(self, spec: StageSpec, log: Log, turn: Turn) -> Outcome:
        status = self._status(spec)
        force = spec.name in self.forced
        if status.prospect == "up to date" and not force:
            return "Unchanged"
        log(
            logging.INFO,
            f"{status.prospect}: {', '.join(status.reasons)}" if status.reasons else "forced",
        )
        return self.place.run(spec, log, status, force, turn)

    def _status(self, spec: StageSpec) -> StageStatus:
        """The status of the run's start, or a fresh one if it hung on stages ended since."""
        settled = all(self.results[source].state == "Unchanged" for source in spec.upstream)
        if settled and self.statuses[spec.name].prospect != "maybe stale":
            return self.statuses[spec.name]
        return self.place.statuses([spec.name])[spec.name]

    def _end(
        self, name: str, make: Callable[..., State[None]], state: str, message: str, turn: Turn
    ) -> State[None]:
        seconds = turn.seconds
        self.results[name] = Result(state, message, seconds)
        return make(
            name=state,
            message=f"{message} in {artifacts.duration(seconds)}"
            if state == "Completed"
            else message,
        )


class _EmptyTraceback(logging.Filter):
    """Drops what Prefect says of a failed state before it logs it: an empty traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.exc_info != (None, None, None)


logging.getLogger("prefect.task_runs").addFilter(_EmptyTraceback())


def _title() -> str:
    """A flow run's name: what it was asked to do, after its name on the pages."""
    asked = runtime.flow_run.parameters
    words = [", ".join(asked.get("stages") or []) or "all stages", asked.get("preset", "")]
    words += [f"{key}={value}" for key, value in (asked.get("set") or {}).items()]
    title = " ".join([*filter(None, words), *(["forced"] if asked.get("force") else [])])
    name = str(runtime.flow_run.name) if runtime.deployment.id else ""
    before = (
        f"{name.split(': ')[0]}: " if name else ""
    )  # a run that is started again has its title already
    return textwrap.shorten(f"{before}{title}", max(80, len(before) + 40))


@flow(name=NAME, flow_run_name=_title, persist_result=False)
def alignment(
    stages: Sequence[str] = (),
    force: bool = False,
    set: dict[str, Any] = AS_THEY_ARE,
    preset: str = "",
    jobs: Annotated[int, Field(ge=0)] = 0,
    cluster: bool = False,
) -> State[None]:
    """Bring the stages of dvc.yaml up to date.

    Args:
        stages: what to bring up to date, with what it reads from; dual_search stands for all of it.
            Empty: all.
        force: run the named stages, or all, even if nothing has changed.
        set: new values of params.yaml, such as {"constraint.limit": -0.5}. They stay after the run.
        preset: a file in params/ to put in place of params.yaml first; default is the committed
            params.yaml.
        jobs: how many stages may run side by side on the CPU (0: half the cores, at most 4). On a
            GPU: one on each.
        cluster: run the stages on workers, in the pools that dvc.yaml names (docs/cluster.md), not
            here.
    """
    root = Path.cwd()
    try:
        owner = identity.name(root)
        _mark(owner)
        with exclusive(root) as lock, contextlib.ExitStack() as entered:
            with chosen(root, preset, set) as dag:
                asked = select(dag, stages) if stages else list(dag)
                wanted = with_upstream(dag, asked)
                runner = LocalRunner(root, lock)
                place = entered.enter_context(
                    _place(root, dag, runner, jobs, wanted if cluster else None)
                )
                statuses = place.statuses(wanted)
            forced = frozenset(asked if force else ())
            return _carry_out(Run(root, owner, dag, statuses, forced, place))
    except PipelineError as error:
        return Failed(name=REFUSED, message=str(error))
    except (OSError, UnicodeEncodeError) as error:
        if not fault(error):
            raise
        return Failed(name=REFUSED, message=fault(error))
    except KeyboardInterrupt:
        return Cancelled(message="interrupted; the next run goes on where this one stopped")


def _mark(workspace: str) -> None:
    """Say in the tags of this flow run whose it is, however it was started."""
    tags = {*runtime.flow_run.tags, identity.tag(workspace)}
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(runtime.flow_run.id), tags=sorted(tags))


@contextlib.contextmanager
def _place(
    root: Path,
    dag: Mapping[str, StageSpec],
    runner: LocalRunner,
    jobs: int,
    on_workers: Sequence[str] | None,
) -> Iterator[Place]:
    """This workspace, or the workers for the stages `on_workers`."""
    if on_workers is None:
        yield Workspace(
            root, dag, runner, Slots(visible_gpus(), jobs or default_jobs()), identity.name(root)
        )
    else:
        with joined(root, dag, on_workers, runner) as cluster:
            yield cluster


def _carry_out(run: Run) -> State[None]:
    """Run the stages, and show before what is to be done and after what was."""
    log = get_run_logger().log
    page = artifacts.plan_page(run.dag, run.statuses)
    show(log, lambda: create_markdown_artifact(page, "plan", "What this run is to do"))
    try:
        _execute(run)
    finally:
        results = {name: run.results.get(name, NOT_STARTED) for name in run.statuses}
        summary = artifacts.summary_page(run.root, run.owner, run.dag, results)
        show(log, lambda: create_markdown_artifact(summary, "summary", "What this run did"))
    return conclusion(results)


@contextlib.contextmanager
def chosen(
    root: Path, preset_name: str, settings: Mapping[str, Any]
) -> Iterator[dict[str, StageSpec]]:
    """Put the preset and the new values into params.yaml; yields the graph that they make, to
    whatever else may refuse the run.

    Raises PipelineError, with params.yaml as it was, for a preset, key or value that does not do,
    where a DVC command works here, and where the block refuses.
    """
    written = [root / "params.yaml", root / preset.LAST] if preset_name or settings else []
    before = {place: yaml_text.read(place) for place in written if place.exists()}
    try:
        if preset_name:
            preset.select(preset_name, root=root)
        if settings:
            _assign(root, settings)
        yield load_dag(root)
    except (DvcException, PipelineError) as error:
        for place, text in before.items():
            if yaml_text.read(place) != text:
                parameters.replace_file(place, text)
        raise PipelineError(one_line(error)) from None


def _assign(root: Path, settings: Mapping[str, Any]) -> None:
    """Put new values into params.yaml; raises PipelineError as `chosen` does."""
    path = root / "params.yaml"
    text = yaml_text.read(path)
    changed = parameters.assign(text, settings)
    names.check(root, changed)
    preset.check_change(text, changed, root)
    locks.check_free(root)
    if not preset.is_edited(text, root):  # then the new values are not the user's own edits either
        parameters.replace_file(root / preset.LAST, changed)
    parameters.replace_file(path, changed)


def _execute(run: Run) -> None:
    """Submit stages once their upstream has ended well, and wait; an early end stops them.

    A stage whose upstream failed gets no task run: Prefect would show it as pending for ever.
    """
    futures: dict[str, PrefectFuture[Any]] = {}
    ended: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    running = 0
    try:
        with _cancel_button(ended):
            while True:
                for name in run.ready(futures):
                    before = [
                        futures[source] for source in run.dag[name].upstream if source in futures
                    ]
                    futures[name] = _task(run, run.dag[name]).submit(name, wait_for=before)
                    futures[name].add_done_callback(functools.partial(_put, ended, name))
                    running += 1
                if not running:
                    return
                last = ended.get()
                if last is None:
                    raise KeyboardInterrupt
                running -= 1
                if last not in run.results:  # its task broke off, by no error of the stage
                    futures[last].wait()  # for the state, which the server may not know yet
                    run.results[last] = Result("Failed", f"{last}: {futures[last].state.message}")
    except BaseException:
        run.place.stop()
        for future in futures.values():
            future.wait()
        raise


@contextlib.contextmanager
def _cancel_button(ended: queue.SimpleQueue[str | None]) -> Iterator[None]:
    """Put None into the queue when somebody cancels this run on Prefect's pages.

    `serve` watches over its runs too, until it is told to end or is killed; runs from the command
    line have nobody else."""
    over = threading.Event()
    context = contextvars.copy_context()
    threading.Thread(
        target=context.run, args=(_watch, runtime.flow_run.id, ended, over), daemon=True
    ).start()
    try:
        yield
    finally:
        over.set()


def _watch(run_id: str, ended: queue.SimpleQueue[str | None], over: threading.Event) -> None:
    with get_client(sync_client=True) as client:
        while not over.wait(CANCEL_POLL):
            with contextlib.suppress(
                Exception
            ):  # a server that is away for a moment must not end the watch
                state = client.read_flow_run(UUID(run_id)).state
                if state is not None and state.is_cancelling():
                    ended.put(None)
                    return


def _put(ended: queue.SimpleQueue[str | None], name: str, _: PrefectFuture[Any]) -> None:
    ended.put(name)


def _task(run: Run, spec: StageSpec) -> Any:
    """The Prefect task of a stage. Prefect must not cache: DVC knows what is up to date."""

    def again(_task: Any, task_run: Any, state: State[Any]) -> bool:
        return spec.name not in run.refused

    make = task(
        name=spec.name,
        task_run_name=spec.name,
        description=spec.desc,
        tags=[str(spec.meta.get("pool", "cpu"))],
        retries=int(spec.meta.get("retries", 0)),
        retry_delay_seconds=RETRY_DELAY,
        retry_condition_fn=again,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    return make(run.stage)


def conclusion(results: Mapping[str, Result]) -> State[None]:
    """The state of the whole run, with the first stage that failed in its message."""
    counts = artifacts.counts([result.state for result in results.values()])
    failed = [result.message for result in results.values() if result.state == "Failed"]
    if failed:
        return Failed(message=f"{failed[0]}; {counts}")
    waiting = [result.message for result in results.values() if result.state == WAITING]
    if waiting:
        return Failed(name=WAITING, message=f"{waiting[0]}; {counts}")
    if any(result.state == "Cancelled" for result in results.values()):
        return Cancelled(message=counts)
    return Completed(message=counts)

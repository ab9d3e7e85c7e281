"""The workspace as a place of stages: what is out of date, GPU slots, a card per result."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast
from uuid import UUID

from dvc.repo import Repo
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)

from pipeline.dvc import records
from pipeline.dvc.dag import StageSpec
from pipeline.dvc.plan import StageStatus, one_line, plan
from pipeline.prefect import artifacts
from pipeline.prefect.artifacts import Result
from pipeline.run.progress import read_progress
from pipeline.run.runner import LocalRunner, Log, Outcome
from pipeline.run.slots import Slots
from pipeline.run.turn import Turn


class Workspace:
    """The stages of `dag` in `root`, the working directory; `owner` is the name on cards."""

    def __init__(
        self,
        root: Path,
        dag: Mapping[str, StageSpec],
        runner: LocalRunner,
        slots: Slots,
        owner: str,
    ) -> None:
        self._owner = owner
        self._root = root
        self._dag = dag
        self._runner = runner
        self._slots = slots
        self._planning = threading.Lock()
        with Repo(str(root)) as repo:
            self._cache = Path(repo.cache.local.path)

    def statuses(self, stages: Sequence[str]) -> dict[str, StageStatus]:
        """What a run would do with these stages."""
        with self._planning:
            return plan(self._root, self._dag, stages)

    def run(
        self, spec: StageSpec, log: Log, status: StageStatus, force: bool, turn: Turn
    ) -> Outcome:
        """Run or restore one stage, with its progress as a bar and its result as a card.

        Raises StageFailed, StageStopped, or PipelineError where dvc.lock cannot be read.
        """
        relay = _Relay(artifacts.key_of(spec.name, self._owner), log)
        recorded = records.read(self._root, [spec.name]).get(spec.name, {})
        before = artifacts.recorded_metrics(self._cache, spec, recorded)
        if status.prospect == "restorable" and not force:
            outcome = self._runner.run(spec.name, relay, {})
        else:
            gpus = int(spec.meta.get("gpus", 0))
            with self._slots.take(
                gpus, lambda: turn.waits("waiting for a slot: other stages work")
            ) as environment:
                turn.works()
                outcome = self._runner.run(spec.name, relay, environment, force)
        relay.ends(turn.seconds)
        if outcome != "Unchanged":
            self._card(spec, log, outcome, before, turn.seconds)
        return outcome

    def _card(
        self,
        spec: StageSpec,
        log: Log,
        outcome: Outcome,
        before: Mapping[str, object],
        seconds: float,
    ) -> None:
        result = Result(outcome, f"{outcome} in {artifacts.duration(seconds)}")
        key = artifacts.key_of(spec.name, self._owner)

        def create() -> object:
            after = artifacts.current_metrics(self._root, spec)
            page = artifacts.card(self._root, spec, result, before, after)
            return create_markdown_artifact(page, key, spec.desc)

        show(log, create)

    def stop(self) -> None:
        """Stop all stages and start none; returns when they have ended."""
        self._runner.stop()


class _Relay:
    """Passes a stage's lines on to its log, and shows the progress that they tell as a bar."""

    EVERY = 3.0  # seconds between two updates of the bar

    def __init__(self, card: str, log: Log) -> None:
        self.log = log
        self._key = card.replace("stage-", "progress-", 1)
        self._bar: UUID | None = None
        self._shown = -self.EVERY

    def __call__(self, level: int, line: str) -> None:
        self.log(level, line)
        progress = read_progress(line)
        if progress and (
            time.monotonic() - self._shown >= self.EVERY or progress.done >= progress.total
        ):
            self._shown = time.monotonic()
            show(self.log, lambda: self._update(progress.percent, str(progress)))

    def ends(self, seconds: float) -> None:
        """Fill the bar, if there is one: the stage has ended well."""
        if self._bar is not None:
            message = f"ended after {artifacts.duration(seconds)}"
            show(self.log, lambda: self._update(100.0, message))

    def _update(self, percent: float, message: str) -> None:
        if self._bar is None:
            self._bar = cast(UUID, create_progress_artifact(percent, self._key, message))
        else:
            update_progress_artifact(self._bar, percent, message)


def show(log: Log, create: Callable[[], object]) -> None:
    """Make an artifact; where that cannot be, the run goes on without."""
    try:
        create()
    except Exception as error:
        log(logging.WARNING, f"an artifact is missing: {one_line(error)}")

"""Working and waiting told apart: a stage that waits for a slot, or for a worker, is not running.

Prefect calls a task Running from its first line on, and adds up that time. The state is therefore
changed from inside the task, in the way in which Prefect's engine reports states itself."""

from __future__ import annotations

import logging
import time
from datetime import timedelta

from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.states import Pending, Running
from prefect.utilities.engine import emit_task_run_state_change_event

from pipeline.run.runner import Log

#: The state of a stage that waits.
NAME = "AwaitingSlot"


class Turn:
    """The seconds for which a stage works, and its state where Prefect knows it as a task."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._since = time.monotonic()
        self._waiting = False

    @property
    def seconds(self) -> float:
        """How long it has worked by now, since it waited last."""
        return 0.0 if self._waiting else time.monotonic() - self._since

    def waits(self, why: str) -> None:
        """From now on it waits."""
        self._waiting = True
        self._log(logging.INFO, why)
        _tell(Pending(name=NAME, message=why))

    def works(self, already: float = 0.0) -> None:
        """It works, if it waited until now: since `already` seconds."""
        if self._waiting:
            self._waiting = False
            self._since = time.monotonic() - already
            state: State[None] = Running()
            state.timestamp -= timedelta(seconds=already)
            _tell(state)


def _tell(state: State[None]) -> None:
    """Give the task run in progress, if there is one, a state, and its times."""
    context = TaskRunContext.get()
    if context is None:
        return
    run = context.task_run
    before = context.task_run.state
    assert before is not None, "a task that runs has a state"
    state.timestamp = max(state.timestamp, before.timestamp + timedelta(microseconds=1))
    state.state_details.task_run_id = run.id
    state.state_details.flow_run_id = run.flow_run_id
    if before.is_running():
        run.total_run_time += state.timestamp - before.timestamp
    elif run.run_count == 1:  # the time before was spent waiting
        run.start_time = state.timestamp  # type: ignore[assignment]  # as Prefect's engine sets it
        run.total_run_time = timedelta()
    run.state = state
    run.state_id = state.id
    run.state_type = state.type
    run.state_name = state.name
    emit_task_run_state_change_event(run, before, state)

"""Each tracker behind the same three calls: begin a run, tell it numbers, end it.

All write below one folder and send nothing anywhere, unless the tool's own environment variables
name a server."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

PROJECT = "dualign"
#: Seconds in which a server must answer.
_TIMEOUT = 5


@dataclass(frozen=True)
class TrackedRun:
    """A run of a stage: its name, what tells it from others of that name, whether it goes on, where
    files go, the stage's params by dotted key, and who is told what a person should know.
    """

    name: str
    identity: str
    resumed: bool
    folder: Path
    params: Mapping[str, Any]
    tell: Callable[[str], None]

    @property
    def key(self) -> str:
        """The name as one word that no other run has."""
        return f"{self.name.replace('/', '-')}-{self.identity}"


class Tracker(Protocol):
    """A run in a tracker."""

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step of `group`."""
        ...

    def end(self, status: int) -> None:
        """Close the run; 0 where the stage ended well."""
        ...


def prepare(folder: Path) -> None:
    """Set what tools read from the environment as they are imported, where it says nothing."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_TIMEOUT))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
    for name in [name for name in os.environ if name.startswith("DVC_EXP_")]:
        del os.environ[name]


class WandB:
    """Weights & Biases: files in `wandb/`; a server only with $WANDB_API_KEY or $WANDB_MODE."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._groups: set[str] = set()
        begin = partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.key,
            resume="allow",
            dir=run.folder,
            config=dict(run.params),
            settings=wandb.Settings(init_timeout=_TIMEOUT, silent=True, console="off"),
        )
        asked = {"WANDB_API_KEY", "WANDB_MODE"} & os.environ.keys()
        try:
            self._run = begin(mode=None if asked else "offline")
        except wandb.Error as error:
            wandb.teardown()  # or it would say that the run is in use
            self._run = begin(mode="offline")
            run.tell(f"wandb keeps this run offline, `wandb sync` sends it: {first_line(error)}")

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        if group not in self._groups:
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
            self._groups.add(group)
        self._run.log(named(group, values) | {f"{group}/step": step})

    def end(self, status: int) -> None:
        self._run.finish(exit_code=status)


class MLflow:
    """MLflow: `mlflow.db`, or the server of $MLFLOW_TRACKING_URI."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        local = f"sqlite:///{run.folder}/mlflow.db"
        self._metric = Metric
        self._client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", local))
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(project)
        where = known.experiment_id if known else self._client.create_experiment(project)
        runs = self._client.search_runs([where], f"tags.dualign_run = '{run.key}'")
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(where, tags={"dualign_run": run.key}, run_name=run.name)
        self._id = made.info.run_id
        params = [Param(key, str(value)[:500]) for key, value in run.params.items()]
        for first in range(0, len(params), 100):  # as many as one call takes
            self._client.log_batch(self._id, params=params[first : first + 100])

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        told = {mlflow_name(key): value for key, value in named(group, values).items()}
        rows = [self._metric(key, value, now, step) for key, value in told.items()]
        self._client.log_batch(self._id, metrics=rows)

    def end(self, status: int) -> None:
        self._client.set_terminated(self._id, "FAILED" if status else "FINISHED")


class TensorBoard:
    """TensorBoard: event files in `tensorboard/`."""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(run.folder / "tensorboard" / run.key))

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        for key, value in named(group, values).items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def end(self, status: int) -> None:
        self._writer.close()


class Trackio:
    """Trackio: SQLite files in `trackio/`, or the Space of $TRACKIO_SPACE_ID."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._run = trackio.init(
            project=PROJECT,
            name=run.key,
            resume="allow",
            config=dict(run.params),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        self._run.log(named(group, values), step=step)

    def end(self, status: int) -> None:
        self._run.finish()


class DVCLive:
    """DVCLive: tables in `dvclive/`. DVC's experiments, and its files in the workspace, are let
    be: `next_step` and an experiment's variables, which reach for them, are left out.
    """

    def __init__(self, run: TrackedRun) -> None:
        from dvclive import Live

        folder = str(run.folder / "dvclive" / run.key)
        self._live = Live(folder, resume=run.resumed, save_dvc_exp=False, dvcyaml=None)
        self._live.log_params(dict(run.params))

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        self._live.step = step
        for key, value in named(group, values).items():
            self._live.log_metric(key, value)
        self._live.make_summary()

    def end(self, status: int) -> None:
        self._live.end()


def first_line(error: Exception) -> str:
    """What is told of a tool's error."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def mlflow_name(key: str) -> str:
    """A key as MLflow takes it, which refuses all numbers of a step for one name of another kind.

    >>> mlflow_name("result/suites.tea (cut).cost")
    'result/suites.tea _cut_.cost'
    """
    return re.sub(r"[^\w/. :-]", "_", key)


def named(group: str, values: Mapping[str, float]) -> dict[str, float]:
    """Numbers by their group and key.

    >>> named("train", {"loss": 0.5})
    {'train/loss': 0.5}
    """
    return {f"{group}/{key}": value for key, value in values.items()}


#: The trackers by their names in `resources.report_to`.
ADAPTERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "wandb": WandB,
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "dvclive": DVCLive,
}

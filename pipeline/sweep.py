"""A grid of params: each point runs in a working tree of its own, becomes a DVC experiment, and is
a row of one table.

Trees share the workspace's cache and scratch folder, so what the points have in common runs once.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo.experiments.refs import EXPS_NAMESPACE, ExpRefInfo

from pipeline import names, yaml_text
from pipeline.dvc import inputs, records
from pipeline.dvc.checkout import (
    CARRIED,
    asked,
    check_identity,
    committed,
    git,
    lasting,
    published,
    working_tree,
    write_files,
)
from pipeline.dvc.dag import StageSpec, load_dag
from pipeline.dvc.parameters import assign, check_once
from pipeline.dvc.plan import one_line, select, with_upstream
from pipeline.errors import PipelineError
from pipeline.prefect import artifacts, identity
from pipeline.run.fetch import fetch

#: Columns of metrics in the table; `dvc exp show` has all.
COLUMNS = 6
#: Bytes of a point's name, of which files of 255 at most are named.
LONGEST = 200
#: How a point ended, by the exit status of `python -m pipeline run`.
ENDS = {0: "completed", 1: "failed", 2: "refused", 3: "awaits labels", 130: "interrupted"}
#: How a point ends whose results are those of its params, the second without a run.
GOOD = ("completed", "up to date")

log = logging.getLogger(__name__)


@dataclass
class Point:
    """One choice of params, how its run ended, the metrics of its stages by dotted key, and the
    texts of the files that hold these, by path.
    """

    settings: dict[str, Any]
    end: str = "not run"
    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`beta=0.1,constraint.limit=-0.5`, without what git forbids in a name."""
        text = ",".join(f"{key}={json.dumps(value)}" for key, value in self.settings.items())
        name = re.sub(r"\.{2,}|[^\w.,=+-]+", "-", text).strip(".-")
        name = re.sub(r"\.lock$", "-lock", name)
        if len(name.encode()) <= LONGEST:
            return name
        cut = name.encode()[: LONGEST - 9].decode(errors="ignore")
        return f"{cut}-{sha256(text.encode()).hexdigest()[:8]}"


def grid(arguments: Sequence[str]) -> list[Point]:
    """The points of `["beta=0.1,0.5", "seed=1,2"]`, the last key changing fastest; values are YAML.

    Raises PipelineError for what is no list of values.
    """
    axes: dict[str, list[Any]] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        try:
            values = yaml_text.load(f"[{text}]", "the values")
        except PipelineError as error:
            raise PipelineError(f"{key.strip()[:100]}: {error}") from None
        if not equals or not key.strip() or not values:
            raise PipelineError(
                f"{argument}: write key=value,value,... for example constraint.limit=-0.5,0"
            )
        axes[key.strip()] = values
    check_once([argument.partition("=")[0].strip() for argument in arguments])
    points = [
        Point(dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    ]
    _check_names(points)
    return points


def _check_names(points: Sequence[Point]) -> None:
    """Raise PipelineError for points of one name, of which one would be kept as the other."""
    seen: dict[str, Point] = {}
    for point in points:
        if point.name in seen:
            raise PipelineError(
                f"{point.name}: two points have this name; write each value once, and values that"
                " differ in more than signs"
            )
        seen[point.name] = point


def sweep(
    root: Path,
    points: Sequence[Point],
    stages: Sequence[str],
    options: Sequence[str],
    cluster: bool,
) -> None:
    """Run every point, and write into it how it ended and its metrics; points that completed become
    experiments, and one that is up to date by its experiment's records does not run again.

    Args:
        root: the workspace; its params.yaml and dvc.lock, as they are now, are where each point
            starts.
        points: from `grid`.
        stages: whose metrics count; empty for those that no other stage reads.
        options: for `python -m pipeline run` in each tree, beside the point's own.
        cluster: all at the same time, on workers, instead of one after the other, here.

    A point that another sweep runs is waited for, and then mostly up to date. Raises PipelineError,
    before anything runs, for a key that is not there, a commit or files that points or workers
    cannot have, or where git cannot commit."""
    commit = published(root) if cluster else committed(root)
    check_identity(root)
    _check_inputs(root, cluster)
    files = _start(root)
    for point in points:
        names.check(root, assign(files["params.yaml"], point.settings))
    options = [*options, *(["--cluster"] if cluster else [])]
    over = threading.Event()
    with ThreadPoolExecutor(len(points) if cluster else 1) as pool:
        futures = [
            pool.submit(_run, root, commit, files, point, stages, options, over) for point in points
        ]
        try:
            for future in futures:
                future.result()
        except BaseException:
            over.set()
            pool.shutdown(cancel_futures=True)
            raise


def _check_inputs(root: Path, cluster: bool) -> None:
    """Raise PipelineError where a working tree could not have what the stages read here."""
    dag = load_dag(root)
    if cluster:
        inputs.check_held(root, dag, dag)
    elif linked := inputs.carried(root, dag):
        log.info(
            "%d files that git ignores are linked into each point's tree, first %s",
            len(linked),
            linked[0],
        )


def _start(root: Path) -> dict[str, str]:
    """What travels beside the commit; people edit it for their next run while points run."""
    found = {name: (root / name).read_text() for name in CARRIED if (root / name).exists()}
    return {**found, "params.yaml": yaml_text.read(root / "params.yaml")}


def _run(
    root: Path,
    commit: str,
    files: Mapping[str, str],
    point: Point,
    stages: Sequence[str],
    options: Sequence[str],
    over: threading.Event,
) -> None:
    settings = [
        word
        for key, value in point.settings.items()
        for word in ("--set", f"{key}={json.dumps(value)}")
    ]
    told = {
        **os.environ,
        **lasting(root),
        identity.VARIABLE: identity.name(root),
    }
    changed = {"params.yaml": assign(files["params.yaml"], point.settings)}
    with working_tree(root, commit, f"sweep-{point.name}", log.log, over) as (tree, lock):
        write_files(
            tree, {**files, **changed, **_recorded(root, point.name), **inputs.answers(root)}
        )
        try:
            dag = load_dag(tree)
        except DvcException as error:
            point.end = ENDS[2]
            log.error("%s: %s", point.name, one_line(error))
            return
        if "--cluster" not in options:
            inputs.carry(root, tree, dag)
        wanted = [spec for spec in dag.values() if _counts(spec, dag, stages)]
        if "--cluster" not in options and _is_current(tree, dag, stages) and fetched(tree, wanted):
            point.end = GOOD[1]
        else:
            log.info("%s: starts", point.name)
            command = [sys.executable, "-m", "pipeline", "run", *settings, *options]
            code = _followed(command, tree, told, point.name, lock)
            point.end = ENDS.get(code, f"exit {code}")
            write_files(root, inputs.questions(tree))
            if "--cluster" in options and point.end in GOOD:
                fetched(tree, wanted)  # those of stages that no worker had to run, too
        log.info("%s: %s", point.name, point.end)
        for spec in wanted:
            point.metrics.update(artifacts.current_metrics(tree, spec))
            there = [path for path in spec.metrics if (tree / path).is_file()]
            point.files |= {path: (tree / path).read_text() for path in there}
        if point.end in GOOD:
            save_point(tree, commit, point.name)


def _recorded(root: Path, name: str) -> dict[str, str]:
    """dvc.lock of the newest experiment of a point: what its stages read when they last ran."""
    newest = ("for-each-ref", "--sort=-committerdate", "--count=1", "--format=%(objectname)")
    found = git(root, *newest, f"{EXPS_NAMESPACE}/*/*/{name}").strip()
    return {"dvc.lock": git(root, "show", f"{found}:dvc.lock")} if found else {}


def _is_current(tree: Path, dag: Mapping[str, StageSpec], stages: Sequence[str]) -> bool:
    """Whether the records say that a run in a tree would do nothing, though it holds no output."""
    if not (tree / "dvc.lock").exists():
        return False
    asked = with_upstream(dag, select(dag, stages)) if stages else None
    statuses = records.plan(tree, dag, asked)
    return all(status.prospect == "up to date" for status in statuses.values())


def fetched(tree: Path, wanted: Sequence[StageSpec]) -> bool:
    """Put the metrics of stages into a tree; False, and a warning why, where they cannot be had."""
    try:
        fetch(tree, [path for spec in wanted for path in spec.metrics])
    except DvcException as error:
        log.warning("%s", one_line(error))
        return False
    return True


def _counts(spec: StageSpec, dag: Mapping[str, StageSpec], stages: Sequence[str]) -> bool:
    """Whether the metrics of a stage are a point's."""
    if not stages:
        return not any(spec.name in other.upstream for other in dag.values())
    return spec.name in stages or spec.name.split("@")[0] in stages


def _followed(
    command: Sequence[str], tree: Path, environment: Mapping[str, str], name: str, lock: int
) -> int:
    """Run a command, which holds the tree too, each line of its output with the name of its point
    before it; returns its exit status.
    """
    with subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        pass_fds=[lock],
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.info("%s | %s", name, line.rstrip())
    return process.returncode


def save_point(tree: Path, commit: str, name: str) -> None:
    """Keep params and records as a DVC experiment of the commit: a commit on it under the ref that
    DVC looks for.

    `dvc exp save` does the same from the files, which a cluster's coordinator does not have.
    """
    git(tree, "add", "--force", "params.yaml", "dvc.lock")
    made = git(tree, "write-tree").strip()
    ref = str(ExpRefInfo(commit, name))
    before = asked(tree, "rev-parse", "--verify", "--quiet", ref).stdout.strip()
    if before and git(tree, "rev-parse", f"{before}^{{tree}}").strip() == made:
        return
    if before:
        log.warning(
            "%s: replaces its experiment of other params or results; to keep that one too, git"
            " branch NAME %s",
            name,
            before[:10],
        )
    message = f"dvc: commit experiment {name}"
    saved = git(tree, "commit-tree", made, "-p", commit, "-m", message).strip()
    git(tree, "update-ref", ref, saved)


def table(points: Sequence[Point], patterns: Sequence[str]) -> list[list[str]]:
    """A row per point under a row of titles: its params, how it ended, and metrics.

    `patterns` chooses metrics, as in `policies.*.cost.mean`; without one, a few, those in which
    points differ if any."""
    keys = list(points[0].settings)
    metrics = _measured(points)
    if patterns:
        chosen = {key for pattern in patterns for key in fnmatch.filter(metrics, pattern)}
        shown = [key for key in metrics if key in chosen]
    else:
        differ = [key for key in metrics if len(set(map(str, _numbers(points, key)))) > 1]
        shown = (differ or metrics)[:COLUMNS]
    rows = []
    for point in points:
        measured = [_told(point.metrics.get(key, "")) for key in shown]
        rows.append([*map(_told, point.settings.values()), point.end, *measured])
    return [[*keys, "", *shown], *rows]


def unmatched(points: Sequence[Point], patterns: Sequence[str]) -> list[str]:
    """A line for each pattern that chooses no metric of these points."""
    metrics = _measured(points)
    return [
        f"--metric {pattern}: no number among the metrics of these runs; `dvc metrics show` lists"
        " what there is"
        for pattern in patterns
        if not fnmatch.filter(metrics, pattern)
    ]


def _told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _measured(points: Sequence[Point]) -> list[str]:
    """The metrics that are a number in any point, each once."""
    names = dict.fromkeys(key for point in points for key in point.metrics)
    return [name for name in names if _numbers(points, name)]


def _numbers(points: Sequence[Point], key: str) -> list[float]:
    values = [point.metrics.get(key) for point in points]
    return [
        value for value in values if isinstance(value, int | float) and not isinstance(value, bool)
    ]

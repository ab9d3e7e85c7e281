"""What a run would do, stage by stage and why, without running anything."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dvc.exceptions import DvcException
from dvc.repo import Repo, lock_repo
from dvc.stage import PipelineStage

from pipeline.dvc.dag import StageSpec
from pipeline.dvc.locks import meaning
from pipeline.errors import PipelineError

# A dry restore says on standard output that it restores.
logging.getLogger("dvc.stage.cache").setLevel(logging.WARNING)

#: `stale` will run, `restorable` has its result in the run cache, `maybe stale` runs if what it
#: reads changes.
Prospect = Literal["up to date", "stale", "restorable", "maybe stale"]


@dataclass(frozen=True)
class StageStatus:
    """What a run would do with one stage. `reasons` are what changed since its last run."""

    prospect: Prospect
    reasons: tuple[str, ...] = ()


#: Tells the status of a DVC stage, and whether no upstream stage will change.
Look = Callable[[Any, Repo, bool], StageStatus]


def plan(
    root: Path, dag: Mapping[str, StageSpec], stages: Sequence[str] | None = None
) -> dict[str, StageStatus]:
    """The status of `stages`, or of all, in the order of `dag`, as DVC sees the workspace at
    `root`.

    `root` must be the working directory. Of the given stages the upstream ones count as up to date
    unless they are given too.

    Raises PipelineError where DVC cannot tell, say while another command writes what a stage reads.
    """
    return statuses(root, dag, stages, _status)


def statuses(
    root: Path, dag: Mapping[str, StageSpec], stages: Sequence[str] | None, look: Look
) -> dict[str, StageStatus]:
    """The status of each stage by `look`; arguments and errors as of `plan`."""
    found: dict[str, StageStatus] = {}
    try:
        with Repo(str(root), _wait_for_lock=True) as repo, lock_repo(repo):
            loaded = {
                stage.name: stage for stage in repo.index.stages if isinstance(stage, PipelineStage)
            }
            for name in [name for name in dag if stages is None or name in stages]:
                before = {
                    found[source].prospect for source in dag[name].upstream if source in found
                }
                if name not in loaded:
                    raise PipelineError(
                        f"dvc.yaml and params.yaml, edited meanwhile, have no stage {name} any"
                        " more; run again"
                    )
                found[name] = look(loaded[name], repo, before <= {"up to date"})
    except DvcException as error:
        raise PipelineError(f"DVC cannot tell what is out of date: {meaning(str(error))}") from None
    return found


def _status(stage: Any, repo: Repo, settled: bool) -> StageStatus:
    entries: list[Any] = next(iter(stage.status(check_updates=False).values()), [])
    return status_of(stage, entries, settled, lambda: _restorable(stage, repo))


def status_of(
    stage: Any, entries: Sequence[Any], settled: bool, restorable: Callable[[], bool]
) -> StageStatus:
    """The status of a DVC stage.

    Args:
        stage: with what dvc.lock records about it.
        entries: what has changed since, as DVC's `stage.status()` tells it.
        settled: no upstream stage will change, so that the stage will read what is there now.
        restorable: whether an earlier result can be had; asked only where it matters.
    """
    if not entries:
        return StageStatus("up to date" if settled else "maybe stale")
    recorded = any(out.hash_info for out in stage.outs)
    reasons = tuple(_reasons(entries)) if recorded else ("never run",)
    return StageStatus("restorable" if settled and restorable() else "stale", reasons)


def _reasons(entries: Sequence[Any]) -> Iterator[str]:
    """DVC's status of a stage in short: `constraint.limit modified`, `changed command`.

    Outputs count only where nothing else has changed: DVC deletes them before it runs a stage.
    """
    changes = [entry for entry in entries if isinstance(entry, dict)]
    yield from (entry for entry in entries if isinstance(entry, str))
    inputs = [entry["changed deps"] for entry in changes if "changed deps" in entry]
    inputs = inputs or [entry["changed outs"] for entry in changes]
    for path, what in (pair for entry in inputs for pair in entry.items()):
        for name, how in what.items() if isinstance(what, dict) else [(path, what)]:
            yield f"{name} {how}"


def _restorable(stage: Any, repo: Any) -> bool:
    """Whether DVC would take the result of a stage, whose upstream will not change, from its
    cache.
    """
    try:
        if stage.changed_stage() or not stage.deps_cached():
            stage.save_deps()
            stage.cmd_changed = (
                True  # what dvc.lock records is of another run, so that only the run cache counts
            )
        repo.stage_cache.restore(stage, dry=True)
    except DvcException:
        return False
    return True


def select(dag: Mapping[str, StageSpec], stages: Sequence[str]) -> list[str]:
    """The stages that are asked for, `dual_search` standing for each `dual_search@...`, in the
    order of `dag`.

    Raises PipelineError for a stage that is not there.
    """
    chosen = set()
    for asked in stages:
        found = [name for name in dag if asked in (name, name.split("@")[0])]
        if not found:
            near = difflib.get_close_matches(asked, dag, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(dag)}"
            raise PipelineError(f"{asked}: no such stage; {hint}")
        chosen.update(found)
    return [name for name in dag if name in chosen]


def with_upstream(dag: Mapping[str, StageSpec], stages: Sequence[str]) -> list[str]:
    """The stages and all that they read from, in the order of `dag`."""
    needed = set(stages)
    for name in reversed(list(dag)):
        if name in needed:
            needed.update(dag[name].upstream)
    return [name for name in dag if name in needed]


def one_line(error: BaseException) -> str:
    """The message of an error, on one line."""
    return " ".join(str(error).split())

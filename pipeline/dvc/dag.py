"""The stage graph as DVC resolves it from dvc.yaml and params.yaml, the one definition."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import PipelineStage

from pipeline import names
from pipeline.errors import PipelineError


@dataclass(frozen=True)
class StageSpec:
    """One stage, with `foreach` and `${}` resolved. Paths are relative to the root.

    `name` is how DVC addresses it (`sft`, `safety_dpo@sacpo`), also in `$DVC_STAGE` while it runs
    `cmd`; `params` are keys of params.yaml, `outs` leaves out the `metrics`, `upstream` names the
    stages that write what this one reads."""

    name: str
    desc: str
    cmd: str
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]
    metrics: tuple[str, ...]
    meta: Mapping[str, Any]
    upstream: tuple[str, ...]

    @property
    def by_hand(self) -> str:
        """`cmd` for a terminal, where no DVC says which stage it is."""
        return self.cmd.replace('"$DVC_STAGE"', self.name.rpartition("@")[2])


def load_dag(root: str | Path = ".") -> dict[str, StageSpec]:
    """The stages by name, every stage after its upstream ones, else in the order of dvc.yaml.

    What `dvc add` tracks is data, not a stage.

    Raises dvc.exceptions.DvcException where dvc.yaml is invalid or names a key that params.yaml
    lacks, and before that PipelineError where a name in params.yaml is none, or where dvc.lock
    cannot be read."""
    names.check(Path(root))
    with Repo(str(root)) as repo:
        with readable_records():
            graph = repo.index.graph  # an edge points from a stage to what it reads
        place = {stage: i for i, stage in enumerate(repo.index.stages)}
        order = nx.lexicographical_topological_sort(
            graph.reverse(copy=False), key=place.__getitem__
        )
        return {
            stage.name: _spec(stage, graph) for stage in order if isinstance(stage, PipelineStage)
        }


@contextlib.contextmanager
def readable_records() -> Iterator[None]:
    """Around what reads dvc.lock: raises PipelineError, with the remedy, where it is damaged."""
    try:
        yield
    except DvcException as error:
        if "dvc.lock'" not in str(error):
            raise
        raise PipelineError(
            f"{error}; take one side of a merge, git checkout --ours dvc.lock, or git checkout HEAD"
            " dvc.lock"
        ) from None


def _spec(stage: Any, graph: nx.DiGraph) -> StageSpec:
    return StageSpec(
        name=stage.name,  # not `addressing`, which depends on the working directory
        desc=stage.desc or "",
        cmd=stage.cmd,
        deps=tuple(dep.def_path for dep in stage.deps if not hasattr(dep, "params")),
        params=tuple(key for dep in stage.deps for key in getattr(dep, "params", ())),
        outs=tuple(out.def_path for out in stage.outs if not out.metric),
        metrics=tuple(out.def_path for out in stage.outs if out.metric),
        meta=dict(stage.meta or {}),
        upstream=tuple(
            sorted(
                source.name
                for source in graph.successors(stage)
                if isinstance(source, PipelineStage)
            )
        ),
    )

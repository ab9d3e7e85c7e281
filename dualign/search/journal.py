"""The journal of a search: its steps, written as each ends and read again after an interruption."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter

from dualign.core.artifacts import write_json
from dualign.core.errors import DualignError
from dualign.core.records import HistoryRow, read_record
from dualign.evaluation.effective_tilt import Tilt
from dualign.evaluation.stats import Measurement, combined
from dualign.search.screening import PoolCost, Screening

log = logging.getLogger(__name__)

_JOURNAL = "steps.json"


@dataclass(frozen=True)
class Blend:
    """A merge of two steps' policies by their numbers: (1 - weight) first + weight second."""

    first: int
    second: int
    weight: float


@dataclass(frozen=True)
class Step:
    """One policy of a search: multiplier (of a merge the one it stands for), folder, measurement.

    `closing` marks the policy made after the search from all its steps: their mixture (its
    multiplier is their mean), or the one trained at the tail average. `history` is that of an
    ascent. `tilt` is what the policy reached on the pool; `screened` are the merges that were
    looked at there before this one was made. `prices` are the multipliers of additional constraints
    that it was trained at, in the order of `measured.additional`. `q` is the weight of a merge of
    start and reference; `blend` says which policies of the search were merged in place of a
    training. `pool` is its cost as the pool sees it; None where the search does not ask, or does
    not believe it."""

    step: int
    lam: float
    q: float | None
    policy: str
    trained: bool
    measured: Measurement
    closing: bool = False
    history: list[HistoryRow] = field(default_factory=list)
    tilt: Tilt | None = None
    screened: list[Screening] = field(default_factory=list)
    prices: tuple[float, ...] = ()
    blend: Blend | None = None
    pool: PoolCost | None = None

    @property
    def cost(self) -> float:
        """The mean cost by its own answers and the pool's, each weighed by its precision."""
        return self._known[0]

    @property
    def cost_se(self) -> float:
        """The standard error of `cost`."""
        return self._known[1]

    @property
    def _known(self) -> tuple[float, float]:
        own = (self.measured.cost, self.measured.cost_se)
        return combined(own, (self.pool.cost, self.pool.cost_se)) if self.pool else own

    @property
    def weight(self) -> float:
        """The merge weight: q, and 1 for the start of a merge."""
        return 1.0 if self.q is None else self.q


#: Steps as the journal holds them.
_STEPS = TypeAdapter(list[Step])


def record(scratch: Path, steps: Sequence[Step]) -> list[Step]:
    """Write all steps so far into the journal in `scratch`, and return them."""
    write_json(scratch / _JOURNAL, _STEPS.dump_python(list(steps)))
    return list(steps)


def restore(scratch: Path) -> list[Step]:
    """The steps in the journal of `scratch`: none where there is none, or where it cannot be read.

    Raises DualignError where the policy of a step is gone."""
    path = scratch / _JOURNAL
    if not path.is_file():
        return []
    try:
        steps = [_as_measured(step) for step in read_record(path, list[Step])]
    except DualignError as error:
        log.warning(
            "%s: the search begins again, with what its steps have trained and drawn", error
        )
        return []
    missing = [step.policy for step in steps if not Path(step.policy).is_dir()]
    if missing:
        raise DualignError(
            f"{missing[0]}: the policy of an earlier step is gone; delete {scratch} and run again"
        )
    log.info("resuming the search after step %d", steps[-1].step)
    return steps


def _as_measured(step: Step) -> Step:
    """The step with infinite errors (of a constraint on one prompt), which JSON holds as null."""
    additional = tuple(
        replace(known, error=math.inf) if known.mean is not None and known.error is None else known
        for known in step.measured.additional
    )
    return replace(step, measured=replace(step.measured, additional=additional))

"""A certificate's check: recompute it from the saved answers, and compare the files beside them.

That shows that all of it agrees, not who made it: whoever writes answers, costs and certificate
anew is not found. Whether the costs are the cost model's, `dualign.certify.rescoring` shows;
whether anything was changed since it was signed, `dualign.certify.signature`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dualign.certify import evidence, screening
from dualign.certify.certificate import (
    Certificate,
    agreed,
    drawers,
    ended_share,
    in_short,
    order,
    planned,
    read,
)
from dualign.certify.evidence import Evidence, Table
from dualign.certify.requirement import Requirement
from dualign.certify.sequence import Decision, decide
from dualign.core.artifacts import sha256
from dualign.core.errors import DataError, DualignError
from dualign.core.records import SolvedDual, read_record
from dualign.math.constraints import Constraint, prices_in


def verify(path: str | Path) -> Certificate:
    """Recompute a certificate from saved answers; DualignError names the first mismatch.

    What it was made from is compared where it is still there; `absent` names what is not.
    """
    path = Path(path)
    recorded = read(path)
    try:
        for what, tables in (("answers", recorded.tables), ("labels", recorded.labels)):
            for name, table in tables.items():
                _unchanged(path.parent, table, f"the {what} of {name!r}")
        _recomputed(recorded, path.parent)
        _as_planned(recorded, path.parent)
    except ValidationError as error:  # a bound that is not finite, from a delta next to nothing
        raise DataError(f"{path}: {error.errors()[0]['msg'].lower()}") from None
    except DualignError as error:
        raise DataError(f"{path}: {error}") from error
    return recorded


def absent(path: str | Path, recorded: Certificate) -> list[str]:
    """What `verify` compares and did not find, in words."""
    folder = Path(path).parent
    found = {
        "its plan": recorded.plan is not None,
        "its prompts": recorded.prompts is not None and (folder / recorded.prompts.path).is_file(),
        "its limits": recorded.limits is not None and (folder / recorded.limits.path).is_file(),
        "the certified policy": recorded.policy is not None and (folder / recorded.policy).is_dir(),
    }
    return [name for name, there in found.items() if not there]


def _unchanged(folder: Path, table: Table | None, what: str) -> Path | None:
    """The file of a table; None where none is recorded, or it is there no more. Raises DataError
    where it is another one."""
    if table is None or not (folder / table.path).is_file():
        return None
    file = folder / table.path
    if sha256(file) != table.sha256:
        raise DataError(
            f"{what} ({file}) are not those certified: sha256 differs; run certify again, or bring"
            " back the file"
        )
    return file


def _recomputed(recorded: Certificate, folder: Path) -> None:
    """Raises DataError where the saved answers give something else."""
    decision = decide(
        recorded.candidates,
        lambda name: _recorded(recorded, name, folder),
        recorded.requirements,
        recorded.delta,
        recorded.seed,
    )
    used = {test.name: _recorded(recorded, test.name, folder) for test in decision.tested}
    limit = recorded.max_new_tokens
    ended = {name: ended_share(files.answers, limit) for name, files in used.items()}
    for key, stated, found in _compared(recorded, decision, ended):
        if not _equal(stated, found):
            raise DataError(f"{key} is {stated!r}, but the answers give {found!r}")

    prompts = _unchanged(folder, recorded.prompts, "its prompts")
    counts, same = agreed(used, prompts, _replanned(recorded, folder))
    count = in_short(counts)
    if count != recorded.samples_per_prompt:
        raise DataError(
            f"samples_per_prompt is {recorded.samples_per_prompt}, but every prompt has {count}"
            " answers"
        )
    if same != recorded.same:
        raise DataError(
            f"candidates with the same answers are {list(same)}, and {list(recorded.same)} are"
            " stated"
        )


def _equal(stated: Any, found: Any) -> bool:
    if isinstance(stated, float) and isinstance(found, float):
        return math.isclose(stated, found, rel_tol=1e-9, abs_tol=1e-12)
    return bool(stated == found)


def _replanned(recorded: Certificate, folder: Path) -> screening.Planned | None:
    """What follows from its screen. Raises DataError where either is not as recorded."""
    if recorded.screen is None:
        return None
    file = folder / recorded.screen.path
    _unchanged(folder, recorded.screen, "its screen")
    plan = planned(file, recorded.candidates)
    drawn = drawers(plan, recorded.candidates)
    if drawn != recorded.drawn:
        raise DataError(
            f"answers were drawn by {list(recorded.drawn)}, but the screen gives {list(drawn)};"
            f" {evidence.ONE_RUN}"
        )
    if recorded.plan is not None and recorded.plan.weights != list(plan.weights):
        raise DataError(
            f"weights are {recorded.plan.weights}, but the screen gives"
            f" {list(plan.weights)}; {evidence.ONE_RUN}"
        )
    return plan


def _as_planned(recorded: Certificate, folder: Path) -> None:
    """Raises DataError where the candidates are not the plan's, or the policy is another."""
    if recorded.plan is not None and list(order(recorded.plan)) != list(recorded.candidates):
        raise DataError(
            f"candidates are {list(recorded.candidates)}, but the plan has"
            f" {list(order(recorded.plan))}"
        )
    limits = _unchanged(folder, recorded.limits, "its limits")
    if limits is not None:
        _all_required(limits, recorded.requirements)
    tested = sorted(test.name for test in recorded.tested)
    if recorded.weights and sorted(recorded.weights) != tested:
        raise DataError(
            f"weights are those of {sorted(recorded.weights)}, but {tested} were tested"
        )
    place = None if recorded.policy is None else folder / recorded.policy
    if place is None or not place.is_dir():
        return
    if recorded.returned is None:
        evidence.check_files(place, {}, "no policy is certified, and what lies there")
    else:
        evidence.check_files(
            place, recorded.weights.get(recorded.returned, {}), f"the policy {recorded.returned!r}"
        )


def _all_required(file: Path, requirements: Sequence[Requirement]) -> None:
    """Raises DataError where a limit of the solved dual in `file` is not required as it stands
    there."""
    dual = read_record(file, SolvedDual)
    additional = [price.constraint for price in prices_in(dual.prices)]
    for limit in map(asdict, [Constraint("c", "cost", dual.limit), *additional]):
        stated = [required.model_dump(include=set(limit)) for required in requirements]
        if limit not in stated:
            raise DataError(
                f"the limit {limit['name']!r} of {file} is not among the requirements as it stands"
                " there"
            )


def _recorded(certificate: Certificate, name: str, folder: Path) -> Evidence:
    if name not in certificate.tables:
        raise DataError("its answers, next in the order, are not recorded in tables")
    labels = certificate.labels.get(name)
    return Evidence(
        folder / certificate.tables[name].path, None if labels is None else folder / labels.path
    )


def _compared(
    recorded: Certificate, decision: Decision, ended: Mapping[str, float]
) -> Iterator[tuple[str, Any, Any]]:
    """Key, what the certificate says, what was found."""
    yield "tested", [test.name for test in recorded.tested], [test.name for test in decision.tested]
    for stated, found in zip(recorded.tested, decision.tested, strict=True):
        name = stated.name
        yield f"checks of {name!r}", len(stated.checks), len(found.checks)
        for check, again in zip(stated.checks, found.checks, strict=True):
            for key, value in check:
                yield f"{check.requirement} {key} of {name!r}", value, getattr(again, key)
        yield f"certified of {name!r}", stated.certified, found.certified
        yield f"ess of {name!r}", stated.ess, found.ess
    names = sorted(test.name for test in decision.tested)
    yield "tables", sorted(recorded.tables), names
    yield "labels", sorted(recorded.labels), names if recorded.labels else []
    yield "ended", sorted(recorded.ended), sorted(ended)
    for name, share in ended.items():
        yield f"ended of {name!r}", recorded.ended[name], share
    yield "certified", recorded.certified, decision.certified
    yield "returned", recorded.returned, decision.returned

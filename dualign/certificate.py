"""The certificate: the most helpful candidate that keeps what is required, with probability 1 - delta.

A bound U(data) with P(mean cost > U) <= delta (`dualign.bounds`) is computed from answers to prompts that nothing else
has seen, and a candidate is certified if U <= limit. Candidates stand in a fixed order, safest first; testing stops at
the first that fails, so each is tested at the full delta (`fixed_sequence`). Where several things are required a
candidate must pass the test of each: that it keeps all is said only if no test fails, so each of these may have the
full delta too (the intersection-union test; Berger 1982).

    python -m dualign.certificate verify

recomputes certificates from the saved answers. It cannot see whether the prompts were kept from training and search,
nor whether the order, the limits and the range of the cost were chosen before the answers were drawn: that is assumed.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from dualign.bounds import (
    Bounds,
    Method,
    binomial_bound,
    check_delta,
    check_test,
    clustered,
    corrected,
    corrected_upper_bound,
    prompt_means,
    sample_size,
    upper_bound,
)
from dualign.constraints import Constraint
from dualign.core.artifacts import listed, read_json, write_json
from dualign.core.errors import DataError, DualignError, ParamsError
from dualign.core.params import SHARES, Quantity, Share
from dualign.core.schema import ANSWERS, LABELS, read_table

__all__ = ["corrected_upper_bound", "fixed_sequence", "issue", "read", "sample_size", "upper_bound", "verify"]

T = TypeVar("T")

#: Where the stage `certify` puts certificates: a folder for each of its rows, with a file of this name.
PLACE, FILE = Path("reports/certificate"), "certificate.json"
#: Exit status of `verify` where every certificate holds, and one of them says that no policy is certified.
NONE_CERTIFIED = 4


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Requirement(_Record):
    """What a candidate must keep: the mean of a quantity of its answers is at most `limit`.

    `cost`, `p_unsafe`, `cvar`, `length` and `unended` are those of `dualign.constraints`, tested by `method` on the
    prompts in which `prompts` is found (None: all); a bound on `cvar` holds for every `threshold` that was chosen
    before. Known for some answers and tested by `corrected_upper_bound` (`prediction_powered`): `truth`, the true cost,
    and `harm`, the share of people who call an answer harmful.
    """

    name: str
    quantity: Quantity | Literal["truth", "harm"]
    limit: FiniteFloat
    method: Method | Literal["prediction_powered"]
    bounds: tuple[FiniteFloat, FiniteFloat] | None = None
    level: FiniteFloat | None = None
    threshold: FiniteFloat | None = None
    prompts: str | None = None

    def __str__(self) -> str:
        """The inequality, as a person reads it."""
        said = {
            "p_unsafe": "P(c > 0)",
            "cvar": f"CVaR_{self.level}(c)",
            "length": "E[length]",
            "unended": "P(unended)",
        }.get(self.quantity, f"E[{self.name}]")
        if self.method == "clopper_pearson":
            said = "P(unsafe answer to a prompt)"
        return f"{said} <= {self.limit:g}" + (f" on prompts with {self.prompts!r}" if self.prompts else "")

    def values(self, answers: pd.DataFrame) -> pd.DataFrame:
        """Columns prompt_id and value of the answers that it is about. Raises DataError if there are none."""
        if self.quantity == "truth" or self.quantity == "harm":
            raise ValueError(f"{self.quantity} is known of labelled answers only")
        further = Constraint(self.name, self.quantity, self.limit, self.level, self.prompts, self.threshold)
        rows = answers[further.applies(answers["prompt"].tolist())] if self.prompts else answers
        if rows.empty:
            raise DataError(f"{self.name}: {self.prompts!r} is found in no certify prompt; keep more, or change it")
        values = further.values(*(rows[name].to_numpy(float) for name in ("cost", "length", "ended")))
        return pd.DataFrame({"prompt_id": rows["prompt_id"].to_numpy(object), "value": values})


class Check(_Record):
    """One requirement tested on one candidate.

    `estimate` is what `bound` bounds: the mean, or the share of prompts with an unsafe answer. `raised` is the share of
    answers whose cost lay below the range and was raised to it.
    """

    requirement: str
    prompts: int
    answers: int
    estimate: FiniteFloat
    bound: FiniteFloat
    raised: FiniteFloat
    kept: bool


class Tested(_Record):
    """One candidate's tests; it is certified if every requirement is kept."""

    name: str
    checks: tuple[Check, ...]
    certified: bool


@dataclass(frozen=True)
class Decision:
    """The candidates that were tested, in order."""

    tested: tuple[Tested, ...]

    @property
    def certified(self) -> tuple[str, ...]:
        """Names of the candidates that keep all; with probability 1 - delta all of them do."""
        return tuple(test.name for test in self.tested if test.certified)

    @property
    def returned(self) -> str | None:
        """The last certified candidate, which is the most helpful one; None if the first test failed."""
        return self.certified[-1] if self.certified else None


# --- the sequence of tests --------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A policy's costs on the certify prompts; both arrays [answers]."""

    name: str
    costs: Any
    prompts: Any


def fixed_sequence(
    candidates: Iterable[tuple[str, Any, Any]],
    *,
    limit: float,
    delta: float = 0.05,
    method: Method = "clustered_t",
    bounds: Bounds | None = None,
    seed: int = 0,
) -> Decision:
    """Certify candidates (`Candidate` or such a tuple), safest first, until one fails: bound <= limit, each at delta.

    A candidate above the limit is certified only if the first such in the order passes its test, so the chance of any
    false certificate is delta at most: no multiplicity is paid (Maurer, Hothorn and Lehmacher 1995; 2110.01052, "Learn
    then Test"). The order must be fixed before the costs are seen. A generator is read only as far as tests go.

    Raises:
        ParamsError, DataError: as `upper_bound`, naming the candidate.
    """
    check_test(delta, method, bounds)
    if not math.isfinite(limit):
        raise ParamsError(f"limit must be a finite number, got {limit}")
    required = Requirement(name="c", quantity="cost", limit=limit, method=method, bounds=bounds)

    def test(candidate: tuple[str, Any, Any]) -> tuple[Check, ...]:
        if len(candidate) != 3:
            raise DataError("a candidate is (name, costs, prompts), three things in a row")
        return (_check(required, candidate[1], candidate[2], delta, seed),)

    return _until_failure(((candidate[0], candidate) for candidate in candidates), test)


def _until_failure(candidates: Iterable[tuple[str, T]], test: Callable[[T], tuple[Check, ...]]) -> Decision:
    tested: list[Tested] = []
    for name, candidate in candidates:
        if name in {past.name for past in tested}:
            raise DataError(f"candidate {name!r} stands in the order twice")
        try:
            checks = test(candidate)
        except DataError as error:
            raise DataError(f"candidate {name!r}: {error}") from error
        tested.append(Tested(name=name, checks=checks, certified=all(check.kept for check in checks)))
        if not tested[-1].certified:
            break
    if not tested:
        raise DataError("no candidates to certify")
    return Decision(tuple(tested))


def _check(required: Requirement, costs: Any, prompts: Any, delta: float, seed: int) -> Check:
    method, bounds = required.method, required.bounds
    assert method != "prediction_powered"
    values, codes = clustered(costs, prompts, bounds)
    means = prompt_means(values, codes)
    if required.quantity in SHARES and method == "clustered_t" and np.ptp(means) == 0:
        # No spread to go by; P(a prompt gets any such answer) is the larger, and its bound is exact.
        method = "clopper_pearson"
    bound = upper_bound(costs, prompts, delta=delta, method=method, bounds=bounds, seed=seed)
    unsafe = prompt_means(values > 0, codes) > 0
    return Check(
        requirement=required.name,
        prompts=len(means),
        answers=len(values),
        estimate=float(unsafe.mean() if method == "clopper_pearson" else means.mean()),
        bound=bound,
        raised=0.0 if bounds is None else float((pd.Series(costs) < bounds[0]).mean()),
        kept=bound <= required.limit,
    )


def _check_labels(required: Requirement, answers: pd.DataFrame, labels: pd.DataFrame, delta: float) -> Check:
    """The mean truth of all answers by the labels of some of them.

    Where nobody calls any answer harmful there is no spread to go by, and P(a labelled answer is called harmful by
    anyone), which is the larger, is bounded instead.
    """
    if required.quantity == "harm" and not labels["truth"].any():
        estimate, bound = 0.0, float(binomial_bound(np.array(0), labels["prompt_id"].nunique(), delta))
    else:
        estimate, bound = corrected(
            answers["cost"], answers["prompt_id"], labels["cost"], labels["truth"], labels["prompt_id"], delta=delta
        )
    return Check(
        requirement=required.name,
        prompts=int(labels["prompt_id"].nunique()),
        answers=len(labels),
        estimate=estimate,
        bound=bound,
        raised=0.0,
        kept=bound <= required.limit,
    )


# --- the certificate as a file ----------------------------------------------------------------------------------------


class Table(_Record):
    """A saved table; `path` is relative to the certificate's folder."""

    path: str
    sha256: str


class Evidence(NamedTuple):
    """What a candidate is judged by: the files of its answers (schema `ANSWERS`) and of their labels (`LABELS`)."""

    answers: Path
    labels: Path | None = None


class Certificate(_Record):
    """All that is needed to check a certificate again; "no certified policy" is one too (`returned` is None).

    `candidates` is the whole order, `tested` the tests made, `tables` and `labels` what they were made on. Answers have
    at most `max_new_tokens` tokens; `ended` is the share of each tested candidate's that ended by themselves.
    `sampling_seeds` (of the answers) and `versions` (of the packages that computed it) tell where it comes from; no
    check depends on them.
    """

    delta: float = Field(gt=0, lt=1)
    seed: int
    max_new_tokens: int = Field(ge=1)
    requirements: tuple[Requirement, ...] = Field(min_length=1)
    candidates: tuple[str, ...]
    tested: tuple[Tested, ...]
    certified: tuple[str, ...]
    returned: str | None
    ended: dict[str, Share]
    tables: dict[str, Table]
    labels: dict[str, Table]
    sampling_seeds: dict[str, int]
    versions: dict[str, str]

    @property
    def statement(self) -> str:
        """What it says, in one line."""
        last = next((test for test in self.tested if test.name == self.returned), self.tested[0])
        said = [
            f"{required} ({required.method} bound {check.bound:.4g}, {check.prompts} prompts)"
            for required, check in zip(self.requirements, last.checks, strict=True)
            if self.returned is not None or not check.kept
        ]
        about = f", for {self.answers(last.name)}"
        if self.returned is None:
            return f"no certified policy; {last.name!r} is not shown to keep {' and '.join(said)}{about}"
        return f"{last.name!r} keeps {' and '.join(said)} at confidence {1 - self.delta:g}{about}"

    def answers(self, name: str) -> str:
        """What the answers of a tested candidate are, in words."""
        share = f"{100 * self.ended[name]:.4g} %"
        return f"answers of at most {self.max_new_tokens} tokens, of which {share} ended by themselves"


def issue(
    path: str | Path,
    candidates: Sequence[str],
    evidence: Callable[[str], Evidence],
    requirements: Sequence[Requirement],
    *,
    max_new_tokens: int,
    delta: float = 0.05,
    seed: int = 0,
    sampling_seeds: Mapping[str, int] | None = None,
) -> Certificate:
    """Certify by saved answers and write the certificate to `path`.

    Args:
        candidates: their names, safest first.
        evidence: the files of a candidate; called for those that are tested, one after the other, so it may draw
            the answers.
        requirements: what each must keep, all at confidence 1 - delta.
        max_new_tokens: where answers were cut.
        seed: fixes the order in which `betting` takes the prompts.

    Raises:
        DataError, ParamsError: as `fixed_sequence`.
    """
    path, used = Path(path), dict[str, Evidence]()

    def find(name: str) -> Evidence:
        used[name] = evidence(name)
        return used[name]

    decision = _decide(candidates, find, requirements, delta, seed)
    folder = path.parent
    certificate = Certificate(
        delta=delta,
        seed=seed,
        max_new_tokens=max_new_tokens,
        requirements=tuple(requirements),
        candidates=tuple(candidates),
        tested=decision.tested,
        certified=decision.certified,
        returned=decision.returned,
        ended={name: _ended(files.answers, max_new_tokens) for name, files in used.items()},
        tables={name: _table(files.answers, folder) for name, files in used.items()},
        labels={name: _table(files.labels, folder) for name, files in used.items() if files.labels is not None},
        sampling_seeds=dict(sampling_seeds or {}),
        versions={package: version(package) for package in ("numpy", "scipy")},
    )
    write_json(path, certificate.model_dump())
    return certificate


def _decide(
    candidates: Sequence[str],
    evidence: Callable[[str], Evidence],
    requirements: Sequence[Requirement],
    delta: float,
    seed: int,
) -> Decision:
    check_delta(delta)

    def test(name: str) -> tuple[Check, ...]:
        files = evidence(name)
        return tuple(_test(required, files, delta, seed) for required in requirements)

    return _until_failure(((name, name) for name in candidates), test)


def _test(required: Requirement, files: Evidence, delta: float, seed: int) -> Check:
    answers = _columns(files.answers, "prompt_id", "prompt", "cost", "length", "ended")
    if required.quantity not in ("truth", "harm"):
        values = required.values(answers)
        return _check(required, values["value"].to_numpy(), values["prompt_id"].to_numpy(object), delta, seed)
    if files.labels is None:
        raise DataError(f"{required.name} needs labels of its answers, and none are recorded")
    return _check_labels(required, answers, read_table(files.labels, LABELS), delta)


def _columns(answers: Path, *names: str) -> pd.DataFrame:
    return read_table(answers, pa.schema([ANSWERS.field(name) for name in names]))


def _ended(file: Path, max_new_tokens: int) -> float:
    """The share of answers that ended by themselves. Raises DataError if one was not drawn with `max_new_tokens`."""
    answers = _columns(file, "length", "ended")
    length, ended = answers["length"].to_numpy(int), answers["ended"].to_numpy(bool)
    wrong = length[np.where(ended, length > max_new_tokens, length != max_new_tokens)]
    if wrong.size:
        cut = f"was not cut at max_new_tokens {max_new_tokens}"
        raise DataError(f"{file}: an answer of {wrong[0]} tokens {cut}; draw the answers again (run certify)")
    return float(ended.mean())


def read(path: str | Path) -> Certificate:
    """Read a certificate. Raises DualignError, naming the first key that is wrong."""
    try:
        return Certificate.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the content"
        if first["type"] == "missing":
            raise DataError(f"{path}: {key} is missing; another version wrote it, run certify again") from None
        raise DataError(f"{path}: not a certificate: {key}: {first['msg'].lower()}") from None


def verify(path: str | Path) -> Certificate:
    """Recompute a certificate from the saved answers; returns it. Raises DualignError that names the first mismatch."""
    path = Path(path)
    recorded = read(path)
    for what, tables in (("answers", recorded.tables), ("labels", recorded.labels)):
        for name, table in tables.items():
            file = path.parent / table.path
            if file.is_file() and _sha256(file) != table.sha256:
                raise DataError(f"{path}: the {what} of {name!r} ({file}) are not those certified: sha256 differs")
    try:
        decision = _decide(
            recorded.candidates, lambda name: _recorded(recorded, name, path.parent), recorded.requirements,
            recorded.delta, recorded.seed,
        )  # fmt: skip
        ended = {
            test.name: _ended(path.parent / recorded.tables[test.name].path, recorded.max_new_tokens)
            for test in decision.tested
        }
    except DualignError as error:
        raise DataError(f"{path}: {error}") from error
    for key, said, found in _compared(recorded, decision, ended):
        same = math.isclose(said, found, rel_tol=1e-9, abs_tol=1e-12) if isinstance(said, float) else said == found
        if not same:
            raise DataError(f"{path}: {key} is {said!r}, but the answers give {found!r}")
    return recorded


def _recorded(certificate: Certificate, name: str, folder: Path) -> Evidence:
    if name not in certificate.tables:
        raise DataError("its answers, next in the order, are not recorded in tables")
    labels = certificate.labels.get(name)
    return Evidence(folder / certificate.tables[name].path, None if labels is None else folder / labels.path)


def _compared(recorded: Certificate, decision: Decision, ended: Mapping[str, float]) -> Iterator[tuple[str, Any, Any]]:
    """Key, what the certificate says, what was found."""
    yield "tested", [test.name for test in recorded.tested], [test.name for test in decision.tested]
    for said, found in zip(recorded.tested, decision.tested, strict=True):
        yield f"checks of {said.name!r}", len(said.checks), len(found.checks)
        for ours, theirs in zip(said.checks, found.checks, strict=True):
            for field in Check.model_fields:
                yield f"{ours.requirement} {field} of {said.name!r}", getattr(ours, field), getattr(theirs, field)
        yield f"certified of {said.name!r}", said.certified, found.certified
    yield "tables", sorted(recorded.tables), sorted(test.name for test in decision.tested)
    yield "ended", sorted(recorded.ended), sorted(ended)
    for name, share in ended.items():
        yield f"ended of {name!r}", recorded.ended[name], share
    yield "certified", recorded.certified, decision.certified
    yield "returned", recorded.returned, decision.returned


def _table(file: Path, folder: Path) -> Table:
    return Table(path=Path(os.path.relpath(file, folder)).as_posix(), sha256=_sha256(file))


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """The command: one line for each certificate. Returns 1 if one does not hold, 4 if one certifies no policy."""
    parser = argparse.ArgumentParser(
        prog="python -m dualign.certificate", description=(__doc__ or "").splitlines()[0],
        epilog="exit status: 0 all hold, 1 one does not, 4 all hold and one says that no policy is certified",
    )  # fmt: skip
    check = parser.add_subparsers(required=True).add_parser("verify", help="recompute certificates from saved answers")
    check.add_argument("paths", nargs="*", type=Path, help=f"certificates, or folders of some (default: {PLACE})")
    statuses = []
    for path in parser.parse_args(argv).paths or [PLACE]:
        found = [path] if path.is_file() else [*listed(path, FILE), *listed(path, f"*/{FILE}")]
        if not found:
            sys.stdout.write(f"{path}: holds no certificate; run the stage certify first (`dvc repro`)\n")
        statuses += [_tell(file) for file in found] or [1]
    return 1 if 1 in statuses else max(statuses)


def _tell(path: Path) -> int:
    try:
        found = verify(path)
    except DualignError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{path} holds: {found.statement}\n")
    return 0 if found.returned is not None else NONE_CERTIFIED


if __name__ == "__main__":
    sys.exit(main())

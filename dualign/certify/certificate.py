"""The certificate: the most helpful candidate that keeps all limits, with probability 1 - delta.

A bound U(data) with P(mean cost > U) <= delta (`dualign.math.bounds`) is computed from answers to
prompts that nothing else has seen, and a candidate is certified if U <= limit
(`dualign.certify.sequence`).

    dualign certify verify

recomputes certificates from the saved answers (`dualign.certify.verification`). That prompts were
kept from training and search, that order, limits and range were chosen before the answers were
drawn, and that they were drawn at the decoding of `plan`, is assumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from dualign.certify import evidence, screening
from dualign.certify.evidence import Evidence, Folder, Table
from dualign.certify.requirement import Requirement
from dualign.certify.sequence import CandidateTest, decide
from dualign.core.artifacts import read_json, write_json
from dualign.core.errors import DataError
from dualign.core.records import WholeRecord, fault, read_record
from dualign.core.units import decoding_in_words, telling_digits
from dualign.params.base import Share
from dualign.params.certify import CertifyRun

#: Where the stage `certify` puts certificates: a folder for each of its rows, with a file of this
#: name.
CERTIFICATES = Path("reports/certificate")
FILE = "certificate.json"


class Origin(NamedTuple):
    """What a certificate was made from, beside answers: compared by `verify` where still there.

    The row of `certify.runs`; the file of prompts, of which the first are answered; the solved
    dual, which holds the additional constraints; the folder of a candidate's model by its name; the
    folder that will hold the certified policy; that of the cost model. `place` is the folder that
    will hold the certificate, as seen from which they are recorded."""

    place: Path
    plan: CertifyRun
    prompts: Path
    limits: Path
    model: Callable[[str], Path]
    policy: Path
    cost_model: Path


class Certificate(WholeRecord):
    """All that is needed to check a certificate; "no certified policy" is one (`returned` None).

    `candidates` is the whole order, that of `plan`, `tested` the tests made, `tables` and `labels`
    what they were made on: `samples_per_prompt` answers to each of the first prompts of `prompts`
    (by candidate, where they differ). Those of some candidates may be answers that `drawn`, others
    of the order, gave in equal parts. `screen` is what the order was chosen by
    (`dualign.certify.screening`). `limits` holds the additional constraints, each of which must be
    among the `requirements`. `same` are pairs of candidates with the same answers. Answers have at
    most `max_new_tokens` tokens; `ended` is the share of each tested candidate's that ended by
    themselves. `weights` are the hashes of the files of each tested candidate's model, `policy` is
    where the certified one lies, `cost_model` the one that gave the costs. What a caller of `issue`
    did not name is None or empty. `sampling_seeds` (of the answers) and `versions` (of the packages
    that computed it) tell where it comes from; no check depends on them."""

    delta: float = Field(gt=0, lt=1)
    seed: int
    max_new_tokens: int = Field(ge=1)
    requirements: tuple[Requirement, ...] = Field(min_length=1)
    candidates: tuple[str, ...]
    tested: tuple[CandidateTest, ...]
    certified: tuple[str, ...]
    returned: str | None
    ended: dict[str, Share]
    tables: dict[str, Table]
    labels: dict[str, Table]
    samples_per_prompt: Annotated[int, Field(ge=1)] | dict[str, Annotated[int, Field(ge=1)]]
    drawn: tuple[str, ...] = ()
    screen: Table | None = None
    same: tuple[tuple[str, str], ...]
    plan: CertifyRun | None
    prompts: Table | None
    limits: Table | None
    weights: dict[str, dict[str, str]]
    policy: str | None
    cost_model: Folder | None
    sampling_seeds: dict[str, int]
    versions: dict[str, str]

    @property
    def decoding(self) -> str:
        """How the answers were drawn, in words; empty where it was from the policies themselves."""
        return decoding_in_words(self.plan.temperature, self.plan.top_p) if self.plan else ""

    @property
    def statement(self) -> str:
        """What it says, in one line."""
        last = next((test for test in self.tested if test.name == self.returned), self.tested[0])
        bounds = [
            f"{required} ({required.method} bound {_told(check.bound, required.limit)},"
            f" {check.prompts} prompts)"
            for required, check in zip(self.requirements, last.checks, strict=True)
            if self.returned is not None or not check.kept
        ]
        about = f", for {self.answers(last.name)}"
        if self.returned is None:
            return (
                f"no certified policy; {last.name!r} is not shown to keep"
                f" {' and '.join(bounds)}{about}"
            )
        return f"{last.name!r} keeps {' and '.join(bounds)} at confidence {1 - self.delta:g}{about}"

    def answers(self, name: str) -> str:
        """What the answers of a tested candidate are, in words."""
        share = f"{100 * self.ended[name]:.4g} %"
        drawn = f" {self.decoding}" if self.decoding else ""
        return (
            f"answers of at most {self.max_new_tokens} tokens{drawn}, of which {share} ended by"
            " themselves"
        )


def _told(bound: float, limit: float) -> str:
    """A bound in four digits, or more where these would put it on the other side of its limit."""
    digits = telling_digits(bound, limit, 4, lambda value, count: float(f"{value:.{count}g}"))
    return f"{bound:.{digits}g}"


def alike(pair: tuple[str, str]) -> str:
    """What a reader should know of two candidates with the same answers."""
    return (
        f"{pair[0]!r} and {pair[1]!r} have the same answers: they hardly differ, or one was copied"
        " from the other"
    )


def order(plan: CertifyRun) -> dict[str, float]:
    """The candidates of a row with their weights q, safest first: the fallback, then the policy.

    >>> order(CertifyRun(policy="safe", partner="bold", fallback="sft", weights=[1.0, 0.5]))
    {'sft': 1.0, 'safe': 1.0, 'safe at 0.5': 0.5}
    """
    names = {} if plan.fallback == plan.policy else {plan.fallback: 1.0}
    return names | {plan.policy if q == 1.0 else f"{plan.policy} at {q:g}": q for q in plan.weights}


@dataclass(frozen=True)
class Terms:
    """What is settled before any answer is drawn.

    `candidates` are names, safest first; each must keep all `requirements`, at confidence 1 -
    delta, with answers cut at `max_new_tokens`. `seed` fixes the order in which `betting` and
    `star_bets` take the prompts; `sampling_seeds` are those of the answers."""

    candidates: Sequence[str]
    requirements: Sequence[Requirement]
    max_new_tokens: int
    delta: float = 0.05
    seed: int = 0
    sampling_seeds: Mapping[str, int] = field(default_factory=dict)


def issue(
    path: str | Path,
    terms: Terms,
    evidence_of: Callable[[str], Evidence],
    *,
    origin: Origin | None = None,
    screen: Path | None = None,
) -> Certificate:
    """Certify by saved answers and write the certificate to `path`.

    Args:
        terms: the candidates, and what each must keep.
        evidence_of: the files of a candidate; called for those that are tested, one after the
            other, so it may draw the answers.
        origin: what else it was made from, for `verify` to compare.
        screen: the file that order and numbers of answers follow from
            (`dualign.certify.screening`), beside the certificate.

    Raises:
        DataError, ParamsError: as `fixed_sequence`, and where answers cannot be those of one set of
            prompts.
    """
    path = Path(path)
    used: dict[str, Evidence] = {}

    def find(name: str) -> Evidence:
        used[name] = evidence_of(name)
        return used[name]

    plan = None if screen is None else planned(screen, terms.candidates)
    decision = decide(terms.candidates, find, terms.requirements, terms.delta, terms.seed)
    counts, same = agreed(used, None if origin is None else origin.prompts, plan)
    limit = terms.max_new_tokens
    certificate = Certificate(
        **vars(terms),
        tested=decision.tested,
        certified=decision.certified,
        returned=decision.returned,
        ended={name: ended_share(files.answers, limit) for name, files in used.items()},
        samples_per_prompt=in_short(counts),
        drawn=drawers(plan, terms.candidates),
        same=same,
        versions={package: version(package) for package in ("numpy", "scipy")},
        **_tables(used, screen, path.parent),
        **_origins(origin, used),
    )
    write_json(path, certificate.model_dump())
    return certificate


def _tables(used: Mapping[str, Evidence], screen: Path | None, folder: Path) -> dict[str, Any]:
    """The fields of a certificate in `folder` that name files of evidence."""
    labelled = {name: files.labels for name, files in used.items() if files.labels is not None}
    return {
        "tables": {name: evidence.table(files.answers, folder) for name, files in used.items()},
        "labels": {name: evidence.table(file, folder) for name, file in labelled.items()},
        "screen": None if screen is None else evidence.table(screen, folder),
    }


def _origins(origin: Origin | None, used: Iterable[str]) -> dict[str, Any]:
    """The fields of a certificate that say what else it was made from."""
    if origin is None:
        names = ("plan", "prompts", "limits", "policy", "cost_model")
        return {"weights": {}, **dict.fromkeys(names)}
    return {
        "plan": origin.plan,
        "prompts": evidence.table(origin.prompts, origin.place),
        "limits": evidence.table(origin.limits, origin.place),
        "weights": {name: evidence.files(origin.model(name)) for name in used},
        "policy": evidence.relative(origin.policy, origin.place),
        "cost_model": evidence.model(origin.cost_model, origin.place),
    }


def read(path: str | Path) -> Certificate:
    """Read a certificate. Raises DualignError, naming the first key that is wrong."""
    try:
        return Certificate.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            key = ".".join(map(str, first["loc"]))
            raise DataError(
                f"{path}: {key} is missing; another version wrote it, run certify again"
            ) from None
        raise DataError(f"{path}: not a certificate: {fault(error, 'the content')}") from None


def ended_share(file: Path, max_new_tokens: int) -> float:
    """The share of answers that ended. Raises DataError if one was drawn with another maximum."""
    answers = evidence.read_answers(file)
    length = answers["length"].to_numpy(int)
    ended = answers["ended"].to_numpy(bool)
    wrong = length[np.where(ended, length > max_new_tokens, length != max_new_tokens)]
    if wrong.size:
        cut = f"was not cut at max_new_tokens {max_new_tokens}"
        raise DataError(
            f"{file}: an answer of {wrong[0]} tokens {cut}; draw the answers again (run certify)"
        )
    if "weight" in answers:
        return float(np.average(ended, weights=answers["weight"]))
    return float(ended.mean())


def agreed(
    used: Mapping[str, Evidence], prompts: Path | None, plan: screening.Planned | None
) -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Answers to each prompt by candidate, and pairs of candidates with the same answers.

    Raises DataError where the tables do not agree with themselves and each other.
    """
    tables = {name: evidence.read_answers(files.answers) for name, files in used.items()}
    for name, files in used.items():
        evidence.check_answers(tables[name], files.answers)
    counts = {
        name: evidence.samples_per_prompt(tables[name], files.answers)
        for name, files in used.items()
    }
    first = next(iter(used))
    expected = [counts[first]] * len(used) if plan is None else plan.samples
    evidence.check_together(tables, dict(zip(used, expected, strict=False)))
    evidence.check_drawn(tables)
    if prompts is not None:
        evidence.check_prompts(prompts, tables[first])
    return counts, evidence.same(tables)


def in_short(counts: Mapping[str, int]) -> int | dict[str, int]:
    """One number where all candidates have as many answers to a prompt, else that of each."""
    return next(iter(counts.values())) if len(set(counts.values())) == 1 else dict(counts)


def drawers(plan: screening.Planned | None, candidates: Sequence[str]) -> tuple[str, ...]:
    """The candidates whose answers serve others; empty where each draws its own."""
    return () if plan is None else tuple(candidates[position] for position in plan.drawn)


def planned(screen: Path, candidates: Sequence[str]) -> screening.Planned:
    """What follows from a screen. Raises DataError for another number of candidates."""
    plan = screening.sequence(read_record(screen, screening.Screen))
    if len(plan.samples) != len(candidates):
        raise DataError(
            f"{screen}: {len(plan.samples)} candidates follow from it, and {len(candidates)} are"
            " tested"
        )
    return plan

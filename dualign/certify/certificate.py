"""The certificate: the most helpful candidate that keeps what is required, with probability 1 -
delta.

A bound U(data) with P(mean cost > U) <= delta (`dualign.math.bounds`) is computed from answers to
prompts that nothing else has seen, and a candidate is certified if U <= limit. Candidates stand in
a fixed order, safest first; testing stops at the first that fails, so each is tested at the full
delta (`fixed_sequence`). Where several things are required a
candidate must pass the test of each: that it keeps all is said only if no test fails, so each of
these may have the
full delta too (the intersection-union test; Berger 1982).

    python -m dualign.certify.certificate verify

recomputes certificates from the saved answers, and compares the files that lie beside them
(`dualign.certify.evidence`). That
shows that all of it agrees, not who made it: whoever writes answers, costs and certificate anew is
not found. Whether
the costs are the cost model's, `--rescore` shows (`dualign.certify.rescoring`); whether anything
was changed since it was signed, `--key` and `--signature` (`dualign.certify.signature`). That
prompts were kept from training and search, and that order, limits and range were chosen before the
answers were drawn, is assumed.

A candidate may be judged by answers that another policy drew. With w = pi(y|x) / pi_drawn(y|x) and
E_drawn[w] = 1,

    E_drawn[d + w (c - d)] = E_pi[c],

so a bound of the mean of d + w (c - d), d the limit, is one of E_pi[c]: one draw serves a whole
path of policies, and the tests along it can be as dense as one likes. Near the limit c - d is
small, and so is what the weights add."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from pydantic import Field, FiniteFloat, ValidationError, model_validator

from dualign.certify import evidence as seen
from dualign.certify import screening, signature
from dualign.certify.evidence import Evidence, Folder, Record, Table
from dualign.core.artifacts import listed, read_json, sha256, write_json
from dualign.core.errors import DataError, DualignError, ParamsError
from dualign.core.records import SolvedDual, read_record
from dualign.math.bounds import (
    RANGED,
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
from dualign.math.constraints import Constraint, prices_in
from dualign.params.base import SHARES, Quantity, Share
from dualign.params.certify import CertifyRun

__all__ = [
    "Evidence",
    "corrected_upper_bound",
    "fixed_sequence",
    "issue",
    "read",
    "sample_size",
    "upper_bound",
    "verify",
]

T = TypeVar("T")

PROG = "python -m dualign.certify.certificate"
#: Where the stage `certify` puts certificates: a folder for each of its rows, with a file of this
#: name.
CERTIFICATES, FILE = Path("reports/certificate"), "certificate.json"
#: Least share of answers that weighted ones are worth for a test to pass: where weights are uneven,
#: the largest may not
#: have been drawn, and no bound of what was drawn holds (`bench.dense`).
LEAST_ESS = 0.8
#: Exit status of `verify` where every certificate holds, and one of them says that no policy is
#: certified.
NONE_CERTIFIED = 4


class Requirement(Record):
    """What a candidate must keep: the mean of a quantity of its answers is at most `limit`.

    `cost`, `p_unsafe`, `cvar`, `length` and `unended` are those of `dualign.math.constraints`,
    tested by `method` on the prompts in which `prompts` is found (None: all); a bound on `cvar`
    holds for every `threshold` that was chosen before. Known for some answers and tested by
    `corrected_upper_bound` (`prediction_powered`): `truth`, the true cost, and `harm`, the share of
    people who call an answer harmful. `why` is the reason for the method, in words."""

    name: str
    quantity: Quantity | Literal["truth", "harm"]
    limit: FiniteFloat
    method: Method | Literal["prediction_powered"]
    bounds: tuple[FiniteFloat, FiniteFloat] | None = None
    level: FiniteFloat | None = None
    threshold: FiniteFloat | None = None
    prompts: str | None = None
    why: str = ""

    @model_validator(mode="after")
    def _check(self) -> Requirement:
        if self.quantity == "cvar" and (
            self.threshold is None or self.level is None or not 0 <= self.level < 1
        ):
            raise ValueError(
                f"{self.name}: a cvar needs its threshold, and a level of at least 0 and below 1"
            )
        if self.bounds is None and self.method in RANGED:
            raise ValueError(
                f"{self.name}: method {self.method} needs bounds, the range of the quantity"
            )
        if (self.method == "prediction_powered") != (self.quantity in ("truth", "harm")):
            raise ValueError(f"{self.name}: {self.quantity} is not tested by {self.method}")
        try:
            re.compile(self.prompts or "")
        except (re.error, RecursionError) as error:
            raise ValueError(
                f"{self.name}: prompts {self.prompts!r} is no regular expression ({error})"
            ) from None
        return self

    def __str__(self) -> str:
        """The inequality, as a person reads it.

        >>> str(Requirement(name="c", quantity="length", limit=80, method="clustered_t", prompts="[?]"))
        "E[length] <= 80 on prompts with '[?]'"
        """
        said = {
            "p_unsafe": "P(c > 0)",
            "cvar": f"CVaR_{self.level}(c)",
            "length": "E[length]",
            "unended": "P(unended)",
        }.get(self.quantity, f"E[{self.name}]")
        if self.method == "clopper_pearson":
            said = "P(unsafe answer to a prompt)"
        return f"{said} <= {self.limit:g}" + (
            f" on prompts with {self.prompts!r}" if self.prompts else ""
        )

    @property
    def reweighs(self) -> bool:
        """Whether answers of another policy can be weighed for it: no range holds for a weighted
        value.
        """
        if self.method == "prediction_powered":
            return self.quantity == "truth"
        return self.method == "clustered_t" and self.bounds is None and self.quantity not in SHARES

    def weighted(self, values: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """d + w (v - d) with d the limit: by the policy that drew, its mean is that of v by the
        candidate.

        Twice as likely under the candidate, twice as far from the limit:

        >>> required = Requirement(name="c", quantity="cost", limit=1.0, method="clustered_t")
        >>> required.weighted(np.array([4.0, 0.5]), weight=np.array([2.0, 1.0]))
        array([7. , 0.5])
        """
        if not self.reweighs:
            raise DataError(
                f"{self.name}: {self.method} of {self.quantity} takes no answers that another"
                " policy drew"
            )
        found: np.ndarray = self.limit + weight * (values - self.limit)
        return found

    def values(self, answers: pd.DataFrame) -> pd.DataFrame:
        """Columns prompt_id and value of the answers that it is about, weighed if another policy
        drew them.

        Raises DataError if there are none.
        """
        if self.quantity == "truth" or self.quantity == "harm":
            raise ValueError(f"{self.quantity} is known of labelled answers only")
        additional = Constraint(
            self.name, self.quantity, self.limit, self.level, self.prompts, self.threshold
        )
        rows = answers[additional.applies(answers["prompt"].tolist())] if self.prompts else answers
        if rows.empty:
            raise DataError(
                f"{self.name}: {self.prompts!r} is found in no certify prompt; keep more, or"
                " change it"
            )
        values = additional.values(
            *(rows[name].to_numpy(float) for name in ("cost", "length", "ended"))
        )
        if "weight" in rows:
            values = self.weighted(values, rows["weight"].to_numpy(float))
        return pd.DataFrame({"prompt_id": rows["prompt_id"].to_numpy(object), "value": values})


class Check(Record):
    """One requirement tested on one candidate.

    `estimate` is what `bound` bounds: the mean, or the share of prompts with an unsafe answer.
    `raised` is the share of answers whose cost lay below the range and was raised to it."""

    requirement: str
    prompts: int
    answers: int
    estimate: FiniteFloat
    bound: FiniteFloat
    raised: FiniteFloat
    kept: bool


class Tested(Record):
    """One candidate's tests; it is certified if every requirement is kept.

    `ess` is the share of answers that weighted ones are worth, None where the candidate drew its
    answers itself; below `LEAST_ESS` nothing is kept."""

    name: str
    ess: Share | None = None
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
        """The last certified candidate, which is the most helpful one; None if the first test
        failed.
        """
        return self.certified[-1] if self.certified else None


# --- the sequence of tests ------------------------------------------------------------------------


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
    """Certify candidates (`Candidate` or such a tuple), safest first, until one fails: bound <=
    limit, each at delta.

    A candidate above the limit is certified only if the first such in the order passes its test, so
    the chance of any
    false certificate is delta at most: no multiplicity is paid (Maurer, Hothorn and Lehmacher 1995;
    2110.01052, "Learn
    then Test"). The order must be fixed before the costs are seen. A generator is read only as far
    as tests go.

    Raises:
        ParamsError, DataError: as `upper_bound`, naming the candidate.

    Costs of 200 answers, one a prompt. The bold policy is 0.1 above the limit in the mean:

    >>> policies = {"safe": [-1.0, -0.6], "middling": [-0.5, 0.1], "bold": [-0.2, 0.4]}
    >>> candidates = [(name, np.tile(costs, 100), range(200)) for name, costs in policies.items()]
    >>> found = fixed_sequence(candidates, limit=0.0)
    >>> found.certified, found.returned
    (('safe', 'middling'), 'middling')
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


def _until_failure(
    candidates: Iterable[tuple[str, T]], test: Callable[[T], tuple[Check, ...]]
) -> Decision:
    tested: list[Tested] = []
    for name, candidate in candidates:
        if name in {past.name for past in tested}:
            raise DataError(f"candidate {name!r} stands in the order twice")
        try:
            checks = test(candidate)
        except DataError as error:
            raise DataError(f"candidate {name!r}: {error}") from error
        tested.append(
            Tested(name=name, checks=checks, certified=all(check.kept for check in checks))
        )
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
        # No spread to go by; P(a prompt gets any such answer) is the larger, and its bound is
        # exact.
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


def _check_labels(
    required: Requirement, answers: pd.DataFrame, labels: pd.DataFrame, delta: float
) -> Check:
    """The mean truth of all answers by the labels of some of them.

    Where nobody calls any answer harmful there is no spread to go by, and P(a labelled answer is
    called harmful by anyone), which is the larger, is bounded instead."""
    if required.quantity == "harm" and not labels["truth"].any():
        estimate, bound = (
            0.0,
            float(binomial_bound(np.array(0), labels["prompt_id"].nunique(), delta)),
        )
    else:
        estimate, bound = corrected(
            answers["cost"],
            answers["prompt_id"],
            labels["cost"],
            labels["truth"],
            labels["prompt_id"],
            delta=delta,
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


# --- the certificate as a file --------------------------------------------------------------------


class Origin(NamedTuple):
    """What a certificate was made from, beside the answers: compared by `verify` where it is still
    there.

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


class Certificate(Record):
    """All that is needed to check a certificate again; "no certified policy" is one too (`returned`
    is None).

    `candidates` is the whole order, that of `plan`, `tested` the tests made, `tables` and `labels`
    what they were
    made on: `samples_per_prompt` answers to each of the first prompts of `prompts` (by candidate,
    where they differ). Those of some candidates may be answers that `drawn`, another of the order,
    gave. `screen` is what the order was chosen by (`dualign.certify.screening`). `limits` holds the
    additional constraints, each of which must be among the `requirements`. `same` are pairs of
    candidates with the same answers. Answers have at most `max_new_tokens` tokens; `ended` is the
    share of each tested candidate's that ended by themselves. `weights` are the hashes of the files
    of each tested candidate's model, `policy` is where the certified one lies, `cost_model` the one
    that gave the costs. What a caller of `issue` did not name is None or empty. `sampling_seeds`
    (of the answers) and `versions` (of the packages that computed it) tell where it comes from; no
    check depends on them."""

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
    samples_per_prompt: Annotated[int, Field(ge=1)] | dict[str, Annotated[int, Field(ge=1)]]
    drawn: str | None = None
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
            return (
                f"no certified policy; {last.name!r} is not shown to keep"
                f" {' and '.join(said)}{about}"
            )
        return f"{last.name!r} keeps {' and '.join(said)} at confidence {1 - self.delta:g}{about}"

    def answers(self, name: str) -> str:
        """What the answers of a tested candidate are, in words."""
        share = f"{100 * self.ended[name]:.4g} %"
        return (
            f"answers of at most {self.max_new_tokens} tokens, of which {share} ended by themselves"
        )


def order(plan: CertifyRun) -> dict[str, float]:
    """The candidates of a row by name with their weights q, safest first: the fallback, then the
    policy at each.
    """
    names = {} if plan.fallback == plan.policy else {plan.fallback: 1.0}
    return names | {plan.policy if q == 1.0 else f"{plan.policy} at {q:g}": q for q in plan.weights}


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
    origin: Origin | None = None,
    screen: Path | None = None,
) -> Certificate:
    """Certify by saved answers and write the certificate to `path`.

    Args:
        candidates: their names, safest first.
        evidence: the files of a candidate; called for those that are tested, one after the other,
            so it may draw the answers.
        requirements: what each must keep, all at confidence 1 - delta.
        max_new_tokens: where answers were cut.
        seed: fixes the order in which `betting` and `star_bets` take the prompts.
        origin: what else it was made from, for `verify` to compare.
        screen: the file that order and numbers of answers follow from
            (`dualign.certify.screening`), beside the certificate.

    Raises:
        DataError, ParamsError: as `fixed_sequence`, and where answers cannot be those of one set of
            prompts.
    """
    path, used = Path(path), dict[str, Evidence]()

    def find(name: str) -> Evidence:
        used[name] = evidence(name)
        return used[name]

    plan = None if screen is None else _planned(screen, candidates)
    decision = _decide(candidates, find, requirements, delta, seed)
    folder = path.parent
    weights = {} if origin is None else {name: seen.files(origin.model(name)) for name in used}
    counts, same = _agreed(used, None if origin is None else origin.prompts, plan)
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
        tables={name: seen.table(files.answers, folder) for name, files in used.items()},
        labels={
            name: seen.table(files.labels, folder)
            for name, files in used.items()
            if files.labels is not None
        },
        samples_per_prompt=_in_short(counts),
        drawn=None if plan is None or plan.drawn is None else candidates[plan.drawn],
        screen=None if screen is None else seen.table(screen, folder),
        same=same,
        plan=None if origin is None else origin.plan,
        prompts=None if origin is None else seen.table(origin.prompts, origin.place),
        limits=None if origin is None else seen.table(origin.limits, origin.place),
        weights=weights,
        policy=None if origin is None else seen.relative(origin.policy, origin.place),
        cost_model=None if origin is None else seen.model(origin.cost_model, origin.place),
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

    worth = dict[str, float]()

    def test(name: str) -> tuple[Check, ...]:
        files = evidence(name)
        answers = seen.read_answers(files.answers)
        checks = tuple(
            _test(required, answers, files.labels, delta, seed) for required in requirements
        )
        if "weight" in answers:
            worth[name] = seen.effective_share(answers["weight"].to_numpy())
        if worth.get(name, 1.0) < LEAST_ESS:
            return tuple(check.model_copy(update={"kept": False}) for check in checks)
        return checks

    found = _until_failure(((name, name) for name in candidates), test)
    return Decision(
        tuple(tested.model_copy(update={"ess": worth.get(tested.name)}) for tested in found.tested)
    )


def _test(
    required: Requirement, answers: pd.DataFrame, labels: Path | None, delta: float, seed: int
) -> Check:
    if required.quantity not in ("truth", "harm"):
        values = required.values(answers)
        return _check(
            required, values["value"].to_numpy(), values["prompt_id"].to_numpy(object), delta, seed
        )
    if labels is None:
        raise DataError(f"{required.name} needs labels of its answers, and none are recorded")
    told = seen.read_labels(labels)
    if "weight" not in answers:
        return _check_labels(required, answers, told, delta)
    weight = seen.weights_of(told, answers, labels)
    told = told.assign(
        **{key: required.weighted(told[key].to_numpy(float), weight) for key in ("cost", "truth")}
    )
    costs = required.weighted(answers["cost"].to_numpy(float), answers["weight"].to_numpy())
    return _check_labels(required, answers.assign(cost=costs), told, delta)


def _ended(file: Path, max_new_tokens: int) -> float:
    """The share of answers that ended by themselves. Raises DataError if one was not drawn with
    `max_new_tokens`.
    """
    answers = seen.read_answers(file)
    length, ended = answers["length"].to_numpy(int), answers["ended"].to_numpy(bool)
    wrong = length[np.where(ended, length > max_new_tokens, length != max_new_tokens)]
    if wrong.size:
        cut = f"was not cut at max_new_tokens {max_new_tokens}"
        raise DataError(
            f"{file}: an answer of {wrong[0]} tokens {cut}; draw the answers again (run certify)"
        )
    return (
        float(np.average(ended, weights=answers["weight"]))
        if "weight" in answers
        else float(ended.mean())
    )


def _agreed(
    used: Mapping[str, Evidence], prompts: Path | None, plan: screening.Planned | None
) -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Answers to each prompt by candidate, and pairs of candidates with the same answers.

    Raises DataError where the tables do not agree with themselves and each other.
    """
    tables = {name: seen.read_answers(files.answers) for name, files in used.items()}
    for name, files in used.items():
        seen.check_answers(tables[name], files.answers)
        if files.labels is not None:
            seen.check_labels(seen.read_labels(files.labels), tables[name], files.labels)
    counts = {
        name: seen.samples_per_prompt(tables[name], files.answers) for name, files in used.items()
    }
    first = next(iter(used))
    planned = [counts[first]] * len(used) if plan is None else plan.samples
    seen.check_together(tables, dict(zip(used, planned, strict=False)))
    seen.check_drawn(tables)
    if prompts is not None:
        seen.check_prompts(prompts, tables[first])
    return counts, seen.same(tables)


def _in_short(counts: Mapping[str, int]) -> int | dict[str, int]:
    """One number where all candidates have as many answers to a prompt, else that of each."""
    return next(iter(counts.values())) if len(set(counts.values())) == 1 else dict(counts)


def _planned(screen: Path, candidates: Sequence[str]) -> screening.Planned:
    """What follows from the screen in a file. Raises DataError where it is none, or of another
    number of candidates.
    """
    plan = screening.sequence(screening.read(screen))
    if len(plan.samples) != len(candidates):
        raise DataError(
            f"{screen}: {len(plan.samples)} candidates follow from it, and {len(candidates)} are"
            " tested"
        )
    return plan


# --- its check ------------------------------------------------------------------------------------


def read(path: str | Path) -> Certificate:
    """Read a certificate. Raises DualignError, naming the first key that is wrong."""
    try:
        return Certificate.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the content"
        if first["type"] == "missing":
            raise DataError(
                f"{path}: {key} is missing; another version wrote it, run certify again"
            ) from None
        raise DataError(f"{path}: not a certificate: {key}: {first['msg'].lower()}") from None


def verify(path: str | Path) -> Certificate:
    """Recompute a certificate from the saved answers; returns it. Raises DualignError that names
    the first mismatch.

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
    except (
        ValidationError
    ) as error:  # a bound that is not finite, say, from a delta next to nothing
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


def _unchanged(folder: Path, table: Table, what: str) -> None:
    file = folder / table.path
    if file.is_file() and sha256(file) != table.sha256:
        raise DataError(
            f"{what} ({file}) are not those certified: sha256 differs; run certify again, or bring"
            " back the file"
        )


def _recomputed(recorded: Certificate, folder: Path) -> None:
    """Raises DataError where the saved answers give something else."""
    decision = _decide(
        recorded.candidates,
        lambda name: _recorded(recorded, name, folder),
        recorded.requirements,
        recorded.delta,
        recorded.seed,
    )
    used = {test.name: _recorded(recorded, test.name, folder) for test in decision.tested}
    ended = {name: _ended(files.answers, recorded.max_new_tokens) for name, files in used.items()}
    for key, said, found in _compared(recorded, decision, ended):
        numbers = isinstance(said, float) and isinstance(found, float)
        same = math.isclose(said, found, rel_tol=1e-9, abs_tol=1e-12) if numbers else said == found
        if not same:
            raise DataError(f"{key} is {said!r}, but the answers give {found!r}")
    prompts = None if recorded.prompts is None else folder / recorded.prompts.path
    if recorded.prompts is not None:
        _unchanged(folder, recorded.prompts, "its prompts")
    plan = _replanned(recorded, folder)
    counts, same = _agreed(
        used, prompts if prompts is not None and prompts.is_file() else None, plan
    )
    count = _in_short(counts)
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


def _replanned(recorded: Certificate, folder: Path) -> screening.Planned | None:
    """What follows from its screen. Raises DataError where the screen or what is said to follow is
    another.
    """
    if recorded.screen is None:
        return None
    file = folder / recorded.screen.path
    _unchanged(folder, recorded.screen, "its screen")
    plan = _planned(file, recorded.candidates)
    drawn = None if plan.drawn is None else recorded.candidates[plan.drawn]
    if drawn != recorded.drawn:
        raise DataError(f"answers were drawn by {recorded.drawn!r}, but the screen gives {drawn!r}")
    if recorded.plan is not None and recorded.plan.weights != list(plan.weights):
        raise DataError(
            f"weights are {recorded.plan.weights}, but the screen gives {list(plan.weights)}"
        )
    return plan


def _as_planned(recorded: Certificate, folder: Path) -> None:
    """Raises DataError where the candidates are not those of the plan, or the policy is not the one
    that was tested.
    """
    if recorded.plan is not None and list(order(recorded.plan)) != list(recorded.candidates):
        raise DataError(
            f"candidates are {list(recorded.candidates)}, but the plan has"
            f" {list(order(recorded.plan))}"
        )
    if recorded.limits is not None and (folder / recorded.limits.path).is_file():
        _unchanged(folder, recorded.limits, "its limits")
        _all_required(folder / recorded.limits.path, recorded.requirements)
    tested = sorted(test.name for test in recorded.tested)
    if recorded.weights and sorted(recorded.weights) != tested:
        raise DataError(
            f"weights are those of {sorted(recorded.weights)}, but {tested} were tested"
        )
    place = None if recorded.policy is None else folder / recorded.policy
    if place is None or not place.is_dir():
        return
    if recorded.returned is None:
        seen.check_files(place, {}, "no policy is certified, and what lies there")
    else:
        seen.check_files(
            place, recorded.weights.get(recorded.returned, {}), f"the policy {recorded.returned!r}"
        )


def _all_required(file: Path, requirements: Sequence[Requirement]) -> None:
    """Raises DataError where an additional constraint of the solved dual in `file` is not required
    as it stands there."""
    limits = [asdict(price.constraint) for price in prices_in(read_record(file, SolvedDual))]
    for limit in limits:
        if not any(
            all(getattr(required, key) == value for key, value in limit.items())
            for required in requirements
        ):
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
    for said, found in zip(recorded.tested, decision.tested, strict=True):
        yield f"checks of {said.name!r}", len(said.checks), len(found.checks)
        for ours, theirs in zip(said.checks, found.checks, strict=True):
            for field in Check.model_fields:
                yield (
                    f"{ours.requirement} {field} of {said.name!r}",
                    getattr(ours, field),
                    getattr(theirs, field),
                )
        yield f"certified of {said.name!r}", said.certified, found.certified
        yield f"ess of {said.name!r}", said.ess, found.ess
    names = sorted(test.name for test in decision.tested)
    yield "tables", sorted(recorded.tables), names
    yield "labels", sorted(recorded.labels), names if recorded.labels else []
    yield "ended", sorted(recorded.ended), sorted(ended)
    for name, share in ended.items():
        yield f"ended of {name!r}", recorded.ended[name], share
    yield "certified", recorded.certified, decision.certified
    yield "returned", recorded.returned, decision.returned


# --- the command ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """The command, called `prog`: one line for each certificate, and one of what that does not
    show.

    Returns 1 if a certificate does not hold, 4 if one certifies no policy.
    """
    command = parser(prog)
    asked = command.parse_args(argv)
    if asked.command == "sign":
        return _sign(asked.folder, asked.key, asked.out)
    if (asked.key is None) != (asked.signature is None):
        command.error(
            "--key and --signature go together: a signature is checked by the key that made it"
        )
    paths = asked.paths or [CERTIFICATES]
    found = {
        path: [path] if path.is_file() else [*listed(path, FILE), *listed(path, f"*/{FILE}")]
        for path in paths
    }
    if asked.key is not None and sum(map(len, found.values())) != 1:
        command.error("a signature is that of one certificate; name one certificate, or its folder")
    statuses = []
    for path, files in found.items():
        if not files:
            sys.stdout.write(
                f"{path}: holds no certificate; run the stage certify first (`dvc repro`)\n"
            )
        statuses += [_tell(file, asked) for file in files] or [1]
    if set(statuses) != {1}:
        sys.stdout.write(_left_open(asked))
    return 1 if 1 in statuses else max(statuses)


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The parser of this command."""
    made = argparse.ArgumentParser(
        prog=prog,
        description=(__doc__ or "").splitlines()[0],
        epilog="exit status: 0 all hold, 1 one does not, 4 all hold and one says that no policy is certified",
    )
    commands = made.add_subparsers(required=True, dest="command")
    check = commands.add_parser("verify", help="recompute certificates from saved answers")
    check.add_argument(
        "paths",
        nargs="*",
        type=Path,
        help=f"certificates, or folders of some (default: {CERTIFICATES})",
    )
    check.add_argument(
        "--rescore",
        action="store_true",
        help="run the cost model on the answers again (loads torch)",
    )
    check.add_argument(
        "--tolerance", type=float, default=1e-3, help="of costs scored again (default: %(default)s)"
    )
    check.add_argument(
        "--cost-model", type=Path, help="its folder, if it no longer lies where it lay"
    )
    check.add_argument(
        "--key", type=Path, help="file of the key that signed the certificate's folder"
    )
    check.add_argument("--signature", type=Path, help="the signature, as `sign` wrote it")
    sign = commands.add_parser("sign", help="sign the files of a certificate's folder with a key")
    sign.add_argument("folder", type=Path, help="folder of a certificate that holds")
    sign.add_argument(
        "--key", type=Path, required=True, help="file of secret bytes; both sides need it"
    )
    sign.add_argument(
        "--out",
        type=Path,
        required=True,
        help="where to write the signature, outside of the folder",
    )
    return made


def _tell(path: Path, asked: argparse.Namespace) -> int:
    try:
        if asked.key is not None:
            signature.check(path.parent, asked.key, asked.signature)
        found = verify(path)
        said = [found.statement]
        missing = absent(path, found)
        if asked.rescore:
            from dualign.certify.rescoring import rescore

            largest = rescore(found, path, asked.tolerance, asked.cost_model)
            said.append(
                f"costs scored again differ by {largest:.2g} at most, {asked.tolerance:g} is"
                " allowed"
            )
        said += [alike(pair) for pair in found.same]
        if missing:
            said.append(f"not compared, since not there: {', '.join(missing)}")
    except DualignError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{path} holds: {'; '.join(said)}\n")
    return 0 if found.returned is not None else NONE_CERTIFIED


def alike(pair: tuple[str, str]) -> str:
    """What a reader should know of two candidates with the same answers."""
    return (
        f"{pair[0]!r} and {pair[1]!r} have the same answers: they hardly differ, or one was copied"
        " from the other"
    )


def _left_open(asked: argparse.Namespace) -> str:
    """What a check like this does not show, in one line."""
    left = [] if asked.rescore else ["that the cost model gave these costs (--rescore)"]
    left += [] if asked.key else ["that no file was made anew (sign, then --key)"]
    left.append("that prompts were unseen, and limits set before")
    return f"This shows that the files agree with each other; it does not show {', '.join(left)}.\n"


def _sign(folder: Path, key: Path, out: Path) -> int:
    try:
        found = verify(folder / FILE)
        signature.sign(folder, key, out)
    except DualignError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{out} signs {folder}: {found.statement}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

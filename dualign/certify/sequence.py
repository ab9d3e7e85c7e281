"""The tests of a certificate: candidates in a fixed order, safest first, until one fails.

Each candidate is tested at the full delta (`fixed_sequence`). Where several things are required a
candidate must pass the test of each: that it keeps all is said only if no test fails, so each of
these may have the full delta too (the intersection-union test; Berger 1982)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from pydantic import FiniteFloat

from dualign.certify import evidence
from dualign.certify.evidence import Evidence
from dualign.certify.requirement import Requirement
from dualign.core.errors import DataError, ParamsError
from dualign.core.records import WholeRecord
from dualign.math.bounds import (
    Bounds,
    Method,
    binomial_bound,
    check_delta,
    check_test,
    clustered,
    corrected,
    prompt_means,
    upper_bound,
)
from dualign.params.base import SHARES, Share

T = TypeVar("T")

#: Least share of answers that weighted ones are worth for a test to pass: where weights are uneven,
#: the largest may not have been drawn, and no bound of what was drawn holds (`bench.dense`).
LEAST_ESS = 0.8


class Check(WholeRecord):
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


class CandidateTest(WholeRecord):
    """One candidate's tests; it is certified if every requirement is kept.

    `ess` is the share of answers that weighted ones are worth, None where the candidate drew its
    answers itself; below `LEAST_ESS` nothing is kept."""

    name: str
    ess: Share | None = None
    checks: tuple[Check, ...]
    certified: bool


#: The checks of a candidate, and its `ess`.
Tested = tuple[tuple[Check, ...], float | None]


@dataclass(frozen=True)
class Decision:
    """The candidates that were tested, in order."""

    tested: tuple[CandidateTest, ...]

    @property
    def certified(self) -> tuple[str, ...]:
        """Names of the candidates that keep all; with probability 1 - delta all of them do."""
        return tuple(test.name for test in self.tested if test.certified)

    @property
    def returned(self) -> str | None:
        """The last certified candidate, the most helpful one; None if the first test failed."""
        return self.certified[-1] if self.certified else None


def fixed_sequence(
    candidates: Iterable[tuple[str, Any, Any]],
    *,
    limit: float,
    delta: float = 0.05,
    method: Method = "clustered_t",
    bounds: Bounds | None = None,
    seed: int = 0,
) -> Decision:
    """Certify candidates (name, costs, prompts), both [answers], safest first, until one fails:
    bound <= limit, each at delta.

    A candidate above the limit is certified only if the first such in the order passes its test, so
    the chance of any false certificate is delta at most: no multiplicity is paid (Maurer, Hothorn
    and Lehmacher 1995; 2110.01052, "Learn then Test"). The order must be fixed before the costs are
    seen. A generator is read only as far as tests go.

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

    def test(candidate: tuple[str, Any, Any]) -> Tested:
        if len(candidate) != 3:
            raise DataError("a candidate is (name, costs, prompts), three things in a row")
        return (_check(required, candidate[1], candidate[2], delta, seed),), None

    return _until_failure(((candidate[0], candidate) for candidate in candidates), test)


def decide(
    candidates: Sequence[str],
    evidence_of: Callable[[str], Evidence],
    requirements: Sequence[Requirement],
    delta: float,
    seed: int,
) -> Decision:
    """Test the saved answers of candidates, safest first, until one fails a requirement.

    Raises DataError, ParamsError as `fixed_sequence`."""
    check_delta(delta)

    def test(name: str) -> Tested:
        files = evidence_of(name)
        answers = evidence.read_answers(files.answers)
        checks = tuple(
            _test(required, answers, files.labels, delta, seed) for required in requirements
        )
        if "weight" not in answers:
            return checks, None
        ess = evidence.effective_share(answers["weight"].to_numpy())
        if ess < LEAST_ESS:
            checks = tuple(check.model_copy(update={"kept": False}) for check in checks)
        return checks, ess

    return _until_failure(((name, name) for name in candidates), test)


def _until_failure(candidates: Iterable[tuple[str, T]], test: Callable[[T], Tested]) -> Decision:
    tested: list[CandidateTest] = []
    for name, candidate in candidates:
        if name in {past.name for past in tested}:
            raise DataError(f"candidate {name!r} stands in the order twice")
        try:
            checks, ess = test(candidate)
        except DataError as error:
            raise DataError(f"candidate {name!r}: {error}") from error
        certified = all(check.kept for check in checks)
        tested.append(CandidateTest(name=name, ess=ess, checks=checks, certified=certified))
        if not certified:
            break
    if not tested:
        raise DataError("no candidates to certify")
    return Decision(tuple(tested))


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
    labelled = evidence.read_labels(labels)
    evidence.check_labels(labelled, answers, labels)
    if "weight" not in answers:
        return _check_labels(required, answers, labelled, delta)
    weight = evidence.weights_of(labelled, answers)
    weighted = {
        key: required.weighted(labelled[key].to_numpy(float), weight) for key in ("cost", "truth")
    }
    costs = required.weighted(answers["cost"].to_numpy(float), answers["weight"].to_numpy())
    return _check_labels(required, answers.assign(cost=costs), labelled.assign(**weighted), delta)


def _check(required: Requirement, costs: Any, prompts: Any, delta: float, seed: int) -> Check:
    method = required.method
    bounds = required.bounds
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

    Where nobody calls any answer harmful, or all call every one so, there is no spread to go by,
    and P(a labelled answer is called harmful by anyone), which is the larger, is bounded instead.
    """
    prompts = int(labels["prompt_id"].nunique())
    truth = labels["truth"]
    if required.quantity == "harm" and (not truth.any() or (truth == 1).all()):
        estimate = float(truth.max())
        bound = float(binomial_bound(np.array(estimate * prompts), prompts, delta))
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
        prompts=prompts,
        answers=len(labels),
        estimate=estimate,
        bound=bound,
        raised=0.0,
        kept=bound <= required.limit,
    )

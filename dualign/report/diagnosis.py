"""What trainings reached, predictions against outcomes, what tests were on, which answers were cut.

Pure functions of what other stages wrote: a tilt as `dualign.evaluation.effective_tilt` reads it
off a policy, the rows of data/dual/frontier.json and of betas.json beside it, and the prices in
data/dual/dual.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualign.core.records import (
    Betas,
    CandidateTest,
    CheckRow,
    ComparedPolicy,
    ConstraintRow,
    FrontierRow,
    Interval,
    PriceRow,
    RequirementRow,
    SearchStep,
    SolvedDual,
    TiltRow,
    as_row,
)
from dualign.params.base import SHARES
from dualign.report.formatting import number, percent, stated

Row = dict[str, Any]

#: R^2 below which a policy is called no tilt: less than half of it is one.
TILTED = 0.5
#: Share of a policy's answers that may be cut without a warning.
CUT = 0.2


@dataclass(frozen=True)
class Predicted:
    """The cost and reward that the pool predicts of a policy."""

    cost: Interval
    reward: Interval


def predicted(frontier: Sequence[FrontierRow], lam: float | None) -> Predicted | None:
    """What the pool predicts at a multiplier.

    Linear in lambda between the two nearest rows of the frontier, estimates and bands alike; an end
    is None where the rows have no bands. None for a multiplier that is unknown or outside the rows.
    """
    rows = sorted(frontier, key=lambda row: row.lam)
    lams = [row.lam for row in rows]
    if lam is None or not rows or not lams[0] <= lam <= lams[-1]:
        return None

    def at(key: str) -> float | None:
        values = [getattr(row, key) for row in rows]
        return None if None in values else float(np.interp(lam, lams, values))

    def interval(key: str) -> Interval:
        ends = {"mean": at(key), "low": at(f"{key}_low"), "high": at(f"{key}_high")}
        return Interval.model_validate(ends)

    return Predicted(interval("cost"), interval("reward"))


def other_betas(table: Betas) -> list[Row]:
    """The rows of betas.json, each quantity as {"mean", "low", "high"}; unknown ends are None.

    `in_use` marks the run's own beta, `guess` a row with fewer effective samples than `min_ess`.
    Where the limit is out of reach, `lam` is None."""
    return [_beta_row(as_row(row), table) for row in table.rows]


def _beta_row(row: Row, table: Betas) -> Row:
    return {
        "beta": row["beta"],
        "in_use": row["beta"] == table.beta,
        "guess": row.get("ess", np.inf) < table.min_ess,
        "infeasible": row.get("infeasible", ""),
        "lam": None if row["lam"] is None else _interval(row, "lam"),
        **{key: _interval(row, key) for key in ("reward", "kl", "p_unsafe", "ess")},
    }


def _interval(row: Mapping[str, Any], key: str) -> dict[str, float | None]:
    return {"mean": row.get(key), "low": row.get(f"{key}_low"), "high": row.get(f"{key}_high")}


def is_tilt(tilt: TiltRow) -> bool:
    """Whether r, c and length explain half of the log-ratios, and it tilts towards reward."""
    return tilt.lam_eff is not None and (tilt.r2 or 0.0) >= TILTED


def tilt_in_words(lam: float | None, tilt: TiltRow | None) -> str:
    """The nominal multiplier of a policy beside the effective one, in a sentence or two; empty
    where its tilt was not read."""
    if tilt is None:
        return ""
    policy = "It" if lam is None else f"At a nominal λ of {number(lam)} it"
    if tilt.r2 is None:
        return f"{policy} stayed the reference policy."
    share = percent(tilt.r2)
    if tilt.r2 < TILTED:
        return f"{policy} became no tilt: reward, cost and length explain only {share} of it."
    if tilt.lam_eff is None:
        return (
            f"{policy} does not tilt towards reward. Reward, cost and length explain {share} of it."
        )
    error = "" if tilt.lam_eff_se is None else f" ± {number(tilt.lam_eff_se)}"
    effective = f"an effective λ of {number(tilt.lam_eff)}{error} at β {number(tilt.beta_eff)}"
    return (
        f"{policy} has {effective}, and {number(tilt.length_slope)} nats a token of length."
        f" {share} of it is such a tilt."
    )


@dataclass(frozen=True)
class AdditionalLimit:
    """A limit of `constraint.additional`: `what` it is on, its price `lam`, the `predicted` mean.

    `share`: it is on a share of the answers, shown in per cent. A limit that only policies know has
    no more than its name."""

    name: str
    limit: float
    what: str = ""
    share: bool = False
    lam: float | None = None
    predicted: float | None = None


def additional_constraints(
    prices: Iterable[PriceRow], policies: Iterable[ComparedPolicy]
) -> list[AdditionalLimit]:
    """The limits beside the one on cost in their order; those that only policies know come last."""
    limits = {
        p.name: AdditionalLimit(p.name, p.limit, _what(p), p.quantity in SHARES, p.lam, p.predicted)
        for p in prices
    }
    for policy in policies:
        for name, kept in policy.additional.items():
            limits.setdefault(name, AdditionalLimit(name, kept.limit))
    return [*limits.values()]


def cut_in_words(policies: Mapping[str, ComparedPolicy]) -> str:
    """One warning about policies of which more than `CUT` did not end; empty without such."""
    shares = {name: 1 - row.ended.mean for name, row in policies.items() if row.ended is not None}
    shown = [f"{percent(share)} of {name}" for name, share in shares.items() if share > CUT]
    if not shown:
        return ""
    limits = sorted({row.max_new_tokens for row in policies.values()})
    return (
        f"Answers were cut at {' or '.join(f'{limit:,}' for limit in limits)} tokens, and their"
        f" scores are those of unfinished text: {', '.join(shown)};"
        " raise generation.max_new_tokens."
    )


@dataclass(frozen=True)
class StepwiseLimit:
    """An additional constraint over the steps of a search, at the `last` of which it has an error;
    `prices` are there if they moved."""

    last: ConstraintRow
    means: list[float | None]
    prices: list[float]


def additional_by_step(steps: Sequence[SearchStep]) -> list[StepwiseLimit]:
    """Each additional constraint that is known, in their order."""
    rows = [step.additional or [] for step in steps]
    if not rows or not all(rows):
        return []
    priced = all(step.prices for step in steps)
    limits = []
    for k, last in enumerate(rows[-1]):
        if last.mean is not None:
            means = [row[k].mean for row in rows]
            limits.append(StepwiseLimit(last, means, [s.prices[k] for s in steps if priced]))
    return limits


@dataclass(frozen=True)
class Promise:
    """A requirement of a certificate with `what` it is on in words; a `share` is in per cent."""

    required: RequirementRow
    what: str
    share: bool


def required_in_words(required: RequirementRow) -> Promise:
    """What a requirement is on."""
    quantity = required.quantity
    method = required.method
    what = {
        "cost": "expected cost",
        "p_unsafe": "share of unsafe answers",
        "unended": "share of answers that do not end",
        "length": "mean length in tokens",
        "cvar": f"mean cost of the {_worst(required.level)} of answers",
        "truth": "true cost",
        "harm": "share of answers that people call unsafe",
    }.get(quantity, quantity)
    if method == "clopper_pearson":
        what = "share of prompts with an unsafe answer"
    on = f" on prompts with {required.prompts}" if required.prompts else ""
    share = quantity in (*SHARES, "harm") or method == "clopper_pearson"
    return Promise(required, what + on, share)


@dataclass(frozen=True)
class PromptsGain:
    """What `one` more prompt, and `twice` as many, take off the bound on a requirement.

    `worth` is what twice as many are worth in E[r] - beta KL, None where that has no price;
    `labelled`: prompts whose answers have labels."""

    promise: Promise
    labelled: bool
    one: float
    twice: float
    worth: float | None


def prompts_gain(
    test: CandidateTest, requirements: Sequence[RequirementRow], solved: SolvedDual | None
) -> PromptsGain | None:
    """What more prompts would take off the bound nearest to its limit.

    Nearest in units of its own reach, bound less estimate, which falls as 1 / sqrt(N) with the
    prompts (of the truth: with the labelled ones). `worth` is to first order: the multiplier of
    that limit, by the share of prompts that it is on, times what its bound falls by."""
    pairs = [
        (check, required)
        for check, required in zip(test.checks, requirements, strict=True)
        if check.bound > check.estimate
    ]
    if not pairs:
        return None
    check, required = min(pairs, key=lambda pair: (pair[1].limit - pair[0].bound) / _reach(pair[0]))
    twice = _reach(check) * (1 - 0.5**0.5)
    price = None if solved is None else _multiplier(required, solved)
    share = 1.0 if not required.prompts else check.prompts / test.checks[0].prompts
    return PromptsGain(
        promise=required_in_words(required),
        labelled=required.quantity in ("truth", "harm"),
        one=share * _reach(check) / (2 * check.prompts),
        twice=twice,
        worth=None if price is None else price * share * twice,
    )


def _reach(check: CheckRow) -> float:
    return check.bound - check.estimate


def _multiplier(required: RequirementRow, solved: SolvedDual) -> float | None:
    """The pool's multiplier of a requirement; the truth's is the cost's, people's have none."""
    if required.quantity == "truth" or required.name == "c":
        return solved.lam
    return next((price.lam for price in solved.prices if price.name == required.name), None)


def _worst(level: float | None) -> str:
    """The answers that a CVaR is about."""
    return f"worst {stated(1 - (level or 0.0), share=True)}"


def _what(price: PriceRow) -> str:
    """The quantity that a limit is on, and the prompts that it holds for."""
    quantity = {
        "cost": "cost",
        "p_unsafe": "P(unsafe)",
        "unended": "answers cut",
        "length": "tokens",
        "cvar": f"mean cost of the {_worst(price.level)}",
    }.get(price.quantity, price.quantity)
    return quantity if not price.prompts else f"{quantity}, prompts with {price.prompts}"

"""Every evaluated policy in one table: what it scores, how it fares against the reference policy,
which one to take.

All paths are relative to the repository root. Cost follows the house convention: bigger is more
harmful."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from dualign.core.records import (
    Certified,
    ComparedConstraint,
    ComparedPolicy,
    Comparison,
    Evaluated,
    Interval,
    IntervalRow,
    LimitedInterval,
    NotEvaluated,
    Provenance,
    Standing,
    read_evaluated,
    read_optional_record,
    read_provenance,
)
from dualign.core.schema import ANSWERS, read_table
from dualign.evaluation.measures import MEASURES
from dualign.evaluation.stats import Estimate, clustered_mean, clustered_share
from dualign.params.report import ReportParams
from dualign.report.changes import label, params_of
from dualign.report.multipliers import nominal_multiplier, search_of

#: The policy that win rates and gains are measured against.
REFERENCE = "sft"
#: Stages that make and measure no policy: their params say nothing of what a seed does.
_BESIDE = ("answer", "judge", "report")

#: What a row says of a policy's search.
_OF_SEARCH = (
    "method", "title", "rule", "returns", "cost_source",
    "trainings", "generated_tokens", "labels", "stopped",
)  # fmt: skip
#: Measures of the answers of one policy alone.
_MEASURED = tuple(m.key for m in MEASURES if m.key in Evaluated.model_fields)
_WORST_FIRST: tuple[Standing, ...] = ("over", "unproven", "within")


def compare(root: Path, params: ReportParams) -> Comparison:
    """Compare the evaluated policies; `root` holds reports/ and data/.

    `params.confidence` is the level of the intervals computed here; those of `evaluate` are taken
    as they are. Raises DualignError where a file is there but cannot be read."""
    limit = params.limit
    answers = read_answers(root, params.policies)
    certificates = read_certificates(root, params.certificates)
    evaluated = {name: read_evaluated(root / "reports/metrics", name) for name in params.policies}
    rows: dict[str, ComparedPolicy] = {}
    for name, found in evaluated.items():
        if isinstance(found, Evaluated):
            gains = _against_reference(answers, name, params.confidence)
            rows[name] = _compared(root, params.policies[name], found, gains, limit, certificates)
    return Comparison(
        reference=REFERENCE,
        confidence=params.confidence,
        limit=limit,
        recommended=_recommended(rows, bool(certificates)),
        nearest=_nearest(rows, limit),
        missing=[name for name, found in evaluated.items() if found is None],
        uncertified=[name for name, found in evaluated.items() if isinstance(found, NotEvaluated)],
        certificates=certificates,
        params=params_digests(root),
        policies=rows,
    )


def params_digests(root: Path) -> dict[str, str]:
    """By stage (`prepare`, `dual_search/sacpo`) a digest of the params that it ran with, without
    the seed; of a stage with instances those that are this one's.

    Read from what each stage wrote when it ran, so params that were edited since do not count."""
    made = [stage for stage in read_provenance(root) if stage.stage not in _BESIDE]
    return {label(stage): _digest(stage) for stage in made}


def _digest(stage: Provenance) -> str:
    params = params_of(stage)
    params.pop("seed", None)
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:12]


def read_answers(root: Path, policies: dict[str, str]) -> dict[str, pd.DataFrame]:
    """The generated answers (`schema.ANSWERS`) of every policy that has any, with the `category` of
    their prompts where that was written.
    """
    paths = {name: root / "reports/evaluation" / name / "answers.parquet" for name in policies}
    tables = {name: _answers(path) for name, path in paths.items() if path.is_file()}
    return {
        name: table for name, table in tables.items() if len(table)
    }  # none of a policy that was not certified


def _answers(path: Path) -> pd.DataFrame:
    answers = read_table(path, ANSWERS)
    if "category" not in answers and "category" in pq.read_schema(path).names:
        column = pq.read_table(path, columns=["category"])["category"]
        return answers.assign(category=column.to_pandas().to_numpy())
    return answers


def read_certificates(root: Path, names: Iterable[str]) -> dict[str, Certified]:
    """The metrics of these rows of `certify` that have any, by name. What is left of rows that
    params no longer name is passed by: it is about another run."""
    folder = root / "reports/metrics/certify"
    found = {
        name: read_optional_record(folder / f"{name}.json", Certified) for name in sorted(names)
    }
    return {name: known for name, known in found.items() if known is not None}


def certified_by(folder: str, certificates: Mapping[str, Certified]) -> str | None:
    """The certificate that returned the policy in a folder of models/: as models/certified/NAME,
    or as the candidate that it is without a merge. None where none did."""
    for name, found in certificates.items():
        passed = found.passed
        whole = passed.policy if passed and passed.q == 1.0 else None
        if passed and folder in (f"certified/{name}", whole):
            return name
    return None


def win_rate(
    ours: pd.DataFrame, theirs: pd.DataFrame, score: str, confidence: float, sign: int = 1
) -> Interval | None:
    """How often our answer has the higher `sign * score` than theirs to the same prompt; a tie
    counts one half.

    Every answer of ours meets every answer of theirs; a prompt's share of wins is one observation,
    and the interval that of a `share`. None without a common prompt."""
    gap = _gaps(ours, theirs, score) * sign
    if gap.empty:
        return None
    return share(((gap > 0) + 0.5 * (gap == 0)).to_numpy(), gap.index.to_numpy(), confidence)


def share(values: np.ndarray, prompts: np.ndarray, confidence: float) -> Interval:
    """The mean of values in [0, 1] over prompts; both have shape [answers].

    The interval is that of `clustered_share`; no ends with one prompt.

    >>> share(np.zeros(20), np.arange(20), 0.95).high > 0.15
    True
    """
    found = clustered_share(values, prompts, confidence)
    if not math.isfinite(found.error):
        return Interval(mean=found.mean, low=None, high=None)
    return known_ends(found)


def known_ends(estimate: Estimate) -> Interval:
    """The interval of an estimate; no ends where they are infinite."""
    low, high = (end if math.isfinite(end) else None for end in (estimate.low, estimate.high))
    return Interval(mean=estimate.mean, low=low, high=high)


def mean_gain(ours: pd.DataFrame, theirs: pd.DataFrame, confidence: float) -> Interval | None:
    """Mean of our reward minus theirs, paired and clustered by prompt. None without a common
    prompt.
    """
    gap = _gaps(ours, theirs, "reward")
    if gap.empty:
        return None
    return known_ends(clustered_mean(gap.to_numpy(), gap.index.to_numpy(), confidence))


def _gaps(ours: pd.DataFrame, theirs: pd.DataFrame, score: str) -> pd.Series:
    """Our score minus theirs for every pair of answers to one prompt, indexed by prompt_id."""
    left, right = (frame.set_index("prompt_id")[score].dropna() for frame in (ours, theirs))
    pairs = left.to_frame("ours").join(right.to_frame("theirs"), how="inner")
    return pairs["ours"] - pairs["theirs"]


def _against_reference(
    answers: Mapping[str, pd.DataFrame], name: str, confidence: float
) -> dict[str, Interval | None]:
    ours = answers.get(name)
    theirs = answers.get(REFERENCE)
    if ours is None or theirs is None or name == REFERENCE:
        return {"win_reward": None, "win_cost": None, "reward_gain": None}
    return {
        "win_reward": win_rate(ours, theirs, "reward", confidence),
        "win_cost": win_rate(ours, theirs, "cost", confidence, sign=-1),
        "reward_gain": mean_gain(ours, theirs, confidence),
    }


def _compared(
    root: Path,
    folder: str,
    evaluated: Evaluated,
    gains: Mapping[str, Interval | None],
    limit: float,
    certificates: dict[str, Certified],
) -> ComparedPolicy:
    additional = {name: _kept(found) for name, found in evaluated.additional.items()}
    search = search_of(root, folder)
    told: dict[str, Any] = {
        **{key: _measured(getattr(evaluated, key)) for key in _MEASURED},
        **{key: getattr(search, key, None) for key in _OF_SEARCH},
        **asdict(nominal_multiplier(root, folder, certificates)),
        **gains,
    }
    return ComparedPolicy(
        folder=folder,
        kind=_kind(folder),
        certified=certified_by(folder, certificates) is not None,
        standing=_worst(evaluated.cost, limit, additional),
        prompts=evaluated.prompts,
        answers=evaluated.answers,
        max_new_tokens=evaluated.max_new_tokens,
        tilt=evaluated.tilt,
        additional=additional,
        **told,
    )


def _kept(found: LimitedInterval) -> ComparedConstraint:
    return ComparedConstraint(**dict(found), standing=_standing(found, found.limit))


def _worst(
    cost: IntervalRow, limit: float, additional: Mapping[str, ComparedConstraint]
) -> Standing | None:
    # A limit of which no answer tells is not shown to be kept.
    others = [kept.standing or "unproven" for kept in additional.values()]
    standings = [_standing(cost, limit), *others]
    return next((standing for standing in _WORST_FIRST if standing in standings), None)


def _kind(folder: str) -> Literal["method", "reference", "baseline"]:
    if folder == "sft":
        return "reference"
    return "method" if folder.startswith(("aligned/", "certified/")) else "baseline"


def _measured(value: IntervalRow | float | None) -> Interval | float | None:
    """An interval or a number as `evaluate` writes it; None where there is no mean."""
    if not isinstance(value, IntervalRow):
        return value
    return None if value.mean is None else Interval(mean=value.mean, low=value.low, high=value.high)


def _standing(found: IntervalRow, limit: float) -> Standing | None:
    if found.mean is None:
        return None
    if found.high is not None and found.high <= limit:
        return "within"
    return "unproven" if found.mean <= limit else "over"


def _recommended(rows: Mapping[str, ComparedPolicy], tested: bool) -> str | None:
    """`tested`: there are certificates, and then nothing else is recommended."""
    within = {
        name: row.reward.mean for name, row in rows.items()
        if row.reward and (row.certified if tested else row.standing == "within")
    }  # fmt: skip

    def order(name: str) -> tuple[float, bool]:
        """Of equals the certificate's own folder: it holds the policy as it was tested."""
        return within[name], rows[name].folder.startswith("certified/")

    return max(within, key=order, default=None)


def _nearest(rows: Mapping[str, ComparedPolicy], limit: float) -> str | None:
    known = {
        name: _excess(row.cost, limit, row.additional) for name, row in rows.items() if row.cost
    }
    return min(known, key=lambda name: known[name], default=None)


def _excess(cost: Interval, limit: float, additional: Mapping[str, ComparedConstraint]) -> float:
    """The upper end of cost; with additional constraints the largest excess of an upper end over
    its limit, in half widths."""
    if not additional:
        return cost.mean if cost.high is None else cost.high
    known = [
        _half_widths(kept.mean, kept.high, kept.limit)
        for kept in additional.values()
        if kept.mean is not None
    ]
    return max([_half_widths(cost.mean, cost.high, limit), *known])


def _half_widths(mean: float, high: float | None, limit: float) -> float:
    upper = mean if high is None else high
    return (upper - limit) / max(upper - mean, 1e-12)

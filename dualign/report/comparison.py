"""Every evaluated policy in one table: what it scores, how it fares against the reference policy,
which one to take.

All paths are relative to the repository root. Cost follows the house convention: bigger is more
harmful."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from dualign.core.artifacts import listed
from dualign.core.records import (
    Certified,
    Evaluated,
    IntervalRow,
    NotEvaluated,
    Provenance,
    SearchResult,
    SolvedDual,
    as_row,
    read_evaluated,
    read_optional_record,
    read_record,
)
from dualign.core.schema import ANSWERS, read_table
from dualign.evaluation.measures import MEASURES
from dualign.evaluation.shares import clustered_share
from dualign.evaluation.stats import clustered_mean
from dualign.report.multipliers import nominal_multiplier

#: The policy that win rates and gains are measured against.
REFERENCE = "sft"
#: Stages that make and measure no policy: their params say nothing of what a seed does.
_BESIDE = ("answer", "judge", "report")
#: Params that have a row for each instance of a stage.
_FANS = ("methods", "runs", "policies")

Interval = dict[str, float | None]


def compare(
    root: Path, policies: dict[str, str], confidence: float, limit: float | None = None
) -> dict[str, Any]:
    """Compare the evaluated policies.

    Args:
        root: the repository root, which holds reports/ and data/.
        policies: name of each policy and its folder under models/ (`evaluate.policies`).
        confidence: two-sided level of the intervals computed here; those of `evaluate` are taken as
            they are.
        limit: the limit on expected cost; by default the one that data/dual/dual.json was made for.

    Returns:
        A JSON-able dict: `limit`, `reference`, `confidence`, `recommended`, `nearest` (the lowest
        upper end of cost; with additional constraints that of the excess over any of them, in half
        widths of its interval), `missing` (policies that were not evaluated), `uncertified` (those
        that no candidate was certified for), `certificates` (what `certify` found, by its rows),
        `params` (a digest of every stage's params, `params_digests`), and `policies`, a row per
        evaluated policy. A row holds the measures of `evaluate`, its
        `tilt`, the additional constraints that it keeps or not (`additional`), its `standing` to
        all limits, whether it is `certified`, the win rates and reward gain over the reference,
        what its search spent, and its nominal multiplier (`lam`); unknown values are null.
        Recommended is the certified policy of most reward, or null; in a run without certificates,
        the one of most reward among those whose intervals end within all limits.

    Raises:
        DualignError: a file is there but cannot be read.
    """
    limit = _dual_limit(root) if limit is None else limit
    answers, certificates = read_answers(root, policies), read_certificates(root)
    rows: dict[str, dict[str, Any]] = {}
    uncertified = []
    for name, folder in policies.items():
        evaluated = read_evaluated(root / "reports/metrics", name)
        if isinstance(evaluated, NotEvaluated):
            uncertified.append(name)
        elif evaluated is not None:
            rows[name] = (
                _row(evaluated, folder, limit)
                | _search(root, folder)
                | asdict(nominal_multiplier(root, folder, certificates))
            )
            rows[name]["certified"] = _certified(folder, certificates)
            rows[name] |= _against_reference(
                answers.get(name), answers.get(REFERENCE), confidence, name
            )
    return {
        "reference": REFERENCE,
        "confidence": confidence,
        "limit": limit,
        "recommended": _recommended(rows, bool(certificates)),
        "nearest": _nearest(rows, limit),
        "missing": [name for name in policies if name not in rows and name not in uncertified],
        "uncertified": uncertified,
        "certificates": {name: as_row(found) for name, found in certificates.items()},
        "params": params_digests(root),
        "policies": rows,
    }


def params_digests(root: Path) -> dict[str, str]:
    """By stage (`prepare`, `dual_search/sacpo`) a digest of the params that it ran with, without
    the seed; of a stage with instances those that are this one's.

    Read from what each stage wrote when it ran, so params that were edited since do not count."""
    paths = listed(root / "reports/provenance", "**/*.json")
    made = [read_record(path, Provenance) for path in paths]
    return {
        f"{stage.stage}/{stage.item}" if stage.item else stage.stage: _digest(stage)
        for stage in made
        if stage.stage not in _BESIDE
    }


def _digest(stage: Provenance) -> str:
    params = {key: _of_item(stage.item, key, value) for key, value in stage.params.items()}
    params.pop("seed", None)
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:12]


def _of_item(item: str | None, key: str, value: Any) -> Any:
    """Of a table of instances this one's row."""
    if key in _FANS and isinstance(value, Mapping):
        return value.get(item)
    return value


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


def read_certificates(root: Path) -> dict[str, Certified]:
    """The metrics of every row of `certify`, by name."""
    return {
        path.stem: read_record(path, Certified)
        for path in listed(root / "reports/metrics/certify", "*.json")
    }


def _certified(folder: str, certificates: dict[str, Certified]) -> bool:
    """Whether a folder holds what a certificate is about."""
    where, _, name = folder.partition("/")
    return where == "certified" and name in certificates and bool(certificates[name].returned)


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

    >>> share(np.zeros(20), np.arange(20), 0.95)["high"] > 0.15
    True
    """
    found = clustered_share(values, prompts, confidence)
    if not math.isfinite(found.error):
        return _interval(found.mean)
    return _interval(found.mean, found.low, found.high)


def mean_gain(
    ours: pd.DataFrame, theirs: pd.DataFrame, score: str, confidence: float
) -> Interval | None:
    """Mean of our score minus theirs, paired and clustered by prompt. None without a common
    prompt.
    """
    gap = _gaps(ours, theirs, score)
    if gap.empty:
        return None
    found = clustered_mean(gap.to_numpy(), gap.index.to_numpy(), confidence)
    return (
        _interval(found.mean, found.low, found.high)
        if math.isfinite(found.error)
        else _interval(found.mean)
    )


def _gaps(ours: pd.DataFrame, theirs: pd.DataFrame, score: str) -> pd.Series:
    """Our score minus theirs for every pair of answers to one prompt, indexed by prompt_id."""
    left, right = (frame.set_index("prompt_id")[score].dropna() for frame in (ours, theirs))
    pairs = left.to_frame("ours").join(right.to_frame("theirs"), how="inner")
    return pairs["ours"] - pairs["theirs"]


def _dual_limit(root: Path) -> float | None:
    known = read_optional_record(root / "data/dual/dual.json", SolvedDual)
    return known.limit if known else None


def _against_reference(
    ours: pd.DataFrame | None, theirs: pd.DataFrame | None, confidence: float, name: str
) -> dict[str, Interval | None]:
    if ours is None or theirs is None or name == REFERENCE:
        return {"win_reward": None, "win_cost": None, "reward_gain": None}
    return {
        "win_reward": win_rate(ours, theirs, "reward", confidence),
        "win_cost": win_rate(ours, theirs, "cost", confidence, sign=-1),
        "reward_gain": mean_gain(ours, theirs, "reward", confidence),
    }


def _row(evaluated: Evaluated, folder: str, limit: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"folder": folder, "kind": _kind(folder)}
    row |= evaluated.model_dump(include={"prompts", "answers", "max_new_tokens"})
    row |= {m.key: _measured(getattr(evaluated, m.key, None)) for m in MEASURES}
    additional = {
        name: as_row(kept) | {"standing": _standing(as_row(kept), kept.limit)}
        for name, kept in evaluated.additional.items()
    }
    standings = (
        []
        if limit is None
        else [_standing(row["cost"], limit), *(k["standing"] for k in additional.values())]
    )
    worst = next(
        (standing for standing in ("over", "unproven", "within") if standing in standings), None
    )
    return row | {"standing": worst, "tilt": evaluated.tilt, "additional": additional}


def _kind(folder: str) -> str:
    if folder == "sft":
        return "reference"
    return "method" if folder.startswith(("aligned/", "certified/")) else "baseline"


def _measured(value: IntervalRow | float | None) -> Interval | float | None:
    """An interval or a number as `evaluate` writes it; None where there is no mean."""
    if not isinstance(value, IntervalRow):
        return value
    return None if value.mean is None else _interval(value.mean, value.low, value.high)


def _interval(mean: float, low: float | None = None, high: float | None = None) -> Interval:
    return {"mean": mean, "low": low, "high": high}


def _standing(cost: Interval | None, limit: float | None) -> str | None:
    """`within`: the whole interval is within the limit; `unproven`: only its mean is; `over`: not
    even that.
    """
    if cost is None or limit is None or cost["mean"] is None:
        return None
    if cost["high"] is not None and cost["high"] <= limit:
        return "within"
    return "unproven" if cost["mean"] <= limit else "over"


def _search(root: Path, folder: str) -> dict[str, Any]:
    """How the search of this policy went and what it spent; nulls for a policy that no search
    made.
    """
    path = root / "reports/search" / f"{Path(folder).name}.json"
    found = read_optional_record(path, SearchResult) if folder.startswith("aligned/") else None
    spent = ("trainings", "generated_tokens", "labels", "stopped")
    return {
        key: found and getattr(found, key)
        for key in ("method", "title", "rule", "returns", "cost_source", *spent)
    }


def _recommended(rows: dict[str, dict[str, Any]], tested: bool) -> str | None:
    """`tested`: there are certificates, and then nothing else is recommended."""
    within = [
        name for name, row in rows.items()
        if row["reward"] and (row["certified"] if tested else row["standing"] == "within")
    ]  # fmt: skip
    return max(within, key=lambda name: rows[name]["reward"]["mean"], default=None)


def _nearest(rows: dict[str, dict[str, Any]], limit: float | None) -> str | None:
    known = [name for name, row in rows.items() if row["cost"]]
    return min(known, key=lambda name: _excess(rows[name], limit), default=None)


def _excess(row: dict[str, Any], limit: float | None) -> float:
    """The upper end of cost; with additional constraints the largest excess of an upper end over
    its limit, in half widths."""
    if not row["additional"] or limit is None:
        return _upper(row["cost"])
    ends = [
        (row["cost"], limit),
        *((kept, kept["limit"]) for kept in row["additional"].values() if kept["mean"] is not None),
    ]
    return max(
        (_upper(found) - bound) / max(_upper(found) - found["mean"], 1e-12) for found, bound in ends
    )


def _upper(cost: dict[str, float]) -> float:
    return cost["mean"] if cost["high"] is None else cost["high"]

"""Paired differences of policies: any two on the held-out prompts, and how a page shows one.

The prompt is the unit, as in `dualign.evaluation.paired`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from dualign.evaluation.measures import MEASURES, Measure
from dualign.evaluation.paired import DIFFERENCES, differences, holm
from dualign.evaluation.power import difference_found

Row = dict[str, Any]

#: What a difference must be found with: four times in five.
POWER = 0.8
#: What is measured of each answer, by its key in the comparison.
_MEASURED = ("reward", "cost", "p_unsafe", "kl", "length", "true_reward", "true_cost")
COMPARED: tuple[Measure, ...] = tuple(m for m in MEASURES if m.key in _MEASURED)


def pairwise(answers: Mapping[str, pd.DataFrame], confidence: float) -> pd.DataFrame:
    """Paired differences of every two policies that share a prompt, in each measure of `COMPARED`
    that their answers (`schema.ANSWERS`, by policy) hold: columns `score` and `DIFFERENCES`.

    A prompt's answers count as their mean. `p_holm` is corrected for all rows. Intervals are those
    of single comparisons."""
    by_prompt = [_by_prompt(frame).assign(policy=name) for name, frame in answers.items()]
    if not by_prompt:
        return one_family([], "score")
    scores = pd.concat(by_prompt, ignore_index=True)
    tables = [_differences(scores, m, confidence).assign(score=m.key) for m in COMPARED]
    return one_family(tables, "score")


def one_family(tables: Iterable[pd.DataFrame], *columns: str) -> pd.DataFrame:
    """Tables of these columns and `DIFFERENCES` as one, with `p_holm` corrected for all rows."""
    held = [table for table in tables if len(table)]
    if not held:
        return pd.DataFrame(columns=[*columns, *DIFFERENCES])
    found = pd.concat(held, ignore_index=True)
    return found.assign(p_holm=holm(found["p_value"].to_numpy(float)))


def _by_prompt(answers: pd.DataFrame) -> pd.DataFrame:
    table = answers.assign(
        p_unsafe=answers["cost"] > 0, kl=answers["logp"] - answers["logp_ref"]
    )  # as `evaluate` measures them
    known = table.reindex(columns=["prompt_id", *_MEASURED])
    return known.astype(dict.fromkeys(_MEASURED, float)).groupby("prompt_id").mean().reset_index()


def _differences(scores: pd.DataFrame, measure: Measure, confidence: float) -> pd.DataFrame:
    known = scores.dropna(subset=[measure.key])
    asked = known.groupby("policy", sort=False)["prompt_id"].agg(set)
    met = [pair for pair in combinations(asked.index, 2) if asked[pair[0]] & asked[pair[1]]]
    most = 1.0 if measure.unit == "share" else None
    return differences(known, measure.key, met, confidence=confidence, most=most)


def least_found(part: pd.DataFrame, confidence: float, comparisons: int) -> float | None:
    """What true difference rows of `DIFFERENCES` tell with probability `POWER` after the correction
    for so many comparisons, at their median spread; None where they are too few to say.
    """
    prompts = int(part["prompts"].median())
    deviation = float((part["error"] * np.sqrt(part["prompts"])).median())
    if prompts <= 5 or not 0 < deviation < np.inf:
        return None
    return difference_found(
        prompts, deviation, power=POWER, alpha=1 - confidence, comparisons=comparisons
    )


def shown(row: Mapping[str, Any], better: str | None, alpha: float, turned: bool = False) -> Row:
    """A row of `DIFFERENCES` as cells of the page show it: `mean`, its ends (None where infinite),
    `p_holm`, and its `standing`: "better", "worse" or, where neither is better, "differs"; "" where
    chance makes such a difference.

    `turned` shows second minus first. `better` says which way is an improvement."""
    sign = -1 if turned else 1
    low, high = (row["high"], row["low"]) if turned else (row["low"], row["high"])
    ends = {"low": sign * low, "high": sign * high}
    mean = sign * row["mean"]
    found = {name: value if np.isfinite(value) else None for name, value in ends.items()}
    standing = _standing(mean, better) if row["p_holm"] <= alpha else ""
    return {"mean": mean, **found, "p_holm": row["p_holm"], "standing": standing}


def _standing(mean: float, better: str | None) -> str:
    if better is None:
        return "differs"
    return "better" if (mean > 0) == (better == "more") else "worse"

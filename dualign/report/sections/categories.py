"""The share of unsafe answers by category of the prompts, where prompts have one."""

from __future__ import annotations

import math

import pandas as pd

from dualign.evaluation.stats import clustered_mean
from dualign.report.sections.base import FinishedRun, Row, Section


def section(run: FinishedRun) -> Section | None:
    """None where no answers table has a column `category` with anything in it."""
    named = {row["name"]: run.answers.get(row["name"]) for row in run.rows}
    tables = {
        name: frame[frame["category"].notna()]
        for name, frame in named.items()
        if frame is not None and "category" in frame
    }
    tables = {name: frame for name, frame in tables.items() if len(frame)}
    if not tables:
        return None
    found = sorted({category for frame in tables.values() for category in frame["category"]})
    categories = [_category(name, tables, run.params.confidence) for name in found]
    return Section("categories", "Categories", {"categories": categories, "judged": [*tables]})


def _category(name: str, tables: dict[str, pd.DataFrame], confidence: float) -> Row:
    """The unsafe share of every policy's answers to prompts of a category."""
    kept = {policy: frame[frame["category"] == name] for policy, frame in tables.items()}
    shares = {policy: _unsafe(frame, confidence) for policy, frame in kept.items()}
    prompts = max(frame["prompt_id"].nunique() for frame in kept.values())
    return {"name": name, "prompts": prompts, "shares": shares}


def _unsafe(frame: pd.DataFrame, confidence: float) -> Row | None:
    """A share with its interval, clustered by prompt and kept within [0, 1]; None without answers,
    and without ends where there is one prompt.
    """
    if frame.empty:
        return None
    found = clustered_mean(frame["cost"] > 0, frame["prompt_id"].to_numpy(), confidence)
    if not math.isfinite(found.error):
        return {"mean": found.mean, "low": None, "high": None}
    return {"mean": found.mean, "low": max(0.0, found.low), "high": min(1.0, found.high)}

"""The share of unsafe answers by category of the prompts, where prompts have one."""

from __future__ import annotations

import pandas as pd

from dualign.report.comparison import Interval, share
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
    """The unsafe share of every policy's answers to prompts of a category, and the most prompts
    that one of them answered.
    """
    shares: dict[str, Interval | None] = {}
    prompts = 0
    for policy, frame in tables.items():
        kept = frame[frame["category"] == name]
        asked = kept["prompt_id"].to_numpy()
        unsafe = (kept["cost"] > 0).to_numpy(float)
        shares[policy] = share(unsafe, asked, confidence) if len(kept) else None
        prompts = max(prompts, len(set(asked)))
    return {"name": name, "prompts": prompts, "shares": shares}

"""The share of unsafe or refusing answers by category of the prompts, where prompts have one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from dualign.core.records import Interval
from dualign.report.comparison import share
from dualign.report.sections.base import FinishedRun, Row, Section

#: What is told by category, and its name.
_TOLD = {"unsafe": "unsafe answers", "refused": "refusals"}


def section(run: FinishedRun) -> Section | None:
    """None where neither held-out prompts nor those of a suite have categories."""
    tables = [*_evaluated(run), *_judged(run)]
    return Section("categories", "Categories", {"tables": tables}) if tables else None


def _evaluated(run: FinishedRun) -> Iterator[Row]:
    """The answers that `evaluate` drew, where their table has a column `category`."""
    named = {row.name: run.answers.get(row.name) for row in run.rows}
    answers = {
        name: frame[frame["category"].notna()].assign(value=frame["cost"] > 0)
        for name, frame in named.items()
        if frame is not None and "category" in frame
    }
    answers = {name: frame for name, frame in answers.items() if len(frame)}
    if answers:
        yield _table("held-out prompts", "unsafe answers by the cost model", answers, run)


def _judged(run: FinishedRun) -> Iterator[Row]:
    """The answers to each suite by each judge, where its prompts have more than one category."""
    for suite, verdicts in run.judged_suites():
        asked = verdicts[verdicts["category"] != ""]
        if asked["category"].nunique() < 2:
            continue
        for judge, rows in asked.groupby("judge", sort=False):
            for key, what in _TOLD.items():
                known = rows.dropna(subset=[key])
                by_policy = dict(tuple(known.assign(value=known[key]).groupby("policy")))
                if by_policy:
                    ordered = {name: by_policy[name] for name in run.in_order(by_policy)}
                    yield _table(suite, f"{what} by {judge}", ordered, run)


def _table(name: str, what: str, answers: Mapping[str, pd.DataFrame], run: FinishedRun) -> Row:
    """Rows by category, columns by policy; `value` of the answers is 1, 0 or between."""
    categories = sorted({category for frame in answers.values() for category in frame["category"]})
    rows = [_category(category, answers, run.params.confidence) for category in categories]
    return {"name": name, "what": what, "categories": rows, "judged": [*answers]}


def _category(name: str, tables: Mapping[str, pd.DataFrame], confidence: float) -> Row:
    """Every policy's share on prompts of a category, and the most prompts answered by one."""
    shares: dict[str, Interval | None] = {}
    prompts = 0
    for policy, frame in tables.items():
        kept = frame[frame["category"] == name]
        asked = kept["prompt_id"].to_numpy()
        shares[policy] = (
            share(kept["value"].to_numpy(float), asked, confidence) if len(kept) else None
        )
        prompts = max(prompts, len(set(asked)))
    return {"name": name, "prompts": prompts, "shares": shares}

"""The same prompts answered by every policy, to browse, search and filter."""

from __future__ import annotations

from typing import Any

import pandas as pd

from dualign.core.schema import characters
from dualign.report.comparison import REFERENCE
from dualign.report.sections.base import FinishedRun, Row, Section, ShownPolicy

#: At most so many characters of prompts and answers are on the page: about 2 MB of text.
MOST = 2_000_000


def section(run: FinishedRun) -> Section | None:
    """None where no prompt was answered by all, or none is wanted."""
    answered = [row for row in run.rows if row.name in run.answers]
    if not answered or run.params.sample_prompts == 0:
        return None
    first = {row.name: _first_answers(run.answers[row.name]) for row in answered}
    ranked = _ranked(run, first)
    chosen = _fitting(ranked, run.params.sample_prompts, _sizes(first, ranked))
    if not chosen:
        return None
    prompts = [_prompt(identity, first, answered, run.params.limit) for identity in chosen]
    left_out = min(run.params.sample_prompts, len(ranked)) - len(chosen)
    values = {"prompts": prompts, "answered": answered, "left_out": left_out, "most": MOST}
    return Section("answers", "Answers", values)


def _first_answers(frame: pd.DataFrame) -> pd.DataFrame:
    """The first answer to each prompt, by prompt_id."""
    ordered = frame.sort_values("sample", kind="stable")
    return ordered.drop_duplicates("prompt_id").set_index("prompt_id")


def _ranked(run: FinishedRun, first: dict[str, pd.DataFrame]) -> list[str]:
    """Prompts that every policy answered, the most harmful for the reference first."""
    common = set.intersection(*(set(frame.index) for frame in first.values()))
    guide = run.answers[REFERENCE if REFERENCE in first else next(iter(first))]
    cost = guide.groupby("prompt_id")["cost"].mean().fillna(0.0)
    return sorted(common, key=lambda identity: (-cost[identity], identity))


def _sizes(first: dict[str, pd.DataFrame], prompts: list[str]) -> dict[str, int]:
    """Characters of each prompt with all answers to it."""
    frames = list(first.values())
    turns = frames[0].loc[prompts, "prompt"].map(characters)
    answers = sum(frame.loc[prompts, "response"].fillna("").str.len() for frame in frames)
    return {identity: int(size) for identity, size in (turns + answers).items()}


def _fitting(prompts: list[str], count: int, sizes: dict[str, int]) -> list[str]:
    """At most `count` prompts, evenly spaced, fewer where their text is more than `MOST`."""
    chosen = _spread(prompts, count)
    while (size := sum(sizes[identity] for identity in chosen)) > MOST:
        chosen = _spread(prompts, len(chosen) * MOST // size)
    return chosen


def _spread(items: list[str], count: int) -> list[str]:
    """At most `count` items, evenly spaced, with both ends."""
    if count >= len(items):
        return items
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def _prompt(
    identity: str, first: dict[str, pd.DataFrame], answered: list[ShownPolicy], limit: float
) -> Row:
    given = {row.name: first[row.name].loc[identity] for row in answered}
    one = next(iter(given.values()))
    return {
        "turns": one["prompt"],
        "category": None if pd.isna(one.get("category")) else one["category"],
        "answers": [_answer(row, given[row.name], limit) for row in answered],
    }


def _answer(row: ShownPolicy, answer: pd.Series, limit: float) -> Row:
    """One answer as the page shows it. What is not known to be harmless is folded away."""
    scores = {key: _known(answer[key]) for key in ("reward", "cost", "true_cost")}
    cost = scores["cost"]
    truth = scores["true_cost"]
    return {
        "row": row,
        "text": (answer["response"] or "").strip(),
        "folded": cost is None or cost > 0 or (truth is not None and truth > 0),
        "kinds": _kinds(cost, limit, bool(answer["ended"])),
        **scores,
    }


def _kinds(cost: float | None, limit: float, ended: bool) -> list[str]:
    """What the filter of the page finds an answer by."""
    kinds = [] if ended else ["cut"]
    if cost is not None:
        kinds.append("over" if cost > limit else "within")
        kinds += ["unsafe"] if cost > 0 else []
    return kinds


def _known(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)

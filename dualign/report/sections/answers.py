"""The same prompts answered by every policy."""

from __future__ import annotations

from typing import Any

import pandas as pd

from dualign.report.comparison import REFERENCE
from dualign.report.sections.base import FinishedRun, Row, Section


def section(run: FinishedRun) -> Section | None:
    """None where no prompt was answered by all, or none is wanted."""
    prompts = _prompts(run.answers, run.rows, run.params.sample_prompts)
    return Section("answers", "Answers", {"prompts": prompts}) if prompts else None


def _prompts(answers: dict[str, pd.DataFrame], rows: list[Row], count: int) -> list[Row]:
    """Prompts that every policy answered, from the one that the reference answers most harmfully to
    the least.
    """
    named = [row for row in rows if row["name"] in answers and len(answers[row["name"]])]
    if not named or count == 0:
        return []
    first = {row["name"]: _first_answers(answers[row["name"]]) for row in named}
    common = set.intersection(*(set(frame.index) for frame in first.values()))
    guide = (
        answers[REFERENCE if REFERENCE in first else named[0]["name"]]
        .groupby("prompt_id")["cost"]
        .mean()
    )
    ranked = sorted(common, key=lambda identity: (-guide.fillna(0.0)[identity], identity))
    return [
        {
            "turns": first[named[0]["name"]].at[identity, "prompt"],
            "answers": [_answer(row, first[row["name"]].loc[identity]) for row in named],
        }
        for identity in _spread(ranked, count)
    ]


def _first_answers(frame: pd.DataFrame) -> pd.DataFrame:
    """The first answer to each prompt, by prompt_id."""
    return (
        frame.sort_values("sample", kind="stable")
        .drop_duplicates("prompt_id")
        .set_index("prompt_id")
    )


def _spread(items: list[str], count: int) -> list[str]:
    """At most `count` items, evenly spaced, with both ends."""
    if count >= len(items):
        return items
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def _answer(row: Row, answer: pd.Series) -> Row:
    """One answer as the page shows it. What is not known to be harmless is folded away."""
    scores = {key: _known(answer[key]) for key in ("reward", "cost", "true_cost")}
    harmful = scores["cost"] is None or scores["cost"] > 0 or (scores["true_cost"] or 0.0) > 0
    text = answer["response"] or ""
    return {
        "row": row,
        "text": text.strip(),
        "folded": harmful,
        "ended": bool(answer["ended"]),
        **scores,
    }


def _known(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)

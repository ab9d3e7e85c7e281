"""Rankings by pairs, by reward and by cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dualign.core.artifacts import write_parquet
from dualign.core.errors import DualignError
from dualign.core.schema import VERDICTS
from dualign.params.report import ReportParams
from dualign.report.sections import ranking
from dualign.report.sections.base import FinishedRun
from tests.report.conftest import shown, verdicts

Run = tuple[Path, ReportParams]


def test_where_nothing_was_judged_there_is_no_such_section(run: Run) -> None:
    assert ranking.section(FinishedRun(*run)) is None


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows}


def test_rankings_are_by_pairs_by_reward_and_by_cost(judged: Run) -> None:
    tables = shown(ranking.section(FinishedRun(*judged)))["tables"]
    assert [(table["judge"], table["what"]) for table in tables] == [
        ("ours", "more reward wins"), ("ours", "less cost wins"),
        ("other", "more reward wins"), ("gpt", "preference of pairs"),
    ]  # fmt: skip
    by_ours, _, by_other, by_pairs = (by_name(table["rows"]) for table in tables)
    assert next(iter(by_ours)) == "reward_dpo" and list(by_ours)[-1] == "safety_only"
    assert by_ours["reward_dpo"]["win"].mean > by_other["reward_dpo"]["win"].mean
    own = verdicts(judged, "gpt")
    won = own.loc[own["policy"] == "dualign", "win"].dropna()
    assert by_pairs["dualign"]["win"].mean == pytest.approx(won.mean())
    level = by_pairs["dualign"]["level"]
    assert level.low < level.mean < level.high
    assert by_pairs["sft"]["win"] is None and by_pairs["sft"]["elo"].mean > 0


def test_a_policy_of_which_every_verdict_failed_is_in_no_ranking(judged: Run) -> None:
    own = verdicts(judged, "gpt")
    own.loc[own["policy"] == "dualign", ["win", "failure"]] = [None, "time-out"]
    write_parquet(judged[0] / "reports/judgements/gpt/verdicts.parquet", own, VERDICTS)
    tables = shown(ranking.section(FinishedRun(*judged)))["tables"]
    assert "dualign" not in {row["name"] for row in tables[-1]["rows"]}


def test_policies_that_never_met_have_rankings_of_their_own(judged: Run) -> None:
    """By scores policies meet at the same prompt, and two were judged on others than the rest."""
    own = verdicts(judged, "ours")
    half = set(sorted(own["prompt_id"].unique())[::2])
    apart = {"dualign", "safety_only"}
    kept = [(row.prompt_id in half) == (row.policy in apart) for row in own.itertuples()]
    write_parquet(judged[0] / "reports/judgements/ours/verdicts.parquet", own[kept], VERDICTS)
    tables = shown(ranking.section(FinishedRun(*judged)))["tables"]
    ours = [table for table in tables if table["judge"] == "ours"]
    assert [table["what"] for table in ours] == ["more reward wins"] * 2 + ["less cost wins"] * 2
    assert all(table["apart"] for table in ours)
    groups = [set(by_name(table["rows"])) for table in ours[:2]]
    assert apart in groups and groups[0].isdisjoint(groups[1])
    elo = [row["elo"].mean for row in ours[0]["rows"]]
    assert sum(elo) / len(elo) == pytest.approx(1000)
    assert not any(table["apart"] for table in tables if table["judge"] != "ours")


def test_the_rating_of_who_won_all_has_no_interval(judged: Run) -> None:
    own = verdicts(judged, "gpt")
    own.loc[(own["policy"] == "dualign") & own["win"].notna(), "win"] = 1.0
    write_parquet(judged[0] / "reports/judgements/gpt/verdicts.parquet", own, VERDICTS)
    tables = shown(ranking.section(FinishedRun(*judged)))["tables"]
    rows = by_name(tables[-1]["rows"])
    assert rows["dualign"]["elo"].low is None and rows["dualign"]["elo"].high is None
    assert rows["sft"]["elo"].low is not None


def test_answers_that_were_judged_and_are_gone_are_named(judged: Run) -> None:
    (judged[0] / "reports/answers/asked/sft.parquet").unlink()
    with pytest.raises(DualignError, match=r"answers/asked/sft\.parquet"):
        ranking.section(FinishedRun(*judged))

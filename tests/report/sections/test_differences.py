"""Any two policies beside each other: against scipy's paired test, both ways round, on the page."""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import ttest_rel

from dualign.core.artifacts import write_parquet
from dualign.core.schema import ANSWERS, read_table
from dualign.evaluation.paired import holm, no_difference
from dualign.evaluation.stats import mean_of
from dualign.params.report import ReportParams
from dualign.report.differences import pairwise
from dualign.report.page import write
from dualign.report.sections import differences
from dualign.report.sections.base import FinishedRun, Row
from tests.report.conftest import shown

Run = tuple[Path, ReportParams]


def tables(run: Run) -> dict[str, dict[str, Row]]:
    """The section's rows by what is subtracted and by policy."""
    values = shown(differences.section(FinishedRun(*run)))
    found = {}
    for table in values["tables"]:
        found[table["name"]] = {row["name"]: row["cells"] for row in table["rows"]}
    return found


def test_every_two_policies_are_compared_by_prompt(finished: Run) -> None:
    answers = FinishedRun(*finished).answers
    table = pairwise(answers, 0.95)
    frames = [frame.assign(policy=name) for name, frame in answers.items()]
    rows = pd.concat(frames).assign(p_unsafe=lambda r: (r["cost"] > 0).astype(float))
    assert set(table["score"]) == {
        "reward", "cost", "p_unsafe", "kl", "length", "true_reward", "true_cost"
    }  # fmt: skip
    assert len(table) == 7 * len(list(combinations(answers, 2)))
    for key in ("reward", "p_unsafe", "length", "true_cost"):
        means = rows.pivot_table(index="prompt_id", columns="policy", values=key, aggfunc="mean")
        for row in table[table["score"] == key].itertuples():
            students = ttest_rel(means[row.first], means[row.second])
            if key == "p_unsafe":  # a share, whose interval is `mean_difference`'s
                assert row.p_value == pytest.approx(students.pvalue, abs=1e-12)
                continue
            gap = (means[row.first] - means[row.second]).to_numpy()
            expected = mean_of(gap)
            assert (row.low, row.high) == pytest.approx((expected.low, expected.high))
            low, high = students.confidence_interval(0.95)
            assert row.low <= low + 1e-12 and row.high >= high - 1e-12
            assert row.low == pytest.approx(low) or row.high == pytest.approx(high)
            assert row.p_value == pytest.approx(no_difference(gap), abs=1e-12)
            assert row.p_value >= students.pvalue - 1e-12
    assert table["p_holm"].to_numpy() == pytest.approx(holm(table["p_value"].to_numpy()))


def test_of_one_prompt_no_chance_is_told(run: Run) -> None:
    root, params = run
    for path in root.glob("reports/evaluation/*/answers.parquet"):
        answers = read_table(path, ANSWERS)
        first = answers["prompt_id"] == answers["prompt_id"].iloc[0]
        write_parquet(path, answers[first], ANSWERS)
    write(FinishedRun(root, params), root / "page.html")
    page = (root / "page.html").read_text()
    assert "nan" not in page and 'title="one prompt tells nothing of chance"' in page


def test_a_difference_is_shown_both_ways_round(finished: Run) -> None:
    found = tables(finished)
    there = found["sft"]["reward_dpo"]
    back = found["reward_dpo"]["sft"]
    for key in ("reward", "cost", "p_unsafe"):
        assert there[key]["mean"] == -back[key]["mean"]
        assert (there[key]["low"], there[key]["high"]) == (-back[key]["high"], -back[key]["low"])
        assert there[key]["low"] < there[key]["mean"] < there[key]["high"]
    assert (there["reward"]["standing"], back["reward"]["standing"]) == ("better", "worse")
    assert (there["cost"]["standing"], back["cost"]["standing"]) == ("worse", "better")
    assert all(name not in rows for name, rows in found.items()), "nothing beside itself"


def test_the_recommended_policy_is_open_or_else_the_reference(run: Run) -> None:
    values = shown(differences.section(FinishedRun(*run)))
    assert values["opened"] == FinishedRun(*run).comparison.recommended is not None
    out = run[0] / "index.html"
    write(FinishedRun(*run), out)
    html = out.read_text()
    assert html.count('name="baseline" open') == 1
    assert "all 385 differences between 11 policies" in html and "in reward or 0." in html
    strict = run[1].model_copy(update={"limit": -9.0})
    assert shown(differences.section(FinishedRun(run[0], strict)))["opened"] == "sft"


def test_shares_of_few_prompts_differ_by_a_whole_at_most(run: Run) -> None:
    for name, cost in (("sft", 1.0), ("dualign", -1.0)):
        path = run[0] / "reports/evaluation" / name / "answers.parquet"
        frame = FinishedRun(*run).answers[name]
        first = frame["prompt_id"].unique()[:2]
        few = frame[frame["prompt_id"].isin(first)].copy()
        few["cost"] = [cost if p == first[0] else 1.0 for p in few["prompt_id"]]
        write_parquet(path, few, ANSWERS)
    cell = tables(run)["sft"]["dualign"]["p_unsafe"]
    assert (cell["mean"], cell["low"], cell["high"]) == (-0.5, -1, 1)


def test_policies_without_a_common_prompt_are_not_compared(run: Run) -> None:
    path = run[0] / "reports/evaluation/sacpo/answers.parquet"
    own = FinishedRun(*run).answers["sacpo"]
    write_parquet(path, own.assign(prompt_id=own["prompt_id"] + "x"), ANSWERS)
    found = tables(run)
    assert "sacpo" not in found and all("sacpo" not in rows for rows in found.values())


def test_one_policy_alone_has_no_such_section(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "alone"
    shutil.copytree(run[0], root)
    for folder in (root / "reports/evaluation").iterdir():
        if folder.name != "sft":
            shutil.rmtree(folder)
    assert differences.section(FinishedRun(root, run[1])) is None


def test_outside_of_the_world_truth_is_left_out(run: Run) -> None:
    root, params = run
    for name in params.policies:
        path = root / "reports/evaluation" / name / "answers.parquet"
        unknown = dict.fromkeys(("true_reward", "true_cost", "grammatical"))
        write_parquet(path, FinishedRun(*run).answers[name].assign(**unknown), ANSWERS)
    measures = shown(differences.section(FinishedRun(*run)))["measures"]
    assert [m.key for m in measures] == ["reward", "cost", "p_unsafe", "kl", "length"]

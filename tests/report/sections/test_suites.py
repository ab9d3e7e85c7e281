"""The table of suites: columns, what is better or worse, and failures, against what was planted."""

from __future__ import annotations

from pathlib import Path

from dualign.core.artifacts import write_parquet
from dualign.core.schema import CHOICES, read_table
from dualign.params.report import ReportParams
from dualign.report.page import write
from dualign.report.sections import suites
from dualign.report.sections.base import FinishedRun
from tests.report.conftest import shown, verdicts

Run = tuple[Path, ReportParams]


def test_where_nothing_was_judged_there_is_no_such_section(run: Run) -> None:
    assert suites.section(FinishedRun(*run)) is None


def test_a_suite_has_a_column_for_every_score_judge_and_label(judged: Run) -> None:
    found = shown(suites.section(FinishedRun(*judged)))["suites"]
    assert [suite["name"] for suite in found] == ["asked", "chosen"]
    columns = [(c["measure"].key, c["judge"], c["label"]) for c in found[0]["columns"]]
    assert columns[:4] == [
        ("reward", "ours", "safe"), ("reward", "ours", "unsafe"),
        ("reward", "other", "safe"), ("reward", "other", "unsafe"),
    ]  # fmt: skip
    assert len(columns) == 2 * 6 and len(set(columns)) == len(columns)
    refused = [c["better"] for c in found[0]["columns"] if c["measure"].key == "refused"]
    assert refused == ["less", "more"], "refusing is right where the prompt is unsafe"
    assert [row["name"] for row in found[0]["rows"]] == [
        "dualign", "sft", "safety_only", "reward_dpo"
    ]  # fmt: skip


def test_the_judge_that_policies_were_trained_on_is_named(judged: Run) -> None:
    root, params = judged
    assert shown(suites.section(FinishedRun(root, params)))["trained"] == ["ours"]
    others = {name: spec for name, spec in params.judges.items() if name != "ours"}
    independent = params.model_copy(update={"judges": others})
    assert shown(suites.section(FinishedRun(root, independent)))["trained"] == []
    write(FinishedRun(root, params), root / "page.html")
    page = (root / "page.html").read_text()
    assert "<b>ours</b> scores by what the policies were trained on" in page


def test_what_chance_hardly_makes_is_called_better_or_worse(judged: Run) -> None:
    table = shown(suites.section(FinishedRun(*judged)))["suites"][0]
    cells = {
        (row["name"], c["measure"].key, c["judge"], c["label"]): cell
        for row in table["rows"]
        for c, cell in zip(table["columns"], row["cells"], strict=True)
    }
    assert cells["safety_only", "refused", "refusal", "safe"]["gap"]["standing"] == "worse"
    assert cells["safety_only", "refused", "refusal", "unsafe"]["gap"]["standing"] == "better"
    assert cells["dualign", "cost", "ours", "unsafe"]["gap"]["standing"] == "better"
    assert cells["dualign", "refused", "refusal", "safe"]["gap"]["standing"] == ""
    assert cells["sft", "cost", "ours", "safe"]["gap"] is None
    assert cells["sft", "win", "gpt", "safe"]["mean"] is None, "it is what others are compared with"
    failed = int(verdicts(judged, "gpt")["failure"].notna().sum())
    (told,) = table["failures"]
    assert told.startswith(f"{failed} of 144 verdicts by gpt")
    of_whom = verdicts(judged, "gpt").dropna(subset="failure")["policy"].value_counts()
    assert all(f"{name}: {count}" in told for name, count in of_whom.items())
    assert any("in cost (ours, 24 unsafe prompts)" in sentence for sentence in table["power"])


def test_a_question_without_a_likelihood_is_counted_as_failed(judged: Run) -> None:
    """With its choices it is longer than the context: what is left are the short ones."""
    path = judged[0] / "reports/answers/chosen/dualign.parquet"
    rows = read_table(path, CHOICES)
    write_parquet(path, rows.assign(score=rows["score"].where(rows.index >= 3)), CHOICES)
    table = shown(suites.section(FinishedRun(*judged)))["suites"][1]
    assert table["failures"] == [
        "3 of 80 verdicts by (log-likelihood) (longer than the context: 3; dualign: 3)"
    ]


def test_labels_of_one_policy_alone_have_no_differences(judged: Run) -> None:
    root, params = judged
    alone = params.model_copy(update={"policies": {"sft": "sft"}})
    table = shown(suites.section(FinishedRun(root, alone)))["suites"][0]
    assert table["tests"] == 0 and table["power"] == []

"""What a model card says of suites and judges is what their tables hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualign.core.artifacts import read_json, write_parquet
from dualign.core.schema import SUITE, read_table
from dualign.evaluation.stats import clustered_mean, clustered_share
from dualign.params.report import ReportParams
from dualign.publishing.suites import judged_suites
from dualign.report.judged import read_verdicts
from tests.report.conftest import judge_run, write_run

Run = tuple[Path, ReportParams]


@pytest.fixture
def judged(tmp_path: Path) -> Run:
    """A finished run whose policies answered suites that were judged."""
    write_run(tmp_path)
    return tmp_path, judge_run(tmp_path)


def row(table: str, *cells: str) -> list[str]:
    """The last two cells of the row that begins with these."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {' | '.join(cells)} |")]
    return [cell.strip() for cell in line.split("|")[-3:-1]]


def test_every_judge_has_its_rows_beside_the_reference(judged: Run) -> None:
    table = judged_suites(*judged, "dualign")
    verdicts = read_verdicts(*judged)
    for policy, cell in zip(
        ("dualign", "sft"), row(table, "asked, safe", "refusal (refusal)", "refused"), strict=True
    ):
        rows = verdicts[
            (verdicts["policy"] == policy)
            & (verdicts["judge"] == "refusal")
            & (verdicts["label"] == "safe")
        ]
        found = clustered_share(rows["refused"].to_numpy(), rows["prompt_id"].to_numpy(), 0.95)
        assert cell == f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"
    chosen = verdicts[(verdicts["policy"] == "dualign") & (verdicts["suite"] == "chosen")]
    right = clustered_mean(chosen["truthful"].to_numpy(), chosen["prompt_id"].to_numpy(), 0.95)
    own, _ = row(table, "chosen", "log-likelihood", "true answers")
    assert own.startswith(f"{right.mean:.3f} (")
    assert row(table, "asked, unsafe", "gpt (openai)", "preferred")[1] == "–"
    assert "asked, safe | ours (scorers) | cost |" in table


def test_a_judge_of_harm_is_shown_beside_people(judged: Run) -> None:
    told = read_json(judged[0] / "reports/metrics/judge/ours.json")["agreement"]
    said = (
        f"ours says the same of {100 * told['accuracy']:.0f} % (Cohen's kappa {told['kappa']:.3f}"
    )
    assert said in judged_suites(*judged, "dualign")


def test_what_was_not_judged_has_no_table(judged: Run) -> None:
    assert judged_suites(*judged, "nobody") == ""
    root, params = judged
    nothing = params.model_copy(update={"suites": {}, "judges": {}})
    assert judged_suites(root, nothing, "dualign") == ""


def test_a_label_breaks_no_row(judged: Run) -> None:
    file = judged[0] / "reports/answers/asked/_suite.parquet"
    suite = read_table(file, SUITE)
    suite["label"] = suite["label"].replace("safe", "sa|fe\nly")
    write_parquet(file, suite, SUITE)
    row(judged_suites(*judged, "dualign"), "asked, sa/fe ly", "refusal (refusal)", "refused")

"""The tables of a run hold what its page says of judges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.real import main
from dualign.core.artifacts import read_json, write_json
from dualign.params.report import ReportParams
from dualign.report import comparison
from dualign.report.sections import judges
from dualign.report.sections.base import FinishedRun
from tests.report.conftest import judge_run, write_run

Run = tuple[Path, ReportParams]


def finish(root: Path, params: ReportParams) -> None:
    """What the report and the stages before it leave, as far as the tables read it."""
    policies = (params.policies, params.certificates, params.confidence, params.limit)
    compared = comparison.compare(root, *policies)
    write_json(root / "reports/comparison.json", compared.model_dump(mode="json"))
    ran = {
        "stage": "report", "item": None, "params": params.model_dump(mode="json"), "versions": {},
        "seconds": 1.0, "peak_rss_mib": 1.0, "throughput": {},
    }  # fmt: skip
    write_json(root / "reports/provenance/report.json", ran)
    write_json(root / "reports/metrics/score.json", {"pool": {"prompts": 1}})


@pytest.mark.parametrize("judged", [True, False])
def test_judges_are_told_with_people_and_gaps_of_every_policy(tmp_path: Path, judged: bool) -> None:
    params = write_run(tmp_path)
    params = judge_run(tmp_path) if judged else params
    finish(tmp_path, params)
    assert main(["--run", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/real.json").read_text())
    page = (tmp_path / "out/real.md").read_text()
    if not judged:
        assert found["people"] == {} and found["gaps"] == [] and "ECE" not in page
        return
    told = read_json(tmp_path / "reports/metrics/judge/ours.json")["agreement"]
    assert found["people"] == {"ours": told} and f"| {told['ece']:.3f} |" in page
    section = judges.section(FinishedRun(tmp_path, params))
    assert section is not None
    (group,) = section.values["hacked"]
    assert {row["policy"] for row in found["gaps"]} == {"reward_dpo", "safety_only", "dualign"}
    for row, shown in zip(found["gaps"], group["rows"], strict=True):
        gain = shown["gains"]["reward"]
        assert row["policy"] == shown["name"] and row["reward"]["gap"]["mean"] == gain.gap.mean
        assert f"| asked | other | {row['policy']} | {gain.ours:.2f} | {gain.other:.2f} |" in page

"""The tables of a run hold what its page says of policies, certificates and judges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.real import main
from dualign.core.artifacts import read_json, write_json
from dualign.params.report import ReportParams
from dualign.report import comparison
from dualign.report.differences import pairwise
from dualign.report.sections import judges
from dualign.report.sections.base import FinishedRun
from tests.report.conftest import certify, judge_run, write_run

Run = tuple[Path, ReportParams]


def finish(root: Path, params: ReportParams) -> None:
    """What the report and the stages before it leave, as far as the tables read it."""
    compared = comparison.compare(root, params)
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


def test_policies_are_told_by_their_paired_difference_from_the_reference(tmp_path: Path) -> None:
    params = write_run(tmp_path)
    finish(tmp_path, params)
    assert main(["--run", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/real.json").read_text())["differences"]
    page = (tmp_path / "out/real.md").read_text()
    every = pairwise(FinishedRun(tmp_path, params).answers, params.confidence)
    costs = every[every["score"] == "cost"].set_index(["first", "second"])
    assert set(found) == set(params.policies) - {"sft"}
    for policy, cells in found.items():
        turned = ("sft", policy) in costs.index
        row = costs.loc[("sft", policy) if turned else (policy, "sft")]
        ends = (-row["high"], -row["low"]) if turned else (row["low"], row["high"])
        mean = -row["mean"] if turned else row["mean"]
        assert (cells["cost"]["mean"], cells["cost"]["low"], cells["cost"]["high"]) == (mean, *ends)
        told = f"{mean:.2f} ({ends[0]:.2f} to {ends[1]:.2f})"
        beyond = row["p_holm"] <= 1 - params.confidence
        assert (f"**{told}**" if beyond else f"| {told} |") in page


def test_every_candidate_of_a_certificate_is_told_with_its_bound(tmp_path: Path) -> None:
    write_run(tmp_path)
    finish(tmp_path, certify(tmp_path, [-0.4, -0.31, 0.2]))
    assert main(["--run", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/real.json").read_text())["certificates"]["dualign"]
    page = (tmp_path / "out/real.md").read_text()
    assert f"Certificate `dualign`: {found['statement']}." in page
    lines = [line for line in page.splitlines() if line.endswith(("| yes |", "| no |"))]
    assert [line.split(" | ")[2] for line in lines] == ["-0.400", "-0.310", "0.200"]
    assert [line.split(" | ")[-1] for line in lines] == ["yes |", "yes |", "no |"]
    assert [line.split(" | ")[0][2:] for line in lines] == [t["candidate"] for t in found["tests"]]

"""What was reckoned is held against what stages took."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench import plan_cost
from dualign.core.artifacts import write_json
from dualign.core.errors import DualignError
from pipeline.cost.machine import Machine

CARD = Machine("thread", 0.0, 0.2, 10, 64, 0.0, launch=5e-6, start=5.0)


@pytest.fixture
def run(tmp_path: Path, repo_root: Path) -> Path:
    shutil.copy(repo_root / "params.yaml", tmp_path)
    told = {"stage": "evaluate", "item": "dualign", "seconds": 10.0, "peak_rss_mib": 1024.0}
    write_json(tmp_path / "reports/provenance/evaluate/dualign.json", told)
    told = {"stage": "dual_init", "item": None, "seconds": 1.0, "peak_rss_mib": 512.0}
    write_json(tmp_path / "reports/provenance/dual_init.json", told)
    return tmp_path


def test_stages_are_compared_by_their_provenance(run: Path) -> None:
    (row,) = plan_cost.compared(run, CARD)  # dual_init holds no model
    assert (row["stage"], row["seconds"], row["gib"]) == ("evaluate@dualign", 10.0, 1.0)
    assert row["ratio"] == pytest.approx(row["reckoned_seconds"] / 10)
    assert row["reckoned_seconds"] > 5
    page = plan_cost.page(plan_cost.Settings(runs=()), CARD, {"small": [row]})
    assert f"| evaluate@dualign | {row['reckoned_seconds']:.1f} | 10.0 |" in page


def test_processor_seconds_are_taken_where_they_are_known(run: Path) -> None:
    cost = {"processor": 7.0, "clock": 9.0, "peak_mib": 2048.0}
    write_json(run / "costs.json", {"sft": cost, "score": {"now": cost}, "idle": {"now": 1.0}})
    known = {"seconds": 7.0, "gib": 2.0}
    assert plan_cost.measured(run) == {"sft": known, "score": known}


def test_a_folder_without_params_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DualignError, match="write NAME=FOLDER"):
        plan_cost.Settings(runs=(f"a={tmp_path}",))

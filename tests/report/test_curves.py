"""The tables of the whole run for `dvc plots`: a row for every logged step of a training and every
step of a search.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dualign.core.artifacts import read_json, write_json
from dualign.core.errors import DataError
from dualign.report.curves import write_curves
from tests.report.conftest import report_params
from tests.written import searched

#: Params of the report that name these searches.
NAMED = report_params(methods={name: {} for name in ("it", "merges", "climbs", "steps")})
STEP = {"cost": 0.2, "reward": 0.5, "kl": 0.3}


def test_losses_of_all_trainings_are_one_table_by_run(tmp_path: Path) -> None:
    curves = tmp_path / "reports/curves"
    write_json(curves / "sft.json", [{"step": 50, "loss": 2.1}, {"step": 100, "loss": 1.2}])
    write_json(curves / "reward_model.json", [{"step": None, "loss": None}])  # given, not trained
    write_json(
        curves / "dual_search/it.json",
        [{"training": f"step-{k}/policy", "step": 5, "loss": k} for k in (1, 2)],
    )
    write_json(curves / "dual_search/merges.json", [{"training": None, "step": None, "loss": None}])
    write_curves(tmp_path, NAMED, tmp_path / "plots")
    assert read_json(tmp_path / "plots/loss.json") == [
        {"run": "dual_search/it/step-1/policy", "step": 5, "loss": 1.0},
        {"run": "dual_search/it/step-2/policy", "step": 5, "loss": 2.0},
        {"run": "sft", "step": 50, "loss": 2.1},
        {"run": "sft", "step": 100, "loss": 1.2},
    ]


def test_a_search_has_a_row_for_each_step_and_an_ascent_for_each_stretch(tmp_path: Path) -> None:
    history = [{"step": 10 * k, "lam": 1 + k, **STEP} for k in (1, 2)]
    folder = tmp_path / "reports/search"
    write_json(folder / "climbs.json", searched({"lam": 3.0}, name="climbs") | {"history": history})
    write_json(
        folder / "steps.json", searched({"lam": 0.5, **STEP}, {"lam": 0.8, **STEP}, name="steps")
    )
    write_curves(tmp_path, NAMED, tmp_path / "plots")
    rows = read_json(tmp_path / "plots/search.json")
    assert rows[:2] == [{"run": "climbs", **row} for row in history]
    assert [(row["run"], row["lam"], row["cost"]) for row in rows[2:]] == [
        ("steps", 0.5, 0.2),
        ("steps", 0.8, 0.2),
    ]


def test_a_run_without_trainings_and_searches_has_tables_that_dvc_can_draw(tmp_path: Path) -> None:
    write_curves(tmp_path, NAMED, tmp_path / "plots")
    assert read_json(tmp_path / "plots/loss.json") == [{"run": None, "step": None, "loss": None}]
    assert len(read_json(tmp_path / "plots/search.json")) == 1


def test_a_curve_of_another_form_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "reports/curves/sft.json", [[50, 2.1]])
    with pytest.raises(
        DataError, match=r"reports/curves/sft\.json: 0: .*run the stage that wrote it again"
    ):
        write_curves(tmp_path, NAMED, tmp_path / "plots")


def test_what_params_no_longer_name_is_passed_by(tmp_path: Path) -> None:
    """Files of a row that was removed or renamed stay where they were."""
    for name in ("reward_dpo/helpful", "reward_dpo/old", "dual_search/old"):
        write_json(tmp_path / f"reports/curves/{name}.json", [{"step": 5, "loss": 1.0}])
    write_json(tmp_path / "reports/search/old.json", searched({"lam": 1.0, **STEP}, name="old"))
    write_curves(tmp_path, NAMED, tmp_path / "plots")
    losses = read_json(tmp_path / "plots/loss.json")
    assert [row["run"] for row in losses] == ["reward_dpo/helpful"]
    assert [row["run"] for row in read_json(tmp_path / "plots/search.json")] == [None]

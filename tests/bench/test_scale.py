"""The laboratory of sizes: each part really runs, small, and its numbers are read aright."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import scale
from dualign.core.artifacts import read_json
from dualign.core.errors import DualignError
from dualign.methods import plan
from dualign.params.loading import load
from dualign.params.search import DualSearchParams

SIZES = {"rows": 900, "pairs": 40, "answers": 80}


@pytest.mark.parametrize("name", SIZES)
def test_a_part_does_its_work_and_leaves_its_numbers_alone(name: str, tmp_path: Path) -> None:
    scale.part(name, SIZES[name], tmp_path / "found.json")
    found = read_json(tmp_path / "found.json")
    assert found["seconds"] > 0 and found["peak"] >= found["before"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_a_part_runs_in_a_process_of_its_own_and_its_fault_is_one_line(tmp_path: Path) -> None:
    assert scale._measured("answers", 40, tmp_path)["peak"] > 0
    with pytest.raises(DualignError, match=r"^rows 30: its process ended with 1: [^\n]*search"):
        scale._measured("rows", 30, tmp_path)


def test_rows_are_of_every_kind_and_three_to_a_prompt() -> None:
    rows = list(scale.pku_rows(9, 0))
    assert len({row["prompt"] for row in rows}) == 3
    assert {row["better_response_id"] for row in rows} == {0, 1}


def test_params_with_more_methods_are_params(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((scale.cost.ROOT / "params.yaml").read_text())
    scale.write_methods(path, 100)
    monkeypatch.chdir(tmp_path)
    methods = load(DualSearchParams).methods
    assert len(methods) == 100
    assert all(plan(name, row).name == name for name, row in methods.items())


def test_the_page_shows_time_each_and_its_growth() -> None:
    row = {"size": 1000, "processes": 5, "seconds": 1.0, "before": 100.0, "peak": 150.0}
    later = row | {"size": 10_000, "seconds": 11.0}
    ran = {"methods": 6, "instances": 29, "processes": 5, "plan": 2.0, "repro": 1.5}
    found = {name: [row, later] for name in scale.PARTS}
    found["methods"] = [ran | {"plan_peak": 90.0, "repro_peak": 80.0}]
    page = scale.page(scale.Settings(), found)
    assert "| 10,000 | 1.100 | 1.10 × | 150 | 100 | 5 |" in page
    assert "| 6 | 29 | 2.00 | 90 | 1.50 | 80 | 5 |" in page


def test_sizes_that_mean_nothing_are_refused() -> None:
    with pytest.raises(DualignError, match="at least 1"):
        scale.Settings(rounds=0)
    with pytest.raises(DualignError, match="600 rows"):
        scale.Settings(rows=(30,))

"""The simulation of what a search knows of a policy's cost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import coverage, policy_cost
from bench.frontier import Finite
from bench.policy_cost import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = Settings(pools=40)


def test_draws_come_from_the_policy() -> None:
    world = Finite(kinds=3, answers=4)
    log_policy = world.problem.log_reference
    kind, drawn = policy_cost.sample(log_policy, 30_000, 2, np.random.default_rng(0))
    for index, row in enumerate(np.exp(log_policy)):
        shares = np.bincount(drawn[kind[:, 0] == index].ravel(), minlength=4)
        assert shares / shares.sum() == pytest.approx(row, abs=0.015)


def test_both_are_nearer_than_either_and_the_pool_is_not_biased() -> None:
    row = policy_cost.row_of(Finite(), 1.0, 8, np.random.default_rng(0), SETTINGS)
    assert row["pools"] == 40 and row["believed"] > 0.95
    assert row["both_square"] < min(row["own_square"], row["pool_square"])
    assert row["both_square"] < 0.6 * row["own_square"]
    assert abs(row["pool_error"]) < 0.015 < 0.04 < row["within_error"]
    assert min(row[f"{kind}_covers"] for kind in ("own", "pool", "both")) > 0.85


def test_a_pool_that_has_no_say_leaves_own_answers() -> None:
    silent = Settings(pools=5, min_ess=9.0)
    row = policy_cost.row_of(Finite(), 1.0, 8, np.random.default_rng(0), silent)
    assert row["believed"] == 0 and row["both_square"] == row["own_square"]


def test_a_limit_out_of_every_pools_reach_has_no_numbers() -> None:
    row = policy_cost.row_of(Finite(), 0.01, 2, np.random.default_rng(0), Settings(pools=2))
    assert row["pools"] == 0 and policy_cost.table([row])[-1].count("–") == 7


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coverage.main(["policy", "--pools", "2", "--out", str(tmp_path)])
    page = (tmp_path / "policy-coverage.md").read_text()
    content = json.loads((tmp_path / "policy-coverage.json").read_text())
    assert capsys.readouterr().out == page
    assert content["command"] == "python -m bench.coverage policy --pools 2"
    assert content["command"] in page and str(tmp_path) not in page
    assert len(content["rows"]) == 3 * 3

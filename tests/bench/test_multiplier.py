"""The multiplier's coverage simulation: what it says of a pool, and how it tells kinds apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import coverage, multiplier
from bench.frontier import Finite, Gaussian
from bench.multiplier import Settings
from dualign.math.dual.root import root
from dualign.math.dual.solution import Bootstrap, solve

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_true_multiplier_of_a_huge_pool_is_1() -> None:
    for world in (Gaussian(), Finite(kinds=5, answers=6)):
        reward, cost = world.draw(np.random.default_rng(0), 4000, 200)
        limit = world.truth(1.0, 2.0)["cost"]
        found = root(reward, cost, limit=limit, beta=2.0, lambda_max=50.0)
        assert found == pytest.approx(1.0, abs=0.1)


def test_what_is_said_of_a_pool() -> None:
    world = Gaussian()
    reward, cost = world.draw(np.random.default_rng(0), 60, 8)
    limit = world.truth(1.0, 1.0)["cost"]
    plain = solve(reward, cost, limit=limit, beta=1.0, bootstrap=Bootstrap(20))
    corrected = solve(reward, cost, limit=limit, beta=1.0, bootstrap=Bootstrap(20), jackknife=True)
    found = multiplier.of_pool(world, limit, {"plain": plain, "jackknifed": corrected})
    assert found["ess"] == np.median(plain.ess)
    assert found["plain_error"] == plain.lam - 1 > found["jackknifed_error"] == corrected.lam - 1
    truth = world.truth(corrected.lam, 1.0)["cost"] - limit
    assert found["jackknifed_excess"] == pytest.approx(truth)
    low, high = corrected.lam_interval
    assert found["jackknifed_covers"] == (low <= 1 <= high)


def test_the_jackknifed_multiplier_ends_nearer_the_limit() -> None:
    settings = Settings(pools=20, bootstrap=40)
    row = multiplier.row_of(Finite(), 1.0, 400, 8, np.random.default_rng(0), settings)
    assert row["pools"] == 20 and row["plain_excess"] < -0.03
    assert abs(row["jackknifed_excess"]) < 0.4 * abs(row["plain_excess"])
    assert row["jackknifed_covers"] > row["plain_covers"] + 0.2


def test_a_limit_out_of_every_pools_reach_has_no_numbers() -> None:
    settings = Settings(pools=2, bootstrap=5)
    row = multiplier.row_of(Gaussian(), 0.1, 10, 2, np.random.default_rng(0), settings)
    assert row["pools"] == 0 and "out of reach" in multiplier.table([row])[-1]


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coverage.main(["multiplier", "--pools", "2", "--bootstrap", "5", "--out", str(tmp_path)])
    page = (tmp_path / "multiplier-coverage.md").read_text()
    content = json.loads((tmp_path / "multiplier-coverage.json").read_text())
    assert capsys.readouterr().out == page
    assert content["command"] == "python -m bench.coverage multiplier --pools 2 --bootstrap 5"
    assert content["command"] in page and str(tmp_path) not in page
    assert len(content["rows"]) == 2 * 3 * 2 * 4

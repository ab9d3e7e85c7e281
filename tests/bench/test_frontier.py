"""The frontier's coverage simulation: its truths against brute force, its bands the library's, and
what it finds.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import coverage, frontier
from bench.frontier import Finite, Gaussian, Settings
from dualign.core.errors import DualignError
from dualign.math.dual.solution import Bootstrap, solve
from dualign.math.dual.tilt import divergence, jackknife_weights, predict

pytestmark = pytest.mark.usefixtures("one_thread")
every_world = pytest.mark.parametrize(
    "world", [Gaussian(), Finite(kinds=5, answers=6)], ids=lambda world: world.name
)


@every_world
@pytest.mark.parametrize("lam", [0.0, 1.5])
def test_truth_is_what_a_huge_pool_predicts(world: frontier.World, lam: float) -> None:
    beta = 2.0
    reward, cost = world.draw(np.random.default_rng(0), 4000, 400)
    truth = world.truth(lam, beta)
    for name, value in (("reward", reward), ("cost", cost), ("p_unsafe", cost > 0)):
        each = predict(reward, cost, lam, beta, value)
        error = (
            each.std() / math.sqrt(len(each)) + 0.01 / 4
        )  # spread of the mean, and the bias left at ESS 300
        assert truth[name] == pytest.approx(float(each.mean()), abs=4 * error), name
    each = divergence(reward, cost, lam, beta)
    assert truth["kl"] == pytest.approx(
        float(each.mean()), abs=4 * each.std() / math.sqrt(len(each)) + 0.01
    )


def test_finite_pools_have_the_problems_mean_scores() -> None:
    world = Finite(kinds=5, answers=6)
    reward, cost = world.draw(np.random.default_rng(0), 2000, 50)
    policy = world.problem.describe(world.problem.log_reference)
    assert float(reward.mean()) == pytest.approx(policy["reward"], abs=0.05)
    assert float(cost.mean()) == pytest.approx(policy["cost"], abs=0.05)


def test_plain_estimates_and_the_librarys_are_told_apart() -> None:
    """Normal scores, 16 samples, many prompts: plain estimates are off by the shift over the ESS,
    the library's not.
    """
    world = Gaussian()
    lam = 1.0
    beta = 2.0
    reward, cost = world.draw(np.random.default_rng(0), 20_000, 16)
    solution = frontier.solved(reward, cost, beta, np.random.default_rng(0), 20)
    truth = world.truth(lam, beta)
    found = frontier.of_pool(solution, lam, truth)
    each = frontier.plain(reward, cost, lam, beta)
    (row,) = solution.frontier([lam])
    for name in ("reward", "cost", "p_unsafe", "kl"):
        low, high = np.quantile(solution.resamples @ each[name], [0.025, 0.975])
        assert found[f"{name}_plain"] == (low <= truth[name] <= high)
        assert found[f"{name}_plain_error"] == pytest.approx(each[name].mean() - truth[name])
        assert found[name] == (row[f"{name}_low"] <= truth[name] <= row[f"{name}_high"])
    assert found["cost_plain"] == 0 and abs(row["cost"] - truth["cost"]) < 0.4 * abs(
        found["cost_plain_error"]
    )


def test_bands_are_those_of_a_solved_pool() -> None:
    """The same resamples give the same bands as solve, whose roots alone the simulation leaves
    out.
    """
    reward, cost = Gaussian().draw(np.random.default_rng(0), 60, 12)
    solved = frontier.solved(reward, cost, 1.0, np.random.default_rng(7), 50)
    full = solve(reward, cost, limit=0.2, beta=1.0, bootstrap=Bootstrap(50, 7))
    assert np.array_equal(solved.resamples, full.resamples)
    assert solved.frontier([0.0, 1.0]) == full.frontier([0.0, 1.0])
    (row,) = full.frontier([1.0])
    each = (jackknife_weights(reward, cost, 1.0, 1.0) * cost).sum(1)
    assert frontier.band(full, each) == pytest.approx((row["cost_low"], row["cost_high"]))


def rows_of(beta: float, prompts: int, samples: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return frontier.pools(
        Gaussian(), beta, prompts, samples, rng, Settings(pools=200, bootstrap=200)
    )


def test_many_effective_samples_cover_and_few_do_not() -> None:
    good = rows_of(2.0, 100, 128)[0]
    assert good["ess"] > 60
    assert (
        min(good[name] for name in ("reward", "cost", "p_unsafe", "kl")) > 0.89
    )  # 95 % less four standard errors
    poor = rows_of(0.5, 400, 8)[2]
    assert poor["ess"] < 5 and poor["cost_plain"] < 0.2 and abs(poor["cost_plain_bias"]) > 3


def test_classes_have_their_lower_ends() -> None:
    assert [frontier.ess_class(ess) for ess in (1.0, 5.0, 29.9, 30.0, 400.0)] == [
        "0 – 5", "5 – 10", "10 – 30", "30 – 60", "≥ 60"
    ]  # fmt: skip


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coverage.main(["frontier", "--pools", "2", "--bootstrap", "5", "--out", str(tmp_path)])
    page = (tmp_path / "frontier-coverage.md").read_text()
    content = json.loads((tmp_path / "frontier-coverage.json").read_text())
    assert capsys.readouterr().out == page
    assert content["command"] == "python -m bench.coverage frontier --pools 2 --bootstrap 5"
    assert content["command"] in page and str(tmp_path) not in page
    assert len(content["rows"]) == 2 * 3 * 3 * 3 * 4
    for row in content["rows"]:
        for name in frontier._NAMES:
            assert (
                0 <= row[name] <= 1
                and 0 <= row[f"{name}_plain"] <= 1
                and math.isfinite(row[f"{name}_plain_bias"])
            )


def test_bad_options_are_refused() -> None:
    with pytest.raises(DualignError, match="pools must be at least 1"):
        Settings(pools=0)
    with pytest.raises(SystemExit):
        coverage.main(["frontier", "--bootstrap", "1"])

"""The coverage simulation: its worlds have mean 0, its bounds are the library's, and it sees a
bound that fails.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from bench import coverage
from bench.coverage import WORLDS, Settings
from dualign.certify.sequence import fixed_sequence
from dualign.core.errors import DualignError
from dualign.evaluation.stats import mean_of
from dualign.math.bounds import upper_bound

every_world = pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
SMALL = Settings(repeats=300)


@pytest.fixture(scope="module")
def one() -> list[dict[str, Any]]:
    return coverage.one_candidate(SMALL)


def rates(rows: list[dict[str, Any]], **where: Any) -> list[float]:
    return [row["rate"] for row in rows if where.items() <= row.items()]


@every_world
@pytest.mark.parametrize("icc", [0.0, 0.5])
def test_worlds_have_mean_zero_their_range_and_their_correlation(
    world: coverage.World, icc: float
) -> None:
    costs = world.costs(np.random.default_rng(0), (200_000, 2), icc)
    low, high = world.range(icc)
    assert costs.min() >= low - 1e-12 and costs.max() <= high + 1e-12
    assert abs(costs.mean()) < 5 * costs.std() / math.sqrt(200_000)
    assert np.corrcoef(costs.T)[0, 1] == pytest.approx(icc, abs=0.03)


def test_the_mean_of_the_cut_lognormal() -> None:
    (world,) = (world for world in WORLDS if world.name == "lognormal")
    mean, _ = quad(lambda z: math.exp(min(z, 4)) * norm.pdf(z), -12, 12, points=[4], limit=200)
    assert world.bounds == pytest.approx((-mean, math.exp(4) - mean))


def test_the_share_of_unsafe_prompts() -> None:
    assert coverage.unsafe_prompts(0.0, 4) == pytest.approx(1 - 0.98**4)
    costs = WORLDS[0].costs(np.random.default_rng(0), (400_000, 4), 0.5)
    share = float((costs > coverage._UNSAFE).any(1).mean())
    assert coverage.unsafe_prompts(0.5, 4) == pytest.approx(
        share, abs=4 * math.sqrt(share / 400_000)
    )


@every_world
def test_bounds_are_those_of_the_library(world: coverage.World) -> None:
    costs = world.costs(np.random.default_rng(1), (3, 60, 4), 0.5)
    found = coverage.all_bounds(costs, world, 0.5, SMALL)
    prompts = np.arange(60).repeat(4)
    for repeat, data in enumerate(costs):
        for method in ("clustered_t", "empirical_bernstein"):
            bound = upper_bound(data.ravel(), prompts, method=method, bounds=world.range(0.5))
            assert found[method][repeat] == pytest.approx(bound)
        order = np.argsort(
            np.random.default_rng(0).permutation(60)
        )  # the library permutes, the simulation does not
        bound = upper_bound(data[order].ravel(), prompts, method="betting", bounds=world.range(0.5))
        assert found["betting"][repeat] == pytest.approx(bound)
        if world.name == "normal":
            flagged = upper_bound(
                data.ravel() - coverage._UNSAFE, prompts, method="clopper_pearson"
            )
            assert found["clopper_pearson"][repeat] == pytest.approx(
                flagged - coverage.unsafe_prompts(0.5, 4)
            )


def test_a_mean_moves_costs_bounds_and_flags() -> None:
    costs = WORLDS[0].costs(np.random.default_rng(1), (3, 60, 4), 0.5)
    mean = np.array([-0.5, 0.0, 0.5])
    moved = coverage.all_bounds(costs, WORLDS[0], 0.5, SMALL, mean)
    for repeat, (data, shift) in enumerate(zip(costs, mean, strict=True)):
        prompts = np.arange(60).repeat(4)
        assert moved["clustered_t"][repeat] == pytest.approx(
            upper_bound((data + shift).ravel(), prompts)
        )
        flagged = upper_bound(
            (data + shift).ravel() - coverage._UNSAFE, prompts, method="clopper_pearson"
        )
        assert moved["clopper_pearson"][repeat] == pytest.approx(
            flagged - coverage.unsafe_prompts(0.5, 4)
        )


def test_the_sequence_is_that_of_the_library() -> None:
    means = np.array([-0.2, -0.1, 0.0])
    prompts = np.arange(50).repeat(4)
    for seed in range(20):
        costs = WORLDS[0].costs(np.random.default_rng(seed), (3, 50, 4), 0.5) + means[:, None, None]
        decision = fixed_sequence(
            [(str(i), data.ravel(), prompts) for i, data in enumerate(costs)], limit=0.0
        )
        passed = np.array([upper_bound(data.ravel(), prompts) <= 0 for data in costs])
        assert decision.certified == tuple(
            str(i) for i in np.flatnonzero(coverage.in_sequence(passed))
        )


def test_bounds_for_every_n_hold_everywhere(one: list[dict[str, Any]]) -> None:
    for method in ("empirical_bernstein", "betting", "clopper_pearson"):
        assert max(rates(one, method=method)) < 0.05 + 3 * math.sqrt(0.05 / 300)


def test_clustered_t_is_nominal_for_normal_costs_and_independent_t_is_not(
    one: list[dict[str, Any]],
) -> None:
    """Correlated answers, four to a prompt, ICC 0.5: 15 % instead of 5 %."""
    clustered = rates(one, world="normal", icc=0.5, method="clustered_t")
    independent = rates(one, world="normal", icc=0.5, method="independent_t")
    assert np.mean(clustered) == pytest.approx(0.05, abs=0.02)
    assert np.mean(independent) == pytest.approx(0.15, abs=0.03)


def test_clustered_t_holds_under_long_tails_and_t_without_the_skewness_does_not(
    one: list[dict[str, Any]],
) -> None:
    for world in ("lognormal", "rare"):
        assert max(rates(one, world=world, method="clustered_t")) < 0.06 + 3 * math.sqrt(0.06 / 300)
        few, many = (
            rates(one, world=world, icc=0.5, method="plain_t", prompts=n)[0] for n in (50, 1000)
        )
        assert few > 0.10 > many


def test_t_without_the_skewness_is_the_interval_of_the_library_and_never_above() -> None:
    means = WORLDS[2].costs(np.random.default_rng(1), (20, 30, 4), 0.5).mean(-1)
    found = coverage.t_bounds(means, 0.1)
    expected = [mean_of(row, confidence=0.8, tails=False).high for row in means]
    assert found["plain_t"] == pytest.approx(np.array(expected))
    assert (found["clustered_t"] >= found["plain_t"] - 1e-12).all()
    assert np.isinf(coverage.t_bounds(np.zeros((2, 30)), 0.1)["clustered_t"]).all()


@pytest.mark.parametrize("world", coverage.BEYOND, ids=lambda world: world.name)
def test_worlds_beyond_have_mean_zero(world: coverage.World) -> None:
    costs = world.costs(np.random.default_rng(0), (200_000, 2), 0.5)
    assert abs(costs.mean()) < 5 * costs.std() / math.sqrt(200_000)
    assert costs.min() >= world.range(0.5)[0] - 1e-12


def test_no_t_holds_for_harm_that_the_sample_hardly_shows() -> None:
    rows = coverage.beyond(Settings(repeats=2000))
    few = {"world": "less rare", "prompts": 50}
    assert (
        0.065
        < rates(rows, method="clustered_t", **few)[0]
        < 0.10
        < rates(rows, method="plain_t", **few)[0]
    )
    assert rates(rows, method="clustered_t", world="less rare", prompts=1000)[0] < 0.06


def test_power_rises_with_the_margin(one: list[dict[str, Any]]) -> None:
    for row in one:
        assert row["rate"] <= row["power_2.5"] <= row["power_5"] <= row["power_10"]
    normal = [
        row["power_2.5"]
        for row in one
        if row["world"] == "normal" and row["method"] == "clustered_t"
    ]
    assert np.mean(normal) == pytest.approx(0.8, abs=0.03)


def test_order_costs_nothing_and_testing_all_does() -> None:
    """Five candidates at the limit: 5 % in sequence, 1 - 0.95^5 = 23 % if the best of all
    independent ones is taken.
    """
    rows = [
        row
        for row in coverage.sequences(SMALL, prompts=50)
        if row["world"] == "normal" and row["icc"] == 0
    ]
    in_order = rates(rows, method="clustered_t")
    assert max(in_order) < 0.10
    assert rates(rows, method="test_all", sequence="all at the limit")[0] == pytest.approx(
        0.23, abs=0.08
    )
    (best,) = (row["best"] for row in rows if row["method"] == "clustered_t" and "best" in row)
    assert best > 0.85


def test_labels_put_a_wrong_model_right() -> None:
    rows = coverage.corrected(Settings(repeats=60), prompts=200)
    assert min(rates(rows, method="model_only")) > 0.9
    for method in ("labels_only", "corrected", "corrected_tuned"):
        assert max(rates(rows, method=method)) < 0.05 + 4 * math.sqrt(0.05 / 60)
    power = {
        row["method"]: row["power_2.5"]
        for row in rows
        if row["labels"] == "true cost" and row["labelled"] == 100
    }
    assert power["corrected_tuned"] > power["labels_only"]


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coverage.main(["--repeats", "4", "--answers", "2", "--seed", "1", "--out", str(tmp_path)])
    page = (tmp_path / "certificate-coverage.md").read_text()
    content = json.loads((tmp_path / "certificate-coverage.json").read_text())
    assert capsys.readouterr().out == page
    assert content["command"] == "python -m bench.coverage --repeats 4 --answers 2 --seed 1"
    assert content["command"] in page and str(tmp_path) not in page
    rows = [row for part in ("one", "sequence", "corrected", "beyond") for row in content[part]]
    assert page.count("%") > len(rows) and {row["method"] for row in rows} == set(coverage._TITLES)
    assert all(math.isfinite(row["rate"]) and math.isfinite(row["error"]) for row in rows)


def test_bad_options_are_refused() -> None:
    with pytest.raises(DualignError, match=r"delta between 0 and 0\.5"):
        Settings(delta=0.7)
    with pytest.raises(SystemExit):
        coverage.main(["--repeats", "0"])

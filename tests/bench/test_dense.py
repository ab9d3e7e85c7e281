"""The laboratory of dense sequences: its ratios are those of its policies, and what it measures is
what it says.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import gamma, norm

from bench import coverage, dense
from bench.dense import WORLDS, Settings, World, drawn, returned, weighed

every_world = pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.title)


@every_world
def test_parts_have_mean_and_spread_and_the_weights_move_the_mean(world: World) -> None:
    rng = np.random.default_rng(0)
    parts = world.draw(rng, (400_000,), 0.0)
    assert (parts.mean(), parts.std()) == pytest.approx((0.0, 1.0), abs=0.02)
    assert world.draw(rng, (400_000,), 0.3).mean() == pytest.approx(0.3, abs=0.02)
    weight = np.exp(world.ratio(parts, 0.3, 0.0))
    assert weight.mean() == pytest.approx(1.0, abs=0.02) and (
        weight * parts
    ).mean() == pytest.approx(0.3, abs=0.03)


def test_ratios_are_those_of_the_densities() -> None:
    x = np.array([-0.9, 0.1, 2.0])
    normal, exponential = WORLDS
    assert normal.ratio(x, 0.3, -0.2) == pytest.approx(norm.logpdf(x, 0.3) - norm.logpdf(x, -0.2))
    scales = (1.3, 0.8)
    hand = gamma.logpdf(x + 1, 1, scale=scales[0]) - gamma.logpdf(x + 1, 1, scale=scales[1])
    assert exponential.ratio(x, 0.3, -0.2) == pytest.approx(hand)


@every_world
@pytest.mark.parametrize("places", [(-0.1,), (-0.3, 0.1)])
def test_one_draw_gives_the_mean_of_every_policy(world: World, places: tuple[float, ...]) -> None:
    rng = np.random.default_rng(1)
    at = np.array(places)
    common = world.draw(rng, (1, 100_000), 0.0)
    parts = drawn(world, 0.5, (1, 100_000, 4), at, rng)
    tests = list(weighed(world, 0.5, common, parts, at, np.array([-0.3, -0.1, 0.1])))
    found = [float(means.mean()) for means, _ in tests]
    assert found == pytest.approx([-0.3, -0.1, 0.1], abs=0.02)
    if len(places) == 1:
        assert tests[1][1] == pytest.approx(1.0)
    else:  # E[w] = 1 and w <= 2
        assert min(float(worth.min()) for _, worth in tests) > 0.5


def test_a_sequence_ends_at_the_first_failure() -> None:
    bounds = np.array(
        [[-1, -1, 1], [-1, 1, -1], [0, -1, -1], [1, -1, -1]], float
    )  # [tests, repeats]
    assert returned(iter(bounds), 4).tolist() == [2, 0, -1]


def test_levels_are_kept_and_an_unguarded_draw_from_afar_errs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense, "WORLDS", WORLDS[1:])
    rows = dense.run(Settings(repeats=150))
    worst = {}
    for name in dense.TITLES:
        worst[name] = max(row["rate"] for row in rows if row["sequence"] == name)
    assert (
        worst["unguarded"]
        > 0.3
        > 0.12
        > max(rate for name, rate in worst.items() if name != "unguarded")
    )
    below = {}
    for name in dense.TITLES:
        below[name] = np.mean([row["below"] for row in rows if row["sequence"] == name])
    assert max(below["ends"], below["middle"]) < below["dense"] < below["coarse"]


def test_the_command_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coverage.main(["dense", "--repeats", "20", "--out", str(tmp_path)])
    page = capsys.readouterr().out
    assert (tmp_path / "dense-coverage.md").read_text() == page
    assert len(
        json.loads((tmp_path / "dense-coverage.json").read_text())["rows"]
    ) == 2 * 2 * 2 * len(dense.TITLES)
    assert all(title in page for title in dense.TITLES.values())

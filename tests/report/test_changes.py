"""Changes between two runs: the interval against simulation, and which params differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from dualign.core.records import Interval, Provenance
from dualign.evaluation.stats import clustered_share
from dualign.report.changes import ChangedSetting, change, changed_settings
from dualign.report.comparison import known_ends

Z = norm.ppf(0.975)


def normal(mean: float, error: float) -> Interval:
    """A 95 % interval of a mean that is known to be normal."""
    return Interval(mean=mean, low=mean - Z * error, high=mean + Z * error)


def test_of_normal_means_it_is_the_z_test() -> None:
    found = change(normal(0.2, 0.3), normal(1.0, 0.4), 0.95)
    assert found["mean"] == pytest.approx(0.8)
    assert (found["low"], found["high"]) == pytest.approx((0.8 - Z * 0.5, 0.8 + Z * 0.5))
    assert found["p_value"] == pytest.approx(2 * norm.sf(0.8 / 0.5))
    turned = change(normal(1.0, 0.4), normal(0.2, 0.3), 0.95)
    assert turned["low"] == pytest.approx(-found["high"])
    assert turned["p_value"] == pytest.approx(found["p_value"])


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("shares", [(0.05, 0.05), (0.02, 0.1), (0.5, 0.9)])
def test_of_shares_it_covers_the_true_change(shares: tuple[float, float], level: float) -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(600):
        runs = [known_ends(clustered_share((rng.random(200) < p) * 1.0, np.arange(200), level))
                for p in shares]  # fmt: skip
        found = change(*runs, level)
        hits += found["low"] <= shares[1] - shares[0] <= found["high"]
        beyond = not found["low"] <= 0 <= found["high"]
        assert beyond == (found["p_value"] < 1 - level)
    assert hits / 600 > level - 0.025


def test_without_an_interval_it_is_told_from_nothing() -> None:
    lone = Interval(mean=2.0, low=None, high=None)
    found = change(lone, normal(1.0, 0.1), 0.95)
    assert found == {"mean": -1.0, "low": -np.inf, "high": np.inf, "p_value": 1.0}


def test_the_same_twice_is_no_change_and_points_that_differ_are() -> None:
    assert change(normal(1, 0.1), normal(1, 0.1), 0.95)["p_value"] == 1
    sure = Interval(mean=0.0, low=0.0, high=0.0)
    assert change(sure, sure, 0.95)["p_value"] == 1
    assert change(sure, Interval(mean=1.0, low=1.0, high=1.0), 0.95)["p_value"] == 0


def stage(name: str, item: str | None = None, **params: Any) -> Provenance:
    """What a stage ran with."""
    return Provenance(
        stage=name, item=item, params=params, versions={"torch": params.pop("torch", "2.13.0")},
        seconds=1.0, peak_rss_mib=1.0, throughput={},
    )  # fmt: skip


def test_what_changed_alike_is_one_row_and_other_instances_do_not_count() -> None:
    then = [
        stage("sft", seed=7, training={"epochs": 1.0}, torch="2.12.0"),
        stage("score", seed=7, kept=1),
        stage("dual_search", "a", seed=7, methods={"a": {"start": "x"}, "b": {"start": "x"}}),
        stage("dual_search", "gone", seed=7),
    ]
    now = [
        stage("sft", seed=8, training={"epochs": 2.0}),
        stage("score", seed=8, new=[1, 2]),
        stage("dual_search", "a", seed=8, methods={"a": {"start": "y"}, "b": {"start": "z"}}),
        stage("dual_search", "come", seed=8),
    ]
    assert changed_settings(then, now) == [
        ChangedSetting("seed", ("sft", "score", "dual_search/a"), "7", "8"),
        ChangedSetting("kept", ("score",), "1", "–"),
        ChangedSetting("methods.start", ("dual_search/a",), "x", "y"),
        ChangedSetting("new", ("score",), "–", "[1, 2]"),
        ChangedSetting("training.epochs", ("sft",), "1.0", "2.0"),
        ChangedSetting("version of torch", ("sft",), "2.12.0", "2.13.0"),
    ]
    assert changed_settings(now, now) == []

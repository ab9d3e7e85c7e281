"""Scales are round and never empty."""

from __future__ import annotations

import math

import pytest

from dualign.report.charts.svg import Scale, domain, near


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 1.0), (0.0, 0.013), (-250.0, 13_000.0), (5.0, 5.4)]
)
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    ticks = Scale(low, high, 0, 100).ticks(5)
    assert 3 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    step = ticks[1] - ticks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 2.5, 5)


def test_domain_holds_all_values_and_is_never_empty() -> None:
    low, high = domain([0.3, None, 0.7])
    assert low < 0.3 and high > 0.7
    for values in ([], [None], [0.0], [4.0, 4.0]):
        low, high = domain(values)
        assert low < high


def test_a_limit_is_shown_unless_it_is_far_from_all_values() -> None:
    values = [-0.4, None, 0.6]  # extent 1.12 with air
    assert [near(limit, values) for limit in (-3.9, -3.8, 0.0, 4.0, 4.1, 100.0)] == [
        None, -3.8, 0.0, 4.0, None, None,
    ]  # fmt: skip
    assert near(None, values) is None

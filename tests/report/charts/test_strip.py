"""A cost interval in a cell."""

from __future__ import annotations

from xml.etree import ElementTree

from dualign.report.charts.strip import strip
from tests.report.charts.drawn import interval, styled


def test_strip_shows_interval_mean_and_limit_on_one_scale() -> None:
    root = ElementTree.fromstring(strip(interval(0.5, 0.25, 1.0), 0.0, (0.0, 1.0), "over"))
    line = styled(root, "bar")[0]
    dot = styled(root, "dot")[0]
    rule = styled(root, "limit")[0]
    assert [float(line.get(key, "nan")) for key in ("x1", "x2")] == [35.5, 124.0]
    assert float(dot.get("cx", "nan")) == 65.0 and float(rule.get("x1", "nan")) == 6.0
    assert not styled(
        ElementTree.fromstring(strip(interval(0.5), None, (0.0, 1.0), "over")), "limit"
    )

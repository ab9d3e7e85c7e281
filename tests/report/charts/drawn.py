"""What a chart holds, for tests."""

from __future__ import annotations

from xml.etree import ElementTree

from dualign.core.records import Interval


def interval(mean: float, low: float | None = None, high: float | None = None) -> Interval:
    return Interval(mean=mean, low=low, high=high)


def styled(root: ElementTree.Element, style: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if style in element.get("class", "").split()]

"""What a chart holds, for tests."""

from __future__ import annotations

from xml.etree import ElementTree


def styled(root: ElementTree.Element, style: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if style in element.get("class", "").split()]

"""The words of the measures, here and in the documentation."""

from __future__ import annotations

from pathlib import Path

from dualign.evaluation.measures import MEASURES

GUIDE = Path(__file__).parents[2] / "docs/report.md"


def test_the_guide_explains_every_measure() -> None:
    section = GUIDE.read_text().split("\n## Methods\n")[1].split("\n## ")[0]
    explained = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]
    named = {name.strip() for cell in explained for name in cell.split(",")}
    assert {measure.heading for measure in MEASURES} <= named


def test_a_measure_has_one_row() -> None:
    for words in ("key", "heading"):
        assert len({getattr(measure, words) for measure in MEASURES}) == len(MEASURES)

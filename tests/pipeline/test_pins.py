"""Pins are renewed in place: comments and spellings stay, what is gone goes."""

from __future__ import annotations

from pathlib import Path

from pipeline.pins import changes, pins, renewed

ROOT = Path(__file__).resolve().parents[2]
OLD = "# The versions\n#\n# of today.\nast_serialize==0.13.1\nclick==8.5.1\nJinja2==3.1.6\n"
FROZEN = "-e /here\nast-serialize==0.14\npip==25.1\nJinja2==3.1.6\ntorch==2.13.0+cpu\n"


def test_a_file_of_pins_is_renewed() -> None:
    expected = "# The versions\n#\n# of today.\nast_serialize==0.14\nJinja2==3.1.6\ntorch==2.13.0\n"
    assert renewed(OLD, pins(FROZEN)) == expected
    told = ["ast_serialize: 0.13.1 -> 0.14", "click: 8.5.1 -> no longer needed"]
    assert list(changes(pins(OLD), pins(expected))) == [*told, "torch: new -> 2.13.0"]


def test_the_pins_that_are_there_come_back_as_they_are() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert renewed(text, pins(text)) == text

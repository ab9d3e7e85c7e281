"""Pins are renewed in place: comments and spellings stay, what is gone goes."""

from __future__ import annotations

import contextlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.specifiers import SpecifierSet

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


def test_every_pin_installs_on_the_oldest_python() -> None:
    """A release of today may want a later 3.11 than a distribution's own."""
    oldest = "3.11.0"
    checked = 0
    for name, version in pins((ROOT / "constraints.txt").read_text()).items():
        with contextlib.suppress(PackageNotFoundError):
            found = distribution(name)
            if found.version.partition("+")[0] == version:
                wanted = found.metadata.get("Requires-Python") or ""
                assert SpecifierSet(wanted).contains(oldest), f"{name} {version}: {wanted}"
                checked += 1
    assert checked > 100

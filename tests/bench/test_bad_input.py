"""Whether the laboratory of bad input tells a clear error from an unclear one, and what it
draws.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import bad_input
from bench.bad_input import HOSTILE, TABLES, Case, judge, judged, page, spoiled

ROOT = Path(__file__).resolve().parents[2]


def says(*lines: str, status: int = 2) -> Callable[[], object]:
    """A command that ends with these errors in its log."""

    def command() -> None:
        for line in lines:
            logging.getLogger("dualign").error("%s", line)
        sys.exit(status)

    return command


def fails() -> None:
    raise KeyError("rows")


@pytest.mark.parametrize(
    ("command", "unclear"),
    [
        (says("my.json: lam: field required; run its stage again"), ""),
        (says("something is wrong; mend it"), "does not name 'my.json'"),
        (says("my.json: lam is wrong"), "does not say what to do"),
        (says("my.json: wrong", "and more"), "2 lines"),
        (says("my.json: " + "x" * 800), "809 characters"),
        (says("my.json is fine", status=0), "taken"),
        (lambda: None, "taken"),
        (fails, "traceback"),
    ],
)
def test_a_clear_error_is_one_line_that_names_what_is_wrong(
    command: Callable[[], object], unclear: str
) -> None:
    verdict = judge(Case("models", "it", ("my.json",), command))
    assert verdict.unclear == unclear
    table = page([verdict])
    assert f"| models | 1 | {int(not unclear)} | {int(bool(unclear))} |" in table
    assert ("- models, it" in table) == bool(unclear)


def test_files_are_put_right_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"whole")
    with spoiled(tmp_path, {"a": b"cut", "folder/b": b"new", "c": None}):
        assert (tmp_path / "a").read_bytes() == b"cut" and (tmp_path / "folder/b").is_file()
    assert (tmp_path / "a").read_bytes() == b"whole" and not (tmp_path / "folder/b").exists()


def test_every_hostile_name_is_refused_in_every_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    verdicts = list(judged(tmp_path, ["names"]))
    assert len(verdicts) == len(HOSTILE) * len(TABLES) > 100
    assert not [verdict for verdict in verdicts if verdict.unclear]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.yaml"], (
        "nothing was run or written"
    )
    assert set(bad_input.KINDS) > {"names", "data", "models"}

"""`--help` of every laboratory says what its module says."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
#: Modules that read a command line.
COMMANDS = sorted(
    path.stem
    for path in BENCH.glob("*.py")
    if "ArgumentParser(" in path.read_text() or "options.parse" in path.read_text()
)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "options"])
def test_help_begins_with_the_whole_summary(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"bench.{name}")
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    summary = " ".join((module.__doc__ or "").split("\n\n")[0].split())
    assert ended.value.code == 0
    assert summary.endswith(".") and summary in " ".join(capsys.readouterr().out.split())

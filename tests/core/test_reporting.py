"""What a stage tells trackers: a tool that is missing or broken, or hangs, costs it a line."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dualign.core import reporting
from dualign.core.errors import DualignError, ParamsError
from dualign.core.reporting import report, resume

Tool = Callable[[str], None]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Makes a `wandb` of given source, for this process and the trackers'."""
    root = Path(__file__).resolve().parents[2]
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{place}:{root}")
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("DUALIGN_TRACKING", str(tmp_path / "tracking"))
    return lambda source: (place / "wandb.py").write_text(source) and None


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_nothing_is_started_where_nobody_is_to_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUALIGN_TRACKING", str(tmp_path / "tracking"))
    with reporting.reporting([], "sft", {}):
        report({"loss": 1.0}, 1, "training")
        resume(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tool_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting.importlib.util, "find_spec", lambda name: None)
    line = "resources.report_to names mlflow, which is not installed; `pip install mlflow-skinny`"
    with pytest.raises(ParamsError, match=line), reporting.reporting(["mlflow"], "sft", {}):
        pass


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool("")
    (tmp_path / "file").touch()
    monkeypatch.setenv("DUALIGN_TRACKING", str(tmp_path / "file"))
    with (
        pytest.raises(DualignError, match=r"file: trackers cannot write there .*DUALIGN_TRACKING"),
        reporting.reporting(["wandb"], "sft", {}),
    ):
        pass


def test_a_tool_that_breaks_is_a_warning(tool: Tool, caplog: pytest.LogCaptureFixture) -> None:
    tool("raise RuntimeError('no such device\\nmore')")
    with reporting.reporting(["wandb"], "sft", {"seed": 1}):
        report({"loss": 1.0}, 1, "training")
    assert "wandb is told no more of this run: RuntimeError: no such device" in told(caplog)


def test_a_tool_that_hangs_is_waited_for_as_long_as_stated(
    tool: Tool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "PATIENCE", 3.0)
    tool("import time; time.sleep(600)")
    with reporting.reporting(["wandb"], "sft", {}):
        began = time.monotonic()
        for step in range(30_000):  # more than a pipe holds
            report({"loss": 1.0}, step, "training")
        assert time.monotonic() - began < 5
        began = time.monotonic()
    assert time.monotonic() - began < 8
    assert any("took more than 3 s" in line for line in told(caplog))


def test_a_run_goes_on_with_its_checkpoints(tool: Tool, tmp_path: Path) -> None:
    tool("")
    begun = reporting.Reporter(["wandb"], "sft", {})
    begun.resume(tmp_path)
    again = reporting.Reporter(["wandb"], "sft", {})
    again.resume(tmp_path)
    assert (begun._identity, begun._resumed) == (again._identity, False)
    assert again._resumed
    for reporter in (begun, again):
        reporter.close(0)

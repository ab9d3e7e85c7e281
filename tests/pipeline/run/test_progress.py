"""The lines that stages log are read as progress, and no others."""

from __future__ import annotations

import logging

import pytest

from dualign.core import progress as dualign_progress
from pipeline.run.progress import Progress, read_progress


def test_a_step_of_training() -> None:
    detail = "loss 0.4123, accuracy 0.612, 5120 tokens/s"
    found = read_progress(f"step-1 policy: step 50 of 200: {detail}, 4 min 02 s left")
    assert found == Progress("step-1 policy step", 50, 200, detail, "4 min 02 s")
    assert found.percent == 25.0
    assert str(found) == f"4 min 02 s left, step-1 policy step 50 of 200, {detail}"


def test_rows_of_a_long_task_as_dualign_logs_them(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), dualign_progress.Progress("samples", 40, every=0.0) as bar:
        bar.advance(10)
        bar.advance(30)
    told = [read_progress(record.message) for record in caplog.records]
    assert [(p.what, p.done, p.total, p.percent) for p in told if p] == [
        ("samples", 10, 40, 25.0),
        ("samples", 40, 40, 100.0),
    ]
    assert told[-1] is None, "the last line says how long it took"


@pytest.mark.parametrize(
    "line", ["", "left out 3 of 20 rows", "sft: 3 of 20", "resuming from step 3 of 20"]
)
def test_other_lines_tell_none(line: str) -> None:
    assert read_progress(line) is None

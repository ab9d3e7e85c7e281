"""Progress in a log: a line at the end, none where it is silenced, none after a failure."""

from __future__ import annotations

import logging

import pytest

from dualign.core.progress import Progress, quiet


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message.partition(" in ")[0] for record in caplog.records]


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualign.core.progress.watched", lambda: False)
    caplog.set_level(logging.INFO)


def count(what: str, total: int) -> None:
    with Progress(what, total, every=0.0) as progress:
        progress.advance(total)


def test_a_log_gets_a_line_by_time_and_one_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    count("scores", 3)
    assert [line.partition(",")[0] for line in lines(caplog)] == ["scores: 3 of 3", "scores: 3"]


def test_what_begins_inside_is_silent_and_what_begins_after_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Progress("outer", 1), quiet():
        count("inner", 2)
        with quiet():
            count("innermost", 2)
        count("inner still", 2)
    assert lines(caplog) == ["outer: 0"]
    count("after", 1)
    assert lines(caplog)[-1] == "after: 1"


def test_no_bar_is_drawn_where_it_is_silenced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dualign.core.progress.watched", lambda: True)
    with quiet():
        count("inner", 2)
    assert capsys.readouterr().err == ""
    count("outer", 2)
    assert "outer" in capsys.readouterr().err


def test_silence_ends_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError), quiet(), Progress("broken", 2):
        raise RuntimeError
    count("after", 1)
    assert lines(caplog)[-1] == "after: 1" and "broken: 0" not in lines(caplog)

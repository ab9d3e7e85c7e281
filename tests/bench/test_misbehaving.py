"""Nothing is lost of a judge whose endpoint misbehaves, and the page says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import misbehaving
from bench.misbehaving import Plan, Settings, answers, counted, main, right
from dualign.judging.verdicts import Verdict


def test_a_killed_run_goes_on_and_the_third_asks_only_what_failed(tmp_path: Path) -> None:
    few = ["--prompts", "60", "--policies", "1", "--kill-after", "10", "--hopeless", "0.1"]
    assert main([*few, "--out", str(tmp_path)]) == 0
    killed, second, third = json.loads((tmp_path / "misbehaving.json").read_text())["runs"]
    assert killed["kept"] >= 10 and second["saved"] >= killed["kept"]
    for row in (second, third):
        assert row["verdicts"] + row["failed"] == 60 and row["failed"] > 0
        assert row["lost"] == row["failures_counted_as_ties"] == row["wrong"] == 0
    assert second["kept"] == third["kept"] and third["came"] < 30
    assert "| goes on |" in (tmp_path / "misbehaving.md").read_text()


def test_what_is_no_good_is_counted() -> None:
    table = answers(Settings(prompts=4, policies=1))
    truth = right(table)
    (first, *_, last) = truth
    rows = [Verdict("it", "world", *key, 0, win=win) for key, win in truth.items()]
    wrong = Verdict("it", "world", *first, 0, win=0.75)
    tie = Verdict("it", "world", *last, 0, win=0.5, failure="refused")
    found = counted([wrong, *rows[1:-2], tie], truth)
    assert found == {
        "verdicts": 2, "failed": 1, "lost": 1, "failures_counted_as_ties": 1, "wrong": 1,
    }  # fmt: skip


def test_so_many_first_replies_go_amiss() -> None:
    plan = Plan(amiss=0.05, hopeless=0.01)
    deeds = [plan(f"question {i}", 0) for i in range(20_000)]
    assert sum(deed != "well" for deed in deeds) / 20_000 == pytest.approx(0.06, abs=0.01)
    assert set(deeds) == {"well", *misbehaving.DEEDS}
    assert {plan(f"question {i}", 1) for i in range(20_000)} == {"well", "refusal"}

"""Which answers are on the page, and that there are not too many."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualign.params.report import ReportParams
from dualign.report.page import write
from dualign.report.sections import answers
from dualign.report.sections.base import FinishedRun

Run = tuple[Path, ReportParams]


def test_an_answer_is_found_by_what_it_is(run: Run) -> None:
    root, params = run
    section = answers.section(FinishedRun(root, params.model_copy(update={"sample_prompts": 96})))
    assert section is not None
    for prompt in section.values["prompts"]:
        for answer in prompt["answers"]:
            over = answer["cost"] > params.limit
            unsafe = answer["cost"] > 0
            wanted = {"over" if over else "within", *(["unsafe"] if unsafe else [])}
            assert set(answer["kinds"]) - {"cut"} == wanted
            assert answer["folded"] or not unsafe


def test_the_page_holds_no_more_text_than_it_says(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, params = run
    params = params.model_copy(update={"sample_prompts": 96})
    whole = answers.section(FinishedRun(root, params))
    assert whole is not None and len(whole.values["prompts"]) == 96 and not whole.values["left_out"]
    monkeypatch.setattr(answers, "MOST", 20_000)
    section = answers.section(FinishedRun(root, params))
    assert section is not None
    prompts = section.values["prompts"]
    texts = [turn["content"] for prompt in prompts for turn in prompt["turns"]]
    texts += [answer["text"] for prompt in prompts for answer in prompt["answers"]]
    assert 10_000 < sum(map(len, texts)) <= 20_000
    assert section.values["left_out"] == 96 - len(prompts) > 0
    out = root / "reports/index.html"
    write(FinishedRun(root, params), out)
    told = f"{96 - len(prompts)} more prompts were wanted, but the page holds at most 20,000 char"
    assert told in out.read_text()

"""Whole and cut answers side by side on the page, from metrics as the stage judge writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from dualign.core.artifacts import write_json
from dualign.judging.verdicts import Verdict, summarise, table
from dualign.params.report import ReportParams
from dualign.report.page import write
from dualign.report.sections import stopped
from dualign.report.sections.base import FinishedRun

Run = tuple[Path, Any]


def judged(root: Path, *suites: str) -> dict[str, Any]:
    """The metrics of a judge by which cut answers are half as often unsafe."""
    found: pd.DataFrame = table(
        [
            Verdict("gpt", suite, policy, f"p{i}", 0, unsafe=i % (2 if "cut" in suite else 1) == 0)
            for suite in suites
            for policy in ("sft", "<b>ours</b>")
            for i in range(8)
        ]
    )
    told = summarise(found, {}, 0.95)
    content = {"judge": "gpt", "kind": "openai", "failures": {}, "agreement": None, "suites": told}
    write_json(root / "reports/metrics/judge/gpt.json", content)
    return told


def naming(params: ReportParams, *suites: str) -> ReportParams:
    """The params with that judge, its policies and these suites; the page reads no more of them."""
    names = {"judges": ["gpt"], "suites": suites, "policies": ["sft", "<b>ours</b>"]}
    return params.model_copy(update={key: dict.fromkeys(of, "sft") for key, of in names.items()})


def test_without_stop_words_there_is_no_such_section(run: Run) -> None:
    params = naming(run[1], "tea", "cups")
    assert stopped.section(FinishedRun(run[0], params)) is None
    judged(run[0], "tea", "cups")
    assert stopped.section(FinishedRun(run[0], params)) is None


def test_each_score_stands_whole_and_cut_in_a_row(run: Run) -> None:
    root, params = run
    told = judged(root, "tea", "tea (cut)", "cups")
    section = stopped.section(FinishedRun(root, naming(params, "tea", "cups")))
    assert section is not None
    rows = section.values["stopped"]
    assert [(row["suite"], row["policy"], row["score"]) for row in rows] == [
        ("tea", "<b>ours</b>", "unsafe"),
        ("tea", "sft", "unsafe"),
    ]
    assert rows[1]["whole"]["mean"] == told["tea"]["sft"]["unsafe"]["mean"] == 1.0
    assert rows[1]["cut"]["mean"] == told["tea (cut)"]["sft"]["unsafe"]["mean"] == 0.5


def test_what_params_no_longer_name_is_passed_by(run: Run) -> None:
    """A judge that was taken out leaves its metrics, and a suite that was its answers."""
    root, params = run
    judged(root, "tea", "tea (cut)", "cups", "cups (cut)")
    named = naming(params, "tea")
    section = stopped.section(FinishedRun(root, named))
    assert section is not None and {row["suite"] for row in section.values["stopped"]} == {"tea"}
    one = named.model_copy(update={"policies": {"sft": "sft"}})
    section = stopped.section(FinishedRun(root, one))
    assert section is not None and {row["policy"] for row in section.values["stopped"]} == {"sft"}
    none = named.model_copy(update={"judges": {}})
    assert stopped.section(FinishedRun(root, none)) is None


def test_the_page_shows_them_as_text(run: Run) -> None:
    root, params = run
    judged(root, "tea", "tea (cut)")
    write(FinishedRun(root, naming(params, "tea")), root / "reports/index.html")
    html = (root / "reports/index.html").read_text()
    part = html[html.index('<table class="stopped">') :].partition("</table>")[0]
    assert 'href="#stopped"' in html and part.count("<tr>") == 1 + 2
    assert "&lt;b&gt;ours&lt;/b&gt;" in part and "50" in part and "<b>" not in part

"""Results of other harnesses on the page, from files that these tools wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dualign.core.artifacts import write_json
from dualign.core.errors import DataError
from dualign.evaluation.harness import main
from dualign.report.page import write
from dualign.report.sections import harness
from dualign.report.sections.base import FinishedRun
from tests.evaluation.test_harness import INSPECT, LM_EVAL

Run = tuple[Path, Any]
HOSTILE = "<script>alert(1)</script>"


def imported(root: Path, *files: Path) -> None:
    assert main([*map(str, files), "--out", str(root / "reports/harness")]) == 0


def test_without_imports_there_is_no_such_section(run: Run) -> None:
    assert harness.section(FinishedRun(*run)) is None


def test_each_metric_is_a_row_of_the_page(run: Run) -> None:
    root, params = run
    imported(root, LM_EVAL, INSPECT)
    section = harness.section(FinishedRun(root, params))
    assert section is not None
    shown = [row["metric"].metric for row in section.values["results"]]
    assert shown == ["includes, accuracy", "acc", "acc_norm"]
    write(FinishedRun(root, params), root / "reports/index.html")
    html = (root / "reports/index.html").read_text()
    table = html[html.index('<table class="harness">') :].partition("</table>")[0]
    assert table.count("<tr>") == 1 + 3 and 'href="#harness"' in html
    assert '<span class="value">0.33</span><span class="ends">± 0.14</span>' in table
    assert "lm-eval 0.4.13" in table and "models/aligned/dualign" in table


def test_a_model_named_as_markup_is_shown_as_text(run: Run, tmp_path: Path) -> None:
    root, params = run
    content = json.loads(LM_EVAL.read_text()) | {"model_name": HOSTILE}
    write_json(tmp_path / "hostile.json", content)
    imported(root, tmp_path / "hostile.json")
    write(FinishedRun(root, params), root / "reports/index.html")
    html = (root / "reports/index.html").read_text()
    assert HOSTILE not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_a_record_of_another_form_is_refused_by_its_file(run: Run) -> None:
    root, params = run
    write_json(root / "reports/harness/mine.json", {"harness": "mine"})
    with pytest.raises(DataError, match=r"reports/harness/mine\.json: version: field required"):
        harness.section(FinishedRun(root, params))

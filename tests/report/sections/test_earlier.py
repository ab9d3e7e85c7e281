"""What changed since an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scipy.stats import norm

from dualign.core.artifacts import write_json
from dualign.core.errors import DataError
from dualign.core.records import EarlierRun, as_row
from dualign.params.report import ReportParams
from dualign.report.page import write
from dualign.report.sections import earlier
from dualign.report.sections.base import FinishedRun
from tests.report.conftest import shown

Run = tuple[Path, ReportParams]


def kept(run: Run) -> dict[str, Any]:
    """This run as an earlier one."""
    finished = FinishedRun(*run)
    record = EarlierRun(
        name="HEAD~1",
        commit="0123456789abcdef",
        date="2026-11-30",
        comparison=finished.comparison,
        stages=finished.provenance,
    )
    row: dict[str, Any] = as_row(record)
    return row


def values(run: Run, row: dict[str, Any]) -> dict[str, Any]:
    """What the section shows beside this earlier run."""
    write_json(run[0] / "reports/earlier/run.json", row)
    return shown(earlier.section(FinishedRun(*run)))


def page(run: Run) -> str:
    """The text of the whole page."""
    write(FinishedRun(*run), run[0] / "index.html")
    return (run[0] / "index.html").read_text()


def test_a_run_that_stands_alone_has_no_such_section(run: Run) -> None:
    (run[0] / "reports/earlier").mkdir()
    (run[0] / "reports/earlier/README.md").write_text("It stands in every checkout.")
    assert earlier.section(FinishedRun(*run)) is None


def test_beside_itself_nothing_changed(run: Run) -> None:
    found = values(run, kept(run))
    assert not found["settings"] and not any(found["stages"].values())
    assert not any(found["names"].values())
    cells = [cell for row in found["changes"] for cell in row["cells"].values()]
    assert len(cells) == found["tests"] > 40
    assert {(cell["mean"], cell["standing"]) for cell in cells} == {(0.0, "")}
    html = page(run)
    assert "Every stage ran with the same params and versions." in html
    assert (
        "The policy to take is the same" in html and "→" not in html.split('id="earlier"')[1][:900]
    )


def test_a_change_is_told_with_its_sign_and_marked_where_chance_does_not_make_it(run: Run) -> None:
    row = kept(run)
    policies = row["comparison"]["policies"]
    for key in ("mean", "low", "high"):
        policies["sacpo"]["cost"][key] += 5.0
        policies["caid"]["reward"][key] += 1e-3
    policies["sacpo"]["standing"] = "over"
    row["comparison"]["recommended"] = None
    found = {policy["name"]: policy for policy in values(run, row)["changes"]}
    cost = found["sacpo"]["cells"]["cost"]
    assert cost["mean"] == pytest.approx(-5.0) and cost["standing"] == "better"
    assert found["caid"]["cells"]["reward"]["standing"] == ""
    html = page(run)
    section = html.split('<section id="earlier">')[1].split("</section>")[0]
    assert "The policy to take was <b>none</b> and is <b>caid" in section
    assert '<span class="badge over">over</span>\n → <span class="badge' in section
    assert "−5.00" in section and "✓" in section


def test_a_run_at_another_confidence_is_no_surer_of_a_change(run: Run) -> None:
    row = kept(run)
    row["comparison"]["policies"]["caid"]["reward"]["mean"] -= 0.4
    expected = values(run, row)
    narrower = norm.ppf(0.75) / norm.ppf(0.975)
    for policy in row["comparison"]["policies"].values():
        for measure in (policy[key] for key in ("reward", "cost", "p_unsafe", "kl", "length")):
            for end in ("low", "high"):
                measure[end] = measure["mean"] + (measure[end] - measure["mean"]) * narrower
    row["comparison"]["confidence"] = 0.5
    found = values(run, row)
    for ours, theirs in zip(found["changes"], expected["changes"], strict=True):
        for key in ("reward", "cost"):
            cell, other = ours["cells"][key], theirs["cells"][key]
            assert (cell["low"], cell["high"]) == pytest.approx((other["low"], other["high"]))


def test_params_stages_and_policies_of_one_run_alone_are_told(run: Run) -> None:
    row = kept(run)
    row["stages"][0]["params"] = {"lines": 1, "text": "<b>bold</b>"}
    row["stages"].append({**row["stages"][0], "stage": "score"})
    row["comparison"]["policies"]["older"] = row["comparison"]["policies"].pop("caid")
    found = values(run, row)
    assert found["names"] == {"come": ["caid"], "gone": ["older"]}
    assert found["stages"]["gone"] == ["score"]
    assert {setting.key for setting in found["settings"]} >= {"lines", "text"}
    html = page(run)
    assert "Policies of the earlier run alone: older." in html
    assert "Stages of the earlier run alone: score." in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html and "<b>bold</b>" not in html


def test_no_policy_of_both_runs_is_told_too(run: Run) -> None:
    row = kept(run)
    row["comparison"]["policies"] = {"older": row["comparison"]["policies"]["sft"]}
    assert values(run, row)["changes"] == []
    assert "No policy was evaluated in both runs." in page(run)


@pytest.mark.parametrize("key", ["comparison", "stages"])
def test_a_file_that_lacks_a_key_is_named_with_its_remedy(run: Run, key: str) -> None:
    row = kept(run)
    del row[key]
    with pytest.raises(DataError, match=rf"run\.json: {key}: field required.* dualign since REVIS"):
        values(run, row)

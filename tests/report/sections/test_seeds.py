"""The spread over seeds: this run beside comparisons of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as t_distribution

from dualign.core.artifacts import read_json, write_json
from dualign.core.errors import DualignError
from dualign.core.records import as_row
from dualign.params.report import ReportParams
from dualign.report.comparison import compare
from dualign.report.page import write
from dualign.report.sections import seeds
from dualign.report.sections.base import FinishedRun
from tests.report.conftest import LIMIT, shown

Run = tuple[Path, ReportParams]


def keep(run: Run, name: str, shift: float = 0.0, **changes: Any) -> dict[str, Any]:
    """Put a comparison beside the run in which all costs of methods are higher by `shift`."""
    root, params = run
    other = as_row(compare(root, params)) | changes
    for policy, row in other["policies"].items():
        if policy != "sft":
            row["cost"] = {key: value + shift for key, value in row["cost"].items()}
    write_json(root / f"reports/seeds/{name}.json", other)
    return read_json(root / f"reports/seeds/{name}.json")


def test_without_other_runs_there_is_no_such_section(run: Run) -> None:
    (run[0] / "reports/seeds").mkdir()
    (run[0] / "reports/seeds/README.md").write_text("It stands in every checkout.")
    assert seeds.section(FinishedRun(*run)) is None


def test_the_interval_is_students_over_runs(run: Run) -> None:
    others = [keep(run, "8", 0.3), keep(run, "9", -0.1)]
    values = shown(seeds.section(FinishedRun(*run)))
    assert values["others"] == ["8", "9"] and values["runs"] == 3 and not values["refused"]
    rows = {row["name"]: row for row in values["spread"]}
    own = FinishedRun(*run).comparison.policies
    means = [own["dualign"].cost.mean, *(c["policies"]["dualign"]["cost"]["mean"] for c in others)]
    reach = t_distribution.ppf(0.975, 2) * np.std(means, ddof=1) / np.sqrt(3)
    cost = rows["dualign"]["spread"]["cost"]
    assert cost.mean == pytest.approx(np.mean(means))
    assert (cost.low, cost.high) == pytest.approx((np.mean(means) - reach, np.mean(means) + reach))
    gain = rows["dualign"]["gains"]["cost"]
    reference = own["sft"].cost.mean
    assert gain.mean == pytest.approx(np.mean(means) - reference)
    assert rows["sft"]["gains"] == {} and rows["dualign"]["there"] == 3


@pytest.mark.parametrize("key", ["cost", "p_unsafe"])
def test_the_interval_is_at_the_level_of_the_params(run: Run, key: str) -> None:
    root, params = run
    keep(run, "8", 0.3)
    wide, narrow = (
        shown(seeds.section(FinishedRun(root, params.model_copy(update={"confidence": level}))))
        for level in (0.95, 0.8)
    )
    for at, other in zip(narrow["spread"], wide["spread"], strict=True):
        inner, outer = at["spread"][key], other["spread"][key]
        if key == "cost" and at["name"] == "sft":  # the same in both runs: no spread to go by
            assert inner.low is inner.high is outer.low is outer.high is None
            continue
        assert outer.low < inner.low < inner.mean < inner.high < outer.high


def test_a_policy_that_another_run_lacks_is_counted_where_it_is(run: Run) -> None:
    other = keep(run, "11", 0.1)
    del other["policies"]["sacpo"]
    write_json(run[0] / "reports/seeds/11.json", other)
    keep(run, "9", 0.2)
    assert shown(seeds.section(FinishedRun(*run)))["others"] == ["9", "11"]
    rows = {row["name"]: row for row in shown(seeds.section(FinishedRun(*run)))["spread"]}
    assert rows["sacpo"]["there"] == 2 and rows["caid"]["there"] == 3
    write(FinishedRun(*run), run[0] / "index.html")
    assert "sacpo is there in 2 of 3 runs" in (run[0] / "index.html").read_text()


def test_the_run_itself_counts_once(run: Run) -> None:
    keep(run, "7")
    assert seeds.section(FinishedRun(*run)) is None
    keep(run, "8", 0.1)
    assert shown(seeds.section(FinishedRun(*run)))["others"] == ["8"]


def test_a_copy_of_another_run_counts_once_and_is_told(run: Run) -> None:
    keep(run, "8", 0.1)
    keep(run, "9", 0.1)
    values = shown(seeds.section(FinishedRun(*run)))
    assert values["others"] == ["8"] and values["runs"] == 2
    assert values["refused"] == ["9.json has the results of 8.json"]


def test_runs_of_another_question_are_left_out_and_told(run: Run) -> None:
    keep(run, "8", 0.1)
    keep(run, "loose", 0.1, limit=LIMIT - 1)
    other = keep(run, "other", 0.1)
    other["policies"]["sacpo"]["folder"] = "aligned/mine"
    write_json(run[0] / "reports/seeds/other.json", other)
    values = shown(seeds.section(FinishedRun(*run)))
    assert values["others"] == ["8"]
    assert values["refused"] == [
        "loose.json has limit −1.15", "other.json has aligned/mine for policy sacpo"
    ]  # fmt: skip
    out = run[0] / "index.html"
    write(FinishedRun(*run), out)
    html = out.read_text()
    assert "loose.json has limit −1.15" in html and "cost in each run against the limit" in html


def test_a_run_of_other_params_is_left_out_and_its_stages_are_named(run: Run) -> None:
    own = FinishedRun(*run).comparison.params
    assert set(own) == {"sft", "prepare", "dual_search/dualign"}
    keep(run, "8", 0.1)
    keep(run, "more", 0.2, params=own | {"evaluate/sft": "another stage"})
    keep(run, "other", 0.1, params=own | {"sft": "another"})
    keep(run, "others", 0.1, params=dict.fromkeys((*own, "score"), "another") | {"score": "same"})
    values = shown(seeds.section(FinishedRun(*run)))
    assert values["others"] == ["8", "more"]
    assert values["refused"] == [
        "other.json has other params for sft",
        "others.json has other params for dual_search/dualign, prepare, sft",
    ]


@pytest.mark.parametrize("key", ["params", "policies"])
def test_a_file_that_lacks_a_key_is_named(run: Run, key: str) -> None:
    """Of an older release, say."""
    other = keep(run, "8", 0.1)
    del other[key]
    write_json(run[0] / "reports/seeds/8.json", other)
    with pytest.raises(DualignError, match=rf"8\.json: {key}: field required"):
        seeds.section(FinishedRun(*run))

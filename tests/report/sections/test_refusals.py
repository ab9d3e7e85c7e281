"""Refusals of safe prompts against harm on unsafe ones."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from dualign.core.artifacts import write_parquet
from dualign.core.schema import SUITE, VERDICTS
from dualign.params.report import ReportParams
from dualign.report.sections import refusals
from dualign.report.sections.base import FinishedRun
from tests.report.conftest import shown, verdicts

Run = tuple[Path, ReportParams]


def test_where_nothing_was_judged_there_is_no_such_section(run: Run) -> None:
    assert refusals.section(FinishedRun(*run)) is None


def test_refusals_of_safe_prompts_stand_against_harm_on_unsafe_ones(judged: Run) -> None:
    (figure,) = shown(refusals.section(FinishedRun(*judged)))["figures"]
    assert (figure["suite"], figure["judge"], figure["by"]) == ("asked", "refusal", "ours")
    points = {point.label: point for point in figure["points"]}
    run = FinishedRun(*judged)
    label = run.verdicts.set_index(["judge", "policy"])["label"]
    assert set(label) == {"safe", "unsafe", ""}
    for name in ("sft", "dualign", "safety_only"):
        rows = run.verdicts[run.verdicts["policy"] == name]
        safe = rows[(rows["judge"] == "refusal") & (rows["label"] == "safe")]
        unsafe = rows[(rows["judge"] == "ours") & (rows["label"] == "unsafe")]
        assert points[name].mean == pytest.approx((safe["refused"].mean(), unsafe["unsafe"].mean()))
    assert 'aria-label="harm against over-refusal of every policy"' in figure["wide"]


def test_where_nobody_judges_harm_it_is_whether_unsafe_prompts_are_answered(judged: Run) -> None:
    root, params = judged
    alone = params.model_copy(update={"judges": {"refusal": params.judges["refusal"]}})
    (figure,) = shown(refusals.section(FinishedRun(root, alone)))["figures"]
    rows = FinishedRun(root, alone).verdicts
    own = rows[(rows["policy"] == "dualign") & (rows["label"] == "unsafe")]
    point = next(point for point in figure["points"] if point.label == "dualign")
    assert figure["what"] == "answered" and point.y.mean == pytest.approx(1 - own["refused"].mean())


def test_safe_and_unsafe_prompts_may_be_suites_of_their_own(judged: Run) -> None:
    """OR-Bench has its toxic prompts in another file."""
    root, params = judged
    for label in ("safe", "unsafe"):
        folder = root / "reports/answers" / f"only_{label}"
        suite = pd.read_parquet(root / "reports/answers/asked/_suite.parquet")
        kept = suite[suite["label"] == label]
        write_parquet(folder / "_suite.parquet", kept, SUITE)
    for judge in ("ours", "refusal"):
        own = verdicts(judged, judge)
        suite = pd.read_parquet(root / "reports/answers/asked/_suite.parquet")
        labels = suite.set_index("prompt_id")["label"]
        named = "only_" + labels.loc[own["prompt_id"]].to_numpy()
        path = root / f"reports/judgements/{judge}/verdicts.parquet"
        write_parquet(path, own.assign(suite=named), VERDICTS)
    spec = params.suites["asked"]
    split = params.model_copy(update={"suites": {"only_safe": spec, "only_unsafe": spec}})
    (figure,) = shown(refusals.section(FinishedRun(root, split)))["figures"]
    assert (figure["suite"], figure["other"]) == ("only_safe", "only_unsafe")

"""Unsafe answers by category, from tables that have such a column and from those that have none."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from dualign.core.artifacts import write_parquet
from dualign.core.schema import ANSWERS
from dualign.params.report import ReportParams
from dualign.report.page import write
from dualign.report.sections import categories
from dualign.report.sections.base import FinishedRun
from tests.report.conftest import shown

Run = tuple[Path, ReportParams]
SCHEMA = pa.schema([*ANSWERS, ("category", pa.string())])
HOSTILE = "<script>alert(1)</script>"


def categorise(root: Path, policy: str) -> pd.DataFrame:
    """Give the prompts of a policy's answers a category by what they ask; some have none."""
    path = root / "reports/evaluation" / policy / "answers.parquet"
    answers = pd.read_parquet(path)
    asked = answers["prompt"].map(lambda prompt: prompt[0]["content"])
    answers["category"] = None
    for word, kind in {"egg": "cooking", "bleach": HOSTILE, "poison": "animals"}.items():
        answers.loc[asked.str.contains(word), "category"] = kind
    write_parquet(path, answers, SCHEMA)
    return answers


def test_without_categories_there_is_no_such_section(run: Run) -> None:
    assert categories.section(FinishedRun(*run)) is None


def test_shares_by_category_are_those_of_its_answers(run: Run) -> None:
    root, params = run
    answers = categorise(root, "caid")
    categorise(root, "sft")
    section = categories.section(FinishedRun(root, params))
    assert section is not None and section.values["tables"][0]["judged"] == ["caid", "sft"]
    rows = {row["name"]: row for row in section.values["tables"][0]["categories"]}
    assert list(rows) == [HOSTILE, "animals", "cooking"]
    animals = answers[answers["category"] == "animals"]
    expected = (animals["cost"] > 0).groupby(animals["prompt_id"]).mean()
    share = rows["animals"]["shares"]["caid"]
    assert rows["animals"]["prompts"] == animals["prompt_id"].nunique() == 16
    assert share.mean == pytest.approx(expected.mean())
    assert 0 <= share.low < share.mean < share.high <= 1
    cooking = rows["cooking"]["shares"]["caid"]
    assert cooking.low < cooking.high, "also where the answers are all alike"


def test_categories_are_on_the_page_as_text(run: Run) -> None:
    root, params = run
    categorise(root, "caid")
    out = root / "reports/index.html"
    write(FinishedRun(root, params.model_copy(update={"sample_prompts": 96})), out)
    html = out.read_text()
    assert 'id="categories"' in html and 'href="#categories"' in html
    assert HOSTILE not in html and "&lt;script&gt;alert(1)&lt;/script&gt;</th>" in html
    bars = html[html.index('class="categories') :].count('class="bar" style="width:')
    assert bars == 3
    assert html.count('badge plain">cooking') == 16 and 'badge plain">nan' not in html


def test_one_prompt_has_a_share_without_ends(run: Run) -> None:
    root, params = run
    answers = categorise(root, "caid")
    first = (
        answers["prompt_id"] == answers.loc[answers["category"] == "cooking", "prompt_id"].iloc[0]
    )
    only = answers.assign(category=["rare" if one else None for one in first])
    write_parquet(root / "reports/evaluation/caid/answers.parquet", only, SCHEMA)
    section = categories.section(FinishedRun(root, params))
    assert section is not None
    (row,) = section.values["tables"][0]["categories"]
    assert (row["name"], row["prompts"]) == ("rare", 1)
    assert row["shares"]["caid"].low is None


def test_categories_of_a_suite_are_told_by_every_judge(judged: Run) -> None:
    tables = shown(categories.section(FinishedRun(*judged)))["tables"]
    assert [table["what"] for table in tables] == ["unsafe answers by ours", "refusals by refusal"]
    rows = {row["name"]: row for row in tables[1]["categories"]}
    assert len(rows) == 4 and rows["homonyms"]["prompts"] == 12
    run = FinishedRun(*judged)
    own = run.verdicts[
        (run.verdicts["judge"] == "refusal") & (run.verdicts["policy"] == "safety_only")
    ]
    expected = own.loc[own["category"] == "homonyms", "refused"].mean()
    assert rows["homonyms"]["shares"]["safety_only"].mean == pytest.approx(expected)

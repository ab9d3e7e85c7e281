"""What lm-eval is asked, and how its answers are put beside ours."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.truthful import alike, chosen, compared, differing, main, write_tasks
from dualign.core.errors import DualignError
from dualign.evaluation.suites import read_suite
from dualign.params.evaluate import SuiteSpec

MC1 = {"No.": 1, "Yes.": 0}
MC2 = {"No.": 1, "Never.": 1, "Yes.": 0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"question": f"Is it {what}?", "mc1_targets": MC1, "mc2_targets": MC2}
        for what in ("red", "blue", "green")
    ]
    (tmp_path / "mc_task.json").write_text(json.dumps(rows))
    return tmp_path


def test_lm_eval_is_given_the_same_items_in_the_hubs_form(data: Path) -> None:
    suites = chosen(data, 2)
    write_tasks(data, Path("/lm_eval/tasks/truthfulqa"), suites)
    for targets, frame in suites.items():
        again: Any = {"path": "items.jsonl", "prompts": None, "samples_per_prompt": 1}
        spec = SuiteSpec(suite=f"truthfulqa_{targets}", **again)  # type: ignore[arg-type]
        assert read_suite(spec, data).to_dict("list") == frame.to_dict("list")
        task = json.loads((data / f"local_{targets}.yaml").read_text())
        assert task["include"] == f"/lm_eval/tasks/truthfulqa/truthfulqa_{targets}.yaml"
        assert task["dataset_kwargs"]["data_files"]["validation"] == str(data / "items.jsonl")


def test_the_largest_differences_are_found() -> None:
    ours = [{"logp": [-1.0, -2.0], "score": 1.0}, {"logp": [-3.0, -1.0], "score": 0.0}]
    theirs = [{"logp": [-1.0, -2.5], "score": 1.0}, {"logp": [-3.0, -0.9], "score": 0.25}]
    assert compared(ours, theirs) == {
        "items": 2,
        "choices": 4,
        "score": 0.5,
        "score_lm_eval": 0.625,
        "largest_difference_of_score": 0.25,
        "largest_difference_of_logp": 0.5,
    }


def test_an_item_differs_where_one_of_its_scores_does() -> None:
    ours = {"mc1": [{"score": 1.0}] * 3, "mc2": [{"score": 0.5}] * 3}
    theirs = {
        "mc1": [{"score": 1.0}, {"score": 0.0}, {"score": 1.0}],
        "mc2": [{"score": 0.5 + 9e-7}, {"score": 0.5}, {"score": 0.5 - 2e-6}],
    }
    assert differing(ours, theirs) == [1, 2]
    assert differing(ours, ours) == []


def test_without_a_model_scores_are_compared_and_other_ids_are_counted(data: Path) -> None:
    suite = chosen(data, 2)["mc2"]
    logp = [-1.0, -2.0, -3.0, -3.0, -2.0, -1.0]
    false = [
        math.exp(-2) / (1 + math.exp(-1) + math.exp(-2)),
        1 / (1 + math.exp(-1) + math.exp(-2)),
    ]
    true = [1 - share for share in false]  # the last choice of each is the false one
    found = alike("mc2", suite, logp, [{"logp": [], "score": score} for score in true])
    assert found["same_ids"] == found["choices"] == 6 and found["items"] == 2
    assert found["largest_difference_of_score"] < 1e-12
    off = [{"logp": [], "score": score} for score in (true[0], true[1] + 0.25)]
    assert alike("mc2", suite, logp, off)["largest_difference_of_score"] == pytest.approx(0.25)
    assert alike("mc2", suite, [math.nan, *logp[1:]], off)["same_ids"] == 5


def test_a_suite_without_a_number_is_the_whole_of_it(data: Path) -> None:
    assert [len(frame) for frame in chosen(data, None).values()] == [3, 3]


@pytest.mark.parametrize("python", [sys.executable, "no/such/python"])
def test_an_interpreter_without_lm_eval_is_told_before_anything_is_read(
    python: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["no/such/model", "--python", python, "--data", str(data)])
    assert ended.value.code == DualignError.status
    assert f"--python {python}: no interpreter with lm-eval" in capsys.readouterr().err

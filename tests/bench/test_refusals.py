"""The laboratory of refusals on a small copy of XSTest's folders."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench.refusals import crosswise, left_out, main, read
from dualign.evaluation.agreement import agreement
from dualign.evaluation.refusals import (
    fit,
    read_labelled,
    refusal_probability,
    refused,
    refuses_by_rules,
)

REAL = Path(os.environ.get("DUALIGN_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))
WORDS = ("red", "blue", "green", "round", "flat")


def write(path: Path, header: list[str], rows: list[list[str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two models that refuse ten of twenty prompts; of GPT-4's labels the first is wrong."""
    header = ["id", "type", "prompt", "completion", "annotation_1", "annotation_2", "final_label"]
    for model in ("one", "two"):
        rows = []
        for number in range(20):
            no = number // 2 % 2 == 0
            word = WORDS[number % 5]
            text = f"I cannot help with {word}." if no else f"Gladly, here is {word}."
            label = "2_full_refusal" if no else "1_full_compliance"
            rows.append([f"v2-{number}", "x", f"q{number}", text, label, label, label])
        stem = f"xstest_v2_completions_{model}"
        write(tmp_path / "model_completions" / f"{stem}.csv", header, rows)
        labels = [[*row, row[-1]] for row in rows]
        labels[0][-1] = "1_full_compliance"
        folder = tmp_path / "automated_evaluation_labels"
        write(folder / f"{stem}_gpteval.csv", [*header, "gpt4_label"], labels)
    return tmp_path


def test_every_judge_is_put_beside_people(repository: Path, tmp_path: Path) -> None:
    assert main(["--data", str(repository), "--folds", "2", "--out", str(tmp_path / "out")]) == 0
    judges = json.loads((tmp_path / "out" / "refusals.json").read_text())["judges"]
    assert judges["rules"]["all"]["kappa"] == 1.0
    assert judges["classifier, prompts left out"]["all"]["kappa"] == 1.0
    assert judges["XSTest's GPT-4"]["all"]["confusion"] == [[20, 0], [2, 18]]
    assert "XSTest's string match" not in judges
    page = (tmp_path / "out" / "refusals.md").read_text()
    assert "40 answers to 20 prompts" in page


def test_a_model_that_is_left_out_is_judged_by_the_others(repository: Path) -> None:
    data = read(repository)
    assert ((left_out(data, 2) > 0.5) == refused(data)).all()


def test_no_prompt_is_judged_by_what_was_fitted_to_it() -> None:
    """Labels by coin and a word for each prompt: whoever had seen the prompt would know."""
    generator = np.random.default_rng(0)
    coin = np.repeat(generator.integers(0, 2, 40), 4)
    number = np.repeat(np.arange(40), 4)
    labelled = pd.DataFrame(
        {
            "prompt": number.astype(str),
            "response": [f"word{n} word{n} word{n}" for n in number],
            "label": np.where(coin == 1, "refusal", "compliance"),
        }
    )
    inside = refusal_probability(fit(labelled), labelled["response"].tolist()) > 0.5
    outside = crosswise(labelled, folds=5) > 0.5
    assert (inside == coin).mean() > 0.95
    assert (outside == coin).mean() < 0.75


def test_people_agree_with_both_on_genuine_answers() -> None:
    path = REAL / "xstest/xstest_v2_completions_llama2orig_gpteval.csv"
    if not path.is_file():
        pytest.skip(f"real rows are not here: {path} (set DUALIGN_REAL_DATA)")
    data = read_labelled(path)
    human = refused(data).tolist()
    rules = [refuses_by_rules(text) for text in data["response"]]
    fitted = (crosswise(data, folds=3) > 0.5).tolist()
    prompts = data["prompt"].tolist()
    assert agreement(human, rules, prompts, draws=1).kappa > 0.7
    assert agreement(human, fitted, prompts, draws=1).kappa > 0.75


def test_a_folder_without_answers_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(tmp_path)]) == 2
    assert "no file xstest_v2_completions_MODEL.csv" in capsys.readouterr().err

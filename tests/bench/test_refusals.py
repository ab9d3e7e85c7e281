"""The laboratory of refusals on a small copy of XSTest's folders."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bench.refusals import left_out, main, read
from dualign.evaluation.refusals import refused

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


def test_a_folder_without_answers_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(tmp_path)]) == 2
    assert "no file xstest_v2_completions_MODEL.csv" in capsys.readouterr().err

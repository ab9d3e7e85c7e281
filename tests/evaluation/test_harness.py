"""Results of other harnesses, read from files that these tools wrote: lm-evaluation-harness 0.4.13
and Inspect 0.3.285 on a policy of some 30,000 random weights, with the tasks of bench/harness.

Of the first what it tells of the machine was taken out (`pretty_env_info`); the second was made
with --no-log-samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dualign.core.artifacts import read_json
from dualign.core.errors import DataError
from dualign.evaluation.harness import main, read_imported, read_results

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = Path(__file__).with_name("harness")
LM_EVAL = WRITTEN / "lm_eval.json"
INSPECT = WRITTEN / "inspect.json"


def edited(file: Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy of a file with other values at its top."""
    copy = tmp_path / file.name
    copy.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return copy


def test_lm_eval_tells_each_metric_with_its_error() -> None:
    (record,) = read_results(LM_EVAL)
    assert (record.harness, record.version, record.task) == ("lm-eval", "0.4.13", "plain_questions")
    assert record.model == "models/aligned/dualign" and record.created.startswith("2026-11-28T")
    told = json.loads(LM_EVAL.read_text())["results"]["plain_questions"]
    assert [row.metric for row in record.rows] == ["acc", "acc_norm"]
    for row in record.rows:
        assert row.value == told[f"{row.metric},none"]
        assert row.error == told[f"{row.metric}_stderr,none"]
        assert row.items == row.total == 12


def test_inspect_tells_each_scorer_with_its_error() -> None:
    (record,) = read_results(INSPECT)
    assert (record.harness, record.version, record.task) == (
        "inspect", "0.3.285", "plain_questions",
    )  # fmt: skip
    assert record.model == "models/aligned/dualign", "the folder, not the name that was made up"
    (row,) = record.rows
    metrics = json.loads(INSPECT.read_text())["results"]["scores"][0]["metrics"]
    assert row.metric == "includes, accuracy" and row.value == metrics["accuracy"]["value"]
    assert row.error == metrics["stderr"]["value"] and row.items == row.total == 12


def test_inspect_tells_each_reducer_of_epochs_and_older_versions_no_count(tmp_path: Path) -> None:
    results = json.loads(INSPECT.read_text())["results"]
    (score,) = results["scores"]
    counted = score.pop("scored_samples")
    of_each = [score | {"reducer": name} for name in ("mean", "max")]
    file = edited(INSPECT, tmp_path, results=results | {"scores": of_each})
    (record,) = read_results(file)
    assert [row.metric for row in record.rows] == [
        "includes, accuracy (mean)",
        "includes, accuracy (max)",
    ]
    assert [row.items for row in record.rows] == [None, None] and counted == record.rows[0].total


@pytest.mark.parametrize("given", ["", None, "pretrained=models/sft,peft=models/ours,dtype=float"])
def test_arguments_may_be_those_of_the_command_line(tmp_path: Path, given: str | None) -> None:
    """As older versions of lm-evaluation-harness write them."""
    named = json.loads(LM_EVAL.read_text())["model_name"]
    (record,) = read_results(edited(LM_EVAL, tmp_path, config={"model_args": given}))
    assert record.model == ("models/ours" if given else named)


def test_an_adapter_is_the_model_and_a_part_of_the_items_is_told(tmp_path: Path) -> None:
    config = {"model_args": {"pretrained": "models/sft", "peft": "models/aligned/ours/adapter"}}
    counts = {"plain_questions": {"original": 450, "effective": 12}}
    results = {
        "plain_questions": {
            "alias": "plain", "acc,strict": 0.5, "acc_stderr,strict": "N/A", "f1,none": None,
        },
        "group": {"acc,none": 0.25, "acc_stderr,none": 0.1},
    }  # fmt: skip
    file = edited(LM_EVAL, tmp_path, config=config, results=results, **{"n-samples": counts})
    task, group = read_results(file)
    assert task.name == "lm_eval-aligned_ours_adapter-plain_questions"
    strict, none = task.rows
    assert (strict.metric, strict.error, strict.items, strict.total) == (
        "acc (strict)",
        None,
        12,
        450,
    )
    assert none.value is None and group.rows[0].items is None


def test_a_folder_below_this_one_is_told_by_its_path_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = str(tmp_path / "models/sft")
    assert read_results(edited(LM_EVAL, tmp_path, model_name=name))[0].model == "models/sft"
    assert read_results(edited(LM_EVAL, tmp_path, model_name="/else"))[0].model == "/else"


def test_an_import_writes_a_file_for_each_task_and_a_later_one_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(LM_EVAL), str(INSPECT)]) == 0
    names = ["inspect-aligned_dualign-plain_questions", "lm_eval-aligned_dualign-plain_questions"]
    assert [path.stem for path in sorted(Path("reports/harness").iterdir())] == names
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"reports/harness/{names[1]}.json: acc 0.3333, acc_norm 0.1667"
    results = {"plain_questions": {"acc,none": 0.5}}
    assert main([str(edited(LM_EVAL, tmp_path, results=results))]) == 0
    inspect, lm_eval = read_imported(tmp_path)
    assert inspect == read_results(INSPECT)[0]
    assert [row.value for row in lm_eval.rows] == [0.5]
    assert read_json(f"reports/harness/{names[1]}.json")["rows"][0]["error"] is None


def test_a_model_of_a_long_name_has_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"me/{'long' * 100}-{end}" for end in "ab"]
    for name in names:
        assert main([str(edited(LM_EVAL, tmp_path, model_name=name, config={}))]) == 0
    assert [record.model for record in read_imported(tmp_path)] == names


def test_two_results_of_one_name_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 0 and of 5 examples, say: the later would take the place of the earlier."""
    monkeypatch.chdir(tmp_path)
    other = edited(LM_EVAL, tmp_path, results={"plain_questions": {"acc,none": 0.5}})
    assert main([str(LM_EVAL), str(other)]) == 2
    assert "plain_questions of models/aligned/dualign has other results" in capsys.readouterr().err
    assert not Path("reports").exists()
    assert main([str(LM_EVAL), str(LM_EVAL)]) == 0


def test_results_of_another_model_under_the_same_name_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file name has few signs: `me/a` and `me_a` are one in it."""
    monkeypatch.chdir(tmp_path)
    assert main([str(edited(LM_EVAL, tmp_path, model_name="me/a", config={}))]) == 0
    before = {file: file.read_text() for file in Path("reports/harness").iterdir()}
    assert main([str(edited(LM_EVAL, tmp_path, model_name="me_a", config={}))]) == 2
    assert "of me/a, and plain_questions of me_a would take its place" in capsys.readouterr().err
    assert {file: file.read_text() for file in Path("reports/harness").iterdir()} == before


@pytest.mark.parametrize(
    ("file", "changes", "told"),
    [
        (LM_EVAL, {"results": {}}, r"lm_eval\.json: holds no task"),
        (LM_EVAL, {"results": []}, r"lm_eval\.json: results: input should be a valid dictionary"),
        (LM_EVAL, {"model_name": None}, r"lm_eval\.json: model_name: input should be a valid str"),
        (LM_EVAL, {"lm_eval_version": 4}, r"lm_eval\.json: lm_eval_version: input should be a v"),
        (INSPECT, {"status": "error"}, r"inspect\.json: the evaluation ended with status 'error'"),
        (INSPECT, {"results": None}, r"inspect\.json: results: input should be a valid dict"),
        (INSPECT, {"eval": {}}, r"inspect\.json: eval\.task: field required; no version of the"),
    ],
)
def test_another_form_is_refused_by_file_and_key(
    tmp_path: Path, file: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        read_results(edited(file, tmp_path, **changes))


def test_files_of_neither_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    Path("half.json").write_text(LM_EVAL.read_text()[:100])
    Path("deep.json").write_text("[" * 100_000)
    shutil.copy(INSPECT, "log.eval")
    for name, told in (
        ("list.json", "list.json: neither a results file of lm-evaluation-harness nor a JSON log"),
        ("half.json", "half.json: cannot be read as JSON"),
        ("deep.json", "deep.json: cannot be read as JSON"),
        ("none.json", "none.json: cannot be read as JSON"),
        ("log.eval", "log.eval: is a binary log; `inspect log convert log.eval --to json"),
    ):
        assert main([str(LM_EVAL), name]) == 2
        said = capsys.readouterr().err
        assert said.startswith(told) and said.count("\n") == 1
    assert not Path("reports").exists()


def test_the_task_files_ask_the_same_questions() -> None:
    rows = [
        json.loads(line)
        for line in (ROOT / "bench/harness/questions.jsonl").read_text().splitlines()
    ]
    for row in rows:
        assert row.keys() == {"question", "choices", "answer"}
        assert len(set(row["choices"])) == 4 and row["answer"] in range(4)
    assert len({row["question"] for row in rows}) == len(rows) == 12
    (record,) = read_results(LM_EVAL)
    assert record.rows[0].items == len(rows)

"""Suites read from rows in the form of their originals, and every way a file of them can be
wrong.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pyarrow.parquet as pq
import pytest

from dualign.core.errors import DataError
from dualign.core.schema import PROMPTS, prompt_id, to_table, user
from dualign.evaluation.suites import COLUMNS, SUITES, read_suite
from dualign.params.evaluate import SuiteName, SuiteSpec

REAL = Path(os.environ.get("DUALIGN_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))


def spec(suite: str, path: str | None = None, prompts: int | None = None) -> SuiteSpec:
    return SuiteSpec.model_validate(
        {"suite": suite, "path": path, "prompts": prompts, "samples_per_prompt": 1}
    )


def read(suite: str, folder: Path, path: str | None = None, prompts: int | None = None) -> Any:
    return read_suite(spec(suite, path, prompts), folder)


def text_of(content: list[Any] | str) -> str:
    """Rows as JSON, or a CSV as it is."""
    return content if isinstance(content, str) else json.dumps(content)


#: What the originals write (questions of our own), and what is read of it: text, category, label.
HARMBENCH = (
    "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
    "Write a rude note,standard,harassment_bullying,,,rude_note\n"
    'Mock the author,contextual,harassment_bullying,context,"A diary, page 1",mock_author\n'
)
FORMS: dict[str, tuple[list[Any] | str, list[tuple[str, str, str]]]] = {
    "beavertails": (
        [{"prompt": "Why lie?", "category": "privacy_violation", "category_id": 11}],
        [("Why lie?", "privacy_violation", "")],
    ),
    "sacpo_safety": (
        [{"prompt": "Be mean.", "category": "Insults"}],
        [("Be mean.", "Insults", "")],
    ),
    "sacpo_helpful": (
        [{"prompt": "How do I wrap it?", "category": "alpaca_eval_helpful_base"}],
        [("How do I wrap it?", "alpaca_eval_helpful_base", "")],
    ),
    "harmbench": (
        HARMBENCH,
        [
            ("Write a rude note", "harassment_bullying", "standard"),
            ("A diary, page 1\n\n---\n\nMock the author", "harassment_bullying", "contextual"),
        ],
    ),
    "strongreject": (
        "category,source,forbidden_prompt\nViolence,custom,How do I scare a cat?\n",
        [("How do I scare a cat?", "Violence", "")],
    ),
    "advbench": (
        'goal,target\nWrite a threat,"Sure, here\'s a threat"\n',
        [("Write a threat", "", "")],
    ),
    "alpaca_eval": (
        [{"instruction": "Who is she?", "output": "She.", "generator": "x", "dataset": "koala"}],
        [("Who is she?", "koala", "")],
    ),
    "xstest": (
        "id,prompt,type,label,focus,note\n1,How do I kill time?,figurative,safe,kill,\n"
        "2,How do I kill him?,contrast_figurative,unsafe,kill,\n",
        [
            ("How do I kill time?", "figurative", "safe"),
            ("How do I kill him?", "contrast_figurative", "unsafe"),
        ],
    ),
    "or_bench": (
        "prompt,category\nHow do locks fail?,illegal\n",
        [("How do locks fail?", "illegal", "safe")],
    ),
    "or_bench_toxic": (
        "prompt,category\nRob whom?,illegal\n",
        [("Rob whom?", "illegal", "unsafe")],
    ),
    "truthfulqa": (
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
        "Adversarial,Myths,Do bulls hate red?,No,No; They see no red.,Yes;They do,https://a.b\n",
        [("Do bulls hate red?", "Myths", "")],
    ),
}  # fmt: skip
CHOICES = ["No.", "They see no red.", "Yes.", "They do."]


@pytest.mark.parametrize("suite", FORMS)
def test_rows_of_the_original_form_are_read(tmp_path: Path, suite: str) -> None:
    content, expected = FORMS[suite]
    (tmp_path / SUITES[suite].file).write_text(text_of(content))  # type: ignore[index]
    frame = read(suite, tmp_path)
    assert tuple(frame.columns) == COLUMNS
    assert frame["prompt"].tolist() == [user(text) for text, _, _ in expected]
    assert frame["prompt_id"].tolist() == [prompt_id(user(text)) for text, _, _ in expected]
    assert list(zip(frame["category"], frame["label"], strict=True)) == [
        (category, label) for _, category, label in expected
    ]
    assert frame["choices"].tolist() == frame["correct"].tolist() == [None] * len(expected)


@pytest.mark.parametrize("none", [None, float("nan"), "", "nan"])
def test_a_behaviour_without_a_context_is_alone(tmp_path: Path, none: Any) -> None:
    row = {"Behavior": "Write a rude note", "SemanticCategory": "a", "FunctionalCategory": "b"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"ContextString": none}))
    assert read("harmbench", tmp_path, "a.jsonl")["prompt"].tolist() == [user("Write a rude note")]


def test_every_suite_has_a_row_and_every_row_a_form() -> None:
    assert set(get_args(SuiteName)) == set(SUITES)
    assert set(SUITES) == {*FORMS, "held_out", "truthfulqa_mc1", "truthfulqa_mc2"}


def test_version_2_of_xstest_tells_its_label_by_type(tmp_path: Path) -> None:
    rows = "id_v1,id_v2,type,prompt,focus,note\n,v2-26,contrast_homonyms,How can I kill?,kill,\n"
    (tmp_path / "v2.csv").write_text(rows)
    assert read("xstest", tmp_path, "v2.csv")["label"].tolist() == ["unsafe"]


MC1 = {"choices": ["No.", "Yes.", "They do."], "labels": [1, 0, 0]}
MC2 = {"choices": CHOICES, "labels": [1, 1, 0, 0]}
QUESTION = {"question": "Do bulls hate red?"}


def as_map(targets: dict[str, list[Any]]) -> dict[str, int]:
    return dict(zip(targets["choices"], targets["labels"], strict=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("truth.csv", FORMS["truthfulqa"][0]),
        ("hub.json", [QUESTION | {"mc1_targets": MC1, "mc2_targets": MC2}]),
        ("mc.json", [QUESTION | {"mc1_targets": as_map(MC1), "mc2_targets": as_map(MC2)}]),
    ],
)
def test_multiple_choice_of_every_form(tmp_path: Path, name: str, content: Any) -> None:
    (tmp_path / name).write_text(text_of(content))
    one = read("truthfulqa_mc1", tmp_path, name).iloc[0]
    two = read("truthfulqa_mc2", tmp_path, name).iloc[0]
    assert one["prompt"] == user("Do bulls hate red?")
    assert (one["choices"], one["correct"]) == (MC1["choices"], MC1["labels"])
    assert (two["choices"], two["correct"]) == (CHOICES, MC2["labels"])


def test_held_out_prompts_are_those_of_the_data(tmp_path: Path) -> None:
    rows = [{"prompt_id": "a", "prompt": user("hm?"), "source": "mine"}]
    pq.write_table(to_table(rows, PROMPTS), tmp_path / "eval.parquet")
    row = read("held_out", tmp_path, str(tmp_path / "eval.parquet")).iloc[0]
    assert (row["prompt_id"], row["prompt"], row["category"]) == ("a", user("hm?"), "mine")
    with pytest.raises(DataError, match="run the stage that writes it"):
        read("held_out", tmp_path, str(tmp_path / "none.parquet"))
    assert len(read("held_out", tmp_path, "eval.parquet")) == 1  # in the folder, as other files


# --- which prompts --------------------------------------------------------------------------------


def advbench(*goals: str) -> str:
    stream = io.StringIO()
    csv.writer(stream).writerows([("goal", "target"), *((goal, "Sure") for goal in goals)])
    return stream.getvalue()


def test_fewer_prompts_are_spread_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "harmful_behaviors.csv").write_text(advbench(*"abcdefghij"))
    frame = read("advbench", tmp_path, prompts=4)
    assert [turns[0]["content"] for turns in frame["prompt"]] == ["a", "c", "f", "h"]
    assert len(read("advbench", tmp_path, prompts=100)) == 10


def test_a_prompt_that_stands_twice_is_asked_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "harmful_behaviors.csv").write_text(advbench("Be rude", "Lie", "be rude!"))
    with caplog.at_level(logging.WARNING):
        assert len(read("advbench", tmp_path)) == 2
    assert "advbench: 1 prompts stand twice" in caplog.text


# --- where they lie -------------------------------------------------------------------------------


def test_an_installed_package_may_ship_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "prompts_of_mine" / "data"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").touch()
    (inner / "harmful_behaviors.csv").write_text(advbench("Lie"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert len(read("advbench", Path("elsewhere"), "package:prompts_of_mine")) == 1
    with pytest.raises(DataError, match="holds 0 files of the name"):
        read("or_bench_toxic", tmp_path, "package:prompts_of_mine")
    for name in ("no_such_package", "not a name"):
        with pytest.raises(DataError, match="no such package is installed"):
            read("advbench", tmp_path, f"package:{name}")


def test_a_missing_file_is_named_with_its_source(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read("xstest", tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "xstest_prompts.csv") in message and "put xstest_prompts.csv" in message
    assert "CC-BY-4.0" in message and "\n" not in message


def test_a_hub_id_that_cannot_be_had_says_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"dualign-tests/nosuch: .* put the file into"):
        read("xstest", tmp_path, "dualign-tests/nosuch")


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suite", "content", "line", "message"),
    [
        ("advbench", "prompt,target\nLie,Sure\n", 2, "no column 'goal', only 'prompt', 'target'"),
        ("advbench", "goal,target\nLie,Sure\n  ,Sure\n", 3, "goal is '  ', expected a text"),
        ("advbench", "goal,target\nLie\n", 2, "1 cells for 2 columns"),
        ("beavertails", [{"prompt": None, "category": "a"}], 1, "prompt is None, expected a text"),
        ("beavertails", ["Lie"], 1, "expected an object of columns"),
        (
            "xstest",
            "id,prompt,type,label,focus,note\n1,Kill?,contrast_homonyms,safe,kill,\n",
            2,
            "label is 'safe', but type 'contrast_homonyms' is unsafe",
        ),
        *(
            ("truthfulqa_mc2", [QUESTION | {"mc2_targets": targets}], 1, message)
            for targets, message in (
                ({"choices": [None, "No."], "labels": [1, 0]}, "mc2_targets: expected a list of"),
                ({"choices": "ab", "labels": [1, 0]}, "mc2_targets: expected a list of texts"),
                ({"choices": ["a", "b"], "labels": None}, "mc2_targets: expected 0 or 1 for each"),
            )
        ),
        ("truthfulqa_mc1", [QUESTION], 1, "neither 'Incorrect Answers' nor 'mc1_targets'"),
        (
            "truthfulqa_mc1",
            [QUESTION | {"mc1_targets": {"No.": 1, "Nope.": 1, "Yes.": 0}}],
            1,
            "2 of 3 answers are true",
        ),
        (
            "truthfulqa_mc2",
            [QUESTION | {"mc2_targets": {"choices": ["No.", "Yes."], "labels": [1]}}],
            1,
            "mc2_targets: expected 0 or 1 for each answer",
        ),
        (
            "truthfulqa_mc2",
            [QUESTION | {"mc2_targets": {"No.": 1, "Never.": 1}}],
            1,
            "2 of 2 answers are true",
        ),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_by_file_line_and_column(
    tmp_path: Path, suite: str, content: Any, line: int, message: str
) -> None:
    file = tmp_path / SUITES[suite].file  # type: ignore[index]
    file.write_text(text_of(content))
    with pytest.raises(DataError) as caught:
        read(suite, tmp_path)
    assert str(caught.value).startswith(f"{file}:{line}: ") and message in str(caught.value)
    assert f"suite '{suite}' reads {file.name}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "holds no rows"),
        ("a.csv", "goal,target\n", "holds no rows"),
        ("a.json", '[{"goal": "Li', "not valid JSON"),
        ("a.xlsx", "PK", "unknown kind of file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read("advbench", tmp_path, name)
    assert str(tmp_path / name) in str(caught.value)


# --- the genuine files ----------------------------------------------------------------------------

GENUINE = {
    "xstest": ("xstest/xstest_prompts.csv", 450),
    "beavertails": ("beavertails_eval/BeaverTails-Evaluation.json", 700),
    "sacpo_safety": ("sacpo_prompts/safety_problem.json", 83),
    "sacpo_helpful": ("sacpo_prompts/helpful_problem.json", 129),
    "truthfulqa": ("truthfulqa/TruthfulQA.csv", 817),
    "truthfulqa_mc1": ("truthfulqa/mc_task.json", 817),
    "truthfulqa_mc2": ("truthfulqa/mc_task.json", 817),
}


def genuine(suite: str, path: str) -> pd.DataFrame:
    if not (REAL / path).is_file():
        pytest.skip(f"real rows are not here: {REAL / path} (set DUALIGN_REAL_DATA)")
    frame: pd.DataFrame = read(suite, REAL, path)
    return frame


@pytest.mark.parametrize("suite", GENUINE)
def test_genuine_files_are_read_in_full(suite: str) -> None:
    path, count = GENUINE[suite]
    frame = genuine(suite, path)
    assert len(frame) == count
    if suite == "xstest":
        assert frame["label"].value_counts().to_dict() == {"safe": 250, "unsafe": 200}
    if suite == "beavertails":
        assert frame["category"].nunique() == 14


@pytest.mark.parametrize("targets", ["mc1", "mc2"])
def test_both_files_of_truthfulqa_ask_the_same(targets: str) -> None:
    """But for a few texts, all answers agree to the letter in all answers."""
    frames = [
        genuine(f"truthfulqa_{targets}", f"truthfulqa/{name}")
        for name in ("TruthfulQA.csv", "mc_task.json")
    ]
    one, two = (
        frame.set_index("prompt_id").apply(
            lambda row: frozenset(zip(row["choices"], row["correct"], strict=True)), axis=1
        )
        for frame in frames
    )
    common = one.index.intersection(two.index)
    assert len(common) >= 816 and (one[common] == two[common]).mean() > 0.98

"""Message lists in cells: every dialect of conversations, and what is no conversation."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dualign.core.errors import DataError
from dualign.core.params import SourceSpec, WorldParams
from dualign.core.schema import user
from dualign.data.sources import Kind, Record, Rejected, Skipped, read

MADE = WorldParams(sft_rows=1, helpful_pairs=1, safety_pairs=1, sharpness=1.0)
PAIR = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
SHAREGPT = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"}]


def records(folder: Path, kind: Kind, rows: list[Any], columns: dict[str, str]) -> list[Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = SourceSpec(format="columns", path="rows.jsonl", columns=columns)
    return list(read(spec, kind, folder, MADE, 0))


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": TALK, "chosen": [said("So.")], "rejected": [said("No.")]}, PAIR),
        (
            {"chosen": [*TALK, said("So.")], "rejected": [*TALK, said("No.")]},
            {"chosen": "chosen", "rejected": "rejected"},
        ),
        ({"prompt": TALK, "chosen": [*TALK, said("So.")], "rejected": [*TALK, said("No.")]}, PAIR),
        ({"prompt": json.dumps(TALK), "chosen": "So.", "rejected": json.dumps([said("No.")])}, PAIR),
        ({"prompt": SHAREGPT, "chosen": {"from": "gpt", "value": "So."}, "rejected": "No."}, PAIR),
        ({"prompt": SHAREGPT, "chosen": [{"from": "gpt", "value": "So."}], "rejected": "No."}, PAIR),
    ],
    ids=["conversational", "implicit prompt", "ultrafeedback", "json text", "one message alone", "sharegpt"],
)
def test_pairs_of_messages(tmp_path: Path, row: dict[str, Any], columns: dict[str, str]) -> None:
    (found,) = records(tmp_path, "helpful", [row], columns)
    if isinstance(row["chosen"], dict):  # a message outside a list is no shape that is in use
        assert isinstance(found, Rejected) and found.reason == "not_text"
        return
    assert (found.prompt, found.chosen, found.rejected) == (TALK, "So.", "No.")


@pytest.mark.parametrize("turns", [[*TALK, said("So.")], [*SHAREGPT, {"from": "gpt", "value": "So."}]])
def test_a_whole_dialogue_is_a_supervised_row(tmp_path: Path, turns: list[dict[str, str]]) -> None:
    (found,) = records(tmp_path, "sft", [{"messages": turns}], {"messages": "messages"})
    assert (found.prompt, found.chosen) == (TALK, "So.")


def test_text_parts_of_a_message_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Why"}, {"type": "text", "text": "now?"}]
    row = {"messages": [{"role": "user", "content": parts}, said("So.")]}
    (found,) = records(tmp_path, "sft", [row], {"messages": "messages"})
    assert found.prompt == user("Why\nnow?")


def test_text_that_only_begins_like_json_stays_text(tmp_path: Path) -> None:
    texts = ('[{"x": 1}] is what?', '[{"x": 1}]', '[{"x": ' + "[" * 5000)
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in texts]
    assert [found.prompt for found in records(tmp_path, "helpful", rows, PAIR)] == [user(row["prompt"]) for row in rows]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": TALK, "chosen": [*TALK], "rejected": "b"}, "bad_turns"),
        ({"prompt": TALK, "chosen": [user("Else?")[0], said("a")], "rejected": "b"}, "prompts_differ"),
        ({"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"}, "bad_turns"),
        ({"prompt": ["x"], "chosen": "a", "rejected": "b"}, "bad_turns"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "a", "rejected": "b"}, "not_text"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "text": "x"}]}], "chosen": "a", "rejected": "b"},
            "not_text",
        ),
        ({"prompt": TALK, "chosen": [{**said("a"), "tool_calls": [{}]}], "rejected": "b"}, "bad_turns"),
        ({"prompt": [{"role": "user", "content": "\ud800"}], "chosen": "a", "rejected": "b"}, "not_unicode"),
    ],
)
def test_a_conversation_that_cannot_be_used_is_rejected(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    (found,) = records(tmp_path, "helpful", [row], PAIR)
    assert isinstance(found, Rejected) and found.reason == reason


def test_texts_without_a_prompt_are_rejected(tmp_path: Path) -> None:
    columns = {"chosen": "chosen", "rejected": "rejected"}
    (found,) = records(tmp_path, "helpful", [{"chosen": "a", "rejected": "b"}], columns)
    assert found.reason == "no_prompt"
    other = [*user("Else?"), said("b")]
    (found,) = records(tmp_path, "helpful", [{"chosen": [*TALK, said("a")], "rejected": other}], columns)
    assert found.reason == "prompts_differ"


# --- absent, repeated and null ----------------------------------------------------------------------------------------


def pku(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "prompt": f"q {number}", "response_0": "a", "response_1": "b", "is_response_0_safe": True,
        "is_response_1_safe": False, "better_response_id": 1, "safer_response_id": 0,
    }  # fmt: skip
    return {**row, **changes}


def stream(folder: Path, kind: Kind, path: str, split: str = "train") -> list[Any]:
    return list(read(SourceSpec(format="pku", path=path, split=split), kind, folder, MADE, 0))


def lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_key_that_some_rows_leave_out_is_null_there(tmp_path: Path) -> None:
    bare = {name: value for name, value in pku(0).items() if name != "better_response_id"}
    lines(tmp_path / "a.jsonl", [bare, pku(1)])
    first, second = stream(tmp_path, "helpful", "a.jsonl")
    assert isinstance(first, Skipped) and first.reason == "no_preference"
    assert isinstance(second, Record)


def test_a_key_that_every_row_leaves_out_is_a_missing_column(tmp_path: Path) -> None:
    bare = {name: value for name, value in pku(0).items() if name != "better_response_id"}
    lines(tmp_path / "a.jsonl", [bare, bare])
    with pytest.raises(DataError, match=r"a\.jsonl: column 'better_response_id' is missing .*the file has: prompt"):
        stream(tmp_path, "helpful", "a.jsonl")


def test_what_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,response,prompt\nx,y,z\n")
    spec = SourceSpec(format="columns", path="a.csv", columns={"prompt": "prompt", "response": "response"})
    with pytest.raises(DataError, match=r"a\.csv: column 'prompt' stands twice"):
        list(read(spec, "sft", tmp_path, MADE, 0))
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "response": "y", "prompt": "z"}\n')
    (found,) = read(spec.model_copy(update={"path": "a.jsonl"}), "sft", tmp_path, MADE, 0)
    assert isinstance(found, Rejected) and found.reason == "duplicate_key"
    (tmp_path / "a.json").write_text('[{"prompt": "x", "response": "y", "prompt": "z"}]')
    with pytest.raises(DataError, match=r"a\.json: not valid JSON \(key 'prompt' stands twice"):
        list(read(spec.model_copy(update={"path": "a.json"}), "sft", tmp_path, MADE, 0))


def test_missing_values_written_as_text_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines(tmp_path / "a.jsonl", [pku(0), pku(1, response_0="nan"), pku(2, response_1="None")])
    with caplog.at_level(logging.WARNING):
        stream(tmp_path, "helpful", "a.jsonl")
    assert "a.jsonl:2: a text says just 'nan'" in caplog.text and "1 more rows" in caplog.text


@pytest.mark.parametrize("cell", [[1], {"a": 1}])
def test_a_label_that_is_no_single_value_is_rejected(tmp_path: Path, cell: Any) -> None:
    lines(tmp_path / "a.jsonl", [pku(0, better_response_id=cell)])
    (found,) = stream(tmp_path, "helpful", "a.jsonl")
    assert isinstance(found, Rejected) and found.reason == "bad_label"


def test_a_label_that_says_nan_is_null(tmp_path: Path) -> None:
    pd.DataFrame([pku(0, better_response_id="nan"), pku(1)]).to_csv(tmp_path / "a.csv", index=False)
    first, second = stream(tmp_path, "helpful", "a.csv")
    assert isinstance(first, Skipped) and isinstance(second, Record)


# --- PKU's release of 2024 --------------------------------------------------------------------------------------------

NEW = {
    "prompt_source": "Alpaca3-70B", "response_0_source": "Alpaca-7B", "response_1_source": "Alpaca-7B",
    "response_0_harm_category": {"Privacy Violation": False}, "response_1_harm_category": {"Privacy Violation": True},
    "response_0_severity_level": 0, "response_1_severity_level": 2,
    "response_0_sha256": "0", "response_1_sha256": "1",
}  # fmt: skip


def test_the_release_with_severities_is_read_and_checked(tmp_path: Path) -> None:
    rows = [
        pku(0, **NEW),
        pku(1, **{**NEW, "response_1_severity_level": 0}),
        pku(2, **{**NEW, "response_0_severity_level": 1}),
    ]
    lines(tmp_path / "a.jsonl", rows)
    for kind in ("sft", "helpful", "safety"):
        found = stream(tmp_path, kind, "a.jsonl")
        reasons = [item.reason for item in found if isinstance(item, Rejected)]
        assert isinstance(found[0], Record)
        assert kind == "sft" or reasons == ["contradictory_severity"] * 2


# --- folders ----------------------------------------------------------------------------------------------------------


def test_the_files_of_a_folder_are_read_like_files(tmp_path: Path) -> None:
    """A file of other types, one with a further column and one with a broken line lie beside each other."""
    lines(tmp_path / "set/a.jsonl", [pku(0)])
    lines(tmp_path / "set/b.jsonl", [pku(1, better_response_id="zero"), pku(2, note="x")])
    (tmp_path / "set/c.jsonl").write_text('{"prompt": \n' + json.dumps(pku(3)) + "\n")
    pd.DataFrame([pku(4)]).to_parquet(tmp_path / "set/d.parquet")
    found = stream(tmp_path, "helpful", "set")
    where = [(Path(item.where.file).name, item.where.line, type(item).__name__) for item in found]
    assert where == [
        ("a.jsonl", 1, "Record"), ("b.jsonl", 1, "Rejected"), ("b.jsonl", 2, "Record"), ("c.jsonl", 1, "Rejected"),
        ("c.jsonl", 2, "Record"), ("d.parquet", 1, "Record"),
    ]  # fmt: skip


def test_a_split_of_a_folder_is_in_the_names_of_its_files(tmp_path: Path) -> None:
    lines(tmp_path / "set/train.jsonl", [pku(0), pku(1)])
    lines(tmp_path / "set/test.jsonl", [pku(2)])
    assert len(stream(tmp_path, "helpful", "set")) == 2
    assert len(stream(tmp_path, "helpful", "set", split="test")) == 1


def test_a_split_is_a_word_of_a_name_and_not_a_part_of_one(tmp_path: Path) -> None:
    """`constraints` is no train, `latest` no test; hidden folders and descriptions hold no rows."""
    for number, name in enumerate(("constraints.jsonl", "latest.jsonl", "a.jsonl")):
        lines(tmp_path / "set" / name, [pku(number)])
    lines(tmp_path / "set/.ipynb_checkpoints/a.jsonl", [pku(9)])
    (tmp_path / "set/config.json").write_text("{}")
    assert len(stream(tmp_path, "helpful", "set")) == 3
    lines(tmp_path / "set/dev.jsonl", [pku(5)])
    lines(tmp_path / "set/train-0.jsonl", [pku(6), pku(7)])
    assert [len(stream(tmp_path, "helpful", "set", split)) for split in ("train", "dev")] == [2, 1]


def test_a_folder_that_datasets_cannot_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"set: split 'dev' cannot be loaded as a dataset \(.+\)") as caught:
        stream(tmp_path, "helpful", "set", split="dev")
    assert "\n" not in str(caught.value)

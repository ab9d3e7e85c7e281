"""Message lists in cells: every dialect of conversations, and what is no conversation."""

from __future__ import annotations

import json
import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dualign.core.errors import DataError
from dualign.core.schema import user
from dualign.data.formats import Kind, Rejected, Skipped, Usable
from dualign.data.sources import read
from dualign.params.data import SourceSpec, WorldParams

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
        (
            {"prompt": json.dumps(TALK), "chosen": "So.", "rejected": json.dumps([said("No.")])},
            PAIR,
        ),
        ({"prompt": SHAREGPT, "chosen": {"from": "gpt", "value": "So."}, "rejected": "No."}, PAIR),
        (
            {"prompt": SHAREGPT, "chosen": [{"from": "gpt", "value": "So."}], "rejected": "No."},
            PAIR,
        ),
        (
            {"prompt": "Why?", "chosen": [*TALK, said("So.")], "rejected": [*TALK, said("No.")]},
            PAIR,
        ),
        ({"prompt": repr(TALK), "chosen": "So.", "rejected": repr([said("No.")])}, PAIR),
        (
            {
                "prompt": f" {SHAREGPT} ",
                "chosen": str([{"from": "gpt", "value": "So."}]),
                "rejected": "No.",
            },
            PAIR,
        ),
    ],
    ids=[
        "conversational",
        "implicit prompt",
        "ultrafeedback",
        "json text",
        "one message alone",
        "sharegpt",
        "question of a dialogue with a system turn",
        "python text",
        "sharegpt as python text",
    ],
)
def test_pairs_of_messages(tmp_path: Path, row: dict[str, Any], columns: dict[str, str]) -> None:
    (found,) = records(tmp_path, "helpful", [row], columns)
    if isinstance(row["chosen"], dict):  # a message outside a list is no shape that is in use
        assert isinstance(found, Rejected) and found.reason == "not_text"
        return
    assert (found.prompt, found.chosen, found.rejected) == (TALK, "So.", "No.")


ASKED = "\n\nHuman: Why?\n\nAssistant: So?\n\nHuman: And?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": ASKED, "chosen": " Yes.", "rejected": "No."}, PAIR),
        ({"prompt": ASKED, "chosen": f"{ASKED} Yes.", "rejected": f"{ASKED} No."}, PAIR),
        ({"prompt": "And?", "chosen": f"{ASKED} Yes.", "rejected": f"{ASKED} No."}, PAIR),
        (
            {"chosen": f"{ASKED} Yes.", "rejected": f"{ASKED} No."},
            {"chosen": "chosen", "rejected": "rejected"},
        ),
    ],
)
def test_turns_of_hh_in_a_column_are_turns(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str]
) -> None:
    """As one text they would hide their first question, by which sets of prompts are disjoint."""
    (found,) = records(tmp_path, "helpful", [row], columns)
    turns = [*user("Why?"), said("So?"), *user("And?")]
    assert (found.prompt, found.chosen, found.rejected) == (turns, "Yes.", "No.")


def test_text_of_one_speaker_and_turns_that_end_with_an_answer(tmp_path: Path) -> None:
    answers = {"chosen": "Yes.", "rejected": "No."}
    (found,) = records(tmp_path, "helpful", [{"prompt": "Human: Why?", **answers}], PAIR)
    assert found.prompt == user("Human: Why?")
    (bad,) = records(tmp_path, "helpful", [{"prompt": f"{ASKED} Well", **answers}], PAIR)
    assert bad.reason == "bad_turns"


@pytest.mark.parametrize(
    "turns", [[*TALK, said("So.")], [*SHAREGPT, {"from": "gpt", "value": "So."}]]
)
def test_a_whole_dialogue_is_a_supervised_row(tmp_path: Path, turns: list[dict[str, str]]) -> None:
    (found,) = records(tmp_path, "sft", [{"messages": turns}], {"messages": "messages"})
    assert (found.prompt, found.chosen) == (TALK, "So.")


def test_turns_of_both_kinds_may_stand_in_one_table(tmp_path: Path) -> None:
    """A table gives every turn all keys, and null for those of the other kind."""
    given = [said("q") | {"role": "user"}, said("a"), *SHAREGPT, {"from": "gpt", "value": "So."}]
    keys = dict.fromkeys(("role", "content", "from", "value"))
    turns = [keys | turn for turn in given]
    pd.DataFrame({"talk": [turns[:2], turns[2:]]}).to_parquet(tmp_path / "rows.parquet")
    spec = SourceSpec(format="columns", path="rows.parquet", columns={"messages": "talk"})
    first, second = read(spec, "sft", tmp_path, MADE, 0)
    assert isinstance(first, Usable) and isinstance(second, Usable)
    assert (first.prompt, first.chosen) == (user("q"), "a")
    assert (second.prompt, second.chosen) == (TALK, "So.")


def test_text_parts_of_a_message_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Why"}, {"type": "text", "text": "now?"}]
    row = {"messages": [{"role": "user", "content": parts}, said("So.")]}
    (found,) = records(tmp_path, "sft", [row], {"messages": "messages"})
    assert found.prompt == user("Why\nnow?")


def test_text_that_only_begins_like_json_stays_text(tmp_path: Path) -> None:
    texts = (
        '[{"x": 1}] is what?',
        '[{"x": 1}]',
        '[{"x": ' + "[" * 5000,
        "{'x': 1}",
        '{"role": "admin", "id": 1}',
        "[{'x': 'content'}, {'y': 2}]",
        '[{"role": "admin", "id": 1}]',
        "[{ int role; }]",
        '{"role": "user"} is what?',
        '{"title": "x", "content": "y"}',
        '[{"name": "Bo", "role": "user"}]',
        "[{'title': 'x', 'content': 'y'}]",
    )
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in texts]
    assert [found.prompt for found in records(tmp_path, "helpful", rows, PAIR)] == [
        user(row["prompt"]) for row in rows
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": TALK, "chosen": [*TALK], "rejected": "b"}, "bad_turns"),
        (
            {"prompt": TALK, "chosen": [user("Else?")[0], said("a")], "rejected": "b"},
            "prompts_differ",
        ),
        (
            {"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"},
            "bad_turns",
        ),
        ({"prompt": ["x"], "chosen": "a", "rejected": "b"}, "bad_turns"),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "image"}]}],
                "chosen": "a",
                "rejected": "b",
            },
            "not_text",
        ),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "image", "text": "x"}]}],
                "chosen": "a",
                "rejected": "b",
            },
            "not_text",
        ),
        (
            {"prompt": TALK, "chosen": [{**said("a"), "tool_calls": [{}]}], "rejected": "b"},
            "bad_turns",
        ),
        (
            {"prompt": [{"role": "user", "content": "\ud800"}], "chosen": "a", "rejected": "b"},
            "not_unicode",
        ),
    ],
)
def test_a_conversation_that_cannot_be_used_is_rejected(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    (found,) = records(tmp_path, "helpful", [row], PAIR)
    assert isinstance(found, Rejected) and found.reason == reason


NOTHING = {"role": "system", "content": " "}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": [NOTHING, *user("Why?")], "chosen": "So.", "rejected": "No."}, PAIR),
        ({"prompt": "Why?", "chosen": [NOTHING, said("So.")], "rejected": [said("No.")]}, PAIR),
        (
            {
                "chosen": [NOTHING, *user("Why?"), said("So.")],
                "rejected": [*user("Why?"), said("No.")],
            },
            {"chosen": "chosen", "rejected": "rejected"},
        ),
    ],
)
def test_a_system_turn_without_text_is_none(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str]
) -> None:
    (found,) = records(tmp_path, "helpful", [row], columns)
    assert (found.prompt, found.chosen, found.rejected) == (user("Why?"), "So.", "No.")


MORE = [*TALK, said("So?"), *user("And?")]


@pytest.mark.parametrize(
    "prompt", ["Why?", "And?", [*user("Why?"), said("So?"), *user("And?")], MORE]
)
def test_what_two_dialogues_share_is_their_prompt(tmp_path: Path, prompt: Any) -> None:
    """The prompt column of UltraFeedback and of its kin holds a question of the dialogue, not what
    stands before it.
    """
    row = {"prompt": prompt, "chosen": [*MORE, said("Yes.")], "rejected": [*MORE, said("No.")]}
    (found,) = records(tmp_path, "helpful", [row], PAIR)
    assert (found.prompt, found.chosen, found.rejected) == (MORE, "Yes.", "No.")
    supervised = {"prompt": "prompt", "response": "chosen"}
    (found,) = records(tmp_path, "sft", [row], supervised)
    assert (found.prompt, found.chosen) == (MORE, "Yes.")


@pytest.mark.parametrize(
    ("prompt", "rejected"),
    [
        ("Else?", [*MORE, said("No.")]),
        ("Why?", [*TALK, said("No?"), *user("And?"), said("No.")]),
        ("Why?", [*user("Why?"), said("No.")]),
        ("Why?", [said("No.")]),
        ("Why?", "No."),
    ],
)
def test_dialogues_of_other_prompts_are_rejected(
    tmp_path: Path, prompt: str, rejected: Any
) -> None:
    row = {"prompt": prompt, "chosen": [*MORE, said("Yes.")], "rejected": rejected}
    (found,) = records(tmp_path, "helpful", [row], PAIR)
    assert found.reason == "prompts_differ"


def test_conversations_that_pandas_wrote_are_read_or_refused(tmp_path: Path) -> None:
    """A list goes into CSV as Python writes it; a list that came out of parquet is an array,
    written without commas.
    """
    talk = [*TALK, said('It\'s "so".\nYes.')]
    table = pd.DataFrame({"messages": [talk, talk[1:]]})
    table.to_csv(tmp_path / "list.csv")
    table.to_parquet(tmp_path / "a.parquet")
    pd.read_parquet(tmp_path / "a.parquet").to_csv(tmp_path / "array.csv")
    spec = SourceSpec(format="columns", path="list.csv", columns={"messages": "messages"})
    first, second = read(spec, "sft", tmp_path, MADE, 0)
    assert (first.prompt, first.chosen) == (TALK, 'It\'s "so".\nYes.') and second.prompt == TALK[1:]
    for bad in read(spec.model_copy(update={"path": "array.csv"}), "sft", tmp_path, MADE, 0):
        assert (
            isinstance(bad, Rejected)
            and bad.reason == "bad_turns"
            and "write the cell as JSON" in bad.detail
        )


UNUSABLE = {
    "a turn without content": json.dumps([*TALK, {"role": "assistant"}]),
    "no turn with content": json.dumps([{"role": "user"}]),
    "a turn without a role": json.dumps([*TALK, {"content": "So."}]),
    "no role": repr([{"content": "So."}]),
    "content that is none": repr([{"role": "user", "content": None}]),
    "a turn that is a text": json.dumps([*TALK, "So."]),
    "cut off": json.dumps(TALK)[:-5],
    "cut off in Python": repr(TALK)[:-5],
    "not a number": "[{'role': 'user', 'content': nan}]",
    "more behind it": json.dumps(TALK) + json.dumps(TALK),
    "a key twice": '[{"role": "user", "role": "system", "content": "x"}]',
    "a message alone": json.dumps(said("So.")),
    "a message alone in Python": repr(said("So.")),
    "very long": repr([{"role": "user", "content": "x" * 2**20}]),
}


@pytest.mark.parametrize("text", UNUSABLE.values(), ids=UNUSABLE)
def test_text_that_looks_like_messages_and_is_unusable_is_never_prose(
    tmp_path: Path, text: str
) -> None:
    for row in (
        {"prompt": text, "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": text, "rejected": "b"},
    ):
        (found,) = records(tmp_path, "helpful", [row], PAIR)
        assert (
            isinstance(found, Rejected)
            and found.reason in ("bad_turns", "not_text")
            and found.detail
        )


def test_messages_in_formats_of_texts_are_rejected(tmp_path: Path) -> None:
    lines(
        tmp_path / "a.jsonl",
        [pku(0, prompt=json.dumps(TALK)), pku(1, response_0=repr([said("So.")]))],
    )
    for found in stream(tmp_path, "helpful", "a.jsonl"):
        assert found.reason == "not_text" and "format 'columns' reads" in found.detail


def test_texts_without_a_prompt_are_rejected(tmp_path: Path) -> None:
    columns = {"chosen": "chosen", "rejected": "rejected"}
    (found,) = records(tmp_path, "helpful", [{"chosen": "a", "rejected": "b"}], columns)
    assert found.reason == "no_prompt"
    other = [*user("Else?"), said("b")]
    (found,) = records(
        tmp_path, "helpful", [{"chosen": [*TALK, said("a")], "rejected": other}], columns
    )
    assert found.reason == "prompts_differ"


# --- absent, repeated and null --------------------------------------------------------------------


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
    assert isinstance(second, Usable)


def test_a_key_that_every_row_leaves_out_is_a_missing_column(tmp_path: Path) -> None:
    bare = {name: value for name, value in pku(0).items() if name != "better_response_id"}
    lines(tmp_path / "a.jsonl", [bare, bare])
    with pytest.raises(
        DataError, match=r"a\.jsonl: column 'better_response_id' is missing .*the file has: prompt"
    ):
        stream(tmp_path, "helpful", "a.jsonl")


def test_what_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,response,prompt\nx,y,z\n")
    spec = SourceSpec(
        format="columns", path="a.csv", columns={"prompt": "prompt", "response": "response"}
    )
    with pytest.raises(DataError, match=r"a\.csv: column 'prompt' stands twice"):
        list(read(spec, "sft", tmp_path, MADE, 0))
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "response": "y", "prompt": "z"}\n')
    (found,) = read(spec.model_copy(update={"path": "a.jsonl"}), "sft", tmp_path, MADE, 0)
    assert isinstance(found, Rejected) and found.reason == "duplicate_key"
    for twice in (
        '{"prompt": "x", "response": "y", "prompt": "z"}',
        '{"prompt": "x", "more": [{"a": 1, "a": 2}]}',
    ):
        (tmp_path / "a.json").write_text(
            f'[{{"prompt": "q", "response": "a"}}, {twice}, {{"prompt": "x", "response": "y"}}]'
        )
        first, bad, last = read(
            spec.model_copy(update={"path": "a.json"}), "sft", tmp_path, MADE, 0
        )
        assert isinstance(first, Usable) and isinstance(last, Usable) and last.where.line == 3
        assert (bad.reason, bad.where.line) == ("duplicate_key", 2) and bad.row == twice


def test_missing_values_written_as_text_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines(tmp_path / "a.jsonl", [pku(0), pku(1, response_0="nan"), pku(2, response_1="<nooutput>")])
    with caplog.at_level(logging.WARNING):
        stream(tmp_path, "helpful", "a.jsonl")
    assert "a.jsonl:2: a text says just 'nan'" in caplog.text and "1 more rows" in caplog.text


@pytest.mark.parametrize("none", ["No input", "<noinput>", "< No Input >.", "no input required."])
def test_an_input_that_says_that_it_is_none_is_none(tmp_path: Path, none: str) -> None:
    lines(tmp_path / "a.jsonl", [{"instruction": "q", "input": none, "output": "a"}])
    spec = SourceSpec(format="alpaca", path="a.jsonl")
    (row,) = read(spec, "sft", tmp_path, MADE, 0)
    assert isinstance(row, Usable) and row.prompt == user("q")


def test_an_input_that_speaks_of_no_input_is_kept(tmp_path: Path) -> None:
    given = "no input voltage"
    lines(tmp_path / "a.jsonl", [{"instruction": "q", "input": given, "output": "a"}])
    (row,) = read(SourceSpec(format="alpaca", path="a.jsonl"), "sft", tmp_path, MADE, 0)
    assert isinstance(row, Usable) and row.prompt == user(f"q\n\n{given}")


@pytest.mark.parametrize("none", [None, float("nan"), "nan", "None", "", " ", "<NA>"])
def test_an_input_that_is_missing_is_none(tmp_path: Path, none: Any) -> None:
    lines(tmp_path / "a.jsonl", [{"instruction": "Sing.", "input": none, "output": "la"}])
    (found,) = read(SourceSpec(format="alpaca", path="a.jsonl"), "sft", tmp_path, MADE, 0)
    assert (found.prompt, found.chosen) == (user("Sing."), "la")


def test_an_input_that_is_no_text_is_rejected(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [{"instruction": "Double it.", "input": 0, "output": "0"}])
    (found,) = read(SourceSpec(format="alpaca", path="a.jsonl"), "sft", tmp_path, MADE, 0)
    assert (
        isinstance(found, Rejected) and found.reason == "not_text" and "input is 0" in found.detail
    )


@pytest.mark.parametrize("none", [None, float("nan")])
@pytest.mark.parametrize("name", ["instruction", "output"])
def test_a_prompt_or_an_answer_that_is_missing_is_rejected(
    tmp_path: Path, name: str, none: Any
) -> None:
    lines(tmp_path / "a.jsonl", [{"instruction": "Sing.", "output": "la", name: none}])
    (found,) = read(SourceSpec(format="alpaca", path="a.jsonl"), "sft", tmp_path, MADE, 0)
    assert isinstance(found, Rejected) and found.reason == "not_text" and name in found.detail


@pytest.mark.parametrize("cell", [[1], {"a": 1}])
def test_a_label_that_is_no_single_value_is_rejected(tmp_path: Path, cell: Any) -> None:
    lines(tmp_path / "a.jsonl", [pku(0, better_response_id=cell)])
    (found,) = stream(tmp_path, "helpful", "a.jsonl")
    assert isinstance(found, Rejected) and found.reason == "bad_label"


def test_a_label_that_says_nan_is_null(tmp_path: Path) -> None:
    pd.DataFrame([pku(0, better_response_id="nan"), pku(1)]).to_csv(tmp_path / "a.csv", index=False)
    first, second = stream(tmp_path, "helpful", "a.csv")
    assert isinstance(first, Skipped) and isinstance(second, Usable)


# --- PKU's release of 2024 ------------------------------------------------------------------------

NEW = {
    "prompt_source": "Alpaca3-70B",
    "response_0_source": "Alpaca-7B",
    "response_1_source": "Alpaca-7B",
    "response_0_harm_category": {"Privacy Violation": False},
    "response_1_harm_category": {"Privacy Violation": True},
    "response_0_severity_level": 0,
    "response_1_severity_level": 2,
    "response_0_sha256": "0",
    "response_1_sha256": "1",
}


def test_the_release_with_severities_is_read_and_checked(tmp_path: Path) -> None:
    rows = [
        pku(0, **NEW),
        pku(1, **{**NEW, "response_1_severity_level": 0}),
        pku(2, **{**NEW, "response_0_severity_level": 1}),
    ]
    lines(tmp_path / "a.jsonl", rows)
    for kind in ("sft", "helpful", "safety"):
        found = stream(tmp_path, kind, "a.jsonl")
        assert isinstance(found[0], Usable)
        assert [item.reason for item in found[1:]] == ["contradictory_severity"] * 2


@pytest.mark.parametrize("two", [2, 2.0, "2", "2.0", " 2 "])
def test_severities_are_read_as_csv_json_and_parquet_write_them(tmp_path: Path, two: Any) -> None:
    zero = type(two)(0)
    safe = pku(0, response_0_severity_level=zero, response_1_severity_level=two)
    lines(
        tmp_path / "a.jsonl",
        [safe, {**safe, "is_response_1_safe": True}, {**safe, "is_response_0_safe": None}],
    )
    for kind in ("sft", "helpful", "safety"):
        found = stream(tmp_path, kind, "a.jsonl")
        assert isinstance(found[0], Usable) and found[1].reason == "contradictory_severity"
        assert isinstance(found[2], Usable | Skipped)


def test_labels_may_be_decimals_as_databases_write_them(tmp_path: Path) -> None:
    marks = {name: Decimal(pku(0)[name]) for name in ("better_response_id", "safer_response_id")}
    pd.DataFrame([pku(0) | marks]).to_parquet(tmp_path / "rows.parquet")
    spec = SourceSpec(format="pku", path="rows.parquet")
    (row,) = read(spec, "safety", tmp_path, MADE, 0)
    assert isinstance(row, Usable) and (row.chosen, row.rejected) == ("a", "b")


@pytest.mark.parametrize("level", [4, -1, 1.5, "5", "high", True, [1]])
def test_a_severity_out_of_its_range_is_rejected(tmp_path: Path, level: Any) -> None:
    lines(tmp_path / "a.jsonl", [pku(0, response_1_severity_level=level)])
    for kind in ("sft", "helpful", "safety"):
        (found,) = stream(tmp_path, kind, "a.jsonl")
        assert isinstance(found, Rejected) and found.reason == "bad_label"
        assert (
            "response_1_severity_level is " in found.detail
            and "expected 0, 1, 2, 3 or null" in found.detail
        )


@pytest.mark.parametrize("none", [None, float("nan"), "", "nan"])
def test_a_severity_may_be_null(tmp_path: Path, none: Any) -> None:
    lines(
        tmp_path / "a.jsonl",
        [pku(0, response_0_severity_level=none, response_1_severity_level=none)],
    )
    assert all(
        isinstance(stream(tmp_path, kind, "a.jsonl")[0], Usable)
        for kind in ("sft", "helpful", "safety")
    )


# --- labels of another code -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["helpful", "safety"])
@pytest.mark.parametrize("as_text", [False, True])
def test_labels_that_count_from_one_are_refused(tmp_path: Path, kind: Kind, as_text: bool) -> None:
    name = "better_response_id" if kind == "helpful" else "safer_response_id"
    lines(
        tmp_path / "a.jsonl",
        [pku(n, **{name: str(1 + n % 2) if as_text else 1 + n % 2}) for n in range(6)],
    )
    with pytest.raises(
        DataError, match=rf"a\.jsonl: column '{name}' holds 1.* \(3 rows\), 2.* \(3 rows\)"
    ) as caught:
        stream(tmp_path, kind, "a.jsonl")
    assert "accepted are 0" in str(caught.value) and "\n" not in str(caught.value)


def test_flags_of_another_code_are_refused_and_a_slip_is_a_rejected_row(tmp_path: Path) -> None:
    columns = {**PAIR, "chosen_is_safe": "ok"}
    rows = [
        {"prompt": f"q {n}", "chosen": "a", "rejected": "b", "ok": 1 - 2 * (n % 2)}
        for n in range(6)
    ]
    with pytest.raises(DataError, match=r"column 'ok' holds -1 \(3 rows\), 1 \(3 rows\)"):
        records(tmp_path, "helpful", rows, columns)
    slip = [{**row, "ok": 2 if number == 0 else 1} for number, row in enumerate(rows)]
    found = records(tmp_path, "helpful", slip, columns)
    assert [type(item) for item in found] == [Rejected] + [Usable] * 5


def test_a_tie_that_is_coded_as_two_is_refused(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [pku(n, better_response_id=n % 3) for n in range(9)])
    with pytest.raises(DataError, match=r"column 'better_response_id' holds 0 .*, 2 "):
        stream(tmp_path, "helpful", "a.jsonl")


# --- folders --------------------------------------------------------------------------------------


def test_the_files_of_a_folder_are_read_like_files(tmp_path: Path) -> None:
    """A file of other types, one with a further column and one with a broken line lie beside each
    other.
    """
    lines(tmp_path / "set/a.jsonl", [pku(0)])
    lines(tmp_path / "set/b.jsonl", [pku(1, better_response_id="zero"), pku(2, note="x")])
    (tmp_path / "set/c.jsonl").write_text('{"prompt": \n' + json.dumps(pku(3)) + "\n")
    pd.DataFrame([pku(4)]).to_parquet(tmp_path / "set/d.parquet")
    found = stream(tmp_path, "helpful", "set")
    where = [(Path(item.where.file).name, item.where.line, type(item).__name__) for item in found]
    assert where == [
        ("a.jsonl", 1, "Usable"),
        ("b.jsonl", 1, "Rejected"),
        ("b.jsonl", 2, "Usable"),
        ("c.jsonl", 1, "Rejected"),
        ("c.jsonl", 2, "Usable"),
        ("d.parquet", 1, "Usable"),
    ]


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


def test_files_that_speak_of_no_split_beside_others_that_do_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(("chats", "train-0", "test", "mine")):
        lines(tmp_path / f"set/{name}.jsonl", [pku(number)])
    assert len(stream(tmp_path, "helpful", "set")) == 1
    assert f"{tmp_path / 'set'}: not read: chats.jsonl, mine.jsonl, whose names" in caplog.text
    caplog.clear()
    assert len(stream(tmp_path, "helpful", "set", "mine")) == 1
    assert "not read: chats.jsonl, whose names" in caplog.text


def test_a_split_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    for count, name in enumerate(("train_prefs", "train_sft", "test_prefs"), start=1):
        rows = [pku(number) for number in range(count)]
        lines(tmp_path / f"set/{name}-00000-of-00001.jsonl", rows)
    found = [stream(tmp_path, "helpful", "set", split) for split in ("train_sft", "train", "test")]
    assert list(map(len, found)) == [2, 3, 3]


def test_a_column_that_ends_in_white_space_is_shown_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the file has: 'prompt\\xa0', chosen, rejected"):
        records(tmp_path, "helpful", [{"prompt\xa0": "q", "chosen": "a", "rejected": "b"}], PAIR)


def test_a_file_of_a_folder_that_lacks_a_column_is_named(tmp_path: Path) -> None:
    bare = {name: value for name, value in pku(1).items() if name != "better_response_id"}
    lines(tmp_path / "set/a.jsonl", [pku(0)])
    lines(tmp_path / "set/b.jsonl", [bare, bare])
    with pytest.raises(DataError, match=r"set/b\.jsonl: column 'better_response_id' is missing"):
        stream(tmp_path, "helpful", "set")
    lines(tmp_path / "set/b.jsonl", [bare, pku(2)])
    assert [type(item) for item in stream(tmp_path, "helpful", "set")] == [Usable, Skipped, Usable]


def test_what_is_wrong_with_a_folder_is_told_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()

    def refusal(split: str = "train") -> str:
        with pytest.raises(DataError) as caught:
            stream(tmp_path, "helpful", "set", split)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "the folder holds no files; put data into it" in refusal()
    (folder / "rows.xlsx").write_text("nothing")
    assert "no file of a kind that is read, but rows.xlsx; convert them to .jsonl" in refusal()
    (folder / "a.jsonl.gz").write_text("nothing")
    assert "a.jsonl.gz: cannot be read (Not a gzipped file" in refusal()
    (folder / "a.jsonl.gz").unlink()
    (folder / "a.jsonl").symlink_to("nowhere")
    assert "a.jsonl: cannot be read" in refusal() and "does a link lead nowhere?" in refusal()
    assert "no file's name speaks of split 'dev'; names speak of: none" in refusal("dev")
    (folder / "a.jsonl").unlink()
    lines(folder / "test.jsonl", [pku(0)])
    assert "no file's name speaks of split 'train'; names speak of: test" in refusal()
    caplog.clear()
    lines(folder / "train.jsonl", [pku(0)])
    assert len(stream(tmp_path, "helpful", "set")) == 1
    assert f"{folder}: not read: rows.xlsx" in caplog.text


def test_a_file_without_rows_in_a_folder_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines(tmp_path / "set/a.jsonl", [pku(0)])
    lines(tmp_path / "set/b.jsonl", [])
    assert len(stream(tmp_path, "helpful", "set")) == 1
    assert f"{tmp_path / 'set/b.jsonl'}: holds no rows" in caplog.text

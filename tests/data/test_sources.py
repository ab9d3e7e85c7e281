"""Every format read from real files; every way a file or row can be wrong, with the message it
gives.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import lzma
import os
import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualign.core.errors import DataError
from dualign.core.schema import user
from dualign.data.formats import FORMATS, Kind, Rejected, Skipped, Usable, label
from dualign.data.sources import derived_seed, read
from dualign.params.data import SourceFormat, SourceSpec, WorldParams

WORLD = WorldParams(sft_rows=20, helpful_pairs=30, safety_pairs=40, sharpness=1.0)
REAL = Path(os.environ.get("DUALIGN_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))
Row = dict[str, Any]


def records(folder: Path, kind: Kind, **spec: Any) -> list[Any]:
    return list(read(SourceSpec(**spec), kind, folder, WORLD, seed=1))


def only(folder: Path, kind: Kind, **spec: Any) -> Any:
    found = records(folder, kind, **spec)
    assert len(found) == 1
    return found[0]


def pku(number: int = 0, **changes: Any) -> Row:
    row = {
        "prompt": f"question {number}",
        "response_0": f"zero {number}",
        "response_1": f"one {number}",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "better_response_id": 0,
        "safer_response_id": 1,
    }
    return {**row, **changes}


def hh(*turns: str) -> str:
    return "".join(
        f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns)
    )


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gz(path: Path, rows: list[Row]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_xz(path: Path, rows: list[Row]) -> None:
    path.write_bytes(lzma.compress(json.dumps(rows, indent=1).encode()))


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, list[Row]], Any]] = {
    "rows.jsonl": write_jsonl,
    "rows.jsonl.gz": write_gz,
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=4)),
    "lines.json": write_jsonl,
    "rows.json.xz": write_xz,
    "rows.csv": write_csv,
    "rows.csv.gz": lambda path, rows: pd.DataFrame(rows).to_csv(path, index=False),
    "rows.parquet": lambda path, rows: pd.DataFrame(rows).to_parquet(path),
}


# --- formats --------------------------------------------------------------------------------------


def test_params_name_every_format_of_the_table() -> None:
    assert tuple(FORMATS) == get_args(SourceFormat)


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    rows = [
        pku(0),
        pku(1, better_response_id=1, prompt='a "quoted", prompt\nof two lines'),
        pku(2, better_response_id=None),
    ]
    WRITERS[name](tmp_path / name, rows)
    first, second, third = records(tmp_path, "helpful", format="pku", path=name)
    assert (first.prompt, first.chosen, first.rejected) == (user("question 0"), "zero 0", "one 0")
    assert (second.prompt, second.chosen) == (user('a "quoted", prompt\nof two lines'), "one 1")
    assert isinstance(third, Skipped) and third.reason == "no_preference"
    assert first.where.file == str(tmp_path / name) and first.where.source == f"pku:{name}"


@pytest.mark.parametrize(
    ("name", "lines"),
    [("rows.jsonl", [1, 2]), ("rows.json", [1, 2]), ("rows.parquet", [1, 2]), ("rows.csv", [2, 4])],
)
def test_rows_say_where_they_came_from(tmp_path: Path, name: str, lines: list[int]) -> None:
    WRITERS[name](tmp_path / name, [pku(0, prompt="two\nlines"), pku(1)])
    assert [
        item.where.line for item in records(tmp_path, "safety", format="pku", path=name)
    ] == lines


def test_pku_safety_pairs_put_the_safer_answer_first_and_carry_the_flags(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [pku()])
    pair = only(tmp_path, "safety", format="pku", path="a.jsonl")
    assert (pair.chosen, pair.rejected, pair.chosen_is_safe, pair.rejected_is_safe) == (
        "one 0",
        "zero 0",
        True,
        False,
    )


def test_pku_helpful_pairs_put_the_more_helpful_answer_first_and_carry_the_flags_that_there_are(
    tmp_path: Path,
) -> None:
    bare = {name: value for name, value in pku().items() if name != "is_response_0_safe"}
    write_jsonl(tmp_path / "a.jsonl", [pku(), bare])
    found = [
        item
        for item in records(tmp_path, "helpful", format="pku", path="a.jsonl")
        if isinstance(item, Usable)
    ]
    assert [(pair.chosen, pair.chosen_is_safe, pair.rejected_is_safe) for pair in found] == [
        ("zero 0", False, True),
        ("zero 0", None, True),
    ]


def test_pku_gives_sft_its_safe_answers_only(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "a.jsonl",
        [pku(0), pku(1, is_response_0_safe=True), pku(2, is_response_1_safe=False)],
    )
    found = records(tmp_path, "sft", format="pku", path="a.jsonl")
    assert [item.chosen for item in found if isinstance(item, Usable)] == [
        "one 0",
        "zero 1",
        "one 1",
    ]
    assert [item.reason for item in found if isinstance(item, Skipped)] == ["no_safe_answer"]


@pytest.mark.parametrize("one", [1, True, 1.0, "1", "1.0", "true", "True"])
def test_labels_are_read_as_csv_json_and_parquet_write_them(tmp_path: Path, one: Any) -> None:
    write_jsonl(tmp_path / "a.jsonl", [pku(safer_response_id=one, is_response_1_safe=one)])
    pair = only(tmp_path, "safety", format="pku", path="a.jsonl")
    assert (pair.chosen, pair.chosen_is_safe) == ("one 0", True)


def test_flags_may_be_null(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "a.jsonl", [pku(is_response_0_safe=None, is_response_1_safe=float("nan"))]
    )
    pair = only(tmp_path, "safety", format="pku", path="a.jsonl")
    assert (pair.chosen_is_safe, pair.rejected_is_safe) == (None, None)


def test_hh_is_split_at_the_last_assistant_turn(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "a.jsonl",
        [
            {
                "chosen": hh("hi", "hello", "why?", "good"),
                "rejected": hh("hi", "hello", "why?", "bad"),
            }
        ],
    )
    for kind in ("helpful", "safety"):
        pair = only(tmp_path, kind, format="hh", path="a.jsonl")
        assert [turn["role"] for turn in pair.prompt] == ["user", "assistant", "user"]
        assert [turn["content"] for turn in pair.prompt] == ["hi", "hello", "why?"]
        assert (pair.chosen, pair.rejected, pair.chosen_is_safe, pair.rejected_is_safe) == (
            "good",
            "bad",
            None,
            None,
        )
    assert only(tmp_path, "sft", format="hh", path="a.jsonl").chosen == "good"


def test_turns_are_split_at_line_ends_of_windows_too(tmp_path: Path) -> None:
    """An unsplit answer would hold the turns after it, an unsplit prompt the marks of its turns."""
    dialogues = [hh("hi", "hello", "why?", answer) for answer in ("good", "bad")]
    marked = "hi\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\nwhy?"
    rows = {
        "hh": dict(zip(("chosen", "rejected"), dialogues, strict=True)),
        "helpsteer2": {"prompt": marked, "response_1": "bad", "response_2": "good"}
        | {"preference_strength": 1},
    }
    for form, row in rows.items():
        write_jsonl(tmp_path / "unix.jsonl", [row])
        windows = {name: str(cell).replace("\n", "\r\n") for name, cell in row.items()}
        write_jsonl(tmp_path / "windows.jsonl", [windows])
        ours, theirs = (
            only(tmp_path, "helpful", format=form, path=f"{name}.jsonl")
            for name in ("unix", "windows")
        )
        assert len(ours.prompt) == 3 and ours.chosen == "good"
        assert (theirs.prompt, theirs.chosen, theirs.rejected) == (ours.prompt, "good", "bad")


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (hh("what?", "good"), "prompts_differ"),
        (hh("why?", "good", "and then?"), "not_a_dialogue"),
        ("no turns at all", "not_a_dialogue"),
        (hh("why?") + hh("why?", "good"), "bad_turns"),
        ("\n\nAssistant: good", "bad_turns"),
    ],
)
def test_hh_rows_without_a_common_prompt_are_rejected(
    tmp_path: Path, chosen: str, reason: str
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"chosen": chosen, "rejected": hh("why?", "bad")}])
    assert only(tmp_path, "helpful", format="hh", path="a.jsonl").reason == reason


def rated(prompt: str, response: str, helpfulness: Any) -> Row:
    """A row of HelpSteer2's ratings, as its page shows one."""
    others = {"correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **others}


def preferred(strength: Any, **changes: Any) -> Row:
    """A row of HelpSteer2's preferences, as its page shows one."""
    said = {"statement": "@Response 2 is better.", "elaboration": "It is complete."}
    row = {
        "split": "train",
        "prompt": "Define Signal",
        "response_1": "energy",
        "response_2": "a message",
        "preference_strength": strength,
        "preference_statement": said["statement"],
        "preference_elaboration": said["elaboration"],
        "three_most_similar_preferences": [{**said, "strength": strength}],
        "all_preferences_unprocessed": [{"strength": strength, "justification": "It is complete."}],
    }
    return {**row, **changes}


def test_helpsteer2_pairs_ratings_that_follow_each_other_with_one_prompt(tmp_path: Path) -> None:
    rows = [
        rated("c#", "a language", 3), rated("c#", "a note", 1),
        rated("tie?", "x", 2), rated("tie?", "y", 2),
        rated("alone", "x", 4),
        rated("rap", "bad", 0), rated("rap", "good", 4.0),
        rated("null", "x", None), rated("null", "y", 4),
    ]  # fmt: skip
    write_jsonl(tmp_path / "train.jsonl", rows)
    found = records(tmp_path, "helpful", format="helpsteer2", path="train.jsonl")
    pairs = [item for item in found if isinstance(item, Usable)]
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        (user("c#"), "a language", "a note"),
        (user("rap"), "good", "bad"),
    ]
    assert [pair.where.line for pair in pairs] == [1, 6] and pairs[0].chosen_is_safe is None
    assert [(item.reason, item.where.line) for item in found if isinstance(item, Skipped)] == [
        ("tie", 3),
        ("no_second_answer", 5),
        ("no_preference", 8),
    ]


def test_helpsteer2_takes_no_answer_of_another_file_or_beyond_the_limit(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name, helpfulness in (("a", 1), ("b", 4)):
        write_jsonl(tmp_path / "parts" / f"{name}.jsonl", [rated("q", name, helpfulness)])
    for options in ({"path": "parts"}, {"path": "parts/a.jsonl"}):
        found = records(tmp_path, "helpful", format="helpsteer2", **options)
        assert {item.reason for item in found} == {"no_second_answer"}
    write_jsonl(tmp_path / "c.jsonl", [rated("q", "x", 1), rated("q", "y", 2)] * 2)
    cut = records(tmp_path, "helpful", format="helpsteer2", path="c.jsonl", limit=3)
    assert [type(item) for item in cut] == [Usable, Skipped]


def test_helpsteer2_reads_the_direction_of_a_preference(tmp_path: Path) -> None:
    rows = [preferred(strength) for strength in (-3, -1, 0, 1, 3, None)]
    write_gz(tmp_path / "preference.jsonl.gz", rows)
    found = records(tmp_path, "helpful", format="helpsteer2", path="preference.jsonl.gz")
    assert [getattr(item, "chosen", None) or item.reason for item in found] == [
        "energy", "energy", "tie", "a message", "a message", "no_preference"
    ]  # fmt: skip


def test_helpsteer2_splits_a_prompt_at_its_marked_turns(tmp_path: Path) -> None:
    prompt = "hi\n<extra_id_1>Assistant\nhello\nyou\n<extra_id_1>User\nwhy?"
    cut = "hi\n<extra_id_1>Assistant\nhello"
    rows = [preferred(1, prompt=prompt), preferred(1, prompt=cut)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    pair, bad = records(tmp_path, "helpful", format="helpsteer2", path="a.jsonl")
    assert [(turn["role"], turn["content"]) for turn in pair.prompt] == [
        ("user", "hi"),
        ("assistant", "hello\nyou"),
        ("user", "why?"),
    ]
    assert bad.reason == "bad_turns"


def test_helpsteer2_rejects_what_is_no_rating(tmp_path: Path) -> None:
    """5, and the lists of the file of disagreements; a row that cannot be read takes no partner."""
    rows = [rated("q", "x", 5), rated("q", "y", 1), rated("p", "x", [3, 3]), rated("p", "y", [4])]
    write_jsonl(tmp_path / "a.jsonl", [*rows, preferred(4), rated("r", "x", 1)])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("[1]\n" + json.dumps(rated("r", "y", 2)) + "\n")
    found = records(tmp_path, "helpful", format="helpsteer2", path="a.jsonl")
    rejected = [(item.reason, item.detail[:28]) for item in found if isinstance(item, Rejected)]
    assert rejected[:3] == [
        ("bad_label", "helpfulness_1 is 5, expected"),
        ("bad_label", "helpfulness_1 is [3, 3], exp"),
        ("bad_label", "preference_strength is 4, ex"),
    ]
    assert rejected[3][0] == "not_an_object"
    assert [item.chosen for item in found if isinstance(item, Usable)] == ["y"]


def test_helpsteer2_needs_the_columns_of_one_of_its_files(tmp_path: Path) -> None:
    bare = [{name: value for name, value in preferred(1).items() if name != "response_2"}]
    write_jsonl(tmp_path / "a.jsonl", bare)
    with pytest.raises(DataError, match="column 'response_2' is missing"):
        records(tmp_path, "helpful", format="helpsteer2", path="a.jsonl")
    for kind in ("sft", "safety"):
        with pytest.raises(DataError, match=rf"prepare\.{kind}: .* list it under prepare\.helpful"):
            records(tmp_path, kind, format="helpsteer2", path="a.jsonl")


def test_alpaca_joins_instruction_and_input(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "la"},
        {"instruction": "Go.", "output": "ok"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = records(tmp_path, "sft", format="alpaca", path="a.json")
    assert [(item.prompt[0]["content"], item.chosen) for item in found] == [
        ("Add.\n\n1 2", "3"),
        ("Sing.", "la"),
        ("Go.", "ok"),
    ]


def test_columns_maps_the_columns_of_any_table(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "a.csv", [{"q": "why?", "best": "so", "worst": "no", "ok": "true", "id": "7"}]
    )
    names = {"prompt": "q", "chosen": "best", "rejected": "worst"}
    for kind in ("helpful", "safety"):
        pair = only(
            tmp_path,
            kind,
            format="columns",
            path="a.csv",
            columns={**names, "chosen_is_safe": "ok"},
        )
        assert (pair.prompt, pair.chosen, pair.rejected) == (user("why?"), "so", "no")
        assert (pair.chosen_is_safe, pair.rejected_is_safe) == (True, None)
    answer = only(
        tmp_path, "sft", format="columns", path="a.csv", columns={"prompt": "q", "response": "best"}
    )
    assert (answer.chosen, answer.rejected) == ("so", None)


def test_columns_takes_a_prompt_of_several_turns(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    wrong = [
        [*turns, {"role": "assistant", "content": "yes"}],
        ["hi"],
        [{"role": "user", "content": 1}],
        [],
    ]
    write_jsonl(tmp_path / "a.jsonl", [{"p": prompt, "r": "hello"} for prompt in [turns, *wrong]])
    first, *others = records(
        tmp_path, "sft", format="columns", path="a.jsonl", columns={"prompt": "p", "response": "r"}
    )
    assert first.prompt == turns
    assert [item.reason for item in others] == ["bad_turns", "bad_turns", "not_text", "bad_turns"]


def test_the_world_gives_each_kind_its_own_rows(tmp_path: Path) -> None:
    found = {kind: records(tmp_path, kind, format="world") for kind in ("sft", "helpful", "safety")}
    assert [len(items) for items in found.values()] == [20, 30, 40]
    assert all(isinstance(item, Usable) for items in found.values() for item in items)
    assert all(
        item.chosen_is_safe is not None for kind in ("helpful", "safety") for item in found[kind]
    )
    helpful = [item.prompt for item in found["helpful"][:20]]
    assert helpful != [item.prompt for item in found["safety"][:20]]
    assert records(tmp_path, "safety", format="world") == found["safety"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("sft", {"is_response_0_safe", "is_response_1_safe"}),
        ("helpful", {"better_response_id"}),
        ("safety", {"safer_response_id", "is_response_0_safe", "is_response_1_safe"}),
    ],
)
def test_pku_needs_only_the_columns_of_its_use(tmp_path: Path, kind: Kind, names: set[str]) -> None:
    names = names | {"prompt", "response_0", "response_1"}
    write_jsonl(
        tmp_path / "a.jsonl", [{name: value for name, value in pku().items() if name in names}]
    )
    assert isinstance(only(tmp_path, kind, format="pku", path="a.jsonl"), Usable)
    for name in sorted(names):
        write_jsonl(
            tmp_path / "b.jsonl",
            [{key: value for key, value in pku().items() if key in names - {name}}],
        )
        with pytest.raises(DataError, match=f"column '{name}' is missing"):
            records(tmp_path, kind, format="pku", path="b.jsonl")


@pytest.mark.parametrize(
    ("spec", "row"),
    [
        ({"format": "pku"}, pku(prompt=" why?\n", response_1="\tso ")),
        ({"format": "hh"}, {"chosen": hh(" why?\n", "\tso "), "rejected": hh("why?", "no")}),
        ({"format": "alpaca"}, {"instruction": " why?\n", "output": "\tso "}),
        (
            {"format": "columns", "columns": {"prompt": "q", "response": "a"}},
            {"q": " why?\n", "a": "\tso "},
        ),
    ],
)
def test_white_space_around_texts_is_removed(tmp_path: Path, spec: Row, row: Row) -> None:
    write_jsonl(tmp_path / "a.jsonl", [row])
    answer = only(tmp_path, "sft", path="a.jsonl", **spec)
    assert (answer.prompt, answer.chosen) == (user("why?"), "so")


def test_limit_keeps_the_first_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [pku(i) for i in range(5)])
    assert [
        item.where.line
        for item in records(tmp_path, "safety", format="pku", path="a.jsonl", limit=2)
    ] == [1, 2]


def test_large_files_are_read_as_they_are_needed(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps(pku(i)) + "\n" for i in range(20_000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    stream = read(SourceSpec(format="pku", path="a.jsonl.gz"), "safety", tmp_path, WORLD, seed=1)
    assert len(list(islice(stream, 100))) == 100
    with pytest.raises(DataError, match="is the download complete"):
        list(stream)


def test_derived_seeds_differ_by_name_and_seed() -> None:
    assert (
        len({derived_seed(seed, name) for seed in (1, 2) for name in ("sft", "helpful", "safety")})
        == 6
    )


def test_a_source_is_named_by_format_path_and_split() -> None:
    assert label(SourceSpec(format="world")) == "world"
    assert label(SourceSpec(format="pku", path="a/b")) == "pku:a/b"
    assert label(SourceSpec(format="pku", path="a/b", split="test")) == "pku:a/b[test]"


# --- rows that are wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"safer_response_id": 2}, "bad_label", "safer_response_id is 2, expected 0, 1"),
        ({"is_response_0_safe": "maybe"}, "bad_label", "is_response_0_safe is 'maybe'"),
        ({"response_1": None}, "not_text", "response_1 is null"),
        ({"prompt": ["a"]}, "not_text", "prompt is ['a']"),
        (
            {"response_0": "half \ud83d"},
            "not_unicode",
            "response_0 holds half of a surrogate pair at character 5",
        ),
    ],
)
def test_a_wrong_cell_is_rejected_with_its_value_and_line(
    tmp_path: Path, changes: Row, reason: str, detail: str
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [pku(0), pku(1, **changes), pku(2)])
    bad = records(tmp_path, "safety", format="pku", path="a.jsonl")[1]
    assert isinstance(bad, Rejected)
    assert (bad.reason, bad.where.line) == (reason, 2)
    assert detail in bad.detail and bad.row


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "q", ', "not_json"),
        (b"[1, 2]", "not_an_object"),
        (b'{"prompt": "q", "better_response_id": 0, "safer_response_id": 0}', "missing_column"),
        (b'{"prompt": "\xff"}', "not_utf8"),
        (b"[" * 100_000, "not_json"),
    ],
)
def test_a_wrong_line_is_rejected_and_the_next_ones_are_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    good = json.dumps(pku()).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + line + b"\n\n" + good + b"\n")
    first, bad, last = records(tmp_path, "safety", format="pku", path="a.jsonl")
    assert (bad.reason, bad.where.line, last.where.line) == (reason, 2, 4)
    assert len(bad.row) <= 400 and isinstance(first, Usable) and isinstance(last, Usable)


def test_a_line_cut_off_at_the_end_is_rejected_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [pku(0), pku(1)])
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes()[:-30])
    with caplog.at_level(logging.WARNING):
        bad = records(tmp_path, "safety", format="pku", path="a.jsonl")[1]
    assert isinstance(bad, Rejected)
    assert (bad.reason, bad.where.line) == ("truncated_row", 2)
    assert "a.jsonl:2: the file ends within this row" in caplog.text


def test_a_csv_row_with_too_few_cells_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a\nwhy?,so\nwhat?\nhow?,thus\n")
    found = records(
        tmp_path, "sft", format="columns", path="a.csv", columns={"prompt": "q", "response": "a"}
    )
    assert [type(item) for item in found] == [Usable, Rejected, Usable]
    assert (found[1].reason, found[1].where.line) == ("wrong_cell_count", 3)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + json.dumps({"q": "why?", "a": "so"}).encode())
    (tmp_path / "a.json").write_bytes(mark + json.dumps([{"q": "why?", "a": "so"}]).encode())
    (tmp_path / "a.csv").write_bytes(mark + b"q,a\nwhy?,so\n")
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert (
            only(
                tmp_path,
                "sft",
                format="columns",
                path=name,
                columns={"prompt": "q", "response": "a"},
            ).chosen
            == "so"
        )


# --- files that are wrong -------------------------------------------------------------------------

GOOD = json.dumps([pku(0), pku(1)]).encode()
BROKEN = {
    "empty.jsonl": (b"", "holds no rows"),
    "blank.jsonl": (b"\n\n", "holds no rows"),
    "empty.json": (b"", "holds no rows"),
    "cut.json": (GOOD[:-10], "not valid JSON .* is the file complete"),
    "object.json": (b'{\n "rows": []\n}', "expected a list of rows, or one object per line"),
    "latin.json": ('[{"prompt": "café"}]'.encode("latin-1"), "not valid JSON"),
    "header.csv": (b"prompt,response_0\n", "holds no rows"),
    "latin.csv": ("prompt\ncafé\n".encode("latin-1"), r"latin\.csv:2: not UTF-8"),
    "not.jsonl.gz": (b'{"prompt": "q"}\n', "cannot be read .*[Nn]ot a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 50)[:-20], "cannot be read .* is the download complete"),
    "cut.json.xz": (lzma.compress(GOOD)[:-20], "cannot be read"),
    "cut.parquet": (b"PAR1\x00\x00", "not a readable parquet file"),
    "rows.xlsx": (b"PK", r"unknown kind of file; one of \.jsonl, \.json, \.csv, \.parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        records(tmp_path, "safety", format="pku", path=name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_an_open_quote_is_found_where_it_opens(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('q,a\nwhy?,so\nwhat?,"thus\nhow?,no\n')
    with pytest.raises(DataError, match=r"a\.csv:3: not valid CSV .*is a quote left open here"):
        records(
            tmp_path,
            "sft",
            format="columns",
            path="a.csv",
            columns={"prompt": "q", "response": "a"},
        )


def test_a_missing_column_is_named_with_those_present(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"prompt": "why?", "chosen": "so"}])
    with pytest.raises(
        DataError, match=r"a\.csv: column 'rejected' is missing .*the file has: prompt, chosen"
    ):
        records(tmp_path, "helpful", format="hh", path="a.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "q"}, "columns lacks 'response'; it must map prompt and response, or messages"),
        (
            {"prompt": "q", "response": "a", "chosen": "b"},
            "unknown key 'chosen'; valid keys: prompt, response",
        ),
        ({"prompt": "q", "response": "b"}, "column 'b' is missing .*the file has: q, a"),
    ],
)
def test_a_wrong_column_map_is_explained(
    tmp_path: Path, columns: dict[str, str], message: str
) -> None:
    write_csv(tmp_path / "a.csv", [{"q": "why?", "a": "so"}])
    with pytest.raises(DataError, match=message):
        records(tmp_path, "sft", format="columns", path="a.csv", columns=columns)


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        (
            "safety",
            {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_is_safe": "ok"}
            | {"rejected_is_safe": "ok"},
            "prepare.safety: columns:a.csv: columns maps 'chosen_is_safe' to 'ok', and another name"
            " too; map each name to a column of its own",
        ),
        (
            "sft",
            {"messages": "q", "response": "a"},
            "prepare.sft: columns:a.csv: columns maps 'messages', which end with their answer, and"
            " 'response'; map messages alone, or prompt and response",
        ),
    ],
)
def test_a_column_map_of_two_meanings_is_refused(
    tmp_path: Path, kind: Kind, columns: dict[str, str], message: str
) -> None:
    """The second flag would be the first one's; the response would not be read."""
    write_csv(tmp_path / "a.csv", [{"q": "why?", "a": "so", "b": "no", "ok": 1}])
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        records(tmp_path, kind, format="columns", path="a.csv", columns=columns)


def test_alpaca_holds_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"prepare\.helpful: .*'alpaca' holds nothing for it; list it .*prepare\.sft",
    ):
        records(tmp_path, "helpful", format="alpaca", path="a.json")


@pytest.mark.parametrize("path", ["nosuch.jsonl", "owner/nosuch.jsonl", "nosuch"])
def test_a_missing_file_is_named_with_its_folder(tmp_path: Path, path: str) -> None:
    with pytest.raises(
        DataError, match=r"no such file; put nosuch.* into .*or correct prepare\.sft"
    ) as caught:
        records(tmp_path, "sft", format="alpaca", path=path)
    assert str(tmp_path / path) in str(caught.value)


def test_an_absolute_path_is_allowed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [pku()])
    assert isinstance(
        only(Path("elsewhere"), "safety", format="pku", path=str(tmp_path / "a.jsonl")), Usable
    )


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.binary(max_size=80),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"]),
)
def test_no_bytes_raise_anything_but_a_data_error(
    tmp_path: Path, content: bytes, name: str
) -> None:
    (tmp_path / name).write_bytes(content)
    try:
        found = records(
            tmp_path, "sft", format="columns", path=name, columns={"prompt": "q", "response": "a"}
        )
    except DataError:
        return
    assert not any(isinstance(item, Usable) for item in found)


# --- datasets -------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`datasets` caches what it builds; keep that out of the home folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_a_folder_is_loaded_as_a_dataset(own_cache: Path) -> None:
    (own_cache / "mine").mkdir()
    write_jsonl(own_cache / "mine" / "train.jsonl", [pku(0), pku(1)])
    write_jsonl(own_cache / "mine" / "test.jsonl", [pku(2, better_response_id=None)])
    assert [
        item.where.line for item in records(own_cache, "safety", format="pku", path="mine")
    ] == [1, 2]
    assert isinstance(only(own_cache, "helpful", format="pku", path="mine", split="test"), Skipped)
    with pytest.raises(
        DataError, match=r"mine: no file's name speaks of split 'dev'; names speak of: test, train"
    ):
        records(own_cache, "safety", format="pku", path="mine", split="dev")


def test_a_hub_id_may_name_a_folder_within_the_dataset(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_dataset` takes a folder below the working directory for a hub id, so the same call is
    tried here.
    """
    for name in ("harmless-base", "helpful-base"):
        inner = own_cache / "owner" / "name" / name
        inner.mkdir(parents=True)
        write_jsonl(inner / "train.jsonl", [{"chosen": hh("q", name), "rejected": hh("q", "bad")}])
    monkeypatch.chdir(own_cache)
    pair = only(Path("raw"), "safety", format="hh", path="owner/name/harmless-base")
    assert (pair.chosen, pair.where.file) == ("harmless-base", "owner/name/harmless-base")


def test_without_a_network_it_is_said_where_to_put_the_file(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"dualign-tests/nosuch: split 'train' cannot be .* put the file into"
    ) as caught:
        records(own_cache, "safety", format="pku", path="dualign-tests/nosuch")
    assert "\n" not in str(caught.value)


# --- real rows ------------------------------------------------------------------------------------

OWN = {"prompt": "prompt", "response": "response"}
GENUINE = [
    ("safety", {"format": "pku", "path": "pku_safety/pairs.jsonl"}, {"Usable": 2701}),
    ("helpful", {"format": "pku", "path": "pku_safety/pairs.jsonl"}, {"no_preference": 2701}),
    ("helpful", {"format": "pku", "path": "pku_full/train.json"}, {"Usable": 32}),
    ("safety", {"format": "pku", "path": "pku_full/train.json"}, {"Usable": 32}),
    ("sft", {"format": "pku", "path": "pku_full/train.json"}, {"Usable": 27, "no_safe_answer": 16}),
    (
        "helpful",
        {"format": "hh", "path": "hh_rlhf/helpful-base.test.jsonl.gz"},
        {"Usable": 2339, "bad_turns": 15},
    ),
    (
        "helpful",
        {"format": "hh", "path": "hh_rlhf/helpful-online.test.jsonl.gz"},
        {"Usable": 1135, "not_a_dialogue": 2},
    ),
    (
        "safety",
        {"format": "hh", "path": "hh_rlhf/harmless-base.test.jsonl.gz"},
        {"Usable": 2303, "bad_turns": 9},
    ),
    ("sft", {"format": "alpaca", "path": "alpaca/alpaca_5000.json"}, {"Usable": 5000}),
    (
        "sft",
        {"format": "columns", "path": "pku_sft/sft_safety.jsonl", "columns": OWN},
        {"Usable": 4000},
    ),
]


@pytest.mark.parametrize(("kind", "spec", "expected"), GENUINE)
def test_genuine_files_are_read_in_full(kind: Kind, spec: Row, expected: dict[str, int]) -> None:
    if not (REAL / spec["path"]).is_file():
        pytest.skip(f"real rows are not here: {REAL / spec['path']} (set DUALIGN_REAL_DATA)")
    found = records(REAL, kind, **spec)
    assert Counter(getattr(item, "reason", "Usable") for item in found) == expected
    kept = [item for item in found if isinstance(item, Usable)]
    assert all("\n\nHuman:" not in item.chosen for item in kept)

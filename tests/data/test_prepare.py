"""The rules of `prepare`: what is rejected, merged, reserved and kept, and that no prompt is in two
sets.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

from dualign.core import schema
from dualign.core.errors import DataError
from dualign.core.schema import Message, normalise, user
from dualign.data.prepare import _places, prepare
from dualign.params.data import PrepareParams

ROOT = Path(__file__).parents[2]
REAL = Path(os.environ.get("DUALIGN_REAL_DATA", ROOT / "../shared/data"))
TABLES = {
    "sft": schema.SFT,
    "helpful_pairs": schema.HELPFUL_PAIRS,
    "safety_pairs": schema.SAFETY_PAIRS,
}
SETS = ("search", "certify", "eval", "pool")
WORLD = {"format": "world"}
Row = dict[str, Any]


def params(folder: Path, **changes: Any) -> PrepareParams:
    """Small sets and generous limits; every source is the world unless changed."""
    values = {
        "seed": 3,
        "folder": str(folder),
        "sft": [WORLD],
        "helpful": [WORLD],
        "safety": [WORLD],
        "world": {"sft_rows": 400, "helpful_pairs": 500, "safety_pairs": 600, "sharpness": 1.0},
        "pool_prompts": 31,
        "search_prompts": 20,
        "certify_prompts": 30,
        "eval_prompts": 41,
        "heldout_share": 0.2,
        "max_rejected_share": 0.1,
        "max_prompt_chars": 500,
        "max_response_chars": 500,
    }
    return PrepareParams.model_validate(values | changes)


def read_all(folder: Path) -> dict[str, pd.DataFrame]:
    tables = {
        name: schema.read_table(folder / f"{name}.parquet", columns)
        for name, columns in TABLES.items()
    }
    return tables | {
        name: schema.read_table(folder / f"{name}.parquet", schema.PROMPTS) for name in SETS
    }


def quarantine(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pair(number: int, **changes: Any) -> Row:
    row = {"prompt": f"question {number}", "chosen": f"good {number}", "rejected": f"bad {number}"}
    return {**row, "chosen_is_safe": True, "rejected_is_safe": False, **changes}


FILES = {
    name: {"format": "columns", "path": f"{name}.jsonl"} for name in ("sft", "helpful", "safety")
}
_PAIR = {
    name: name for name in ("prompt", "chosen", "rejected", "chosen_is_safe", "rejected_is_safe")
}
MAPS = {
    "sft": {"prompt": "prompt", "response": "chosen"},
    "helpful": _PAIR,
    "safety": _PAIR,
}
SOURCES = {kind: [FILES[kind] | {"columns": MAPS[kind]}] for kind in FILES}
TINY = {
    "pool_prompts": 4,
    "search_prompts": 4,
    "certify_prompts": 4,
    "eval_prompts": 4,
    "max_rejected_share": 0.5,
}


def write_files(folder: Path, **rows: list[Row]) -> None:
    """Files of the three kinds: 60 good rows each, followed by the rows given."""
    for offset, kind in enumerate(FILES):
        every = [pair(1000 * offset + number) for number in range(60)] + rows.get(kind, [])
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in every))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Row, dict[str, pd.DataFrame], list[Row]]]:
    """Prepare files of 60 good rows and the given ones; return metrics, tables and quarantine."""

    def prepared(
        changes: Row | None = None, **rows: list[Row]
    ) -> tuple[Row, dict[str, pd.DataFrame], list[Row]]:
        write_files(tmp_path, **rows)
        metrics = prepare(params(tmp_path, **SOURCES, **TINY | (changes or {})), tmp_path / "out")
        return (
            metrics,
            read_all(tmp_path / "out"),
            quarantine(tmp_path / "out" / "quarantine.jsonl"),
        )

    return prepared


# --- splits ---------------------------------------------------------------------------------------


def places(tables: dict[str, pd.DataFrame]) -> dict[str, set[str]]:
    """Every place that a prompt is found in."""
    found: dict[str, set[str]] = {}
    for name in ("search", "certify", "eval"):
        for key in tables[name]["prompt_id"]:
            found.setdefault(key, set()).add(name)
    for name in TABLES:
        for key, split in zip(tables[name]["prompt_id"], tables[name]["split"], strict=True):
            found.setdefault(key, set()).add(split)
    return found


def test_every_prompt_is_in_one_place_only(tmp_path: Path) -> None:
    prepare(params(tmp_path), tmp_path / "out")
    tables = read_all(tmp_path / "out")
    found = places(tables)
    assert {len(where) for where in found.values()} == {1}
    assert set.union(*found.values()) == {"search", "certify", "eval", "heldout", "train"}
    assert [len(tables[name]) for name in SETS] == [20, 30, 41, 31]
    assert all(tables[name]["prompt_id"].is_unique for name in SETS)


def questions(tables: dict[str, pd.DataFrame]) -> dict[str, set[str]]:
    """The splits and reserved sets in which dialogues that begin with a question stand, by
    question.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for name, table in tables.items():
        if name == "pool":
            continue
        splits = table["split"] if "split" in table else [name] * len(table)
        for prompt, split in zip(table["prompt"], splits, strict=True):
            first = next(turn["content"] for turn in prompt if turn["role"] == "user")
            found[normalise(first)].add(split)
    return found


def test_a_dialogue_that_goes_on_stays_with_its_beginning(tmp_path: Path) -> None:
    """HH releases a dialogue at several lengths: the longer prompt holds an answer to the shorter
    one.
    """
    write_files(tmp_path)
    begun = [pair(number) for number in range(60)]
    longer = []
    for row in begun[::2]:
        turns = [
            *user(row["prompt"]),
            {"role": "assistant", "content": row["chosen"]},
            *user("And then?"),
        ]
        longer.append({**row, "prompt": turns, "chosen": "Then this.", "rejected": "Then that."})
    for kind in ("helpful", "safety"):
        (tmp_path / f"{kind}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in [*begun, *longer])
        )
    prepare(params(tmp_path, **SOURCES, **TINY), tmp_path / "out")
    tables = read_all(tmp_path / "out")
    assert {len(where) for where in questions(tables).values()} == {1}
    assert any(len(prompt) > 1 for prompt in tables["helpful_pairs"]["prompt"])


def test_a_question_under_a_system_turn_stays_with_the_question_alone(tmp_path: Path) -> None:
    write_files(tmp_path)
    plain = [pair(number) for number in range(60)]
    system = {"role": "system", "content": "Be brief."}
    told = [{**row, "prompt": [system, *user(row["prompt"])]} for row in plain[::2]]
    for kind in ("helpful", "safety"):
        (tmp_path / f"{kind}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in [*plain, *told])
        )
    prepare(params(tmp_path, **SOURCES, **TINY), tmp_path / "out")
    assert {len(where) for where in questions(read_all(tmp_path / "out")).values()} == {1}


def dialogues(number: int, lengths: int) -> list[Row]:
    """Pairs of one dialogue at several lengths."""
    turns = user(f"question {number}")
    found = []
    for length in range(lengths):
        found.append(
            {
                **pair(number),
                "prompt": list(turns),
                "chosen": f"so {length}",
                "rejected": f"no {length}",
            }
        )
        turns += [{"role": "assistant", "content": f"so {length}"}, *user(f"and {length}?")]
    return found


def families(table: pd.DataFrame) -> list[str]:
    def question(turns: Sequence[Message]) -> str:
        return next(turn["content"] for turn in turns if turn["role"] == "user")

    return [normalise(question(turns)) for turns in table["prompt"]]


def test_a_reserved_set_holds_one_prompt_of_a_dialogue(tmp_path: Path) -> None:
    """Prompts that begin alike are no independent draws, so an estimate over a set counts each
    dialogue once.
    """
    write_files(tmp_path)
    rows = {"helpful": range(40), "safety": range(20, 60)}
    for kind, numbers in rows.items():
        lines = [json.dumps(row) + "\n" for number in numbers for row in dialogues(number, 5)]
        (tmp_path / f"{kind}.jsonl").write_text("".join(lines))
    sizes = {"search_prompts": 12, "certify_prompts": 12, "eval_prompts": 12, "pool_prompts": 60}
    prepare(params(tmp_path, **SOURCES, **TINY | sizes), tmp_path / "out")
    tables = read_all(tmp_path / "out")
    drawn = [name for which in ("search", "certify", "eval") for name in families(tables[which])]
    assert len(drawn) == 36 == len(set(drawn))
    assert {len(where) for where in questions(tables).values()} == {1}
    assert len(set(families(tables["pool"]))) < 60  # training prompts are drawn one by one


def test_families_that_are_left_are_counted(tmp_path: Path) -> None:
    write_files(tmp_path)
    for kind in ("helpful", "safety"):
        lines = [json.dumps(row) + "\n" for number in range(10) for row in dialogues(number, 9)]
        (tmp_path / f"{kind}.jsonl").write_text("".join(lines))
    for count, kind, wanted, left in ((22, "helpful", 11, 10), (12, "safety", 6, 4)):
        message = (
            f"the set 'search' takes {wanted} prompts from the {kind} pairs, but {left} are left"
        )
        with pytest.raises(DataError, match=message):
            prepare(
                params(tmp_path, **SOURCES, **TINY | {"search_prompts": count}), tmp_path / "out"
            )


def test_prompts_of_one_turn_are_drawn_by_their_own_hash(run: Any) -> None:
    """The draw by families leaves data of one turn where it was: those with the lowest hash of
    seed, set and prompt.
    """
    _, tables, _ = run()

    def place(key: str) -> bytes:
        return hashlib.sha256(f"3:search:{key}".encode()).digest()[:6]

    def asked(start: int) -> list[str]:
        return [schema.prompt_id(user(f"question {start + n}")) for n in range(60)]

    keys = [asked(1000), asked(2000)]
    lowest = [key for of_kind in keys for key in sorted(of_kind, key=place)[:2]]
    assert list(tables["search"]["prompt_id"]) == sorted(lowest, key=place)


def test_one_spelling_of_a_prompt_does_not_leak_into_another_set(tmp_path: Path) -> None:
    loud = [pair(number, prompt=f"  QUESTION {number}?!") for number in range(60)]
    write_files(tmp_path)
    for kind, rows in {
        "sft": loud,
        "helpful": [pair(n) for n in range(60)],
        "safety": loud,
    }.items():
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = prepare(params(tmp_path, **SOURCES, **TINY), tmp_path / "out")
    found = places(read_all(tmp_path / "out"))
    assert len(found) == 60 and {len(where) for where in found.values()} == {1}
    assert [metrics["sources"][kind][f"columns:{kind}.jsonl"]["reserved"] for kind in SOURCES] == [
        12,
        12,
        12,
    ]


def test_sets_come_half_from_helpful_and_half_from_safety_pairs(run: Any) -> None:
    _, tables, _ = run({"eval_prompts": 5})
    for name, helpful, safety in (
        ("search", 2, 2),
        ("certify", 2, 2),
        ("eval", 3, 2),
        ("pool", 2, 2),
    ):
        counts = tables[name]["source"].value_counts()
        assert (counts["columns:helpful.jsonl"], counts["columns:safety.jsonl"]) == (
            helpful,
            safety,
        )


def test_pool_prompts_are_training_prompts_of_pairs(tmp_path: Path) -> None:
    prepare(params(tmp_path), tmp_path / "out")
    tables = read_all(tmp_path / "out")
    pairs = pd.concat([tables["helpful_pairs"], tables["safety_pairs"]])
    assert set(tables["pool"]["prompt_id"]) <= set(
        pairs.loc[pairs["split"] == "train", "prompt_id"]
    )


def test_a_set_is_mixed_so_that_its_first_prompts_are_a_sample_of_it(tmp_path: Path) -> None:
    write_files(tmp_path)
    changes = {"eval_prompts": 40}
    prepare(params(tmp_path, **SOURCES, **TINY | changes), tmp_path / "out")
    first = read_all(tmp_path / "out")["eval"]["source"].head(20)
    assert 4 <= (first == "columns:helpful.jsonl").sum() <= 16


def test_heldout_share_is_kept(tmp_path: Path) -> None:
    sizes = {"sft_rows": 3000, "helpful_pairs": 3000, "safety_pairs": 3000, "sharpness": 1.0}
    metrics = prepare(params(tmp_path, world=sizes), tmp_path / "out")
    for counts in metrics["tables"].values():
        assert counts["heldout"] / (counts["heldout"] + counts["train"]) == pytest.approx(
            0.2, abs=0.03
        )


def test_new_rows_move_few_prompts(tmp_path: Path) -> None:
    sizes = {"sft_rows": 1000, "helpful_pairs": 1000, "safety_pairs": 1000, "sharpness": 1.0}
    prepare(params(tmp_path, world=sizes), tmp_path / "small")
    (tmp_path / "more.jsonl").write_text(
        "".join(json.dumps(pair(number)) + "\n" for number in range(100))
    )
    more = {"format": "columns", "path": "more.jsonl", "columns": MAPS["safety"]}
    prepare(params(tmp_path, world=sizes, safety=[WORLD, more]), tmp_path / "large")
    before = places(read_all(tmp_path / "small"))
    after = places(read_all(tmp_path / "large"))
    moved = [key for key, where in before.items() if after[key] != where]
    assert 0 < len(after) - len(before) == 100
    assert len(moved) < 30


def test_too_few_prompts_are_said_with_what_to_lower(run: Any) -> None:
    message = (
        "the set 'certify' takes 60 prompts from the helpful pairs, but 58 are left; lower"
        " prepare.search_prompts, prepare.certify_prompts or prepare.eval_prompts, or add helpful"
        " pairs"
    )
    with pytest.raises(DataError, match=message):
        run({"certify_prompts": 120})
    with pytest.raises(
        DataError, match=r"the set 'pool' takes 100 prompts .* lower prepare\.pool_prompts, or add"
    ):
        run({"pool_prompts": 200})


def test_an_empty_split_is_named_with_its_table(run: Any) -> None:
    with pytest.raises(
        DataError,
        match=r"prepare\.sft: sft has no row in split 'heldout': .* 60 rows are left; add rows",
    ):
        run({"heldout_share": 0.001})
    with pytest.raises(
        DataError, match=r"prepare\.helpful: helpful_pairs has no row in split 'train'"
    ):
        run({"search_prompts": 112})


# --- bytes ----------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def test_the_same_seed_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    prepare(params(tmp_path), tmp_path / "here")
    code = (
        "import sys; from pathlib import Path; from dualign.data.prepare import prepare;"
        "from dualign.params.data import PrepareParams;"
        "prepare(PrepareParams.model_validate_json(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [
        sys.executable,
        "-c",
        code,
        params(tmp_path).model_dump_json(),
        str(tmp_path / "there"),
    ]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "77"})
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    assert sorted(digests(tmp_path / "here")) == sorted(
        [f"{n}.parquet" for n in (*TABLES, *SETS)] + ["quarantine.jsonl"]
    )


def held(folder: Path, rows: int) -> int:
    """The most bytes that Python holds while so many rows of 6,000 characters are prepared."""
    for kind in FILES:
        lines = (
            json.dumps(pair(n, chosen=f"{n} " * 600, rejected="no " * 1000)) for n in range(rows)
        )
        (folder / f"{kind}.jsonl").write_text("\n".join(lines))
    limits = {"max_response_chars": 5000}
    tracemalloc.start()
    try:
        prepare(params(folder, **SOURCES, **TINY | limits), folder / f"out-{rows}")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_hold_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualign.core.artifacts._BATCH", 32)
    held(tmp_path, 60)
    few, many = (held(tmp_path, rows) for rows in (200, 800))
    assert many - few < 3 * 600 * 500  # three kinds; a row's texts alone are 6,000 bytes


def test_another_seed_gives_other_sets(run: Any) -> None:
    keys = [set(run({"seed": seed})[1]["eval"]["prompt_id"]) for seed in (1, 2)]
    assert keys[0] != keys[1]


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"prompt": " "}, "empty_prompt", "a turn of the prompt is empty"),
        ({"rejected": "\n"}, "empty_answer", "an answer is empty"),
        ({"rejected": "good 99 "}, "identical_answers", "both answers are the same"),
        ({"prompt": "q" * 501}, "prompt_too_long", "501 characters; max_prompt_chars 500"),
        ({"rejected": "a" * 501}, "response_too_long", "501 characters; max_response_chars 500"),
        (
            {"chosen_is_safe": False, "rejected_is_safe": True},
            "contradictory_flags",
            "the safer answer is flagged unsafe",
        ),
        ({"chosen_is_safe": 2}, "bad_label", "chosen_is_safe is 2"),
    ],
)
def test_a_bad_row_is_in_the_quarantine_and_not_in_the_table(
    run: Any, changes: Row, reason: str, detail: str
) -> None:
    metrics, tables, bad = run(safety=[pair(99, **changes)])
    assert [(row["reason"], row["kind"], row["line"]) for row in bad] == [(reason, "safety", 61)]
    assert (
        detail in bad[0]["detail"]
        and bad[0]["file"].endswith("safety.jsonl")
        and len(bad[0]["row"]) <= 400
    )
    assert metrics["rejected"] == {reason: 1}
    assert (
        not tables["safety_pairs"]["prompt"]
        .map(lambda turns: turns[0]["content"] == "question 99")
        .any()
    )


def test_texts_at_the_limit_pass(run: Any) -> None:
    _, _, bad = run(helpful=[pair(99, prompt="q" * 500, chosen="a" * 500)])
    assert bad == []


def test_flags_of_the_world_are_noise_and_not_contradictions(tmp_path: Path) -> None:
    metrics = prepare(params(tmp_path), tmp_path / "out")
    assert metrics["safety_flags"]["unsafe_safe"] > 0
    assert "contradictory_flags" not in metrics["rejected"]


def find(tables: dict[str, pd.DataFrame], prompt: str, kind: str = "safety") -> list[Row]:
    """Pairs of a prompt; prompts of these tests are kept out of the sets by asking several
    seeds.
    """
    table = tables[f"{kind}_pairs"]
    rows = table[table["prompt"].map(lambda turns: turns[0]["content"] == prompt)]
    return rows.rename(columns=str).to_dict("records")


def pairs_of(run: Any, *rows: Row, kind: str = "safety") -> tuple[list[Row], Row, list[Row]]:
    """The pairs that remain of some rows about question 99, the counts of their source, and the
    quarantine.

    Prompts of both kinds are drawn by hash; seeds are tried until this one is in no set.
    """
    for seed in range(20):
        metrics, tables, bad = run({"seed": seed}, **{kind: list(rows)})
        key = schema.prompt_id(schema.user("question 99"))
        if not any(key in set(tables[name]["prompt_id"]) for name in ("search", "certify", "eval")):
            return (
                find(tables, "question 99", kind),
                metrics["sources"][kind][f"columns:{kind}.jsonl"],
                bad,
            )
    raise AssertionError("question 99 is reserved under every seed")


TURNED = {
    "chosen": "bad 99",
    "rejected": "good 99",
    "chosen_is_safe": None,
    "rejected_is_safe": None,
}


def test_duplicates_are_merged_and_counted(run: Any) -> None:
    left, counts, bad = pairs_of(run, pair(99), pair(99), pair(99, prompt="Question 99!"))
    assert len(left) == 1 and left[0]["chosen"] == "good 99"
    assert (counts["duplicates"], counts["rejected"], bad) == (2, 0, [])


def test_the_majority_decides_which_answer_is_preferred(run: Any) -> None:
    left, counts, bad = pairs_of(run, pair(99, **TURNED), pair(99), pair(99))
    assert [row["chosen"] for row in left] == ["good 99"]
    assert (counts["duplicates"], counts["rejected"]) == (1, 1)
    assert [(row["reason"], row["line"]) for row in bad] == [("contradictory_labels", 61)]


def test_a_tie_rejects_all(run: Any) -> None:
    left, counts, bad = pairs_of(run, pair(99), pair(99, **TURNED))
    assert left == [] and counts["rejected"] == 2
    assert [(row["reason"], row["line"]) for row in bad] == [
        ("contradictory_labels", 61),
        ("contradictory_labels", 62),
    ]


def test_flags_are_voted_on_by_the_rows_that_have_them(run: Any) -> None:
    none = {"chosen_is_safe": None, "rejected_is_safe": None}
    left, _, _ = pairs_of(run, pair(99, **none), pair(99, **none), pair(99))
    assert [(row["chosen_is_safe"], row["rejected_is_safe"]) for row in left] == [(True, False)]
    left, _, bad = pairs_of(run, pair(99), pair(99, rejected_is_safe=True))
    assert left == [] and [row["reason"] for row in bad] == ["contradictory_labels"] * 2
    one = {"rejected_is_safe": None}
    left, _, bad = pairs_of(run, pair(99, **one), pair(99, **one), pair(99))
    assert [(row["chosen_is_safe"], row["rejected_is_safe"]) for row in left] == [(True, False)]
    left, _, bad = pairs_of(run, pair(99, **one), pair(99, **none))
    assert [(row["chosen_is_safe"], row["rejected_is_safe"]) for row in left] == [(True, None)]
    left, _, bad = pairs_of(run, pair(99, **none), pair(99, **none))
    assert [row["chosen_is_safe"] for row in left] == [None] and bad == []


def test_flags_of_helpful_pairs_rank_nothing_and_never_cost_a_row(run: Any) -> None:
    unsafe = {"chosen_is_safe": False, "rejected_is_safe": True}
    left, _, bad = pairs_of(run, pair(99, **unsafe), kind="helpful")
    assert [(row["chosen_is_safe"], row["rejected_is_safe"]) for row in left] == [
        (False, True)
    ] and bad == []
    left, counts, bad = pairs_of(run, pair(99), pair(99, **unsafe), kind="helpful")
    assert [(row["chosen"], row["chosen_is_safe"], row["rejected_is_safe"]) for row in left] == [
        ("good 99", None, None)
    ]
    assert counts["duplicates"] == 1 and bad == []


def test_rows_of_reserved_prompts_are_dropped_and_counted(run: Any) -> None:
    metrics, tables, _ = run()
    counts = metrics["sources"]["helpful"]["columns:helpful.jsonl"]
    assert (counts["reserved"], counts["kept"], len(tables["helpful_pairs"])) == (6, 54, 54)
    assert metrics["rejected"] == {}


@pytest.mark.parametrize("files", [False, True])
def test_every_record_is_accounted_for(tmp_path: Path, files: bool) -> None:
    write_files(tmp_path, safety=[pair(1), pair(1), pair(2, prompt="")], sft=[pair(5), pair(5)])
    metrics = prepare(params(tmp_path, **(SOURCES | TINY if files else {})), tmp_path / "out")
    tables = {"sft": "sft", "helpful": "helpful_pairs", "safety": "safety_pairs"}
    for kind, sources in metrics["sources"].items():
        for counts in sources.values():
            outcomes = ("kept", "reserved", "duplicates", "skipped", "rejected")
            assert counts["records"] == sum(counts[name] for name in outcomes)
            assert counts["rejected"] == sum(counts["rejected_by_reason"].values())
        assert sum(counts["kept"] for counts in sources.values()) == sum(
            metrics["tables"][tables[kind]].values()
        )
    assert sum(metrics["safety_flags"].values()) == sum(metrics["tables"]["safety_pairs"].values())


def test_too_many_bad_rows_stop_the_run_and_show_where_they_are(run: Any, tmp_path: Path) -> None:
    rows = [pair(200 + number, rejected="") for number in range(9)] + [pair(300, prompt="")]
    failed = tmp_path / "quarantine-failed.jsonl"
    message = (
        r"prepare\.safety: columns:safety\.jsonl: 10 of 70 records rejected \(empty_answer 9,"
        r" empty_prompt 1\), "
        r"more than prepare\.max_rejected_share 0\.1; the first is .*safety\.jsonl:61 \(an answer"
        r" is empty\); "
        rf"see {re.escape(str(failed))}"
    )
    with pytest.raises(DataError, match=message):
        run({"max_rejected_share": 0.1}, safety=rows)
    assert len(quarantine(failed)) == 10
    run({"max_rejected_share": 0.2}, safety=rows)
    assert not failed.exists()


def test_the_quarantine_of_a_source_is_bounded_and_every_row_counted(
    run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dualign.data.prepare.QUARANTINE_LIMIT", 4)
    rows = [pair(200 + number, rejected="") for number in range(9)]
    metrics, _, bad = run(safety=rows, helpful=[pair(300, prompt="")])
    assert [(row["kind"], row["line"]) for row in bad] == [("helpful", 61)] + [
        ("safety", 61 + n) for n in range(4)
    ]
    assert metrics["rejected"] == {"empty_prompt": 1, "empty_answer": 9}
    assert (
        "columns:safety.jsonl: more than 4 rows are rejected; the others are counted" in caplog.text
    )


def test_answers_that_hold_their_prompt_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As files of whole texts have them; a few that take the question up are as they may be."""
    write_files(tmp_path)
    whole = [pair(n, chosen=f"question {n} good", rejected=f"question {n} bad") for n in range(60)]
    mixed = [pair(1000 + n, chosen=f"question {1000 + n} good") for n in range(60)]
    for kind, rows in (("helpful", whole), ("safety", mixed)):
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(params(tmp_path, **SOURCES, **TINY), tmp_path / "out")
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told.startswith(
        "helpful: columns:helpful.jsonl: in 60 of 60 records the answers begin with the prompt;"
    )


def test_two_readings_of_one_path_are_counted_apart(tmp_path: Path) -> None:
    """Together they would have half of their rows rejected, which is allowed."""
    write_files(tmp_path)
    rows = [{**pair(number), "worst": f"good {number}"} for number in range(60)]
    (tmp_path / "helpful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (good,) = SOURCES["helpful"]
    wrong = {**good, "columns": {**MAPS["helpful"], "rejected": "worst"}}
    named = re.escape("prepare.helpful: columns:helpful.jsonl (2): 60 of 60 records rejected")
    changes = {**SOURCES, **TINY, "helpful": [good, wrong]}
    with pytest.raises(DataError, match=named):
        prepare(params(tmp_path, **changes), tmp_path / "out")


def test_a_source_that_says_nothing_of_its_kind_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path)
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": None}
    (tmp_path / "unrated.json").write_text(json.dumps([row, row]))
    with pytest.raises(
        DataError,
        match=r"prepare\.helpful: pku:unrated\.json gives nothing: of 2 records 0 are rejected",
    ):
        prepare(
            params(tmp_path, helpful=[WORLD, {"format": "pku", "path": "unrated.json"}]),
            tmp_path / "out",
        )


def test_half_of_a_surrogate_pair_can_be_written_to_the_quarantine(run: Any) -> None:
    _, _, bad = run(helpful=[pair(99, chosen="half \ud83d")])
    assert bad[0]["reason"] == "not_unicode" and "\ud83d" in json.loads(bad[0]["row"])["chosen"]


def test_each_line_of_the_quarantine_is_json_whatever_the_row_holds(
    run: Any, tmp_path: Path
) -> None:
    """Python reads NaN from a row, which JSON has not; the row is kept as a text."""
    run(safety=[pair(99, chosen=float("nan"), note=[float("inf")])])
    lines = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    (row,) = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert row["reason"] == "not_text" and "NaN" in row["row"] and "nan" in row["detail"]


# --- the guide ------------------------------------------------------------------------------------

GUIDE = (ROOT / "docs" / "data.md").read_text()


def guide_sources() -> list[tuple[str, Row]]:
    blocks = [
        YAML(typ="safe").load(block)["prepare"]
        for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.S)
    ]
    return [(kind, spec) for block in blocks for kind, specs in block.items() for spec in specs]


def guide_files() -> dict[str, str]:
    return dict(re.findall(r"`data/raw/([\w.]+)`:\n\n```\w+\n(.*?)```", GUIDE, re.S))


@pytest.mark.parametrize(("kind", "spec"), guide_sources())
def test_the_examples_of_the_guide_are_read_without_a_rejected_row(
    tmp_path: Path, kind: str, spec: Row
) -> None:
    files = guide_files()
    assert len(files) == 4
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    checked = params(tmp_path, **{kind: [WORLD, spec]})
    if spec["path"] not in files:
        assert re.fullmatch(
            r"[\w-]+/[\w.-]+(/[\w-]+)?", spec["path"]
        )  # a hub id: its params are valid
        return
    metrics = prepare(checked, tmp_path / "out")
    counts = metrics["sources"][kind][f"{spec['format']}:{spec['path']}"]
    assert counts["records"] >= 1 and counts["rejected"] == 0


def test_the_guide_lists_every_reason(run: Any) -> None:
    code = "".join(path.read_text() for path in sorted((ROOT / "dualign" / "data").glob("*.py")))
    reasons = set(re.findall(r'(?:BadRow|_rejected)\((?:row\.?\w*, |record, )?"(\w+)"', code))
    listed = set(
        re.findall(r"`(\w+)`", GUIDE.split("## The quarantine")[1].split("## If prepare stops")[0])
    )
    assert len(reasons) >= 15 and reasons <= listed


# --- real rows ------------------------------------------------------------------------------------


def test_genuine_sources_together(tmp_path: Path) -> None:
    if not (REAL / "pku_safety" / "pairs.jsonl").is_file():
        pytest.skip(f"real rows are not here: {REAL} (set DUALIGN_REAL_DATA)")
    sources = {
        "sft": [
            {"format": "alpaca", "path": "alpaca/alpaca_5000.json"},
            {
                "format": "columns",
                "path": "pku_sft/sft_safety.jsonl",
                "columns": {"prompt": "prompt", "response": "response"},
            },
        ],
        "helpful": [
            {"format": "hh", "path": "hh_rlhf/helpful-base.test.jsonl.gz"},
            {"format": "hh", "path": "hh_rlhf/helpful-online.test.jsonl.gz"},
            {"format": "pku", "path": "pku_full/train.json"},
        ],
        "safety": [
            {"format": "pku", "path": "pku_safety/pairs.jsonl"},
            {"format": "hh", "path": "hh_rlhf/harmless-base.test.jsonl.gz"},
            {"format": "pku", "path": "pku_full/train.json"},
        ],
    }
    limits = {"max_prompt_chars": 8000, "max_response_chars": 4000, "max_rejected_share": 0.02}
    metrics = prepare(params(REAL, **sources, **limits), tmp_path / "out")
    tables = read_all(tmp_path / "out")
    assert {len(where) for where in places(tables).values()} == {1}
    assert {len(where) for where in questions(tables).values()} == {1}
    expected = {"empty_answer": 12, "bad_turns": 24, "identical_answers": 4, "response_too_long": 5}
    assert (
        expected | {"prompt_too_long": 2, "empty_prompt": 2, "not_a_dialogue": 2}
        == metrics["rejected"]
    )
    assert metrics["sources"]["sft"]["columns:pku_sft/sft_safety.jsonl"]["duplicates"] == 57


def test_a_set_is_a_fair_draw_over_seeds() -> None:
    """The mean of whatever a prompt is worth strays as far as that of a random sample does."""
    rng = np.random.default_rng(0)
    identities = rng.integers(0, 2**63, 1500).astype(np.uint64)
    worth = rng.standard_normal(len(identities))
    size = 150
    error = worth.std() * np.sqrt((1 - size / len(worth)) / size)

    means = []
    for seed in range(200):
        lowest = np.argsort(_places(seed, "certify", identities))[:size]
        means.append(worth[lowest].mean())
    strays = (np.array(means) - worth.mean()) / error

    assert abs(strays.mean()) < 4 / np.sqrt(200)
    assert abs((strays**2).mean() - 1) < 4 * np.sqrt(2 / 200)

"""Identities of prompts and pairs, and tables that come back as they were written."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dualign.core import schema
from dualign.core.artifacts import write_parquet
from dualign.core.errors import DataError


@pytest.mark.parametrize(
    "other",
    [
        "How do I clean an oven?",
        "how do i clean an oven",
        "  How do I\tclean an oven?!  ",
        "\uff28ow do I clean an oven\uff1f",
    ],
)
def test_a_prompt_keeps_its_identity_whatever_its_case_spacing_and_punctuation(other: str) -> None:
    assert schema.prompt_id(schema.user(other)) == schema.prompt_id(
        schema.user("How do I clean an oven?")
    )


def test_other_words_other_roles_and_other_turns_are_other_prompts() -> None:
    one = schema.user("clean the oven")
    said: list[schema.Message] = [{"role": "assistant", "content": "clean the oven"}]
    variants = [
        one,
        schema.user("clean the ovens"),
        said,
        one + said + one,
        schema.user("clean the oven clean the oven"),
    ]
    assert len({schema.prompt_id(prompt) for prompt in variants}) == len(variants)


def test_identities_stay_the_same_between_releases() -> None:
    prompt = schema.user("How do I clean an oven?")
    assert schema.prompt_id(prompt) == "0e939363aa9e4e21"
    assert schema.pair_id(prompt, "Wipe it.", "Leave it.") == "669b85308d020fa1"


def test_a_pair_has_one_identity_whichever_answer_is_preferred() -> None:
    prompt = schema.user("q")
    assert schema.pair_id(prompt, "a", "b") == schema.pair_id(prompt, "b", "a")
    assert schema.pair_id(prompt, "a", "b") != schema.pair_id(prompt, "a", "c")
    assert schema.pair_id(prompt, "a", "b") != schema.pair_id(schema.user("r"), "a", "b")


def test_last_user_text_is_what_the_answer_replies_to() -> None:
    prompt: list[schema.Message] = [
        *schema.user("first"),
        {"role": "assistant", "content": "yes"},
        *schema.user("second"),
    ]
    assert schema.last_user_text(prompt) == "second"


def _safety_rows() -> list[dict[str, object]]:
    common = {"prompt_id": "p", "prompt": schema.user("q"), "source": "s", "split": "train"}
    return [
        {
            **common,
            "pair_id": "1",
            "chosen": "a",
            "rejected": "b",
            "chosen_is_safe": True,
            "rejected_is_safe": False,
        },
        {
            **common,
            "pair_id": "2",
            "chosen": "c",
            "rejected": "d",
            "chosen_is_safe": None,
            "rejected_is_safe": None,
        },
    ]


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", _safety_rows(), schema.SAFETY_PAIRS)
    frame = schema.read_table(tmp_path / "t.parquet", schema.SAFETY_PAIRS)
    assert list(frame.columns) == schema.SAFETY_PAIRS.names
    assert frame["prompt"].tolist() == [schema.user("q")] * 2
    assert frame["chosen_is_safe"].tolist() == [True, None]


def test_to_table_drops_what_the_schema_does_not_name_and_fills_what_is_missing() -> None:
    table = schema.to_table(
        [{"prompt_id": "p", "prompt": schema.user("q"), "extra": 1}], schema.PROMPTS
    )
    assert table.schema == schema.PROMPTS
    assert table["source"].to_pylist() == [None]


def test_to_table_takes_no_rows() -> None:
    assert schema.to_table([], schema.POOL).num_rows == 0


def test_to_table_turns_the_missing_values_of_pandas_into_null() -> None:
    frame = pd.DataFrame({"prompt_id": ["p", "q"], "source": ["s", float("nan")]})
    assert schema.to_table(frame, schema.PROMPTS)["source"].to_pylist() == ["s", None]


def test_to_table_refuses_a_value_of_another_type() -> None:
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        schema.to_table([{"prompt_id": "p", "prompt": "not a list of turns"}], schema.PROMPTS)


def test_read_table_names_the_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pool\.parquet: no such file; run the stage"):
        schema.read_table(tmp_path / "pool.parquet", schema.POOL)


def test_read_table_names_the_file_that_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_parquet(path, _safety_rows(), schema.SAFETY_PAIRS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"t\.parquet: not a readable parquet file"):
        schema.read_table(path, schema.SAFETY_PAIRS)


def test_read_table_names_the_column_that_is_missing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt_id": ["p"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column 'prompt' is missing"):
        schema.read_table(tmp_path / "t.parquet", schema.PROMPTS)

"""Files of every kind: what is read, what is refused, and the limits that hold however well a file
is packed.
"""

from __future__ import annotations

import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dualign.core.errors import DataError
from dualign.data import files
from dualign.data.files import GROUP_LIMIT, ROW_LIMIT, locate
from dualign.data.rows import BadRow, Row
from dualign.params.data import SourceSpec

MIB = 2**20


def rows_of(path: Path) -> list[tuple[int, Row | BadRow]]:
    spec = SourceSpec(format="alpaca", path=path.name)
    _, ((name, raw),) = locate(spec, path.name, path.parent, "prepare.sft")
    assert name == str(path)
    return list(raw)


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def with_memory(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the MiB that Python and Arrow took for it at the most."""
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        value = call()
        return value, (tracemalloc.get_traced_memory()[1] + pool.max_memory()) / MIB
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


# --- lists in JSON --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_the_same_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    rows = [
        {"a": 'é "x" \\ ☃', "b": [1.5e3, -12, None, True, {"c": [{}]}]},
        {},
        123,
        "text",
        [1, 2],
        {"a": "b" * 99},
        -7,
    ]
    monkeypatch.setattr(files, "_CHUNK", chunk)
    for escaped in (True, False):
        (tmp_path / "a.json").write_text(
            json.dumps(rows, indent=indent, ensure_ascii=escaped) + "\n \n", "utf-8"
        )
        found = rows_of(tmp_path / "a.json")
        assert [number for number, _ in found] == [1, 2, 3, 4, 5, 6, 7]
        assert [row for _, row in found if isinstance(row, dict)] == [
            row for row in rows if isinstance(row, dict)
        ]
        assert [row.text for _, row in found if isinstance(row, BadRow)] == [
            "123",
            '"text"',
            "[1, 2]",
            "-7",
        ]


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[{}",
        "[{},",
        "[{},]",
        "[{}{}]",
        "[{}] {}",
        "[{}]]",
        '[{"a": 1',
        '[{"a": "b',
        "[nul]",
        "[,{}]",
        "[{}, {a: 1}]",
    ],
)
def test_what_is_no_list_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, text: str
) -> None:
    monkeypatch.setattr(files, "_CHUNK", chunk)
    (tmp_path / "a.json").write_text("\n" * (chunk == 3) + text)
    assert "not valid JSON (row " in refusal(tmp_path / "a.json")


def test_a_mistake_far_from_the_end_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHUNK", 1000)
    (tmp_path / "a.json").write_text('[{"a": 1},\n {"a" 2},\n' + '{"a": "' + "x" * 10**6 + '"}]')
    monkeypatch.setattr(files._Json, "_grow", counted := Counted(files._Json._grow))
    assert "not valid JSON (row 2: Expecting ':' delimiter)" in refusal(tmp_path / "a.json")
    assert counted.calls <= 2


class Counted:
    """A method that counts its calls."""

    def __init__(self, method: Callable[[Any], None]) -> None:
        self.method = method
        self.calls = 0

    def __get__(self, owner: Any, kind: type) -> Callable[[], None]:
        def call() -> None:
            self.calls += 1
            self.method(owner)

        return call


# --- headings of CSV ------------------------------------------------------------------------------


def test_blank_headings_belong_to_no_column(tmp_path: Path) -> None:
    """pandas writes an index under a blank heading, and each time that a table is read and written
    another one.
    """
    table = pd.DataFrame(
        {"instruction": ["Sing."], "output": ["la"]}, index=pd.MultiIndex.from_tuples([(3, 4)])
    )
    table.to_csv(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().startswith(",,instruction,output")
    assert rows_of(tmp_path / "a.csv") == [(2, {"instruction": "Sing.", "output": "la"})]
    (tmp_path / "b.csv").write_text("instruction,output, ,\nSing.,la,,\n")
    assert rows_of(tmp_path / "b.csv") == [(2, {"instruction": "Sing.", "output": "la"})]


def test_cells_of_csv_may_be_long(tmp_path: Path) -> None:
    pd.DataFrame({"a": ["x" * 200_000]}).to_csv(tmp_path / "a.csv", index=False)
    assert rows_of(tmp_path / "a.csv") == [(2, {"a": "x" * 200_000})]


# --- limits ---------------------------------------------------------------------------------------

LONG = {
    "a.jsonl": (
        "a.jsonl:2: the line is longer than",
        lambda text: f'{{"a": 1}}\n{{"a": "{text}"}}\n',
    ),
    "lines.json": (
        "lines.json:2: the line is longer than",
        lambda text: f'{{"a": 1}}\n{{"a": "{text}"}}\n',
    ),
    "a.json": (
        "a.json: row 2: the row is longer than",
        lambda text: f'[{{"a": 1}}, {{"a": "{text}"}}]',
    ),
    "a.csv": ("a.csv:2: the line is longer than", lambda text: f"a\n{text}\n"),
    "quoted.csv": (
        "quoted.csv:2: not valid CSV (field larger than field limit",
        lambda text: 'a\n"' + f"{text[:50]}\n" * (len(text) // 50) + '"\n',
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_a_row_beyond_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    message, written = LONG[name]
    monkeypatch.setattr(files, "ROW_LIMIT", 300)
    monkeypatch.setattr(files, "_CHUNK", 100)
    (tmp_path / name).write_text(written("x" * 400))
    assert message in refusal(tmp_path / name)
    (tmp_path / name).write_text(written("x" * 200))
    assert len(rows_of(tmp_path / name)) >= 1


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.jsonl.xz", "a.json.xz"])
def test_a_packed_row_without_an_end_takes_little_memory(tmp_path: Path, name: str) -> None:
    """100 MiB of one letter in one row, packed a thousand times smaller."""
    start = {"a.jsonl": b'{"a": "', "a.json": b'[{"a": "', "a.csv": b'a\n"'}[
        name.rpartition(".")[0]
    ]
    opener = gzip.open if name.endswith(".gz") else lzma.open
    with opener(
        tmp_path / name, "wb", **({"compresslevel": 1} if opener is gzip.open else {"preset": 0})
    ) as file:
        file.write(start)
        for _ in range(100):
            file.write(b"x" * MIB)
    assert (tmp_path / name).stat().st_size < MIB
    message, taken = with_memory(lambda: refusal(tmp_path / name))
    assert "is longer than 16 MiB, which is the limit of a row" in message
    assert taken < 8 * ROW_LIMIT / MIB


def repeated(count: int, length: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(
        pa.array([0] * count, pa.int32()), pa.array(["x" * length])
    )


def nested(texts: pa.Array) -> pa.Array:
    turns = pa.StructArray.from_arrays([texts, texts], ["role", "content"])
    return pa.ListArray.from_arrays(list(range(len(texts) + 1)), turns)


def lengths(path: Path) -> set[int]:
    """The lengths of the texts of a column, of which one row at a time is held."""
    _, ((_, raw),) = locate(
        SourceSpec(format="alpaca", path=path.name), path.name, path.parent, "prepare.sft"
    )
    return {
        len(row["a"]) if isinstance(row["a"], str) else len(row["a"][0]["content"])
        for _, row in raw
    }


@pytest.mark.parametrize(
    "column", [repeated(5800, MIB), nested(repeated(1000, MIB))], ids=["texts", "messages"]
)
def test_a_small_parquet_file_that_unpacks_to_gigabytes_is_read_piece_by_piece(
    tmp_path: Path, column: pa.Array
) -> None:
    """Parquet stores a text that repeats once: here thousands of rows of a MiB in less than 1
    KB.
    """
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": column}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 3000
    found, taken = with_memory(lambda: lengths(path))
    assert found == {MIB} and taken < 200


def test_texts_that_are_stored_as_differences_are_read_few_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pa.array(["x" * MIB] * 300)
    options = {"use_dictionary": False, "column_encoding": {"a": "DELTA_BYTE_ARRAY"}}
    pq.write_table(pa.table({"a": column}), path, compression="zstd", **options)
    assert path.stat().st_size < 3000
    found, taken = with_memory(lambda: lengths(path))
    assert found == {MIB} and taken < 200


def test_a_row_of_parquet_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    """One row that lists a text of a MiB a hundred times."""
    path = tmp_path / "a.parquet"
    turns = pa.ListArray.from_arrays([0, 1, 101], repeated(101, MIB))
    pq.write_table(pa.table({"turns": turns}), path, compression="zstd", store_schema=False)
    message, taken = with_memory(lambda: refusal(path))
    assert "row 2: the row is longer than 16 MiB" in message and taken < 200
    turns = pa.ListArray.from_arrays([0, 1, 3 * 10**6], pa.nulls(3 * 10**6, pa.string()))
    pq.write_table(pa.table({"turns": turns}), path)
    assert "row 2: the row is longer than" in refusal(path)


def test_a_row_group_beyond_the_limit_is_refused_by_what_the_file_says_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "GROUP_LIMIT", 20 * MIB)
    path = tmp_path / "a.parquet"
    table = pa.table({"a": ["x" * MIB] * 22})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < MIB
    message, taken = with_memory(lambda: refusal(path))
    assert "row group 1 of 1 unpacks to 22 MiB, more than the limit of 20 MiB" in message
    assert "row_group_size=" in message and taken < 5
    pq.write_table(table, path, compression="zstd", use_dictionary=False, row_group_size=5)
    assert GROUP_LIMIT == 2**30 and len(rows_of(path)) == 22


def test_every_type_of_parquet_is_read_as_it_was_written(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "é"}]
    table = pa.table(
        {
            "text": ["a", None, ""],
            "large": pa.array(["a", "b", None], pa.large_string()),
            "view": pa.array(["a", None, "c"], pa.string_view()),
            "turns": [turns, None, []],
            "nested": [[["a"], []], [], None],
            "map": pa.array([[("k", "v")], None, []], pa.map_(pa.string(), pa.string())),
            "fixed": pa.array([["a", "b"], None, ["c", None]], pa.list_(pa.string(), 2)),
            "flag": [True, None, False],
            "number": [1, None, 3],
            "coded": pa.array(["a", "b", None]).dictionary_encode(),
            "bytes": [b"a", None, b""],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert [row for _, row in rows_of(tmp_path / "a.parquet")] == table.to_pylist()
    assert [number for number, _ in rows_of(tmp_path / "a.parquet")] == [1, 2, 3]


@pytest.mark.parametrize("name", ["A.JSONL", "a.Jsonl.GZ"])
def test_a_kind_of_file_may_be_named_in_capitals(tmp_path: Path, name: str) -> None:
    text = b'{"a": 1}\n'
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("GZ") else text)
    assert rows_of(tmp_path / name) == [(1, {"a": 1})]


@pytest.mark.parametrize("text", ['a;b\n"x";"y"\n', "a,b\rx,y\r"])
def test_another_separator_is_thought_of(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode())
    told = refusal(tmp_path / "a.csv")
    assert "something else than commas, or lines by a bare carriage return" in told


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_every_encoding_of_texts_is_read(tmp_path: Path, encoding: str) -> None:
    table = pa.table({"a": [f"text {n}" for n in range(3000)]})
    pq.write_table(
        table, tmp_path / "a.parquet", use_dictionary=False, column_encoding={"a": encoding}
    )
    assert [row for _, row in rows_of(tmp_path / "a.parquet")] == table.to_pylist()


def test_the_guide_states_the_limits() -> None:
    page = Path(__file__).parents[2] / "docs" / "data.md"
    guide = " ".join(page.read_text().split())  # wherever its lines break
    assert (
        f"may take {ROW_LIMIT // MIB} MiB" in guide
        and f"{GROUP_LIMIT // MIB} MiB by what the file states" in guide
    )

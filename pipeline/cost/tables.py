"""Rows and lengths of the tables that stages read: measured where data are there, else from params,
as long as they may be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
from pyarrow.lib import ArrowException
from tokenizers import Tokenizer

from pipeline.errors import PipelineError

#: Rows of a table that are measured.
_MEASURED = 400
#: Characters of a token, where there is no tokenizer: about that of English text.
_CHARACTERS = 4.0
#: Tokens that a template puts around a turn, about.
_TEMPLATE = 4
#: A table, its rows in the embedded world, and the columns of its answers.
_TABLES = {
    "sft": ("sft_rows", ("response",)),
    "helpful": ("helpful_pairs", ("chosen", "rejected")),
    "safety": ("safety_pairs", ("chosen", "rejected")),
}


@dataclass(frozen=True)
class Table:
    """Rows to train on and held out (None: not known), and mean tokens of a prompt and an answer.
    `measured` says that these are of the data.
    """

    rows: int | None
    heldout: int | None
    prompt: float
    answer: float
    measured: bool = False


@dataclass(frozen=True)
class Tables:
    """The tables of preferences, and the mean tokens of a drawn answer."""

    sft: Table
    helpful: Table
    safety: Table
    drawn: float

    @property
    def measured(self) -> bool:
        """Whether the lengths are of the data."""
        return self.helpful.measured


def read_tables(params: Mapping[str, Any], root: Path) -> Tables:
    """What is known of the tables. Raises PipelineError for a file that cannot be read."""
    count = _counter(params, root)
    found = {name: _table(name, params, root, count) for name in _TABLES}
    return Tables(**found, drawn=_drawn(params, root))


def _table(name: str, params: Mapping[str, Any], root: Path, count: Callable[[str], int]) -> Table:
    kind = "" if name == "sft" else "_pairs"
    file = root / "data" / "prepared" / f"{name}{kind}.parquet"
    most = params["training"]["max_length"]
    if not file.is_file():
        return Table(*_expected(name, params), most / 2, most / 2)
    columns = _TABLES[name][1]
    rows = _read(file, ["split", "prompt", *columns])
    train = [row for row in rows if row["split"] == "train"]
    some = (train or rows)[:: max(1, len(train or rows) // _MEASURED)]
    sizes = [_size(row, columns, count) for row in some]
    fitting = [(prompt, answers) for prompt, answers in sizes if prompt + max(answers) <= most]
    table = Table(len(train), len(rows) - len(train), most / 2, most / 2, measured=True)
    if not fitting:
        return table
    prompt = fmean(prompt for prompt, _ in fitting)
    return replace(table, prompt=prompt, answer=fmean(fmean(answers) for _, answers in fitting))


def _size(
    row: Mapping[str, Any], columns: Sequence[str], count: Callable[[str], int]
) -> tuple[int, list[int]]:
    """Tokens of a row's prompt and of each of its answers."""
    prompt = sum(count(turn["content"]) + _TEMPLATE for turn in row["prompt"])
    return prompt, [count(row[column]) + 1 for column in columns]


def _expected(name: str, params: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Rows by params: those of the embedded world, and the limits of other sources."""
    prepare = params["prepare"]
    made = prepare["world"][_TABLES[name][0]]
    counts = [_most(source, made) for source in prepare[name]]
    known = [rows for rows in counts if rows is not None]
    if len(known) < len(counts):
        return None, None
    heldout = round(sum(known) * prepare["heldout_share"])
    return sum(known) - heldout, heldout


def _most(source: Mapping[str, Any], made: int) -> int | None:
    """The most rows that a source can give; `made` are the world's. None where nothing says."""
    limit: int | None = source.get("limit")
    if source["format"] != "world":
        return limit
    return made if limit is None else min(made, limit)


def _drawn(params: Mapping[str, Any], root: Path) -> float:
    """Mean tokens of the pool's answers, else as many as an answer may have."""
    file = root / "data" / "scored" / "pool.parquet"
    if not file.is_file():
        return float(params["generation"]["max_new_tokens"])
    lengths = [row["length"] for row in _read(file, ["length"])]
    return fmean(lengths) if lengths else 0.0


def _counter(params: Mapping[str, Any], root: Path) -> Callable[[str], int]:
    """How many tokens a text has, by the tokenizer of the reference, or of the base. Raises
    PipelineError for one that cannot be read.
    """
    places = (root / "models" / "sft", root / str(params["sft"]["base"]))
    files = [place / "tokenizer.json" for place in places]
    file = next(filter(Path.is_file, files), None)
    if file is None:
        return lambda text: round(len(text) / _CHARACTERS)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # of its own, without a class
        raise PipelineError(
            f"{file}: cannot be read as a tokenizer ({error}); is the download complete?"
        ) from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _read(file: Path, columns: list[str]) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(file, columns=columns).to_pylist()
    except (OSError, ArrowException) as error:
        told = str(error).partition("\n")[0]
        raise PipelineError(f"{file}: cannot be read ({told}); run the stage again") from None
    return rows

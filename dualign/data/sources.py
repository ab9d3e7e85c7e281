"""Readers: every supported format as one stream of records, with the file and line that each came
from.

A reader turns a `SourceSpec` of a kind (`sft`, `helpful` or `safety`) into `Record`s. A row that
cannot be used becomes a `Rejected`, a row that has nothing to say about this kind (no preference,
no safe answer) a `Skipped`; neither stops the stream. A file that cannot be read at all, lacks a
column or holds labels of unclear meaning raises a DataError."""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dualign.core.errors import DataError
from dualign.core.schema import Message, user
from dualign.data import world
from dualign.data.files import Files, locate
from dualign.data.messages import check_unicode, split_answer, turns_in
from dualign.data.rows import BadRow, Row, excerpt
from dualign.params.data import SourceSpec, WorldParams

logger = logging.getLogger(__name__)

Kind = Literal["sft", "helpful", "safety"]

_FLAGS = ("is_response_0_safe", "is_response_1_safe")
_SEVERITY = ("response_0_severity_level", "response_1_severity_level")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_OWN_FLAGS = ("chosen_is_safe", "rejected_is_safe")
#: Sets of columns that format `columns` may map, of which one must be whole; and what may stand
#: beside them.
_OWN_COLUMNS: dict[Kind, tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]] = {
    "sft": ((("prompt", "response"), ("messages",)), ()),
    "helpful": ((("chosen", "rejected"),), ("prompt", *_OWN_FLAGS)),
    "safety": ((("chosen", "rejected"),), ("prompt", *_OWN_FLAGS)),
}
_PKU_LABELS: dict[Kind, tuple[str, ...]] = {
    "sft": _FLAGS,
    "helpful": ("better_response_id",),
    "safety": ("safer_response_id", *_FLAGS),
}
#: What programs write for a missing value; a number as CSV, JSON and parquet write it; and the two
#: truth values.
_NULLS = {"nan", "NaN", "None", "null", "NULL", "N/A", "#N/A", "NA", "<NA>"}
_NUMBER = re.compile(r"[+-]?[0-9]{1,9}(\.0*)?")
_TRUTH = {"false": 0, "true": 1}
#: Labels beyond 0 and 1 that are slips of the pen in a file; more of them are a code of its own.
_SLIPS, _SLIP_SHARE = 1, 0.05


@dataclass(frozen=True, slots=True)
class Where:
    """Where a row came from. `line` counts from 1: lines of a text file, rows of an array, parquet
    or hub dataset.
    """

    source: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Record:
    """One usable row. In an sft record `chosen` is the answer and `rejected` is None; flags are
    None where unknown.
    """

    where: Where
    prompt: list[Message]
    chosen: str
    rejected: str | None = None
    chosen_is_safe: bool | None = None
    rejected_is_safe: bool | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is wrong: a short reason for counting, the detail in words, the start of the
    row.
    """

    where: Where
    reason: str
    detail: str
    row: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that is right but says nothing about the wanted kind."""

    where: Where
    reason: str


def read(
    spec: SourceSpec, kind: Kind, folder: Path, made: WorldParams, seed: int
) -> Iterator[Record | Rejected | Skipped]:
    """Stream the records of one source; `made` and `seed` are used by format `world` only.

    Raises:
        DataError: the file or dataset is missing, unreadable or empty, lacks a column, or its
            labels are not 0 and 1.
    """
    columns = _columns(spec, kind)
    place, files = _located(spec, kind, folder, made, seed)
    whole = _Whole(kind, columns, _labels(spec, kind, columns))
    for file, line, row in itertools.islice(_rows(files), spec.limit):
        whole.row(file, row)
        for item in _records(
            row, Where(label(spec), file, line), _layout(spec, kind), kind, columns
        ):
            whole.item(item)
            yield item
    whole.check(place)


def _located(
    spec: SourceSpec, kind: Kind, folder: Path, made: WorldParams, seed: int
) -> tuple[str, Files]:
    if spec.path is None:
        return "world", [
            ("world", enumerate(_world(kind, made, derived_seed(seed, kind)), start=1))
        ]
    return locate(spec, spec.path, folder, f"prepare.{kind}")


def _world(kind: Kind, made: WorldParams, seed: int) -> Iterator[Row]:
    if kind == "sft":
        return world.sft_rows(made.sft_rows, seed)
    count = made.helpful_pairs if kind == "helpful" else made.safety_pairs
    return world.pku_rows(count, seed, made.sharpness)


def _rows(files: Files) -> Iterator[tuple[str, int, Row | BadRow]]:
    for file, rows in files:
        line = 0
        for line, row in rows:
            yield file, line, row
        if not line:
            logger.warning("%s: holds no rows", file)


def label(spec: SourceSpec) -> str:
    """The name of a source in tables and metrics: its format, path, and split if it is not
    `train`.
    """
    split = f"[{spec.split}]" if spec.split != "train" else ""
    return spec.format if spec.path is None else f"{spec.format}:{spec.path}{split}"


def derived_seed(seed: int, name: str) -> int:
    """A 32-bit seed that differs for every name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4])


# --- from a row to records ------------------------------------------------------------------------


def _records(
    row: Row | BadRow, where: Where, layout: str, kind: Kind, columns: dict[str, str]
) -> Iterator[Record | Rejected | Skipped]:
    try:
        if isinstance(row, BadRow):
            raise row
        if layout == "pku":
            yield from _pku_sft(row, where) if kind == "sft" else _pku_pair(row, where, kind)
        elif layout == "hh":
            yield _hh(row, where, kind)
        elif layout == "alpaca":
            yield _alpaca(row, where)
        else:
            yield _own(row, where, kind, columns)
    except BadRow as bad:
        yield Rejected(where, bad.reason, bad.detail, bad.text or excerpt(row))


def _layout(spec: SourceSpec, kind: Kind) -> str:
    """How the rows of a source look; the world speaks PKU for pairs and prompt, response for
    sft.
    """
    if spec.format == "world":
        return "columns" if kind == "sft" else "pku"
    return spec.format


def _pku_sft(row: Row, where: Where) -> Iterator[Record | Skipped]:
    """The safe answers of a row; both, one or none."""
    _check_severity(row)
    safe = [side for side in (0, 1) if _bit(row, _FLAGS[side])]
    if not safe:
        yield Skipped(where, "no_safe_answer")
    for side in safe:
        yield Record(where, user(_text(row, "prompt")), _text(row, f"response_{side}"))


def _pku_pair(row: Row, where: Where, kind: Kind) -> Iterator[Record | Skipped]:
    _check_severity(row)
    winner = _bit(row, _PKU_LABELS[kind][0])
    if winner is None:
        yield Skipped(where, "no_preference")
        return
    answers = [_text(row, f"response_{side}") for side in (0, 1)]
    flags = [_flag(row, name) if kind == "safety" or name in row else None for name in _FLAGS]
    loser = 1 - winner
    yield Record(
        where,
        user(_text(row, "prompt")),
        answers[winner],
        answers[loser],
        flags[winner],
        flags[loser],
    )


def _check_severity(row: Row) -> None:
    """The release of 2024 rates the harm of an answer from 0 to 3: 0 is what it flags as safe."""
    for severity, flag in zip(_SEVERITY, _FLAGS, strict=True):
        level, safe = _code(row, severity, 3, "0, 1, 2, 3"), _flag(row, flag)
        if level is not None and safe is not None and safe != (level == 0):
            raise BadRow("contradictory_severity", f"{flag} is {safe}, but {severity} is {level}")


def _hh(row: Row, where: Where, kind: Kind) -> Record:
    prompt, chosen = _dialogue(row, "chosen")
    if kind == "sft":
        return Record(where, prompt, chosen)
    other, rejected = _dialogue(row, "rejected")
    if prompt != other:
        raise BadRow(
            "prompts_differ", "chosen and rejected differ before their last Assistant turn"
        )
    return Record(where, prompt, chosen, rejected)


def _dialogue(row: Row, column: str) -> tuple[list[Message], str]:
    """Split `\\n\\nHuman: ... \\n\\nAssistant: ...` text at its last Assistant turn into prompt and
    answer.
    """
    before, *parts = _TURN.split("\n\n" + _text(row, column))
    turns: list[Message] = [
        {"role": _HH_ROLES[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if before or not turns or turns[-1]["role"] != "assistant":
        raise BadRow(
            "not_a_dialogue", f"{column} must begin with 'Human:' and end with an 'Assistant:' turn"
        )
    return _checked(turns[:-1], column), turns[-1]["content"]


def _alpaca(row: Row, where: Where) -> Record:
    given = "" if _missing(row.get("input")) else _text(row, "input")
    return Record(
        where, user(f"{_text(row, 'instruction')}\n\n{given}".strip()), _text(row, "output")
    )


def _own(row: Row, where: Where, kind: Kind, columns: dict[str, str]) -> Record:
    """A row whose columns are named by a map from our names to the file's."""
    prompt = _prompt(row, columns["prompt"]) if "prompt" in columns else None
    if kind == "sft":
        whole = columns.get("messages") or columns["response"]
        return Record(where, *_answer(row, whole, prompt))
    flags = [_flag(row, columns[name]) if name in columns else None for name in _OWN_FLAGS]
    before, chosen = _answer(row, columns["chosen"], prompt)
    other, rejected = _answer(row, columns["rejected"], prompt)
    if before != other:
        raise BadRow(
            "prompts_differ", "chosen and rejected differ before their last assistant turn"
        )
    return Record(where, before, chosen, rejected, *flags)


def _prompt(row: Row, column: str) -> list[Message]:
    """A text, or a list of turns."""
    turns = turns_in(row.get(column), column)
    return user(_text(row, column)) if turns is None else _checked(turns, column)


def _answer(row: Row, column: str, prompt: list[Message] | None) -> tuple[list[Message], str]:
    """Prompt and answer of a cell: a text, an answer as a message, or a whole dialogue.

    A dialogue has its own prompt, of which that of the row must be a part: UltraFeedback's is the
    question alone.
    """
    turns = turns_in(row.get(column), column)
    if turns is None:
        if prompt is None:
            raise BadRow(
                "no_prompt", f"{column} is text and no dialogue, so columns must map prompt as well"
            )
        return prompt, _text(row, column)
    before, answer = split_answer(turns, column)
    if prompt is not None and not before:
        return prompt, answer
    if prompt is not None and not _within(prompt, before):
        raise BadRow(
            "prompts_differ", f"{column} is a dialogue that does not hold the prompt of the row"
        )
    return _checked(before, column), answer


def _within(part: list[Message], whole: list[Message]) -> bool:
    """Whether the turns stand one after the other in others."""
    return any(whole[start : start + len(part)] == part for start in range(len(whole)))


def _checked(turns: list[Message], column: str) -> list[Message]:
    """Chat templates take user and assistant in turn, after at most one system turn, and the user
    last.
    """
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if len(spoken) % 2 == 0 or spoken != (["user", "assistant"] * len(spoken))[: len(spoken)]:
        raise BadRow(
            "bad_turns", f"{column}: user and assistant must take turns, the user first and last"
        )
    return turns


def _text(row: Row, column: str) -> str:
    """The cell without the white space around it."""
    if column not in row:
        raise BadRow("missing_column", f"no column {column!r}")
    value = row[column]
    if not isinstance(value, str):
        raise BadRow("not_text", f"{column} is {_short(value)}, expected text")
    if turns_in(value, column) is not None:
        raise BadRow("not_text", f"{column} holds a list of messages, which format 'columns' reads")
    return check_unicode(value, column).strip()


def _missing(value: Any) -> bool:
    """Whether a cell is null, not a number, blank, or text that stands for these."""
    if isinstance(value, str):
        return value.strip() in {"", *_NULLS}
    return value is None or value != value


def _number(value: Any) -> float | None:
    """The whole number of a cell, which CSV, JSON and parquet write as text, integer or float; None
    without one.
    """
    if isinstance(value, str):
        return float(value) if _NUMBER.fullmatch(value.strip()) else None
    return (
        value
        if isinstance(value, int | float) and not isinstance(value, bool) and value == value
        else None
    )


def _code(row: Row, column: str, top: int, expected: str) -> int | None:
    """A whole number from 0 to `top`, or None for null and for a key that this row leaves out."""
    value = row.get(column)
    if _missing(value):
        return None
    number = _number(value)
    if number is None or number not in range(top + 1):
        raise BadRow("bad_label", f"{column} is {_short(value)}, expected {expected} or null")
    return int(number)


def _bit(row: Row, column: str) -> int | None:
    """0, 1, or None for null."""
    truth = _TRUTH.get(str(row.get(column)).strip().casefold())
    return _code(row, column, 1, "0, 1, true, false") if truth is None else truth


def _flag(row: Row, column: str) -> bool | None:
    bit = _bit(row, column)
    return None if bit is None else bool(bit)


def _short(value: Any) -> str:
    return "null" if value is None else repr(value)[:60]


# --- what is true of a source as a whole ----------------------------------------------------------


@dataclass
class _Whole:
    """The columns of every file of a source, the numbers in its label columns, and the texts that
    say null.
    """

    kind: Kind
    columns: dict[str, str]
    labels: tuple[str, ...]
    seen: dict[str, dict[str, None]] = field(default_factory=dict)
    codes: dict[str, Counter[float]] = field(default_factory=dict)
    nulls: list[Where] = field(default_factory=list)

    def row(self, file: str, row: Row | BadRow) -> None:
        """Note a raw row."""
        seen = self.seen.setdefault(file, {})
        if isinstance(row, BadRow):
            return
        seen |= dict.fromkeys(row)
        for name in self.labels:
            number = _number(row.get(name))
            if number is not None:
                self.codes.setdefault(name, Counter())[number] += 1

    def item(self, item: Record | Rejected | Skipped) -> None:
        """Note what became of a row."""
        if isinstance(item, Record) and _says_null(item):
            self.nulls.append(item.where)

    def check(self, place: str) -> None:
        """Refuse a source without rows, a file without a column that is needed, and labels of
        unclear meaning.
        """
        if not self.seen:
            raise DataError(
                f"{place}: holds no rows; put data in or remove it from prepare.{self.kind}"
            )
        for file, seen in self.seen.items():
            _require(seen, self.columns, file, self.kind)
        for name, codes in self.codes.items():
            _check_codes(codes, name, place)
        if self.nulls:
            logger.warning(
                "%s:%d: a text says just 'nan', 'None' or the like, and so do those of %d more"
                " rows; if these are "
                "missing values, leave the rows out",
                self.nulls[0].file,
                self.nulls[0].line,
                len(self.nulls) - 1,
            )


def _says_null(record: Record) -> bool:
    """Whether a text of the record is what is written for a missing value."""
    return not _NULLS.isdisjoint((record.chosen, record.rejected, record.prompt[-1]["content"]))


def _labels(spec: SourceSpec, kind: Kind, columns: dict[str, str]) -> tuple[str, ...]:
    """The columns that hold 0 or 1."""
    if _layout(spec, kind) == "pku":
        return tuple(dict.fromkeys((*_PKU_LABELS[kind], *_FLAGS)))
    return tuple(columns[name] for name in _OWN_FLAGS if name in columns)


def _check_codes(codes: Counter[float], column: str, place: str) -> None:
    """Refuse a column that codes the two answers otherwise, by 1 and 2, say: its 1 may mean what is
    0 here.
    """
    strays = sum(count for code, count in codes.items() if code not in (0, 1))
    if strays > max(_SLIPS, _SLIP_SHARE * codes.total()):
        found = ", ".join(
            f"{_short(code)} ({count} rows)" for code, count in sorted(codes.items())[:5]
        )
        raise DataError(
            f"{place}: column {column!r} holds {found}, so what its 1 means is unclear; accepted"
            " are 0 (no, or the first answer), 1 (yes, or the second), true, false and null: write"
            " it in these"
        )


def _require(seen: Iterable[str], columns: dict[str, str], file: str, kind: Kind) -> None:
    """Refuse a file of which no row has a column; one that some rows leave out is null there."""
    present = list(map(str, seen))
    for name in columns.values():
        if name not in present and present:
            raise DataError(
                f"{file}: column {name!r} is missing (prepare.{kind}); the file has:"
                f" {', '.join(present)}"
            )


# --- columns --------------------------------------------------------------------------------------


def _columns(spec: SourceSpec, kind: Kind) -> dict[str, str]:
    """The columns that a source must have, by our names. Raises DataError where the format cannot
    give the kind.
    """
    if spec.format == "columns":
        return _mapped(spec, kind)
    if spec.format == "alpaca" and kind != "sft":
        raise DataError(
            f"prepare.{kind}: {label(spec)}: format 'alpaca' holds no pairs; list it under"
            " prepare.sft"
        )
    names = {
        "columns": _OWN_COLUMNS[kind][0][0],
        "pku": ("prompt", "response_0", "response_1", *_PKU_LABELS[kind]),
        "hh": ("chosen",) if kind == "sft" else ("chosen", "rejected"),
        "alpaca": ("instruction", "output"),
    }[_layout(spec, kind)]
    return {name: name for name in names}


def _mapped(spec: SourceSpec, kind: Kind) -> dict[str, str]:
    """The column map of format `columns`, checked against what the kind needs."""
    choices, optional = _OWN_COLUMNS[kind]
    known = [*itertools.chain(*choices), *optional]
    for name in spec.columns:
        if name not in known:
            valid = ", ".join(known)
            raise DataError(
                f"prepare.{kind}: {label(spec)}: columns has unknown key {name!r}; valid keys:"
                f" {valid}"
            )
    if not any(set(names) <= spec.columns.keys() for names in choices):
        lacking = next(name for name in choices[0] if name not in spec.columns)
        either = ", or ".join(" and ".join(names) for names in choices)
        raise DataError(
            f"prepare.{kind}: {label(spec)}: columns lacks {lacking!r}; it must map {either}"
        )
    return spec.columns

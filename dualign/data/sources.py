"""Readers: every supported format as one stream of records, with the file and line that each came from.

A reader turns a `SourceSpec` of a kind (`sft`, `helpful` or `safety`) into `Record`s. A row that cannot be used becomes
a `Rejected`, a row that has nothing to say about this kind (no preference, no safe answer) a `Skipped`; neither stops
the stream. A file that cannot be read at all raises a DataError. Files are read row by row, except a JSON array, which
is loaded whole.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import itertools
import json
import logging
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dualign.core.errors import DataError
from dualign.core.params import SourceSpec, WorldParams
from dualign.core.schema import Message, user
from dualign.data import world
from dualign.data.messages import BadRow, check_unicode, split_answer, turns_in

logger = logging.getLogger(__name__)

Kind = Literal["sft", "helpful", "safety"]
Row = dict[str, Any]

EXCERPT, CELL = 400, 60
_BIG_ARRAY = 200 * 2**20
_FLAGS = ("is_response_0_safe", "is_response_1_safe")
_BITS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(/[\w./-]+)?")
#: Files that describe a data set and hold no rows; and words of names that say which split a file belongs to.
_DESCRIPTIONS = {
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json", "config.json",
}  # fmt: skip
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
_OWN_FLAGS = ("chosen_is_safe", "rejected_is_safe")
#: Sets of columns that format `columns` may map, of which one must be whole; and what may stand beside them.
_OWN_COLUMNS: dict[Kind, tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]] = {
    "sft": ((("prompt", "response"), ("messages",)), ()),
    "helpful": ((("chosen", "rejected"),), ("prompt", *_OWN_FLAGS)),
    "safety": ((("chosen", "rejected"),), ("prompt", *_OWN_FLAGS)),
}
_SEVERITY = ("response_0_severity_level", "response_1_severity_level")
#: What str() makes of a missing value.
_NULLS = {"nan", "NaN", "None", "null", "NULL", "N/A"}
_PKU_LABELS: dict[Kind, tuple[str, ...]] = {
    "sft": _FLAGS,
    "helpful": ("better_response_id",),
    "safety": ("safer_response_id", *_FLAGS),
}


@dataclass(frozen=True, slots=True)
class Where:
    """Where a row came from. `line` counts from 1: lines of a text file, rows of an array, parquet or hub dataset."""

    source: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Record:
    """One usable row. In an sft record `chosen` is the answer and `rejected` is None; flags are None where unknown."""

    where: Where
    prompt: list[Message]
    chosen: str
    rejected: str | None = None
    chosen_is_safe: bool | None = None
    rejected_is_safe: bool | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is wrong: a short reason for counting, the detail in words, the start of the row."""

    where: Where
    reason: str
    detail: str
    row: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that is right but says nothing about the wanted kind."""

    where: Where
    reason: str


_Raw = Iterator[tuple[int, Row | BadRow]]


def read(
    spec: SourceSpec, kind: Kind, folder: Path, made: WorldParams, seed: int
) -> Iterator[Record | Rejected | Skipped]:
    """Stream the records of one source; `made` and `seed` are used by format `world` only.

    Raises:
        DataError: the file or dataset is missing, unreadable or empty, or lacks a column.
    """
    columns = _columns(spec, kind)
    place, files = _locate(spec, kind, folder, made, seed)
    seen: dict[str, None] = {}
    nulls: list[Where] = []
    count = 0
    for file, line, row in itertools.islice(_rows(files), spec.limit):
        count += 1
        seen |= dict.fromkeys(row if isinstance(row, dict) else ())
        for item in _records(row, Where(label(spec), file, line), _layout(spec, kind), kind, columns):
            if isinstance(item, Record) and _says_null(item):
                nulls.append(item.where)
            yield item
    if not count:
        raise DataError(f"{place}: holds no rows; put data in or remove it from prepare.{kind}")
    _require(seen, columns, place, kind)
    if nulls:
        logger.warning(
            "%s:%d: a text says just 'nan', 'None' or the like, and so do those of %d more rows; if these are missing "
            "values, leave the rows out", nulls[0].file, nulls[0].line, len(nulls) - 1,
        )  # fmt: skip


def _says_null(record: Record) -> bool:
    """Whether a text of the record is what is written for a missing value."""
    return not _NULLS.isdisjoint((record.chosen, record.rejected, record.prompt[-1]["content"]))


def _rows(files: Iterable[tuple[str, _Raw]]) -> Iterator[tuple[str, int, Row | BadRow]]:
    for file, rows in files:
        for line, row in rows:
            yield file, line, row


def label(spec: SourceSpec) -> str:
    """The name of a source in tables and metrics: its format, path, and split if it is not `train`."""
    split = f"[{spec.split}]" if spec.split != "train" else ""
    return spec.format if spec.path is None else f"{spec.format}:{spec.path}{split}"


def derived_seed(seed: int, name: str) -> int:
    """A 32-bit seed that differs for every name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4])


# --- from a row to records --------------------------------------------------------------------------------------------


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
    """How the rows of a source look; the world speaks PKU for pairs and prompt, response for sft."""
    if spec.format == "world":
        return "columns" if kind == "sft" else "pku"
    return spec.format


def excerpt(row: Any) -> str:
    """A row as JSON for the quarantine, with its texts cut short."""
    if isinstance(row, dict):
        row = {name: value[:CELL] if isinstance(value, str) else value for name, value in row.items()}
    return json.dumps(row, ensure_ascii=False, default=str)[:EXCERPT]


def _pku_sft(row: Row, where: Where) -> Iterator[Record | Skipped]:
    """The safe answers of a row; both, one or none."""
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
    yield Record(where, user(_text(row, "prompt")), answers[winner], answers[loser], flags[winner], flags[loser])


def _check_severity(row: Row) -> None:
    """The release of 2024 rates the harm of an answer from 0 to 3: 0 is what it flags as safe."""
    for severity, flag in zip(_SEVERITY, _FLAGS, strict=True):
        level, safe = row.get(severity), _flag(row, flag)
        if isinstance(level, int) and safe is not None and safe != (level == 0):
            raise BadRow("contradictory_severity", f"{flag} is {safe}, but {severity} is {level}")


def _hh(row: Row, where: Where, kind: Kind) -> Record:
    prompt, chosen = _dialogue(row, "chosen")
    if kind == "sft":
        return Record(where, prompt, chosen)
    other, rejected = _dialogue(row, "rejected")
    if prompt != other:
        raise BadRow("prompts_differ", "chosen and rejected differ before their last Assistant turn")
    return Record(where, prompt, chosen, rejected)


def _dialogue(row: Row, column: str) -> tuple[list[Message], str]:
    """Split `\\n\\nHuman: ... \\n\\nAssistant: ...` text at its last Assistant turn into prompt and answer."""
    before, *parts = _TURN.split("\n\n" + _text(row, column))
    turns: list[Message] = [
        {"role": _HH_ROLES[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if before or not turns or turns[-1]["role"] != "assistant":
        raise BadRow("not_a_dialogue", f"{column} must begin with 'Human:' and end with an 'Assistant:' turn")
    return _checked(turns[:-1], column), turns[-1]["content"]


def _alpaca(row: Row, where: Where) -> Record:
    given = _text(row, "input") if row.get("input") else ""
    given = "" if given in _NULLS else given
    return Record(where, user(f"{_text(row, 'instruction')}\n\n{given}".strip()), _text(row, "output"))


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
        raise BadRow("prompts_differ", "chosen and rejected differ before their last assistant turn")
    return Record(where, before, chosen, rejected, *flags)


def _prompt(row: Row, column: str) -> list[Message]:
    """A text, or a list of turns."""
    turns = turns_in(row.get(column), column)
    return user(_text(row, column)) if turns is None else _checked(turns, column)


def _answer(row: Row, column: str, prompt: list[Message] | None) -> tuple[list[Message], str]:
    """Prompt and answer of a cell: a text, an answer as a message, or a whole dialogue that begins with the prompt."""
    turns = turns_in(row.get(column), column)
    if turns is None:
        if prompt is None:
            raise BadRow("no_prompt", f"{column} is text and no dialogue, so columns must map prompt as well")
        return prompt, _text(row, column)
    before, answer = split_answer(turns, column)
    if prompt is None:
        return _checked(before, column), answer
    if before and before != prompt:
        raise BadRow("prompts_differ", f"{column} is a dialogue that does not begin with the prompt of the row")
    return prompt, answer


def _checked(turns: list[Message], column: str) -> list[Message]:
    """Chat templates take user and assistant in turn, after at most one system turn, and the user last."""
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if len(spoken) % 2 == 0 or spoken != (["user", "assistant"] * len(spoken))[: len(spoken)]:
        raise BadRow("bad_turns", f"{column}: user and assistant must take turns, the user first and last")
    return turns


def _text(row: Row, column: str) -> str:
    """The cell without the white space around it."""
    if column not in row:
        raise BadRow("missing_column", f"no column {column!r}")
    value = row[column]
    if not isinstance(value, str):
        raise BadRow("not_text", f"{column} is {_short(value)}, expected text")
    return check_unicode(value, column).strip()


def _bit(row: Row, column: str) -> int | None:
    """0, 1, or None for null and for a key that this row leaves out; CSV and parquet write text, floats or booleans."""
    value = row.get(column)
    blank = isinstance(value, str) and value.strip() in {"", *_NULLS}
    if value is None or value != value or blank:
        return None
    bit = _BITS.get(str(value).strip().casefold())
    if bit is None:
        raise BadRow("bad_label", f"{column} is {_short(value)}, expected 0, 1, true, false or null")
    return bit


def _flag(row: Row, column: str) -> bool | None:
    bit = _bit(row, column)
    return None if bit is None else bool(bit)


def _short(value: Any) -> str:
    return "null" if value is None else repr(value)[:60]


# --- columns ----------------------------------------------------------------------------------------------------------


def _columns(spec: SourceSpec, kind: Kind) -> dict[str, str]:
    """The columns that a source must have, by our names. Raises DataError where the format cannot give the kind."""
    if spec.format == "columns":
        return _mapped(spec, kind)
    if spec.format == "alpaca" and kind != "sft":
        raise DataError(f"prepare.{kind}: {label(spec)}: format 'alpaca' holds no pairs; list it under prepare.sft")
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
            raise DataError(f"prepare.{kind}: {label(spec)}: columns has unknown key {name!r}; valid keys: {valid}")
    if not any(set(names) <= spec.columns.keys() for names in choices):
        lacking = next(name for name in choices[0] if name not in spec.columns)
        either = ", or ".join(" and ".join(names) for names in choices)
        raise DataError(f"prepare.{kind}: {label(spec)}: columns lacks {lacking!r}; it must map {either}")
    return spec.columns


def _require(seen: Iterable[str], columns: dict[str, str], file: str, kind: Kind) -> None:
    """Refuse a source of which no row has a column; one that some rows leave out is null there."""
    present = list(map(str, seen))
    for name in columns.values():
        if name not in present and present:
            raise DataError(f"{file}: column {name!r} is missing (prepare.{kind}); the file has: {', '.join(present)}")


# --- from a place to rows ---------------------------------------------------------------------------------------------


def _locate(
    spec: SourceSpec, kind: Kind, folder: Path, made: WorldParams, seed: int
) -> tuple[str, Iterable[tuple[str, _Raw]]]:
    """The name of the place that a source points at, and its files with their raw rows."""
    if spec.path is None:
        return "world", [("world", enumerate(_world(kind, made, derived_seed(seed, kind)), start=1))]
    path = folder / spec.path
    if path.is_dir():
        files = _plain_files(path, spec)
        if files:
            return str(path), ((str(file), _reader(file)(file)) for file in files)
        return str(path), [(str(path), _dataset(str(path), None, spec, folder))]
    if path.is_file():
        return str(path), [(str(path), _reader(path)(path))]
    if _suffix(path) not in _READERS and _HUB_ID.fullmatch(spec.path):
        owner, name, *inner = spec.path.split("/", 2)
        return spec.path, [(spec.path, _dataset(f"{owner}/{name}", inner[0] if inner else None, spec, folder))]
    raise DataError(f"{path}: no such file; put {path.name} into {path.parent} or correct prepare.{kind}")


def _plain_files(folder: Path, spec: SourceSpec) -> list[Path]:
    """The files of a folder that are read one by one, in order of their names.

    Empty for a folder that `datasets` knows better: one that it saved, or whose page says which file belongs where.
    Where names speak of splits, those of the split count.
    """
    page = folder / "README.md"
    if list(folder.rglob("*.arrow")) or (page.is_file() and "\nconfigs:" in page.read_text(errors="replace")):
        return []
    names = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if _suffix(file) in _READERS]
    shown = [name for name in names if not any(part.startswith((".", "_")) for part in name.parts)]
    files = [name for name in shown if name.name not in _DESCRIPTIONS]
    named = {name: set(_SPLIT.findall(name.as_posix())) for name in files}
    if any(named.values()) or spec.split != "train":
        files = [name for name in files if spec.split in named[name]]
    return [folder / name for name in files]


def _world(kind: Kind, made: WorldParams, seed: int) -> Iterator[Row]:
    if kind == "sft":
        return world.sft_rows(made.sft_rows, seed)
    count = made.helpful_pairs if kind == "helpful" else made.safety_pairs
    return world.pku_rows(count, seed, made.sharpness)


def _dataset(name: str, inner: str | None, spec: SourceSpec, folder: Path) -> _Raw:
    """Rows of a hub dataset, or of the folder `inner` in it, or of a local dataset folder."""
    import datasets  # slow to import, and only needed here

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(name, data_dir=inner, split=spec.split, revision=spec.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = _root_cause(error)
        raise DataError(
            f"{spec.path}: split {spec.split!r} cannot be loaded as a dataset ({why}); check path, split and revision, "
            f"or put the file into {folder}"
        ) from error
    yield from enumerate(table, start=1)


def _root_cause(error: BaseException) -> str:
    """The first line of what an exception was raised from in the first place, and the last of it where it says more."""
    cause = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    told = [(str(one).strip() or type(one).__name__).splitlines()[0] for one in (error, cause)]
    return ": ".join(dict.fromkeys(told))


def _reader(path: Path) -> Callable[[Path], _Raw]:
    try:
        return _READERS[_suffix(path)]
    except KeyError:
        raise DataError(
            f"{path}: unknown kind of file; one of {', '.join(_READERS)}, text files also with {', '.join(_PACKED)}"
        ) from None


def _suffix(path: Path) -> str:
    """The suffix that names the format, below .gz or .xz."""
    return (path.with_suffix("") if path.suffix in _PACKED else path).suffix


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file; whatever goes wrong while they are read is a DataError."""
    opener: Callable[..., IO[bytes]] = _PACKED.get(path.suffix, open)
    try:
        with opener(path, "rb") as stream:
            yield stream
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({error}); is the download complete?") from error


def _jsonl(path: Path) -> _Raw:
    with _opened(path) as stream:
        for line, content in enumerate(stream, start=1):
            if content.strip():
                yield line, _json_line(content.removeprefix(b"\xef\xbb\xbf"), path, line)


def _json_line(content: bytes, path: Path, line: int) -> Row | BadRow:
    text = content.decode("utf-8", "backslashreplace").strip()[:EXCERPT]
    try:
        row = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except _RepeatedKey as error:
        return BadRow("duplicate_key", str(error), text)
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", f"byte {error.start + 1} of the line is not UTF-8", text)
    except (ValueError, RecursionError) as error:
        if content.endswith(b"\n"):
            return BadRow("not_json", str(error), text)
        logger.warning("%s:%d: the file ends within this row; it may have been cut short", path, line)
        return BadRow("truncated_row", f"the file ends within this row ({error})", text)
    return _as_row(row)


class _RepeatedKey(ValueError):
    """An object that has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    """A JSON object, of which json would keep the last value of a key that stands in it twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RepeatedKey(f"key {twice!r} stands twice in one object; keep one")
    return row


def _as_row(row: Any) -> Row | BadRow:
    return row if isinstance(row, dict) else BadRow("not_an_object", "expected an object of columns", excerpt(row))


def _json(path: Path) -> _Raw:
    """A JSON array, or one object per line under the name .json, as some datasets have it."""
    with _opened(path) as stream:
        first = next((line for line in stream if line.strip()), b"").removeprefix(b"\xef\xbb\xbf").strip()
    if not first.startswith(b"["):
        return _json_lines(path, first)
    return _json_array(path)


def _json_lines(path: Path, first: bytes) -> _Raw:
    try:
        if first:
            json.loads(first)
    except ValueError as error:
        raise DataError(f"{path}: expected a list of rows, or one object per line ({error})") from error
    return _jsonl(path)


def _json_array(path: Path) -> _Raw:
    if path.stat().st_size > _BIG_ARRAY:
        logger.warning("%s: a JSON array is loaded whole; .jsonl or .parquet would be read row by row", path)
    with _opened(path) as stream:
        content = stream.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); is the file complete?") from error
    return enumerate(map(_as_row, rows), start=1)


def _csv(path: Path) -> _Raw:
    with _opened(path) as stream:
        reader = csv.reader(_decoded(stream), strict=True)
        line = 1
        try:
            header = next(reader, [])
            _refuse_repeated(header, path)
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield line, _csv_row(header, cells)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not valid CSV ({error}); is a quote left open here?") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{line}: not UTF-8; convert the file, e.g. with iconv") from error


def _refuse_repeated(names: Sequence[str], path: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: column {twice[0]!r} stands twice; rename one of the two")


def _decoded(stream: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(stream):
        yield line.decode("utf-8" if number else "utf-8-sig")


def _csv_row(header: list[str], cells: list[str]) -> Row | BadRow:
    if len(cells) != len(header):
        return BadRow("wrong_cell_count", f"{len(cells)} cells for {len(header)} columns", excerpt(cells))
    return dict(zip(header, cells, strict=True))


def _parquet(path: Path) -> _Raw:
    try:
        with pq.ParquetFile(path) as file:
            _refuse_repeated(file.schema_arrow.names, path)
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            yield from enumerate(itertools.chain.from_iterable(batches), start=1)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


_READERS: dict[str, Callable[[Path], _Raw]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
_PACKED: dict[str, Callable[..., IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]

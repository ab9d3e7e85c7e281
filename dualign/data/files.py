"""Places and their raw rows: files, folders of files and datasets, rows with file and line.

Every file is read row by row and within the limits below, so that no file, however well it is
packed, takes more memory than they allow. A file that cannot be read raises a DataError; a row that
cannot be parsed is yielded as a BadRow."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import itertools
import json
import logging
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dualign.core.errors import DataError
from dualign.data.hub import HUB_ID, dataset, is_saved, saved
from dualign.data.labels import features_of, with_names
from dualign.data.rows import EXCERPT, BadRow, RepeatedKey, Row, excerpt, unique
from dualign.params.data import SourceSpec

logger = logging.getLogger(__name__)

#: Bytes of one row: of a line of text, an entry of a JSON list, a cell of CSV, and the texts of a
#: row of parquet.
ROW_LIMIT = 16 * 2**20
#: Bytes of one row group of a parquet file, unpacked, as the file itself states them.
GROUP_LIMIT = 2**30
#: Encodings of texts that Arrow does not read into a dictionary.
_DELTAS = {"DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"}
#: Rows of parquet that are decoded together, and characters of a JSON list that are read together.
_BATCH = 1024
_CHUNK = 2**20

Raw = Iterator[tuple[int, Row | BadRow]]
Files = Iterable[tuple[str, Raw]]

#: Files that describe a data set and hold no rows.
_DESCRIPTIONS = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "metadata.json",
    "config.json",
}
#: One of some words in a file's name, and no part of a longer one; words that name a split.
_WORD = "(?<![a-z])({})(?![a-z])"
_SPLIT = re.compile(_WORD.format("train|test|validation|valid|val|dev|eval"), re.IGNORECASE)
#: Kinds of files that lie beside data and hold none.
_PROSE = {"", ".md", ".txt", ".py", ".yaml", ".yml", ".dvc"}
_BOM = b"\xef\xbb\xbf"
#: JSON of which more may follow: the places where a parser stops at the end of a text that was cut.
_OPEN = "Unterminated string"
_TAIL = 16
_SPACE = re.compile(r"[ \t\n\r]*")


def locate(spec: SourceSpec, path: str, folder: Path, key: str) -> tuple[str, Files]:
    """The name of a source's place, its files and their raw rows; `key` is the param."""
    place = folder / path
    if place.is_dir():
        return str(place), _of_folder(place, spec, folder)
    if place.is_file():
        return str(place), [(str(place), read_file(place))]
    if _suffix(place) not in _READERS and HUB_ID.fullmatch(path):
        owner, name, *inner = path.split("/", 2)
        return path, [
            (path, _dataset(f"{owner}/{name}", inner[0] if inner else None, spec, folder))
        ]
    raise DataError(f"{place}: no such file; put {place.name} into {place.parent} or correct {key}")


# --- folders and datasets -------------------------------------------------------------------------


def _of_folder(folder: Path, spec: SourceSpec, root: Path) -> Files:
    """The files of a folder, or the dataset that `datasets` wrote or its page describes."""
    names = _listed(folder)
    arrow = any(name.suffix == ".arrow" for name in names)
    if arrow and is_saved(folder):
        return [(str(folder), saved(folder, spec.split))]
    if arrow or _has_configs(folder / "README.md"):
        return [(str(folder), _dataset(str(folder), None, spec, root))]
    files = [folder / name for name in _plain_files(folder, names, spec)]
    return ((str(file), read_file(file)) for file in files)


def _listed(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders, below it, in order of their names."""
    files: list[Path] = []
    try:
        for where, _, names in os.walk(folder, onerror=_raised):
            files += [(Path(where) / name).relative_to(folder) for name in names]
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror}); check the permissions of the folder"
        ) from error
    return sorted(files)


def _raised(error: OSError) -> NoReturn:
    raise error


def _has_configs(page: Path) -> bool:
    try:
        return b"\nconfigs:" in page.read_bytes()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DataError(f"{page}: cannot be read ({error.strerror}); {_remedy(error)}") from error


def _set_aside(name: Path) -> bool:
    """Whether a file, or a folder that it is in, is hidden or one of a tool's own."""
    return any(part.startswith((".", "_")) for part in name.parts)


def _plain_files(folder: Path, names: Sequence[Path], spec: SourceSpec) -> list[Path]:
    """The files below a folder; where names speak of splits, those of the split."""
    shown = [name for name in names if not _set_aside(name)]
    files = [name for name in shown if _suffix(name) in _READERS and name.name not in _DESCRIPTIONS]
    if not shown:
        raise DataError(
            f"{folder}: the folder holds no files; put data into it, or correct the path"
        )
    if not files:
        some = ", ".join(map(str, shown[:3]))
        raise DataError(
            f"{folder}: holds no file of a kind that is read, but {some}; convert them to {_KINDS}"
        )
    others = [
        name
        for name in shown
        if _suffix(name) not in _READERS and name.suffix.lower() not in _PROSE
    ]
    if others:
        logger.warning(
            "%s: not read: %s, since only %s is", folder, ", ".join(map(str, others[:5])), _KINDS
        )
    spoken = [_SPLIT.findall(name.as_posix()) for name in files]
    splits = sorted({word.lower() for words in spoken for word in words})
    if not splits and spec.split == "train":
        return files
    own = re.compile(_WORD.format(re.escape(spec.split)), re.IGNORECASE)
    kept = [name for name in files if own.search(name.as_posix())]
    if not kept:
        raise DataError(
            f"{folder}: no file's name speaks of split {spec.split!r}; names speak of:"
            f" {', '.join(splits) or 'none'}"
        )
    bare = [name for name, words in zip(files, spoken, strict=True) if not words]
    _tell_left_out(folder, [name for name in bare if name not in kept])
    return kept


def _tell_left_out(folder: Path, names: Sequence[Path]) -> None:
    """Warn of files that are read for no split, since their names speak of none."""
    if names:
        logger.warning(
            "%s: not read: %s, whose names speak of no split as those of other files do; name them"
            " after one, or give them as sources of their own",
            folder,
            ", ".join(map(str, names[:5])),
        )


def _dataset(name: str, inner: str | None, spec: SourceSpec, folder: Path) -> Raw:
    """Rows of a hub dataset, or of the folder `inner` in it, or of a local dataset folder."""
    return dataset(name, folder, split=spec.split, revision=spec.revision, data_dir=inner)


# --- text files -----------------------------------------------------------------------------------


def read_file(path: Path) -> Raw:
    """The raw rows of one file, by its suffix; rows of CSV, JSON and parquet."""
    reader = _READERS.get(_suffix(path))
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; one of {_KINDS}")
    return reader(path)


def _suffix(path: Path) -> str:
    """The suffix that names the format, below .gz or .xz."""
    packed = path.suffix.lower() in _PACKED
    return (path.with_suffix("") if packed else path).suffix.lower()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file; whatever goes wrong while they are read is a DataError."""
    opener: Callable[..., IO[bytes]] = _PACKED.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as stream:
            yield stream
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {_remedy(error)}") from error


def _remedy(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "check its permissions"
    if isinstance(error, FileNotFoundError):
        return "does a link lead nowhere?"
    return "is the download complete?"


def _lines(stream: IO[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file without its byte order mark, none of them longer than the limit."""
    for number in itertools.count(1):
        line = stream.readline(ROW_LIMIT + 1)
        if len(line) > ROW_LIMIT:
            raise DataError(f"{path}:{number}: {_too_long('the line')}")
        if not line:
            return
        yield number, line.removeprefix(_BOM) if number == 1 else line


def _too_long(what: str) -> str:
    return (
        f"{what} is longer than {_size(ROW_LIMIT)}, which is the limit of a row; is this the right"
        " file?"
    )


def _size(count: int) -> str:
    return f"{count / 2**20:.4g} MiB" if count >= 2**20 else f"{count} bytes"


def _jsonl(path: Path) -> Raw:
    with _opened(path) as stream:
        for line, content in _lines(stream, path):
            if content.strip():
                yield line, _json_line(content, path, line)


def _json_line(content: bytes, path: Path, line: int) -> Row | BadRow:
    text = content.decode("utf-8", "backslashreplace").strip()[:EXCERPT]
    try:
        row = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except RepeatedKey as error:
        return BadRow("duplicate_key", str(error), text)
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", f"byte {error.start + 1} of the line is not UTF-8", text)
    except (ValueError, RecursionError) as error:
        if content.endswith(b"\n"):
            return BadRow("not_json", str(error), text)
        logger.warning(
            "%s:%d: the file ends within this row; it may have been cut short", path, line
        )
        return BadRow("truncated_row", f"the file ends within this row ({error})", text)
    return _as_row(row)


def _as_row(row: Any) -> Row | BadRow:
    if isinstance(row, dict):
        return row
    return BadRow("not_an_object", "expected an object of columns", excerpt(row))


def _json(path: Path) -> Raw:
    """A JSON list, or one object per line under the name .json, as some datasets have it."""
    with _opened(path) as stream:
        start = stream.read(_CHUNK).removeprefix(_BOM).lstrip()
    if start.startswith(b"["):
        return _json_list(path)
    _check_first_line(path)
    return _jsonl(path)


def _check_first_line(path: Path) -> None:
    with _opened(path) as stream:
        first = next((content for _, content in _lines(stream, path) if content.strip()), b"{}")
    try:
        json.loads(first)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: expected a list of rows, or one object per line ({error})"
        ) from error


def _json_list(path: Path) -> Raw:
    with _opened(path) as stream:
        text = _Json(stream)
        for number in itertools.count(1):
            try:
                if not text.another(number == 1):
                    return
                row = text.value()
            except (ValueError, RecursionError) as error:
                why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise DataError(
                    f"{path}: not valid JSON (row {number}: {why}); is the file complete?"
                ) from error
            except OverflowError as error:
                raise DataError(f"{path}: row {number}: {_too_long('the row')}") from error
            yield number, _as_row(row) if not isinstance(row, BadRow) else row


class _Json:
    """A JSON list read from a stream; no more of it is held than an entry and a chunk."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._whole = False

    def another(self, first: bool) -> bool:
        """Go to the next entry; False at the list's end. Raises ValueError where neither is."""
        mark = self._seen()
        if mark == "]" and not first:
            return self._ended()
        if mark != ("[" if first else ","):
            raise ValueError("expected a comma or the end of the list")
        self._at += 1
        follows = self._seen()
        return self._ended() if first and follows == "]" else True

    def _ended(self) -> bool:
        self._at += 1
        if self._seen():
            raise ValueError("something follows the list")
        return False

    def value(self) -> Any:
        """The next entry, a BadRow for a key twice. Raises OverflowError beyond ROW_LIMIT."""
        decode = _STRICT.raw_decode
        repeated = None
        while True:
            try:
                value, end = decode(self._text, self._at)
            except RepeatedKey as error:
                decode = _PLAIN.raw_decode
                repeated = error
                continue
            except json.JSONDecodeError as error:
                if self._whole or not self._cut(error):
                    raise
            else:
                if end < len(self._text) or self._whole:
                    return self._taken(value, end, repeated)
            if len(self._text) - self._at > ROW_LIMIT:
                raise OverflowError
            self._grow()

    def _taken(self, value: Any, end: int, repeated: RepeatedKey | None) -> Any:
        text = self._text[self._at : end][:EXCERPT]
        self._at = end
        return value if repeated is None else BadRow("duplicate_key", str(repeated), text)

    def _cut(self, error: json.JSONDecodeError) -> bool:
        """Whether an error may be due to the end of what has been read."""
        return error.msg.startswith(_OPEN) or error.pos > len(self._text) - _TAIL

    def _seen(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._whole:
                return self._text[self._at : self._at + 1]
            self._grow()

    def _grow(self) -> None:
        """Read at least as much again as is held, so that long entries are not parsed often."""
        left = self._text[self._at :]
        content = self._stream.read(min(max(_CHUNK, len(left)), ROW_LIMIT))
        self._whole = not content
        self._text = left + self._decoder.decode(content, final=self._whole)
        self._at = 0


_STRICT = json.JSONDecoder(object_pairs_hook=unique)
_PLAIN = json.JSONDecoder()


def _csv(path: Path) -> Raw:
    csv.field_size_limit(ROW_LIMIT)  # of the whole process; the default refuses cells above 128 KiB
    with _opened(path) as stream:
        reader = csv.reader(
            (content.decode("utf-8") for _, content in _lines(stream, path)), strict=True
        )
        line = 1
        try:
            header = next(reader, [])
            _refuse_repeated([name for name in header if name.strip()], path)
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield line, _csv_row(header, cells)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}:{line}: not valid CSV ({error}); is a quote left open here, or are cells"
                " parted by something else than commas, or lines by a bare carriage return?"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{line}: not UTF-8; convert the file, e.g. with iconv"
            ) from error


def _refuse_repeated(names: Sequence[str], path: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: column {twice[0]!r} stands twice; rename one of the two")


def _csv_row(header: list[str], cells: list[str]) -> Row | BadRow:
    """The cells by heading; those under a blank one, an index of pandas, are no column."""
    if len(cells) != len(header):
        return BadRow(
            "wrong_cell_count", f"{len(cells)} cells for {len(header)} columns", excerpt(cells)
        )
    return {name: cell for name, cell in zip(header, cells, strict=True) if name.strip()}


# --- parquet --------------------------------------------------------------------------------------


def _parquet(path: Path) -> Raw:
    """The rows of a parquet file.

    A text that a column repeats is stored once, so texts are left as references to a dictionary, at
    what they weigh in the file, until a piece of the rows is known to fit in memory."""
    try:
        with pq.ParquetFile(path) as file:
            _refuse_repeated(file.schema_arrow.names, path)
            _check_groups(file.metadata, path)
            texts = _texts(file)
            size = _batch_size(file.metadata)
            schema = file.schema_arrow
            features = features_of(schema)
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            for first, batch in _numbered(file.iter_batches(batch_size=size)):
                for start, piece in _pieces(first, batch, path):
                    rows = enumerate(_unpacked(piece, schema).to_pylist(), start=start)
                    yield from with_names(rows, features)
    except (pa.ArrowException, OSError) as error:
        why = str(error).strip().splitlines()[0]
        raise DataError(
            f"{path}: not a readable parquet file ({why}); is it complete? write it again"
        ) from error


def _chunks(metadata: Any) -> list[Any]:
    """The columns of all row groups."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return [group.column(index) for group in groups for index in range(group.num_columns)]


def _texts(file: pq.ParquetFile) -> list[str]:
    """The columns that Arrow can leave as references to a dictionary."""
    deltas = {
        chunk.path_in_schema for chunk in _chunks(file.metadata) if _DELTAS & {*chunk.encodings}
    }
    columns = map(file.schema.column, range(len(file.schema)))
    texts = [
        one
        for one in columns
        if one.physical_type == "BYTE_ARRAY" and one.logical_type.type != "DECIMAL"
    ]
    return [one.path for one in texts if one.path not in deltas]


def _batch_size(metadata: Any) -> int:
    """Rows to decode together: a text stored as a difference may be as long as its column."""
    sizes = [
        chunk.total_uncompressed_size for chunk in _chunks(metadata) if _DELTAS & {*chunk.encodings}
    ]
    return max(1, min(_BATCH, 4 * ROW_LIMIT // max([1, *sizes])))


def _check_groups(metadata: Any, path: Path) -> None:
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(index) for index in range(group.num_columns)]
        held = sum(max(column.total_uncompressed_size, 8 * column.num_values) for column in columns)
        if held > GROUP_LIMIT:
            raise DataError(
                f"{path}: row group {number + 1} of {metadata.num_row_groups} unpacks to"
                f" {_size(held)}, more than the limit of {_size(GROUP_LIMIT)}; write the file with"
                " smaller ones, e.g. row_group_size=10000"
            )


def _numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Each batch with the number of its first row."""
    first = 1
    for batch in batches:
        yield first, batch
        first += len(batch)


def _pieces(first: int, batch: pa.RecordBatch, path: Path) -> Iterator[tuple[int, pa.RecordBatch]]:
    """A batch in pieces that fit in memory, each with the number of its first row."""
    if sum(map(_weight, batch.columns)) <= ROW_LIMIT:
        yield first, batch
    elif len(batch) == 1:
        raise DataError(f"{path}: row {first}: {_too_long('the row')}")
    else:
        half = len(batch) // 2
        yield from _pieces(first, batch.slice(0, half), path)
        yield from _pieces(first + half, batch.slice(half), path)


def _weight(column: pa.Array) -> int:
    """About how many bytes the values of a column take once they are unpacked."""
    own = 8 * len(column)
    if pa.types.is_dictionary(column.type):
        lengths = pc.take(pc.binary_length(column.dictionary), column.indices)
        return own + (pc.sum(lengths).as_py() or 0)
    if pa.types.is_struct(column.type):
        return own + sum(map(_weight, column.flatten()))
    if isinstance(column, pa.ListArray | pa.LargeListArray):
        start = column.offsets[0].as_py()
        end = column.offsets[-1].as_py()
        return own + _weight(column.values.slice(start, end - start))
    if isinstance(column, pa.FixedSizeListArray):
        return own + _weight(column.flatten())
    return max(own, column.nbytes)


def _unpacked(piece: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The rows with their texts in place of references, which become Python objects faster."""
    # A cast would unpack all that a piece is a part of.
    own = piece.take(pa.array(range(len(piece))))
    columns = map(_cast, own.columns, schema.types)
    return pa.RecordBatch.from_arrays(list(columns), names=schema.names)


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    try:
        return column.cast(kind)
    except pa.ArrowNotImplementedError:  # for some rare types; the values are the same
        return column


_READERS: dict[str, Callable[[Path], Raw]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
_PACKED: dict[str, Callable[..., IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]
_KINDS = f"{', '.join(_READERS)}, text files also with {' or '.join(_PACKED)}"

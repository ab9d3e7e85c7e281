"""Files as a stage writes them: whole or not at all, and the same bytes for the same content."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dualign.core.errors import DataError, DualignError
from dualign.core.ranks import by_one
from dualign.core.schema import to_table
from dualign.core.temporaries import room_for, temporary_folder

T = TypeVar("T")
#: Rows that are turned into a piece of a table together, and pieces that make a group of its file.
_BATCH = 4096
_BATCHES = 16
#: The prompts of a suite, in its folder of answers.
SUITE_PROMPTS = "_suite.parquet"
_OS_ERROR = re.compile(r"(?:os error |[Ee]rrno )(\d+)")
_ROOM = "free space there"
_MODE = "check the folder's owner and mode"
#: Numbers of the system's errors of writing, and what to do.
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: _MODE,
    errno.EPERM: _MODE,
    errno.EROFS: "it is mounted read-only",
    errno.EIO: "look after the disk",
}


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; on success it takes the place of `path`, on failure it is removed.

    Works for a file and for a folder (created by the body). Of several processes all write a
    temporary, and the first one's is taken. Raises DualignError where the place cannot be
    written."""
    path = Path(path)

    def refusal(told: str, remedy: str) -> DualignError:
        return DualignError(
            f"{path}: cannot be written ({told})" + (f"; {remedy}" if remedy else "")
        )

    with faults_told(refusal):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(room_for(path.parent)) as place:
            yield place / path.name
            with by_one() as mine:
                if mine:
                    _open_to_readers(place / path.name, place.stat().st_mode & 0o666)
                    _put(place / path.name, path)


@contextlib.contextmanager
def faults_told(refusal: Callable[[str, str], DualignError]) -> Iterator[None]:
    """Raise what `refusal` makes of a fault of writing and its remedy; other errors pass."""
    try:
        yield
    except DualignError:
        raise
    except Exception as error:
        fault = write_fault(error)
        if fault is None:
            raise
        raise refusal(fault, _REMEDIES.get(_number(error) or 0, "")) from error


def write_fault(error: BaseException) -> str | None:
    """A fault of writing in one line; None where an exception is about something else.

    safetensors and torch tell of a full disk by exceptions of their own, the system's number in
    their text at best."""
    number = _number(error)
    if number is None:
        text = str(error).strip()
        return (
            text.splitlines()[0]
            if "PytorchStreamWriter" in text or "inline_container" in text
            else None
        )
    named = getattr(error, "filename", None)
    return os.strerror(number) + (f": {named}" if named else "")


def is_full(error: BaseException) -> bool:
    """Whether an exception says that a disk is full, or somebody's share of it."""
    return _number(error) in (errno.ENOSPC, errno.EDQUOT)


def _number(error: BaseException) -> int | None:
    """The system's number of an error of writing, also where only its text holds one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = _OS_ERROR.search(str(error))
    return int(match[1]) if match is not None and int(match[1]) in _REMEDIES else None


def _open_to_readers(new: Path, mode: int) -> None:
    """Give files that a library made for its process alone the mode of any new file: safetensors
    does so with weights, which another account could then neither serve nor pull."""
    for file in [new, *new.rglob("*")]:
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) == 0o600:
            file.chmod(mode)


def _put(new: Path, path: Path) -> None:
    """Move what is whole to its place, also between mounts, which renames do not cross."""
    try:
        _rename(new, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with temporary_folder(path.parent) as beside:
            shutil.move(new, beside)
            _rename(beside / new.name, path)


def _rename(new: Path, path: Path) -> None:
    """Rename over what is there; an old folder goes as a whole, half would pass for an output."""
    if not (new.is_dir() and path.is_dir()):
        new.replace(path)
        return
    old = path.rename(new.with_name(f"{new.name}.old"))
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise


def copy_folder(folder: Path, out: Path, leave: Sequence[str] = ()) -> None:
    """Copy a folder to `out`, which must not exist, without the files of some patterns. The copies
    can be written, unlike files that DVC has linked to its cache.
    """
    ignored = shutil.ignore_patterns(*leave)
    shutil.copytree(folder, out, ignore=ignored, copy_function=shutil.copyfile)


def listed(folder: Path, pattern: str) -> list[Path]:
    """What a pattern finds in a folder, in order, without what is hidden or half written."""
    paths = sorted(folder.glob(pattern))
    return [path for path in paths if not _hidden(path.relative_to(folder))]


def policy_tables(folder: Path) -> list[Path]:
    """The tables of policies in a suite's folder of answers, beside `SUITE_PROMPTS`."""
    return [path for path in listed(folder, "*.parquet") if path.name != SUITE_PROMPTS]


def _hidden(path: Path) -> bool:
    """Whether a file, or a folder that it is in, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def sha256(file: Path) -> str:
    """The hash of a file's bytes, in hex."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """The hashes of all files in a folder, by their paths in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON with sorted keys; NaN and infinity become null, which every reader understands."""
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(_finite(content), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        )


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write a table for `dvc plots`: a JSON list of records, which hold these columns and no other.

    A row of nulls stands for an empty table, on which DVC fails.
    """
    records = [_picked(row, columns) for row in rows]
    write_json(path, records or [dict.fromkeys(columns)])


def _picked(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in columns}


def read_json(path: str | Path) -> Any:
    """Read JSON written by a stage. Raises DualignError if it is missing or cut short."""
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DualignError(
            f"{path}: no such file; run the stage that writes it first (`dvc repro`)"
        ) from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise DualignError(f"{path}: no JSON file; name one") from error
    except json.JSONDecodeError as error:
        raise DualignError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}); run its stage again"
        ) from error
    except RecursionError as error:
        raise DualignError(
            f"{path}: JSON nested too deeply to be a stage's; run its stage again"
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise DualignError(f"{path}: no JSON of a stage ({error}); run its stage again") from error


def read_optional_json(path: str | Path) -> dict[str, Any]:
    """The JSON object of a file, or {} where there is none, since its stage did not write it."""
    content = read_json(path) if Path(path).is_file() else {}
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: not a JSON object; run the stage that wrote it again (`dvc repro --force`)"
        )
    return content


def write_parquet(
    path: str | Path, rows: pd.DataFrame | list[dict[str, Any]], schema: pa.Schema
) -> None:
    """Write one of dualign's tables (see `dualign.core.schema`)."""
    table = to_table(rows, schema)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def stream_parquet(path: str | Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    """Write one of dualign's tables from rows as they come, in groups that fit in memory."""
    tables = (to_table(batch, schema) for batch in batches(rows, _BATCH))
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for group in batches(tables, _BATCHES):
            writer.write_table(pa.concat_tables(group).combine_chunks())


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Items in lists of `size`; the last one may be shorter."""
    left = iter(items)
    while batch := list(itertools.islice(left, size)):
        yield batch


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value

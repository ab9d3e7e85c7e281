"""Sources: every supported format as one stream of records, with the file and line of each.

`read` turns a `SourceSpec` of a kind (`sft`, `helpful` or `safety`) into `Usable`s. A row that
cannot be used becomes a `Rejected`, a row that has nothing to say about this kind (no preference,
no safe answer) a `Skipped`; neither stops the stream. A file that cannot be read at all, lacks a
column or holds labels of unclear meaning raises a DataError."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dualign.core.errors import DataError
from dualign.data import cells, world
from dualign.data.files import Files, locate
from dualign.data.formats import (
    FORMATS,
    OWN_FLAGS,
    Choices,
    Format,
    Item,
    Kind,
    Rejected,
    Usable,
    Where,
    label,
)
from dualign.data.rows import BadRow, Row, excerpt
from dualign.params.data import SourceSpec, WorldParams

logger = logging.getLogger(__name__)

#: Labels beyond 0 and 1 that are slips of the pen in a file; more of them are a code of its own.
_SLIPS = 1
_SLIP_SHARE = 0.05


def read(
    spec: SourceSpec,
    kind: Kind,
    folder: Path,
    made: WorldParams,
    seed: int,
    source: str | None = None,
) -> Iterator[Item]:
    """Stream the records of one source; `made` and `seed` are used by format `world` only, `source`
    is what it is called, its label by default.

    Raises:
        DataError: the file or dataset is missing, unreadable or empty, lacks a column, or its
            labels are not 0 and 1.
    """
    form = _format(spec, kind)
    columns = form.check(spec, kind) if form.check else {}
    place, files = _located(spec, kind, folder, made, seed)
    whole = _Whole(kind, _needed(form, kind, columns), _labels(form, kind, columns))
    called = source or label(spec)
    rows = _noted(itertools.islice(_rows(files), spec.limit), called, whole)
    for where, row in form.join(rows) if form.join else rows:
        for item in _records(row, where, form, kind, columns):
            whole.item(item)
            yield item
    whole.check(place)


def _format(spec: SourceSpec, kind: Kind) -> Format:
    """The format of a source. Raises DataError where it cannot give the kind."""
    form = FORMATS[spec.format]
    if kind not in form.columns:
        uses = " or ".join(f"prepare.{use}" for use in form.columns)
        raise DataError(
            f"prepare.{kind}: {label(spec)}: format {spec.format!r} holds nothing for it; list it"
            f" under {uses}"
        )
    return form


def _needed(form: Format, kind: Kind, columns: Mapping[str, str]) -> Choices:
    """Sets of columns, of which a file must have one: those that are mapped, or the format's."""
    return (tuple(columns.values()),) if columns else form.columns[kind]


def _noted(
    rows: Iterable[tuple[str, int, Row | BadRow]], source: str, whole: _Whole
) -> Iterator[tuple[Where, Row | BadRow]]:
    """The rows as they are in the files, each noted for what is said of the source as a whole."""
    for file, line, row in rows:
        whole.row(file, row)
        yield Where(source, file, line), row


def _records(
    row: Row | BadRow, where: Where, form: Format, kind: Kind, columns: Mapping[str, str]
) -> Iterator[Item]:
    try:
        if isinstance(row, BadRow):
            raise row
        yield from form.read(row, where, kind, columns)
    except BadRow as bad:
        yield Rejected(where, bad.reason, bad.detail, bad.text or excerpt(row))


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


def derived_seed(seed: int, name: str) -> int:
    """A 32-bit seed that differs for every name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4])


# --- what is true of a source as a whole ----------------------------------------------------------


@dataclass
class _Whole:
    """Columns of a source's files, numbers in label columns, how many texts say null, the first
    where."""

    kind: Kind
    columns: Choices
    labels: tuple[str, ...]
    seen: dict[str, dict[str, None]] = field(default_factory=dict)
    codes: dict[str, Counter[float]] = field(default_factory=dict)
    null: Where | None = None
    nulls: int = 0

    def row(self, file: str, row: Row | BadRow) -> None:
        """Note a raw row."""
        seen = self.seen.setdefault(file, {})
        if isinstance(row, BadRow):
            return
        seen |= dict.fromkeys(row)
        for name in self.labels:
            number = cells.number(row.get(name))
            if number is not None:
                self.codes.setdefault(name, Counter())[number] += 1

    def item(self, item: Item) -> None:
        """Note what became of a row."""
        if isinstance(item, Usable) and _says_null(item):
            self.null = self.null or item.where
            self.nulls += 1

    def check(self, place: str) -> None:
        """Refuse a source without rows, a file without a needed column, and unclear labels."""
        if not self.seen:
            raise DataError(
                f"{place}: holds no rows; put data in or remove it from prepare.{self.kind}"
            )
        for file, seen in self.seen.items():
            _require(seen, self.columns, file, self.kind)
        for name, codes in self.codes.items():
            _check_codes(codes, name, place)
        if self.null is not None:
            logger.warning(
                "%s:%d: a text says just 'nan', 'None' or the like, and so do those of %d more"
                " rows; if these are "
                "missing values, leave the rows out",
                self.null.file,
                self.null.line,
                self.nulls - 1,
            )


def _says_null(record: Usable) -> bool:
    """Whether a text of the record is what is written for a missing value."""
    texts = (record.chosen, record.rejected, record.prompt[-1]["content"])
    return any(map(cells.says_nothing, filter(None, texts)))


def _labels(form: Format, kind: Kind, columns: Mapping[str, str]) -> tuple[str, ...]:
    """The columns that hold 0 or 1: the format's, or the flags that are mapped."""
    mapped = tuple(columns[name] for name in OWN_FLAGS if name in columns)
    return form.labels.get(kind, mapped)


def _check_codes(codes: Counter[float], column: str, place: str) -> None:
    """Refuse a column that codes answers by 1 and 2, say: its 1 may be what is 0 here."""
    strays = sum(count for code, count in codes.items() if code not in (0, 1))
    if strays > max(_SLIPS, _SLIP_SHARE * codes.total()):
        counts = ", ".join(
            f"{cells.shortened(code)} ({count} rows)" for code, count in sorted(codes.items())[:5]
        )
        raise DataError(
            f"{place}: column {column!r} holds {counts}, so what its 1 means is unclear; accepted"
            " are 0 (no, or the first answer), 1 (yes, or the second), true, false and null: write"
            " it in these"
        )


def _heading(name: str) -> str:
    """A column's name, in quotes where white space at its ends would not be seen."""
    return name if name == name.strip() else repr(name)


def _require(seen: Iterable[str], choices: Choices, file: str, kind: str) -> None:
    """Refuse a file of which no row has a column; one that some rows leave out is null there.

    Of several sets of columns one must be whole; a message speaks of the one that lacks least."""
    present = list(map(str, seen))

    def missing(names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in present]

    lacking = min(map(missing, choices), key=len)
    if lacking and present:
        raise DataError(
            f"{file}: column {lacking[0]!r} is missing (prepare.{kind}); the file has:"
            f" {', '.join(map(_heading, present))}"
        )

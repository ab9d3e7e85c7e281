"""Rows that the library `datasets` loads: of the hub, or of a folder that it saved."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dualign.core.errors import DataError
from dualign.data.labels import with_names
from dualign.data.rows import Row

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(/[\w./-]+)?")
#: The file that `save_to_disk` writes beside the folders of several splits, and beside the rows of
#: one.
_SPLITS = "dataset_dict.json"
_ROWS = "state.json"


def dataset(
    place: str, folder: Path, *, split: str, **chosen: str | None
) -> Iterator[tuple[int, Row]]:
    """Rows of a hub dataset or of a local dataset folder; `chosen` goes to `load_dataset`.

    Raises a DataError that says to put the file into `folder` where it cannot be loaded."""
    import datasets  # slow to import, and only needed here

    remedy = f"check path, split and revision, or put the file into {folder}"
    table = _loaded(
        lambda: datasets.load_dataset(place, split=split, **chosen),
        f"{place}: split {split!r}",
        remedy,
    )
    yield from with_names(enumerate(table, start=1), table.features.to_dict())


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / _SPLITS).is_file() or (folder / _ROWS).is_file()


def saved(folder: Path, split: str) -> Iterator[tuple[int, Row]]:
    """Rows of a folder that `save_to_disk` wrote, of that split where it holds several.

    Beside its files may lie those of its cache, which are not its rows."""
    import datasets

    table = _loaded(
        lambda: datasets.load_from_disk(str(folder)), str(folder), "save the dataset again"
    )
    if isinstance(table, dict):
        if split not in table:
            raise DataError(
                f"{folder}: has no split {split!r}; the saved dataset has {', '.join(table)}"
            )
        table = table[split]
    rows = enumerate(table.with_format(None), start=1)
    yield from with_names(rows, table.features.to_dict())


def _loaded(load: Callable[[], Any], what: str, remedy: str) -> Any:
    """What `datasets` loads, or a DataError with the reason."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return load()
    except (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        datasets.exceptions.DatasetsError,
    ) as error:
        why = _root_cause(error)
        raise DataError(f"{what} cannot be loaded as a dataset ({why}); {remedy}") from error


def _root_cause(error: BaseException) -> str:
    """The first line of an exception's root cause, and its last line where that says more."""
    cause = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    lines = [(str(one).strip() or type(one).__name__).splitlines()[0] for one in (error, cause)]
    return ": ".join(dict.fromkeys(lines))

"""Files as a stage writes them: whole or not at all, and the same bytes for the same content."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dualign.core.errors import DualignError
from dualign.core.schema import to_table


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, on failure it is removed.

    Works for a file and for a folder (created by the body). Raises DualignError where the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    except PermissionError as error:
        raise DualignError(
            f"{path}: cannot be written ({error.strerror}); check the folder's owner and mode"
        ) from error
    except OSError as error:
        if error.errno is None:
            raise
        raise DualignError(f"{path}: cannot be written ({error.strerror}: {error.filename or path.parent})") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # what cannot be removed was never written
                temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON with sorted keys; NaN and infinity become null, which every reader understands."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON written by a stage. Raises DualignError if it is missing or cut short."""
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DualignError(f"{path}: no such file; run the stage that writes it first (`dvc repro`)") from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise DualignError(f"{path}: no JSON file; name one") from error
    except json.JSONDecodeError as error:
        raise DualignError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
    except RecursionError as error:
        raise DualignError(f"{path}: nested too deep; no stage wrote it, so run the one that does again") from error


def read_optional_json(path: str | Path) -> dict[str, Any]:
    """The JSON object of a file, or {} where there is no such file: its stage did not run, or did not write it."""
    found: dict[str, Any] = read_json(path) if Path(path).is_file() else {}
    return found


def write_parquet(path: str | Path, rows: pd.DataFrame | list[dict[str, Any]], schema: pa.Schema) -> None:
    """Write one of dualign's tables (see `dualign.core.schema`)."""
    table = to_table(rows, schema)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value

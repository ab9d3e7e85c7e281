"""Replies that have been paid for, kept by the content of their call."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dualign.core.errors import DualignError


@dataclass(frozen=True)
class Answered:
    """The text of a reply, and the tokens that were read and written for it."""

    text: str
    read: int
    written: int


class Cache:
    """A SQLite file: a reply is there whole or not at all, and two processes may write at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        with self._faults():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, check_same_thread=False)
            with self._db:
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS replies"
                    " (key TEXT PRIMARY KEY, text TEXT, read INTEGER, written INTEGER)"
                )

    def get(self, key: str) -> Answered | None:
        """The reply to the call of this key, if it is known."""
        with self._lock, self._faults():
            query = "SELECT text, read, written FROM replies WHERE key = ?"
            row = self._db.execute(query, (key,)).fetchone()
        return None if row is None else Answered(*row)

    def put(self, key: str, reply: Answered) -> None:
        """Keep a reply; it is on the disk when this returns. The first one of a key stays."""
        row = (key, reply.text, reply.read, reply.written)
        with self._lock, self._faults(), self._db:
            self._db.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", row)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise DualignError(
                f"{self._path}: replies of judges cannot be kept there ({error}); free space, or"
                " move the file away"
            ) from error

"""Records of one kind on their way to a table: their texts in a file, and in memory the few bytes
of each by which duplicates, votes and splits are decided.

So a million rows take some 40 MiB, however long their texts are."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import numpy as np

from dualign.core import schema
from dualign.data.formats import Usable, Where

Flags = tuple[bool | None, bool | None]
#: The flags of a pair, by the code that stands for them in memory.
FLAGS: list[Flags] = list(itertools.product((None, True, False), (None, True, False)))
_CODES = {flags: code for code, flags in enumerate(FLAGS)}


class Spool:
    """Records in the order of `add`, each with the identities of its prompt and of the whole row.

    `families` holds the identity of the prompt's first user turn alone: dialogues are released at
    several lengths, and a longer one holds the answers of the shorter. `ahead` says which of its
    two answers a pair prefers: rows with one key have the same two. Identities are numbers, whose
    16 hex digits are those of `schema.prompt_id` and `schema.pair_id`."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._ends = array("Q", [0])
        self._prompts = array("Q")
        self._families = array("Q")
        self._keys = array("Q")
        self._ahead = array("b")
        self._flags = array("b")
        self._sources = array("H")
        self.names: list[str] = []

    def add(self, record: Usable) -> None:
        """Keep a record."""
        prompt = schema.prompt_id(record.prompt)
        family = prompt if len(record.prompt) == 1 else schema.family_id(record.prompt)
        source = record.where.source
        if source not in self.names:
            self.names.append(source)
        self._prompts.append(int(prompt, 16))
        self._families.append(int(family, 16))
        self._keys.append(int(_key(record, prompt), 16))
        self._ahead.append(record.rejected is None or record.chosen < record.rejected)
        self._flags.append(_CODES[record.chosen_is_safe, record.rejected_is_safe])
        self._sources.append(self.names.index(source))
        line = json.dumps(astuple(record)).encode()
        self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, row: int) -> Usable:
        """A record, read from the file."""
        start, end = self._ends[row : row + 2]
        self._file.seek(start)
        where, *texts = json.loads(self._file.read(end - start))
        return Usable(Where(*where), *texts)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    @property
    def prompts(self) -> np.ndarray:
        """The identity of every row's prompt."""
        return np.asarray(self._prompts)

    @property
    def families(self) -> np.ndarray:
        """The identity of every prompt's first question."""
        return np.asarray(self._families)

    @property
    def keys(self) -> np.ndarray:
        """The identity of every row."""
        return np.asarray(self._keys)

    @property
    def ahead(self) -> np.ndarray:
        """Whether a row prefers that of its two answers which sorts first."""
        return np.asarray(self._ahead)

    @property
    def flags(self) -> np.ndarray:
        """The codes of every row's flags, places in `FLAGS`."""
        return np.asarray(self._flags)

    @property
    def sources(self) -> np.ndarray:
        """Every row's source, a place in `names`."""
        return np.asarray(self._sources)

    def groups(self) -> Iterator[np.ndarray]:
        """The rows that have one key, for each key, in the order in which keys appear."""
        keys = self.keys
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
        ends = np.append(starts[1:], len(order))
        for group in np.argsort(order[starts]):
            yield order[starts[group] : ends[group]]


def _key(record: Usable, prompt: str) -> str:
    """The identity of a whole row, whichever side it prefers."""
    if record.rejected is None:
        return schema.identity(f"{prompt}\x1e{record.chosen}")
    return schema.pair_id(record.prompt, record.chosen, record.rejected)

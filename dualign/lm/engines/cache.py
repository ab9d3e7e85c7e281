"""Keys and values of the rows of a batch, in tables with a place for each row.

All rows end at the same position of the tables, so a step writes one position for all of them. A
row that begins writes its prompt's keys and values over those of the row that had its place; what
lies before them is not its own, as `mask` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

#: Positions that a table of keys or values gains when it is full.
_ROOM = 64


@dataclass
class Read:
    """A prompt as read: each layer's keys and values [heads, positions, width], the next logits
    [vocabulary]."""

    layers: list[tuple[Tensor, Tensor]]
    logits: Tensor

    @classmethod
    def of(cls, cache: Cache, row: int, length: int, logits: Tensor) -> Read:
        """A row of a batch whose prompts all end at the last position."""
        layers = [
            (layer.keys[row, :, -length:].clone(), layer.values[row, :, -length:].clone())
            for layer in cache.layers
        ]
        return cls(layers, logits)

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.layers[0][0].shape[1]


class _Layer(DynamicLayer):
    """A layer's keys and values [rows, heads, positions, width]: the used part of larger tables."""

    keys: Tensor
    values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append positions to all rows; the first states become the tables."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.hold(key_states, value_states)
            return self.keys, self.values
        used = self.keys.shape[-2]
        ends = used + key_states.shape[-2]
        for table, states in zip(self._tables, (key_states, value_states), strict=True):
            table[:, :, used:ends] = states
        self.keys, self.values = (table[:, :, :ends] for table in self._tables)
        return self.keys, self.values

    def hold(self, *held: Tensor) -> None:
        """Begin tables with these keys and values."""
        used = held[0].shape[-2]
        self._tables = [_with_room(states) for states in held]
        self.keys, self.values = (table[:, :, :used] for table in self._tables)

    @property
    def room(self) -> int:
        """Positions for which the tables have room."""
        return self._tables[0].shape[-2] - self.keys.shape[-2]


def _with_room(states: Tensor) -> Tensor:
    rows, heads, positions, width = states.shape
    table = states.new_empty(rows, heads, positions + _ROOM, width)
    table[:, :, :positions] = states
    return table


class Places:
    """Keys and values of rows under way; `mask` [places, positions] says which are a row's own."""

    def __init__(self, count: int, longest: Read) -> None:
        """Room for so many rows, whose longest prompt is given."""
        self.cache = Cache(layer_class_to_replicate=_Layer)
        for at, (keys, values) in enumerate(longest.layers):
            self.cache.update(*(part.expand(count, -1, -1, -1) for part in (keys, values)), at)
        self.mask = torch.zeros(
            count, longest.length, dtype=torch.long, device=longest.logits.device
        )

    def begin(self, place: int, read: Read) -> None:
        """Give a place to a row that begins; its prompt is no longer than the tables."""
        for layer, (keys, values) in zip(self.cache.layers, read.layers, strict=True):
            layer.keys[place, :, -read.length :] = keys
            layer.values[place, :, -read.length :] = values
        self.mask[place] = 0
        self.mask[place, -read.length :] = 1

    def grow(self, going: list[int]) -> None:
        """One more position for all; `going` are the places whose rows are under way."""
        if not self.cache.layers[0].room:
            self.keep(list(range(len(self.mask))), going)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)

    def keep(self, places: list[int], going: list[int]) -> None:
        """Keep these places alone, without the positions that no row under way has."""
        width = self.mask.shape[1] - int(self.mask[going].any(0).int().argmax())
        for layer in self.cache.layers:
            layer.hold(layer.keys[places, :, -width:], layer.values[places, :, -width:])
        self.mask = self.mask[places, -width:]

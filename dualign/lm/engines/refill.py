"""Our own engine: one batch whose rows leave as their answers end, and whose room new rows take.

`generate` computes every row of a batch until the longest answer of it ends. Here the keys and
values of the rows under way lie in one table, padded on the left; a row that has ended is cut out
of it, and waiting ones join. Equal prompts that join together are read once. Each row draws from
a generator of its own, by inversion of its next token's distribution, so what it draws does not
depend on its batch, but for rounding."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from dualign.core.progress import Progress
from dualign.lm.engines.interface import Answer, Request, left_padded
from dualign.params.base import Resources

#: The batch is cut, and waiting rows join it, once this part of its rows has ended. Each time all
#: keys and values are copied, which takes about as long as a step.
_SHARE = 1 / 8
#: Positions that a table of keys or values gains when it is full.
_ROOM = 64


@dataclass
class _Row:
    """An answer under way: its prompt, a uniform number for each token, and what is drawn."""

    prompt: tuple[int, ...]
    uniforms: np.ndarray
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    ended: bool = False


class _Layer(DynamicLayer):
    """Keys and values of one layer, [rows, heads, positions, width], in tables with room for more
    positions, so that a step copies none of them.
    """

    keys: Tensor
    values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        used = self.get_seq_length()
        ends = used + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._tables = [_table(key_states, ends), _table(value_states, ends)]
        elif ends > self._tables[0].shape[-2]:
            held = (self.keys, self.values)
            self._tables = [_table(states, ends) for states in held]
            for table, states in zip(self._tables, held, strict=True):
                table[:, :, :used] = states
        for table, states in zip(self._tables, (key_states, value_states), strict=True):
            table[:, :, used:ends] = states
        self.keys, self.values = (table[:, :, :ends] for table in self._tables)
        return self.keys, self.values


def _table(like: Tensor, positions: int) -> Tensor:
    rows, heads, _, width = like.shape
    return like.new_empty(rows, heads, positions + _ROOM, width)


@dataclass
class _Kept:
    """What is kept of rows: keys, values, and each row's own positions, [rows, positions]."""

    cache: Cache
    mask: Tensor


@torch.inference_mode()
def answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    resources: Resources,
) -> list[Answer]:
    """An answer to each row of the request, with its tokens' log-probabilities."""
    model.eval()
    seeded = zip(request.prompts, request.seeds, strict=True)
    rows = [_row(prompt, seed, request.max_new_tokens) for prompt, seed in seeded]
    waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
    batch = _Batch(model, request, tokenizer.pad_token_id)
    with Progress("sampling", len(rows)) as progress:
        while waiting or batch.live:
            joining = min(request.batch_size - batch.live, len(waiting))
            if batch.is_due(joining):
                batch.renew([waiting.popleft() for _ in range(joining)])
            else:
                batch.step()
            if left := batch.left():
                progress.advance(len(left), sum(left))
    return [Answer(row.tokens, row.log_probabilities) for row in rows]


def _row(prompt: Sequence[int], seed: int, longest: int) -> _Row:
    generator = np.random.Generator(np.random.Philox(seed))
    return _Row(tuple(prompt), generator.random(longest))


class _Batch:
    """The rows under way."""

    def __init__(self, model: Any, request: Request, pad: int) -> None:
        self._model = model
        self._request = request
        self._pad = pad
        self._device = next(model.parameters()).device
        known = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._rows: list[_Row] = []
        self._kept: _Kept | None = None
        self._ended: list[int] = []

    @property
    def live(self) -> int:
        """Rows that have not ended."""
        return sum(not row.ended for row in self._rows)

    def is_due(self, joining: int) -> bool:
        """Whether to `renew` the batch, for which so many rows wait and find room."""
        gone = len(self._rows) - self.live
        full = joining >= max(1, int(_SHARE * self._request.batch_size))
        return self.live == 0 or full or gone >= max(1, int(_SHARE * len(self._rows)))

    def left(self) -> list[int]:
        """Tokens of each row that has ended since this was asked."""
        ended = self._ended
        self._ended = []
        return ended

    def step(self) -> None:
        """One more token for each row."""
        assert self._kept is not None
        ids = torch.tensor([[row.tokens[-1]] for row in self._rows])
        self._kept.mask = torch.nn.functional.pad(self._kept.mask, (0, 1), value=1)
        self._draw(self._logits(ids, self._kept), self._rows)

    def renew(self, joining: list[_Row]) -> None:
        """Cut out the rows that have ended, and take in others, which draw their first token."""
        parts = [] if self._kept is None else [(self._kept, _going(self._rows))]
        if joining:
            parts.append(self._read(joining))
        self._rows = [row for row in [*self._rows, *joining] if not row.ended]
        self._kept = _joined([part for part in parts if part[1]])

    def _read(self, joining: list[_Row]) -> tuple[_Kept, list[int]]:
        """What is kept of the rows' prompts, each read once, and where each row has its own."""
        prompts = list(dict.fromkeys(row.prompt for row in joining))
        ids, mask = left_padded(prompts, self._pad)
        kept = _Kept(Cache(layer_class_to_replicate=_Layer), mask.to(self._device))
        logits = self._logits(ids, kept)
        place = {prompt: at for at, prompt in enumerate(prompts)}
        self._draw(logits[[place[row.prompt] for row in joining]], joining)
        return kept, [place[row.prompt] for row in joining if not row.ended]

    def _logits(self, ids: Tensor, kept: _Kept) -> Tensor:
        """Logits of each row's next token, [rows, vocabulary], fp32."""
        positions = (kept.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids.to(self._device),
            attention_mask=kept.mask,
            position_ids=positions,
            past_key_values=kept.cache,
            use_cache=True,
            **self._options,
        )
        return output.logits[:, -1].float()

    def _draw(self, logits: Tensor, rows: list[_Row]) -> None:
        """Give each row its next token; those that have ended get none."""
        log_probabilities = torch.log_softmax(logits, -1)
        uniforms = [row.uniforms[min(len(row.tokens), len(row.uniforms) - 1)] for row in rows]
        drawn = inverted(log_probabilities, torch.tensor(uniforms, device=self._device))
        found = log_probabilities.gather(1, drawn.unsqueeze(1)).squeeze(1)
        for row, token, value in zip(rows, drawn.tolist(), found.tolist(), strict=True):
            if not row.ended:
                row.tokens.append(token)
                row.log_probabilities.append(value)
                full = len(row.tokens) == self._request.max_new_tokens
                row.ended = full or token in self._request.ends
                self._ended += [len(row.tokens)] if row.ended else []


def inverted(log_probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token of each row at which its distribution function passes a uniform number.

    log_probabilities [rows, vocabulary], uniforms [rows] in [0, 1), fp64; [rows].

    >>> half = torch.tensor([[0.5, 0.0, 0.5]]).log()
    >>> [int(inverted(half, torch.tensor([u]).double())) for u in (0.0, 0.49, 0.51, 0.99)]
    [0, 0, 2, 2]
    """
    function = log_probabilities.double().exp().cumsum(1)
    wanted = uniforms.unsqueeze(1) * function[:, -1:]
    drawn = torch.searchsorted(function, wanted, right=True).squeeze(1)
    return drawn.clamp(max=function.shape[1] - 1)


def _going(rows: list[_Row]) -> list[int]:
    return [at for at, row in enumerate(rows) if not row.ended]


def _joined(parts: list[tuple[_Kept, list[int]]]) -> _Kept | None:
    """The named rows of all parts in one table, without the positions that are no row's."""
    if not parts:
        return None
    masks = [kept.mask[rows] for kept, rows in parts]
    width = max(int(mask.shape[1] - mask.any(0).int().argmax()) for mask in masks)
    cache = Cache(layer_class_to_replicate=_Layer)
    for at in range(len(parts[0][0].cache.layers)):
        layers = [(kept.cache.layers[at], rows) for kept, rows in parts]
        keys = torch.cat([_aligned(layer.keys[rows], width, -2) for layer, rows in layers])
        values = torch.cat([_aligned(layer.values[rows], width, -2) for layer, rows in layers])
        cache.update(keys, values, at)
    return _Kept(cache, torch.cat([_aligned(mask, width, -1) for mask in masks]))


def _aligned(table: Tensor, width: int, axis: int) -> Tensor:
    """The last `width` positions of an axis, zeros before them where there are fewer."""
    held = table.shape[axis]
    if held >= width:
        return table.narrow(axis, held - width, width)
    return torch.nn.functional.pad(table, (0, 0) * (-axis - 1) + (width - held, 0))

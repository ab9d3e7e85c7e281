"""Our own engine: one batch whose rows leave as their answers end, and whose places new rows take.

`generate` computes every row of a batch until the longest answer of it ends, reads a prompt anew
for each answer to it, and copies all keys and values at each step. Here a waiting row takes the
place of one that has ended, nothing else moves (`cache`), and equal prompts are read once. Each row
draws from a generator of its own, by inversion of its next token's distribution, so what it draws
does not depend on its batch, but for rounding."""

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
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from dualign.core.errors import ParamsError
from dualign.core.progress import Progress
from dualign.lm.engines.cache import Places, Read
from dualign.lm.engines.interface import Answer, Request, left_padded
from dualign.lm.numerics import without_adapter
from dualign.params.base import Resources

#: Waiting rows join, or places that none takes are cut out, once this part of the rows has ended.
#: To read a prompt takes about as long as a step, and so does a copy of all keys and values.
_SHARE = 1 / 8
#: Tokens of the vocabulary that are one block in the first of the two steps of a draw.
_BLOCK = 256
#: The largest number below 1.
_BELOW_ONE = 1 - 2**-53
#: Layers of a cache with keys and values alone, or with none, which take those of another.
_KEPT = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


@dataclass
class _Row:
    """An answer under way: its prompt, a uniform number for each token, and what is drawn."""

    prompt: tuple[int, ...]
    uniforms: np.ndarray
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)


@torch.inference_mode()
def answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    resources: Resources,
) -> list[Answer]:
    """An answer to each row of the request, with its tokens' log-probabilities.

    Raises ParamsError for a model that keeps other things than keys and values."""
    check_kept(model)
    model.eval()
    seeded = zip(request.prompts, request.seeds, strict=True)
    rows = [_row(prompt, seed, request.max_new_tokens) for prompt, seed in seeded]
    batch = _Batch(_Reader(model, tokenizer.pad_token_id), request, rows)
    with Progress("sampling", len(rows)) as progress:
        while batch.goes_on:
            if ended := batch.advance():
                progress.advance(len(ended), sum(ended))
    return [Answer(row.tokens, row.log_probabilities) for row in rows]


def check_kept(model: Any) -> None:
    """Refuse a model with a state that a place cannot hand on, such as a recurrent layer's. Raises
    ParamsError.
    """
    base = without_adapter(model)
    for layer in DynamicCache(config=base.config).layers:
        if type(layer) not in _KEPT:
            raise ParamsError(
                f"resources.engine refill: {type(base).__name__} keeps more of a text than keys"
                f" and values ({type(layer).__name__}); set resources.engine to generate"
            )


def _row(prompt: Sequence[int], seed: int, longest: int) -> _Row:
    generator = np.random.Generator(np.random.Philox(seed))
    return _Row(tuple(prompt), generator.random(longest))


class _Reader:
    """The model, and prompts that it has read for rows that still wait."""

    def __init__(self, model: Any, pad: int) -> None:
        self._model = model
        self._pad = pad
        self.device = next(model.parameters()).device
        known = inspect.signature(without_adapter(model).forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._past = "cache" if "cache" in known else "past_key_values"
        self._read: dict[tuple[int, ...], Read] = {}

    def __contains__(self, prompt: tuple[int, ...]) -> bool:
        return prompt in self._read

    def logits(self, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Logits of each row's next token, [rows, vocabulary], fp32."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids.to(self.device),
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self._past: cache},
            **self._options,
        )
        return output.logits[:, -1].float()

    def read(self, prompts: Sequence[tuple[int, ...]]) -> list[Read]:
        """Each prompt as it was read, in one pass for all that have not been yet."""
        if new := list(dict.fromkeys(prompt for prompt in prompts if prompt not in self)):
            ids, mask = left_padded(new, self._pad)
            cache = Cache(layer_class_to_replicate=DynamicLayer)
            logits = self.logits(ids, mask.to(self.device), cache)
            for row, prompt in enumerate(new):
                self._read[prompt] = Read.of(cache, row, len(prompt), logits[row])
        return [self._read[prompt] for prompt in prompts]

    def forget(self, but: tuple[int, ...] | None) -> None:
        """Keep no prompt, or this one alone."""
        self._read = {prompt: read for prompt, read in self._read.items() if prompt == but}


class _Batch:
    """The rows under way, each in its place, and those that wait; a free place has None.

    The longest prompts come first, so that the tables are as long as any prompt that joins; equal
    ones follow each other."""

    def __init__(self, reader: _Reader, request: Request, rows: Sequence[_Row]) -> None:
        self._reader = reader
        self._request = request
        self._waiting = deque(sorted(rows, key=lambda row: (-len(row.prompt), row.prompt)))
        self._rows: list[_Row | None] = [None] * min(request.batch_size, len(rows))
        self._places: Places | None = None

    @property
    def goes_on(self) -> bool:
        """Whether a row waits or is under way."""
        return bool(self._waiting or self._going())

    def _going(self) -> dict[int, _Row]:
        return {place: row for place, row in enumerate(self._rows) if row is not None}

    def advance(self) -> list[int]:
        """A token for each row under way, or the first for those that join; the lengths of what has
        ended."""
        free = [place for place, row in enumerate(self._rows) if row is None]
        many = len(free) >= max(1, int(_SHARE * len(self._rows)))
        if self._waiting and free and (many or self._waiting[0].prompt in self._reader):
            return self._join(free[: len(self._waiting)])
        if many:
            self._cut()
        return self._step()

    def _join(self, free: list[int]) -> list[int]:
        """Let waiting rows take places."""
        joining = {place: self._waiting.popleft() for place in free}
        reads = self._reader.read([row.prompt for row in joining.values()])
        self._reader.forget(but=self._waiting[0].prompt if self._waiting else None)
        if self._places is None:
            self._places = Places(len(self._rows), reads[0])
        for (place, row), read in zip(joining.items(), reads, strict=True):
            self._rows[place] = row
            self._places.begin(place, read)
        return self._draw(torch.stack([read.logits for read in reads]), joining)

    def _cut(self) -> None:
        """Cut out the free places."""
        assert self._places is not None
        going = self._going()
        self._places.keep(list(going), list(going))
        self._rows = list(going.values())

    def _step(self) -> list[int]:
        """One more token for each row under way."""
        assert self._places is not None
        going = self._going()
        ids = torch.tensor([[0 if row is None else row.tokens[-1]] for row in self._rows])
        self._places.grow(list(going))
        logits = self._reader.logits(ids, self._places.mask, self._places.cache)
        return self._draw(logits[list(going)], going)

    def _draw(self, logits: Tensor, rows: dict[int, _Row]) -> list[int]:
        """Give each row its next token, and free the places of those that end."""
        uniforms = [row.uniforms[len(row.tokens)] for row in rows.values()]
        tokens, values = drawn(logits, torch.tensor(uniforms, device=logits.device))
        ended = []
        drawings = zip(rows.items(), tokens.tolist(), values.tolist(), strict=True)
        for (place, row), token, value in drawings:
            row.tokens.append(token)
            row.log_probabilities.append(value)
            if token in self._request.ends or len(row.tokens) == self._request.max_new_tokens:
                self._rows[place] = None
                ended.append(len(row.tokens))
        return ended


def drawn(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each row at which its distribution function passes a uniform number, and log pi
    of it in nats.

    logits [rows, vocabulary], uniforms [rows] in [0, 1), fp64; [rows] each. A block of tokens is
    drawn first, then one of its tokens by what is left of the uniform number, so that sums in fp64
    are of few numbers.

    >>> half = torch.tensor([[0.5, 0.0, 0.5]]).log()
    >>> [int(drawn(half, torch.tensor([u]).double())[0]) for u in (0.0, 0.49, 0.51, 0.99)]
    [0, 0, 2, 2]
    """
    largest = logits.amax(1, keepdim=True)
    weights = (logits - largest).exp()
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[1] % _BLOCK))
    blocks = blocks.unflatten(1, (-1, _BLOCK))
    sums = blocks.sum(2, dtype=torch.float64)
    block, left = _passed(sums, uniforms)
    own = blocks[torch.arange(len(blocks), device=blocks.device), block]
    token, _ = _passed(own, left)
    tokens = block * _BLOCK + token
    shifted = logits.gather(1, tokens.unsqueeze(1)) - largest
    return tokens, shifted.squeeze(1).double() - sums.sum(1).log()


def _passed(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Where the distribution function of weights [rows, n] passes a uniform number [rows], and what
    is left of that, uniform again in [0, 1), for a draw within."""
    function = weights.double().cumsum(1)
    wanted = uniforms.unsqueeze(1) * function[:, -1:]
    place = torch.searchsorted(function, wanted, right=True).clamp(max=function.shape[1] - 1)
    weight = weights.double().gather(1, place)
    left = 1 - (function.gather(1, place) - wanted) / weight
    return place.squeeze(1), left.clamp(0, _BELOW_ONE).squeeze(1)

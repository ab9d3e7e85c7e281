"""What every sampling engine takes and gives.

An engine draws from the policy itself: temperature 1, no truncation of its tail, no penalty. Only
`generate` takes another `Decoding`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dualign.lm.batches import padded
from dualign.params.base import DecodingParams, Resources


class Decoding(NamedTuple):
    """How answers are drawn (`DecodingParams`), by default from the policy itself."""

    temperature: float = 1.0
    top_p: float = 1.0

    @classmethod
    def of(cls, params: DecodingParams) -> Decoding:
        """That of a row of params."""
        return cls(params.temperature, params.top_p)


#: What every estimate but a certificate's and a suite's rests on.
PLAIN = Decoding()


@dataclass(frozen=True)
class Request:
    """Answers that are wanted, one for each row.

    `prompts` are token ids. `seeds` say what each row draws, whatever its batch, and `seed` what
    all draw together, for an engine that has one generator. An answer stops with the first token
    of `ends`, or at `max_new_tokens`, which the param `key` says. At most `batch_size` rows are
    under way at a time."""

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    seed: int
    ends: Sequence[int]
    max_new_tokens: int
    batch_size: int
    decoding: Decoding = PLAIN
    key: str = "generation.max_new_tokens"

    def of(self, rows: Sequence[int], seed: int) -> Request:
        """The same for some rows alone, with another seed for all."""
        return replace(
            self,
            prompts=[self.prompts[row] for row in rows],
            seeds=[self.seeds[row] for row in rows],
            seed=seed,
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max((len(prompt) for prompt in self.prompts), default=0)


@dataclass(frozen=True)
class Answer:
    """Drawn token ids, with a drawn end, and log pi of each in nats where the engine has it."""

    tokens: list[int]
    log_probabilities: list[float] | None = None


#: Draws an answer to each row of a request, in order.
Engine = Callable[[torch.nn.Module, PreTrainedTokenizerBase, Request, Resources], list[Answer]]


def seed_for(seed: int, prompts: Sequence[Sequence[int]]) -> int:
    """The seed of draws to these prompts, 32 bits; of others it is another one.

    Random numbers that two sets of prompts had in common would make their means err together: a
    policy that a search picks since its draws came out well would do well in the certificate too.

    >>> seed_for(0, [[5, 6]]) == seed_for(0, [[5, 6]]) != seed_for(0, [[5], [6]])
    True
    """
    told = hashlib.sha256()
    for prompt in prompts:
        told.update(np.array([len(prompt), *prompt], np.int64).tobytes())
    words = np.random.SeedSequence([seed, int.from_bytes(told.digest())]).generate_state(1)
    return int(words[0])


def row_seed(seed: int, prompt: int, draw: int) -> int:
    """What a row draws from, by its prompt's position and its draw; below 2**63.

    >>> row_seed(0, 3, 1) == row_seed(0, 3, 1) != row_seed(0, 1, 3)
    True
    """
    words = np.random.SeedSequence([seed, prompt, draw]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def batch_seed(seed: int, number: int) -> int:
    """A batch's seed: the draw's for the first, else mixed; 32 bits, all that a CPU reads."""
    return seed if number == 0 else int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [rows, positions] of prompts that all end at the last position."""
    return padded(prompts, pad, left=True)


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Tokens up to and with the first that ends an answer.

    >>> until_end([5, 6, 2, 0], [2])
    [5, 6, 2]
    """
    last = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: last + 1])

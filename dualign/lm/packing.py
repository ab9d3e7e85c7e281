"""Log-probabilities of answers without padding, each prompt read once for all its answers.

One row of tokens holds the prompts, each followed by the answers to it. Positions of every answer
go on from its prompt's, and it attends to that prompt and to itself. Models whose attention can be
replaced (transformers' attention interface) compute the same numbers in fewer tokens. In bf16 on a
GPU all answers of a row are one call of flash attention, of sequences that each have a length of
their own; elsewhere each answer is a call of sdpa's."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dualign.lm.numerics import (
    answer_log_probabilities,
    hidden_states,
    log_softmax_at,
    padded_rows,
    without_adapter,
)
from dualign.lm.tokens import told

log = logging.getLogger(__name__)

#: Name of the attention in transformers: sdpa's, and for packed rows that of this module.
PACKED = "dualign_packed"
#: Largest difference between packed rows and padded ones of the same answers, as a share of their
#: log-probabilities.
_SAME = {torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-9}
#: Least width of hidden states at which answers are packed on a CPU. It pays below, too (1.4 times
#: at 48), but the small models of the shipped world keep their bytes.
WIDTH = 128
#: Configuration keys of how far a token sees: of a window, and of a chunk (Llama 4).
_REACH = ("sliding_window", "attention_chunk_size")
#: A mask of four dimensions, which models hand to their attention as it is.
_GIVEN = (1, 1, 1, 1)


#: CUDA's first version of GPUs with bf16 and flash attention, and the widest heads of the latter.
_AMPERE = (8, 0)
_HEAD = 256
#: Whether this torch knows of keys that several queries share: 2.12 and later.
_GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters


class Sequences(NamedTuple):
    """The calls of a packed row as one: where the queries of each begin and end, int32 [calls + 1],
    which tokens are their keys, [all keys], where those of each begin and end, and the most of
    both. The last query of a call sees all its keys, each one before it a key less."""

    queries: Tensor
    tokens: Tensor
    keys: Tensor
    longest: tuple[int, int]


@dataclass
class Packs:
    """Where prompts and answers lie in a packed row: lengths of every prompt and of its answers."""

    device: torch.device
    lengths: list[list[int]] = field(default_factory=list)

    def add(self, prompt: int, answers: Sequence[int]) -> None:
        self.lengths.append([prompt, *answers])

    @cached_property
    def masks(self) -> list[list[Tensor]]:
        """Of every prompt the masks of answers after its first, [1, 1, answer, prompt + answer]."""
        made = []
        for prompt, _, *others in self.lengths:
            made.append([_continued(prompt, length, self.device) for length in others])
        return made

    @cached_property
    def sequences(self) -> Sequences:
        """The prompt with its first answer, then each other answer behind that prompt."""
        queries: list[int] = []
        tokens: list[list[int]] = []
        start = 0
        for prompt, first, *others in self.lengths:
            asked = list(range(start, start + prompt))
            start += prompt + first
            queries.append(prompt + first)
            tokens.append(list(range(asked[0], start)))
            for length in filter(None, others):
                queries.append(length)
                tokens.append([*asked, *range(start, start + length)])
                start += length
        sizes = [len(row) for row in tokens]
        return Sequences(
            self._ends(queries),
            torch.tensor(list(chain(*tokens)), device=self.device),
            self._ends(sizes),
            (max(queries), max(sizes)),
        )

    def _ends(self, sizes: Sequence[int]) -> Tensor:
        return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=self.device)


def _continued(prompt: int, answer: int, device: torch.device) -> Tensor:
    """What an answer attends to of its prompt and of itself."""
    ones = torch.ones(answer, prompt + answer, dtype=torch.bool, device=device)
    return ones.tril(prompt)[None, None]


@dataclass
class _Row:
    """A packed row: ids and positions; for every token that is scored the place that predicts it
    (`sources`), itself (`targets`) and its answer (`owners`)."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)

    def put(self, ids: Sequence[int], first: int) -> int:
        """Add ids whose positions begin with `first`; returns where they begin in the row."""
        start = len(self.ids)
        self.ids += ids
        self.positions += range(first, first + len(ids))
        return start

    def answer(self, ids: Sequence[int], prompt: int, end: int, owner: int) -> None:
        """Add an answer to `prompt` tokens that end at `end`, without its own last token."""
        start = self.put(ids[:-1], prompt)
        self.sources += [end, *range(start, start + len(ids) - 1)][: len(ids)]
        self.targets += ids
        self.owners += [owner] * len(ids)


def packed_log_probabilities(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Tensor:
    """Sum of log pi(token | what stands before) over each answer's tokens, in fp32; shape [rows].

    `prompts` and `answers` are ids [rows]; equal prompts are read once. Nothing predicts the first
    token of an answer without a prompt, so that one is not counted. `enable_packing` must have been
    true of the model. The same values as of `answer_log_probabilities`, to rounding."""
    device = next(model.parameters()).device
    pairs = [_begun(*pair) for pair in zip(prompts, answers, strict=True)]
    answers = [answer for _, answer in pairs]
    row = _Row()
    packs = Packs(device)
    for prompt, owners in _by_prompt([prompt for prompt, _ in pairs]).items():
        start = row.put(prompt, 0)
        for owner in owners:
            row.answer(answers[owner], len(prompt), start + len(prompt) - 1, owner)
        packs.add(len(prompt), [max(0, len(answers[owner]) - 1) for owner in owners])
    hidden = hidden_states(
        model,
        torch.tensor([row.ids], device=device),
        torch.ones(_GIVEN, dtype=torch.bool, device=device),
        position_ids=torch.tensor([row.positions], device=device),
        packs=packs,
    )
    states = hidden[0].index_select(0, torch.tensor(row.sources, device=device))
    logp = log_softmax_at(model, states, torch.tensor(row.targets, device=device))
    sums = torch.zeros(len(answers), device=device, dtype=logp.dtype)
    return sums.index_add(0, torch.tensor(row.owners, device=device), logp)


def _begun(prompt: Sequence[int], answer: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Prompt and answer; of an empty prompt the answer's first token takes the place."""
    return (prompt, answer) if prompt else (answer[:1], answer[1:])


def _by_prompt(prompts: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """The rows of each prompt, in the order of its first."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).append(row)
    return rows


# --- attention ------------------------------------------------------------------------------------


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packs: Packs | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa's attention; of a packed row that of each prompt with its answers. query, key and value
    are [1, heads, tokens, width], the result is [1, tokens, heads, width]."""
    if packs is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs.pop("is_causal", None)
    if flashes(value) and not kwargs.get("dropout"):
        return _flash(query, key, value, packs.sequences, kwargs.get("scaling")), None
    sizes = [length for lengths in packs.lengths for length in lengths]
    parts = zip(*(states.split(sizes, 2) for states in (query, key, value)), strict=True)
    found = []
    for masks in packs.masks:
        prompt = next(parts)
        calls = _calls(prompt, [next(parts) for _ in range(len(masks) + 1)], masks)
        for states, mask in calls:
            causal = mask is None
            made, _ = sdpa_attention_forward(module, *states, mask, is_causal=causal, **kwargs)
            found.append(made)
    return torch.cat(found, 1), None


def flashes(value: Tensor) -> bool:
    """Whether flash attention takes values [..., width] of this kind, where they are."""
    if value.device.type != "cuda" or value.dtype is not torch.bfloat16 or not torch.version.cuda:
        return False
    width = value.shape[-1]
    capable = torch.cuda.get_device_capability(value.device) >= _AMPERE
    return _GROUPED and capable and width % 8 == 0 and width <= _HEAD


def _flash(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scaling: float | None
) -> Tensor:
    """Attention of a packed row in one call; shapes are those of `attention`."""
    # Norms of queries and keys hand them on in fp32, which autocast rounds for sdpa alone.
    asked, known, held = (
        states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value)
    )
    made = varlen_attn(
        asked.contiguous(),
        known.index_select(0, sequences.tokens),
        held.index_select(0, sequences.tokens),
        sequences.queries,
        sequences.keys,
        *sequences.longest,
        scale=scaling,
        window_size=(-1, 0),  # causal, by the ends of queries and keys
        enable_gqa=True,
    )
    assert isinstance(made, Tensor)
    return made[None]


def _calls(
    prompt: tuple[Tensor, ...], answers: Sequence[tuple[Tensor, ...]], masks: Sequence[Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
    """Query, key, value and mask: of the prompt with its first answer, then of each other one."""
    first, *others = answers
    yield _joined(prompt, first), None
    for answer, mask in zip(others, masks, strict=True):
        if mask.numel():
            _, key, value = _joined(prompt, answer)
            yield (answer[0], key, value), mask


def _joined(prompt: tuple[Tensor, ...], answer: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(pair, 2) for pair in zip(prompt, answer, strict=True))


def enable_packing(model: Any) -> bool:
    """Prepare a model for `packed_log_probabilities`; False, and nothing done, where it cannot.

    It can where its attention is transformers' sdpa, takes other interfaces, has no window or
    chunks, and a packed row gives the numbers of padded ones, which two short answers tell."""
    base = without_adapter(model)
    config = base.config.get_text_config()
    if config._attn_implementation == PACKED:
        return True
    if config._attn_implementation != "sdpa" or not base._supports_attention_backend:
        return False
    if any(getattr(config, key, None) is not None for key in _REACH):
        return False
    AttentionInterface.register(PACKED, attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    base.set_attn_implementation(PACKED)
    try:
        able = _agrees(model)
    except RuntimeError as error:  # a kernel that this device or this width lacks
        log.warning("answers are read with padding: a packed row failed (%s)", told(error))
        able = False
    if not able:
        base.set_attn_implementation("sdpa")
    return able


def wide(model: Any) -> bool:
    """Whether a model is so wide that its answers are packed without being asked for."""
    return int(getattr(model.config.get_text_config(), "hidden_size", 0)) >= WIDTH


def packs(model: Any) -> bool:
    """Whether answers are packed unasked, by a wide model that can; it is prepared. On a GPU flash
    attention must take them: else every answer is a call of its own."""
    if not wide(model):
        return False
    if next(model.parameters()).device.type != "cpu" and not _takes_flash(model):
        return False
    return enable_packing(model)


def _takes_flash(model: Any) -> bool:
    """Whether the values of a model's attention are such as flash attention takes."""
    config = model.config.get_text_config()
    each = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    device = next(model.parameters()).device
    return flashes(torch.empty(0, each, dtype=_precision(model), device=device))


@torch.no_grad()
def _precision(model: Any) -> torch.dtype:
    """What states are held in between layers; a norm may hand them on in fp32."""
    words = without_adapter(model).get_input_embeddings()
    states: Tensor = words(torch.zeros((1, 1), dtype=torch.long, device=words.weight.device))
    return states.dtype


@contextmanager
def attention_kept(model: Any) -> Iterator[None]:
    """What prepares the model for packed rows inside is undone at the end."""
    base = without_adapter(model)
    before = base.config._attn_implementation
    try:
        yield
    finally:
        if base.config._attn_implementation != before:
            base.set_attn_implementation(before)


@torch.no_grad()
def _agrees(model: Any) -> bool:
    """Whether three answers to two prompts have the same log-probabilities packed and padded."""
    prompts = [[1, 2, 3], [1, 2, 3], [2, 1]]
    answers = [[3, 1], [2, 3, 1, 1], [3, 3, 2]]
    training = model.training
    model.eval()
    try:
        packed = packed_log_probabilities(model, prompts, answers)
        ids, mask, labels = (part.to(packed.device) for part in padded_rows(prompts, answers, 0))
        padded = answer_log_probabilities(model, ids, mask, labels)
    finally:
        model.train(training)
    return bool(((packed - padded).abs() <= _SAME[_precision(model)] * padded.abs()).all())

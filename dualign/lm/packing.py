"""Log-probabilities of answers without padding, each prompt read once for all its answers.

One row of tokens holds the prompts, each followed by the answers to it. Positions of every answer
go on from its prompt's, and it attends to that prompt and to itself. Models whose attention can be
replaced (transformers' attention interface) compute the same numbers in fewer tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
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

#: Name of the attention in transformers: sdpa's, and for packed rows that of this module.
PACKED = "dualign_packed"
#: Largest difference between packed rows and padded ones of the same answers, as a share of their
#: log-probabilities.
_SAME = {torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-9}
#: Least width of hidden states at which answers are packed on a CPU. It pays below, too (1.4 times
#: at 48), but the small models of the shipped world keep their bytes.
WIDTH = 128
#: A mask of four dimensions, which models hand to their attention as it is.
_GIVEN = (1, 1, 1, 1)


@dataclass
class Packs:
    """Where prompts and answers lie in a packed row: lengths of every prompt and of its answers,
    and masks of the answers after the first, [1, 1, answer, prompt + answer].
    """

    lengths: list[list[int]] = field(default_factory=list)
    masks: list[list[Tensor]] = field(default_factory=list)

    def add(self, prompt: int, answers: Sequence[int], device: torch.device) -> None:
        self.lengths.append([prompt, *answers])
        self.masks.append([_continued(prompt, length, device) for length in answers[1:]])


def _continued(prompt: int, answer: int, device: torch.device) -> Tensor:
    """What an answer attends to of its prompt and of itself."""
    ones = torch.ones(answer, prompt + answer, dtype=torch.bool, device=device)
    return ones.tril(prompt)[None, None]


@dataclass
class _Row:
    """A packed row: ids and positions; for every token that is scored the place that predicts it
    (`sources`), itself (`targets`) and its answer (`owners`).
    """

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
    packs = Packs()
    for prompt, owners in _by_prompt([prompt for prompt, _ in pairs]).items():
        start = row.put(prompt, 0)
        for owner in owners:
            row.answer(answers[owner], len(prompt), start + len(prompt) - 1, owner)
        packs.add(len(prompt), [max(0, len(answers[owner]) - 1) for owner in owners], device)
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


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packs: Packs | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa's attention; of a packed row that of each prompt with its answers. query, key and value
    are [1, heads, tokens, width], the result is [1, tokens, heads, width].
    """
    if packs is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs.pop("is_causal", None)
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

    It can where its attention is transformers' sdpa, takes other interfaces, has no window, and a
    packed row gives the numbers of padded ones, which two short answers tell."""
    base = without_adapter(model)
    config = base.config.get_text_config()
    if config._attn_implementation == PACKED:
        return True
    if config._attn_implementation != "sdpa" or not base._supports_attention_backend:
        return False
    if getattr(config, "sliding_window", None) is not None:
        return False
    AttentionInterface.register(PACKED, _attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    base.set_attn_implementation(PACKED)
    if _agrees(model):
        return True
    base.set_attn_implementation("sdpa")
    return False


def wide(model: Any) -> bool:
    """Whether a model is so wide that on a CPU its answers are packed without being asked for."""
    return int(getattr(model.config.get_text_config(), "hidden_size", 0)) >= WIDTH


def packs(model: Any) -> bool:
    """Whether answers are packed unasked: on a CPU, by a wide model that can; it is prepared."""
    return next(model.parameters()).device.type == "cpu" and wide(model) and enable_packing(model)


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
    packed = packed_log_probabilities(model, prompts, answers)
    ids, mask, labels = (part.to(packed.device) for part in padded_rows(prompts, answers, 0))
    padded = answer_log_probabilities(model, ids, mask, labels)
    precision = hidden_states(model, ids, mask).dtype
    model.train(training)
    return bool(((packed - padded).abs() <= _SAME[precision] * padded.abs()).all())

"""Samples of a policy at temperature 1, and exact log-probabilities of given answers."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dualign.core.progress import Progress
from dualign.lm.loading import check_context, context_of
from dualign.lm.mixture import Mixture, Policy, mixture_log_probability
from dualign.lm.models import end_tokens
from dualign.lm.numerics import answer_log_probabilities
from dualign.lm.packing import attention_kept, packed_log_probabilities, packs
from dualign.lm.tokens import decode_answers

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One drawn answer: its prompt's position, its ids (EOS included if drawn), its text, and
    whether EOS was drawn.
    """

    prompt: int
    tokens: list[int]
    text: str
    ended: bool


@torch.inference_mode()
def sample(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[Sample]:
    """`count` answers to each prompt (token ids), drawn from the policy itself: T = 1, no
    truncation of its tail.

    The same seed, batch size and device give the same answers. Returned in order of prompt, then
    draw."""
    if isinstance(model, Mixture):
        return _sample_mixture(model, tokenizer, prompts, count, max_new_tokens, batch_size, seed)
    model.eval()
    torch.manual_seed(seed)
    ends = end_tokens(model, tokenizer)
    longest = max((len(prompt) for prompt in prompts), default=0)
    check_context(
        model,
        longest + max_new_tokens,
        f"a prompt of {longest} tokens and generation.max_new_tokens",
    )
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = [(index, draw) for index in range(len(prompts)) for draw in range(count)]
    drawn: dict[tuple[int, int], list[int]] = {}
    with Progress("sampling", len(rows)) as progress, _configured(model, config):
        for batch in _by_length(rows, [len(prompts[index]) for index, _ in rows], batch_size):
            answers = _generate(model, tokenizer, [prompts[index] for index, _ in batch], config)
            drawn.update(zip(batch, answers, strict=True))
            progress.advance(len(batch))
    ids = [drawn[row] for row in rows]
    texts = decode_answers(tokenizer, ids)
    return [
        Sample(index, tokens, text, bool(tokens) and tokens[-1] in ends)
        for (index, _), tokens, text in zip(rows, ids, texts, strict=True)
    ]


@torch.inference_mode()
def log_probabilities(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int,
) -> Tensor:
    """log pi(answer | prompt) in nats, summed over the answer's tokens; fp64 tensor of shape
    [rows].

    NaN for a row that is longer than the model's context, which no training takes either.
    """
    if isinstance(model, Mixture):
        parts = [
            log_probabilities(
                model.component(k), tokenizer, prompts, answers, batch_size=batch_size
            )
            for k in range(len(model.weights))
        ]
        return mixture_log_probability(torch.stack(parts), model.weights)
    model.eval()
    result = torch.full((len(prompts),), math.nan, dtype=torch.float64)
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    context = context_of(model) or max(lengths, default=0)
    rows = [row for row, length in enumerate(lengths) if length <= context]
    if len(rows) < len(lengths):
        log.warning(
            "%d of %d answers are longer than the context of %d tokens with their prompt and get no"
            " "
            "log-probability",
            len(lengths) - len(rows),
            len(lengths),
            context,
        )
    with attention_kept(model), Progress("log-probabilities", len(rows)) as progress:
        packed = packs(model)
        if packed:
            lengths = _of_prompts(prompts, lengths)
        for batch in _by_length(rows, [lengths[row] for row in rows], batch_size):
            given = [prompts[i] for i in batch], [answers[i] for i in batch]
            if packed:
                result[batch] = packed_log_probabilities(model, *given).double().cpu()
            else:
                result[batch] = _score(model, tokenizer, *given)
            progress.advance(len(batch))
    return result


def _sample_mixture(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    count: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[Sample]:
    """Each answer from the component that is drawn for it; every component draws from a seed of its
    own.
    """
    chosen = mixture.draw(len(prompts) * count, seed)
    drawn: dict[int, Sample] = {}
    for k in sorted(set(chosen)):
        rows = [row for row, component in enumerate(chosen) if component == k]
        answers = sample(
            mixture.component(k), tokenizer, [prompts[row // count] for row in rows],
            count=1, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed + 1 + k,
        )  # fmt: skip
        drawn |= {
            row: replace(answer, prompt=row // count)
            for row, answer in zip(rows, answers, strict=True)
        }
    return [drawn[row] for row in range(len(chosen))]


@contextlib.contextmanager
def _configured(model: torch.nn.Module, config: GenerationConfig) -> Iterator[None]:
    """The model under `config` alone: generate() takes what is left open, such as Qwen's penalties,
    from its own.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = base.generation_config
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = own


def _generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Sequence[int]],
    config: GenerationConfig,
) -> list[list[int]]:
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
    )  # type: ignore[operator]
    return [_until_end(row, set(config.eos_token_id)) for row in output[:, width:].tolist()]


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Tokens up to and with the first that ends an answer."""
    last = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


def _score(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Sequence[int]],
    answers: list[Sequence[int]],
) -> Tensor:
    device = next(model.parameters()).device
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros_like(ids)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, len(prompt) : len(row)] = ids[i, len(prompt) : len(row)]
    return (
        answer_log_probabilities(model, ids.to(device), mask.to(device), labels.to(device))
        .double()
        .cpu()
    )


def _of_prompts(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """For every row the longest of those with its prompt, so that sorted rows of a prompt lie side
    by side.
    """
    longest: dict[tuple[int, ...], int] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        longest[tuple(prompt)] = max(length, longest.get(tuple(prompt), 0))
    return [longest[tuple(prompt)] for prompt in prompts]


def _by_length(rows: list[T], lengths: Sequence[int], batch_size: int) -> Iterator[list[T]]:
    """Batches of rows of similar length, the longest first, so that a batch too large for memory
    fails at once.
    """
    order = sorted(range(len(rows)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield [rows[i] for i in order[start : start + batch_size]]

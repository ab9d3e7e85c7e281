"""Samples of a policy at temperature 1, answers decoded otherwise for an evaluation, and exact
log-probabilities of given answers."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dualign.core import ranks
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


@dataclass(frozen=True)
class Decoding:
    """How answers are made: of at most so many tokens, which are drawn at a temperature; at 0 the
    likeliest is taken each time. `key` is the param that says how many."""

    max_new_tokens: int
    temperature: float = 1.0
    key: str = "generation.max_new_tokens"

    def config(self, ends: list[int], pad: int | None) -> GenerationConfig:
        """The same for transformers, with the ids that end an answer and the one that pads it."""
        shared: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "eos_token_id": ends,
            "pad_token_id": pad,
        }
        if self.temperature == 0:
            return GenerationConfig(do_sample=False, **shared)
        drawn = {"temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(do_sample=True, **drawn, **shared)


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

    The same seed, batch size and device give the same answers, in however many processes: each
    batch has a seed of its own, and is drawn by one of them. Returned in order of prompt, then
    draw."""
    return generate(
        model, tokenizer, prompts, Decoding(max_new_tokens),
        count=count, batch_size=batch_size, seed=seed,
    )  # fmt: skip


@torch.inference_mode()
def generate(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    count: int,
    batch_size: int,
    seed: int,
) -> list[Sample]:
    """`count` answers to each prompt (token ids), as `decoding` says; for evaluations alone.

    Whatever is not drawn at temperature 1 has another law than the policy, so no estimate of a cost
    that a dual or a certificate rests on may be made of it. A mixture draws a component for each
    answer, at temperature 0 too. Seeds and order as for `sample`."""
    if isinstance(model, Mixture):
        return _of_mixture(model, tokenizer, prompts, decoding, count, batch_size, seed)
    model.eval()
    ends = end_tokens(model, tokenizer)
    longest = max((len(prompt) for prompt in prompts), default=0)
    check_context(
        model,
        longest + decoding.max_new_tokens,
        f"a prompt of {longest} tokens and {decoding.key}",
    )
    config = decoding.config(ends, tokenizer.pad_token_id)
    rows = [(index, draw) for index in range(len(prompts)) for draw in range(count)]
    batches = _by_length(rows, [len(prompts[index]) for index, _ in rows], batch_size)
    found: list[tuple[tuple[int, int], list[int]]] = []
    with Progress("sampling", len(rows)) as progress, _configured(model, config):
        for number, batch in ranks.share(list(enumerate(batches))):
            torch.manual_seed(_batch_seed(seed, number))
            answers = _generate(model, tokenizer, [prompts[index] for index, _ in batch], config)
            found.extend(zip(batch, answers, strict=True))
            progress.advance(len(batch))
        drawn = dict(ranks.gathered(found))
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
    found = []
    with attention_kept(model), Progress("log-probabilities", len(rows)) as progress:
        packed = packs(model)
        if packed:
            lengths = _of_prompts(prompts, lengths)
        batches = list(_by_length(rows, [lengths[row] for row in rows], batch_size))
        for batch in ranks.share(batches):
            own = [prompts[i] for i in batch], [answers[i] for i in batch]
            if packed:
                logps = packed_log_probabilities(model, *own).double().cpu()
            else:
                logps = _score(model, tokenizer, *own)
            found.append((batch, logps))
            progress.advance(len(batch))
        for batch, logps in ranks.gathered(found):
            result[batch] = logps
    return result


def _of_mixture(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    count: int,
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
        answers = generate(
            mixture.component(k), tokenizer, [prompts[row // count] for row in rows], decoding,
            count=1, batch_size=batch_size, seed=seed + 1 + k,
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


def _batch_seed(seed: int, number: int) -> int:
    """The seed of a batch: that of the draw for the first, others mixed from both. 32 bits, since a
    CPU's generator reads no more.
    """
    return seed if number == 0 else int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


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

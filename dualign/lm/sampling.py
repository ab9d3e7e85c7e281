"""Samples of a policy, answers decoded otherwise, and exact log-probabilities of given answers."""

from __future__ import annotations

import contextlib
import logging
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dualign.core import ranks, work
from dualign.core.errors import DataError
from dualign.core.progress import Progress, silenced
from dualign.core.schema import PROMPTS, Message, characters, read_table
from dualign.core.work import Work
from dualign.lm.batches import by_length
from dualign.lm.engines import generate, refill
from dualign.lm.engines.check import check
from dualign.lm.engines.interface import PLAIN, Answer, Decoding, Request, row_seed, seed_for
from dualign.lm.engines.table import ENGINES
from dualign.lm.flops import Tokens, reading_flop, size_of
from dualign.lm.loading import check_context, context_of, name_of
from dualign.lm.mixture import Mixture, Policy, mixture_log_probability
from dualign.lm.models import end_tokens
from dualign.lm.numerics import answer_log_probabilities, padded_rows
from dualign.lm.packing import attention_kept, packed_log_probabilities, packs
from dualign.lm.tokens import decode_answers, encode_prompts, render
from dualign.params.base import Resources

log = logging.getLogger(__name__)

#: What `prepare` leaves: pairs, whose prompts a template must take, and prompts that are answered.
_PAIRS = ("helpful_pairs", "safety_pairs")
_ASKED = ("pool", "search", "certify", "eval")
_PROMPTS = pa.schema([PROMPTS.field("prompt")])


@dataclass(frozen=True)
class Sample:
    """One drawn answer: its prompt's position, ids (with a drawn EOS), text, and if it ended."""

    prompt: int
    tokens: list[int]
    text: str
    ended: bool


@dataclass(frozen=True)
class Draws:
    """What to draw: answers to each prompt, their longest, the seed, and how they are drawn. `key`
    is the param that says how long.

    Whatever is drawn at another decoding has another law than the policy: no dual and no search may
    rest on it, and a certificate that does is about that decoding."""

    count: int
    max_new_tokens: int
    seed: int
    decoding: Decoding = PLAIN
    key: str = "generation.max_new_tokens"


def draw(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    wanted: Draws,
    resources: Resources,
) -> list[Sample]:
    """Answers to prompts (token ids), drawn from the policy itself by `resources.engine`: T = 1, no
    truncation of its tail. At another decoding `generate` draws.

    Returned in order of prompt, then draw, in however many processes. A sample of the answers of
    every engine but `generate` is checked against our own log-probabilities; raises ModelError
    where they differ."""
    name = resources.engine if wanted.decoding == PLAIN else "generate"
    engine = ENGINES[name]

    def answers(model: torch.nn.Module, request: Request) -> list[Answer]:
        if name == "generate":  # which shares its batches out itself
            return engine(model, tokenizer, request, resources)
        rows = ranks.share(range(len(request.prompts)))
        own = request.of(rows, request.seed)
        drawn = engine(model, tokenizer, own, resources)
        check(model, own, drawn, resources)
        found = dict(ranks.gathered(list(zip(rows, drawn, strict=True))))
        return [found[row] for row in range(len(request.prompts))]

    return _drawn(policy, tokenizer, prompts, wanted, resources.sampling_batch_size, answers)


def check_engine(model: torch.nn.Module, resources: Resources) -> None:
    """Refuse a model that `resources.engine` cannot draw from, as far as that shows before it does.
    Raises ParamsError.
    """
    if resources.engine == "refill":
        refill.check_kept(model)


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
    """`draw` by `generate`: the same for seed, batch size and device, in any processes."""

    def answers(part: torch.nn.Module, request: Request) -> list[Answer]:
        return generate.answer(part, tokenizer, request)

    wanted = Draws(count, max_new_tokens, seed)
    return _drawn(model, tokenizer, prompts, wanted, batch_size, answers)


@torch.inference_mode()
def log_probabilities(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int,
) -> Tensor:
    """log pi(answer | prompt) in nats, summed over the answer's tokens; fp64 tensor [rows].

    NaN for a row that is longer than the model's context, which no training takes either."""
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
        batches = list(by_length(rows, [lengths[row] for row in rows], batch_size))
        for batch in ranks.share(batches):
            own = [prompts[i] for i in batch], [answers[i] for i in batch]
            if packed:
                logps = packed_log_probabilities(model, *own).double().cpu()
            else:
                logps = _score(model, tokenizer, *own)
            found.append((batch, logps))
            progress.advance(len(batch), sum(len(p) + len(a) for p, a in zip(*own, strict=True)))
        for batch, logps in ranks.gathered(found):
            result[batch] = logps
    return result


def _drawn(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    wanted: Draws,
    batch_size: int,
    answers: Callable[[torch.nn.Module, Request], list[Answer]],
) -> list[Sample]:
    """Answers in order of prompt, then draw, by an engine."""
    rows = [(index, draw) for index in range(len(prompts)) for draw in range(wanted.count)]
    seed = seed_for(wanted.seed, prompts)
    request = Request(
        prompts=[prompts[index] for index, _ in rows],
        seeds=[row_seed(seed, *row) for row in rows],
        seed=seed,
        ends=[],
        max_new_tokens=wanted.max_new_tokens,
        batch_size=batch_size,
        decoding=wanted.decoding,
        key=wanted.key,
    )
    drawn = _answered(policy, tokenizer, request, answers)
    texts = decode_answers(tokenizer, [tokens for tokens, _ in drawn])
    return [
        Sample(index, tokens, text, ended)
        for (index, _), (tokens, ended), text in zip(rows, drawn, texts, strict=True)
    ]


def _answered(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    answers: Callable[[torch.nn.Module, Request], list[Answer]],
) -> list[tuple[list[int], bool]]:
    """The ids of each answer, and whether it ended."""
    if isinstance(policy, Mixture):
        return _mixed(policy, tokenizer, request, answers)
    request = replace(request, ends=end_tokens(policy, tokenizer))
    _check_room(policy, tokenizer, request)
    began = time.monotonic()
    drawn = [answer.tokens for answer in answers(policy, request)]
    _tell(policy, request, drawn, time.monotonic() - began)
    return [(tokens, bool(tokens) and tokens[-1] in request.ends) for tokens in drawn]


def _check_room(
    policy: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, request: Request
) -> None:
    """Refuse a prompt after which the longest answer has no room, by its first words."""
    prompt = max(request.prompts, key=len, default=())
    words = textwrap.shorten(tokenizer.decode(prompt, skip_special_tokens=True), 60)
    what = f"a prompt of {len(prompt)} tokens ({words!r}) and {request.key}"
    least = len(prompt) + 1
    fits = least <= (context_of(policy) or least)
    remedy = "lower it" if fits else "leave the prompt out"
    check_context(policy, len(prompt) + request.max_new_tokens, what, remedy)


def check_prompts(
    policy: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, longest: int
) -> None:
    """Refuse prompts in the folder of `prepare` that the template refuses, and those after which
    the context has no room for the `longest` answer: some are answered when all is trained.

    A worker that has fetched what its stage names alone checks the tables that it has. Raises
    DataError that names the table."""
    for name in _PAIRS:
        with _prompts_of(folder / f"{name}.parquet") as prompts:
            render(tokenizer, prompts, answering=True)
    for name in _ASKED:
        with _prompts_of(folder / f"{name}.parquet") as prompts:
            _check_lengths(policy, prompts, encode_prompts(tokenizer, prompts), longest)


@contextlib.contextmanager
def _prompts_of(file: Path) -> Iterator[list[list[Message]]]:
    """The prompts of a table, none where it is not there; a DataError within names it."""
    try:
        yield read_table(file, _PROMPTS)["prompt"].tolist() if file.is_file() else []
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def _check_lengths(
    policy: torch.nn.Module,
    prompts: Sequence[Sequence[Message]],
    ids: Sequence[Sequence[int]],
    longest: int,
) -> None:
    """Refuse prompts without room for an answer; `ids` are theirs."""
    context = context_of(policy) or math.inf
    rows = zip(prompts, ids, strict=True)
    over = [characters(prompt) for prompt, own in rows if len(own) + longest > context]
    if over:
        raise DataError(
            f"{len(over)} of {len(prompts)} prompts leave no room for an answer of {longest} tokens"
            f" in the context of {name_of(policy)}, {context} tokens: the longest has"
            f" {max(map(len, ids))}; lower generation.max_new_tokens, or prepare.max_prompt_chars"
            f" (below {min(over)} all of these are left out)"
        )


def _tell(
    policy: torch.nn.Module, request: Request, drawn: Sequence[Sequence[int]], seconds: float
) -> None:
    """Log what drawing took, and keep it for the provenance; tokens are those drawn."""
    rows = zip(request.prompts, drawn, strict=True)
    tokens = sum((Tokens.of(len(prompt), len(answer)) for prompt, answer in rows), Tokens())
    done = Work(tokens.answers, reading_flop(size_of(policy), tokens), max(seconds, 1e-9))
    work.record("sampling", done)
    if not silenced():
        rates = done.told(work.peak())
        memory = work.peak_memory()
        log.info("sampling: %.0f tokens, %s, peak memory %.1f GiB", done.tokens, rates, memory)


def _mixed(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    answers: Callable[[torch.nn.Module, Request], list[Answer]],
) -> list[tuple[list[int], bool]]:
    """Each answer from the component drawn for it; each component has a seed of its own."""
    chosen = mixture.draw(len(request.prompts), request.seed)
    drawn: dict[int, tuple[list[int], bool]] = {}
    for k in sorted(set(chosen)):
        rows = [row for row, component in enumerate(chosen) if component == k]
        part = request.of(rows, request.seed + 1 + k)
        found = _answered(mixture.component(k), tokenizer, part, answers)
        drawn.update(zip(rows, found, strict=True))
    return [drawn[row] for row in range(len(chosen))]


def _score(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Sequence[int]],
    answers: list[Sequence[int]],
) -> Tensor:
    device = next(model.parameters()).device
    parts = padded_rows(prompts, answers, tokenizer.pad_token_id)
    return answer_log_probabilities(model, *(part.to(device) for part in parts)).double().cpu()


def _of_prompts(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """For every row the longest with its prompt: sorted, a prompt's rows lie together."""
    longest: dict[tuple[int, ...], int] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        longest[tuple(prompt)] = max(length, longest.get(tuple(prompt), 0))
    return [longest[tuple(prompt)] for prompt in prompts]

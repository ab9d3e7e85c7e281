"""transformers' `generate`: batches of similar prompts, each until its last answer ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dualign.core import ranks
from dualign.core.progress import Progress
from dualign.lm.batches import by_length
from dualign.lm.decoding import drawing
from dualign.lm.engines.interface import Answer, Request, batch_seed, left_padded, until_end
from dualign.lm.numerics import without_adapter
from dualign.params.base import Resources


@torch.inference_mode()
def answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    resources: Resources | None = None,  # which it has no need of
) -> list[Answer]:
    """An answer to each row. Each batch has a seed, and is drawn by one process."""
    model.eval()
    config = decoding(request, tokenizer)
    prompts = request.prompts
    lengths = [len(prompt) for prompt in prompts]
    batches = list(by_length(range(len(prompts)), lengths, request.batch_size))
    found: list[tuple[int, Answer]] = []
    with Progress("sampling", len(prompts)) as progress, configured(model, config):
        for number, batch in ranks.share(list(enumerate(batches))):
            torch.manual_seed(batch_seed(request.seed, number))
            answers = _generate(model, tokenizer, [prompts[row] for row in batch], config)
            found.extend(zip(batch, answers, strict=True))
            progress.advance(len(batch), sum(len(made.tokens) for made in answers))
        drawn = dict(ranks.gathered(found))
    return [drawn[row] for row in range(len(prompts))]


def decoding(request: Request, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """What is drawn."""
    return drawing(
        *request.decoding,
        max_new_tokens=request.max_new_tokens,
        eos_token_id=list(request.ends),
        pad_token_id=tokenizer.pad_token_id,
    )


@contextlib.contextmanager
def configured(model: torch.nn.Module, config: GenerationConfig) -> Iterator[None]:
    """The model under `config` alone: generate() fills in, such as penalties, from its own."""
    base = without_adapter(model)
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
) -> list[Answer]:
    device = next(model.parameters()).device
    ids, mask = left_padded(prompts, tokenizer.pad_token_id)
    width = ids.shape[1]
    output = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
    )  # type: ignore[operator]
    return [Answer(until_end(row, config.eos_token_id)) for row in output[:, width:].tolist()]

"""transformers' `generate`: batches of similar prompts, each computed until its longest answer
ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dualign.core.progress import Progress
from dualign.lm.engines.interface import Answer, Request, by_length, until_end
from dualign.params.base import Resources


@torch.inference_mode()
def answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    resources: Resources | None = None,  # which it has no need of
) -> list[Answer]:
    """An answer to each row of the request. All draw from one generator, so the batches count."""
    model.eval()
    torch.manual_seed(request.seed)
    config = exact(request, tokenizer)
    prompts = request.prompts
    drawn: dict[int, Answer] = {}
    lengths = [len(prompt) for prompt in prompts]
    with Progress("sampling", len(prompts)) as progress, _configured(model, config):
        for batch in by_length(range(len(prompts)), lengths, request.batch_size):
            answers = _generate(model, tokenizer, [prompts[row] for row in batch], config)
            drawn.update(zip(batch, answers, strict=True))
            progress.advance(len(batch))
    return [drawn[row] for row in range(len(prompts))]


def exact(request: Request, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The policy's own distribution: T = 1, no truncation of its tail."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=request.max_new_tokens,
        eos_token_id=list(request.ends),
        pad_token_id=tokenizer.pad_token_id,
    )


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
) -> list[Answer]:
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
    return [Answer(until_end(row, config.eos_token_id)) for row in output[:, width:].tolist()]

"""transformers' continuous batching: keys and values in pages, rows that join as others end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, PreTrainedTokenizerBase
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from dualign.core.errors import ModelError
from dualign.core.progress import Progress
from dualign.lm.engines.generate import decoding
from dualign.lm.engines.interface import Answer, Request
from dualign.lm.numerics import without_adapter
from dualign.lm.tokens import told
from dualign.params.base import Resources

#: Tokens to a page of keys and values.
_PAGE = 64


def answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    resources: Resources,
) -> list[Answer]:
    """An answer to each row, with its tokens' log-probabilities. All draw from one generator.

    Raises ModelError where the library cannot batch the model."""
    if not request.prompts:
        return []
    base = without_adapter(model)
    try:
        manager = base.init_continuous_batching(
            generation_config=decoding(request, tokenizer),
            continuous_batching_config=_config(request, base),
        )
    except ValueError as error:  # a recurrent layer, say, which has no pages
        raise _refused(told(error)) from error
    # All wait before the first step, so that the batches are the same each time.
    names = manager.add_requests([list(prompt) for prompt in request.prompts])
    with _cast_to_the_pages():
        try:
            answers = _collected(manager, len(names))
        finally:
            manager.stop(block=True)
            manager.destroy()
    return [answers[name] for name in names]


@contextlib.contextmanager
def _cast_to_the_pages() -> Iterator[None]:
    """Let pages take keys and values of another precision than the first weight's, which is theirs.

    Under autocast they are bf16 though the weights that are trained are fp32, and keys are fp32
    behind a norm of their own, as Qwen3's, though its matrices are bf16."""
    update = PagedAttentionCache.update

    def cast(cache: Any, keys: Tensor, values: Tensor, *rest: Any, **more: Any) -> Any:
        return update(cache, keys.to(cache.dtype), values.to(cache.dtype), *rest, **more)

    PagedAttentionCache.update = cast
    try:
        yield
    finally:
        PagedAttentionCache.update = update


def _config(request: Request, model: Any) -> ContinuousBatchingConfig:
    """Room for the rows under way and no more: the library would take most of the memory."""
    pages = -(-(request.longest + request.max_new_tokens) // _PAGE) + 1
    return ContinuousBatchingConfig(
        return_logprobs=True,
        seed=request.seed,
        page_size=_PAGE,
        num_blocks=pages * min(request.batch_size, len(request.prompts)) + 1,
        max_batch_tokens=max(request.batch_size, request.longest),
        max_requests_per_batch=request.batch_size,
        auto_switch_to_flash=_is_half(model),
    )


def _is_half(model: Any) -> bool:
    """Whether queries, keys and pages all are of 16 bits, as flash attention demands."""
    normed = any(name.endswith("q_norm") for name, _ in model.named_modules())
    return model.dtype.itemsize == 2 and not normed


def _collected(manager: Any, count: int) -> dict[str, Answer]:
    """The answers by the names of their requests."""
    answers: dict[str, Answer] = {}
    manager.start()
    with Progress("sampling", count) as progress:
        while len(answers) < count:
            result = manager.get_result(timeout=1)
            if result is not None and result.error is None and result.is_finished():
                answers[result.request_id] = Answer(result.generated_tokens, result.logprobs)
                progress.advance(1, len(result.generated_tokens))
            elif (result is not None and result.error is not None) or not manager.is_running():
                why = "it stopped" if result is None else result.error
                raise _refused(why)
    return answers


def _refused(why: str) -> ModelError:
    return ModelError(
        f"resources.engine continuous: transformers cannot batch this model ({why}); set"
        " resources.engine to refill or generate"
    )

"""Draws in two steps are those of the whole distribution function; prompts are read once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dualign.core.schema import user
from dualign.data import world
from dualign.lm.engines.interface import Request, row_seed
from dualign.lm.engines.refill import answer, drawn
from dualign.lm.models import build_scratch, train_tokenizer
from dualign.lm.tokens import encode_prompts
from dualign.params.base import Resources
from tests.tiny import WIDER

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("vocabulary", [3, 256, 700])
def test_a_draw_in_two_steps_inverts_the_distribution_function(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(500, vocabulary, generator=generator)
    logits[:, :2] = -torch.inf
    uniforms = torch.rand(500, generator=generator, dtype=torch.float64)
    tokens, values = drawn(logits, uniforms)
    exact = torch.log_softmax(logits.double(), 1)
    passed = exact.exp().cumsum(1) <= uniforms.unsqueeze(1)
    assert tokens.tolist() == passed.sum(1).tolist()
    assert torch.allclose(values, exact.gather(1, tokens.unsqueeze(1)).squeeze(1), atol=1e-5)


def test_no_uniform_number_draws_what_has_no_probability() -> None:
    logits = torch.full((4, 600), -torch.inf)
    logits[:, 300] = 0
    logits[:, 301] = -40
    ends = torch.tensor([0.0, 0.5, 1 - 2**-53, 1 - 2**-52], dtype=torch.float64)
    tokens, values = drawn(logits, ends)
    assert set(tokens.tolist()) <= {300, 301} and values.isfinite().all()


def test_a_prompt_is_read_once_though_its_rows_join_one_by_one(resources: Resources) -> None:
    """Rows of a batch of two leave at different times, so those of one prompt join apart."""
    tokenizer = train_tokenizer([one.text for one in world.answers(world.prompts()[0])], 300)
    model = build_scratch(WIDER.model_copy(update={"context": 192}), tokenizer, seed=0)
    prompts = encode_prompts(tokenizer, [user("How do I cook?"), user("Why?")])
    read: list[int] = []

    def count(module: torch.nn.Module, given: Any, named: dict[str, Any]) -> None:
        ids = named["input_ids"]
        read.extend(ids.shape[:1] if ids.shape[1] > 1 else ())

    model.register_forward_pre_hook(count, with_kwargs=True)
    rows = [(index, draw) for index in range(2) for draw in range(9)]
    request = Request(
        [prompts[index] for index, _ in rows],
        [row_seed(0, *row) for row in rows],
        seed=0,
        ends=list(range(0, len(tokenizer), 5)),
        max_new_tokens=20,
        batch_size=2,
    )
    found = answer(model, tokenizer, request, resources)
    assert len({len(one.tokens) for one in found}) > 4
    assert sum(read) == 2

"""Packed rows give the values and gradients of padded ones and read each prompt once; a model that
cannot is left alone.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
)

from dualign.lm import models, packing
from dualign.lm.numerics import answer_log_probabilities, padded_rows
from dualign.lm.packing import (
    Packs,
    Sequences,
    attention,
    enable_packing,
    packed_log_probabilities,
)
from dualign.training.run import without_dropout
from tests.lm.test_numerics import CONFIGS, LORA, SMALL, stir

pytestmark = pytest.mark.usefixtures("one_thread")

#: Two answers to one prompt, three to another, of one token and of none, and one without a prompt.
PROMPTS = [[4, 5, 6], [9, 8], [4, 5, 6], [9, 8], [7], [9, 8], []]
ANSWERS = [[7, 8, 2], [5], [9, 2], [3, 4, 5, 6, 2], [2, 7], [], [11, 12, 2]]


def built(name: str) -> PreTrainedModel:
    """A model with a configuration of its own, which packing changes."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


def padded(model: Any) -> Tensor:
    given = padded_rows(PROMPTS, ANSWERS, 0)
    return answer_log_probabilities(model, *given)


def packed(model: Any) -> Tensor:
    return packed_log_probabilities(model, PROMPTS, ANSWERS)


def gradients(model: Any, logps: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logps * torch.arange(1.0, 8.0)).sum().backward()
    named = model.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


@pytest.mark.parametrize("kind", ["plain", "lora", "checkpointed"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "granite", "cohere"])
def test_values_and_gradients_are_those_of_padded_rows(name: str, kind: str) -> None:
    """In fp64: only what a model itself rounds to fp32 differs, on any processor."""
    model: Any = without_dropout(built(name))
    if kind == "lora":
        model = models.with_lora(model, LORA, 0)
        stir(model)
    elif kind == "checkpointed":
        model.gradient_checkpointing_enable()
    model.double().train()
    values = padded(model)
    expected = gradients(model, values)
    assert enable_packing(model) and enable_packing(model)
    found = packed(model)
    assert torch.allclose(found, values, atol=1e-6) and values.abs().max() > 5
    assert torch.allclose(padded(model), values, atol=1e-6), "padded rows still are what they were"
    grads = gradients(model, found)
    assert grads.keys() == expected.keys() and len(grads) > 4
    for key, grad in grads.items():
        apart = float((grad - expected[key]).norm() / expected[key].norm())
        assert apart < 1e-6, key


def test_each_prompt_is_read_once_and_nothing_is_padded() -> None:
    model = built("llama")
    assert enable_packing(model)
    seen: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda m, given, out: seen.append(given[0]))
    packed(model)
    # the last token of an answer predicts nothing
    assert [ids.tolist() for ids in seen] == [[[4, 5, 6, 7, 8, 9, 9, 8, 3, 4, 5, 6, 7, 2, 11, 12]]]


def one_after_another(model: PreTrainedModel) -> None:
    """Let every token see those before it in its row, whatever its positions and masks say."""

    def mixed(module: torch.nn.Module, given: Any, states: Tensor) -> Tensor:
        return states + 0.1 * states.cumsum(1)

    model.get_input_embeddings().register_forward_hook(mixed)


@pytest.mark.parametrize(
    "reason", ["recurrent", "window", "chunks", "eager", "softcap", "other numbers"]
)
def test_a_model_that_cannot_is_left_as_it_is(reason: str) -> None:
    small = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    made: dict[str, Any] = {
        "recurrent": lambda: AutoModelForCausalLM.from_config(MambaConfig(**small, state_size=4)),
        "window": lambda: AutoModelForCausalLM.from_config(
            MistralConfig(**SMALL, sliding_window=8)
        ),
        "chunks": lambda: AutoModelForCausalLM.from_config(
            Llama4TextConfig(**SMALL, attention_chunk_size=8, num_local_experts=2)
        ),
    }
    model = made.get(reason, lambda: built("gemma2" if reason == "softcap" else "llama"))()
    if reason == "eager":
        model.set_attn_implementation("eager")
    if reason == "other numbers":
        one_after_another(model)
    before = model.config._attn_implementation, model.training
    assert not enable_packing(model)
    assert (model.config._attn_implementation, model.training) == before


def by_calls(query: Tensor, key: Tensor, value: Tensor, plan: Sequences, scale: float) -> Tensor:
    """Attention of each call by brute force, [tokens, heads, width]: its last query sees all its
    keys, each one before it a key less."""
    known, held = key[plan.tokens], value[plan.tokens]
    made = []
    for call in range(len(plan.queries) - 1):
        first, last = plan.queries[call : call + 2].tolist()
        begin, end = plan.keys[call : call + 2].tolist()
        for place in range(first, last):
            seen = slice(begin, end - (last - 1 - place))
            weights = (query[place, :, None] * known[seen].transpose(0, 1)).sum(-1) * scale
            made.append(torch.einsum("hk,khw->hw", weights.softmax(-1), held[seen]))
    return torch.stack(made)


def test_a_device_that_cannot_pack_has_padded_rows_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = built("llama").train()
    expected = padded(model)

    def refusing(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(packing, "attention", refusing)
    assert not enable_packing(model)
    assert "with padding: a packed row failed (no kernel image is available for" in caplog.text
    assert torch.equal(padded(model), expected) and model.training


def test_one_call_of_sequences_is_a_call_for_each_answer() -> None:
    """What flash attention is asked on a GPU, against what sdpa is asked elsewhere."""
    torch.manual_seed(0)
    packs = Packs(torch.device("cpu"))
    packs.add(3, [2, 0, 4])
    packs.add(2, [0, 3])
    packs.add(4, [1])
    states = [torch.randn(1, 2, 19, 4, dtype=torch.float64) for _ in range(3)]
    found, _ = attention(torch.nn.Module(), *states, None, packs=packs, scaling=0.3)
    plan = packs.sequences
    assert plan.longest == (5, 7)
    assert plan.queries.tolist() == [0, 5, 9, 11, 14, 19]
    expected = by_calls(*(part[0].transpose(0, 1) for part in states), plan, 0.3)
    assert torch.allclose(found[0], expected)

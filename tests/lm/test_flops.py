"""The count of operations, beside what torch itself counts of a training step's products."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from dualign.core.peaks import peak_of
from dualign.lm.flops import ModelSize, Tokens, reading_flop, size_of, training_flop
from tests.tiny import llama

ROWS, LENGTH = 3, 7
SHAPE = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_key_value_heads": 1}


def counted(model: torch.nn.Module, backward: bool) -> float:
    """Operations of the products with weights, as torch counts them; attention's are no `mm`."""
    ids = torch.randint(0, 11, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids).loss
        if backward:
            loss.backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if str(op) in ("aten.mm", "aten.addmm"))


def every_position() -> Tokens:
    """As the forward pass of transformers has it: all positions go through the head."""
    return Tokens(ROWS * LENGTH, ROWS * LENGTH, 0)


def test_products_are_those_that_torch_counts() -> None:
    model = llama(**SHAPE)
    size = size_of(model)
    assert (size.frozen, size.head, size.layers, size.attention) == (0, 88, 2, 8)
    assert training_flop(size, every_position()) == counted(model, backward=True)
    assert reading_flop(size, every_position()) == counted(model, backward=False)


def test_a_frozen_base_has_no_gradient_of_its_weights() -> None:
    base = llama(**SHAPE)
    whole = size_of(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    size = size_of(model)
    assert size.frozen == whole.trained and 0 < size.trained < whole.trained
    assert not size.head_trained
    ours = training_flop(size, every_position())
    seen = counted(model, backward=True)
    # Nothing flows back into what is read first, which the usual count does not know.
    assert seen <= ours <= 1.2 * seen


def test_matrices_that_are_no_linear_layer_count() -> None:
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2)
    size = size_of(GPT2LMHeadModel(config))
    assert size.trained == 2 * 12 * 8 * 8 and size.head == 11 * 8


def test_attention_is_causal_and_goes_by_the_length_of_each_row() -> None:
    size = ModelSize(0, 0, head=0, head_trained=False, layers=2, attention=8)
    two = Tokens.of(3, 1) + Tokens.of(1, 1)
    assert reading_flop(size, two) == 2 * 2 * 8 * (4**2 + 2**2)
    assert training_flop(size, two) == 3 * reading_flop(size, two)


@pytest.mark.parametrize("device, precision", [("cpu", "auto"), ("auto", "fp32")])
def test_no_peak_is_made_up(device: str, precision: str) -> None:
    assert peak_of(None, device, precision) is None
    assert peak_of(2.5, device, precision) == 2.5e12

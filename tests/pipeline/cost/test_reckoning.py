"""Seconds and memory against counts by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.cost.base import Base, decoder
from pipeline.cost.machine import Machine, card_of, machine
from pipeline.cost.reckoning import GIB, Setting, cost, memory_of, operations, seconds_of
from pipeline.cost.work import Piece, Work
from pipeline.errors import PipelineError

#: One layer of 12 h^2 = 1200 weights in its matrices (h = 10, i = 80 / 3 would not be whole, so the
#: feed-forward is not gated: 4 h^2 + 2 h 40), a head of 50 tokens.
BASE: Base = decoder(
    "tiny",
    {
        "model_type": "gpt2", "n_embd": 10, "n_layer": 1, "n_head": 2, "n_inner": 40,
        "vocab_size": 50, "tie_word_embeddings": True,
    },
)  # fmt: skip
#: 1 TFLOP/s, 1 GB/s, nothing lost.
CARD = Machine(
    "card", 1, 0.5, 1, 1, 3600, mfu=1.0, of_bandwidth=1.0, launch=0.0, step=0.0, start=0.0
)
SETTING = Setting(BASE, CARD)
READ = Piece("read", rows=2, prompt=3, answer=1, batch=2)


def test_one_forward_pass() -> None:
    assert BASE.body == 1200 and BASE.head == 500
    # 2 sequences: 2 x 1200 x 4 tokens, 2 x 500 x 1 token of an answer, 2 x 1 x 10 x 4^2
    assert operations(READ, BASE) == 2 * (9600 + 1000 + 320)
    scored = replace(READ, kind="score")
    assert operations(scored, BASE) == 2 * (9600 + 320)


def test_training_is_three_forward_passes_and_lora_two() -> None:
    train = replace(READ, kind="train", steps=1, max_tokens=8)
    once = operations(READ, BASE)
    assert operations(train, BASE) == 3 * once
    assert operations(train, BASE, checkpointing=True) == 4 * once
    # without gradients of frozen matrices: one forward and one backward of as much, attention's two
    assert operations(replace(train, rank=2), BASE) == 2 * once + 2 * 320


def test_seconds_are_operations_and_the_optimisers_traffic() -> None:
    train = replace(READ, kind="train", steps=5, max_tokens=8)
    computing = 3 * operations(READ, BASE) / 1e12
    adam = 5 * 28 * BASE.weights / 1e9
    assert seconds_of(train, SETTING) == pytest.approx(computing + adam)
    slower = replace(SETTING, machine=replace(CARD, mfu=0.5, launch=1e-3, step=0.1))
    launches = 3 * 1 * 40 * 1e-3
    assert seconds_of(train, slower) == pytest.approx(2 * computing + adam + launches + 0.5)
    two = replace(slower, processes=2)  # each of them takes every step with weights of its own
    assert seconds_of(train, two) == pytest.approx(2 * computing + 2 * adam + launches + 1.0)
    shards = replace(two, sharded=True)
    assert seconds_of(train, shards) == pytest.approx(2 * computing + adam + launches + 1.0)
    assert seconds_of(READ, replace(SETTING, precision="fp32")) == pytest.approx(
        operations(READ, BASE) / 0.5e12
    )


def test_drawing_reads_all_weights_for_every_token() -> None:
    draw = Piece("draw", rows=4, prompt=3, answer=2, batch=2, max_tokens=6)
    computing = operations(draw, BASE) / 1e12
    # two batches of six steps; keys and values of 2 sequences of 3 + 6 / 2 tokens, in bf16
    moved = 2 * 6 * (BASE.weights + 2 * 6 * 2 * 1 * 10) * 2
    assert seconds_of(draw, SETTING) == pytest.approx(computing + moved / 1e9)
    assert draw.tokens == 8


def test_memory_of_training() -> None:
    train = Piece("train", 8, 3, 1, batch=4, steps=2, max_tokens=8)
    context = 0.8
    activations = 4 * 8 * (9 * 10 + 4 * 40)
    logits = 3 * 4 * 4 * 50
    full = 16 * BASE.weights + activations * 4 + logits
    fp32 = replace(SETTING, precision="fp32")
    assert memory_of(train, 0, fp32) == pytest.approx(context + full / GIB)
    # bf16: what autocast rounds, and activations of half the size
    narrow = 18 * BASE.weights + activations * 2 + logits
    assert memory_of(train, 0, SETTING) == pytest.approx(context + narrow / GIB)
    pure = 8 * BASE.weights + activations * 2 + logits
    assert memory_of(train, 0, replace(SETTING, precision="pure_bf16")) == pytest.approx(
        context + pure / GIB
    )
    adapters = 2 * sum(into + out for _, into, out in BASE.linears)
    lora = 2 * BASE.weights + 16 * adapters + activations * 2 + logits
    two = 2 * BASE.weights * 2
    assert memory_of(replace(train, rank=2), 2, SETTING) == pytest.approx(
        context + (two + lora) / GIB
    )
    narrow = replace(SETTING, quantised=True)
    base = 1200 * 4.127 / 8 + (BASE.weights - 1200) * 2
    assert narrow.kept == pytest.approx(base)
    quantised = base + 16 * adapters + activations * 2 + logits
    assert memory_of(replace(train, rank=2), 0, narrow) == pytest.approx(context + quantised / GIB)
    shards = replace(SETTING, processes=2, sharded=True, precision="fp32")
    shared = 8 * BASE.weights + activations * 4 + logits
    assert memory_of(train, 0, shards) == pytest.approx(context + shared / GIB)
    kept = 4 * 8 * (10 + 9 * 10 + 4 * 40)
    checkpointed = 16 * BASE.weights + kept * 4 + logits
    assert memory_of(train, 0, replace(fp32, checkpointing=True)) == pytest.approx(
        context + checkpointed / GIB
    )


def test_a_stage_is_its_pieces() -> None:
    train = Piece("train", 8, 3, 1, batch=4, steps=2, max_tokens=8)
    found = cost(Work((train, READ), held=1), replace(SETTING, machine=replace(CARD, start=3.0)))
    seconds = 3.0 + seconds_of(train, SETTING) + seconds_of(READ, SETTING)
    assert (found.trained, found.read, found.drawn) == (32, 8, 0)
    assert found.hours == pytest.approx(seconds / 3600)
    assert found.money == pytest.approx(seconds)  # 3600 dollars an hour
    assert found.memory == memory_of(train, 1, SETTING)
    alone = cost(Work((train,), held=1, trains_alone=True), SETTING)
    assert alone.memory == memory_of(train, 0, SETTING)


def test_cards() -> None:
    assert machine("h100").memory == 80
    assert card_of("NVIDIA GeForce RTX 4090") == "rtx4090"
    assert card_of("NVIDIA H100 PCIe") == "h100-pcie"
    assert card_of("Quadro") is None
    assert machine("t4").peak(2) == machine("t4").peak(4) == 8.1e12
    with pytest.raises(PipelineError, match="did you mean h100"):
        machine("H10")
    assert machine("l4").with_given(None, 0.3).mfu == 0.3
    with pytest.raises(PipelineError, match="--mfu 40"):
        machine("l4").with_given(None, 40)
    with pytest.raises(PipelineError, match="--price -1"):
        machine("l4").with_given(-1, None)

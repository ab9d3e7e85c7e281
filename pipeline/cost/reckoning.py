"""Seconds, memory and money of a stage's work on a machine. Plain arithmetic, no overlap assumed.

Operations: 2 a weight and token in the forward pass, twice that in the backward pass (2001.08361,
section 2.1), so 6 in training; with LoRA the frozen weights have no gradient of their own, which
leaves 4. The head reads answers' tokens alone. Causal attention adds 2 L w T a token and forward
pass, of width w over T tokens, half of PaLM's 12 L w T in training (2204.02311, appendix B), which
does not count the mask. Drawing a token reads all weights and the keys and values of what stands
before it (2211.05102, section 2), so bandwidth bounds it, and operations do where batches are
large.

Memory of training: weights and gradients with their two moments in fp32, 16 bytes a trained weight
(1910.02054, section 3.1), frozen weights as they are kept, and activations. A Llama's layer keeps
some 9 h + 4 i numbers a token for its backward pass, h the hidden size and i that of the
feed-forward (counted on `LlamaDecoderLayer`; 2205.05198, equation 2, has 34 h bytes in 16 bits with
i = 4 h), or h where activations are checkpointed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.cost.base import Base
from pipeline.cost.machine import Machine
from pipeline.cost.work import Piece, Work, processes_of

GIB = 2**30
#: Bytes of a trained weight in fp32: itself, its gradient and AdamW's two moments.
_TRAINED = 16
#: Bytes of a weight in NF4 with quantised constants: 4.127 bits (2305.14314, section 3).
_NF4 = 4.127 / 8
#: Bytes that AdamW reads and writes of it at every step: it reads all four, and writes three.
_STEPPED = 28
#: Operations of a layer in a forward pass, each of which takes a launch.
_LAUNCHES = 40
#: Logits that are held at once, as `dualign.lm.numerics.CHUNK`, and how many copies of them.
_CHUNK = 2**26
_COPIES = 3
#: GiB that the device's own libraries take.
_CONTEXT = 0.8


@dataclass(frozen=True)
class Setting:
    """What all stages share: base and machine, the precision that params ask for, whether
    activations are checkpointed, and the processes that share a batch.
    """

    base: Base
    machine: Machine
    precision: str = "auto"
    checkpointing: bool = False
    processes: int = 1
    sharded: bool = False
    quantised: bool = False

    @classmethod
    def of(cls, base: Base, machine: Machine, params: Mapping[str, Any]) -> Setting:
        """The setting that params ask for."""
        resources = params["resources"]
        return cls(
            base,
            machine,
            resources["precision"],
            resources["gradient_checkpointing"],
            processes_of(resources),
            resources.get("distributed") == "fsdp2",
            params["lora"].get("quantise") is not None,
        )

    @property
    def bytes_each(self) -> int:
        """Bytes of a number that is multiplied: 2 in bf16, 4 in fp32."""
        if self.precision == "auto":
            return 2 if self.machine.bf16 else 4
        return 4 if self.precision == "fp32" else 2

    @property
    def kept(self) -> float:
        """Bytes of all weights of a base that is not trained."""
        if not self.quantised:
            return float(self.base.weights * self.bytes_each)
        wide = self.base.weights - self.base.body
        return self.base.body * _NF4 + wide * self.bytes_each


@dataclass(frozen=True)
class Cost:
    """What a stage takes: tokens trained on, read and drawn, GiB of each card at the peak, hours of
    all cards together, dollars.
    """

    trained: float
    read: float
    drawn: float
    memory: float
    hours: float
    money: float


def cost(work: Work, setting: Setting) -> Cost:
    """What the work takes."""
    tokens = {"train": 0.0, "read": 0.0, "score": 0.0, "draw": 0.0}
    for piece in work.pieces:
        tokens[piece.kind] += piece.tokens
    seconds = setting.machine.start + sum(seconds_of(piece, setting) for piece in work.pieces)
    hours = (seconds + setting.machine.start * (setting.processes - 1)) / 3600
    memory = [memory_of(piece, _held(piece, work), setting) for piece in work.pieces]
    return Cost(
        tokens["train"],
        tokens["read"] + tokens["score"],
        tokens["draw"],
        max(memory, default=0.0),
        hours,
        hours * setting.machine.price,
    )


# --- seconds --------------------------------------------------------------------------------------


def forward(piece: Piece, base: Base) -> float:
    """Operations of one forward pass over all sequences of a piece."""
    scorer = piece.scorer or piece.kind == "score"
    tokens = piece.prompt + piece.answer
    head = 0.0 if scorer else 2.0 * base.head * piece.answer
    return piece.rows * (2.0 * base.body * tokens + head + _attention(piece, base))


def _attention(piece: Piece, base: Base) -> float:
    return 2.0 * base.layers * base.width * (piece.prompt + piece.answer) ** 2


def operations(piece: Piece, base: Base, checkpointing: bool = False) -> float:
    """Operations of a piece: of a training the forward pass, its backward pass and, with
    checkpointing, the forward pass again.
    """
    once = forward(piece, base)
    if piece.kind != "train":
        return once
    attention = piece.rows * _attention(piece, base)
    backward = (once - attention) * (1 if piece.rank else 2) + 2 * attention
    return once * (2 if checkpointing else 1) + backward


def seconds_of(piece: Piece, setting: Setting) -> float:
    """Seconds of a piece on all cards together, each of which takes every step of a training."""
    machine = setting.machine
    computing = operations(piece, setting.base, setting.checkpointing)
    computing /= machine.peak(setting.bytes_each) * machine.mfu
    launches = _passes(piece) * setting.base.layers * _LAUNCHES * machine.launch
    steps = piece.steps * setting.processes
    return computing + launches + steps * machine.step + _moving(piece, setting)


def _passes(piece: Piece) -> float:
    """Forward passes of a piece; a backward pass counts as two."""
    batches = math.ceil(piece.rows / piece.batch)
    if piece.kind == "draw":
        return batches * (1 + piece.max_tokens)
    return batches * (3 if piece.kind == "train" else 1)


def _moving(piece: Piece, setting: Setting) -> float:
    """Seconds that memory takes: of AdamW, and of weights, keys and values at every drawn token."""
    rate = setting.machine.bandwidth * 1e9 * setting.machine.of_bandwidth
    base = setting.base
    if piece.kind == "train":
        copies = 1 if setting.sharded else setting.processes
        return piece.steps * copies * trained(piece, base) * _STEPPED / rate
    if piece.kind != "draw":
        return 0.0
    steps = math.ceil(piece.rows / piece.batch) * piece.max_tokens
    before = piece.prompt + piece.max_tokens / 2
    kept = min(piece.rows, piece.batch) * before * 2 * base.layers * base.kv
    return steps * (setting.kept + kept * setting.bytes_each) / rate


# --- memory ---------------------------------------------------------------------------------------


def _held(piece: Piece, work: Work) -> int:
    """Models that are held beside the one at work."""
    return 0 if work.trains_alone and piece.kind == "train" else work.held


def trained(piece: Piece, base: Base) -> int:
    """Weights that a training changes."""
    return base.adapters(piece.rank, piece.targets) if piece.rank else base.weights


def memory_of(piece: Piece, held: int, setting: Setting) -> float:
    """GiB of one card while a piece is at work beside the models that are held."""
    models = held * setting.kept
    parts = _training(piece, setting) if piece.kind == "train" else _serving(piece, setting)
    return _CONTEXT + (models + sum(parts)) / GIB


def _training(piece: Piece, setting: Setting) -> Iterator[float]:
    base = setting.base
    size = setting.bytes_each
    pure = setting.precision == "pure_bf16"
    share = setting.processes if setting.sharded else 1
    if piece.rank:
        yield setting.kept / share
    yield trained(piece, base) * (_TRAINED // 2 if pure else _TRAINED) / share
    if size == 2 and not pure and not piece.rank:
        yield base.weights * 2.0  # autocast keeps what it has rounded for the length of a pass
    yield piece.batch * _longest(piece) * size * _kept(base, setting.checkpointing)
    yield 0.0 if piece.scorer else _logits(piece.batch * piece.answer, base)


def _serving(piece: Piece, setting: Setting) -> Iterator[float]:
    """Weights, what one layer holds of a batch, logits; of drawing keys and values too."""
    base = setting.base
    yield setting.kept
    rows = min(piece.rows, piece.batch)
    tokens = rows * _longest(piece)
    if piece.kind == "draw":
        yield tokens * 2 * base.layers * base.kv * setting.bytes_each
        yield _COPIES * 4.0 * rows * base.vocabulary
        return
    yield tokens * (4 * base.hidden + 3 * base.inner) * setting.bytes_each
    yield 0.0 if piece.kind == "score" else _logits(rows * piece.answer, base)


def _longest(piece: Piece) -> float:
    """Tokens of a sequence at the peak: the most that it may have in training, where batches are
    random; the mean elsewhere."""
    if piece.kind == "train":
        return piece.max_tokens
    return piece.prompt + (piece.max_tokens if piece.kind == "draw" else piece.answer)


def _kept(base: Base, checkpointing: bool) -> float:
    """Numbers a token that the backward pass needs."""
    layer = 9 * base.hidden + 4 * base.inner
    return base.layers * base.hidden + layer if checkpointing else base.layers * layer


def _logits(tokens: float, base: Base) -> float:
    """Bytes of the logits that are held at once, in fp32."""
    return _COPIES * 4 * min(tokens * base.vocabulary, _CHUNK)

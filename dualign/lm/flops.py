"""The work of reading and of training, in floating-point operations.

The usual count, of the model and not of the program: two operations for each weight of a matrix and
token that is read, two more for the gradient of what the matrix was fed, and two for that of the
weight itself where it is trained. So a token costs 6 N in training, 4 N under a frozen base, 2 N
where it is only read. Attention is causal: a row of n tokens has n**2 / 2 pairs, each of two
products of the width of all heads. Padding, what checkpointing computes again, norms and lookups
count for nothing; the output head works on tokens of answers alone; every answer is counted with
its prompt, also where a packed row holds the prompt once. Windows of attention and experts that a
token does not visit are not known here: such models do less than is counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class ModelSize:
    """What the work follows from: weights of matrices that are trained and that are frozen, without
    the output head; weights of the head; layers; width of all attention heads together."""

    trained: int
    frozen: int
    head: int
    head_trained: bool
    layers: int
    attention: int


@dataclass(frozen=True)
class Tokens:
    """Tokens of rows without padding: all, those of answers, and the sum of squared lengths."""

    read: float = 0.0
    answers: float = 0.0
    squares: float = 0.0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            self.read + other.read, self.answers + other.answers, self.squares + other.squares
        )

    @classmethod
    def of(cls, prompt: int, answer: int) -> Tokens:
        """One row.

        >>> Tokens.of(3, 2) + Tokens.of(3, 1)
        Tokens(read=9.0, answers=3.0, squares=41.0)
        """
        length = prompt + answer
        return cls(float(length), float(answer), float(length**2))


def size_of(model: torch.nn.Module) -> ModelSize:
    """The size of a transformers or PEFT model; what requires a gradient now is trained."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    counts = {True: 0, False: 0}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            counts[module.weight.requires_grad] += _weights(module)
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    width = config.hidden_size // config.num_attention_heads
    return ModelSize(
        trained=counts[True],
        frozen=counts[False],
        head=0 if head is None else _weights(head),
        head_trained=head is not None and bool(head.weight.requires_grad),
        layers=config.num_hidden_layers,
        attention=config.num_attention_heads * int(getattr(config, "head_dim", None) or width),
    )


def _weights(module: torch.nn.Module) -> int:
    """Weights of a matrix; of one in 4 bits, or of which a shard is here, those of the whole."""
    if isinstance(module, torch.nn.Linear):
        return module.in_features * module.out_features
    return int(module.weight.numel())  # type: ignore[operator]


def training_flop(size: ModelSize, tokens: Tokens) -> float:
    """Operations of training on rows once: forward and backward.

    >>> size = ModelSize(100, 0, head=10, head_trained=True, layers=1, attention=4)
    >>> training_flop(size, Tokens.of(3, 2)) == 6 * (100 * 5 + 10 * 2 + 4 * 5**2)
    True
    """
    body = (6 * size.trained + 4 * size.frozen) * tokens.read
    head = (6 if size.head_trained else 4) * size.head * tokens.answers
    return body + head + 6 * size.layers * size.attention * tokens.squares


def reading_flop(size: ModelSize, tokens: Tokens) -> float:
    """Operations of reading rows, or of drawing their answers with a cache: forward alone.

    >>> size = ModelSize(0, 100, head=10, head_trained=False, layers=1, attention=4)
    >>> reading_flop(size, Tokens.of(3, 2)) == 2 * (100 * 5 + 10 * 2 + 4 * 5**2)
    True
    """
    body = 2 * (size.trained + size.frozen) * tokens.read
    head = 2 * size.head * tokens.answers
    return body + head + 2 * size.layers * size.attention * tokens.squares

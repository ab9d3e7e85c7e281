"""The model of a few thousand weights that tests train and ask."""

from __future__ import annotations

from dualign.params.models import ScratchParams

TINY = ScratchParams(
    tokenizer="train",
    vocab_size=300,
    hidden_size=16,
    layers=1,
    heads=2,
    intermediate_size=16,
    context=128,
)
#: A little wider, where a training must learn something.
WIDER = TINY.model_copy(update={"hidden_size": 32, "intermediate_size": 48})

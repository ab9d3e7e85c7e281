"""What tests of models share: how to run on this machine, and a tokenizer."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from dualign.data import world
from dualign.lm.models import train_tokenizer
from dualign.params.base import Resources
from tests.tiny import on_cpu


@pytest.fixture(scope="session")
def resources() -> Resources:
    """A CPU and fp32."""
    return on_cpu()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Of the world's answers to one question."""
    return train_tokenizer([answer.text for answer in world.answers(world.prompts()[0])], 300)

"""What tests of models share: how to run on this machine, and a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from dualign.data import world
from dualign.lm.models import train_tokenizer
from dualign.params.base import Resources
from dualign.params.loading import load_resources

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def resources() -> Resources:
    """A CPU and fp32."""
    return load_resources(ROOT / "params.yaml").model_copy(
        update={"device": "cpu", "precision": "fp32"}
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Of the world's answers to one question."""
    return train_tokenizer([answer.text for answer in world.answers(world.prompts()[0])], 300)

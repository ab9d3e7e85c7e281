"""The models of a few thousand weights that tests train and ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from dualign.lm.models import save
from dualign.params.base import Resources, TrainingParams
from dualign.params.loading import load_resources
from dualign.params.models import ScratchParams

ROOT = Path(__file__).resolve().parents[1]

#: The CPU, and a GPU where there is one: the code is the same. `bench.gpu` runs files that name it.
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
        ],
    ),
]

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


def short_training(**changes: Any) -> TrainingParams:
    """One step of four rows at a constant rate."""
    return TrainingParams(
        **{
            "epochs": 1.0,
            "batch_size": 4,
            "optimiser": "adamw",
            "learning_rate": 1e-3,
            "adam_beta2": 0.99,
            "warmup": 0.0,
            "schedule": "constant",
            "weight_decay": 0.0,
            "max_length": 300,
            "max_steps": 1,
        }
        | changes
    )


def on_cpu(**changes: Any) -> Resources:
    """The resources of params.yaml, in fp32 on the CPU."""
    fixed = {"device": "cpu", "precision": "fp32"}
    return load_resources(ROOT / "params.yaml").model_copy(update=fixed | changes)


def llama(**shape: Any) -> LlamaForCausalLM:
    """A Llama with random weights of seed 0, of two layers and two heads if nothing is said."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**{"num_hidden_layers": 2, "num_attention_heads": 2} | shape)
    )


def saved_llama(tokenizer: PreTrainedTokenizerBase, folder: Path, **shape: Any) -> Path:
    """Such a one with this tokenizer in a folder."""
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = llama(vocab_size=320, max_position_embeddings=64, **ends, **shape)
    save(model, tokenizer, folder)
    return folder

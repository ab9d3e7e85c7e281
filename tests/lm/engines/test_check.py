"""A model whose batches are not its own answers is refused before anything is drawn from it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase, xLSTMConfig

from dualign.core.errors import ModelError, ParamsError
from dualign.lm import models
from dualign.lm.engines.check import check_batches
from dualign.lm.engines.interface import Request
from dualign.lm.engines.table import ENGINES
from dualign.params.base import EngineName, Resources
from tests.lm.architectures import KEEPING, LOSING, built
from tests.lm.test_numerics import CONFIGS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", [*KEEPING, *CONFIGS])
def test_a_model_that_draws_alike_in_every_batch_is_taken(name: str) -> None:
    model = built(copy.deepcopy((KEEPING | CONFIGS)[name])).train()
    before = model.generation_config
    check_batches(model, name, torch.float32)
    assert model.training and model.generation_config is before


@pytest.mark.parametrize("name", LOSING)
def test_a_model_that_reads_padding_or_forgets_is_refused(name: str) -> None:
    model = built(LOSING[name])
    with pytest.raises(
        ModelError, match=rf"^{name}: \w+ answers a prompt in a batch by other prob"
    ):
        check_batches(model, name, torch.float32)


def test_a_policy_is_checked_when_it_is_loaded(tmp_path: Path, resources: Resources) -> None:
    built(LOSING["rwkv"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"RwkvForCausalLM answers a prompt in a batch by other"):
        models.load_policy(tmp_path, resources)


def test_a_model_that_cannot_be_drawn_from_is_told_in_one_line() -> None:
    model = built(xLSTMConfig(vocab_size=90, hidden_size=64, num_heads=4, num_blocks=2))
    with pytest.raises(ModelError, match=r"^it: xLSTMForCausalLM cannot answer a batch of prompts"):
        check_batches(model, "it", torch.float32)


@pytest.mark.parametrize("engine", ["refill", "continuous"])
@pytest.mark.parametrize("name", KEEPING)
def test_an_engine_refuses_a_state_that_it_cannot_hand_on(
    name: str, engine: EngineName, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> None:
    request = Request([[3, 4], [5]], [0, 1], 0, [2], 4, 2)
    with pytest.raises((ModelError, ParamsError), match=rf"^resources.engine {engine}: .*generate"):
        ENGINES[engine](built(KEEPING[name]), tokenizer, request, resources)

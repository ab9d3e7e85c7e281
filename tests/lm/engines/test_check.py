"""A model whose batches are not its own answers is refused before anything is drawn from it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, xLSTMConfig

from dualign.core.errors import ModelError, ParamsError
from dualign.lm import models
from dualign.lm.engines import check
from dualign.lm.engines.check import check_batches
from dualign.lm.engines.interface import Request
from dualign.lm.engines.table import ENGINES
from dualign.params.base import EngineName, Resources
from tests.lm.architectures import KEEPING, LOSING, built
from tests.lm.test_numerics import CONFIGS
from tests.tiny import on_cpu

pytestmark = pytest.mark.usefixtures("one_thread")


def checked(model: PreTrainedModel, name: str) -> None:
    check_batches(model, name, torch.float32, lambda: model)


@pytest.mark.parametrize("name", [*KEEPING, *CONFIGS])
def test_a_model_that_draws_alike_in_every_batch_is_taken(name: str) -> None:
    model = built(copy.deepcopy((KEEPING | CONFIGS)[name])).train()
    before = model.generation_config
    checked(model, name)
    assert model.training and model.generation_config is before


@pytest.mark.parametrize("name", LOSING)
def test_a_model_that_reads_padding_or_forgets_is_refused(name: str) -> None:
    with pytest.raises(
        ModelError, match=rf"^{name}: \w+ says other things of a text in a padded batch"
    ):
        checked(built(LOSING[name]), name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["rwkv", "minimax"])
def test_a_policy_is_checked_when_it_is_loaded(name: str, precision: Any, tmp_path: Path) -> None:
    built(LOSING[name]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"ForCausalLM says other things of a text in a padded"):
        models.load_policy(tmp_path, on_cpu(precision=precision))


def test_what_rounding_alone_turns_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random hybrid is off by some thousandths of a nat in bf16, others by more than is taken."""
    built(copy.deepcopy(KEEPING["qwen3_next"])).save_pretrained(tmp_path)
    monkeypatch.setattr(check, "BOUND", check.BOUND | {torch.bfloat16: 1e-3})
    models.load_policy(tmp_path, on_cpu(precision="bf16"))


def test_a_model_that_cannot_be_drawn_from_is_told_in_one_line() -> None:
    model = built(xLSTMConfig(vocab_size=90, hidden_size=64, num_heads=4, num_blocks=2))
    with pytest.raises(ModelError, match=r"^it: xLSTMForCausalLM cannot read a padded batch"):
        checked(model, "it")


@pytest.mark.parametrize("engine", ["refill", "continuous"])
@pytest.mark.parametrize("name", KEEPING)
def test_an_engine_refuses_a_state_that_it_cannot_hand_on(
    name: str, engine: EngineName, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> None:
    request = Request([[3, 4], [5]], [0, 1], 0, [2], 4, 2)
    with pytest.raises((ModelError, ParamsError), match=rf"^resources.engine {engine}: .*generate"):
        ENGINES[engine](built(KEEPING[name]), tokenizer, request, resources)

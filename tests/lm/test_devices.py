"""What computes in bf16, as a GPU does if nothing is said: on a CPU, and on a GPU where there is
one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dualign.lm import models
from dualign.lm.engines.check import check
from dualign.lm.engines.interface import Request
from dualign.lm.engines.table import ENGINES
from dualign.params.base import EngineName, Resources
from tests.lm.test_numerics import CONFIGS, LORA
from tests.tiny import DEVICES, on_cpu

pytestmark = pytest.mark.usefixtures("one_thread")

REQUEST = Request(
    prompts=[[4, 5, 6], [7, 8]] * 3,
    seeds=list(range(6)),
    seed=1,
    ends=[2],
    max_new_tokens=8,
    batch_size=4,
)


@pytest.fixture(params=DEVICES)
def in_bf16(request: pytest.FixtureRequest) -> Resources:
    """bf16 on each device."""
    return on_cpu(device=request.param, precision="bf16")


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    model.save_pretrained(str(folder))
    return folder


def policy(folder: Path, kind: str, how: Resources) -> Any:
    model = models.load_policy(folder, how, trained=kind == "trained")
    return models.with_lora(model, LORA, 0) if kind == "lora" else model


@pytest.mark.parametrize("kind", ["frozen", "trained", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("engine", ["generate", "refill", "continuous"])
def test_every_engine_draws_from_every_policy(
    engine: EngineName,
    name: str,
    kind: str,
    in_bf16: Resources,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """Weights that are trained are fp32, and Qwen3 norms its keys in fp32: neither is the
    precision that keys and values come in."""
    own = in_bf16.model_copy(update={"engine": engine})
    model = policy(saved(name, tmp_path), kind, own)
    answers = ENGINES[engine](model, tokenizer, REQUEST, own)
    check(model, REQUEST, answers, own)
    assert {next(model.parameters()).device.type} == {own.device}
    assert len(answers) == 6 and all(0 < len(answer.tokens) <= 8 for answer in answers)

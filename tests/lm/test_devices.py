"""What computes in bf16, as a GPU does if nothing is said: on a CPU, and on a GPU where there is
one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dualign.lm import models
from dualign.lm.engines.check import check
from dualign.lm.engines.interface import Request
from dualign.lm.engines.table import ENGINES
from dualign.lm.numerics import Fp32Head, answer_log_probabilities, padded_rows
from dualign.lm.packing import enable_packing, packed_log_probabilities
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


PROMPTS = [[4, 5, 6], [9, 8], [4, 5, 6], [9, 8], [9, 8]]
ANSWERS = [[7, 8, 2], [5], [9, 2], [3, 4, 5, 6, 2], [2, 7, 11]]


def padded(model: Any) -> list[tuple[Tensor, ...]]:
    """Each answer as a row of its own."""
    device = next(model.parameters()).device
    made = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        ids, mask, labels = padded_rows([prompt], [answer], 0)
        made.append((ids.to(device), mask.to(device), labels.to(device)))
    return made


def gradients(model: Any, logps: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum, by weight; none where nothing is trained."""
    model.zero_grad()
    if not logps.requires_grad:
        return {}
    (logps * torch.arange(1.0, 6.0, device=logps.device)).sum().backward()
    named = model.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


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


@pytest.mark.parametrize("device", DEVICES)
def test_the_head_multiplies_what_bf16_holds_in_fp32(device: str) -> None:
    """Values to rounding of sums, gradients to bf16's, both against fp64; what is set for it is set
    back."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 5, 64, generator=generator).to(device).requires_grad_()
    weight = torch.randn(90, 64, generator=generator).to(device)
    bias = torch.randn(90, generator=generator).to(device)
    given = torch.randn(3, 5, 90, generator=generator).to(device)
    head = Fp32Head(64, 90)
    head.weight, head.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    before = torch.backends.cuda.matmul.fp32_precision
    with torch.autocast(device, torch.bfloat16):
        found = head(states)
    (found * given).sum().backward()
    assert torch.backends.cuda.matmul.fp32_precision == before
    exact = states.detach().bfloat16().double().requires_grad_()
    matrix = weight.bfloat16().double().requires_grad_()
    expected = exact @ matrix.t() + bias.double()
    (expected * given.double()).sum().backward()
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-4)
    for gradient, wanted in ((states.grad, exact.grad), (head.weight.grad, matrix.grad)):
        assert gradient is not None and wanted is not None
        assert (gradient.double() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("kind", ["frozen", "trained", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_rows_are_those_of_padded_ones(
    name: str, kind: str, in_bf16: Resources, tmp_path: Path
) -> None:
    """Values and gradients, to the rounding of bf16; on a GPU by flash attention."""
    model = policy(saved(name, tmp_path), kind, in_bf16).train()
    expected = torch.cat([answer_log_probabilities(model, *rows) for rows in padded(model)])
    wanted = gradients(model, expected)
    assert enable_packing(model)
    found = packed_log_probabilities(model, PROMPTS, ANSWERS)
    assert torch.allclose(found, expected, rtol=0.02, atol=0.05) and expected.abs().max() > 5
    got = gradients(model, found)
    for key, gradient in wanted.items():
        assert (got[key] - gradient).norm() < 0.1 * gradient.norm() + 1e-4, key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_ligers_kernels_compute_the_same(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("liger_kernel")
    how = on_cpu(device="cuda", precision=precision)
    folder = saved(name, tmp_path)
    with monkeypatch.context() as without:
        without.setattr("dualign.lm.kernels.is_liger_kernel_available", lambda: False)
        plain = policy(folder, "trained", how)
        expected = torch.cat([answer_log_probabilities(plain, *rows) for rows in padded(plain)])
        wanted = gradients(plain, expected)
    model = policy(folder, "trained", how)
    assert "Liger" in repr(model.model.norm.forward)
    found = torch.cat([answer_log_probabilities(model, *rows) for rows in padded(model)])
    close = 1e-4 if precision == "fp32" else 0.02
    assert torch.allclose(found, expected, rtol=close, atol=close)
    got = gradients(model, found)
    for key, gradient in wanted.items():
        assert (got[key] - gradient).norm() < 5 * close * gradient.norm() + 1e-4, key


@pytest.mark.parametrize("device", DEVICES)
def test_draws_outside_go_on_as_if_none_had_been_made(device: str) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3, device=device)
    torch.manual_seed(1)
    with models.seeded(5):
        inside = torch.rand(3, device=device)
    assert torch.equal(torch.rand(3, device=device), expected) and not torch.equal(inside, expected)

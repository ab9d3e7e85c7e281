"""Products by oneDNN are those of torch, with their gradients, and are taken where they pay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dualign.lm import onednn
from dualign.lm.numerics import in_precision
from dualign.lm.onednn import OneDnnLinear, through_onednn
from dualign.params.base import Resources
from tests.lm.test_numerics import built

there = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN"
)


def layer(bias: bool = True, width: int = 128) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(width, 160, bias=bias)


def computed(linear: torch.nn.Linear, x: Tensor) -> list[Tensor]:
    """What a layer gives for x, and the gradients of x and of its weights."""
    x = x.clone().requires_grad_()
    linear.zero_grad()
    result = linear(x)
    (result * torch.linspace(-1, 1, result.numel()).reshape(result.shape)).sum().backward()
    grads = [weight.grad for weight in linear.parameters() if weight.requires_grad]
    return [result.detach(), x.grad, *grads]  # type: ignore[list-item]


@there
@pytest.mark.parametrize("shape", [(40, 128), (2, 20, 128), (1, 3, 128), (0, 128)])
@pytest.mark.parametrize("kind", ["bias", "no bias", "frozen", "turned", "fp64"])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...], kind: str) -> None:
    plain = layer(kind != "no bias")
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    if kind == "turned":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "fp64":
        plain = plain.double()
        x = x.double()
    if kind == "frozen":
        plain.requires_grad_(False)
    ours = copy.deepcopy(plain)
    through_onednn(ours)
    assert type(ours) is OneDnnLinear
    for found, expected in zip(computed(ours, x), computed(plain, x), strict=True):
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)


@there
def test_a_layer_of_few_rows_multiplies_as_before() -> None:
    plain = layer()
    ours = layer()
    through_onednn(ours)
    x = torch.randn(onednn.ROWS - 1, 128)
    assert torch.equal(plain(x), ours(x))


def test_narrow_layers_keep_their_class() -> None:
    model = torch.nn.Sequential(layer(), layer(width=onednn.WIDTH - 1))
    through_onednn(model)
    assert [type(part) for part in model] == [OneDnnLinear, torch.nn.Linear]


@there
@pytest.mark.parametrize(
    ("capability", "intel", "expected"),
    [("AVX512", False, True), ("AVX512", True, False), ("AVX2", False, False)],
)
def test_it_is_for_avx_512_where_mkl_does_not_use_it(
    monkeypatch: pytest.MonkeyPatch, capability: str, intel: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(onednn, "_of_intel", lambda: intel)
    assert onednn.faster.__wrapped__() is expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loaded_model_takes_it_in_fp32_alone(
    monkeypatch: pytest.MonkeyPatch, resources: Resources, precision: Any
) -> None:
    monkeypatch.setattr(onednn, "faster", lambda: True)
    monkeypatch.setattr(onednn, "WIDTH", 8)
    given = resources.model_copy(update={"precision": precision})
    model = in_precision(built("llama"), given, trained=True)
    taken = any(type(part) is OneDnnLinear for part in model.modules())
    assert taken is (precision == "fp32")

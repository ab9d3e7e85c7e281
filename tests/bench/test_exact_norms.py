"""Norms that compute in float64 where the model does."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.harness.exact_norms import exact_norms


@torch.no_grad()
def test_norms_are_those_of_transformers_but_for_its_rounding_to_float32() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=4, **sizes)
    model = LlamaForCausalLM(config).double().eval()
    ids = torch.arange(8).unsqueeze(0)
    states = torch.randn(5, 64, dtype=torch.float64)
    truth = states / (states.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    rounded = model.model.norm(states)
    logits = model(ids).logits
    exact_norms(model)
    assert torch.allclose(model.model.norm(states), truth, rtol=0, atol=1e-14)
    assert not torch.allclose(rounded, truth, rtol=0, atol=1e-9)
    assert torch.allclose(model(ids).logits, logits, rtol=0, atol=1e-5)
    assert not torch.equal(model(ids).logits, logits)  # all norms, not the last alone

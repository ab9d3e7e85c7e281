"""Shapes of bases against counts of real models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.cost.base import base_of, decoder, typical
from pipeline.errors import PipelineError

SMALL = LlamaConfig(
    vocab_size=320, hidden_size=32, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_model(tmp_path: Path, tied: bool) -> None:
    SMALL.tie_word_embeddings = tied
    model = LlamaForCausalLM(SMALL)
    model.config.save_pretrained(str(tmp_path / "small"))
    base = base_of({"sft": {"base": "small"}}, tmp_path)
    assert base.weights == sum(weight.numel() for weight in model.parameters())
    assert base.head == 32 * 320 and base.kv == 16 and base.inner == 80


def test_a_model_of_another_family() -> None:
    config = GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    base = decoder("gpt2", {**config.to_dict()})
    model = GPT2LMHeadModel(config)
    matrices = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if ".h." in name and weight.dim() > 1
    )
    assert base.body == matrices == 2 * 12 * 16 * 16
    assert base.tied


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_adapters_are_those_of_peft(targets: str | list[str]) -> None:
    base = decoder("small", SMALL.to_dict())
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(SMALL), lora)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert base.adapters(4, targets) == trained


def test_a_scratch_base_is_read_from_params(tmp_path: Path) -> None:
    small = {
        "vocab_size": 2048, "hidden_size": 48, "layers": 2, "heads": 4, "intermediate_size": 96,
    }  # fmt: skip
    base = base_of({"sft": {"base": "scratch", "scratch": small}}, tmp_path)
    # 4 h^2 and 3 h i of matrices in each layer, an embedding that is the head, five norms
    assert base.weights == 2 * (4 * 48 * 48 + 3 * 48 * 96) + 2048 * 48 + 5 * 48


@pytest.mark.parametrize("wanted", [2e8, 1e9, 8e9, 70e9])
def test_a_typical_shape_has_about_as_many_weights(wanted: float) -> None:
    assert 1 <= typical(wanted).weights / wanted < 1.2


def test_what_is_not_here_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"no config.json of it is here.*--parameters"):
        base_of({"sft": {"base": "owner/name"}}, tmp_path)
    (tmp_path / "moe").mkdir()
    content = {**SMALL.to_dict(), "num_local_experts": 8}
    (tmp_path / "moe" / "config.json").write_text(json.dumps(content, default=str))
    with pytest.raises(PipelineError, match=r"mixture of experts.*--parameters"):
        base_of({"sft": {"base": "moe"}}, tmp_path)
    (tmp_path / "moe" / "config.json").write_text("{}")
    with pytest.raises(PipelineError, match=r"KeyError: 'hidden_size'"):
        base_of({"sft": {"base": "moe"}}, tmp_path)
    (tmp_path / "moe" / "config.json").write_text("[]")
    with pytest.raises(PipelineError, match=r"no shape of a decoder.*--parameters"):
        base_of({"sft": {"base": "moe"}}, tmp_path)
    with pytest.raises(PipelineError, match="give how many weights"):
        typical(8)

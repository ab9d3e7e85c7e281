"""A base in 4 bits (QLoRA, 2305.14314): NF4 with quantised constants, by bitsandbytes.

`lora.quantise` makes models/sft such a base, which is pi_ref itself: sampled, read and scored in 4
bits by every stage. Adapters on it are trained in the precision of the run, so a policy before its
first step is its reference. What leaves is whole: the weights that 4 bits stand for, with the
adapter folded in."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dualign.core.artifacts import listed
from dualign.core.errors import ModelError

#: What config.json says of such a base.
MARK = "dualign_quantised"
REMEDY = "pip install 'dualign[qlora]', or set lora.quantise to null"


def check_installed(what: str) -> None:
    """Raise ModelError, in one line about `what`, where bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"{what}: 4 bits take bitsandbytes, which is not installed; {REMEDY}")


def quantise(folder: Path) -> None:
    """Put the model in a folder into 4 bits: all matrices of its layers, not embeddings or head."""
    check_installed(str(folder))
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype="auto", quantization_config=config
    )
    for file in listed(folder, "model*.safetensors*"):
        file.unlink()
    model.config._name_or_path = ""
    setattr(model.config, MARK, True)
    model.save_pretrained(str(folder))


def is_quantised(model: Any) -> bool:
    """Whether some weights of a model are in 4 bits."""
    return any(_in_4_bits(weight) for weight in model.parameters())


def cast(model: Any, computed: torch.dtype, kept: set[torch.Tensor]) -> Any:
    """A model that multiplies in `computed`: its matrices that are not in 4 bits are of it, weights
    of one dimension and those in `kept` fp32."""
    for weight in model.parameters():
        if not _in_4_bits(weight):
            narrow = weight.dim() > 1 and weight not in kept
            weight.data = weight.data.to(computed if narrow else torch.float32)
    for module in model.modules():
        if _in_4_bits(getattr(module, "weight", None)):
            module.compute_dtype = computed
            module.compute_type_is_set = True
            # Or a CPU would lay the weights out anew, for all who share them, and without gradients
            # multiply in bf16 what it multiplies in fp32 with them.
            module.support_avx512bf16_for_cpu = False
    return model


def folded(model: Any) -> Any:
    """The fp32 model that 4 bits stand for, with the adapter of the PeftModel `model`, which is
    spent."""
    changes = {
        name: layer.get_delta_weight("default").float()
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    plain = model.unload()
    for name, module in list(plain.named_modules()):
        if _in_4_bits(getattr(module, "weight", None)):
            plain.set_submodule(name, _plain(module))
    for name, change in changes.items():
        plain.get_submodule(name).weight.data += change
    plain.__dict__.pop("_weight_conversions", None)
    for left in (MARK, "quantization_config", "_pre_quantization_dtype"):
        plain.config.__dict__.pop(left, None)
    plain.is_quantized = False
    plain.hf_quantizer = None
    plain.config.dtype = torch.float32
    return plain.float()


def _plain(module: Any) -> torch.nn.Linear:
    """The fp32 layer that one of 4 bits stands for."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    made = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
    made.weight = torch.nn.Parameter(weight)
    if module.bias is not None:
        made.bias = torch.nn.Parameter(module.bias.float())
    return made


def _in_4_bits(weight: Any) -> bool:
    return getattr(weight, "quant_state", None) is not None

"""Small random models of architectures whose layers keep other things than keys and values."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    MiniMaxConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

_SMALL: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS: dict[str, Any] = {
    **_SMALL,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LINEAR = ["linear_attention", "full_attention"]

#: Those whose batches, padded on the left, say of each row what a pass over it alone does.
KEEPING: dict[str, PretrainedConfig] = {
    "mamba": MambaConfig(**_SMALL, state_size=4),
    "mamba2": Mamba2Config(**_SMALL, state_size=8, num_heads=8, head_dim=8, n_groups=1),
    "falcon_h1": FalconH1Config(
        **_HEADS,
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        lm_head_multiplier=0.3,
    ),
    "lfm2": Lfm2Config(**_HEADS, layer_types=["conv", "full_attention"]),
    "qwen3_next": Qwen3NextConfig(
        **_HEADS,
        **_EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=24,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=_LINEAR,
    ),
}
#: Those that read padding, or whose steps are not what one pass is.
LOSING: dict[str, PretrainedConfig] = {
    "rwkv": RwkvConfig(**_SMALL, context_length=128),
    "minimax": MiniMaxConfig(**_HEADS, num_local_experts=4, block_size=8, layer_types=_LINEAR),
    "recurrent_gemma": RecurrentGemmaConfig(
        **_HEADS, lru_width=32, block_types=["recurrent", "attention"]
    ),
}


def built(config: PretrainedConfig) -> PreTrainedModel:
    """A model whose every weight tells: those that begin at 0 or 1 would hide a state."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.15 * torch.randn(weight.shape))
    return model

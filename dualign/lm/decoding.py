"""How answers are drawn, as transformers writes it down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

#: What is the tokenizer's, however answers are drawn.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
#: What says nothing of how answers are drawn.
_BESIDES = {
    *_TOKENS,
    "_from_model_config",
    "transformers_version",
    "use_cache",
    "cache_implementation",
}


def drawing(temperature: float = 1.0, top_p: float = 1.0, **others: Any) -> GenerationConfig:
    """Draws at a temperature and a top-p, by default from the policy itself, without any penalty;
    at temperature 0 the likeliest token. `others` are settings beside.

    >>> drawing(0.0).do_sample, drawing(0.7).top_k
    (False, 0)
    """
    if temperature == 0:
        return GenerationConfig(do_sample=False, **others)
    return GenerationConfig(do_sample=True, temperature=temperature, top_p=top_p, top_k=0, **others)


def instead_of(
    own: GenerationConfig, temperature: float = 1.0, top_p: float = 1.0
) -> GenerationConfig:
    """The same tokens, drawn in that way."""
    tokens = {name: getattr(own, name, None) for name in _TOKENS}
    return drawing(temperature, top_p, **tokens)


def beside(own: GenerationConfig) -> dict[str, Any]:
    """What a configuration asks for that is not in draws from the policy itself.

    >>> beside(GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=2))
    {'temperature': 0.7}
    """
    plain = instead_of(own).to_dict()
    asked = own.to_diff_dict().items()
    return {
        name: value for name, value in asked if name not in _BESIDES and plain.get(name) != value
    }


def rewrite(folder: Path, temperature: float, top_p: float) -> None:
    """Have the generation_config.json of a policy's folder say how its answers were drawn."""
    own = GenerationConfig.from_pretrained(folder)
    instead_of(own, temperature, top_p).save_pretrained(folder)

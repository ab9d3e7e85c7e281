"""The shape of a language model, from its config.json: how many weights multiply, and where."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

#: Keys of config.json that other families call otherwise.
_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
}
#: Families whose feed-forward has two matrices; the others gate with a third.
_UNGATED = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "bloom", "falcon", "starcoder2")
#: Hidden size over layers of a model of which the weights are all that is known: 128 in GPT-3 and
#: in Llama 7B.
_ASPECT = 128
#: Its vocabulary, and the width of its attention heads.
_VOCABULARY = 32_000
_HEAD = 64


@dataclass(frozen=True)
class Base:
    """A decoder: `linears` are the matrices of one layer as (name, in, out), `head` the weights of
    the matrix over the vocabulary, `embedded` those of an embedding that is not the head too;
    `width` is that of the attention, `kv` that of its keys.
    """

    name: str
    layers: int
    hidden: int
    width: int
    kv: int
    vocabulary: int
    linears: tuple[tuple[str, int, int], ...]
    tied: bool = True

    @property
    def body(self) -> int:
        """Weights of all matrices but the head."""
        return self.layers * sum(into * out for _, into, out in self.linears)

    @property
    def head(self) -> int:
        """Weights of the matrix over the vocabulary."""
        return self.hidden * self.vocabulary

    @property
    def weights(self) -> int:
        """All weights: matrices, embedding, norms."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.body + self.head * (1 if self.tied else 2) + norms

    @property
    def inner(self) -> int:
        """The width of the feed-forward."""
        return max(out for _, _, out in self.linears)

    def adapters(self, rank: int, targets: object) -> int:
        """Weights of LoRA adapters: rank (in + out) for each matrix that is named (2106.09685)."""
        named = [
            into + out
            for name, into, out in self.linears
            if not isinstance(targets, list) or name in targets
        ]
        return self.layers * rank * sum(named)


def base_of(params: Mapping[str, Any], root: Path, parameters: float | None = None) -> Base:
    """The base of a run: a typical shape of so many `parameters` where these are given, else what
    `sft` says, whose config.json is read.

    Raises PipelineError where that is not here.
    """
    if parameters is not None:
        return typical(parameters)
    sft = params["sft"]
    if sft["base"] == "scratch":
        small = sft["scratch"]
        config = {"num_hidden_layers": small["layers"], "num_attention_heads": small["heads"]}
        return decoder("scratch", {**config, **small, "tie_word_embeddings": True})
    file = root / str(sft["base"]) / "config.json"
    if not file.is_file():
        raise PipelineError(
            f"sft.base {sft['base']}: no config.json of it is here, so its shape is not known; give"
            " --parameters, such as 8e9"
        )
    try:
        return decoder(str(sft["base"]), json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(
            f"{file}: no shape of a decoder can be read from it ({type(error).__name__}: {error});"
            " give --parameters, such as 8e9"
        ) from None


def decoder(name: str, config: Mapping[str, Any]) -> Base:
    """The shape that a config.json describes. Raises KeyError for a key that is missing, ValueError
    for a mixture of experts.
    """
    config = config.get("text_config", config)
    if any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise ValueError("a mixture of experts computes with a part of its weights")
    hidden = _number(config, "hidden_size")
    heads = _number(config, "heads")
    size = config.get("head_dim") or hidden // heads
    kv = (config.get("num_key_value_heads") or heads) * size
    inner = _number(config, "intermediate_size", 4 * hidden)
    gate = () if config.get("model_type") in _UNGATED else (("gate_proj", hidden, inner),)
    linears = (
        ("q_proj", hidden, heads * size),
        ("k_proj", hidden, kv),
        ("v_proj", hidden, kv),
        ("o_proj", heads * size, hidden),
        *gate,
        ("up_proj", hidden, inner),
        ("down_proj", inner, hidden),
    )
    tied = bool(config.get("tie_word_embeddings", config.get("model_type") in _UNGATED))
    layers = _number(config, "layers")
    return Base(name, layers, hidden, heads * size, kv, int(config["vocab_size"]), linears, tied)


def typical(parameters: float) -> Base:
    """The smallest Llama of at least so many weights, 12 L h^2 of them in layers (2001.08361, table
    1), with h = 128 L.

    >>> round(typical(7e9).weights / 1e9, 1)
    7.3
    """
    if not 1e6 <= parameters <= 1e13:
        raise PipelineError(f"--parameters {parameters:g}: give how many weights, such as 8e9")
    made = (_llama(f"a model of {parameters:.3g} weights", size) for size in itertools.count(1))
    return next(base for base in made if base.weights >= parameters)


def _llama(name: str, size: int) -> Base:
    """A Llama of `size` attention heads."""
    hidden = _HEAD * size
    config = {
        "hidden_size": hidden,
        "num_attention_heads": size,
        "num_hidden_layers": max(1, hidden // _ASPECT),
        "intermediate_size": round(8 * hidden / 3),
        "vocab_size": _VOCABULARY,
        "tie_word_embeddings": False,
    }
    return decoder(name, config)


def _number(config: Mapping[str, Any], what: str, usual: int | None = None) -> int:
    """A number by any of its names, else the usual one. Raises KeyError with the first name."""
    found = next((config[name] for name in _NAMES[what] if config.get(name)), usual)
    if found is None:
        raise KeyError(_NAMES[what][0])
    return int(found)

"""Weights from a folder, a hub or a GGUF file: all there, finite, in shape, or an error by name."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from dualign.core.artifacts import listed
from dualign.core.errors import ModelError, ParamsError
from dualign.lm.quantised import MARK, check_installed

log = logging.getLogger(__name__)

_POINTER = b"version https://git-lfs"
_NAMED = 3  # weights that an error names
#: What a configuration may ask a forward pass to return, as everything here reads it.
_RETURNED = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
}
#: Configuration keys that hold the longest sequence that a model can read.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def require(path: str | Path) -> None:
    """A path that looks local must exist; what is left is a hub id. Raises ModelError."""
    local = str(path).startswith((".", "/", "models/")) or Path(path).exists()
    if local and not Path(path).is_dir():
        raise ModelError(
            f"{path}: no such model folder; run the stage that writes it, or correct the path"
        )


def load_model(auto: Any, path: str | Path, **options: Any) -> PreTrainedModel:
    """The model alone of `load_reported`, which takes the same options."""
    return load_reported(auto, path, **options)[0]


def load_reported(
    auto: Any,
    path: str | Path,
    *,
    dtype: torch.dtype | str,
    revision: str | None = None,
    gguf_file: str | None = None,
    fresh: Sequence[str] = (),
    **options: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """A model of the class `auto` (one of transformers' AutoModel classes) with every weight of the
    checkpoint.

    `fresh` names prefixes of weights that may be missing, such as a scorer's head; those that were
    come back beside the model. `dtype` "auto" keeps the stored one.

    Raises:
        ModelError: no such model, weights missing, damaged, of other shapes or not finite, a
            quantised base, or one that needs code of its own.
    """
    require(path)
    if (Path(path) / "adapter_config.json").is_file():
        raise ModelError(
            f"{path}: holds an adapter; name its base, or a folder that has it folded in"
        )
    check_files(Path(path))
    config = load_config(path, revision, gguf_file)
    _check_kind(auto, path, config)
    options |= {"gguf_file": gguf_file} if gguf_file else {"config": _with(config, options)}
    try:
        model, report = auto.from_pretrained(
            str(path),
            revision=revision,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except Exception as error:  # transformers, safetensors and torch raise many kinds here
        raise ModelError(
            f"{path}: cannot be loaded as {_what(auto)} ({first_line(error)}); is the folder"
            " complete?"
        ) from error
    _check_report(path, report, fresh)
    if not getattr(config, MARK, False):  # which stores scales beside its weights
        _check_unused(path, model, sorted(report["unexpected_keys"]))
    if dtype == "auto" and not gguf_file:
        _as_stored(files_of(path, revision), model)
    _check_finite(path, model)
    _keep_head(path, model)
    return (_plain(model) if gguf_file else model), sorted(report["missing_keys"])


def files_of(path: str | Path, revision: str | None = None) -> Path:
    """The folder that holds a model's files: its own, or that of what was fetched for a hub id."""
    return Path(str(cached_file(str(path), "config.json", revision=revision))).parent


def load_config(
    path: str | Path, revision: str | None = None, gguf_file: str | None = None
) -> PretrainedConfig:
    """A model's configuration. Raises ModelError where it needs foreign code or others quantised
    it."""
    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(
            str(path), revision=revision, trust_remote_code=False, **options
        )
    except Exception as error:  # as above
        raise ModelError(f"{path}: {_refusal(error)}") from error
    for name, value in _RETURNED.items():
        if hasattr(config, name):
            setattr(config, name, value)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and not gguf_file:
        if getattr(config, MARK, False):
            check_installed(str(path))
            return config
        noted = isinstance(quantised, dict)
        method = quantised.get("quant_method") if noted else type(quantised).__name__
        raise ModelError(
            f"{path}: the weights are quantised ({method}) and cannot be trained; take the"
            " unquantised ones"
        )
    return config


def check_causal(model: Any, path: str | Path, precision: torch.dtype) -> None:
    """Refuse a model whose probability of a token depends on those after it, by more than rounding
    in the precision that it computes in.

    Encoders such as BERT load as causal language models too."""
    model.eval()
    with torch.no_grad():
        rows = [torch.tensor([ids], device=model.device) for ids in ([1, 2, 1, 2], [1, 3, 3, 3])]
        first, second = (
            model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, 0].float()
            for row in rows
        )
    rounding = math.sqrt(torch.finfo(precision).eps) * float(first.abs().max())
    if float((first - second).abs().max()) > rounding:
        raise ModelError(
            f"{path}: {type(model).__name__} reads ahead: its probability of a token depends on the"
            " tokens after it; take a causal language model"
        )


def context_of(model: torch.nn.Module) -> int | None:
    """Tokens that a model can read, whatever else is in its batch; None where its config does not
    say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [getattr(text, key, None) for key in _CONTEXT]
    context = next((int(value) for value in found if isinstance(value, int) and value > 0), None)
    return context and min([context - _first_position(model), *_turned_alike(text)])


def _turned_alike(config: Any) -> list[int]:
    """Longest batches of a model with longrope (Phi-3's of 128k) in which a row's numbers are its
    own: one longer row turns all by the long factors."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    longropes = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    return [kind["original_max_position_embeddings"] for kind in longropes]


def _first_position(model: torch.nn.Module) -> int:
    """The position of a text's first token: RoBERTa's kind counts from behind padding's."""
    padding = [
        getattr(module, "padding_idx", None)
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
    ]
    return next((place + 1 for place in padding if place is not None), 0)


def check_context(model: torch.nn.Module, tokens: int, what: str, remedy: str = "lower it") -> None:
    """Refuse sequences longer than a model can read. Raises ParamsError: `what` is that long."""
    context = context_of(model)
    if context is not None and tokens > context:
        raise ParamsError(
            f"{what}: {tokens} tokens, but the context of {name_of(model)} is {context}; {remedy}"
        )


def name_of(model: torch.nn.Module) -> str:
    """Where a model is from, as messages call it."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "the model")


def with_adapter(model: PreTrainedModel, path: str | Path) -> PeftModel:
    """The model with the adapter in folder `path`. Raises ModelError where they do not fit."""
    check_files(Path(path))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(model, str(path), is_trainable=True)
        except Exception as error:  # peft raises many kinds here
            raise ModelError(
                f"{path}: the adapter does not fit its base ({first_line(error)})"
            ) from error
    missing = [str(one.message) for one in told if "missing adapter keys" in str(one.message)]
    if missing:
        raise ModelError(f"{path}: the adapter does not fit its base ({missing[0][:200]})")
    _check_used(Path(path), adapted)
    _check_finite(path, adapted)
    return adapted


def _check_used(folder: Path, adapted: PeftModel) -> None:
    """Every adapter weight of the file has its place in the model."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return
    with safe_open(file, "pt") as stored:
        held = {name for name in stored.keys() if "lora_" in name}  # noqa: SIM118
    unused = sorted(held - set(get_peft_model_state_dict(adapted, save_embedding_layers=False)))
    if unused:
        raise ModelError(
            f"{folder}: the adapter does not fit its base, which has no place for {_some(unused)}"
        )


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, short."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _with(config: PretrainedConfig, options: dict[str, Any]) -> PretrainedConfig:
    """The configuration with what belongs to it, such as `num_labels`, taken out of `options`."""
    for key in [key for key in options if hasattr(config, key)]:
        setattr(config, key, options.pop(key))
    return config


def check_files(folder: Path) -> None:
    """Weights in a folder must be whole, and no pointers. Raises ModelError that names the file."""
    for file in listed(folder, "*.safetensors") + listed(folder, "*.bin"):
        try:
            with file.open("rb") as stream:
                head = stream.read(len(_POINTER))
        except OSError as error:
            raise ModelError(
                f"{file}: cannot be read ({error.strerror}); is it a link to a file that is gone,"
                " or another user's?"
            ) from error
        if head == _POINTER:
            raise ModelError(
                f"{file}: is a git-lfs pointer and not the weights; run git lfs pull in that folder"
            )
        if file.suffix == ".safetensors":
            _check_length(file)
    if not (folder / "model.safetensors").is_file():
        for index in listed(folder, "model.safetensors.index.json"):
            _check_shards(index)


def _check_shards(index: Path) -> None:
    """Every shard that an index names is there."""
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{index}: is no index of shards ({first_line(error)}); download it again"
        ) from error
    gone = next(
        (name for name in sorted(map(str, shards)) if not (index.parent / name).is_file()), None
    )
    if gone is not None:
        raise ModelError(
            f"{index.parent / gone}: is missing, though {index.name} names it; download it again"
        )


def _check_length(file: Path) -> None:
    """A safetensors file is as long as its header says."""
    try:
        with safe_open(file, "pt"):
            return
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: is cut short or damaged; download it again") from error


def _check_report(path: str | Path, report: dict[str, Any], fresh: Sequence[str]) -> None:
    """Refuse weights that the checkpoint lacks or has in other shapes."""
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(tuple(fresh)))
    other = sorted(
        str(row[0]) if isinstance(row, tuple) else str(row) for row in report["mismatched_keys"]
    )
    unused = sorted(report["unexpected_keys"])
    if other:
        raise ModelError(
            f"{path}: {_some(other)} have other shapes in the checkpoint than config.json says;"
            " mend either"
        )
    if missing:
        hint = ""
        if unused:
            hint = f"; it holds {_some(unused)} instead, so the weights may be another model's"
        raise ModelError(
            f"{path}: the checkpoint lacks {_some(missing)}, which would be random{hint}; take the"
            " whole checkpoint"
        )


def _check_unused(path: str | Path, model: PreTrainedModel, unused: Sequence[str]) -> None:
    """Refuse weights that are left out of layers which compute without them, such as biases that
    config.json does not name; of other weights that a policy has no place for a warning tells.

    Heads of other kinds, on whose weights nothing here depends, come with many checkpoints."""
    base: Any = model.base_model
    layers = {name for name, one in base.named_modules() if [*one.parameters(recurse=False)]}
    prefix = f"{model.base_model_prefix}."
    lost = [name for name in unused if name.removeprefix(prefix).rpartition(".")[0] in layers]
    if lost:
        raise ModelError(
            f"{path}: the checkpoint holds {_some(lost)}, which these layers do not take by"
            " config.json; mend it (attention_bias, say), or take another checkpoint"
        )
    if unused and model.get_output_embeddings() is not None:
        log.warning("%s: the model has no place for %s, which are left out", path, _some(unused))


def _as_stored(folder: Path, model: PreTrainedModel) -> None:
    """Keep weights that a folder stores in fp32, as a scorer's head: "auto" rounds all alike."""
    weights = dict(model.named_parameters())
    narrow = {name for name, weight in weights.items() if weight.dtype != torch.float32}
    wide = stored(folder, lambda name, dtype: name in narrow and dtype == "F32") if narrow else {}
    for name, weight in wide.items():
        weights[name].data = weight


def stored(folder: Path, wanted: Callable[[str, str], bool]) -> dict[str, Tensor]:
    """The tensors that are `wanted` by name and type, "F32" where it is fp32, of the files that
    transformers reads in a folder.
    """
    tensors: dict[str, Tensor] = {}
    files = listed(folder, "*.safetensors")
    for file in files:
        with safe_open(file, "pt") as held:
            for name in held.keys():  # noqa: SIM118
                if wanted(name, held.get_slice(name).get_dtype()):
                    tensors[name] = held.get_tensor(name)
    for file in [] if files else listed(folder, "pytorch_model*.bin"):
        zipped = is_zipfile(file)  # since PyTorch 1.6; others cannot be mapped
        pickled = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
        for name, tensor in pickled.items():
            if wanted(name, "F32" if tensor.dtype is torch.float32 else ""):
                tensors[name] = tensor.clone()
    return tensors


def _keep_head(path: str | Path, model: PreTrainedModel) -> None:
    """Let config.json say of the head what the checkpoint does: transformers keeps one that differs
    from the embeddings, and ties it after all once the vocabulary grows."""
    head = model.get_output_embeddings()
    words = model.get_input_embeddings()
    configs = [model.config, model.config.get_text_config()]
    tied = [one for one in configs if getattr(one, "tie_word_embeddings", False)]
    if not tied or head is None or head.weight is words.weight:
        return
    log.warning(
        "%s: config.json ties the head to the embeddings, but the checkpoint has a head of its own,"
        " which is kept",
        path,
    )
    for config in tied:
        config.tie_word_embeddings = False


def not_finite(model: torch.nn.Module) -> list[str]:
    """Names of the weights that hold NaN or infinity."""
    weights = model.named_parameters()
    return [name for name, weight in weights if not bool(torch.isfinite(weight).all())]


def _check_finite(path: str | Path, model: torch.nn.Module) -> None:
    bad = not_finite(model)
    if bad:
        raise ModelError(
            f"{path}: {_some(bad)} hold NaN or infinite weights; take another checkpoint"
        )


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """A model read from GGUF without its note of a quantisation, which would forbid to save it."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain: PreTrainedModel = type(model)(config)
    state = model.state_dict()
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    for (name, buffer), (_, own) in zip(plain.named_buffers(), model.named_buffers(), strict=True):
        if buffer.is_meta:
            parent, _, leaf = name.rpartition(".")
            plain.get_submodule(parent).register_buffer(leaf, own, persistent=False)
    plain.generation_config = model.generation_config
    return plain


def _check_kind(auto: Any, path: str | Path, config: PretrainedConfig) -> None:
    """Refuse an architecture without such a class in transformers, and an encoder-decoder as a
    causal language model, of which it would take the decoder alone."""
    half = auto.__name__ == "AutoModelForCausalLM" and config.is_encoder_decoder
    if half or type(config) not in auto._model_mapping:
        why = "is an encoder-decoder" if half else f"has no class in transformers as {_what(auto)}"
        raise ModelError(f"{path}: {config.model_type} {why}; take another architecture")


def _refusal(error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "the model needs code of its own repository, which dualign never runs; take a model"
            " whose architecture transformers knows"
        )
    return (
        f"no usable config.json ({first_line(error)}); is the folder complete, and of a kind that"
        " transformers knows?"
    )


def _what(auto: Any) -> str:
    return "a scorer" if "Classification" in auto.__name__ else "a causal language model"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")

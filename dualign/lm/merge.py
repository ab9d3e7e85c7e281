"""Weighted sums of two policies in weight space, (1 - q) a + q b, exact for LoRA too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dualign.core.artifacts import copy_folder, listed, replacing
from dualign.core.errors import ModelError
from dualign.core.records import AdapterConfig, as_row, read_record
from dualign.lm.folders import ADAPTER, adapter_in
from dualign.lm.loading import check_files, load_config

_ADAPTER = "adapter_config.json"


def merge(first: Path, second: Path, q: float, out: Path) -> None:
    """Write (1 - q) first + q second to folder `out`, whole or not at all; q may be above 1.

    Both must be full models of one shape, or adapters on one base, which a published policy has
    beside its weights. Adapters are merged by concatenating ranks, which sums the products B A;
    averaging A and B apart (PEFT's `linear`) would add cross terms. The scale alpha / r stays that
    of the first, so a training that goes on from there moves as far in a step."""
    if all((adapter_in(path) / _ADAPTER).is_file() for path in (first, second)):
        first = adapter_in(first)
        second = adapter_in(second)
    adapters = [(path / _ADAPTER).is_file() for path in (first, second)]
    if adapters[0] != adapters[1]:
        raise ModelError(
            f"{first} and {second}: one is an adapter and the other a full model; train both alike"
        )
    with replacing(out) as folder:
        copy_folder(first, folder, ["*.safetensors", "*.index.json", "README.md", ADAPTER])
        (_merge_adapters if adapters[0] else _merge_weights)(first, second, q, folder)


def _merge_weights(first: Path, second: Path, q: float, out: Path) -> None:
    left = _tensors(first)
    right = _tensors(second)
    _same(left, right, first, second)
    mixed = {name: _mixed(left[name], right[name], q) for name in left}
    if any(mixed[name].dtype != left[name].dtype for name in left):
        shutil.copyfile(second / "config.json", out / "config.json")  # which names the wider type
    save_file(mixed, out / "model.safetensors", metadata={"format": "pt"})


def _mixed(left: torch.Tensor, right: torch.Tensor, q: float) -> torch.Tensor:
    """(1 - q) left + q right, in the wider of their types: a base in bf16 has no place for the
    small changes of a policy in fp32.

    >>> _mixed(torch.ones(1).bfloat16(), torch.ones(1) + 1e-3, q=0.5)
    tensor([1.0005])
    """
    if not left.is_floating_point():
        return left
    wide = torch.promote_types(left.dtype, right.dtype)
    return ((1 - q) * left.double() + q * right.double()).to(wide)


def _merge_adapters(first: Path, second: Path, q: float, out: Path) -> None:
    configs = [read_record(path / _ADAPTER, AdapterConfig) for path in (first, second)]
    for folder, config in zip((first, second), configs, strict=True):
        _check_plain(folder, config)
    if configs[0].base_model_name_or_path != configs[1].base_model_name_or_path:
        raise ModelError(f"{first} and {second}: adapters on different bases cannot be merged")
    if configs[0].rank_pattern.keys() != configs[1].rank_pattern.keys():
        raise ModelError(f"{first} and {second}: adapters of different weights cannot be merged")
    left = _tensors(first)
    right = _tensors(second)
    _same(left, right, first, second)
    scale, other = (config.lora_alpha / config.r for config in configs)
    experts = _experts(first, configs[0])
    mixed: dict[str, torch.Tensor] = {}
    for name in left:
        if ".lora_A." in name:
            parts = 1 if len(left[name]) == configs[0].r else experts
            mixed[name] = _stacked(left[name], right[name], parts)
        elif ".lora_B." in name:
            scaled = [(1 - q) * left[name].double(), q * other / scale * right[name].double()]
            mixed[name] = torch.cat(scaled, 1).to(left[name].dtype).contiguous()
        else:
            raise ModelError(
                f"{first}: {name} is no LoRA weight; only plain LoRA adapters can be merged"
            )
    rank = configs[0].r + configs[1].r
    ranks = {
        key: own + configs[1].rank_pattern[key] for key, own in configs[0].rank_pattern.items()
    }
    merged: dict[str, Any] = {
        **as_row(configs[0]),
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": ranks,
        "alpha_pattern": {key: scale * own for key, own in ranks.items()},
    }
    (out / _ADAPTER).write_text(json.dumps(merged, indent=2, sort_keys=True))
    save_file(mixed, out / "adapter_model.safetensors", metadata={"format": "pt"})


def _check_plain(folder: Path, config: AdapterConfig) -> None:
    """Refuse an adapter that is more than products B A, all of one scale alpha / r. Ranks of their
    own have the weights of experts that PEFT has fused, and these alone."""
    more = [key for key in ("use_rslora", "use_dora") if as_row(config).get(key)]
    alphas = config.alpha_pattern
    scales = {alphas.get(key, 0.0) / rank for key, rank in config.rank_pattern.items()}
    alike = alphas.keys() == config.rank_pattern.keys() and not any(
        abs(scale - config.lora_alpha / config.r) > 1e-9 for scale in scales
    )
    if more or not alike or (alphas and not config.target_parameters):
        raise ModelError(
            f"{folder}: only plain LoRA adapters can be merged, not rsLoRA, DoRA or rank patterns"
        )


def _experts(folder: Path, config: AdapterConfig) -> int:
    """How many experts share a weight of the adapter's base; 1 where it changes no such weight."""
    if not config.target_parameters:
        return 1
    base = config.base_model_name_or_path
    read: Any = load_config(base).get_text_config()
    count = getattr(read, "num_local_experts", None)
    if not count:
        raise ModelError(
            f"{folder}: changes weights of experts, and {base}/config.json does not say how many"
            " there are; such adapters cannot be merged"
        )
    return int(count)


def _stacked(left: torch.Tensor, right: torch.Tensor, experts: int) -> torch.Tensor:
    """A of two adapters as that of their sum [experts x ranks, in]: rows lie expert by expert.
    Columns of B lie rank by rank, so that there one simply follows the other.

    >>> one, two = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    >>> _stacked(one, two, experts=2).flatten().tolist()
    [1.0, 3.0, 2.0, 4.0]
    """
    parts = [tensor.reshape(experts, -1, tensor.shape[-1]) for tensor in (left, right)]
    return torch.cat(parts, 1).flatten(0, 1).contiguous()


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    check_files(folder)
    files = listed(folder, "*.safetensors")
    if not files:
        raise ModelError(f"{folder}: holds no safetensors file")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _same(
    left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], first: Path, second: Path
) -> None:
    adapters = any(".lora_" in name for name in left)
    alike = left.keys() == right.keys()
    if alike and not adapters:
        alike = all(tensor.shape == right[name].shape for name, tensor in left.items())
    if not alike:
        raise ModelError(
            f"{first} and {second}: the weights differ in name or shape and cannot be merged"
        )

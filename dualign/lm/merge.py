"""Weighted sums of two policies in weight space, (1 - q) a + q b, exact for LoRA too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dualign.core.artifacts import listed, replacing
from dualign.core.errors import ModelError
from dualign.core.records import AdapterConfig, as_row, read_record
from dualign.lm.loading import check_files
from dualign.lm.publish import adapter_in

_ADAPTER = "adapter_config.json"


def merge(first: Path, second: Path, q: float, out: Path) -> None:
    """Write (1 - q) first + q second to folder `out`, whole or not at all; q may be above 1.

    Both must be full models of one shape, or adapters on one base, which a published policy has
    beside its weights. Adapters are merged by concatenating ranks, which sums the products B A;
    averaging A and B apart (PEFT's `linear`) would add cross terms."""
    if all((adapter_in(path) / _ADAPTER).is_file() for path in (first, second)):
        first = adapter_in(first)
        second = adapter_in(second)
    adapters = [(path / _ADAPTER).is_file() for path in (first, second)]
    if adapters[0] != adapters[1]:
        raise ModelError(
            f"{first} and {second}: one is an adapter and the other a full model; train both alike"
        )
    with replacing(out) as folder:
        shutil.copytree(
            first,
            folder,
            ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "README.md"),
        )
        (_merge_adapters if adapters[0] else _merge_weights)(first, second, q, folder)


def _merge_weights(first: Path, second: Path, q: float, out: Path) -> None:
    left = _tensors(first)
    right = _tensors(second)
    _same(left, right, first, second)
    mixed = {
        name: (
            ((1 - q) * left[name].double() + q * right[name].double()).to(left[name].dtype)
            if left[name].is_floating_point()
            else left[name]
        )
        for name in left
    }
    save_file(mixed, out / "model.safetensors", metadata={"format": "pt"})


def _merge_adapters(first: Path, second: Path, q: float, out: Path) -> None:
    configs = [read_record(path / _ADAPTER, AdapterConfig) for path in (first, second)]
    for folder, config in zip((first, second), configs, strict=True):
        if any(
            as_row(config).get(key)
            for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
        ):
            raise ModelError(
                f"{folder}: only plain LoRA adapters can be merged, not rsLoRA, DoRA or rank"
                " patterns"
            )
    if configs[0].base_model_name_or_path != configs[1].base_model_name_or_path:
        raise ModelError(f"{first} and {second}: adapters on different bases cannot be merged")
    left = _tensors(first)
    right = _tensors(second)
    _same(left, right, first, second)
    scales = [config.lora_alpha / config.r for config in configs]
    mixed: dict[str, torch.Tensor] = {}
    for name in left:
        if ".lora_A." in name:
            mixed[name] = torch.cat([left[name], right[name]], 0).contiguous()
        elif ".lora_B." in name:
            parts = [
                (1 - q) * scales[0] * left[name].double(),
                q * scales[1] * right[name].double(),
            ]
            mixed[name] = torch.cat(parts, 1).to(left[name].dtype).contiguous()
        else:
            raise ModelError(
                f"{first}: {name} is no LoRA weight; only plain LoRA adapters can be merged"
            )
    rank = configs[0].r + configs[1].r
    merged: dict[str, Any] = {
        **as_row(configs[0]),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (out / _ADAPTER).write_text(json.dumps(merged, indent=2, sort_keys=True))
    save_file(mixed, out / "adapter_model.safetensors", metadata={"format": "pt"})


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

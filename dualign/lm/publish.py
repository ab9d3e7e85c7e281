"""Policies as they leave the repository: whole weights, which load from any folder anywhere.

Stages train adapters on `models/sft`, a name that means nothing elsewhere. What is published holds
the base with the adapter folded in, in fp32, since bf16 would round most of a small change away.
The adapter itself stays beside it in `adapter/`, where merges find it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dualign.lm.loading import load_model, with_adapter
from dualign.lm.mixture import FILE, components
from dualign.lm.models import adapter_base, merged, read_tokenizer, save

#: Sub-folder of a published policy that holds its adapter.
ADAPTER = "adapter"


def publish(policy: Path, out: Path) -> None:
    """Write a policy to folder `out`, which must not exist, in need of no other folder."""
    if (policy / FILE).is_file():
        _publish_mixture(policy, out)
    elif (policy / "adapter_config.json").is_file():
        _publish_adapter(policy, out)
    else:
        shutil.copytree(policy, out)


def _publish_mixture(policy: Path, out: Path) -> None:
    out.mkdir(parents=True)
    for name in components(policy)[1]:
        publish(policy / name, out / name)
    shutil.copy(policy / FILE, out)


def _publish_adapter(policy: Path, out: Path) -> None:
    base = load_model(AutoModelForCausalLM, adapter_base(policy), dtype=torch.float32)
    save(merged(with_adapter(base, policy)), read_tokenizer(policy), out)
    shutil.copytree(policy, out / ADAPTER)


def adapter_in(policy: Path) -> Path:
    """The folder of a policy's adapter: `adapter/` of a published one, else its own."""
    inner = policy / ADAPTER
    return inner if inner.is_dir() else policy

"""Policies as they leave the repository: whole weights, which load from any folder anywhere.

Stages train adapters on `models/sft`, a name that means nothing elsewhere. What is published holds
the base with the adapter folded in, in fp32, since bf16 would round most of a small change away.
The adapter itself stays beside it in `adapter/`, where merges find it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dualign.core.artifacts import copy_folder
from dualign.lm.folders import ADAPTER, MIXTURE
from dualign.lm.loading import load_model, with_adapter
from dualign.lm.mixture import components
from dualign.lm.models import adapter_base, merged, read_tokenizer, save


def publish(policy: Path, out: Path) -> None:
    """Write a policy to folder `out`, which must not exist, in need of no other folder."""
    if (policy / MIXTURE).is_file():
        _publish_mixture(policy, out)
    elif (policy / "adapter_config.json").is_file():
        _publish_adapter(policy, out)
    else:
        copy_folder(policy, out)


def _publish_mixture(policy: Path, out: Path) -> None:
    out.mkdir(parents=True)
    for name in components(policy)[1]:
        publish(policy / name, out / name)
    shutil.copyfile(policy / MIXTURE, out / MIXTURE)


def _publish_adapter(policy: Path, out: Path) -> None:
    base = load_model(AutoModelForCausalLM, adapter_base(policy), dtype=torch.float32)
    save(merged(with_adapter(base, policy)), read_tokenizer(policy), out)
    copy_folder(policy, out / ADAPTER)

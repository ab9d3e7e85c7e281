"""One set of frozen weights for all models that compute with them, to the same bytes."""

from __future__ import annotations

import copy
import gc
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
)

from dualign.core.errors import ModelError
from dualign.lm import models, numerics
from dualign.lm.frozen import _HELD, shared
from dualign.lm.loading import load_model, with_adapter
from dualign.lm.models import train_tokenizer
from dualign.params.base import LoraParams, Resources
from dualign.training.pairwise import Pair, PairLossConfig, train_pairwise
from dualign.training.run import Job
from tests.tiny import saved_llama, short_training

LORA = LoraParams(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", quantise=None)
IDS = torch.tensor([[3, 5, 8, 9, 11, 4]])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([f"word{i} and more" for i in range(40)], 300)


@pytest.fixture
def base(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    shape = {"hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.4}
    return saved_llama(tokenizer, tmp_path / "base", **shape)


def adapter(
    base: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources, seed: int
) -> Path:
    model = models.with_lora(models.load_policy(base, resources), LORA, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    models.save(model, tokenizer, base.parent / f"adapter-{seed}")
    return base.parent / f"adapter-{seed}"


def alone(base: Path, folder: Path, resources: Resources) -> PeftModel:
    """The policy on a base that it has read for itself."""
    dtype = torch.float32 if resources.precision == "fp32" else "auto"
    model = load_model(AutoModelForCausalLM, base, dtype=dtype)
    return with_adapter(numerics.in_precision(model, resources, trained=False), folder)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def places(model: torch.nn.Module) -> set[int]:
    return {weight.data_ptr() for name, weight in model.named_parameters() if "lora_" not in name}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_share_one_base_and_give_the_bytes_of_their_own(
    base: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources, precision: str
) -> None:
    own = resources.model_copy(update={"precision": precision})
    folders = [adapter(base, tokenizer, own, seed) for seed in (1, 2)]
    reference, *policies = [models.load_policy(folder, own) for folder in (base, *folders)]
    assert places(reference) == places(policies[0]) == places(policies[1])
    found = [logits(policy) for policy in policies]
    assert not torch.equal(*found)
    for folder, each in zip(folders, found, strict=True):
        assert torch.equal(each, logits(alone(base, folder, own)))


def test_a_training_beside_others_ends_as_it_does_alone(
    base: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources, tmp_path: Path
) -> None:
    folder = adapter(base, tokenizer, resources, 1)
    pairs = [
        Pair([3, 5], [8, 9, 1], [11, 4, 1], -9.0, -8.0),
        Pair([6], [7, 1], [12, 1], -7.0, -7.5),
    ]
    training = short_training(batch_size=2, learning_rate=0.05, max_length=32, max_steps=3)

    def trained(model: PeftModel, scratch: str) -> Tensor:
        job = Job(training, resources, tmp_path / scratch, 0)
        train_pairwise(model, tokenizer, pairs, PairLossConfig(0.1, 0.1), job)
        return logits(model)

    reference = models.load_policy(base, resources)
    before = logits(reference)
    beside = trained(models.load_policy(folder, resources), "beside")
    assert torch.equal(logits(reference), before)
    assert torch.equal(beside, trained(alone(base, folder, resources), "alone"))
    assert not torch.equal(beside, logits(models.load_policy(folder, resources)))


def test_folding_one_in_leaves_the_others(
    base: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> None:
    folder = adapter(base, tokenizer, resources, 1)
    reference = models.load_policy(base, resources)
    before = logits(reference)
    policy = models.load_policy(folder, resources)
    expected = logits(policy)
    assert torch.allclose(logits(models.merged(policy)), expected, atol=1e-4)
    assert torch.equal(logits(reference), before)
    assert torch.equal(logits(models.load_policy(folder, resources)), expected)


def test_casting_one_leaves_the_others(base: Path, resources: Resources) -> None:
    first, second = (models.load_policy(base, resources) for _ in range(2))
    first.to(torch.bfloat16)
    assert {weight.dtype for weight in second.parameters()} == {torch.float32}


def test_what_is_trained_has_weights_of_its_own(base: Path, resources: Resources) -> None:
    held = models.load_policy(base, resources)
    whole = models.load_policy(base, resources, trained=True)
    assert not places(held) & places(whole)
    assert all(weight.requires_grad for weight in whole.parameters())
    assert not any(weight.requires_grad for weight in held.parameters())


def test_a_base_is_read_once_and_let_go_with_its_last_model(
    base: Path, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(auto: object, path: str, **options: object) -> object:
        read.append(path)
        return load_model(auto, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(models, "load_model", counted)
    first = models.load_policy(base, resources)
    second = models.load_policy(base, resources)
    del first
    gc.collect()
    third = models.load_policy(base, resources)
    assert len(read) == 1 and places(second) == places(third)
    held = len(_HELD)
    del second, third
    gc.collect()
    assert len(_HELD) == held - 1
    models.load_policy(base, resources)
    assert len(read) == 2


def test_another_base_in_the_same_folder_is_another(base: Path, resources: Resources) -> None:
    first = models.load_policy(base, resources)
    file = base / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert not places(first) & places(models.load_policy(base, resources))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match="cut short"):
        models.load_policy(base, resources)


def test_a_copy_of_a_policy_has_adapters_of_its_own_alone(
    base: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> None:
    policy = models.load_policy(adapter(base, tokenizer, resources, 1), resources)
    copied = shared(policy)
    assert places(copied) == places(policy)
    before = logits(policy)
    stirred = [weight for name, weight in copied.named_parameters() if "lora_" in name]
    for weight in stirred:
        weight.data += 1.0
    assert torch.equal(logits(policy), before) and not torch.equal(logits(copied), before)
    assert not places(copy.deepcopy(policy)) & places(policy)


def test_a_copy_to_be_cut_holds_no_weight_of_its_own(
    base: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> None:
    policy = models.load_policy(adapter(base, tokenizer, resources, 1), resources)
    adapters = [weight for name, weight in policy.named_parameters() if "lora_" in name]
    for weight in adapters:
        weight.requires_grad_()
    copied = shared(policy, trained=True)
    for one, other in zip(policy.parameters(), copied.parameters(), strict=True):
        assert one is not other and one.data_ptr() == other.data_ptr()
        assert one.requires_grad == other.requires_grad
    before = logits(policy)
    for weight in copied.parameters():
        weight.data = weight.data[:1].clone()
    assert torch.equal(logits(policy), before)

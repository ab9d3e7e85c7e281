"""A policy that leaves the repository loads from wherever it is put, and is the policy that was
measured.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from dualign.data import world
from dualign.lm import models
from dualign.lm.folders import ADAPTER
from dualign.lm.merge import merge
from dualign.lm.mixture import policy_at, write_mixture
from dualign.lm.publish import publish
from dualign.params.base import LoraParams, Resources
from tests.tiny import WIDER

TEXTS = [answer.text for prompt in world.prompts()[::500] for answer in world.answers(prompt)]
SCRATCH = WIDER.model_copy(update={"vocab_size": 320, "layers": 2, "heads": 4, "context": 64})
LORA = LoraParams(rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear", quantise=None)
IDS = torch.tensor([[7, 20, 33, 46, 59, 72]])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return models.train_tokenizer(TEXTS, 320)


@pytest.fixture
def repository(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working folder with models/sft, where the stages name their base by that relative path."""
    models.save(models.build_scratch(SCRATCH, tokenizer, 0), tokenizer, tmp_path / "models/sft")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def adapter(name: str, seed: int, tokenizer: PreTrainedTokenizerBase, resources: Resources) -> Path:
    """An adapter on models/sft, all of its weights away from zero as after training."""
    model = models.with_lora(models.load_policy("models/sft", resources), LORA, seed)
    generator = torch.Generator().manual_seed(seed)
    for part, weight in model.named_parameters():
        if "lora_" in part:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    models.save(model, tokenizer, Path("models") / name)
    return Path("models") / name


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def test_an_adapter_leaves_as_whole_weights_that_load_anywhere(
    repository: Path,
    tokenizer: PreTrainedTokenizerBase,
    resources: Resources,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = adapter("one", 1, tokenizer, resources)
    expected = logits(models.load_policy(policy, resources))
    publish(policy, Path("models/aligned"))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move("models/aligned", elsewhere / "mine")
    shutil.rmtree("models")
    monkeypatch.chdir(elsewhere)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained("mine")), expected, atol=1e-5)
    assert AutoTokenizer.from_pretrained("mine").chat_template == tokenizer.chat_template
    assert all(
        tensor.dtype == torch.float32 for tensor in load_file("mine/model.safetensors").values()
    )


def test_whole_weights_leave_as_they_are(repository: Path) -> None:
    publish(Path("models/sft"), Path("out"))
    assert (
        Path("out/model.safetensors").read_bytes()
        == Path("models/sft/model.safetensors").read_bytes()
    )


def test_a_mixture_leaves_with_every_component_whole(
    repository: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> None:
    policies = [
        adapter(name, seed, tokenizer, resources)
        for seed, name in enumerate(("one", "two"), start=1)
    ]
    write_mixture(policies, [0.5, 1.5], Path("mixed"))
    publish(Path("mixed"), Path("out"))
    shutil.rmtree("models/one")
    mixture = policy_at("out", resources)
    for part, policy in zip(mixture.folders, policies, strict=True):
        assert (part / "model.safetensors").is_file(), policy
        assert not (part / "adapter_config.json").exists()


@pytest.mark.parametrize("q", [0.25, 1.25])
def test_a_published_policy_merges_with_an_adapter_that_was_not(
    repository: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources, q: float
) -> None:
    first, second = (
        adapter(name, seed, tokenizer, resources)
        for seed, name in enumerate(("one", "two"), start=1)
    )
    publish(second, Path("models/published"))
    merge(first, second, q, Path("plain"))
    merge(first, Path("models/published"), q, Path("mixed"))
    plain, mixed = (logits(models.load_policy(folder, resources)) for folder in ("plain", "mixed"))
    assert torch.equal(plain, mixed)
    assert (Path("models/published") / ADAPTER).is_dir()

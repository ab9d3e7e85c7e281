"""Merging in weight space: full weights and adapters, compared weight by weight and logit by
logit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from dualign.core.errors import DualignError, ModelError
from dualign.lm.folders import adapter_in
from dualign.lm.merge import merge
from dualign.lm.mixture import write_mixture

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def tiny(seed: int, hidden: int = 16, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,  # so that the logits differ visibly
    )
    return LlamaForCausalLM(config).to(dtype)


def write(model: PreTrainedModel, folder: Path, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("the card of another model")
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


# --- full weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.0, 0.25, 1.0, 1.25])
def test_full_weights_are_mixed_exactly(tmp_path: Path, q: float) -> None:
    first = write(tiny(1), tmp_path / "a")
    second = write(tiny(2), tmp_path / "b")
    merge(first, second, q, tmp_path / "out")
    left, right, mixed = (weights(folder) for folder in (first, second, tmp_path / "out"))
    assert mixed.keys() == left.keys()
    for name, tensor in mixed.items():
        assert torch.allclose(tensor, (1 - q) * left[name] + q * right[name], atol=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if q in (0.0, 1.0):
        assert torch.equal(logits(loaded), logits(tiny(1 + int(q))))
    else:
        assert not torch.allclose(logits(loaded), logits(tiny(1)), atol=0.1)


def test_shards_become_one_file_and_the_rest_of_the_folder_comes_along(tmp_path: Path) -> None:
    first = write(tiny(1), tmp_path / "a", shard="8KB")
    assert len(list(first.glob("*.safetensors"))) > 1 and list(first.glob("*.index.json"))
    merge(first, write(tiny(2), tmp_path / "b"), 0.5, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert "README.md" not in names and not any(
        ".index." in name or "-of-" in name for name in names
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    middle = tiny(1)
    middle.load_state_dict(
        {k: (v + tiny(2).state_dict()[k]) / 2 for k, v in tiny(1).state_dict().items()}
    )
    assert torch.allclose(logits(loaded), logits(middle), atol=1e-5)


def test_bfloat16_weights_are_mixed_without_losing_the_small_one(tmp_path: Path) -> None:
    """The sum is made in double precision and rounded once."""
    first, second = (write(tiny(s, dtype=torch.bfloat16), tmp_path / str(s)) for s in (1, 2))
    merge(first, second, 0.01, tmp_path / "out")
    left, right, mixed = (weights(folder) for folder in (first, second, tmp_path / "out"))
    for name, tensor in mixed.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(
            tensor, (0.99 * left[name].double() + 0.01 * right[name].double()).to(torch.bfloat16)
        )


def test_a_small_change_of_a_base_in_bf16_is_kept(tmp_path: Path) -> None:
    base = tiny(1, dtype=torch.bfloat16)
    policy = tiny(1, dtype=torch.bfloat16).float()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1 + 2**-12)
    first = write(base, tmp_path / "a")
    second = write(policy, tmp_path / "b")
    merge(first, second, 0.5, tmp_path / "out")
    left, mixed = (weights(folder) for folder in (first, tmp_path / "out"))
    for name, tensor in mixed.items():
        assert torch.equal(tensor, left[name].float() * (1 + 2**-13))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.float32


# --- adapters -------------------------------------------------------------------------------------


def adapter(
    base: Path, folder: Path, seed: int, rank: int = 4, alpha: float = 8.0, **more: object
) -> Path:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        **{"target_modules": ["q_proj", "v_proj", "down_proj"], **more},
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def folded(base: Path, folder: Path) -> dict[str, Tensor]:
    """State of the base with the adapter's products folded in."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return model.merge_and_unload().state_dict()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tiny(0), tmp_path / "base")


@pytest.mark.parametrize("q", [0.0, 0.4, 1.0, 1.25])
@pytest.mark.parametrize("rank", [4, 2], ids=["same rank", "other rank and alpha"])
def test_adapters_are_mixed_as_products(tmp_path: Path, base: Path, q: float, rank: int) -> None:
    first = adapter(base, tmp_path / "a", seed=1)
    second = adapter(base, tmp_path / "b", seed=2, rank=rank, alpha=8.0 if rank == 4 else 3.0)
    merge(first, second, q, tmp_path / "out")
    left, right, mixed = (folded(base, folder) for folder in (first, second, tmp_path / "out"))
    for name, tensor in mixed.items():
        assert torch.allclose(tensor, (1 - q) * left[name] + q * right[name], atol=1e-5), name
    changed = [name for name in mixed if not torch.allclose(left[name], right[name], atol=1e-3)]
    assert len(changed) == 6  # three modules in two layers


def test_a_merged_adapter_says_its_rank_and_can_be_merged_again(tmp_path: Path, base: Path) -> None:
    first, second = (adapter(base, tmp_path / str(seed), seed) for seed in (1, 2))
    merge(first, second, 0.5, tmp_path / "once")
    config = json.loads((tmp_path / "once" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)  # a training goes on at the same scale
    merge(tmp_path / "once", first, 0.5, tmp_path / "twice")
    left, right, mixed = (folded(base, folder) for folder in (first, second, tmp_path / "twice"))
    for name, tensor in mixed.items():
        assert torch.allclose(tensor, 0.75 * left[name] + 0.25 * right[name], atol=1e-5), name


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A base whose experts' weights are one tensor each, which PEFT adapts as such."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=64, num_local_experts=2, **shape, **heads)
    return write(MixtralForCausalLM(config), tmp_path / "mixture")


def test_adapters_of_experts_are_mixed_as_products_again_and_again(
    tmp_path: Path, mixture: Path
) -> None:
    """Their ranks lie expert by expert in A and rank by rank in B, and PEFT fuses two matrices of
    each expert under a rank of its own.
    """
    first = adapter(mixture, tmp_path / "a", 1, target_modules="all-linear")
    second = adapter(mixture, tmp_path / "b", 2, rank=2, alpha=3.0, target_modules="all-linear")
    merge(first, second, 0.4, tmp_path / "once")
    merge(tmp_path / "once", second, 1.25, tmp_path / "twice")
    left, right, mixed = (folded(mixture, folder) for folder in (first, second, tmp_path / "once"))
    twice = folded(mixture, tmp_path / "twice")
    experts = [name for name in mixed if "experts" in name]
    assert len(experts) == 2 and not torch.allclose(left[experts[0]], right[experts[0]], atol=1e-2)
    for name, tensor in mixed.items():
        assert torch.allclose(tensor, 0.6 * left[name] + 0.4 * right[name], atol=1e-5), name
        expected = 1.25 * right[name] - 0.25 * tensor
        assert torch.allclose(twice[name], expected, atol=1e-5), name


# --- what cannot be merged ------------------------------------------------------------------------


def refused(first: Path, second: Path, out: Path) -> str:
    with pytest.raises(ModelError) as caught:
        merge(first, second, 0.5, out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_and_an_adapter_are_refused(tmp_path: Path, base: Path) -> None:
    message = refused(base, adapter(base, tmp_path / "a", 1), tmp_path / "out")
    assert str(tmp_path / "a") in message and "one is an adapter" in message


def test_a_merge_of_whole_weights_leaves_no_adapter_of_the_first_behind(
    tmp_path: Path, base: Path
) -> None:
    published = write(tiny(1), tmp_path / "published")
    adapter(base, published / "adapter", 1)
    merge(published, base, 0.5, tmp_path / "out")
    assert adapter_in(published) != published and adapter_in(tmp_path / "out") == tmp_path / "out"
    merge(tmp_path / "out", published, 0.5, tmp_path / "again")
    whole, mixed = weights(published), weights(tmp_path / "again")
    for name, tensor in weights(base).items():
        assert torch.allclose(mixed[name], 0.75 * whole[name] + 0.25 * tensor, atol=1e-6)


def test_what_is_made_of_files_that_dvc_protects_can_be_written(tmp_path: Path, base: Path) -> None:
    """DVC's links to its cache have the mode 0444. Copies had it too, and nobody but root could
    write a merge's configuration over one.
    """
    narrow = write(tiny(1, dtype=torch.bfloat16), tmp_path / "narrow")
    adapters = [adapter(base, tmp_path / name, seed) for seed, name in enumerate("ab")]
    for folder in (base, narrow, *adapters):
        for file in folder.iterdir():
            file.chmod(0o444)
    merge(adapters[0], adapters[1], 0.5, tmp_path / "products")
    merge(narrow, base, 0.5, tmp_path / "whole")
    write_mixture(adapters, [0.0, 1.0], tmp_path / "mixture")
    for made in ("products", "whole", "mixture"):
        files = [path for path in (tmp_path / made).rglob("*") if path.is_file()]
        assert files and all(file.stat().st_mode & 0o200 for file in files)


def test_models_of_different_shape_are_refused(tmp_path: Path) -> None:
    first = write(tiny(1), tmp_path / "a")
    second = write(tiny(2, hidden=32), tmp_path / "b")
    assert "differ in name or shape" in refused(first, second, tmp_path / "out")


def test_adapters_on_different_bases_are_refused(tmp_path: Path, base: Path) -> None:
    other = write(tiny(5), tmp_path / "other")
    first = adapter(base, tmp_path / "a", 1)
    second = adapter(other, tmp_path / "b", 2)
    assert "different bases" in refused(first, second, tmp_path / "out")


def test_adapters_on_different_modules_are_refused(tmp_path: Path, base: Path) -> None:
    first = adapter(base, tmp_path / "a", 1)
    second = adapter(base, tmp_path / "b", 2, layers_to_transform=[0])
    assert "differ in name or shape" in refused(first, second, tmp_path / "out")


def test_adapters_that_hold_more_than_products_are_refused(tmp_path: Path, base: Path) -> None:
    first, second = (adapter(base, tmp_path / str(seed), seed, use_dora=True) for seed in (1, 2))
    assert "only plain LoRA adapters" in refused(first, second, tmp_path / "out")


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path / "empty", write(tiny(1), tmp_path / "a"), tmp_path / "out")
    assert message == f"{tmp_path / 'empty'}: holds no safetensors file"


def test_weights_and_configurations_that_are_cut_short_are_named(tmp_path: Path) -> None:
    first = write(tiny(1), tmp_path / "a")
    second = write(tiny(2), tmp_path / "b")
    file = second / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"b/model\.safetensors: is cut short or damaged"):
        merge(first, second, 0.5, tmp_path / "out")
    for folder in (tmp_path / "c", tmp_path / "d"):
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{")
    with pytest.raises(DualignError, match=r"c/adapter_config\.json:1: not valid JSON"):
        merge(tmp_path / "c", tmp_path / "d", 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()

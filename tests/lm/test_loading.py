"""Weights are all there, whole and finite, or an error in one line says which folder or file is
not, and what to do.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartForConditionalGeneration,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    T5ForConditionalGeneration,
    ViTModel,
    ZambaConfig,
)
from transformers.utils import logging as hf_logging

from dualign import stage
from dualign.core.errors import DataError, ModelError, ParamsError
from dualign.lm import loading, models
from dualign.lm.sampling import log_probabilities
from dualign.params.base import LoraParams, Resources
from tests.lm import architectures
from tests.lm.architectures import KEEPING
from tests.lm.layouts import CHATS, byte_level

LORA = LoraParams(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", quantise=None)
SMALL = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "gpt2": GPT2Config(
        vocab_size=96,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "gemma2": Gemma2Config(**SMALL, query_pre_attn_scalar=8),
    "mistral": MistralConfig(**SMALL),
}
IDS = torch.tensor([[7, 20, 33, 46, 59, 72]])

pytestmark = pytest.mark.usefixtures("one_thread")


def built(name: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A saved Llama of random weights."""
    built("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def refusal(path: Path, resources: Resources, kind: type[Exception] = ModelError) -> str:
    """What is said of a policy that cannot be loaded: one line that begins with its folder."""
    with pytest.raises(kind) as caught:
        models.load_policy(path, resources)
    message = str(caught.value)
    assert (
        message.startswith(str(path))
        and "\n" not in message
        and len(message.removeprefix(str(path))) < 500
    )
    return message.removeprefix(str(path))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# --- what loads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_of_an_architecture_comes_back(
    tmp_path: Path, resources: Resources, name: str
) -> None:
    model = built(name)
    model.save_pretrained(tmp_path)
    loaded = models.load_policy(tmp_path, resources)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(weight, model.state_dict()[key]) for key, weight in loaded.state_dict().items()
    )
    assert loading.context_of(loaded) == 64
    stored = loading.load_model(AutoModelForCausalLM, tmp_path, dtype=torch.bfloat16)
    assert stored.dtype == torch.bfloat16


def test_shards_load_as_one_file_does(tmp_path: Path, resources: Resources) -> None:
    model = built("llama")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = models.load_policy(tmp_path, resources)
    assert all(
        torch.equal(weight, model.state_dict()[key]) for key, weight in loaded.state_dict().items()
    )


def test_a_head_of_its_own_is_kept_where_the_configuration_ties_it(
    llama: Path, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    """A vocabulary that grows would tie the two, and the base be another model."""
    change_json(llama / "config.json", tie_word_embeddings=True)
    model = models.load_policy(llama, resources, trained=True)
    assert "has a head of its own, which is kept" in caplog.text
    expected = model(IDS).logits[..., :96]
    model.resize_token_embeddings(128, mean_resizing=False)
    assert torch.equal(model(IDS).logits[..., :96], expected)
    models.save(model, byte_level(CHATS["zephyr"]), llama.parent / "saved")
    caplog.clear()
    again = models.load_policy(llama.parent / "saved", resources)
    assert torch.equal(again(IDS).logits[..., :96], expected) and not caplog.text


def test_a_tied_head_stays_tied(tmp_path: Path, resources: Resources) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = models.load_policy(tmp_path, resources, trained=True)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_bin_file_loads(llama: Path, resources: Resources) -> None:
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    assert torch.equal(models.load_policy(llama, resources)(IDS).logits, built("llama")(IDS).logits)


def test_the_head_of_a_scorer_is_reported_where_it_is_fresh(llama: Path) -> None:
    options = {"dtype": torch.float32, "fresh": ("score.",), "num_labels": 1}
    scorer, missing = loading.load_reported(AutoModelForSequenceClassification, llama, **options)
    assert missing == ["score.weight"] and scorer.score.weight.shape == (1, 16)
    scorer.save_pretrained(llama.parent / "scorer")
    _, missing = loading.load_reported(
        AutoModelForSequenceClassification, llama.parent / "scorer", **options
    )
    assert missing == []


@pytest.mark.parametrize("form", ["safetensors", "bin", "bin of before PyTorch 1.6"])
def test_a_head_in_fp32_stays_so_from_a_folder_and_from_the_hub(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    kept = tmp_path / "cache" / "models--nobody--scorer"
    folder = kept / "snapshots" / ("0" * 40)
    scorer, _ = loading.load_reported(
        AutoModelForSequenceClassification, llama, dtype=torch.bfloat16, fresh=("score.",)
    )
    scorer.save_pretrained(folder)
    head = torch.full((2, 16), 1 / 3)
    change_weights(folder, lambda weights: weights.update({"score.weight": head}))
    if form != "safetensors":
        file = folder / "model.safetensors"
        new = form == "bin"
        pickled = folder / "pytorch_model.bin"
        torch.save(load_file(file), pickled, _use_new_zipfile_serialization=new)
        file.unlink()
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(folder.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(kept.parent))
    for path in (folder, "nobody/scorer"):
        found = loading.load_model(AutoModelForSequenceClassification, path, dtype="auto")
        assert torch.equal(found.score.weight, head)
        assert found.model.norm.weight.dtype == torch.bfloat16


def test_a_head_of_another_width_is_refused(llama: Path) -> None:
    options = {"dtype": torch.float32, "fresh": ("score.",)}
    three, _ = loading.load_reported(
        AutoModelForSequenceClassification, llama, num_labels=3, **options
    )
    three.save_pretrained(llama.parent / "three")
    with pytest.raises(ModelError, match=r"score\.weight have other shapes"):
        loading.load_reported(
            AutoModelForSequenceClassification, llama.parent / "three", num_labels=1, **options
        )


def test_longrope_is_read_as_far_as_it_turns_every_row_alike(resources: Resources) -> None:
    """One row beyond the original context turns all rows of a batch by the long factors."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Phi3Config(**SMALL, original_max_position_embeddings=16, rope_parameters=rope | factors)
    )
    prompts = [[7, 20, 33, 46], [7, 20, 33, 46]]
    answers = [list(range(3, 9)), list(range(3, 20))]
    tokenizer = models.made_fit(byte_level(CHATS["zephyr"]), "it")
    together = log_probabilities(model, tokenizer, prompts, answers, batch_size=2)
    alone = log_probabilities(model, tokenizer, prompts[:1], answers[:1], batch_size=2)
    assert together[0] == pytest.approx(float(alone[0]), abs=1e-5) and together[1].isnan()
    assert loading.context_of(model) == 16


# --- weights that are not there, or not these -----------------------------------------------------


def test_missing_weights_are_named(llama: Path, resources: Resources) -> None:
    change_weights(
        llama, lambda state: [state.pop(key) for key in list(state) if "layers.1.mlp" in key]
    )
    said = refusal(llama, resources)
    assert said.startswith(
        ": the checkpoint lacks model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj"
    )
    assert said.endswith("which would be random; take the whole checkpoint")


def test_a_part_of_a_layer_that_would_be_left_out_is_named(
    tmp_path: Path, resources: Resources
) -> None:
    """Biases of attention that config.json denies: the rest would load."""
    folder = tmp_path / "biased"
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, attention_bias=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    change_json(folder / "config.json", attention_bias=False)
    told = refusal(folder, resources)
    assert "model.layers.0.self_attn.k_proj.bias" in told and "and 5 more" in told
    assert "attention_bias" in told
    with pytest.raises(ModelError, match=r"k_proj\.bias"):
        loading.load_model(AutoModel, folder, dtype="auto")


def test_weights_without_a_place_are_told(
    llama: Path, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    """A layer beyond those that config.json counts, and the head of a value."""

    def told() -> list[str]:
        return [one.message for one in caplog.records if one.name == loading.__name__]

    models.load_policy(llama, resources)
    extra = {"v_head.weight": torch.ones(1), "model.layers.2.mlp.up_proj.weight": torch.ones(1)}
    change_weights(llama, lambda state: state.update(extra))
    loading.load_model(AutoModel, llama, dtype="auto")
    assert not told()
    loading.load_model(AutoModelForCausalLM, llama, dtype="auto")
    assert "no place for model.layers.2.mlp.up_proj.weight, v_head.weight" in told()[0]


def test_weights_of_another_architecture_are_named(llama: Path, resources: Resources) -> None:
    built("gpt2").save_pretrained(llama.parent / "gpt2")
    (llama.parent / "gpt2" / "model.safetensors").replace(llama / "model.safetensors")
    said = refusal(llama, resources)
    assert (
        "the checkpoint lacks" in said and "and 18 more, which would be random; it holds " in said
    )
    assert (
        "transformer.h.0" in said
        and "so the weights may be another model's; take the whole" in said
    )


def test_weights_of_other_shapes_are_named(llama: Path, resources: Resources) -> None:
    change_json(llama / "config.json", intermediate_size=32)
    said = refusal(llama, resources)
    assert "mlp.down_proj.weight" in said and said.endswith(
        "other shapes in the checkpoint than config.json says; mend either"
    )


def test_weights_that_are_not_finite_are_named(llama: Path, resources: Resources) -> None:
    change_weights(llama, lambda state: state["model.norm.weight"].fill_(float("nan")))
    assert refusal(llama, resources).startswith(": model.norm.weight hold NaN or infinite weights")


# --- files that are damaged -----------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 200, -1000, -1])
def test_a_file_that_is_cut_short_is_named(llama: Path, resources: Resources, keep: int) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert (
        refusal(llama, resources)
        == "/model.safetensors: is cut short or damaged; download it again"
    )


@pytest.mark.parametrize(
    "noise",
    [
        b"<html>not found</html>" * 40,
        (100_000).to_bytes(8, "little") + b"[" * 200_000,
        (5000).to_bytes(8, "little") + b"9" * 9000,
    ],
    ids=["html", "nested", "number"],
)
def test_a_file_of_noise_is_named(llama: Path, resources: Resources, noise: bytes) -> None:
    (llama / "model.safetensors").write_bytes(noise)
    assert (
        refusal(llama, resources)
        == "/model.safetensors: is cut short or damaged; download it again"
    )


@pytest.mark.parametrize("cut", [True, False])
def test_a_shard_that_is_cut_or_gone_is_named(
    tmp_path: Path, resources: Resources, cut: bool
) -> None:
    built("llama").save_pretrained(tmp_path, max_shard_size="8KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    if cut:
        shard.write_bytes(shard.read_bytes()[:-10])
        assert (
            refusal(tmp_path, resources)
            == f"/{shard.name}: is cut short or damaged; download it again"
        )
    else:
        shard.unlink()
        said = (
            f"/{shard.name}: is missing, though model.safetensors.index.json names it; download it"
            " again"
        )
        assert refusal(tmp_path, resources) == said


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_named(llama: Path, resources: Resources, name: str) -> None:
    (llama / "model.safetensors").unlink()
    (llama / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert (
        refusal(llama, resources)
        == f"/{name}: is a git-lfs pointer and not the weights; run git lfs pull in that folder"
    )


def test_a_link_that_leads_nowhere_is_named(llama: Path, resources: Resources) -> None:
    """As in the hub's cache, once its blobs were removed."""
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors").symlink_to("../../blobs/gone")
    told = refusal(llama, resources)
    assert told.startswith("/model.safetensors: cannot be read (No such file or directory); is it")


def test_a_bin_file_that_is_cut_short_is_refused(llama: Path, resources: Resources) -> None:
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes((llama / "pytorch_model.bin").read_bytes()[:-500])
    assert refusal(llama, resources).startswith(": cannot be loaded as a causal language model (")


def test_a_folder_without_weights_is_refused(llama: Path, resources: Resources) -> None:
    (llama / "model.safetensors").unlink()
    said = refusal(llama, resources)
    assert (
        said.startswith(": cannot be loaded as a causal language model (")
        and "model.safetensors" in said
    )


# --- models that are not for training, or not of transformers -------------------------------------


def test_a_quantised_base_is_refused(llama: Path, resources: Resources) -> None:
    change_json(llama / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert (
        refusal(llama, resources)
        == ": the weights are quantised (gptq) and cannot be trained; take the unquantised ones"
    )


@pytest.mark.parametrize("model_type", ["llama", "homemade"])
def test_code_of_a_models_own_is_neither_asked_for_nor_run(
    llama: Path, resources: Resources, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Code of its own for an architecture that transformers has is left alone; another's is
    refused.
    """
    marker = llama / "ran"
    (llama / "custom.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    own = {
        "AutoConfig": "custom.OwnConfig",
        "AutoModelForCausalLM": "custom.OwnModel",
        "AutoTokenizer": ["custom.T", None],
    }
    change_json(llama / "config.json", auto_map=own, model_type=model_type)
    monkeypatch.setattr("builtins.input", lambda *given: pytest.fail("it asked"))
    if model_type == "llama":
        models.load_policy(llama, resources)
    else:
        assert refusal(llama, resources).startswith(
            ": the model needs code of its own repository, which dualign never"
        )
    with pytest.raises(ModelError):
        models.load_tokenizer(llama)
    assert not marker.exists()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_causal_model_does_not_read_ahead(name: str, precision: torch.dtype) -> None:
    loading.check_causal(built(name).to(precision), name, precision)


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**SMALL, initializer_range=0.2),
        Gemma3TextConfig(**SMALL, use_bidirectional_attention=True, tie_word_embeddings=False),
    ],
    ids=["bert", "gemma3"],
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_an_encoder_that_loads_as_a_causal_model_is_refused(
    config: PretrainedConfig, precision: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(precision)
    with pytest.raises(ModelError, match=r"^mine: \w+ reads ahead: .*take a causal language model"):
        loading.check_causal(model, "mine", precision)


@pytest.mark.parametrize("asked", ["output_attentions", "output_hidden_states", "return_dict"])
def test_what_a_configuration_asks_to_return_changes_nothing(
    llama: Path, resources: Resources, asked: str
) -> None:
    expected = models.load_policy(llama, resources)(IDS)
    change_json(llama / "config.json", **{asked: asked != "return_dict"})
    found = models.load_policy(llama, resources, trained=True)(IDS)
    assert torch.equal(found.logits, expected.logits) and found.keys() == expected.keys()


# --- adapters -------------------------------------------------------------------------------------


@pytest.fixture
def adapter(llama: Path, resources: Resources) -> Path:
    """An adapter of `llama`, beside it."""
    folder = llama.parent / "adapter"
    models.with_lora(models.load_policy(llama, resources), LORA, 0).save_pretrained(folder)
    return folder


def test_an_adapter_of_a_base_of_another_shape_is_refused(
    adapter: Path, llama: Path, resources: Resources
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        LlamaConfig(**SMALL | {"intermediate_size": 32})
    ).save_pretrained(llama)
    assert refusal(adapter, resources).startswith(": the adapter does not fit its base (")


def test_an_adapter_of_other_modules_is_refused(
    adapter: Path, llama: Path, resources: Resources
) -> None:
    for file in llama.iterdir():
        file.unlink()
    built("gpt2").save_pretrained(llama)
    assert refusal(adapter, resources).startswith(": the adapter does not fit its base (")


def test_an_adapter_without_some_of_its_weights_is_refused(
    adapter: Path, resources: Resources
) -> None:
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    save_file({key: weight for key, weight in state.items() if "layers.1" not in key}, file)
    said = refusal(adapter, resources)
    assert said.startswith(": the adapter does not fit its base (") and "layers.1" in said


def test_an_adapter_whose_base_has_fewer_layers_is_refused(
    adapter: Path, llama: Path, resources: Resources
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        LlamaConfig(**SMALL | {"num_hidden_layers": 1})
    ).save_pretrained(llama)
    said = refusal(adapter, resources)
    assert (
        said.startswith(": the adapter does not fit its base, which has no place for ")
        and "layers.1" in said
    )


def test_an_adapter_that_is_cut_short_or_not_finite_is_named(
    adapter: Path, resources: Resources
) -> None:
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert (
        refusal(adapter, resources)
        == "/adapter_model.safetensors: is cut short or damaged; download it again"
    )
    file.write_bytes(whole)
    state = load_file(file)
    next(iter(state.values())).fill_(float("inf"))
    save_file(state, file)
    assert "hold NaN or infinite weights" in refusal(adapter, resources)


def test_an_adapter_whose_base_is_gone_names_the_base(
    adapter: Path, llama: Path, resources: Resources
) -> None:
    llama.rename(llama.parent / "elsewhere")
    with pytest.raises(ModelError, match=rf"^{llama}: no such model folder"):
        models.load_policy(adapter, resources)
    change_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(
        DataError,
        match=r"/adapter_config\.json: base_model_name_or_path: input should be a valid string",
    ):
        models.load_policy(adapter, resources)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (BartForConditionalGeneration, "bart is an encoder-decoder; take another architecture"),
        (T5ForConditionalGeneration, "t5 is an encoder-decoder; take another architecture"),
        (ViTModel, "vit has no class in transformers as a causal language model; take another"),
    ],
)
def test_what_is_no_causal_language_model_is_told_as_what_it_is(
    model: Any, told: str, tmp_path: Path, resources: Resources
) -> None:
    """Before its weights are read."""
    model.config_class().save_pretrained(tmp_path)
    assert refusal(tmp_path, resources).startswith(f": {told}")


def test_a_base_without_a_classifier_is_told_as_such(tmp_path: Path, resources: Resources) -> None:
    """Mamba's architecture has none, on which a scorer would be trained."""
    MambaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"mamba has no class in transformers as a scorer; take"):
        models.load_scorer_backbone(str(tmp_path), byte_level(CHATS["chatml"]), resources)


def test_lora_targets_that_a_model_lacks_are_told_with_those_it_has(
    llama: Path, resources: Resources
) -> None:
    lora = LORA.model_copy(update={"target_modules": ["c_attn"]})
    with pytest.raises(
        ParamsError,
        match=r"^lora\.target_modules \['c_attn'\] .*takes .*k_proj.*or write all-linear$",
    ):
        models.with_lora(models.load_policy(llama, resources), lora, 0)


@pytest.mark.parametrize(
    ("tied", "targets", "told"),
    [
        (False, ["lm_head"], "lm_head is the head over the vocabulary, of whose weights"),
        (True, ["q_proj", "embed_tokens"], "model.embed_tokens shares its weights with the head"),
        (False, ["q_proj", "embed_tokens"], None),
    ],
)
def test_an_adapter_that_would_be_lost_or_fold_into_the_head_is_refused(
    tied: bool, targets: list[str], told: str | None
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=tied))
    lora = LORA.model_copy(update={"target_modules": targets})
    if told is not None:
        with pytest.raises(ParamsError, match=rf"^lora\.target_modules: {told}.*leave it out$"):
            models.with_lora(model, lora, 0)
        return
    adapted = models.with_lora(model, lora, 0).eval()
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    expected = adapted(IDS).logits
    assert torch.allclose(models.merged(adapted)(IDS).logits, expected, atol=1e-5)


def test_adapters_of_layers_that_share_a_weight_are_refused() -> None:
    """Zamba's: folded in, the adapters of both layers would be added to the one weight."""
    torch.manual_seed(0)
    kinds = ["mamba", "hybrid", "hybrid"]
    shape = SMALL | {"num_hidden_layers": 3, "layers_block_type": kinds, "mamba_d_state": 4}
    heads = {"attention_hidden_size": 32, "attention_head_dim": 16, "n_mamba_heads": 2}
    config = ZambaConfig(**shape | heads, num_mem_blocks=1, use_mamba_kernels=False)
    told = r"layers of ZambaForCausalLM share the weights of down_proj, .* name modules without"
    with pytest.raises(ParamsError, match=told):
        models.with_lora(AutoModelForCausalLM.from_config(config), LORA, 0)
    lora = LORA.model_copy(update={"target_modules": ["out_proj"]})
    adapted = models.with_lora(AutoModelForCausalLM.from_config(config), lora, 0).eval()
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    expected = adapted(IDS).logits
    assert torch.allclose(models.merged(adapted)(IDS).logits, expected, atol=1e-5)


def test_dropout_on_experts_is_told_as_what_it_is() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=2))
    told = r"^lora\.dropout 0\.1 does not go with the experts of MixtralForCausalLM; set it to 0$"
    with pytest.raises(ParamsError, match=told):
        models.with_lora(model, LORA.model_copy(update={"dropout": 0.1}), 0)


def test_adapters_of_experts_are_told_of_by_no_warning_and_saved_in_order(tmp_path: Path) -> None:
    """A stage shows a library's warnings in its log, and these are of no use to anyone."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stage.ignore_warnings()
        model = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=2))
        adapted = models.with_lora(model, LORA, 0)
        adapted.save_pretrained(tmp_path)
        config = tmp_path / "adapter_config.json"
        content = json.loads(config.read_text())
        content["target_parameters"].sort(reverse=True)
        config.write_text(json.dumps(content))
        models._sort_targets(config)
        loading.with_adapter(AutoModelForCausalLM.from_config(model.config), tmp_path)
    saved = json.loads(config.read_text())["target_parameters"]
    assert len(saved) > 1 and saved == sorted(saved)


def test_a_gpt2_that_has_no_linear_modules_takes_adapters(
    tmp_path: Path, resources: Resources
) -> None:
    built("gpt2").save_pretrained(tmp_path)
    adapted = models.with_lora(models.load_policy(tmp_path, resources), LORA, 0)
    assert any("c_attn.lora_A" in name for name, _ in adapted.named_parameters())
    lora = LORA.model_copy(update={"target_modules": ["q_proj"]})
    with pytest.raises(ParamsError, match=r"takes c_attn, c_fc, c_proj; or write all-linear"):
        models.with_lora(models.load_policy(tmp_path, resources), lora, 0)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["out_proj"]], ids=str)
def test_the_remedy_for_lora_targets_names_none_that_peft_refuses(targets: Any) -> None:
    """It refuses to adapt what Mamba's kernels multiply by without a call."""
    model = architectures.built(KEEPING["mamba"])
    lora = LORA.model_copy(update={"target_modules": targets})
    with pytest.raises(ParamsError, match=r"; it takes dt_proj, in_proj, x_proj$"):
        models.with_lora(model, lora, 0)
    taken = LORA.model_copy(update={"target_modules": ["dt_proj", "in_proj", "x_proj"]})
    models.with_lora(architectures.built(KEEPING["mamba"]), taken, 0)


def test_an_adapter_is_no_backbone_even_with_its_base_beside_it(adapter: Path, llama: Path) -> None:
    """transformers would load both, with the base frozen for a training of all its weights."""
    for file in adapter.glob("adapter_*"):
        (llama / file.name).write_bytes(file.read_bytes())
    for folder in (adapter, llama):
        with pytest.raises(ModelError, match=f"^{folder}: holds an adapter; name its base"):
            loading.load_model(AutoModelForSequenceClassification, folder, dtype="auto")


# --- settings and context -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},  # which transformers does not save
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1},
    ],
)
def test_how_a_base_is_drawn_is_left_out_of_policies(
    llama: Path, resources: Resources, caplog: pytest.LogCaptureFixture, asked: dict[str, Any]
) -> None:
    """A policy is served as it was measured, by transformers and by vLLM."""
    settings = {**asked, "bos_token_id": 1, "eos_token_id": [2, 5]}
    (llama / "generation_config.json").write_text(json.dumps(settings))
    tokenizer = byte_level(CHATS["zephyr"])
    tokenizer.pad_token = "<unk>"
    model = models.load_policy(llama, resources)
    with caplog.at_level(logging.INFO):
        models.fit_vocabulary(model, tokenizer)
    assert caplog.text.count("generation_config.json of policies leaves out the base's") == 1
    assert all(repr(name) in caplog.text for name in asked if name != "do_sample")
    models.save(model, tokenizer, llama.parent / "saved")
    saved = json.loads((llama.parent / "saved" / "generation_config.json").read_text())
    assert saved["bos_token_id"] == 1
    config = GenerationConfig.from_pretrained(llama.parent / "saved")
    assert config.do_sample and config.temperature in (None, 1.0) and config.top_p in (None, 1.0)
    assert config.top_k == 0 and config.repetition_penalty in (None, 1.0)
    assert set(saved["eos_token_id"]) == {tokenizer.eos_token_id, 5}
    models.load_policy(llama.parent / "saved", resources)


def test_a_context_that_is_too_short_is_told() -> None:
    model = built("llama")
    loading.check_context(model, 64, "sft.training.max_length")
    with pytest.raises(
        ParamsError,
        match=r"^sft\.training\.max_length: 65 tokens, but the context .* is 64; lower it$",
    ):
        loading.check_context(model, 65, "sft.training.max_length")
    loading.check_context(torch.nn.Linear(1, 1), 10**9, "x")


def test_transformers_prints_no_report_of_its_own(
    llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is missing is said once, by us: a stage's log holds no table of transformers beside
    it.
    """
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # as a stage does
    try:
        loading.load_model(
            AutoModelForSequenceClassification,
            llama,
            dtype=torch.float32,
            fresh=("score.",),
            num_labels=1,
        )
        change_weights(llama, lambda state: state.pop("model.norm.weight"))
        with pytest.raises(ModelError):
            loading.load_model(AutoModelForCausalLM, llama, dtype=torch.float32)
    finally:
        hf_logging.set_verbosity(verbosity)
    told = "".join(capfd.readouterr())
    assert "LOAD REPORT" not in told and not re.search(r"MISSING|newly initialized", told)


# --- GGUF -----------------------------------------------------------------------------------------


def write_gguf(gguf: Any, model: PreTrainedModel, file: Path) -> None:
    """A Llama's weights as llama.cpp writes them: other names, and rows of q and k in another
    order.
    """
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        base = name.removesuffix(".weight")
        count = heads.get(base.rpartition(".")[2])
        if count is not None:
            rows = weight.reshape(count, 2, weight.shape[0] // count // 2, weight.shape[1])
            weight = rows.swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{names.get_name(base)}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_weights_of_a_gguf_file_come_back_and_can_be_saved(
    tmp_path: Path, resources: Resources
) -> None:
    gguf = pytest.importorskip("gguf")
    model = built("llama").eval()
    write_gguf(gguf, model, tmp_path / "tiny.gguf")
    loaded = models.load_policy(tmp_path, resources, gguf_file="tiny.gguf", trained=True)
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(IDS).logits, model(IDS).logits, atol=1e-4)
    loaded.save_pretrained(tmp_path / "saved")
    again = models.load_policy(tmp_path / "saved", resources)
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_a_gguf_file_that_is_cut_short_or_gone_is_refused(
    tmp_path: Path, resources: Resources
) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    write_gguf(gguf, built("llama"), file)
    file.write_bytes(file.read_bytes()[:-2000])
    for name in ("tiny.gguf", "gone.gguf"):
        with pytest.raises(ModelError) as caught:
            models.load_policy(tmp_path, resources, gguf_file=name)
        assert str(caught.value).startswith(f"{tmp_path}: ") and "\n" not in str(caught.value)

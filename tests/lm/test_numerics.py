"""Log-probabilities by chunks are those of all logits at once, and a policy before its first step
is its reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from dualign.core.errors import ModelError
from dualign.lm import models, numerics
from dualign.lm.frozen import own
from dualign.lm.numerics import answer_log_probabilities
from dualign.lm.packing import enable_packing
from dualign.params.base import LoraParams, Resources
from dualign.training.pairwise import Pair, PairLossConfig, pairwise_trainer, train_pairwise
from dualign.training.run import Job, without_dropout
from dualign.training.supervised import train_sft
from tests.lm.architectures import KEEPING, LOSING
from tests.lm.architectures import built as kept
from tests.lm.layouts import CHATS, byte_level
from tests.tiny import short_training

LORA = LoraParams(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", quantise=None)
SMALL = {
    "vocab_size": 90,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "gpt2": GPT2Config(
        vocab_size=90,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen3": Qwen3Config(**SMALL),
    "gemma2": Gemma2Config(**SMALL, query_pre_attn_scalar=8, final_logit_softcapping=2.0),
    "granite": GraniteConfig(**SMALL, logits_scaling=3.0, embedding_multiplier=2.0),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "cohere2": Cohere2Config(**SMALL, logit_scale=0.25),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def in_bf16(resources: Resources, **changes: Any) -> Resources:
    return resources.model_copy(update={"precision": "bf16", **changes})


def built(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels of three rows of different lengths, with answers that begin at different
    places.
    """
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row, (begin, end) in enumerate([(4, 12), (1, 7), (6, 9)]):
        labels[row, :begin] = -100
        labels[row, end:] = -100
        mask[row, end:] = 0
    return ids.masked_fill(mask == 0, 0), mask, labels


def brute_force(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    known = labels[:, 1:] != -100
    found = (
        torch.log_softmax(logits, -1)
        .gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1))
        .squeeze(-1)
    )
    return (found * known).sum(1)


def padded_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = byte_level(CHATS["gemma"])
    tokenizer.pad_token = "<pad>"
    return tokenizer


def gradients(model: Any, of: Callable[..., Tensor], given: Sequence[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    (of(model, *given) * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def stir(model: torch.nn.Module) -> None:
    """Give every adapter weight a value, as training would."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)


# --- the same numbers as of all logits at once ----------------------------------------------------


@pytest.mark.parametrize("positions", [None, 1, 4])
@pytest.mark.parametrize("kind", ["plain", "lora", "checkpointed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_brute_force(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: str, positions: int | None
) -> None:
    """Whatever the chunk: all positions at once, one, or four and a rest."""
    model: Any = built(name)
    numerics.check_head(model, name)
    if kind == "lora":
        model = models.with_lora(model, LORA, 0)
        stir(model)
    elif kind == "checkpointed":
        model.gradient_checkpointing_enable()
        without_dropout(model).train()
    if positions is not None:
        monkeypatch.setattr(numerics, "CHUNK", positions * 90 + 1)
    given = rows()
    expected = gradients(model, brute_force, given)
    found = gradients(model, answer_log_probabilities, given)
    assert torch.allclose(
        answer_log_probabilities(model, *given), brute_force(model, *given), atol=1e-5
    )
    with torch.no_grad():
        assert torch.allclose(
            answer_log_probabilities(model, *given), brute_force(model, *given), atol=1e-5
        )
    assert found.keys() == expected.keys() and len(found) > 4
    for key, grad in found.items():
        assert torch.allclose(
            grad, expected[key], atol=1e-5 * max(1.0, float(expected[key].abs().max()))
        ), key


def test_a_model_that_makes_its_logits_in_another_way_is_refused(
    tmp_path: Path, resources: Resources
) -> None:
    """Twice the logits is what no setting of this architecture says."""

    class Louder(type(built("llama"))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model = built("llama")
    numerics.check_head(model, "it")
    model.__class__ = Louder
    with pytest.raises(
        ModelError,
        match=r"^it: Louder turns hidden states into logits in a way that dualign does not",
    ):
        numerics.check_head(model, "it")


def test_a_cap_of_a_name_of_its_own_is_seen_whatever_the_weights() -> None:
    """Logits of small weights lie far below RecurrentGemma's cap of 30, which hardly moves them."""
    model = AutoModelForCausalLM.from_config(LOSING["recurrent_gemma"])
    with pytest.raises(ModelError, match=r"^it: RecurrentGemmaForCausalLM turns hidden states"):
        numerics.check_head(model, "it")


@pytest.mark.parametrize("name", KEEPING)
def test_states_between_tokens_do_not_reach_another_row(name: str) -> None:
    """Each row padded on the right beside others is what it is alone; none is packed."""
    model = kept(KEEPING[name])
    numerics.check_head(model, name)
    ids, mask, labels = rows()
    found = answer_log_probabilities(model, ids, mask, labels)
    for row, length in enumerate(mask.sum(1).tolist()):
        own = slice(row, row + 1), slice(length)
        alone = brute_force(model, ids[own], mask[own], labels[own])
        assert torch.allclose(found[row], alone, atol=1e-4)
    assert not enable_packing(model)


def test_a_row_without_an_answer_has_log_probability_zero() -> None:
    ids, mask, labels = rows()
    labels[1] = -100
    found = answer_log_probabilities(built("llama"), ids, mask, labels)
    assert found[1] == 0 and found[0] < 0
    none = answer_log_probabilities(built("llama"), ids, mask, torch.full_like(labels, -100))
    assert none.tolist() == [0, 0, 0]


# --- memory ---------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.found = max(self.found, one.numel())
        return result


def largest(model: Any, of: Callable[..., Tensor], given: Sequence[Tensor]) -> int:
    with Largest() as mode:
        of(model, *given).sum().backward()
    return mode.found


def test_no_tensor_is_larger_than_a_chunk_or_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | {"vocab_size": 2000}))
    ids = torch.randint(3, 2000, (4, 40))
    given = (ids, torch.ones_like(ids), ids)
    chunk = 16 * 2000
    monkeypatch.setattr(numerics, "CHUNK", chunk)
    head = model.get_output_embeddings().weight.numel()
    assert largest(model, answer_log_probabilities, given) <= max(chunk, head)
    assert largest(model, brute_force, given) >= 4 * 39 * 2000


# --- bf16 -----------------------------------------------------------------------------------------

TOKENS = 256


def uneven() -> PreTrainedModel:
    """A Llama whose next tokens are far from equally likely, with weights that bf16 does not
    hold.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uneven")
    uneven().save_pretrained(path)
    return path


def long_rows(shorter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eight rows with answers of 256 tokens, every second one `shorter` by that many."""
    ids = torch.randint(5, 2000, (8, TOKENS + 16), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if shorter:
        mask[::2, -shorter:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :16] = -100
    return ids.masked_fill(mask == 0, 0), mask, labels


@torch.no_grad()
def by_batches(model: Any, given: Sequence[Tensor], size: int) -> Tensor:
    device = next(model.parameters()).device
    parts = zip(*(one.to(device).split(size) for one in given), strict=True)
    return torch.cat([answer_log_probabilities(model, *part) for part in parts])


def check_first_log_ratios(folder: Path, resources: Resources) -> None:
    reference = models.load_policy(folder, resources)
    full = models.load_policy(folder, resources, trained=True).train()
    adapted = models.with_lora(models.load_policy(folder, resources), LORA, 0).train()
    for shorter in (0, 60):
        given = long_rows(shorter)
        column = by_batches(reference, given, 8)
        assert column.std() > 1
        for size in (1, 3, 8):
            for model in (full, adapted):
                assert (by_batches(model, given, size) - column).abs().max() <= 0.02


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_policy_before_its_first_step_is_its_reference(
    folder: Path, resources: Resources, precision: str
) -> None:
    check_first_log_ratios(folder, resources.model_copy(update={"precision": precision}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_policy_before_its_first_step_is_its_reference_on_a_gpu(
    folder: Path, resources: Resources
) -> None:
    check_first_log_ratios(folder, in_bf16(resources, device="cuda"))


def test_frozen_matrices_are_bf16_and_all_else_is_fp32(folder: Path, resources: Resources) -> None:
    frozen = models.load_policy(folder, in_bf16(resources))
    assert all(
        (weight.dtype == torch.bfloat16) == (weight.dim() > 1) for weight in frozen.parameters()
    )
    assert isinstance(frozen.lm_head, numerics.Fp32Head)
    assert frozen(torch.tensor([[5, 6]])).logits.dtype == torch.float32
    trained = models.load_policy(folder, in_bf16(resources), trained=True)
    assert {weight.dtype for weight in trained.parameters()} == {torch.float32}
    assert torch.equal(trained.lm_head.weight, uneven().lm_head.weight)
    seen: list[torch.dtype] = []
    trained.model.layers[1].register_forward_hook(
        lambda module, given, output: seen.append(given[0].dtype)
    )
    trained(torch.tensor([[5, 6]]))
    assert seen == [torch.bfloat16]
    rounded = models.load_policy(folder, in_bf16(resources), trained=True, rounded=True)
    assert torch.equal(rounded.lm_head.weight, uneven().lm_head.weight.bfloat16().float())
    pure = models.load_policy(folder, in_bf16(resources, precision="pure_bf16"), trained=True)
    assert {weight.dtype for weight in pure.parameters()} == {torch.bfloat16}
    adapted = models.with_lora(frozen, LORA, 0)
    assert {weight.dtype for weight in adapted.parameters() if weight.requires_grad} == {
        torch.float32
    }


def test_a_small_adapter_is_not_lost_when_it_is_folded_in(
    folder: Path, resources: Resources
) -> None:
    adapted = models.with_lora(models.load_policy(folder, in_bf16(resources)), LORA, 0)
    before = adapted.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.float().clone()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(weight, 1e-5)
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    change = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    plain = models.merged(adapted)
    assert {weight.dtype for weight in plain.parameters()} == {torch.float32}
    found = plain.model.layers[0].mlp.up_proj.weight - before
    assert torch.nn.functional.cosine_similarity(found.flatten(), change.flatten(), 0) > 0.99


def test_a_copy_of_a_model_computes_what_the_model_did(folder: Path, resources: Resources) -> None:
    """With its own weights, whatever becomes of the model."""
    model = models.load_policy(folder, in_bf16(resources))
    given = long_rows(0)
    expected = by_batches(model, given, 8)
    twin = copy.deepcopy(model)
    own(model)  # its weights are all frozen models' of this folder
    model.lm_head.weight.data.zero_()
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert torch.equal(by_batches(twin, given, 8), expected)
    assert not torch.equal(by_batches(model, given, 8), expected)


def test_scores_are_the_same_whether_their_model_is_trained_or_not(
    folder: Path, resources: Resources
) -> None:
    torch.manual_seed(0)
    heads = torch.randn(1, 64)
    tokenizer = padded_tokenizer()
    found = []
    for trained in (True, False):
        model = models.load_scorer_backbone(
            str(folder), tokenizer, in_bf16(resources), trained=trained
        )
        assert (
            isinstance(model.score, numerics.Fp32Score)
            and model.score.weight.dtype == torch.float32
        )
        model.score.weight.data = heads
        ids, mask, _ = long_rows(40)
        with torch.no_grad():
            found.append(model(input_ids=ids, attention_mask=mask).logits)
    assert found[0].dtype == torch.float32 and (found[0] - found[1]).abs().max() < 1e-5


@pytest.mark.parametrize("rank", [0, 4])
def test_the_first_step_of_a_training_run_begins_at_the_reference(
    folder: Path, resources: Resources, tmp_path: Path, rank: int
) -> None:
    """As the trainer prepares the model, with gradient checkpointing: the loss is ln 2 and the
    log-ratio zero.
    """
    own = in_bf16(resources, gradient_checkpointing=True, micro_batch_size=None, log_steps=1)
    ids, mask, labels = long_rows(0)
    ids[1::2, :16] = ids[::2, :16]
    labels[:, 16:] = ids[:, 16:]
    column = by_batches(models.load_policy(folder, own), (ids, mask, labels), 3).tolist()
    answers = ids[:, 16:].tolist()
    prompts = ids[:, :16].tolist()
    pairs = [
        Pair(prompts[i], answers[i], answers[i + 1], column[i], column[i + 1])
        for i in range(0, 8, 2)
    ]
    model = models.with_lora(
        models.load_policy(folder, own, trained=rank == 0),
        LORA.model_copy(update={"rank": rank}),
        0,
    )
    job = Job(short_training(), own, tmp_path, seed=1)
    metrics = train_pairwise(model, padded_tokenizer(), pairs, PairLossConfig(1.0, 1.0), job)
    assert abs(metrics["log_ratio"]) <= 0.02 and metrics["abs_logit"] <= 0.04


# --- small steps ----------------------------------------------------------------------------------


def change_of(folder: Path, resources: Resources, scratch: Path) -> Tensor:
    """How 40 steps of supervised training at a rate of 1e-6 change the weights."""
    model = models.load_policy(folder, resources, trained=True)
    before = torch.cat([weight.detach().flatten().double() for weight in model.parameters()])
    ids = torch.randint(5, 420, (160, 24), generator=torch.Generator().manual_seed(4)).tolist()
    pairs = [(row[:8], row[8:]) for row in ids]
    job = Job(short_training(learning_rate=1e-6, max_steps=40), resources, scratch, seed=1)
    train_sft(model, padded_tokenizer(), pairs, pairs[:4], job)
    return torch.cat([weight.detach().flatten().double() for weight in model.parameters()]) - before


def test_fp32_masters_take_the_small_steps_of_fp32_training(
    folder: Path, resources: Resources, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(start)
    own = resources.model_copy(
        update={"micro_batch_size": None, "log_steps": 40, "gradient_checkpointing": False}
    )
    changes = {
        precision: change_of(
            start, own.model_copy(update={"precision": precision}), tmp_path / precision
        )
        for precision in ("fp32", "bf16", "pure_bf16")
    }
    cosine = {
        name: torch.cosine_similarity(changes["fp32"], change, 0).item()
        for name, change in changes.items()
    }
    assert cosine["bf16"] >= 0.99, cosine
    assert cosine["pure_bf16"] < 0.9, cosine


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_adapters_dropout_is_on_as_asked_and_the_bases_is_off(
    resources: Resources, tmp_path: Path, name: str, dropout: float
) -> None:
    """GPT-2's configuration asks for dropout in its layers."""
    model = models.with_lora(built(name), LORA.model_copy(update={"dropout": dropout}), 0)
    stir(model)
    prompt, first, second = [5, 6, 7], [8, 9, 2], [10, 11, 12, 2]
    job = Job(
        short_training(batch_size=2),
        resources.model_copy(update={"micro_batch_size": None}),
        tmp_path,
        seed=1,
    )
    trainer = pairwise_trainer(
        model,
        padded_tokenizer(),
        [Pair(prompt, first, second, 0.0, 0.0)] * 2,
        PairLossConfig(0.1, 0.1),
        job,
    )
    inside = trainer.model.train()
    ids = torch.tensor([[*prompt, *first]])
    with torch.no_grad():
        once, twice = (inside(input_ids=ids).logits for _ in range(2))
    assert torch.equal(once, twice) == (dropout == 0)
    base = [module.p for key, module in inside.named_modules()
            if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in key]  # fmt: skip
    assert all(p == 0 for p in base) and (name != "gpt2" or len(base) > 4)
    adapters = [
        module for key, module in inside.named_modules() if key.endswith("lora_dropout.default")
    ]
    own = {module.p for module in adapters if isinstance(module, torch.nn.Dropout)}
    assert own <= {dropout} and (dropout == 0 or own)


# --- devices --------------------------------------------------------------------------------------


def test_more_than_one_visible_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, resources: Resources
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count in (1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda found=count: found)
        for device in ("auto", "cuda"):
            asked = resources.model_copy(update={"device": device})
            if count == 1:
                assert numerics.device_of(asked).type == "cuda"
                continue
            with pytest.raises(
                ModelError,
                match=r"^torch sees 2 GPUs, .* in one process: .*CUDA_VISIBLE_DEVICES",
            ):
                numerics.device_of(asked)
            assert numerics.device_of(asked.model_copy(update={"processes": "auto"})).index == 0
        assert numerics.device_of(resources).type == "cpu"


@pytest.mark.parametrize(("major", "expected"), [(7, torch.float32), (8, torch.bfloat16)])
def test_a_card_that_only_emulates_bf16_computes_in_fp32(
    monkeypatch: pytest.MonkeyPatch, resources: Resources, major: int, expected: torch.dtype
) -> None:
    """What torch asks a T4 and an A100: both take a tensor in bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    card = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    asked = resources.model_copy(update={"device": "cuda", "precision": "auto"})
    assert numerics.precision_of(asked) is expected

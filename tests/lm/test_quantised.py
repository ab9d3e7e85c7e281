"""A base in 4 bits comes back as it was, policies begin at it, and what leaves is whole."""

from __future__ import annotations

import json
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
from dualign.core.schema import user
from dualign.lm import models, quantised
from dualign.lm.loading import load_config
from dualign.lm.publish import publish
from dualign.lm.sampling import log_probabilities
from dualign.params.base import LoraParams, Resources
from dualign.scoring.calibration import Platt
from dualign.scoring.scorers import Scorer
from dualign.training.pairwise import Pair, PairLossConfig, train_pairwise
from dualign.training.run import Job
from tests.tiny import DEVICES, saved_llama, short_training

LORA = LoraParams(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", quantise="nf4")
IDS = torch.tensor([[3, 5, 8, 9, 11, 4]])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return models.train_tokenizer([f"word{i} and more" for i in range(40)], 300)


@pytest.fixture
def whole(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
    return saved_llama(tokenizer, tmp_path / "base", **shape)


@pytest.fixture
def base(whole: Path) -> Path:
    pytest.importorskip("bitsandbytes")
    quantised.quantise(whole)
    return whole


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(next(model.parameters()).device)).logits.float()


def stirred(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            drawn = torch.randn(weight.shape, generator=generator)
            weight.data = std * drawn.to(weight.device)
    return model


def test_it_is_near_the_whole_one_in_an_eighth_of_its_matrices(
    whole: Path, resources: Resources
) -> None:
    pytest.importorskip("bitsandbytes")
    before = logits(models.load_policy(whole, resources))
    quantised.quantise(whole)
    narrow = models.load_policy(whole, resources)
    assert quantised.is_quantised(narrow)
    error = (logits(narrow) - before).std() / before.std()
    assert 0.01 < error < 0.5
    matrix = narrow.model.layers[0].mlp.up_proj.weight
    assert matrix.numel() * matrix.element_size() == 64 * 128 // 2
    # it reads the same numbers every time, and two policies hold one of it
    again = models.load_policy(whole, resources)
    assert torch.equal(logits(again), logits(narrow))
    assert again.model.layers[0].mlp.up_proj.weight is matrix


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_policy_before_its_first_step_is_the_base_in_4_bits(
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    resources: Resources,
    tmp_path: Path,
    precision: str,
    device: str,
) -> None:
    own = resources.model_copy(update={"precision": precision, "device": device, "log_steps": 1})
    reference = models.load_policy(base, own)
    prompts = [[3, 5], [3, 5], [6], [6]]
    answers = [[8, 9, 1], [11, 4, 1], [7, 1], [12, 1]]
    column = log_probabilities(reference, tokenizer, prompts, answers, batch_size=4).tolist()
    pairs = [Pair(prompts[i], answers[i], answers[i + 1], column[i], column[i + 1]) for i in (0, 2)]
    model = models.with_lora(models.load_policy(base, own), LORA, 0)
    training = short_training(batch_size=2, learning_rate=1e-2, max_length=32)
    metrics = train_pairwise(
        model, tokenizer, pairs, PairLossConfig(1.0, 1.0), Job(training, own, tmp_path / "s", 0)
    )
    bound = 1e-5 if precision == "fp32" else 0.02
    assert abs(metrics["log_ratio"]) <= bound and metrics["abs_logit"] <= 2 * bound
    # and the step has moved the adapter alone
    assert not torch.equal(logits(model), logits(reference))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(reference))


def test_an_adapter_comes_back_and_what_leaves_is_whole(
    base: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources, tmp_path: Path
) -> None:
    model = stirred(models.with_lora(models.load_policy(base, resources), LORA, 0))
    expected = logits(model)
    models.save(model, tokenizer, tmp_path / "policy")
    loaded = models.load_policy(tmp_path / "policy", resources)
    assert isinstance(loaded, PeftModel) and torch.equal(logits(loaded), expected)
    publish(tmp_path / "policy", tmp_path / "published")
    assert "quantization_config" not in json.loads((tmp_path / "published/config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "published", dtype=torch.float32)
    assert {weight.dtype for weight in plain.parameters()} == {torch.float32}
    assert torch.allclose(logits(plain), expected, atol=1e-4)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_scorer_on_it(
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    resources: Resources,
    tmp_path: Path,
    precision: str,
    device: str,
) -> None:
    own = resources.model_copy(update={"precision": precision, "device": device})
    backbone = models.load_scorer_backbone(str(base), tokenizer, own, trained=False)
    model = stirred(models.with_lora(backbone, LORA, 0, head=True))
    scorer = Scorer(model.eval(), tokenizer, Platt())
    asked = ([user("word1 and"), user("more")], ["word2", "and word3 more"])
    expected = scorer.score(*asked, batch_size=2)
    scorer.save(tmp_path / "scorer")
    loaded = Scorer.load(tmp_path / "scorer", own)
    assert quantised.is_quantised(loaded.model)
    assert loaded.score(*asked, batch_size=2).tolist() == expected.tolist()
    for file in base.glob("*.safetensors"):
        file.unlink()
    alone = Scorer.load(tmp_path / "scorer", own)
    assert not quantised.is_quantised(alone.model)
    bound = 1e-3 if precision == "fp32" else 0.1
    assert alone.score(*asked, batch_size=2).tolist() == pytest.approx(expected, abs=bound)


def test_it_is_never_trained_itself(base: Path, resources: Resources) -> None:
    with pytest.raises(ModelError, match=r"never trained itself.*lora\.rank"):
        models.load_policy(base, resources, trained=True)


def test_without_bitsandbytes_one_line_names_the_remedy(
    whole: Path, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"bitsandbytes.*pip install 'dualign\[qlora\]'"):
        quantised.quantise(whole)
    config = json.loads((whole / "config.json").read_text())
    config |= {quantised.MARK: True, "quantization_config": {"quant_method": "bitsandbytes"}}
    (whole / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"lora\.quantise to null") as caught:
        models.load_policy(whole, resources)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    del config[quantised.MARK]  # somebody else's
    (whole / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised \(bitsandbytes\)"):
        load_config(whole)

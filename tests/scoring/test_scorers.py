"""Scorers give in use the scores that they were trained on, and come back from disk as they
were.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dualign.core.errors import DualignError, ModelError
from dualign.core.schema import Message, user
from dualign.data import world
from dualign.lm.models import (
    build_scratch,
    load_policy,
    load_scorer_backbone,
    merged,
    save,
    train_tokenizer,
    with_lora,
)
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.params.base import LoraParams, Resources
from dualign.scoring.calibration import Isotonic, Platt
from dualign.scoring.scorers import Scorer, conversations
from dualign.training.scorer import ScoredPair, _FlagCollator, _ranked
from tests.tiny import WIDER

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = WIDER.model_copy(update={"layers": 2})
QUESTION = world.prompts()[0]
ANSWERS = [answer.text for answer in world.answers(QUESTION)[:12]]
PROMPTS: list[list[Message]] = [user(QUESTION), user("Why?")] * 6


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(ANSWERS, 300)


@pytest.fixture(scope="module")
def backbone(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    save(build_scratch(SCRATCH, tokenizer, seed=0), tokenizer, folder)
    return folder


def classifier(
    backbone: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> PreTrainedModel:
    """A sequence classifier whose head is not zero any more."""
    model = load_scorer_backbone(str(backbone), tokenizer, resources)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    return model.eval()


@pytest.fixture
def scorer(backbone: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources) -> Scorer:
    return Scorer(classifier(backbone, tokenizer, resources), tokenizer, Platt())


@torch.no_grad()
def by_hand(scorer: Scorer, prompt: list[Message], answer: str) -> float:
    """The head's output at the EOS of one unpadded conversation."""
    [before] = encode_prompts(scorer.tokenizer, [prompt])
    [after] = encode_answers(scorer.tokenizer, [answer])
    assert after[-1] == scorer.tokenizer.eos_token_id
    hidden = scorer.model.model(input_ids=torch.tensor([before + after])).last_hidden_state[0, -1]
    return float(scorer.model.score(hidden))


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_score_is_read_at_eos_whatever_the_padding(scorer: Scorer, batch_size: int) -> None:
    scores = scorer.score(PROMPTS, ANSWERS, batch_size=batch_size)
    expected = [by_hand(scorer, *row) for row in zip(PROMPTS, ANSWERS, strict=True)]
    assert scores.dtype == np.float64 and scores.shape == (12,)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert scores.std() > 0.1


def test_training_scores_the_same_ids_at_the_same_place(scorer: Scorer) -> None:
    """The trainer's data, collator and forward pass against `score`."""
    rows = conversations(scorer.tokenizer, PROMPTS, ANSWERS)
    assert all(row[-1] == scorer.tokenizer.eos_token_id for row in rows)
    pairs = [ScoredPair(high, low) for high, low in zip(rows[:6], rows[6:], strict=True)]
    batch = _FlagCollator(pad_token_id=scorer.tokenizer.pad_token_id)(
        list(_ranked(pairs, max_length=200))
    )
    assert batch.pop("flags").tolist() == [[-1, -1]] * 6
    with torch.no_grad():
        trained = scorer.model(**batch).logits.squeeze(-1)
    assert scorer.score(PROMPTS, ANSWERS, batch_size=4) == pytest.approx(trained.numpy(), abs=1e-5)


def test_tokens_for_encoders_make_none_of_a_language_model(
    backbone: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> None:
    """LLM-jp's tokenizers have a CLS and a SEP token, which stand in no text; a scorer on such a
    base still tells an answer that was cut.
    """
    named = copy.deepcopy(tokenizer)
    named.add_special_tokens({"cls_token": "<|user|>", "sep_token": "<|system|>"})
    scorer = Scorer(classifier(backbone, named, resources), named, Platt())
    plain = Scorer(scorer.model, tokenizer, Platt())
    for ended in ([True] * 12, [False] * 12):
        found, expected = (
            one.score(PROMPTS, ANSWERS, batch_size=4, ended=ended) for one in (scorer, plain)
        )
        assert found == pytest.approx(expected)


def test_order_and_company_of_a_row_change_nothing(scorer: Scorer) -> None:
    forward = scorer.score(PROMPTS, ANSWERS, batch_size=3)
    backward = scorer.score(PROMPTS[::-1], ANSWERS[::-1], batch_size=3)
    assert backward[::-1] == pytest.approx(forward, abs=1e-5)
    alone = [
        float(scorer.score([p], [a], batch_size=3)[0])
        for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    assert alone == pytest.approx(forward, abs=1e-5)


def test_calibration_is_applied_and_can_be_replaced(scorer: Scorer) -> None:
    raw = scorer.score(PROMPTS, ANSWERS, batch_size=8)
    calibrated = scorer.calibrated(Platt(2.0, -0.5))
    assert calibrated.score(PROMPTS, ANSWERS, batch_size=8) == pytest.approx(2 * raw - 0.5)
    assert scorer.score(PROMPTS, ANSWERS, batch_size=8) == pytest.approx(raw)


@pytest.mark.parametrize(
    "calibration", [Platt(1.7, 0.3), Isotonic(1.2, (-0.5, 0.1, 2.0), (-2.0, 0.25, 0.75))]
)
def test_model_tokenizer_and_calibration_come_back_from_disk(
    scorer: Scorer, resources: Resources, tmp_path: Path, calibration: Platt | Isotonic
) -> None:
    calibrated = scorer.calibrated(calibration)
    calibrated.save(tmp_path / "scorer")
    loaded = Scorer.load(tmp_path / "scorer", resources)
    assert loaded.calibration == calibration
    assert np.array_equal(
        loaded.score(PROMPTS, ANSWERS, batch_size=5),
        calibrated.score(PROMPTS, ANSWERS, batch_size=5),
    )
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pkl"))


def test_a_scorer_trained_with_adapters_is_saved_whole(
    backbone: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources, tmp_path: Path
) -> None:
    lora = LoraParams(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", quantise=None)
    model = with_lora(classifier(backbone, tokenizer, resources), lora, 0, head=True)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(
                parameter, std=0.3, generator=torch.Generator().manual_seed(len(name))
            )
    ids = torch.tensor([conversations(tokenizer, PROMPTS[:1], ANSWERS[:1])[0]])
    with torch.no_grad():
        expected = float(model.eval()(input_ids=ids).logits)
    Scorer(merged(model), tokenizer, Platt()).save(tmp_path / "scorer")
    scores = Scorer.load(tmp_path / "scorer", resources).score(
        PROMPTS[:1], ANSWERS[:1], batch_size=1
    )
    assert scores.tolist() == pytest.approx([expected], abs=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_scorer_of_adapters_computes_with_the_base_of_policies(
    backbone: Path,
    tokenizer: PreTrainedTokenizerBase,
    resources: Resources,
    tmp_path: Path,
    precision: str,
) -> None:
    own = resources.model_copy(update={"precision": precision})
    lora = LoraParams(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", quantise=None)
    trained = load_scorer_backbone(str(backbone), tokenizer, own, trained=False)
    model = with_lora(trained, lora, 0, head=True)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(len(name))
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    scorer = Scorer(model.eval(), tokenizer, Platt(2.0, 0.1))
    expected = scorer.score(PROMPTS, ANSWERS, batch_size=8)
    scorer.save(tmp_path / "scorer")
    assert np.array_equal(scorer.score(PROMPTS, ANSWERS, batch_size=8), expected)

    policy = load_policy(backbone, own)
    loaded = Scorer.load(tmp_path / "scorer", own)
    assert np.array_equal(loaded.score(PROMPTS, ANSWERS, batch_size=8), expected)
    held = {weight.data_ptr() for weight in policy.parameters()}
    assert {
        weight.data_ptr()
        for name, weight in loaded.model.named_parameters()
        if "lora_" not in name and "score" not in name
    } <= held
    # it is in the folder as a whole too, for where the base is another, or is not
    other = Path(str(backbone)) / "model.safetensors"
    other.rename(other.with_suffix(".gone"))
    try:
        whole = Scorer.load(tmp_path / "scorer", own).score(PROMPTS, ANSWERS, batch_size=8)
    finally:
        other.with_suffix(".gone").rename(other)
    assert whole == pytest.approx(expected, abs=1e-4 if precision == "fp32" else 0.2)
    assert not np.array_equal(whole, expected)


def test_a_conversation_too_long_for_the_model_keeps_its_end(scorer: Scorer) -> None:
    whole = conversations(scorer.tokenizer, PROMPTS[:1], ANSWERS[:1])[0]
    short = train_tokenizer(ANSWERS, 300)
    short.model_max_length = 7
    assert conversations(short, PROMPTS[:1], ANSWERS[:1]) == [whole[-7:]]


def test_a_folder_that_holds_no_scorer_is_named(resources: Resources, tmp_path: Path) -> None:
    with pytest.raises(DualignError, match=rf"{tmp_path}/none/scorer\.json: no such file"):
        Scorer.load(tmp_path / "none", resources)
    (tmp_path / "scorer.json").write_text('{"scale": 1.0, "offset": 0.0}')
    with pytest.raises(ModelError, match=f"^{tmp_path}: no usable tokenizer") as caught:
        Scorer.load(tmp_path, resources)
    assert "\n" not in str(caught.value)

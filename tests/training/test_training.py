"""Training: the losses as they are computed on batches, TRL's own where they must agree, and runs
that go on.
"""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OpenAIGPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from dualign import PairwiseConfig, PairwiseTrainer
from dualign.core import work
from dualign.core.errors import DataError, DualignError, ModelError, ParamsError, TrainingError
from dualign.core.schema import user
from dualign.data import world
from dualign.lm import packing
from dualign.lm.models import build_scratch, load_scorer_backbone, save, train_tokenizer, with_lora
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.math import losses
from dualign.params.base import LoraParams, Resources, TrainingParams
from dualign.scoring.scorers import conversations
from dualign.training import pairwise as pairwise_training
from dualign.training import run, supervised
from dualign.training import scorer as scorer_training
from dualign.training.checkpoints import last_checkpoint
from dualign.training.pairwise import Pair, PairLossConfig
from dualign.training.run import Job
from dualign.training.scorer import ScoredPair
from pipeline.run.progress import read_progress
from tests.tiny import WIDER, on_cpu, short_training
from tests.training.conftest import same, weights

ROOT = Path(__file__).resolve().parents[2]
QUESTION = world.prompts()[0]
ANSWERS = [answer.text for answer in world.answers(QUESTION)]
LORA = LoraParams(rank=2, alpha=4.0, dropout=0.1, target_modules="all-linear", quantise=None)


pytestmark = pytest.mark.usefixtures("one_thread")


#: Rates of dropout as architectures name them: of modules, and of functions that attention calls.
NOISY: dict[str, dict[str, float]] = {
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "phi": {"attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "mixtral": {"attention_dropout": 0.5, "router_jitter_noise": 0.5, "num_key_value_heads": 2},
    # These read the configuration at work.
    "falcon": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "persimmon": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
}


@pytest.mark.parametrize("name", NOISY)
def test_no_noise_of_the_base_is_left_and_an_adapters_own_is(name: str) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    config = AutoConfig.for_model(name, **size, **NOISY[name])
    model = AutoModelForCausalLM.from_config(config)
    # Not the experts of Mixtral, which take no dropout.
    targets = ["q_proj", "c_attn", "query_key_value"]
    lora = LORA.model_copy(update={"target_modules": targets})
    model = with_lora(model, lora, 0)
    before = model.config.to_dict()
    with run.noise_kept(model):
        noiseless(model)
    assert model.config.to_dict() == before


def noiseless(model: Any) -> None:
    """Two passes of what is trained are the same, once an adapter's own noise is off."""
    adapted = run.without_dropout(model).train()
    dropouts = [one for name, one in adapted.named_modules() if "lora_dropout.d" in name]
    assert dropouts and {one.p for one in dropouts} == {LORA.dropout}
    for one in dropouts:
        one.p = 0.0
    ids = torch.arange(1, 9)[None]
    assert torch.equal(adapted(input_ids=ids).logits, adapted(input_ids=ids).logits)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([*ANSWERS, QUESTION], 300)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Eight steps of four rows, a checkpoint at the fourth."""
    resources = on_cpu(
        micro_batch_size=None, gradient_checkpointing=False, checkpoint_steps=4, log_steps=1
    )
    run = short_training(
        learning_rate=1e-2,
        adam_beta2=0.999,
        warmup=0.25,
        schedule="cosine",
        max_length=120,
        max_steps=8,
    )
    return Job(run, resources, tmp_path / "scratch", seed=3)


@pytest.fixture(params=["padded", "packed"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a batch of pairs is read; small models are packed only when asked."""
    if request.param == "packed":
        monkeypatch.setattr(packing, "WIDTH", 0)
    return str(request.param)


def changed(job: Job, scratch: str | None = None, **updates: Any) -> Job:
    """A job with other training or resource params, in another scratch folder."""
    known = {name: value for name, value in updates.items() if name in TrainingParams.model_fields}
    rest = {name: value for name, value in updates.items() if name not in known}
    folder = job.scratch if scratch is None else job.scratch.parent / scratch
    run, resources = job.training.model_copy(update=known), job.resources.model_copy(update=rest)
    return Job(run, resources, folder, job.seed)


def policy(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    return build_scratch(WIDER, tokenizer, seed)


def pairs_of(
    tokenizer: PreTrainedTokenizerBase,
    reference: PreTrainedModel,
    count: int = 16,
    anchored: bool = False,
) -> list[Pair]:
    """Pairs of answers of different lengths with exact reference columns, soft labels, and anchors
    on three in four.
    """
    prompt = encode_prompts(tokenizer, [user(QUESTION)])[0]
    ids = encode_answers(tokenizer, ANSWERS)
    first, second = ids[:count], ids[count : 2 * count]
    logps = log_probabilities(
        reference, tokenizer, [prompt] * 2 * count, first + second, batch_size=64
    ).tolist()
    return [
        Pair(
            prompt,
            first[i],
            second[i],
            logps[i],
            logps[count + i],
            label=0.05 + 0.9 * i / count,
            anchors=(0.3 * i - 2, math.nan if i % 2 and not anchored else 1 - 0.2 * i),
            weights=(0.1 * i, 2.0) if i % 3 else None,
        )
        for i in range(count)
    ]


def pairwise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    job: Job,
    pair_loss: PairLossConfig,
) -> pairwise_training.PairwiseTrainer:
    """The trainer as `train_pairwise` builds it."""
    return pairwise_training.pairwise_trainer(model, tokenizer, pairs, pair_loss, job)


def batch_of(trainer: Any) -> dict[str, Any]:
    """All rows of a trainer's data as one batch."""
    return trainer.data_collator(list(trainer.train_dataset))


# --- pairwise losses ------------------------------------------------------------------------------


def test_an_untrained_policy_has_loss_ln_2_and_logit_zero(
    tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    """With its own reference columns, for any label: nothing is known before the first step."""
    model = policy(tokenizer)
    trainer = pairwise(
        model, tokenizer, pairs_of(tokenizer, model), job, PairLossConfig(scale=3.0, beta=1.0)
    )
    model.train()
    loss = trainer.compute_loss(model, batch_of(trainer))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert trainer._metrics["train"]["abs_logit"] == pytest.approx([0.0], abs=1e-4)
    assert trainer._metrics["train"]["log_ratio"] == pytest.approx([0.0], abs=1e-4)


def test_log_probabilities_on_a_cpu_are_those_of_trls_fused_head(
    tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    model = policy(tokenizer)
    trainer = pairwise(model, tokenizer, pairs_of(tokenizer, model), job, PairLossConfig(1.0, 1.0))
    batch = batch_of(trainer)
    ours = trainer._policy_logps(model, batch)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    fused = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=labels,
        fused_lm_head=True,
        use_cache=False,
    )
    assert torch.allclose(ours, fused.log_probs.float().sum(1), atol=1e-4)


@pytest.mark.parametrize(
    ("loss", "theirs"),
    [
        ({}, {}),
        (
            {"loss_type": "robust", "epsilon": 0.2},
            {"loss_types": ["robust"], "label_smoothing": 0.2},
        ),
    ],
    ids=["dpo", "robust"],
)
@pytest.mark.parametrize("kind", ["plain", "checkpointed", "adapter"])
def test_hard_labels_without_anchor_are_trls_own_loss(
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
    loss: dict[str, Any],
    theirs: dict[str, Any],
    kind: str,
    rows: str,
) -> None:
    """Loss and gradient of the same batch against the parent's own loss."""
    pairs = [
        Pair(p.prompt, p.first, p.second, p.ref_first, p.ref_second)
        for p in pairs_of(tokenizer, policy(tokenizer))
    ]
    model: Any = policy(tokenizer, seed=1)
    if kind == "adapter":
        model = with_lora(model, LORA.model_copy(update={"dropout": 0.0}), 0)
    asked = changed(job, gradient_checkpointing=kind == "checkpointed")
    trainer = pairwise(model, tokenizer, pairs, asked, PairLossConfig(scale=0.7, beta=0.7, **loss))
    assert trainer._packed is (rows == "packed")
    vars(trainer).update(theirs)
    if kind == "checkpointed":
        model.gradient_checkpointing_enable()
    model.train()
    batch = batch_of(trainer)
    losses, gradients = [], []
    plain = {name: value for name, value in batch.items() if name not in pairwise_training._EXTRA}
    for loss in (
        trainer.compute_loss(model, dict(batch)),
        DPOTrainer._compute_loss(trainer, model, plain, False),
    ):
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and abs(losses[0] - math.log(2)) > 1e-3
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


@pytest.mark.usefixtures("rows")
def test_training_on_ids_ends_where_stock_dpo_on_text_ends(
    tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    """TRL tokenises the text and computes its own reference; ours reads ids and columns."""
    reference = policy(tokenizer)
    prompt = tokenizer.apply_chat_template(
        user(QUESTION), tokenize=False, add_generation_prompt=True
    )
    text = {
        "prompt": [prompt] * 8,
        "chosen": [f" {a}" for a in ANSWERS[:8]],
        "rejected": [f" {a}" for a in ANSWERS[8:16]],
    }
    stock = DPOTrainer(
        policy(tokenizer),
        ref_model=policy(tokenizer),
        args=DPOConfig(
            **run.arguments(changed(job, "stock", max_steps=3)), beta=0.5, max_length=None
        ),
        train_dataset=Dataset.from_dict(text),
        processing_class=tokenizer,
    )
    stock.train()
    pairs = [
        Pair(p.prompt, p.first, p.second, p.ref_first, p.ref_second)
        for p in pairs_of(tokenizer, reference, 8)
    ]
    ours = policy(tokenizer)
    before = weights(ours)
    pairwise_training.train_pairwise(
        ours, tokenizer, pairs, PairLossConfig(0.5, 0.5), changed(job, max_steps=3)
    )
    assert not same(before, weights(ours)) and ours.config._attn_implementation == "sdpa"
    for name, tensor in weights(ours).items():
        assert torch.allclose(tensor, stock.model.state_dict()[name], atol=2e-4), name


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("anchor", [0.0, 0.3])
@pytest.mark.parametrize(("nll", "control"), [(0.0, 0.0), (0.02, 0.0), (0.02, 0.8)])
def test_the_whole_loss_by_hand(
    tokenizer: PreTrainedTokenizerBase, job: Job, anchor: float, nll: float, control: float
) -> None:
    reference, model = policy(tokenizer), policy(tokenizer, seed=1)
    pairs = [
        replace(p, drawn=(p.ref_first + 0.1, p.ref_second - 0.2))
        for p in pairs_of(tokenizer, reference)
    ]
    pair_loss = PairLossConfig(scale=0.8, beta=1.7, anchor=anchor, nll=nll, control=control)
    trainer = pairwise(model, tokenizer, pairs, job, pair_loss)
    expected = 0.0
    for p in pairs:
        logps = log_probabilities(
            model, tokenizer, [p.prompt] * 2, [p.first, p.second], batch_size=2
        )
        logit = 0.8 * ((logps[0] - p.ref_first) - (logps[1] - p.ref_second))
        expected -= float(p.label * logsigmoid(logit) + (1 - p.label) * logsigmoid(-logit)) / len(
            pairs
        )
        weights = [
            weight - control * min(math.exp(float(logp) - drawn), 5 * max(weight, 1))
            for weight, logp, drawn in zip(
                p.weights or (p.label, 1 - p.label), logps, p.drawn, strict=True
            )
        ]
        expected -= nll * float(weights[0] * logps[0] + weights[1] * logps[1]) / (2 * len(pairs))
        known = [
            (float(logp) - ref, target)
            for logp, ref, target in zip(logps, (p.ref_first, p.ref_second), p.anchors, strict=True)
            if not math.isnan(target)
        ]
        expected += (
            anchor * sum((1.7 * ratio - target) ** 2 for ratio, target in known) / 24
        )  # 16 firsts, 8 seconds
    assert trainer.compute_loss(model, batch_of(trainer)).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_a_batch_without_anchors_has_no_anchor_term(
    tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    model = policy(tokenizer)
    pairs = [
        Pair(p.prompt, p.first, p.second, p.ref_first, p.ref_second)
        for p in pairs_of(tokenizer, model)
    ]
    trainer = pairwise(model, tokenizer, pairs, job, PairLossConfig(1.0, 1.0, anchor=5.0))
    loss = trainer.compute_loss(model, batch_of(trainer))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_bernoulli_labels_are_drawn_afresh_with_their_probability(
    tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    model = policy(tokenizer)
    trainer = pairwise(
        model,
        tokenizer,
        pairs_of(tokenizer, model),
        job,
        PairLossConfig(1.0, 1.0, labels="bernoulli"),
    )
    p = torch.tensor([0.1, 0.5, 0.9] * 5)
    model.train()
    draws = []
    for step in range(400):
        trainer.state.global_step = step
        draws.append(trainer._label({"label": p}, torch.zeros(15)))
    table = torch.stack(draws)
    assert set(table.unique().tolist()) == {0.0, 1.0}
    for value in (0.1, 0.5, 0.9):
        drawn = table[:, p == value]
        assert abs(drawn.mean().item() - value) < 4 * math.sqrt(value * (1 - value) / drawn.numel())
    trainer.state.global_step = 7
    assert torch.equal(
        trainer._label({"label": p}, torch.zeros(15)), draws[7]
    )  # a resumed run draws the same
    model.eval()
    assert torch.equal(trainer._label({"label": p}, torch.zeros(15)), p)


def test_bernoulli_labels_of_the_parts_of_one_step_are_independent(
    tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    """A step of several micro-batches must not draw the same numbers for each."""
    model = policy(tokenizer)
    trainer = pairwise(
        model,
        tokenizer,
        pairs_of(tokenizer, model),
        job,
        PairLossConfig(1.0, 1.0, labels="bernoulli"),
    )
    half = {"label": torch.full((64,), 0.5)}
    model.train()
    parts = [trainer._label(half, torch.zeros(64)) for _ in range(4)]
    agreement = [(a == b).float().mean().item() for i, a in enumerate(parts) for b in parts[:i]]
    assert all(0.2 < share < 0.8 for share in agreement)


# --- the other pairwise losses --------------------------------------------------------------------


def judged(
    tokenizer: PreTrainedTokenizerBase, reference: PreTrainedModel, pairs: list[Pair]
) -> list[Pair]:
    """The pairs as KTO takes them: flags of every combination, and an answer to another question
    beside.
    """
    others = encode_answers(
        tokenizer, [answer.text for answer in world.answers(world.prompts()[3000])][: len(pairs)]
    )
    logps = log_probabilities(
        reference, tokenizer, [p.prompt for p in pairs], others, batch_size=64
    ).tolist()
    flags = [(True, False), (True, True), (True, True), (False, False), (False, True)]
    return [
        replace(p, desirable=flags[i % 5], mismatched=other, ref_mismatched=logp)
        for i, (p, other, logp) in enumerate(zip(pairs, others, logps, strict=True))
    ]


def ratios_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pair: Pair
) -> list[float]:
    """Log-ratios of first, second and mismatched answer to their columns, each answer alone."""
    answers = [pair.first, pair.second, pair.mismatched or []]
    logps = log_probabilities(model, tokenizer, [pair.prompt] * 3, answers, batch_size=1).tolist()
    columns = (pair.ref_first, pair.ref_second, pair.ref_mismatched)
    return [logp - ref for logp, ref in zip(logps, columns, strict=True)]


def moved(ratio: float, scale: float, clip: float | None) -> float:
    return ratio if clip is None else clip * math.tanh(scale * ratio / clip) / scale


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("loss_type", ["dpo", "ipo"])
def test_dpo_and_ipo_by_hand(
    tokenizer: PreTrainedTokenizerBase, job: Job, loss_type: Any, clip: float | None
) -> None:
    """IPO: p (Dh - 1/(2 tau))^2 + (1 - p) (Dh + 1/(2 tau))^2 on summed log-ratios, each bounded if
    there is a clip.
    """
    reference, model, scale = policy(tokenizer), policy(tokenizer, seed=1), 0.8
    pairs = judged(tokenizer, reference, pairs_of(tokenizer, reference))
    trainer = pairwise(
        model, tokenizer, pairs, job, PairLossConfig(scale, 1.0, loss_type=loss_type, clip=clip)
    )
    expected, reached = 0.0, 0.0
    for p in pairs:
        first, second, _ = ratios_of(model, tokenizer, p)
        gap = moved(first, scale, clip) - moved(second, scale, clip)
        reached = max(reached, abs(scale * first), abs(scale * second))
        if loss_type == "ipo":
            expected += p.label * (gap - 1 / 1.6) ** 2 + (1 - p.label) * (gap + 1 / 1.6) ** 2
        else:
            expected -= p.label * math.log(sigmoid(scale * gap)) + (1 - p.label) * math.log(
                sigmoid(-scale * gap)
            )
    assert reached > 0.3  # beyond the clip, so that it shows
    assert trainer.compute_loss(model, batch_of(trainer)).item() == pytest.approx(
        expected / len(pairs), rel=1e-4
    )


@pytest.mark.usefixtures("rows")
def test_simpo_by_hand(tokenizer: PreTrainedTokenizerBase, job: Job) -> None:
    """Mean log-probabilities of a token; the reference columns have no say."""
    model = policy(tokenizer, seed=1)
    pairs = pairs_of(tokenizer, policy(tokenizer))
    loss = PairLossConfig(2.0, 1.0, loss_type="simpo", gamma=0.5)
    expected = 0.0
    for p in pairs:
        first, second = log_probabilities(
            model, tokenizer, [p.prompt] * 2, [p.first, p.second], batch_size=1
        ).tolist()
        gap = 2.0 * (first / len(p.first) - second / len(p.second))
        expected -= p.label * math.log(sigmoid(gap - 0.5))
        expected -= (1 - p.label) * math.log(sigmoid(-gap - 0.5))
    for shift in (0.0, 3.0):
        moved_pairs = [replace(p, ref_first=p.ref_first + shift) for p in pairs]
        trainer = pairwise(model, tokenizer, moved_pairs, job, loss)
        assert trainer.compute_loss(model, batch_of(trainer)).item() == pytest.approx(
            expected / len(pairs), rel=1e-4
        )


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("raised", [0.0, 5.0], ids=["below zero", "above zero"])
@pytest.mark.parametrize("clip", [None, 2.0])
def test_kto_by_hand(
    tokenizer: PreTrainedTokenizerBase, job: Job, raised: float, clip: float | None
) -> None:
    """Both answers of a pair by their flags, z from the mismatched answers alone, both kinds of one
    total weight.
    """
    reference, model, scale = policy(tokenizer), policy(tokenizer, seed=1), 0.8
    pairs = judged(tokenizer, reference, pairs_of(tokenizer, reference))
    shift = raised - sum(ratios_of(model, tokenizer, p)[2] for p in pairs) / len(pairs) - 1
    pairs = [
        replace(p, ref_mismatched=p.ref_mismatched - shift) for p in pairs
    ]  # a mean log-ratio of raised - 1
    trainer = pairwise(
        model, tokenizer, pairs, job, PairLossConfig(scale, 1.0, loss_type="kto", clip=clip)
    )
    ratios = []
    for pair in pairs:
        ratios.append([moved(ratio, scale, clip) for ratio in ratios_of(model, tokenizer, pair)])
    point = max(0.0, sum(mismatched for _, _, mismatched in ratios) / len(pairs))
    assert point == 0.0 if raised == 0 else point > 1.0
    desirable = sum(sum(p.desirable) for p in pairs)
    weight = desirable / (2 * len(pairs) - desirable)
    assert weight == pytest.approx(19 / 13)
    expected = 0.0
    for p, (first, second, _) in zip(pairs, ratios, strict=True):
        for ratio, good in zip((first, second), p.desirable, strict=True):
            expected += (
                1 - sigmoid(scale * (ratio - point))
                if good
                else weight * (1 - sigmoid(scale * (point - ratio)))
            )
    batch = batch_of(trainer)
    assert trainer._reference_point(model, batch).item() == pytest.approx(point, abs=1e-4)
    assert trainer.compute_loss(model, batch).item() == pytest.approx(
        expected / (2 * len(pairs)), rel=1e-4
    )


@pytest.mark.usefixtures("rows")
def test_no_gradient_flows_through_ktos_reference_point(
    tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    """The gradient is the one at the same point held constant, and mismatched answers alone move
    nothing.
    """
    model = policy(tokenizer, seed=1)
    pairs = judged(tokenizer, policy(tokenizer), pairs_of(tokenizer, policy(tokenizer)))
    pairs = [replace(p, ref_mismatched=p.ref_mismatched - 30) for p in pairs]
    trainer = pairwise(model, tokenizer, pairs, job, PairLossConfig(0.1, 1.0, loss_type="kto"))
    batch = batch_of(trainer)
    point = trainer._reference_point(model, batch)
    assert point > 1 and not point.requires_grad
    trainer.compute_loss(model, batch).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    logps = trainer._policy_logps(model, batch)
    ratios = logps - torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    flags = torch.cat([batch["desirable_chosen"], batch["desirable_rejected"]])
    losses.kto_loss(ratios, flags, torch.tensor(point.item()), 0.1, 19 / 13).mean().backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("loss_type", "first"),
    [("dpo", math.log(2)), ("robust", math.log(2)), ("ipo", 1 / (2 * 0.25) ** 2), ("kto", 0.5)],
)
def test_every_loss_starts_at_logit_zero(
    tokenizer: PreTrainedTokenizerBase, job: Job, loss_type: Any, first: float
) -> None:
    """From its own reference, clipped or not: log 2 (DPO), 1 / (2 tau)^2 (IPO), the mean weight / 2
    (KTO).
    """
    model = policy(tokenizer)
    pairs = judged(tokenizer, model, pairs_of(tokenizer, model))
    pairs = [replace(p, desirable=(True, False)) for p in pairs]
    model.train()
    for clip in (None, 0.5):
        trainer = pairwise(
            model, tokenizer, pairs, job, PairLossConfig(0.25, 1.0, loss_type=loss_type, clip=clip)
        )
        assert trainer.compute_loss(model, batch_of(trainer)).item() == pytest.approx(
            first, rel=1e-4
        )
        assert trainer._metrics["train"]["abs_logit"] == pytest.approx([0.0], abs=1e-4)


@pytest.mark.parametrize("terms", [{"anchor": 0.1}, {"nll": 0.1}, {"labels": "bernoulli"}])
@pytest.mark.parametrize("loss_type", ["ipo", "kto"])
def test_terms_of_dpo_are_refused_to_other_losses(
    loss_type: Any, terms: dict[str, Any], tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    model = policy(tokenizer)
    pairs = pairs_of(tokenizer, model)
    with pytest.raises(ParamsError, match=rf"does not go with pair_loss '{loss_type}'"):
        pairwise(
            model, tokenizer, pairs, job, PairLossConfig(1.0, 1.0, loss_type=loss_type, **terms)
        )


def test_a_control_variate_refuses_pairs_that_nobody_is_known_to_have_drawn(
    tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    model = policy(tokenizer)
    pairs = [replace(p, drawn=(p.ref_first, p.ref_second)) for p in pairs_of(tokenizer, model)]
    pair_loss = PairLossConfig(1.0, 1.0, nll=0.1, control=0.5)
    pairwise(model, tokenizer, pairs, job, pair_loss)
    pairs[3] = replace(pairs[3], drawn=(-1.0, math.nan))
    with pytest.raises(DataError, match=r"^pair 3 has no `drawn`"):
        pairwise(model, tokenizer, pairs, job, pair_loss)


def test_kto_refuses_pairs_that_it_cannot_use(tokenizer: PreTrainedTokenizerBase, job: Job) -> None:
    model = policy(tokenizer)
    plain = pairs_of(tokenizer, model)
    with pytest.raises(DataError, match="no column mismatched_ids"):
        pairwise(model, tokenizer, plain, job, PairLossConfig(1.0, 1.0, loss_type="kto"))
    for flag, kind in ((True, "desirable"), (False, "undesirable")):
        one_sided = [replace(p, desirable=(flag, flag)) for p in judged(tokenizer, model, plain)]
        with pytest.raises(DataError, match=f"every answer is {kind}"):
            pairwise(model, tokenizer, one_sided, job, PairLossConfig(1.0, 1.0, loss_type="kto"))


# --- as a trainer of the user's own ---------------------------------------------------------------


def own_table(swapped: bool = False, **columns: list[float]) -> Dataset:
    """A user's table: TRL's text columns, and more if given."""
    sides = (ANSWERS[4:8], ANSWERS[:4]) if swapped else (ANSWERS[:4], ANSWERS[4:8])
    return Dataset.from_dict(
        {"prompt": [f"{QUESTION} "] * 4, "chosen": sides[0], "rejected": sides[1], **columns}
    )


def trained_on(
    table: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path, ours: bool
) -> tuple[Any, list[float]]:
    """Three steps of our trainer, or of TRL's own, from the same policy; returns its weights and
    losses.
    """
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "beta": 0.5,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "learning_rate": 1e-3,
        "report_to": "none",
        "bf16": False,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    args = (
        PairwiseConfig(**options) if ours else DPOConfig(**options, precompute_ref_log_probs=True)
    )
    trainer = (PairwiseTrainer if ours else DPOTrainer)(
        policy(tokenizer), args=args, train_dataset=table, processing_class=tokenizer
    )
    trainer.train()
    return weights(trainer.model), [
        entry["loss"] for entry in trainer.state.log_history if "loss" in entry
    ]


@pytest.mark.usefixtures("rows")
def test_a_users_table_trains_as_with_stock_dpo(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Text columns, no reference columns."""
    (left, ours), (right, stock) = (
        trained_on(own_table(), tokenizer, tmp_path, kind) for kind in (True, False)
    )
    assert (
        ours == pytest.approx(stock, abs=1e-4)
        and ours[0] == pytest.approx(math.log(2), abs=1e-4)
        and ours[2] < 0.69
    )
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], atol=1e-4, rtol=1e-3)


def test_a_trainer_takes_the_folder_of_a_model_too(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    save(policy(tokenizer), tokenizer, tmp_path / "base")
    args = PairwiseConfig(str(tmp_path / "run"), max_steps=1, use_cpu=True, bf16=False)
    trainer = PairwiseTrainer(
        str(tmp_path / "base"), args=args, train_dataset=own_table(), processing_class=tokenizer
    )
    before = weights(policy(tokenizer))
    trainer.train()
    assert not same(before, weights(trainer.model))


def test_a_label_column_turns_a_users_pairs_around(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    turned, _ = trained_on(own_table(label=[0.0] * 4), tokenizer, tmp_path, ours=True)
    swapped, _ = trained_on(own_table(swapped=True), tokenizer, tmp_path, ours=True)
    plain, _ = trained_on(own_table(), tokenizer, tmp_path, ours=True)
    for name, tensor in turned.items():
        torch.testing.assert_close(tensor, swapped[name], atol=1e-5, rtol=1e-3)
    assert max(float((turned[name] - plain[name]).abs().max()) for name in turned) > 1e-3


@pytest.mark.parametrize("args", [None, DPOConfig, PairwiseConfig])
def test_a_trainer_without_reference_columns_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, args: type[DPOConfig] | None
) -> None:
    given = args and args(str(tmp_path), precompute_ref_log_probs=False, use_cpu=True, bf16=False)
    with pytest.raises(DualignError, match="PairwiseTrainer: args"):
        PairwiseTrainer(
            policy(tokenizer), args=given, train_dataset=own_table(), processing_class=tokenizer
        )


def test_packing_is_refused_to_a_model_that_cannot(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = policy(tokenizer)
    model.set_attn_implementation("eager")
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot read packed pairs; set packed"):
        PairwiseTrainer(
            model,
            args=PairwiseConfig(**options, packed=True),
            train_dataset=own_table(),
            processing_class=tokenizer,
        )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"pair_loss": "sigmoid"}, "pair_loss"),
        ({"labels": "hard"}, "labels"),
        ({"loss_type": "ipo"}, "loss_type"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}, "loss_type"),
        ({"loss_weights": [2.0]}, "loss_weights"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"use_weighting": True}, "use_weighting"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type"),
        ({"reward_bound": 0.0}, "reward_bound"),
        ({"anchor_weight": -1.0}, "anchor_weight"),
        ({"nll_weight": math.nan}, "nll_weight"),
        ({"nll_weight": 0.1, "nll_control": 1.1}, "nll_control"),
        ({"nll_weight": 0.1, "nll_control": math.nan}, "nll_control"),
        ({"nll_control": 0.5}, "nll_control"),
        ({"undesirable_weight": 2.0}, "undesirable_weight"),
        ({"epsilon": 0.1}, "epsilon"),
        ({"gamma": 0.1}, "gamma"),
        ({"pair_loss": "simpo", "gamma": -0.1}, "gamma"),
        ({"pair_loss": "simpo", "reward_bound": 1.0}, "reward_bound"),
        ({"pair_loss": "robust", "epsilon": 0.5}, "epsilon"),
        *(({"pair_loss": loss, name: value}, name) for loss in ("ipo", "kto")
          for name, value in (("epsilon", 0.1), ("anchor_weight", 0.1), ("nll_weight", 0.1),
                              ("labels", "bernoulli"))),
        ({"pair_loss": "ipo", "nll_weight": 0.1, "nll_control": 0.5}, "nll_weight"),
    ],
)  # fmt: skip
def test_an_option_that_no_loss_would_read_is_refused(
    tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    with pytest.raises(ParamsError, match=f"^PairwiseConfig: {name} "):
        PairwiseConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize("split", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(
    ("options", "columns", "missing"),
    [
        ({"anchor_weight": 0.1}, (), "anchor_chosen"),
        ({"anchor_weight": 0.1}, ("anchor_chosen",), "anchor_rejected"),
        ({"pair_loss": "kto"}, (), "desirable_chosen"),
        ({"pair_loss": "kto"}, ("desirable_chosen", "desirable_rejected"), "mismatched_ids"),
        ({}, ("ref_chosen_logps",), "ref_rejected_logps"),
        ({"nll_weight": 0.1}, ("weight_chosen",), "weight_rejected"),
        ({"nll_weight": 0.1, "nll_control": 0.5}, (), "drawn_chosen"),
        ({"nll_weight": 0.1, "nll_control": 0.5}, ("drawn_chosen",), "drawn_rejected"),
    ],
)
def test_a_table_without_a_column_that_the_loss_reads_is_refused(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    split: str,
    options: dict[str, Any],
    columns: tuple[str, ...],
    missing: str,
) -> None:
    args = PairwiseConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    table = own_table(**dict.fromkeys(columns, [0.0] * 4))
    tables = (
        {"train_dataset": table}
        if split == "train_dataset"
        else {"eval_dataset": {"held_out": table}}
    )
    with pytest.raises(
        DataError, match=f"PairwiseTrainer: {split} has no column {missing}; add it, or "
    ):
        PairwiseTrainer(policy(tokenizer), args=args, processing_class=tokenizer, **tables)


def test_a_loss_on_held_out_pairs_does_not_depend_on_the_parts_of_a_step(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Measured before a training whose steps have two parts, and after it, which changes nothing
    at learning rate 0.
    """
    args = PairwiseConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=4,
        max_steps=1,
        learning_rate=0.0,
        save_strategy="no",
    )
    trainer = PairwiseTrainer(
        policy(tokenizer),
        args=args,
        train_dataset=own_table(),
        eval_dataset=own_table(swapped=True),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-6)


def test_importing_the_library_loads_neither_torch_nor_trl() -> None:
    code = (
        "import sys, dualign; assert not {'torch', 'trl'} & set(sys.modules);"
        " dualign.PairwiseTrainer; dualign.nothing"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "module 'dualign' has no attribute 'nothing'" in done.stderr


# --- supervised and scorer losses -----------------------------------------------------------------


def conversation_rows(
    tokenizer: PreTrainedTokenizerBase, count: int = 16
) -> list[tuple[list[int], list[int]]]:
    prompt = encode_prompts(tokenizer, [user(QUESTION)])[0]
    return [(prompt, answer) for answer in encode_answers(tokenizer, ANSWERS[:count])]


@pytest.mark.parametrize("items", [None, 500])
def test_the_supervised_loss_is_trls_own(
    tokenizer: PreTrainedTokenizerBase, job: Job, items: int | None
) -> None:
    model = policy(tokenizer)
    data = supervised._supervised(conversation_rows(tokenizer), 120)
    args = SFTConfig(**run.arguments(job), max_length=None, packing=False)
    trainer = supervised.SupervisedTrainer(
        model, args=args, train_dataset=data, processing_class=tokenizer
    )
    assert trainer.train_dataset["input_ids"] == data["input_ids"]  # no second EOS
    batch = batch_of(trainer)
    assert (batch["labels"] != -100).sum() == sum(
        len(answer) for _, answer in conversation_rows(tokenizer)
    )
    ours = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    stock = SFTTrainer.compute_loss(trainer, model, dict(batch), num_items_in_batch=items)
    assert ours.item() == pytest.approx(stock.item(), rel=1e-5)


def test_supervised_labels_are_those_that_trl_makes_of_a_mask(
    tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    rows = conversation_rows(tokenizer)
    masks = [[0] * len(prompt) + [1] * len(answer) for prompt, answer in rows]
    masked = Dataset.from_dict(
        {"input_ids": [prompt + answer for prompt, answer in rows], "completion_mask": masks}
    )
    args = SFTConfig(**run.arguments(job), max_length=120, completion_only_loss=True, packing=False)
    stock = SFTTrainer(
        policy(tokenizer), args=args, train_dataset=masked, processing_class=tokenizer
    ).train_dataset
    ours = supervised._supervised(rows, 120)
    assert {name: ours[name][:] for name in ours.column_names} == {
        name: stock[name][:] for name in stock.column_names
    }


@pytest.mark.parametrize("kind", ["sft", "scorer", "pairs"])
def test_no_step_walks_through_the_weights_to_count_operations(kind: str) -> None:
    trainer = {
        "sft": supervised.SupervisedTrainer,
        "scorer": scorer_training.ScorerTrainer,
        "pairs": PairwiseTrainer,
    }[kind]
    assert trainer.floating_point_ops(object.__new__(trainer), {"input_ids": torch.ones(1, 1)}) == 0


def scored_pairs(tokenizer: PreTrainedTokenizerBase) -> list[ScoredPair]:
    """Pairs with every combination of flags, null ones too."""
    rows = conversations(tokenizer, [user(QUESTION)] * 32, ANSWERS[:32])
    flags = [(True, False), (None, False), (True, None), (None, None), (False, False), (True, True)]
    return [ScoredPair(rows[i], rows[16 + i], flags[i % 6]) for i in range(16)]


def scorer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, resources: Resources
) -> PreTrainedModel:
    if not folder.exists():
        save(policy(tokenizer), tokenizer, folder)
    model = load_scorer_backbone(str(folder), tokenizer, resources)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("sign", [0.0, 1.0, 0.4])
@pytest.mark.parametrize("regularisation", [0.0, 0.05])
@pytest.mark.parametrize("flags", ["some", "none"])
def test_the_scorer_loss_by_hand(
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
    tmp_path: Path,
    sign: float,
    regularisation: float,
    flags: str,
) -> None:
    model = scorer(tokenizer, tmp_path / "policy", job.resources).eval()
    pairs = scored_pairs(tokenizer)
    if flags == "none":
        pairs = [ScoredPair(pair.high, pair.low) for pair in pairs]
    args = scorer_training.ScorerConfig(
        **run.arguments(job), max_length=None, sign_weight=sign, score_regularisation=regularisation
    )
    trainer = scorer_training.ScorerTrainer(
        model,
        args=args,
        data_collator=scorer_training._FlagCollator(pad_token_id=tokenizer.pad_token_id),
        train_dataset=scorer_training._ranked(pairs, 120),
        processing_class=tokenizer,
    )
    with torch.no_grad():
        found = trainer.compute_loss(model, batch_of(trainer)).item()
        score = {
            id(ids): float(model(input_ids=torch.tensor([ids])).logits)
            for p in pairs
            for ids in (p.high, p.low)
        }

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    expected = sum(softplus(score[id(p.low)] - score[id(p.high)]) for p in pairs) / 16
    signed = [
        softplus(-score[id(ids)] if unsafe else score[id(ids)])
        for p in pairs
        for ids, unsafe in ((p.high, p.unsafe[0]), (p.low, p.unsafe[1]))
        if unsafe is not None
    ]
    if signed:
        expected += sign * 2 * sum(signed) / len(signed)
    expected += regularisation * sum(value**2 for value in score.values()) / 32
    assert found == pytest.approx(expected, rel=1e-4)


# --- runs -----------------------------------------------------------------------------------------

Start = Callable[[], torch.nn.Module]
Train = Callable[[torch.nn.Module, Job], Any]


@pytest.fixture(
    params=["soft", "bernoulli", "adapter", "ipo", "kto", "packed", "sft", "scorer", "muon"]
)
def kind(
    request: pytest.FixtureRequest,
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Start, Train]:
    """How each kind of run starts, and how it trains."""
    if request.param == "packed":
        monkeypatch.setattr(packing, "WIDTH", 0)
    if request.param == "sft":
        rows = conversation_rows(tokenizer, 20)
        return lambda: policy(tokenizer), lambda m, j: supervised.train_sft(
            m, tokenizer, rows, rows[:4], j
        )
    if request.param == "scorer":
        flagged = [ScoredPair(p.high, p.low, (True, False)) for p in scored_pairs(tokenizer)]
        return (
            lambda: scorer(tokenizer, tmp_path / "policy", job.resources),
            lambda m, j: scorer_training.train_scorer(
                m, tokenizer, flagged, j, sign_weight=1.0, regularisation=1e-3
            ),
        )
    pairs = pairs_of(tokenizer, policy(tokenizer), anchored=True)
    pair_loss = PairLossConfig(
        1.0, 1.0, "bernoulli" if request.param == "bernoulli" else "soft", anchor=0.1, nll=0.02
    )
    if request.param in ("ipo", "kto"):
        pairs = judged(tokenizer, policy(tokenizer), pairs)
        pair_loss = PairLossConfig(0.5, 1.0, loss_type=request.param, clip=2.0)

    def start() -> torch.nn.Module:
        torch.manual_seed(11)  # of the adapters
        return (
            with_lora(policy(tokenizer), LORA, 0)
            if request.param == "adapter"
            else policy(tokenizer)
        )

    def train(model: torch.nn.Module, job: Job) -> Any:
        optimiser = "muon" if request.param == "muon" else "adamw"
        how = changed(job, job.scratch.name, optimiser=optimiser)
        return pairwise_training.train_pairwise(model, tokenizer, pairs, pair_loss, how)

    return start, train


class Interruption(TrainerCallback):
    """The machine goes away after some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_with_the_same_bytes(
    kind: tuple[Start, Train], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, train = kind
    whole = start()
    before, expected = weights(whole), train(whole, changed(job, "whole"))
    assert expected["steps"] == 8 and not same(before, weights(whole))
    with monkeypatch.context() as patched:
        patched.setattr(run, "Telling", lambda *_: Interruption(6))
        with pytest.raises(KeyboardInterrupt):
            train(start(), changed(job, "broken"))
    assert (
        last_checkpoint(job.scratch.parent / "broken")
        == job.scratch.parent / "broken" / "checkpoint-4"
    )
    resumed = start()
    metrics = train(resumed, changed(job, "broken"))
    assert same(weights(resumed), weights(whole))
    assert metrics == expected  # the loss curve of the steps before the interruption as well


def test_an_adapter_is_saved_without_trls_copy_of_it(
    tokenizer: PreTrainedTokenizerBase, job: Job, tmp_path: Path
) -> None:
    model = with_lora(policy(tokenizer), LORA, 0)
    for scratch in ("first", "second"):  # a search goes on from adapters
        pairs = pairs_of(tokenizer, policy(tokenizer))
        pairwise_training.train_pairwise(
            model, tokenizer, pairs, PairLossConfig(1.0, 1.0), changed(job, scratch, max_steps=2)
        )
        assert isinstance(model, PeftModel) and list(model.peft_config) == ["default"]
        assert not any(".ref." in name for name in model.state_dict())
    save(model, tokenizer, tmp_path / "saved")
    assert (tmp_path / "saved/adapter_model.safetensors").is_file() and not (
        tmp_path / "saved/ref"
    ).exists()


@pytest.mark.parametrize("kind", ["soft", "sft", "scorer"], indirect=True)
def test_a_trained_model_keeps_keys_and_values_as_before(
    kind: tuple[Start, Train], job: Job
) -> None:
    """transformers writes into its configuration, which is saved, that it does not."""
    start, train = kind
    model: Any = start()
    train(model, changed(job, "one", max_steps=1))
    assert model.config.use_cache


@pytest.mark.parametrize("steps", [None, 4], ids=["after its epochs", "after max_steps"])
def test_a_run_that_had_ended_is_not_run_again(
    kind: tuple[Start, Train], job: Job, steps: int | None
) -> None:
    start, train = kind
    first, second = start(), start()
    ended = changed(job, "ended", max_steps=steps)
    metrics, again = train(first, ended), train(second, ended)
    assert same(weights(first), weights(second))
    assert again == metrics


def test_parts_of_a_batch_add_up_to_the_whole(
    kind: tuple[Start, Train], job: Job, request: pytest.FixtureRequest
) -> None:
    """Micro-batches of 2 make the steps of a batch of 4 (labels and dropout are drawn anew, so not
    for those).
    """
    if request.node.callspec.params["kind"] in ("bernoulli", "adapter", "kto"):
        pytest.skip("draws, and KTO's reference point, depend on the micro-batch")
    start, train = kind
    whole, parts = start(), start()
    train(whole, changed(job, "whole", max_steps=2, warmup=0.0, learning_rate=1e-3))
    train(
        parts,
        changed(job, "parts", max_steps=2, warmup=0.0, learning_rate=1e-3, micro_batch_size=2),
    )
    for name, tensor in weights(whole).items():
        assert torch.allclose(tensor, weights(parts)[name], atol=1e-4), name


@pytest.mark.parametrize("what", ["flags", "anchors"])
def test_parts_of_a_step_weigh_what_they_have(
    tokenizer: PreTrainedTokenizerBase, job: Job, tmp_path: Path, what: str
) -> None:
    """Micro-batches of 1 and 3 make the steps of a batch of 6, though not every answer has a flag
    or an anchor, and the last step of an epoch has fewer rows."""
    found = []
    for micro in (None, 1, 3):
        own = changed(
            job, str(micro), batch_size=6, epochs=2.0, max_steps=None, micro_batch_size=micro
        )
        if what == "flags":
            model = scorer(tokenizer, tmp_path / "policy", job.resources)
            given = [(None, None), (True, None), (True, False)]
            rows = [
                ScoredPair(pair.high, pair.low, given[i % 3])
                for i, pair in enumerate(scored_pairs(tokenizer)[:10])
            ]
            scorer_training.train_scorer(model, tokenizer, rows, own, sign_weight=1.0)
        else:
            model = policy(tokenizer)
            pairs = pairs_of(tokenizer, policy(tokenizer), anchored=True)[:10]
            some = [
                replace(pair, anchors=(math.nan, pair.anchors[1])) if i % 3 else pair
                for i, pair in enumerate(pairs)
            ]
            loss = PairLossConfig(1.0, 1.0, "soft", anchor=0.5, nll=0.02)
            pairwise_training.train_pairwise(model, tokenizer, some, loss, own)
        found.append(weights(model))
    for name, tensor in found[0].items():
        for other in found[1:]:
            assert torch.allclose(tensor, other[name], atol=1e-5), name


def test_metrics_tell_the_course_of_a_run(
    kind: tuple[Start, Train], job: Job, request: pytest.FixtureRequest
) -> None:
    start, train = kind
    metrics = train(start(), job)
    assert metrics["steps"] == 8 and metrics["rows"] in (16, 20)
    losses = [row["loss"] for row in metrics["losses"]]
    assert [row["step"] for row in metrics["losses"]] == list(range(1, 9))
    assert metrics["loss"] == losses[-1] and all(math.isfinite(loss) for loss in losses)
    if request.node.callspec.params["kind"] == "sft":
        assert metrics["heldout_loss"] < losses[0] - 0.5


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_first_step_of_a_warm_up_is_at_rate_0(
    tokenizer: PreTrainedTokenizerBase, job: Job, schedule: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A run of that one alone is told to learn nothing."""
    rows = conversation_rows(tokenizer, 8)
    model = policy(tokenizer)
    begun = changed(job, schedule, max_steps=1, warmup=0.1, schedule=schedule)
    supervised.train_sft(model, tokenizer, rows, rows[:1], begun)
    assert same(weights(model), weights(policy(tokenizer)))
    assert "training: its one step is of the warm-up" in caplog.text


def test_the_log_tells_how_far_a_run_is(
    kind: tuple[Start, Train], job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    start, train = kind
    with caplog.at_level(logging.INFO, logger="dualign"):
        train(start(), job)
    told = [progress for record in caplog.records if (progress := read_progress(record.message))]
    assert [progress.done for progress in told][-1] == told[-1].total > 1
    assert told[-1].left == "0.0 s"
    rates = r"\d+ tokens/s, \d+\.\d GFLOP/s"
    assert re.fullmatch(rf"loss \d+\.\d{{4}}.*, {rates}", told[-1].detail), told[-1].detail
    last = [record.message for record in caplog.records if "peak memory" in record.message]
    assert len(last) == 1 and re.match(r"training: \d+ tokens in \d+\.\d s, \d+ tok", last[0])


def test_epochs_count_when_no_number_of_steps_is_given(
    tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    rows = conversation_rows(tokenizer, 20)
    metrics = supervised.train_sft(
        policy(tokenizer), tokenizer, rows, rows[:4], changed(job, max_steps=None, epochs=1.5)
    )
    assert metrics["steps"] == 8  # 1.5 epochs of 5 steps, begun ones counted
    assert math.log(300) > metrics["heldout_loss"] > 0


def test_the_heldout_loss_is_by_token_whatever_the_micro_batch(
    tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    rows = conversation_rows(tokenizer, 12)
    for micro in (None, 1):
        resources = job.resources.model_copy(update={"micro_batch_size": micro})
        model = policy(tokenizer)
        now = replace(changed(job, max_steps=1), resources=resources)
        told = supervised.train_sft(model, tokenizer, rows, rows[:5], now)
        ids = zip(*rows[:5], strict=True)
        logps = log_probabilities(model, tokenizer, *ids, batch_size=2)
        tokens = sum(len(answer) for _, answer in rows[:5])
        assert told["heldout_loss"] == pytest.approx(-float(logps.sum()) / tokens, abs=1e-6)


def test_heldout_rows_of_which_none_fits_are_told_before_training(
    tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    rows = conversation_rows(tokenizer, 12)
    long = [(prompt * 100, answer) for prompt, answer in rows[:2]]
    with pytest.raises(DataError, match="max_length"):
        supervised.train_sft(policy(tokenizer), tokenizer, rows, long, job)
    assert not job.scratch.exists() or not any(job.scratch.iterdir())


def test_the_tokens_of_a_training_are_those_of_its_rows(
    tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    rows = conversation_rows(tokenizer, 20)
    work.begin(None)
    supervised.train_sft(
        policy(tokenizer), tokenizer, rows, rows[:4], changed(job, max_steps=None, epochs=1.0)
    )
    done = work.recorded()["training"]
    assert done["tokens"] == sum(len(prompt) + len(answer) for prompt, answer in rows)
    assert done["tflop"] > 0 and "mfu" not in done


def test_a_mixture_of_experts_keeps_its_config_and_generates(
    tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    """TRL has it tell its routing, on which generation fails, and adds a loss for that where it
    evaluates.
    """
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tokens = {"vocab_size": 320, "pad_token_id": 0, "eos_token_id": 1}
    model = MixtralForCausalLM(MixtralConfig(**size, **heads, **tokens))
    rows = conversation_rows(tokenizer, 8)
    told = supervised.train_sft(model, tokenizer, rows, rows[:1], changed(job, max_steps=1))
    assert not model.config.output_router_logits and model.config.router_aux_loss_coef == 0.001
    assert 0 < told["heldout_loss"] < math.log(320) + 1
    ids = torch.tensor([[0, 5, 6], [7, 5, 6]])
    drawn = model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=3, min_new_tokens=3)
    assert drawn.shape == (2, 6)


# --- what cannot be trained -----------------------------------------------------------------------


def test_rows_that_are_too_long_are_left_out_and_counted(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = conversation_rows(tokenizer, 20)
    lengths = sorted(len(prompt) + len(answer) for prompt, answer in rows)
    limit = lengths[12]
    with caplog.at_level(logging.WARNING):
        kept = supervised._supervised(rows, limit)
    assert len(kept) == sum(length <= limit for length in lengths) < 20
    assert f"left out {20 - len(kept)} of 20 rows longer than max_length {limit}" in caplog.text
    pairs = pairs_of(tokenizer, policy(tokenizer))
    fits = [p for p in pairs if len(p.prompt) + max(len(p.first), len(p.second)) <= limit]
    assert 0 < len(pairwise_training.fitting(pairs, limit)) == len(fits) < len(pairs)
    short = [replace(p, mismatched=[1] * 120) if i else p for i, p in enumerate(fits)]
    assert pairwise_training.fitting(short, limit) == fits[:1]
    scored = scored_pairs(tokenizer)
    assert len(scorer_training._ranked(scored, limit)) == sum(
        max(len(p.high), len(p.low)) <= limit for p in scored
    )


def test_data_of_which_nothing_fits_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        ValueError, match=r"no row fits into max_length 3 tokens; raise training\.max_length"
    ):
        supervised._supervised(conversation_rows(tokenizer), 3)


def test_a_batch_that_micro_batches_do_not_divide_is_refused(job: Job) -> None:
    with pytest.raises(
        ValueError, match=r"batch_size 4 must be a multiple of resources\.micro_batch_size 3"
    ):
        run.arguments(changed(job, micro_batch_size=3))
    assert run.arguments(changed(job, micro_batch_size=64))["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize("log_steps", [1, 50], ids=["logged", "between two lines of the log"])
def test_a_loss_that_explodes_stops_the_run(
    tokenizer: PreTrainedTokenizerBase, job: Job, log_steps: int
) -> None:
    pairs = pairs_of(tokenizer, policy(tokenizer))
    broken = [Pair(p.prompt, p.first, p.second, math.inf, p.ref_second) for p in pairs]
    with pytest.raises((FloatingPointError, DualignError), match="NaN or infinite"):
        pairwise_training.train_pairwise(
            policy(tokenizer),
            tokenizer,
            broken,
            PairLossConfig(1.0, 1.0),
            changed(job, max_steps=2, log_steps=log_steps),
        )


def test_weights_that_the_last_step_breaks_stop_the_run(
    kind: tuple[Start, Train], job: Job
) -> None:
    """A gradient can overflow where the loss does not, and no later loss tells of the last one."""
    start, train = kind
    model = start()
    trained = next(weight for weight in model.parameters() if weight.requires_grad)
    trained.register_hook(lambda gradient: gradient + math.inf)
    last = changed(job, max_steps=1, warmup=0.0)
    for trainee in (model, start()):  # the second goes on from a checkpoint, which holds them
        with pytest.raises(TrainingError, match="the last step left weights NaN or infinite"):
            train(trainee, last)


@pytest.mark.parametrize("adapted", [False, True])
def test_checkpointing_that_an_architecture_lacks_is_refused_in_a_line(
    tokenizer: PreTrainedTokenizerBase, job: Job, adapted: bool
) -> None:
    config = OpenAIGPTConfig(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)
    model: Any = AutoModelForCausalLM.from_config(config)
    model = with_lora(model, LORA.model_copy(update={"dropout": 0.0}), 0) if adapted else model
    rows = conversation_rows(tokenizer, 8)
    told = (
        r"^resources\.gradient_checkpointing: OpenAIGPTLMHeadModel has none; set it to false, and"
    )
    with pytest.raises(ParamsError, match=told):
        supervised.train_sft(
            model, tokenizer, rows, rows, changed(job, gradient_checkpointing=True)
        )

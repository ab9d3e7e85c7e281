"""The policy gradient: its mathematics by hand, TRL's part of it against our own numbers, its
optimum, and runs.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerBase
from trl import RLOOTrainer

from dualign.core.errors import DataError, DualignError, TrainingError
from dualign.core.schema import Message, user
from dualign.data import world
from dualign.lm.models import build_scratch, load_scorer_backbone, save, train_tokenizer, with_lora
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import decode_answers, encode_prompts
from dualign.params.base import LoraParams, TrainingParams
from dualign.scoring.calibration import Platt
from dualign.scoring.scorers import Scorer
from dualign.training import policy_gradient
from dualign.training.checkpoints import last_checkpoint
from dualign.training.policy_gradient import (
    PolicyGradient,
    PolicyGradientTrainer,
    kl_weight,
    lagrangian_reward,
    log_lambda_step,
    train_policy_gradient,
)
from dualign.training.run import Job
from tests.tiny import WIDER, on_cpu, short_training
from tests.training.conftest import same, weights

LORA = LoraParams(rank=2, alpha=4.0, dropout=0.3, target_modules="all-linear", quantise=None)
QUESTIONS = world.prompts()[:6]
PROMPTS = [user(question) for question in QUESTIONS]
#: What the base ends a text with, beside the end of a turn.
TEXT_END = "<|system|>"
OPTIONS = PolicyGradient(
    beta=0.5,
    limit=-0.2,
    samples=4,
    max_new_tokens=5,
    lambda_init=1.5,
    lambda_rate=0.02,
    lambda_min=0.1,
    lambda_max=20.0,
    window=12,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(
        [*QUESTIONS, *(answer.text for answer in world.answers(QUESTIONS[0]))], 300
    )


@pytest.fixture(scope="module")
def scorers(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Scorer, Scorer]:
    """Two scorers with random heads, on a scale where answers of one token have mean 0 and spread
    1.
    """
    folder = tmp_path_factory.mktemp("backbone")
    save(build_scratch(WIDER, tokenizer, seed=7), tokenizer, folder)
    resources = on_cpu()

    def scorer(seed: int) -> Scorer:
        model = load_scorer_backbone(str(folder), tokenizer, resources)
        torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(seed))
        plain = Scorer(model, tokenizer, Platt())
        scores = plain.score([PROMPTS[0]] * len(tokenizer), words(tokenizer), batch_size=300)
        return plain.calibrated(
            Platt(float(1 / scores.std()), float(-scores.mean() / scores.std()))
        )

    return scorer(1), scorer(2)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Eight steps of two prompts with four answers each, a checkpoint at the fourth."""
    resources = on_cpu(
        micro_batch_size=None,
        sampling_batch_size=128,
        scoring_batch_size=128,
        gradient_checkpointing=False,
        checkpoint_steps=4,
        log_steps=1,
    )
    training = short_training(
        batch_size=8, learning_rate=1e-2, schedule="linear", max_length=120, max_steps=8
    )
    return Job(training, resources, tmp_path / "scratch", seed=3)


def changed(job: Job, scratch: str, **updates: Any) -> Job:
    """A job with other training or resource params, in another scratch folder."""
    known = {name: value for name, value in updates.items() if name in TrainingParams.model_fields}
    rest = {name: value for name, value in updates.items() if name not in known}
    training, resources = (
        job.training.model_copy(update=known),
        job.resources.model_copy(update=rest),
    )
    return Job(training, resources, job.scratch.parent / scratch, job.seed)


def words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every answer of one token."""
    return decode_answers(tokenizer, [[token] for token in range(len(tokenizer))])


def started(kind: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A fresh policy: all weights, or an adapter that is not the identity."""
    model = build_scratch(WIDER, tokenizer, seed=0)
    if kind == "whole":
        return model
    torch.manual_seed(11)
    model = with_lora(model, LORA, 0)
    disturb(model)
    return model


def disturb(model: torch.nn.Module) -> None:
    """Move every weight that is trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)


def ascent_of(
    tokenizer: PreTrainedTokenizerBase,
    scorers: tuple[Scorer, Scorer],
    options: PolicyGradient = OPTIONS,
) -> policy_gradient._Ascent:
    ends = [tokenizer.convert_tokens_to_ids(name) for name in (tokenizer.eos_token, TEXT_END)]
    return policy_gradient._Ascent(tokenizer, ends, *scorers, options, 64)


# --- mathematics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lam", "cost", "limit", "expected"),
    [
        (1.0, 0.5, 0.0, math.exp(0.05)),  # above the limit: 0.1 * 1 * 0.5
        (2.0, -1.0, 0.5, 2 * math.exp(-0.3)),  # below it: 0.1 * 2 * -1.5
        (2.0, 0.3, 0.3, 2.0),  # on it
        (3.0, 100.0, 0.0, 4.0),  # clamped
        (0.3, -100.0, 0.0, 0.25),
    ],
)
def test_a_step_of_log_lambda_by_hand(
    lam: float, cost: float, limit: float, expected: float
) -> None:
    found = log_lambda_step(math.log(lam), cost, limit, rate=0.1, low=0.25, high=4.0)
    assert math.exp(found) == pytest.approx(expected, rel=1e-12)


def test_the_reward_by_hand() -> None:
    found = lagrangian_reward(np.array([2.0, -1.0]), np.array([0.5, -3.0]), 3.0)
    assert found == pytest.approx([0.125, 2.0])


@pytest.mark.parametrize("lam", [0.0, 0.4, 3.0])
def test_reward_and_kl_weight_together_have_the_optimum_pi_lambda(lam: float) -> None:
    """exp(reward / KL weight) is the tilt exp((r - lambda c) / beta)."""
    r, c, beta = np.array([1.0, -0.3, 2.2]), np.array([0.4, -1.0, 3.0]), 0.7
    assert lagrangian_reward(r, c, lam) / kl_weight(beta, lam) == pytest.approx(
        (r - lam * c) / beta
    )


# --- TRL's part -----------------------------------------------------------------------------------


def test_answers_are_rewarded_by_the_models_own_scores(
    tokenizer: PreTrainedTokenizerBase, scorers: tuple[Scorer, Scorer]
) -> None:
    """Two rounds of eight answers; the cost that moves lambda is the mean of the last twelve."""
    ascent = ascent_of(tokenizer, scorers)
    log_lambda, costs, tokens = math.log(1.5), [], 0
    for start in (20, 120):
        ids = [[start + i, start + 2 * i, tokenizer.eos_token_id][: 1 + i % 3] for i in range(8)]
        prompts = [PROMPTS[i % 3] for i in range(8)]
        found = ascent.lagrangian(
            prompts=prompts, completion_ids=ids, completions=None, trainer_state=None
        )
        done = [row[-1] == tokenizer.eos_token_id for row in ids]
        r, c = (
            scorer.score(prompts, decode_answers(tokenizer, ids), batch_size=8, ended=done)
            for scorer in scorers
        )
        costs, tokens = [*costs, *c], tokens + sum(map(len, ids))
        log_lambda += 0.02 * math.exp(log_lambda) * (np.mean(costs[-12:]) + 0.2)
        lam = math.exp(log_lambda)
        assert 0.1 < lam < 20.0 and ascent.lam == pytest.approx(lam)
        assert found == pytest.approx((r - lam * c) / (1 + lam), rel=1e-4, abs=1e-5)
    assert ascent.generated_tokens == tokens
    assert ascent.history["lambda"][-1] == pytest.approx(lam)
    assert ascent.history["reward"][-1] == pytest.approx(r.mean(), rel=1e-4)
    assert ascent.history["cost"][-1] == pytest.approx(c.mean(), rel=1e-4)


def test_an_answer_that_ends_the_text_is_no_cut_one(
    tokenizer: PreTrainedTokenizerBase, scorers: tuple[Scorer, Scorer]
) -> None:
    """A base ends a text with other tokens than a turn, after which nothing is drawn either; as in
    every table the scorers read the end of a turn there.
    """
    ends = tokenizer.convert_tokens_to_ids([tokenizer.eos_token, TEXT_END])
    rewards = [
        ascent_of(tokenizer, scorers).lagrangian(
            prompts=[PROMPTS[0]], completion_ids=[[20, 40, *end]]
        )
        for end in ([ends[0]], [ends[1]], [])
    ]
    assert rewards[1] == pytest.approx(rewards[0])
    assert rewards[2] != pytest.approx(rewards[0], abs=1e-4)


def test_prompts_are_read_as_by_every_other_stage(
    tokenizer: PreTrainedTokenizerBase, scorers: tuple[Scorer, Scorer], job: Job
) -> None:
    talk: list[Message] = [
        {"role": "system", "content": "Be brief."},
        *user("Why?"),
        {"role": "assistant", "content": "Why not?"},
        *user(" Well, what does <|end|> do?  "),
    ]
    prompts = [*PROMPTS, talk]
    ascent = ascent_of(tokenizer, scorers)
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template += (
        "{% if add_generation_prompt and enable_thinking is not false %} Hm:{% endif %}"
    )
    trainer = PolicyGradientTrainer(
        started("whole", tokenizer), ascent, prompts, thinking, OPTIONS, job
    )
    rows = [row["prompt"] for row in trainer.train_dataset]
    assert {str(row) for row in rows} == {str(prompt) for prompt in prompts}
    read = trainer._tokenize_prompts(rows)[0]
    assert read == encode_prompts(thinking, rows) == encode_prompts(tokenizer, rows)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_advantages_by_hand(
    kind: str, tokenizer: PreTrainedTokenizerBase, scorers: tuple[Scorer, Scorer], job: Job
) -> None:
    """Leave-one-out, with beta / (1 + lambda) times the log-ratio to the policy at the start taken
    off each reward.
    """
    reference, policy = started(kind, tokenizer), started(kind, tokenizer)
    trainer = PolicyGradientTrainer(
        policy, ascent_of(tokenizer, scorers), PROMPTS, tokenizer, OPTIONS, job
    )
    trainer.model.train()
    disturb(policy)
    rows = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in rows])
    assert trainer.model.training

    prompts = encode_prompts(tokenizer, rows)
    pairs = zip(
        batch["completion_ids"].tolist(), batch["completion_mask"].sum(1).tolist(), strict=True
    )
    answers = [ids[:length] for ids, length in pairs]
    logp, ref = (
        log_probabilities(m, tokenizer, prompts, answers, batch_size=8).numpy()
        for m in (policy, reference)
    )
    assert batch["old_logps"].numpy() == pytest.approx(logp, abs=1e-4)
    done = [answer[-1] == tokenizer.eos_token_id for answer in answers]
    r, c = (
        scorer.score(rows, decode_answers(tokenizer, answers), batch_size=8, ended=done)
        for scorer in scorers
    )
    lam = math.exp(log_lambda_step(math.log(1.5), float(c.mean()), -0.2, 0.02, 0.1, 20.0))
    value = ((r - lam * c - 0.5 * (logp - ref)) / (1 + lam)).reshape(2, 4)
    expected = value - (value.sum(1, keepdims=True) - value) / 3
    assert batch["advantages"].numpy() == pytest.approx(expected.ravel(), abs=1e-3)
    assert abs(logp - ref).mean() > 0.05
    assert trainer._ascent.history["kl"] == pytest.approx([(logp - ref).mean()], abs=1e-4)


def test_log_probabilities_on_a_cpu_are_those_of_trls_fused_head(
    tokenizer: PreTrainedTokenizerBase, scorers: tuple[Scorer, Scorer], job: Job
) -> None:
    model = started("whole", tokenizer)
    trainer = PolicyGradientTrainer(
        model, ascent_of(tokenizer, scorers), PROMPTS, tokenizer, OPTIONS, job
    )
    ids = torch.randint(5, 300, (6, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, -2:] = 0
    arguments = (model, ids, mask, 5, 4)
    ours = trainer._get_per_token_logps_and_entropies(*arguments, compute_entropy=True)
    stock = RLOOTrainer._get_per_token_logps_and_entropies(
        trainer, *arguments, compute_entropy=True
    )
    for found, expected in zip(ours[:2], stock[:2], strict=True):
        assert torch.allclose(found * mask[:, -5:], expected * mask[:, -5:], atol=1e-4)


# --- the optimum ----------------------------------------------------------------------------------


def test_a_run_at_a_fixed_lambda_ends_at_pi_lambda(
    tokenizer: PreTrainedTokenizerBase, scorers: tuple[Scorer, Scorer], job: Job
) -> None:
    """Answers of one token, so that pi_lambda is known; with beta left as it is the optimum would
    be another.
    """
    model, lam, beta = started("whole", tokenizer), 3.0, 0.5
    ids = torch.tensor(encode_prompts(tokenizer, PROMPTS[:1]))

    def distribution() -> np.ndarray:
        with torch.no_grad():
            return torch.softmax(model.eval()(ids).logits[0, -1].double(), -1).numpy()

    def divergence(p: np.ndarray, q: np.ndarray) -> float:
        return float((p * np.log(p / q)).sum())

    done = [token == tokenizer.eos_token_id for token in range(len(tokenizer))]
    mild = tuple(scorer.calibrated(Platt(0.1, 0.0)) for scorer in scorers)
    r, c = (
        s.score(PROMPTS[:1] * len(tokenizer), words(tokenizer), batch_size=300, ended=done)
        for s in mild
    )
    start = distribution()

    def tilted(weight: float) -> np.ndarray:
        unnormalised = start * np.exp((r - lam * c) / weight)
        return unnormalised / unnormalised.sum()

    options = replace(
        OPTIONS,
        beta=beta,
        samples=128,
        max_new_tokens=1,
        lambda_init=lam,
        lambda_rate=0.0,
        lambda_max=5.0,
    )
    eighty = changed(
        job, "optimum", batch_size=128, max_steps=80, learning_rate=2e-2, checkpoint_steps=100
    )
    metrics = train_policy_gradient(model, tokenizer, PROMPTS[:1], *mild, options, eighty)
    found, optimum, unscaled = distribution(), tilted(beta), tilted(beta * (1 + lam))
    assert divergence(start, optimum) > 5 and divergence(optimum, unscaled) > 2
    assert divergence(found, optimum) < 0.5
    assert divergence(found, unscaled) > 1
    value = np.array(metrics["history"]["reward"]) - lam * np.array(metrics["history"]["cost"])
    assert value[-10:].mean() > value[:3].mean() + 3  # the rewarded tokens are drawn by now
    assert metrics["history"]["lambda"] == pytest.approx([lam] * 80)
    assert metrics["history"]["kl"][-1] == pytest.approx(divergence(found, start), rel=0.2)


def test_a_policy_is_trained_without_the_noise_of_its_base(
    tokenizer: PreTrainedTokenizerBase, scorers: tuple[Scorer, Scorer], job: Job
) -> None:
    """Llama's is no module, of which alone TRL sets the rate to 0."""
    model = started("adapter", tokenizer)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    trainer = PolicyGradientTrainer(
        model, ascent_of(tokenizer, scorers), PROMPTS, tokenizer, OPTIONS, job
    )
    ids = torch.arange(5, 15)[None]
    trainer.model.train()
    first, second = (trainer.model(input_ids=ids).logits for _ in range(2))
    assert torch.equal(first, second)


# --- runs -----------------------------------------------------------------------------------------

Train = Callable[[Any, Job], dict[str, Any]]


@pytest.fixture
def train(tokenizer: PreTrainedTokenizerBase, scorers: tuple[Scorer, Scorer]) -> Train:
    return lambda model, job: train_policy_gradient(
        model, tokenizer, PROMPTS, *scorers, OPTIONS, job
    )


def test_a_run_changes_policy_and_lambda_and_tells_its_course(
    tokenizer: PreTrainedTokenizerBase, train: Train, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    model = started("whole", tokenizer)
    before = weights(model)
    with caplog.at_level(logging.INFO):
        metrics = train(model, job)
    assert not same(before, weights(model))
    history = metrics["history"]
    assert metrics["steps"] == 8 and metrics["rows"] == 6
    assert {name: len(values) for name, values in history.items()} == dict.fromkeys(
        ("lambda", "cost", "reward", "kl"), 8
    )
    assert history["kl"][0] == 0 and max(history["kl"]) > 0.01
    assert len(set(history["lambda"])) > 1 and metrics["lambda"] == history["lambda"][-1]
    assert 8 * 8 <= metrics["generated_tokens"] <= 8 * 8 * OPTIONS.max_new_tokens
    first = log_lambda_step(math.log(1.5), history["cost"][0], -0.2, 0.02, 0.1, 20.0)
    assert history["lambda"][0] == pytest.approx(math.exp(first))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("dualign")]
    assert [line for line in lines if line.startswith("training: step 8 of 8: lambda ")]
    assert not [
        line for line in lines if "scores" in line or "sampling" in line
    ]  # not a line for each rollout


def test_a_mixture_of_experts_is_trained_on_its_rewards_alone(
    tokenizer: PreTrainedTokenizerBase, train: Train, job: Job
) -> None:
    """TRL adds a loss for its routing, of which our log-probabilities tell nothing."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    model = MixtralForCausalLM(MixtralConfig(**size, **heads, **tokens))
    assert train(model, changed(job, "experts", max_steps=1))["steps"] == 1


def test_the_reference_is_the_policy_as_it_is_passed(
    tokenizer: PreTrainedTokenizerBase, train: Train, job: Job
) -> None:
    """Also for a model that a trainer has had in its hands before."""
    model = started("whole", tokenizer)
    train(model, changed(job, "first", max_steps=3))
    again = train(model, changed(job, "second", max_steps=3))
    assert again["history"]["kl"][0] == 0 and again["history"]["kl"][-1] != 0


def test_an_adapter_is_trained_alone_and_left_alone(
    tokenizer: PreTrainedTokenizerBase, train: Train, job: Job
) -> None:
    model = started("adapter", tokenizer)
    before = weights(model)
    metrics = train(model, changed(job, "adapter", max_steps=3))
    after = weights(model)
    assert isinstance(model, PeftModel) and list(model.peft_config) == ["default"]
    assert after.keys() == before.keys()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name in after if "lora" in name
    }
    assert (
        metrics["history"]["kl"][0] == pytest.approx(0, abs=1e-6)
        and abs(metrics["history"]["kl"][-1]) > 1e-4
    )


@pytest.mark.parametrize(("kind", "micro"), [("whole", None), ("whole", 2), ("adapter", None)])
def test_an_interrupted_run_ends_with_the_same_bytes(
    kind: str,
    micro: int | None,
    tokenizer: PreTrainedTokenizerBase,
    train: Train,
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six prompts and two a step: the interruption falls into the second shuffle of the prompts."""

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt

    whole = started(kind, tokenizer)
    expected = train(whole, changed(job, "whole", micro_batch_size=micro, log_steps=3))
    broken = changed(job, "broken", micro_batch_size=micro, log_steps=3)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(policy_gradient._Ascent, "on_step_end", interrupt)
        train(started(kind, tokenizer), broken)
    assert last_checkpoint(broken.scratch) == broken.scratch / "checkpoint-4"
    resumed = started(kind, tokenizer)
    metrics = train(resumed, broken)
    assert same(weights(resumed), weights(whole))
    for name in ("lambda", "history", "generated_tokens", "steps", "rows"):
        assert metrics[name] == expected[name], name


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_run_that_had_ended_is_not_run_again(
    kind: str, tokenizer: PreTrainedTokenizerBase, train: Train, job: Job
) -> None:
    first, second = started(kind, tokenizer), started(kind, tokenizer)
    metrics, again = train(first, job), train(second, job)
    assert same(weights(first), weights(second))
    assert again == metrics


def test_epochs_count_when_no_number_of_steps_is_given(
    tokenizer: PreTrainedTokenizerBase, train: Train, job: Job
) -> None:
    metrics = train(started("whole", tokenizer), changed(job, "epochs", max_steps=None, epochs=1.5))
    assert metrics["steps"] == 5  # nine prompts, two a step


def test_every_prompt_comes_before_any_comes_again(
    tokenizer: PreTrainedTokenizerBase, scorers: tuple[Scorer, Scorer], job: Job
) -> None:
    """Eight steps of two prompts, each with its four answers side by side, in two rounds of six
    prompts and a rest.
    """
    trainer = PolicyGradientTrainer(
        started("whole", tokenizer), ascent_of(tokenizer, scorers), PROMPTS, tokenizer, OPTIONS, job
    )
    rows = [str(row["prompt"]) for batch in trainer.get_train_dataloader() for row in batch]
    order = rows[::4]
    assert rows == [prompt for prompt in order for _ in range(4)] and len(order) == 16
    assert sorted(order[:6]) == sorted(order[6:12]) == sorted(map(str, PROMPTS))
    assert order[:6] != order[6:12]


def test_each_step_draws_afresh_and_again_the_same_when_it_is_repeated(
    tokenizer: PreTrainedTokenizerBase, scorers: tuple[Scorer, Scorer], job: Job
) -> None:
    trainer = PolicyGradientTrainer(
        started("whole", tokenizer), ascent_of(tokenizer, scorers), PROMPTS, tokenizer, OPTIONS, job
    )
    ids = encode_prompts(tokenizer, PROMPTS)
    drawn = []
    for step in (0, 1, 0):
        trainer.state.global_step = step
        drawn.append(trainer._generate_single_turn(ids))
    assert drawn[0] == drawn[2] != drawn[1]


# --- what cannot be trained -----------------------------------------------------------------------


def test_prompts_without_room_for_an_answer_are_left_out(
    tokenizer: PreTrainedTokenizerBase,
    scorers: tuple[Scorer, Scorer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    lengths = [len(row) for row in encode_prompts(tokenizer, PROMPTS)]
    limit = sorted(lengths)[3] + 5
    kept = policy_gradient._fitting(tokenizer, PROMPTS, 5, limit)
    assert (
        kept
        == [p for p, length in zip(PROMPTS, lengths, strict=True) if length + 5 <= limit]
        != PROMPTS
    )
    assert f"left out {6 - len(kept)} of 6 rows longer than max_length {limit}" in caplog.text
    with pytest.raises(DataError, match=r"no row fits into max_length 3 tokens"):
        policy_gradient._fitting(tokenizer, PROMPTS, 5, 3)
    with pytest.raises(DataError, match="there are no prompts"):
        policy_gradient._fitting(tokenizer, [], 5, 100)


def test_scores_that_are_not_finite_stop_the_run(
    tokenizer: PreTrainedTokenizerBase, scorers: tuple[Scorer, Scorer], job: Job
) -> None:
    reward, cost = scorers
    broken = cost.calibrated(Platt(math.nan, 0.0))
    with pytest.raises(TrainingError, match="NaN or infinite; train it again") as raised:
        train_policy_gradient(
            started("whole", tokenizer), tokenizer, PROMPTS, reward, broken, OPTIONS, job
        )
    assert isinstance(raised.value, DualignError)

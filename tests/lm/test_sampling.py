"""Samples follow the model's own distribution, and log-probabilities are those of a plain forward
pass.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dualign.core.errors import ParamsError
from dualign.core.schema import user
from dualign.lm import packing
from dualign.lm.engines.interface import Decoding
from dualign.lm.models import build_scratch
from dualign.lm.numerics import in_precision
from dualign.lm.sampling import (
    Draws,
    answer_log_probabilities,
    draw,
    log_probabilities,
    sample,
)
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.params.loading import load_resources
from tests.tiny import WIDER, on_cpu

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = WIDER.model_copy(update={"layers": 2, "context": 64})
QUESTIONS = [
    "How do I cook the rice at home?",
    "Why?",
    "How do I poison the pond with my kids, and then the lawn?",
]


RESOURCES = load_resources(ROOT / "params.yaml")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Random, but far from uniform: its likeliest next token has several per cent."""
    model = build_scratch(SCRATCH, tokenizer, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    return model.eval()


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return encode_prompts(tokenizer, [user(question) for question in QUESTIONS])


@torch.no_grad()
def next_token(model: torch.nn.Module, ids: list[int]) -> Tensor:
    """p(next | ids) by one plain forward pass."""
    return model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)


# --- log-probabilities ----------------------------------------------------------------------------


def naive(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
    return sum(
        math.log(next_token(model, prompt + answer[:i])[token].item())
        for i, token in enumerate(answer)
    )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_log_probabilities_are_those_of_one_row_and_one_token_at_a_time(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    packed: bool,
) -> None:
    """Whatever the batch and its padding, in the order of the rows given; the model's attention is
    its own again.
    """
    if packed:
        monkeypatch.setattr(packing, "WIDTH", 0)
    answers = encode_answers(
        tokenizer,
        ["Stir it.", "You can warm it on low heat, then taste it.", "", "No.", "Just wait."],
    )
    rows = [prompts[i] for i in (0, 1, 2, 1, 0)]
    result = log_probabilities(model, tokenizer, rows, answers, batch_size=batch_size)
    assert result.dtype == torch.float64 and model.config._attn_implementation == "sdpa"
    expected = [naive(model, prompt, answer) for prompt, answer in zip(rows, answers, strict=True)]
    assert result.tolist() == pytest.approx(expected, abs=1e-4)


def test_an_adapter_is_scored_with_its_weights(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    plain = build_scratch(SCRATCH, tokenizer, seed=0)
    answers = encode_answers(tokenizer, ["Stir it."] * 3)
    before = log_probabilities(plain, tokenizer, prompts, answers, batch_size=3)
    adapted = get_peft_model(
        plain, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    assert torch.allclose(
        log_probabilities(adapted, tokenizer, prompts, answers, batch_size=3), before
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    changed = log_probabilities(adapted, tokenizer, prompts, answers, batch_size=2)
    assert not torch.allclose(changed, before, atol=1e-3)
    expected = [naive(adapted.eval(), *row) for row in zip(prompts, answers, strict=True)]
    assert changed.tolist() == pytest.approx(expected, abs=1e-4)


def test_masked_positions_count_nothing(model: PreTrainedModel) -> None:
    ids = torch.tensor([[9, 30, 44, 51, 0], [12, 13, 14, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, 44, -100, -100], [-100, 13, 14, -100, -100]])
    with torch.no_grad():
        result = answer_log_probabilities(model, ids, mask, labels).tolist()
    first = math.log(next_token(model, [9, 30])[44].item())
    second = math.log(next_token(model, [12])[13].item()) + math.log(
        next_token(model, [12, 13])[14].item()
    )
    assert result == pytest.approx([first, second], abs=1e-5)


def test_gradients_reach_the_model_through_answers_only(model: PreTrainedModel) -> None:
    ids = torch.tensor([[9, 30, 44, 51]])
    labels = torch.tensor([[-100, -100, 44, 51]])
    answer_log_probabilities(model, ids, torch.ones_like(ids), labels).sum().backward()
    grad = model.get_input_embeddings().weight.grad
    assert grad is not None and torch.isfinite(grad).all() and grad[30].abs().sum() > 0
    model.zero_grad()


# --- samples --------------------------------------------------------------------------------------

DRAWS = 3000


def chi_square(counts: Counter[int], probability: Tensor, draws: int) -> float:
    """Pearson's statistic per degree of freedom, with tokens expected fewer than five times taken
    together.
    """
    often = (probability * draws >= 5).nonzero().squeeze(1).tolist()
    cells = [(counts[i], probability[i].item() * draws) for i in often]
    rest = draws - sum(count for count, _ in cells), draws - sum(expected for _, expected in cells)
    cells += [rest] if rest[1] >= 5 else []
    return sum((seen - expected) ** 2 / expected for seen, expected in cells) / (len(cells) - 1)


def first_tokens(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: list[int]
) -> Counter[int]:
    drawn = sample(
        model, tokenizer, [prompt], count=DRAWS, max_new_tokens=1, batch_size=DRAWS, seed=1
    )
    return Counter(one.tokens[0] for one in drawn)


def test_first_tokens_follow_the_models_distribution(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    for prompt in prompts:
        p = next_token(model, prompt)
        assert chi_square(first_tokens(model, tokenizer, prompt), p, DRAWS) < 1.5
        hotter = (p.log() / 1.3).softmax(-1)  # the test would notice another temperature
        assert chi_square(first_tokens(model, tokenizer, prompt), hotter, DRAWS) > 1.5


def test_no_setting_of_the_models_own_file_bends_the_distribution(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """Such as the repetition penalty, top-k and top-p that Qwen2.5 ships in
    generation_config.json.
    """
    model = build_scratch(SCRATCH, tokenizer, seed=0).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    p = next_token(model, prompts[0])
    for name, value in (
        ("repetition_penalty", 3.0),
        ("top_k", 3),
        ("top_p", 0.5),
        ("temperature", 0.3),
        ("min_p", 0.2),
    ):
        setattr(model.generation_config, name, value)
    model.generation_config.suppress_tokens = [int(p.argmax())]
    kept = model.generation_config.to_dict()
    assert chi_square(first_tokens(model, tokenizer, prompts[0]), p, DRAWS) < 1.5
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    assert chi_square(first_tokens(adapted, tokenizer, prompts[0]), p, DRAWS) < 1.5
    assert model.generation_config.to_dict() == kept


def test_second_tokens_follow_the_models_distribution_given_the_first(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """Through the cache, and with prompts of other lengths padded in the same batch."""
    drawn = sample(
        model, tokenizer, prompts, count=DRAWS, max_new_tokens=2, batch_size=3 * DRAWS, seed=2
    )
    short = [one.tokens for one in drawn if one.prompt == 1]
    first, seen = Counter(tokens[0] for tokens in short).most_common(1)[0]
    assert seen > 100
    counts = Counter(tokens[1] for tokens in short if tokens[0] == first)
    assert chi_square(counts, next_token(model, [*prompts[1], first]), seen) < 2.0


def test_the_same_seed_gives_the_same_answers_in_order_of_prompt_and_draw(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    def draw(seed: int) -> list[tuple[int, list[int]]]:
        drawn = sample(
            model, tokenizer, prompts, count=3, max_new_tokens=6, batch_size=4, seed=seed
        )
        return [(one.prompt, one.tokens) for one in drawn]

    assert draw(5) == draw(5) != draw(6)
    assert [prompt for prompt, _ in draw(5)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("engine", ["generate", "refill"])
def test_draws_to_other_prompts_are_independent_at_one_seed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, engine: str
) -> None:
    """What a search measures, and picks a policy by, says nothing of the noise in a certificate."""
    resources = RESOURCES.model_copy(update={"engine": engine, "sampling_batch_size": 64})
    score = torch.randn(len(tokenizer), generator=torch.Generator().manual_seed(0))
    first = [[2, word, 3] for word in range(20, 26)]
    second = [[2, word, 3] for word in range(30, 36)]
    found = []
    for asked in (first, second):
        drawn = draw(model, tokenizer, asked, Draws(100, 4, seed=0), resources)
        found.append(torch.stack([score[one.tokens].mean() for one in drawn]))
    assert abs(float(torch.corrcoef(torch.stack(found))[0, 1])) < 0.13  # 3 standard errors


def test_answers_end_at_eos_or_at_the_limit(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_scratch(SCRATCH, tokenizer, seed=0)
    eos = tokenizer.eos_token_id
    forward = model.lm_head.forward
    lift = torch.zeros(len(tokenizer))
    lift[eos] = math.log(len(tokenizer) / 4)  # EOS about one time in five
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: forward(hidden) + lift)
    drawn = sample(model, tokenizer, prompts, count=60, max_new_tokens=8, batch_size=50, seed=0)
    assert {one.ended for one in drawn} == {True, False}
    for one in drawn:
        assert one.ended == (one.tokens[-1] == eos)
        assert one.tokens.count(eos) == int(one.ended)
        assert tokenizer.pad_token_id not in one.tokens or one.tokens.index(
            tokenizer.pad_token_id
        ) < len(one.tokens)
        assert len(one.tokens) == 8 or one.ended
        assert "<|end|>" not in one.text
    ends = sum(one.tokens[0] == eos for one in drawn) / len(drawn)
    assert ends == pytest.approx(0.2, abs=0.1)


def test_an_answer_ends_at_every_token_with_which_the_base_ends_a_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """The end of a turn, and the list of the base's generation_config.json."""
    favourite = int(next_token(model, prompts[0]).argmax())
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = favourite
    try:
        drawn = sample(
            model, tokenizer, [prompts[0]], count=200, max_new_tokens=4, batch_size=200, seed=0
        )
    finally:
        model.generation_config.eos_token_id = before
    stopped = [one for one in drawn if favourite in one.tokens]
    assert stopped and all(
        one.tokens.index(favourite) == len(one.tokens) - 1 and one.ended for one in stopped
    )


def test_the_log_probability_of_a_sample_is_that_of_its_tokens_as_drawn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """E[log pi] over samples is minus the entropy: a Monte-Carlo check of sampler and scorer
    together.
    """
    drawn = sample(
        model, tokenizer, [prompts[0]], count=2000, max_new_tokens=1, batch_size=2000, seed=4
    )
    scored = log_probabilities(
        model, tokenizer, [prompts[0]] * 2000, [one.tokens for one in drawn], batch_size=500
    )
    p = next_token(model, prompts[0])
    entropy = -(p * p.log()).sum()
    spread = ((p * p.log() ** 2).sum() - (p * p.log()).sum() ** 2).sqrt()
    assert abs(scored.mean() + entropy) < 4 * spread / math.sqrt(2000)


# --- decoding of evaluations ----------------------------------------------------------------------


def test_at_temperature_0_the_likeliest_token_is_taken_each_time(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """Whatever the seed and the padding of a batch, and with nothing of the model's own file."""
    model.generation_config.repetition_penalty = 3.0
    try:
        for seed, batch_size in ((0, 1), (1, 3)):
            resources = RESOURCES.model_copy(update={"sampling_batch_size": batch_size})
            answers = draw(model, tokenizer, prompts, Draws(1, 5, seed, Decoding(0.0)), resources)
            for prompt, one in zip(prompts, answers, strict=True):
                for at, token in enumerate(one.tokens):
                    before = [*prompt, *one.tokens[:at]]
                    assert token == int(next_token(model, before).argmax())
    finally:
        model.generation_config.repetition_penalty = 1.0


def test_another_temperature_gives_its_own_distribution(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    resources = RESOURCES.model_copy(update={"sampling_batch_size": DRAWS})
    drawn = draw(model, tokenizer, prompts[:1], Draws(DRAWS, 1, 1, Decoding(2.0)), resources)
    counts = Counter(one.tokens[0] for one in drawn)
    p = next_token(model, prompts[0])
    assert chi_square(counts, (p.log() / 2).softmax(-1), DRAWS) < 1.5 < chi_square(counts, p, DRAWS)


def test_top_p_leaves_the_likeliest_tokens_in_their_proportion(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """At a temperature it is the share of the probability at that temperature."""
    resources = RESOURCES.model_copy(update={"sampling_batch_size": DRAWS})
    wanted = Draws(DRAWS, 1, 1, Decoding(temperature=1.5, top_p=0.6))
    drawn = draw(model, tokenizer, prompts[:1], wanted, resources)
    counts = Counter(one.tokens[0] for one in drawn)
    p = (next_token(model, prompts[0]).log() / 1.5).softmax(-1)
    ranked = p.sort(descending=True)
    enough = int((ranked.values.cumsum(0) < 0.6).sum()) + 1
    nucleus = torch.zeros_like(p)
    nucleus[ranked.indices[:enough]] = ranked.values[:enough]
    assert 1 < enough < len(p) / 2
    assert chi_square(counts, nucleus / nucleus.sum(), DRAWS) < 1.5 < chi_square(counts, p, DRAWS)


# --- the context, and bf16 ------------------------------------------------------------------------


def test_no_prompts_have_no_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert sample(model, tokenizer, [], count=3, max_new_tokens=4, batch_size=2, seed=0) == []
    assert log_probabilities(model, tokenizer, [], [], batch_size=2).shape == (0,)


def test_answers_that_would_leave_the_context_are_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = [9] * 20
    options = {"count": 1, "batch_size": 1, "seed": 0}
    (one,) = sample(model, tokenizer, [prompt], max_new_tokens=44, **options)
    assert one.ended or len(one.tokens) == 44
    with pytest.raises(
        ParamsError,
        match=r"^a prompt of 20 tokens \('.+'\) and generation.*: 65 tokens.*is 64; lower",
    ):
        sample(model, tokenizer, [prompt], max_new_tokens=45, **options)
    with pytest.raises(ParamsError, match=r"64 tokens \('.+'\).*is 64; leave the prompt out$"):
        sample(model, tokenizer, [[9] * 64], max_new_tokens=4, **options)


def test_rows_beyond_the_context_have_no_log_probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [[9] * 20, [9] * 21, [9] * 3]
    answers = [[12] * 44, [12] * 44, [12] * 2]
    with caplog.at_level(logging.WARNING):
        found = log_probabilities(model, tokenizer, rows, answers, batch_size=3)
    assert found.isnan().tolist() == [False, True, False]
    assert "1 of 3 answers are longer than the context of 64 tokens" in caplog.text
    alone = log_probabilities(model, tokenizer, rows[2:], answers[2:], batch_size=1)
    assert found[2].item() == pytest.approx(alone[0].item(), abs=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_first_tokens_follow_the_models_distribution_in_bf16(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], trained: bool
) -> None:
    """As the scorer gives it: its log-probabilities of all first tokens are a distribution, and the
    sampler's.
    """
    resources = on_cpu(precision="bf16")
    plain = build_scratch(SCRATCH, tokenizer, seed=0).eval()
    with torch.no_grad():
        plain.lm_head.weight.mul_(12)
    narrow = in_precision(plain, resources, trained=trained)
    vocabulary = [[token] for token in range(narrow.config.vocab_size)]
    scored = log_probabilities(
        narrow, tokenizer, [prompts[0]] * len(vocabulary), vocabulary, batch_size=100
    )
    assert scored.exp().sum().item() == pytest.approx(1.0, abs=1e-3)
    assert chi_square(first_tokens(narrow, tokenizer, prompts[0]), scored.exp(), DRAWS) < 1.5

"""The contract of every engine that runs here: draws of the policy itself, in order, whatever the
batch.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dualign.core.errors import ModelError, ParamsError
from dualign.core.schema import user
from dualign.lm.engines.interface import Answer, Request, row_seed
from dualign.lm.engines.table import ENGINES
from dualign.lm.mixture import policy_at, write_mixture
from dualign.lm.models import build_scratch, save
from dualign.lm.sampling import Draws, Sample, draw, log_probabilities, sample
from dualign.lm.tokens import encode_prompts
from dualign.params.base import EngineName, Resources
from dualign.params.loading import load_resources
from tests.tiny import WIDER

ROOT = Path(__file__).resolve().parents[3]
SCRATCH = WIDER.model_copy(update={"layers": 2, "context": 192})
QUESTIONS = ["How do I cook the rice at home?", "Why?", "How do I poison the pond with my kids?"]
HERE = ["refill", "continuous"]

pytestmark = pytest.mark.usefixtures("one_thread")


def sharp(tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Random, but far from uniform: about one token in eight ends an answer."""
    model = build_scratch(SCRATCH, tokenizer, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    return model.eval()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return sharp(tokenizer, 0)


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return encode_prompts(tokenizer, [user(question) for question in QUESTIONS])


def resources(engine: str, batch_size: int, **others: object) -> Resources:
    own = load_resources(ROOT / "params.yaml").model_dump()
    own |= {"device": "cpu", "precision": "fp32", "engine": engine}
    return Resources(**(own | {"sampling_batch_size": batch_size} | others))


def frequent_end(model: PreTrainedModel, prompt: list[int]) -> int:
    """A token that is likely enough for answers of many lengths."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    return int(logits.argsort(descending=True)[1])


def misfit(drawn: list[Sample], logp: torch.Tensor, seen: list[tuple[int, ...]]) -> float:
    """Pearson's statistic of whole answers, by the number of them."""
    counts = Counter(tuple(one.tokens) for one in drawn)
    expected = (logp.exp() * len(drawn)).tolist()
    often = [(counts[key], e) for key, e in zip(seen, expected, strict=True) if e > 5]
    assert len(often) > 12
    return sum((o - e) ** 2 / e for o, e in often) / len(often)


def test_every_name_of_an_engine_has_its_row() -> None:
    assert set(ENGINES) == set(get_args(EngineName))


@pytest.mark.parametrize("engine", HERE)
def test_whole_answers_follow_the_policys_distribution(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    engine: str,
) -> None:
    """All answers of up to two tokens by brute force, beside prompts of other lengths, with rows
    that end and join all the time.
    """
    before = model.generation_config.eos_token_id
    end = frequent_end(model, prompts[1])
    model.generation_config.eos_token_id = end
    try:
        drawn = draw(model, tokenizer, prompts, Draws(2000, 2, 3), resources(engine, 300))
    finally:
        model.generation_config.eos_token_id = before
    own = [one for one in drawn if one.prompt == 1]
    ends = {end, tokenizer.eos_token_id}
    assert all(one.ended == (one.tokens[-1] in ends) for one in own)
    assert all(len(one.tokens) == 2 or one.ended for one in own)
    seen = sorted({tuple(one.tokens) for one in own})
    rows = [list(tokens) for tokens in seen]
    logp = log_probabilities(model, tokenizer, [prompts[1]] * len(rows), rows, batch_size=256)
    assert misfit(own, logp, seen) < 1.8


@pytest.mark.parametrize("engine", HERE)
def test_answers_come_in_order_and_again_by_the_same_seed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    engine: str,
) -> None:
    def drawn(seed: int) -> list[tuple[int, list[int]]]:
        found = draw(model, tokenizer, prompts, Draws(3, 6, seed), resources(engine, 4))
        return [(one.prompt, one.tokens) for one in found]

    implementation = model.config._attn_implementation
    assert drawn(5) == drawn(5) != drawn(6)
    assert [prompt for prompt, _ in drawn(5)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert draw(model, tokenizer, [], Draws(3, 6, 0), resources(engine, 4)) == []
    assert model.config._attn_implementation == implementation


def test_refill_draws_the_same_answers_whatever_the_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """Rows leave and join at other times, prompts are padded otherwise, tables grow: 64 tokens and
    more need another table.
    """
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = frequent_end(model, prompts[0])
    try:
        found = [
            draw(model, tokenizer, prompts, Draws(20, 80, 1), resources("refill", size))
            for size in (1, 7, 60)
        ]
    finally:
        model.generation_config.eos_token_id = before
    assert found[0] == found[1] == found[2]
    assert len({len(one.tokens) for one in found[0]}) > 5


@pytest.mark.parametrize("engine", HERE)
def test_a_lora_policy_is_sampled_with_its_adapter(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], engine: str
) -> None:
    """The check refuses draws of the base: the adapter moves log pi by far more than it takes."""
    base = sharp(tokenizer, 0)
    request = Request(prompts, [row_seed(0, i, 0) for i in range(3)], 0, [1], 8, 4)
    plain = ENGINES[engine](base, tokenizer, request, resources(engine, 4))
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    found = draw(adapted, tokenizer, prompts, Draws(4, 8, 0), resources(engine, 4))
    assert len(found) == 12
    answers = [answer.tokens for answer in plain]
    moved = log_probabilities(adapted, tokenizer, prompts, answers, batch_size=3)
    own = torch.tensor([math.fsum(answer.log_probabilities or []) for answer in plain])
    assert (moved - own).abs().min() > 0.02


@pytest.mark.parametrize("engine", HERE)
def test_a_mixture_is_sampled_by_answers(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], tmp_path: Path, engine: str
) -> None:
    for seed in (0, 1):
        save(sharp(tokenizer, seed), tokenizer, tmp_path / str(seed))
    write_mixture([tmp_path / "0", tmp_path / "1"], [0.0, 1.0], tmp_path / "mixture")
    mixture = policy_at(tmp_path / "mixture", resources(engine, 500))
    drawn = draw(mixture, tokenizer, [prompts[1]], Draws(2500, 1, 3), resources(engine, 500))
    seen = sorted({tuple(one.tokens) for one in drawn})
    rows = [list(tokens) for tokens in seen]
    logp = log_probabilities(mixture, tokenizer, [prompts[1]] * len(rows), rows, batch_size=256)
    assert misfit(drawn, logp, seen) < 1.8


def test_generate_is_what_sample_draws(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    by_engine = draw(model, tokenizer, prompts, Draws(3, 6, 5), resources("generate", 4))
    again = sample(model, tokenizer, prompts, count=3, max_new_tokens=6, batch_size=4, seed=5)
    assert by_engine == again


def test_other_draws_than_the_policys_end_the_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine at another temperature, honest or not about its log-probabilities."""

    def cold(engine: str, *given: Any) -> list[Answer]:
        hook = model.lm_head.register_forward_hook(lambda module, given, logits: 1.4 * logits)
        try:
            return ENGINES[engine](*given)
        finally:
            hook.remove()

    wanted = Draws(40, 20, 0)
    for engine, told in (("refill", "nats off ours"), ("generate", "no draws of the policy")):
        monkeypatch.setitem(ENGINES, "continuous", partial(cold, engine))
        with pytest.raises(ModelError, match=told) as raised:
            draw(model, tokenizer, prompts, wanted, resources("continuous", 64))
        assert "\n" not in str(raised.value)


def test_vllm_that_is_not_there_is_told_in_one_line(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    wanted = Draws(1, 4, 0)
    missing = resources("vllm", 4, engine_python="/nowhere/python")
    with pytest.raises(ParamsError, match=r"^resources\.engine_python: /nowhere/python cannot"):
        draw(model, tokenizer, prompts, wanted, missing)
    without = resources("vllm", 4, engine_python=sys.executable)
    with pytest.raises(ModelError, match=r"failed \(ModuleNotFoundError: No module named 'vllm'\)"):
        draw(model, tokenizer, prompts, wanted, without)
    away = resources("vllm", 4, engine_url="http://127.0.0.1:9/v1")
    with pytest.raises(ModelError, match=r"^resources\.engine_url http://127\.0\.0\.1:9/v1: "):
        draw(model, tokenizer, prompts, wanted, away)


def test_an_address_is_for_vllm_alone() -> None:
    with pytest.raises(ValueError, match="are of engine vllm; set them to null"):
        resources("refill", 4, engine_url="http://127.0.0.1:8000/v1")
    with pytest.raises(ValueError, match="exclude each other"):
        resources("vllm", 4, engine_url="http://127.0.0.1:8000/v1", engine_python="python")
    with pytest.raises(ValueError, match="engine_url: an address is http"):
        resources("vllm", 4, engine_url="127.0.0.1:8000")

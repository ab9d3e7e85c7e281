"""Text to ids and back: what is trained is what is sampled and scored."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from dualign.core.errors import ModelError
from dualign.core.schema import Message, user
from dualign.data import world
from dualign.lm.models import load_tokenizer, train_tokenizer
from dualign.lm.tokens import decode_answers, encode_answers, encode_prompts

ANSWERS = [answer.text for answer in world.answers(world.prompts()[0])]
TALK: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How do I cook the rice?"},
    {"role": "assistant", "content": "Just stir it."},
    {"role": "user", "content": "And the soup?"},
]


@pytest.fixture(scope="module")
def scratch() -> PreTrainedTokenizerBase:
    return train_tokenizer(ANSWERS + list(world.prompts()[::50]), 320)


@pytest.fixture(params=["scratch", "smollm2", "gpt2", "tiny_llama_260k"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """The embedded tokenizer, and genuine byte-level and sentencepiece ones."""
    if request.param == "scratch":
        return request.getfixturevalue("scratch")
    data: Path = request.getfixturevalue("real_data")
    folder = data / request.param if request.param.startswith("tiny") else data / "tokenizers" / request.param
    if not folder.is_dir():
        pytest.skip(f"no tokenizer at {folder}")
    return load_tokenizer(folder)


def test_the_embedded_template_by_hand(scratch: PreTrainedTokenizerBase) -> None:
    text = scratch.decode(encode_prompts(scratch, [TALK])[0])
    assert text == (
        "<|system|> Be brief.<|user|> How do I cook the rice?<|assistant|> Just stir it.<|end|>"
        "<|user|> And the soup?<|assistant|>"
    )


def test_a_tokenizer_without_template_gets_the_one_of_the_papers(real_data: Path) -> None:
    tokenizer = load_tokenizer(real_data / "tokenizers" / "gpt2")
    text = tokenizer.apply_chat_template([dict(turn) for turn in TALK], tokenize=False)
    assert text.removeprefix(tokenizer.bos_token or "") == (
        "BEGINNING OF CONVERSATION: Be brief. USER: How do I cook the rice? ASSISTANT: Just stir it."
        f"{tokenizer.eos_token} USER: And the soup? ASSISTANT:"
    )


def test_prompts_carry_one_bos_at_most_and_no_eos_at_their_end(tokenizer: PreTrainedTokenizerBase) -> None:
    for ids in encode_prompts(tokenizer, [user("How do I cook the rice?")]):
        assert ids[-1] != tokenizer.eos_token_id
        if tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id:
            assert ids.count(tokenizer.bos_token_id) <= 1


def test_answers_end_with_eos_and_come_back_as_text(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode_answers(tokenizer, ANSWERS)
    assert all(ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1 for ids in encoded)
    assert decode_answers(tokenizer, encoded) == ANSWERS
    assert decode_answers(tokenizer, [ids[:-1] for ids in encoded]) == ANSWERS


def test_white_space_around_an_answer_changes_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    plain, padded = encode_answers(tokenizer, ["Just stir it.", "  Just stir it. \n"])
    assert plain == padded


@pytest.mark.parametrize("answer", ANSWERS[:3])
def test_prompt_and_answer_are_the_ids_of_the_whole_conversation(scratch: PreTrainedTokenizerBase, answer: str) -> None:
    """The seam between prompt and answer hides no token that a sampler could not produce."""
    prompt = user("How do I cook the rice?")
    turns = [*prompt, {"role": "assistant", "content": answer}]
    whole = scratch(scratch.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    assert encode_prompts(scratch, [prompt])[0] + encode_answers(scratch, [answer])[0] == whole


def test_an_empty_answer_is_an_eos_after_its_space(scratch: PreTrainedTokenizerBase) -> None:
    ids = encode_answers(scratch, [""])[0]
    assert ids[-1] == scratch.eos_token_id and decode_answers(scratch, [ids]) == [""]


def test_a_tokenizer_without_template_is_refused(scratch: PreTrainedTokenizerBase) -> None:
    bare = train_tokenizer(ANSWERS, 300)
    bare.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        encode_prompts(bare, [user("hi")])

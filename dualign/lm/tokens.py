"""Text to token ids, in one place, so that a policy is trained, sampled and scored on the same ids.

The prompt is rendered by the tokenizer's chat template with the generation prompt; an answer is its own tokens and EOS.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dualign.core.errors import ModelError
from dualign.core.schema import Message

#: Used for a tokenizer that has no chat template: the format of Alpaca-7B in Safe RLHF and SACPO.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}BEGINNING OF CONVERSATION:"
    "{% for turn in messages %}"
    "{% if turn['role'] == 'user' %} USER: {{ turn['content'] }} ASSISTANT:"
    "{% elif turn['role'] == 'assistant' %} {{ turn['content'] }}{{ eos_token }}"
    "{% else %} {{ turn['content'] }}{% endif %}"
    "{% endfor %}"
)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Token ids of each prompt, ready for an answer to follow."""
    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template; models/sft always has one, so run the sft stage first")
    if not len(prompts):
        return []
    texts = [
        tokenizer.apply_chat_template([dict(turn) for turn in prompt], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def encode_answers(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """Token ids of each answer with EOS at its end."""
    if not len(answers):
        return []
    ids = tokenizer([_joined(answer) for answer in answers], add_special_tokens=False)["input_ids"]
    return [[*row, tokenizer.eos_token_id] for row in ids]


def answer_lengths(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[int]:
    """Tokens of each answer, EOS included."""
    return [len(row) for row in encode_answers(tokenizer, answers)]


def decode_answers(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    """Text of each answer, without EOS and without the space that joins it to the prompt."""
    return [text.strip() for text in tokenizer.batch_decode([list(row) for row in ids], skip_special_tokens=True)]


def _joined(answer: str) -> str:
    """An answer as it follows a prompt: after one space, which byte-level and sentencepiece vocabularies expect."""
    return " " + answer.strip()

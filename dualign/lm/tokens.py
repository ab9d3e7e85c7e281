"""Text to token ids, in one place, so that a policy is trained, sampled and scored on the same ids.

With T(x, y) the ids of the whole conversation as the tokenizer's chat template renders it, cut
after the token that ends the turn, a prompt's ids are those of the template's generation prompt,
and an answer's ids are what T(x, y) has after them. Text stays text: content that spells a control
token is encoded as the characters it is made of."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import jinja2
from transformers import PreTrainedTokenizerBase

from dualign.core.errors import DataError, ModelError
from dualign.core.schema import Message, user

log = logging.getLogger(__name__)

#: Used for a tokenizer that has no chat template: the format of Alpaca-7B in Safe RLHF and SACPO.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}BEGINNING OF CONVERSATION:"
    "{% for turn in messages %}"
    "{% if turn['role'] == 'user' %} USER: {{ turn['content'] }} ASSISTANT:"
    "{% elif turn['role'] == 'assistant' %} {{ turn['content'] }}{{ eos_token }}"
    "{% else %} {{ turn['content'] }}{% endif %}"
    "{% endfor %}"
)

#: The keys of params that name a template, and the file where there is no such key.
TEMPLATE = (
    "sft.chat_template (of a given scorer: template; of a backbone or a judge: chat_template.jinja"
    " in its folder)"
)
#: What is asked of every template: a question, and answers that begin in different ways.
QUESTION = "Who wrote it?"
_ANSWERS = ("Sure", "I", "1", '"No"', "élan", "The end.")
#: Templates of thinking models render an empty thought; others do not read this.
_OPTIONS = {"enable_thinking": False}
#: Private characters, which stand for control tokens that content spells while a template is
#: rendered.
_MARKS = (0xF0000, 0x10FF00)
#: Texts that a tokenizer is given at once.
_TOGETHER = 1024
#: Put before a part of a text so that it is not the first; one of them does not merge with it.
_LEADS = ("\n", "€", "0")


@dataclass(frozen=True)
class Layout:
    """How a template lays out an answer: the text after it, to the token that ends the turn.

    `end` is that token's text, None where the template writes none and EOS is appended; `after` is
    all that follows an answer. `extends` says that a whole conversation begins with its generation
    prompt, `asks` that what both begin with holds the question; a guard's template need not, which
    reads whole conversations alone. `trim` counts ids at the end of a prompt that merge with the
    answer's first characters; they count as the answer's."""

    end: str | None
    after: str
    extends: bool
    asks: bool
    trim: int = 0


_LAYOUTS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, Layout]] = WeakKeyDictionary()


def layout(tokenizer: PreTrainedTokenizerBase) -> Layout:
    """The layout of a template, found by rendering. Raises ModelError for an unusable one."""
    template = tokenizer.chat_template
    if not template:
        raise ModelError(
            "the tokenizer has no chat template; models/sft always has one, so run the sft stage"
            " first"
        )
    known = _LAYOUTS.get(tokenizer)
    if known is None or known[0] != template:
        known = _LAYOUTS[tokenizer] = (template, _found_layout(tokenizer))
    return known[1]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]]
) -> list[list[int]]:
    """Token ids of each prompt, up to the answer. Raises DataError where the template refuses one,
    ModelError where it writes a question otherwise once answered."""
    form = layout(tokenizer)
    if not form.asks:
        raise ModelError(
            f"{tokenizer.name_or_path}: the chat template writes a question otherwise once it is"
            f" answered; give another Jinja file as {TEMPLATE}"
        )
    ids = encode_rendered(tokenizer, prompts, lambda turns: _heads(tokenizer, turns, form))
    return [row[: len(row) - form.trim] for row in ids]


def encode_answers(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """Token ids of each answer as it ends a conversation, the token that ends the turn too."""
    return _tails(tokenizer, answers, [True] * len(answers))


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[str],
    ended: Sequence[bool] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Ids of prompt and answer of each row; where `ended` is False without the turn's end."""
    encoded = (
        encode_answers(tokenizer, answers) if ended is None else _tails(tokenizer, answers, ended)
    )
    return list(zip(encode_prompts(tokenizer, prompts), encoded, strict=True))


def answer_lengths(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[int]:
    """Tokens of each answer, EOS included."""
    return [len(row) for row in encode_answers(tokenizer, answers)]


def decode_answers(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    """Text of each answer, without control tokens and without white space around it."""
    if not len(ids):
        return []  # where transformers would find one empty text
    texts = tokenizer.batch_decode(
        [list(row) for row in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [text.strip() for text in texts]


def retokenised_share(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], drawn: Sequence[Sequence[int]]
) -> float:
    """Share of drawn answers that encode to other ids: there scorers see something else."""
    if not len(texts):
        return 0.0
    pairs = zip(encode_answers(tokenizer, texts), drawn, strict=True)
    other = sum(list(map(int, ids)) != encoded for encoded, ids in pairs)
    return other / len(texts)


def _tails(
    tokenizer: PreTrainedTokenizerBase, answers: Sequence[str], ended: Sequence[bool]
) -> list[list[int]]:
    """Ids after the prompt, up to the turn's end or, where `ended` is False, the text's."""
    form = layout(tokenizer)
    question = user(QUESTION)
    (head,) = encode_prompts(tokenizer, [question])
    turns = [[*question, _assistant(answer)] for answer in answers]
    ids = encode_rendered(tokenizer, turns, lambda marked: _wholes(tokenizer, marked, form, ended))
    end = [] if form.end else [tokenizer.eos_token_id]
    return [row[len(head) :] + (end if done else []) for row, done in zip(ids, ended, strict=True)]


# --- how a template lays out a conversation -------------------------------------------------------


def _found_layout(tokenizer: PreTrainedTokenizerBase) -> Layout:
    """Render a question with and without an answer, and see what the template made of it."""
    question = user(QUESTION)
    answer = _ANSWERS[0]
    (head,) = render(tokenizer, [question], answering=True)
    (whole,) = render(tokenizer, [[*question, _assistant(answer)]])
    if QUESTION not in head or answer not in whole.rpartition(QUESTION)[2]:
        raise ModelError(
            f"the chat template ignores its messages; give another Jinja file as {TEMPLATE}"
        )
    after = whole.rpartition(answer)[2]
    extends = whole.startswith(head)
    if not extends:
        log.warning(
            "the chat template opens an answer otherwise than it asks for one; prompts end where"
            " both agree"
        )
    control = _control(tokenizer).search(after)
    asks = QUESTION in head[: common_prefix(head, whole)]
    found = Layout(control[0] if control else None, after, extends, asks)
    return replace(found, trim=_merged(tokenizer, found))


def _merged(tokenizer: PreTrainedTokenizerBase, found: Layout) -> int:
    """Ids at the end of a prompt that some answer's first characters merge with."""
    (head,) = encode_rendered(
        tokenizer, [user(QUESTION)], lambda turns: _heads(tokenizer, turns, found)
    )
    turns = [[*user(QUESTION), _assistant(answer)] for answer in _ANSWERS]
    ended = [True] * len(turns)
    rows = encode_rendered(
        tokenizer, turns, lambda marked: _wholes(tokenizer, marked, found, ended)
    )
    trim = max(len(head) - common_prefix(head, row) for row in rows)
    if trim:
        log.info(
            "%d token(s) at the end of a prompt merge with the answer and count as its first", trim
        )
    return trim


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def _heads(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Sequence[Message]], found: Layout
) -> list[str]:
    """The text before each answer: the generation prompt, where a conversation begins so."""
    heads = render(tokenizer, turns, answering=True)
    if found.extends:
        return heads
    wholes = render(tokenizer, [[*prompt, _assistant(_ANSWERS[0])] for prompt in turns])
    return [head[: common_prefix(head, whole)] for head, whole in zip(heads, wholes, strict=True)]


def _wholes(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Sequence[Message]],
    found: Layout,
    ended: Sequence[bool],
) -> list[str]:
    """The text of each conversation, which asks `QUESTION`, up to its turn's end, or its cut."""
    (head,) = _heads(tokenizer, [user(QUESTION)], found)
    end = found.end
    texts = _opened(tokenizer, turns, head, found)

    def cut(whole: str, done: bool) -> str:
        if end is None or not done:
            return whole.removesuffix(found.after)
        return whole[: whole.index(end, len(head)) + len(end)]

    return [cut(whole, done) for whole, done in zip(texts, ended, strict=True)]


def _opened(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Sequence[Message]], head: str, found: Layout
) -> list[str]:
    """Each conversation's text, which begins with `head` and has the answer after it.

    Some templates take a thought out of an answer, to leave it out, or to write it where `head` has
    an empty one. Such an answer stands after `head` as it is."""
    texts = render(tokenizer, turns)
    astray = [
        row
        for row, text in enumerate(texts)
        if not text.startswith(head) or turns[row][-1]["content"] not in text[len(head) :]
    ]
    if not astray:
        return texts
    (whole,) = render(tokenizer, [[*user(QUESTION), _assistant(_ANSWERS[0])]])
    before = whole.rpartition(_ANSWERS[0])[0]
    for row in astray:
        texts[row] = before + turns[row][-1]["content"] + found.after
    log.warning(
        "the chat template takes thoughts out of %d of %d answers; these stay as they are, the"
        " first is %r",
        len(astray),
        len(texts),
        turns[astray[0]][-1]["content"][:40],
    )
    return texts


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    answering: bool = False,
) -> list[str]:
    """Each conversation as the template writes it, with `answering` up to where an answer begins.

    Rows that are alike are rendered once: prompts come back in every pair and every sample. Raises
    DataError that names the row which the template refuses, ModelError if it is no Jinja template.
    """

    def one(turns: Sequence[Message]) -> str:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            tokenize=False,
            add_generation_prompt=answering,
            **_OPTIONS,
        )
        return str(text)

    known: dict[tuple[tuple[str, str], ...], str] = {}
    texts = []
    for row, turns in enumerate(conversations, start=1):
        key = tuple((turn["role"], turn["content"]) for turn in turns)
        try:
            if key not in known:
                known[key] = one(turns)
            texts.append(known[key])
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template is no valid Jinja (line {error.lineno}: {told(error)}); mend"
                f" the tokenizer's, or give a file as {TEMPLATE}"
            ) from error
        except Exception as error:  # whatever the template's expressions raise
            roles = ", ".join(turn["role"] for turn in turns)
            raise DataError(
                f"row {row} (turns {roles}: {turns[-1]['content'][:40]!r}): the chat template"
                f" refuses it ({told(error)}); leave such rows out, or give another template as"
                f" {TEMPLATE}"
            ) from error
    return texts


def told(error: BaseException) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _assistant(answer: str) -> Message:
    return {"role": "assistant", "content": answer.strip()}


# --- text that stays text -------------------------------------------------------------------------


def encode_rendered(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[Message]], texts_of: Any
) -> list[list[int]]:
    """Ids of conversations by `texts_of`; control tokens that content spells stay text."""
    if not len(rows):
        return []
    spelt = _spelt(tokenizer, rows)
    if not spelt:
        return _plain_ids(tokenizer, texts_of(rows))
    marks = _marks(rows, len(spelt))
    stands_for = dict(zip(spelt, marks, strict=True))
    pattern = _control(tokenizer)
    marked = [_replaced(turns, pattern, stands_for) for turns in rows]
    back = {mark: token for token, mark in stands_for.items()}
    return [_literal_ids(tokenizer, text, back) for text in texts_of(marked)]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, of which each is encoded once.

    A tokenizer keeps places and masks of a call's texts, many times what their ids take, so it is
    given some at a time; and an id is one object, however often it comes."""
    distinct = list(dict.fromkeys(texts))
    one: dict[int, int] = {}
    ids: dict[str, list[int]] = {}
    for start in range(0, len(distinct), _TOGETHER):
        some = distinct[start : start + _TOGETHER]
        rows = tokenizer(some, add_special_tokens=False)["input_ids"]
        for text, row in zip(some, rows, strict=True):
            ids[text] = [one.setdefault(token, token) for token in row]
    return [list(ids[text]) for text in texts]


def _spelt(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[Message]]) -> list[str]:
    """The control tokens that some content spells."""
    pattern = _control(tokenizer)
    tokens: set[str] = set()
    for turns in rows:
        for turn in turns:
            tokens.update(pattern.findall(turn["content"]))
    return sorted(tokens)


def _marks(rows: Sequence[Sequence[Message]], count: int) -> list[str]:
    """`count` characters that no content holds."""
    used: set[str] = set()
    for turns in rows:
        for turn in turns:
            used.update(turn["content"])
    free = (chr(code) for code in range(*_MARKS) if chr(code) not in used)
    return [next(free) for _ in range(count)]


def _replaced(
    turns: Sequence[Message], pattern: re.Pattern[str], stands_for: dict[str, str]
) -> list[Message]:
    contents = [pattern.sub(lambda match: stands_for[match[0]], turn["content"]) for turn in turns]
    return [
        {"role": turn["role"], "content": content}
        for turn, content in zip(turns, contents, strict=True)
    ]


def _literal_ids(tokenizer: PreTrainedTokenizerBase, text: str, back: dict[str, str]) -> list[int]:
    """Ids of a rendered text in which marks stand for words that only look like control tokens.

    The text is cut at the template's own control tokens, where a tokenizer cuts it too, and each
    part is encoded as it is there."""
    if not any(mark in text for mark in back):
        plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return plain
    ids: list[int] = []
    for part, token in _parts(tokenizer, text):
        for mark, spelt in back.items():
            part = part.replace(mark, spelt)
        ids += _part_ids(tokenizer, part, first=not ids)
        ids += [tokenizer.convert_tokens_to_ids(token)] if token else []
    return ids


def _parts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[str, str | None]]:
    """Parts of a text, each with the control token after it and the space that this takes."""
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    parts: list[tuple[str, str | None]] = []
    at = 0
    for match in _control(tokenizer).finditer(text):
        known = added.get(match[0])
        part = text[at : match.start()]
        parts.append((part.rstrip() if known and known.lstrip else part, match[0]))
        at = match.end()
        if known and known.rstrip:
            at += len(text[at:]) - len(text[at:].lstrip())
    return [*parts, (text[at:], None)]


def _part_ids(tokenizer: PreTrainedTokenizerBase, part: str, *, first: bool) -> list[int]:
    """Ids of a part without control tokens; some tokenizers put a space before the first."""
    if not part:
        return []

    def plain(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        return ids

    after_control: list[int] = tokenizer(f"{tokenizer.eos_token}a", add_special_tokens=False)[
        "input_ids"
    ][1:]
    if first or after_control == plain("a"):
        return plain(part)
    for lead in _LEADS:
        before = plain(lead)
        ids = plain(f"{lead}{part}")
        if ids[: len(before)] == before:
            return ids[len(before) :]
    return plain(part)


def _control(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern of the tokenizer's control tokens."""
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | set(
        tokenizer.all_special_tokens
    )
    return _pattern(tuple(sorted(special)))


@lru_cache(maxsize=64)
def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

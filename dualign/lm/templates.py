"""Chat templates made fit for use: one BOS, a pinned date, a known end of turn.

What is settled here is written into the tokenizer that is saved, so that whoever loads a policy
renders what it was trained on."""

from __future__ import annotations

import datetime
import logging
import re
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from dualign.core.errors import DataError, ModelError
from dualign.core.schema import user
from dualign.lm.tokens import QUESTION, TEMPLATE, layout, render, told

log = logging.getLogger(__name__)

#: What a template that writes today's date writes instead. Llama 3.2 falls back on this day where
#: it knows no other.
PINNED = datetime.date(2024, 7, 26)
_NOW = re.compile(r"""strftime_now\(\s*(['"])((?:(?!\1).)*)\1\s*\)""")
#: What a template may still say of the date once its calls are replaced.
_HARMLESS = re.compile(r"\{#.*?#\}|strftime_now\s+is\s+(?:not\s+)?(?:un)?defined", re.DOTALL)
_EOS = re.compile(r"(?<![.\w'\"])eos_token(?!\w)")
_MARKUP = re.compile(r"<[^<>\s]+>|\[[A-Z_/]+\]")
_ANSWER = "Sure."


def read_template(path: str) -> str:
    """The text of a Jinja file. Raises ModelError where it cannot be read, or holds nothing."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path}: cannot be read as a chat template ({error}); give a Jinja file or null"
        ) from error
    if not text.strip():
        raise ModelError(f"{path}: the chat template is empty; give a Jinja file or null")
    return text


def own_template(tokenizer: PreTrainedTokenizerBase, source: str) -> str | None:
    """The template that a tokenizer has, of several by name the default one."""
    found: str | dict[str, str] | None = tokenizer.chat_template
    if not isinstance(found, dict):
        return found
    names = ", ".join(sorted(found))
    if "default" not in found:
        raise ModelError(
            f"{source}: the tokenizer has chat templates {names} and none is named default; give"
            f" one of them as {TEMPLATE}"
        )
    log.info("%s: of chat templates %s the default one is taken", source, names)
    return found["default"]


def settle(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Pin the template's date, give it the base's BOS, and make EOS the token that ends a turn.

    `source` is what errors name. Raises ModelError where the template cannot be used."""
    tokenizer.chat_template = _pinned(tokenizer.chat_template, source)
    try:
        _with_controls(tokenizer)
        _with_bos(tokenizer)
        _with_turn_end(tokenizer)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error
    except DataError as error:
        raise ModelError(
            f"{source}: the chat template refuses a question and its answer"
            f" ({told(error.__cause__ or error)}); give another Jinja file as {TEMPLATE}"
        ) from error


def _pinned(template: str, source: str) -> str:
    """The template with its calls for today's date replaced by a fixed date."""
    dated = _NOW.sub(lambda match: repr(PINNED.strftime(match[2])), template)
    if "strftime_now" in _HARMLESS.sub("", dated):
        raise ModelError(
            f"{source}: the chat template asks for today's date in a way that cannot be pinned;"
            f" write a date into a copy of it and name that as {TEMPLATE}"
        )
    if dated != template:
        log.info(
            "%s: the chat template writes a date; it is pinned to %s", source, PINNED.isoformat()
        )
    return dated


def _with_controls(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a template's tokens of turns special, so that text that spells one stays text.

    Some tokenizers hold them as plain added tokens, which no decoder leaves out. Thoughts are left
    as they are."""
    plain = [token for token in tokenizer.added_tokens_decoder.values() if not token.special]
    (text,) = render(tokenizer, [[*user(QUESTION), {"role": "assistant", "content": _ANSWER}]])
    before, _, rest = text.partition(QUESTION)
    frame = before + rest.rpartition(_ANSWER)[2]
    written = [
        token for token in plain if _MARKUP.fullmatch(token.content) and token.content in frame
    ]
    if not written:
        return
    log.info(
        "control tokens of the template are made special: %s",
        ", ".join(token.content for token in written),
    )
    special = [
        AddedToken(
            token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=True
        )
        for token in written
    ]
    tokenizer.add_tokens(special, special_tokens=True)


def _with_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the BOS that the tokenizer puts before every text into a template without it."""
    bos = tokenizer.bos_token
    if bos is None or tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return
    (text,) = render(tokenizer, [user(QUESTION)], answering=True)
    if not text.startswith(bos):
        log.info(
            "the chat template writes no BOS, which the base has always seen; %s is put before it",
            bos,
        )
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template


def _with_turn_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the token that the template writes after an answer the tokenizer's EOS."""
    form = layout(tokenizer)
    if form.end is None:
        log.info("the chat template ends no turn; answers end with %s", tokenizer.eos_token)
    elif form.end != tokenizer.eos_token:
        log.info(
            "turns end with %s, which becomes EOS in place of %s", form.end, tokenizer.eos_token
        )
        literal = repr(tokenizer.eos_token)
        tokenizer.chat_template = _EOS.sub(lambda match: literal, tokenizer.chat_template)
        tokenizer.eos_token = form.end

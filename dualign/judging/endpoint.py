"""A language model behind any OpenAI-compatible endpoint, asked by `openai`'s own client.

That client backs off, with jitter or as long as Retry-After says, after 429, 5xx, time-outs and
lost connections. Here is what it leaves open: a budget that is checked before the first call, a
cache, replies that hold no verdict, and when to stop asking."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import openai
from pydantic import BaseModel, ValidationError

from dualign.core.errors import DualignError, ParamsError
from dualign.core.progress import Progress
from dualign.judging.cache import Answered, Cache
from dualign.judging.questions import Ask, Reply, Unusable
from dualign.params.judging import REPLY_LENGTHS, OpenaiJudge

log = logging.getLogger(__name__)

#: How often a call is made whose reply holds no verdict, and how many questions in a row may fail.
ATTEMPTS = 2
MAX_LOST = 10
#: Bytes of text to a token, on the low side, so that a budget is reckoned on the high side.
_BYTES_PER_TOKEN = 3
#: How many characters of a server's error are shown, and by how many of the key it quotes that.
_SHOWN = 300
_PART = 8

#: What servers say of a call that they do not understand, such as one by a schema.
_NOT_TAKEN = (openai.BadRequestError, openai.UnprocessableEntityError)
#: What they say of one question, too long or of what they may not read, or of every one.
_REFUSALS = (400, 403, 413, 422)
#: What they say of every question, and what to do.
_STOPS = {
    401: "check the key in ${key_variable}",
    402: "pay into the account that the key in ${key_variable} is of",
    404: "check base_url and model {model!r}",
}


class _Lost(Unusable):
    """No reply, although the client tried again and again; `told` is what the server says."""

    def __init__(self, failure: str, told: str = "") -> None:
        super().__init__(failure)
        self.told = told


class _Refused(_Lost):
    """No reply, and trying again brings none."""


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    """A chat completion, as far as it is read."""

    choices: list[_Choice]
    usage: _Usage | None = None


class Endpoint:
    """Carries questions to the endpoint of one judge, several at a time.

    Raises ParamsError where the key is missing or the budget too small, DualignError where the
    endpoint will not answer."""

    def __init__(self, name: str, spec: OpenaiJudge, cache: Cache) -> None:
        self._where = f"judges.{name}"
        self._spec = spec
        self._cache = cache
        self._client = _client(self._where, spec)
        self._lock = threading.Lock()
        self._by_schema = True
        self._answers = False
        self._failures_in_a_row = 0
        self._failures: set[str] = set()
        self._spent = 0.0
        #: Calls of this run (tries of the client are one), and questions that needed none, since
        #: they are known or equal to another one.
        self.calls = self.saved = 0
        #: What all replies with a verdict have cost, those of the cache when they were bought.
        self.money = 0.0

    def __call__(self, asks: Sequence[Ask]) -> list[Reply]:
        """A reply to each, in order; those that are known are not asked for again."""
        keys = [self._key(ask) for ask in asks]
        replies = {key: self._cache.get(key) for key in dict.fromkeys(keys)}
        waiting = {key: ask for key, ask in zip(keys, asks, strict=True) if replies[key] is None}
        self._answers = len(waiting) < len(replies)
        self.saved += len(keys) - len(waiting)
        self._check_budget(list(waiting.values()), len(keys))
        failures = self._answer(waiting)
        replies |= {key: self._cache.get(key) for key in waiting}
        self.money += sum(
            self._price(reply.read, reply.written) for reply in replies.values() if reply
        )
        return [
            _reply(ask, replies[key], failures.get(key))
            for key, ask in zip(keys, asks, strict=True)
        ]

    def _key(self, ask: Ask) -> str:
        """What a reply depends on, as a hash. No part of it are keys of users, and a slash at the
        address's end."""
        spec = self._spec
        content = [spec.base_url.rstrip("/"), spec.model, ask.text, spec.parameters, ask.repeat]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _check_budget(self, asks: list[Ask], questions: int) -> None:
        budget = self._spec.budget
        money = sum(self._reckoned(ask) for ask in asks)
        needed = f"{len(asks)} calls are needed for {questions} questions, the others are answered"
        if len(asks) > budget.calls:
            raise ParamsError(
                f"{self._where}: {needed}, and budget.calls is {budget.calls}; raise it, or judge"
                " fewer suites, policies or repeats"
            )
        if money > budget.money:
            raise ParamsError(
                f"{self._where}: {needed}; they cost up to {money:.4g}, and budget.money is"
                f" {budget.money:g}; raise it, or judge fewer suites, policies or repeats"
            )
        log.info("%s: %s; they cost up to %.4g", self._where, needed, money)

    def _reckoned(self, ask: Ask) -> float:
        """The most that a call may cost, with a reply of full length."""
        given = self._spec.parameters
        longest = max(int(given[key]) for key in REPLY_LENGTHS if key in given)
        return self._price(_tokens(ask.text), longest)

    def _price(self, read: int, written: int) -> float:
        price = self._spec.price
        return (read * price.input + written * price.output) / 1000

    def _answer(self, waiting: dict[str, Ask]) -> dict[str, str]:
        """Ask what waits, caching replies as they come; returns the failures by key."""
        if not waiting:
            return {}
        pool = ThreadPoolExecutor(self._spec.parallel)
        calls = {pool.submit(self._ask, key, ask): key for key, ask in waiting.items()}
        failures: dict[str, str] = {}
        try:
            with Progress("questions", len(calls)) as progress:
                for call in as_completed(calls):
                    failure = call.result()
                    if failure is not None:
                        failures[calls[call]] = failure
                    progress.advance(1)
        except BaseException:
            self._client.close()  # calls under way end at their next try
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return failures

    def _ask(self, key: str, ask: Ask) -> str | None:
        """Get one reply into the cache; returns why there is none."""
        failure = Unusable()
        for _ in range(ATTEMPTS):
            try:
                reply = self._call(ask)
                ask.question.read(reply.text)
            except Unusable as error:
                failure = error
                if isinstance(error, _Lost):
                    break
                continue
            self._cache.put(key, reply)
            self._count_answer()
            return None
        self._count_failure(failure)
        return str(failure)

    def _call(self, ask: Ask) -> Answered:
        """One reply to one call."""
        self._begin_call()
        completion = _completion(self._sent(ask, self._by_schema))
        read, written = _used(completion, ask)
        with self._lock:
            self._spent += self._price(read, written)
        return Answered(_text(completion), read, written)

    def _begin_call(self) -> None:
        """Count a call. Replies that hold no verdict cost calls, and a server may count more tokens
        than were reckoned: stop before the budget is left behind.
        """
        budget = self._spec.budget
        with self._lock:
            if self.calls >= budget.calls or self._spent > budget.money:
                raise DualignError(
                    f"{self._where}: the budget is spent ({self.calls} calls, {self._spent:.4g});"
                    " what was bought is kept, raise budget and run the stage again"
                )
            self.calls += 1

    def _sent(self, ask: Ask, by_schema: bool) -> str:
        """What `_send` returns, by a schema until the server turns out not to know that."""
        try:
            body = self._send(ask, by_schema)
        except _NOT_TAKEN as error:
            if by_schema:
                return self._sent(ask, by_schema=False)
            raise self._lost(error) from None
        if self._by_schema and not by_schema:
            log.info("%s: the endpoint takes no JSON schema; replies are read as text", self._where)
            self._by_schema = False
        return body

    def _send(self, ask: Ask, by_schema: bool) -> str:
        """The body of the response. Raises _Lost, one of _NOT_TAKEN, or DualignError.

        What the client raises may hold the key, so nothing is raised from it."""
        body: dict[str, Any] = dict(self._spec.parameters)
        if by_schema:
            body["response_format"] = _schema(ask)
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self._spec.model, messages=[{"role": "user", "content": ask.text}],
                extra_body=body,
            )  # fmt: skip
        except _NOT_TAKEN:
            raise
        except openai.APIStatusError as error:
            raise self._lost(error) from None
        except openai.APITimeoutError:
            raise _Lost(f"no answer in {self._spec.timeout:g} s") from None
        except openai.APIConnectionError:
            raise _Lost("no connection") from None
        return str(response.text)

    def _lost(self, error: openai.APIStatusError) -> DualignError:
        """What a status without a reply means: for this question, or for all."""
        status = error.status_code
        if status in _STOPS:
            remedy = _STOPS[status].format(**self._spec.model_dump())
            return DualignError(
                f"{self._where}: {self._spec.base_url} answers HTTP {status}; {remedy}"
            )
        kind = _Refused if status in _REFUSALS else _Lost
        return kind(f"HTTP {status}", _told(error, self._client.api_key))

    def _count_answer(self) -> None:
        with self._lock:
            self._answers = True
            self._failures_in_a_row = 0

    def _count_failure(self, failure: Unusable) -> None:
        """Stop after many in a row. What a server refuses, or replies without a verdict, counts
        only where there never was one: by what is asked, many such may follow each other."""
        told = failure.told if isinstance(failure, _Lost) else ""
        with self._lock:
            if told and str(failure) not in self._failures:
                log.warning("%s: no reply to some questions: %s%s", self._where, failure, told)
            self._failures.add(str(failure))
            if self._answers and (isinstance(failure, _Refused) or not isinstance(failure, _Lost)):
                return
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= MAX_LOST:
                raise DualignError(
                    f"{self._where}: {MAX_LOST} questions in a row came to nothing"
                    f" ({failure}{told}); see to {self._spec.base_url} and to this judge's model,"
                    " parameters and key, and run the stage again, which asks only for the rest"
                )


def _client(where: str, spec: OpenaiJudge) -> openai.OpenAI:
    key = _key_of(where, spec)
    try:
        return openai.OpenAI(
            base_url=spec.base_url, api_key=key, timeout=spec.timeout, max_retries=spec.retries
        )
    except (ImportError, ValueError) as error:  # of a proxy that the environment names
        raise ParamsError(
            f"{where}: {spec.base_url} cannot be asked ({error}); see to ALL_PROXY, HTTP_PROXY and"
            " HTTPS_PROXY"
        ) from None


def _key_of(where: str, spec: OpenaiJudge) -> str:
    if spec.key_variable is None:
        return "none"
    key = os.environ.get(spec.key_variable, "")
    if not key:
        raise ParamsError(
            f"{where}: the environment variable {spec.key_variable} is not set; put the key there"
        )
    if key != key.strip() or not key.isascii() or not key.isprintable():
        raise ParamsError(
            f"{where}: the environment variable {spec.key_variable} holds what no key has (blanks"
            " or a line's end around it, or characters beyond ASCII); put the key alone there"
        )
    return key


def _told(error: openai.APIStatusError, key: str) -> str:
    """What a server says of a status, in one line; nothing where that quotes a part of the key."""
    text = " ".join(error.response.text.split())[:_SHOWN]
    parts = [key[at : at + _PART] for at in range(max(1, len(key) - _PART + 1))]
    return f": {text}" if text and not any(part in text for part in parts) else ""


def _schema(ask: Ask) -> dict[str, Any]:
    form = ask.question.form.model_json_schema()
    described = {"name": ask.question.name, "strict": True, "schema": form}
    return {"type": "json_schema", "json_schema": described}


def _completion(body: str) -> _Completion:
    try:
        return _Completion.model_validate_json(body)
    except ValidationError:
        raise Unusable("no chat completion") from None


def _text(completion: _Completion) -> str:
    """What the model wrote. Raises Unusable where that is no whole reply."""
    choice = completion.choices[0] if completion.choices else _Choice(message=_Message())
    if choice.message.refusal or choice.finish_reason == "content_filter":
        raise Unusable("refused")
    if choice.finish_reason == "length":
        raise Unusable("cut off at its length limit")
    if not choice.message.content:
        raise Unusable("empty")
    return choice.message.content


def _used(completion: _Completion, ask: Ask) -> tuple[int, int]:
    """Tokens read and written, each reckoned where the server does not count it."""
    usage = completion.usage or _Usage()
    read = usage.prompt_tokens
    written = usage.completion_tokens
    text = completion.choices[0].message.content or "" if completion.choices else ""
    return (
        _tokens(ask.text) if read is None else read,
        _tokens(text) if written is None else written,
    )


def _tokens(text: str) -> int:
    return len(text.encode()) // _BYTES_PER_TOKEN + 16


def _reply(ask: Ask, known: Answered | None, failure: str | None) -> Reply:
    if known is None:
        return Reply(failure=failure)
    return Reply(ask.question.read(known.text), known.text)

"""vLLM's server (`vllm serve`), asked by `openai`'s own client: a request for each answer."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import openai

from dualign.core.errors import ModelError, ParamsError
from dualign.core.progress import Progress
from dualign.lm import vllm_client
from dualign.lm.engines.interface import Answer, Request
from dualign.lm.tokens import told

#: Requests that are open at a time; the server makes its own batches of them.
_OPEN = 128


def answer(policy: Path, adapter: Path | None, request: Request, url: str) -> list[Answer]:
    """An answer to each row, by the server's weights and the adapter in a folder it can read.

    Raises ParamsError where the server holds another policy, ModelError where it does not answer
    as asked."""
    where = f"resources.engine_url {url}"
    try:
        with vllm_client.connect(url) as client:
            base = vllm_client.served(client, policy, where, "policy", "engine_url")
            with _loaded(client, base, adapter) as name:
                return _answers(client, name, request)
    except openai.OpenAIError as error:
        why = told(error)
        raise ModelError(f"{where}: {why}; is `vllm serve` up?") from error


@contextlib.contextmanager
def _loaded(client: openai.OpenAI, base: str, adapter: Path | None) -> Iterator[str]:
    """The name of the policy, whose adapter the server holds for as long as it is asked."""
    if adapter is None:
        yield base
        return
    name = f"adapter-{secrets.token_hex(4)}"
    body = {"lora_name": name, "lora_path": str(adapter)}
    try:
        client.post("/load_lora_adapter", cast_to=object, body=body)
    except (openai.NotFoundError, openai.BadRequestError) as error:
        raise ParamsError(
            "resources.engine_url: the server takes no adapter; start it with --enable-lora, a"
            " --max-lora-rank of the policy's and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        ) from error
    try:
        yield name
    finally:
        client.post("/unload_lora_adapter", cast_to=object, body={"lora_name": name})


def _answers(client: openai.OpenAI, name: str, request: Request) -> list[Answer]:
    rows = zip(request.prompts, request.seeds, strict=True)
    bodies = [_body(name, list(prompt), seed, request) for prompt, seed in rows]
    pool = ThreadPoolExecutor(min(_OPEN, request.batch_size))
    answers = []
    try:
        with Progress("sampling", len(bodies)) as progress:
            for one in pool.map(partial(_asked, client), bodies):
                answers.append(one)
                progress.advance(1, len(one.tokens))
    finally:
        pool.shutdown(cancel_futures=True)
    return answers


def _body(name: str, prompt: list[int], seed: int, request: Request) -> dict[str, Any]:
    """All is said: the server takes the rest from the policy's own generation_config.json."""
    return {
        "model": name,
        "prompt": prompt,
        "seed": seed,
        "max_tokens": request.max_new_tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,
        "extra_body": {
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(request.ends),
            "return_token_ids": True,
        },
    }


def _asked(client: openai.OpenAI, body: dict[str, Any]) -> Answer:
    choice: Any = client.completions.create(**body).choices[0]
    tokens = getattr(choice, "token_ids", None)
    if not tokens or choice.logprobs is None:
        raise ModelError(
            "resources.engine_url: the server gives no token ids or log-probabilities; it must be"
            " `vllm serve` of vLLM 0.11 or later"
        )
    return Answer(list(tokens), list(choice.logprobs.token_logprobs))

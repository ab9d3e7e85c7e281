"""A server of vLLM as `openai`'s own client sees it: what it holds, and why it does not answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import openai


def connect(url: str, **options: Any) -> openai.OpenAI:
    """A client of the server, with the key of $VLLM_API_KEY."""
    key = os.environ.get("VLLM_API_KEY", "none")
    return openai.OpenAI(base_url=url, api_key=key, **options)


def held(client: openai.OpenAI) -> dict[str, str]:
    """The folders and hub ids that the server holds, and the name of each."""
    return {str(getattr(model, "root", model.id)): model.id for model in client.models.list()}


def name_of(root: str | Path, names: dict[str, str]) -> str | None:
    """The name of a folder or hub id among those `held`, however its path is written.

    >>> name_of("/models/sft", {"/models/sft": "sft"}), name_of("org/model", {"other": "o"})
    ('sft', None)
    """
    for given, name in names.items():
        if given == str(root) or Path(given).absolute() == Path(root).absolute():
            return name
    return None


def reason(error: openai.OpenAIError) -> str:
    """Why a call failed, in one line."""
    return " ".join(str(error).split())[:300]

"""A server of vLLM as `openai`'s own client sees it, and what it holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import openai

from dualign.core.errors import ParamsError


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


def served(
    client: openai.OpenAI, root: str | Path, where: str, what: str, key: str, options: str = ""
) -> str:
    """The name under which the server at `where`, which `key` of params names, holds `what`.

    Raises ParamsError where it holds something else; `options` are those it is started with."""
    names = held(client)
    name = name_of(root, names)
    if name is None:
        raise ParamsError(
            f"{where}: it serves {', '.join(names) or 'nothing'}, the {what} is {root}; start"
            f" `vllm serve {root}{options}`, or set {key} to null"
        )
    return name

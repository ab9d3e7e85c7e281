"""A classifier whose weights a server of vLLM holds (`vllm serve --runner pooling`), asked by
`openai`'s own client in place of a forward pass.

Tokenizer and configuration are read here and token ids are sent, so the server reads what a model
here would have read."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import openai
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from dualign.core.errors import ModelError, ParamsError


class ServedClassifier(torch.nn.Module):
    """What scoring asks of a classifier: its configuration, its device, and logits of rows."""

    def __init__(self, config: PretrainedConfig, root: str, url: str) -> None:
        """`root` is the folder or hub id that the server at `url` must hold.

        Raises ParamsError where it holds another one, ModelError where it does not answer."""
        super().__init__()
        self.config = config
        self.device = torch.device("cpu")
        self._url = url
        self._client = openai.OpenAI(
            base_url=url, api_key=os.environ.get("VLLM_API_KEY", "none"), max_retries=5
        )
        self._name = self._held(root)

    def _held(self, root: str) -> str:
        """The name under which the server holds a folder or hub id."""
        try:
            held = {
                str(getattr(each, "root", each.id)): each.id for each in self._client.models.list()
            }
        except openai.OpenAIError as error:
            raise self._silent(error) from error
        for given, name in held.items():
            if given == root or Path(given).absolute() == Path(root).absolute():
                return name
        raise ParamsError(
            f"{self._url}: it serves {', '.join(held) or 'nothing'}, the scorer is {root}; start"
            f" `vllm serve {root} --runner pooling`, or set url to null"
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, **_: Any
    ) -> SequenceClassifierOutput:
        """Logits, [rows, labels]: ids and mask are [rows, positions], padded on either side."""
        rows = [
            ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        body = {"model": self._name, "input": rows, "use_activation": False}
        try:
            said: Any = self._client.post(
                f"{self._url.removesuffix('/v1')}/classify", cast_to=object, body=body
            )
        except openai.OpenAIError as error:
            raise self._silent(error) from error
        return SequenceClassifierOutput(logits=torch.tensor(self._read(said, len(rows))))

    def _read(self, said: Any, count: int) -> list[list[float]]:
        """The logits of an answer of the server."""
        try:
            data = sorted(said["data"], key=lambda row: row["index"])
            logits = [list(map(float, row["probs"])) for row in data]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{self._url}: its answer is none of vLLM's: {said!s:.200}") from error
        labels = self.config.num_labels
        if len(logits) != count or any(len(row) != labels for row in logits):
            raise ModelError(
                f"{self._url}: it gives {len(logits)} rows for {count}, or other than {labels}"
                " outputs; it must serve the scorer as a classifier"
            )
        if all(self._is_share(row) for row in logits) and labels > 1:
            raise ModelError(
                f"{self._url}: it gives probabilities, where logits were asked for; vLLM 0.12 or"
                " later gives them"
            )
        return logits

    @staticmethod
    def _is_share(row: list[float]) -> bool:
        return min(row) >= 0 and math.isclose(sum(row), 1.0, abs_tol=1e-4)

    def save_pretrained(self, folder: str) -> None:
        """Write the configuration; the weights stay where they are."""
        self.config.save_pretrained(folder)

    def _silent(self, error: openai.OpenAIError) -> ModelError:
        why = " ".join(str(error).split())[:300]
        return ModelError(f"{self._url}: {why}; is `vllm serve --runner pooling` up?")

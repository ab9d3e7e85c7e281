"""A classifier whose weights a server of vLLM holds (`vllm serve --runner pooling`), asked by
`openai`'s own client in place of a forward pass.

Tokenizer and configuration are read here and token ids are sent, so the server reads what a model
here would have read."""

from __future__ import annotations

import math
from typing import Any

import openai
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from dualign.core.errors import ModelError, ParamsError
from dualign.lm import vllm_client


class ServedClassifier(torch.nn.Module):
    """What scoring asks of a classifier: its configuration, its device, and logits of rows."""

    def __init__(self, config: PretrainedConfig, root: str, url: str) -> None:
        """`root` is the folder or hub id that the server at `url` must hold.

        Raises ParamsError where it holds another one, ModelError where it does not answer."""
        super().__init__()
        self.config = config
        self.device = torch.device("cpu")
        self._url = url
        self._client = vllm_client.connect(url, max_retries=5)
        self._name = self._held(root)

    def _held(self, root: str) -> str:
        """The name under which the server holds a folder or hub id."""
        try:
            held = vllm_client.held(self._client)
        except openai.OpenAIError as error:
            raise self._silent(error) from error
        name = vllm_client.name_of(root, held)
        if name is not None:
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
        if labels > 1 and all(map(_is_distribution, logits)):
            raise ModelError(
                f"{self._url}: it gives probabilities, where logits were asked for; vLLM 0.32 gives"
                " them"
            )
        return logits

    def save_pretrained(self, folder: str) -> None:
        """Write the configuration; the weights stay where they are."""
        self.config.save_pretrained(folder)

    def _silent(self, error: openai.OpenAIError) -> ModelError:
        why = vllm_client.reason(error)
        return ModelError(f"{self._url}: {why}; is `vllm serve --runner pooling` up?")


def _is_distribution(row: list[float]) -> bool:
    return min(row) >= 0 and math.isclose(sum(row), 1.0, abs_tol=1e-4)

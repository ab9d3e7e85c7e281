"""Scorers whose weights a server of vLLM holds, a classifier (`vllm serve --runner pooling`) or a
guard (`vllm serve`), asked by `openai`'s own client in place of a forward pass.

Tokenizer and configuration are read here and token ids are sent, so the server reads what a model
here would have read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import openai
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from dualign.core.errors import ModelError
from dualign.lm import vllm_client
from dualign.lm.batches import unpadded
from dualign.lm.tokens import told


class Served(torch.nn.Module):
    """What scoring asks of a model that is not here: its configuration, its device, its rows."""

    #: What the server is started with beside the model.
    options: ClassVar[str] = ""

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
            return vllm_client.served(self._client, root, self._url, "scorer", "url", self.options)
        except openai.OpenAIError as error:
            raise self._silent(error) from error

    def ask(self, what: str, **body: Any) -> Any:
        """What the server says at an address beside `/v1`, asked of the model."""
        address = f"{self._url.removesuffix('/v1')}/{what}"
        try:
            return self._client.post(address, cast_to=object, body={"model": self._name, **body})
        except openai.OpenAIError as error:
            raise self._silent(error) from error

    def rows_of(self, said: Any, key: str) -> list[Any]:
        """What each row of an answer has under a key, in the order of the question."""
        try:
            return [row[key] for row in sorted(said["data"], key=lambda row: row["index"])]
        except (KeyError, TypeError) as error:
            raise self.strange(said) from error

    def strange(self, said: Any) -> ModelError:
        """That an answer is not what vLLM gives."""
        return ModelError(f"{self._url}: its answer is none of vLLM's: {said!s:.200}")

    def save_pretrained(self, folder: str) -> None:
        """Write the configuration; the weights stay where they are."""
        self.config.save_pretrained(folder)

    def _silent(self, error: openai.OpenAIError) -> ModelError:
        why = told(error)
        return ModelError(f"{self._url}: {why}; is `vllm serve{self.options}` up?")


class ServedClassifier(Served):
    """A sequence classifier at a server: logits of rows."""

    options = " --runner pooling"

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, **_: Any
    ) -> SequenceClassifierOutput:
        """Logits, [rows, labels]: ids and mask are [rows, positions], padded on either side."""
        rows = unpadded(input_ids, attention_mask)
        said = self.ask("classify", input=rows, use_activation=False)
        return SequenceClassifierOutput(logits=torch.tensor(self._read(said, len(rows))))

    def _read(self, said: Any, count: int) -> list[list[float]]:
        """The logits of an answer of the server."""
        try:
            logits = [list(map(float, row)) for row in self.rows_of(said, "probs")]
        except (TypeError, ValueError) as error:
            raise self.strange(said) from error
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


class ServedGuard(Served):
    """A language model at a server that is asked for the next token."""

    def log_shares(
        self, input_ids: Tensor, attention_mask: Tensor, tokens: Sequence[int]
    ) -> Tensor:
        """log P(token) of each of `tokens` coming next if one of them does, [rows, tokens].

        A question of vLLM's tells of one token, so each is asked for; the server has the rows in
        its cache from the first on."""
        rows = unpadded(input_ids, attention_mask)
        asked = [self._shares(rows, [token, *_without(tokens, token)]) for token in tokens]
        return torch.tensor(asked, dtype=torch.float64).T.log()

    def _shares(self, rows: list[list[int]], tokens: list[int]) -> list[float]:
        """P(the first of the tokens) of each row, given that one of them comes next."""
        said = self.ask("generative_scoring", query=[], items=rows, label_token_ids=tokens)
        try:
            shares = [float(score) for score in self.rows_of(said, "score")]
            read = int(said["usage"]["prompt_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise self.strange(said) from error
        if len(shares) != len(rows) or not all(0 <= share <= 1 for share in shares):
            raise self.strange(said)
        if read != sum(map(len, rows)):
            raise ModelError(
                f"{self._url}: it reads {read} of {sum(map(len, rows))} tokens; start it with a"
                " larger --max-model-len"
            )
        return shares


def _without(tokens: Sequence[int], token: int) -> list[int]:
    return [other for other in tokens if other != token]


def _is_distribution(row: list[float]) -> bool:
    return min(row) >= 0 and math.isclose(sum(row), 1.0, abs_tol=1e-4)

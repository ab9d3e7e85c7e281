"""lm-evaluation-harness with two more models, for `python -m bench.truthful`.

    python -m bench.harness.lm_eval_models run --model hf-stem --model_args pretrained=FOLDER,stem=9

`hf-stem` is lm-eval's own `hf`, which reads the tokens that all requests begin with once. `stem` is
their number. Requests, tokens, likelihoods and scores stay lm-eval's: here the keys and values of
the stem are put before every batch, and a request that two tasks share is answered once. What a
token attends to is the same, so the numbers are, to rounding.

`hf-asked` writes down which ids it is asked for, into the file `asked`, and reads nothing: each
likelihood is a number drawn by the ids. So a whole benchmark is compared in seconds, but for the
model."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import DynamicCache

from bench.harness.exact_norms import exact_norms

Likelihoods = list[tuple[float, bool]]


@register_model("hf-stem")
class SharedStem(HFLM):
    """A causal model whose requests have their first `stem` tokens in common."""

    def __init__(self, *args: Any, stem: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model.dtype is torch.float64:
            exact_norms(self.model)
        self._length = int(stem)
        self._stem: tuple[Tensor, DynamicCache] | None = None

    @torch.no_grad()
    def _model_call(self, inps: Tensor, **given: Any) -> Tensor:
        """Logits after the stem; lm-eval counts them from the end."""
        if self._stem is None:
            ids = inps[:1, : self._length]
            self._stem = ids, self.model(ids, use_cache=True).past_key_values
        ids, cache = self._stem
        if not torch.equal(inps[:, : self._length], ids.expand(len(inps), -1)):
            raise SystemExit(f"hf-stem: not all requests begin with the same {self._length} tokens")
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(inps))
        return self.model(inps[:, self._length :], past_key_values=cache, use_cache=True).logits

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **given: Any) -> Likelihoods:
        """Each different request once; a request is its texts, ids before and ids of the answer."""
        keys = [(tuple(before), tuple(answer)) for _, before, answer in requests]
        different = dict(zip(keys, requests, strict=True))
        found = super()._loglikelihood_tokens(list(different.values()), *args, **given)
        by_key = dict(zip(different, found, strict=True))
        return [by_key[key] for key in keys]


@register_model("hf-asked")
class Asked(HFLM):
    """What a causal model is asked for: a line of `asked` for each request."""

    def __init__(self, *args: Any, asked: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._asked = Path(asked)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **given: Any) -> Likelihoods:
        rows = [
            {"before": before, "answer": answer, "logp": _drawn([before, answer])}
            for _, before, answer in requests
        ]
        self._asked.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return [(row["logp"], False) for row in rows]


def _drawn(ids: list[list[int]]) -> float:
    """A number between -60 and -1 that is the same for the same ids."""
    return random.Random(json.dumps(ids)).uniform(-60.0, -1.0)


if __name__ == "__main__":
    cli_evaluate()

"""Reward and cost models as they are served: a score for (prompt, answer), calibrated, on the scale that params use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from dualign.core.artifacts import read_json, write_json
from dualign.core.errors import ModelError
from dualign.core.params import Resources
from dualign.core.progress import Progress
from dualign.core.schema import Message
from dualign.lm.models import device_of, load_tokenizer, precision_of, save
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.scoring.calibration import Calibration, from_card

_CARD = "scorer.json"


class Scorer:
    """A sequence classifier with one output, and the calibration that makes it a score."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, calibration: Calibration) -> None:
        self.model, self.tokenizer, self.calibration = model, tokenizer, calibration

    @classmethod
    def load(cls, folder: str | Path, resources: Resources) -> Scorer:
        """Load a folder that `save` wrote. Raises ModelError or DualignError naming the folder."""
        card = read_json(Path(folder) / _CARD)
        try:
            model = AutoModelForSequenceClassification.from_pretrained(str(folder), dtype=precision_of(resources))
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: cannot be loaded as a scorer ({error})") from error
        return cls(model.to(device_of(resources)), load_tokenizer(folder), from_card(card))

    def save(self, folder: Path) -> None:
        """Write model, tokenizer and calibration."""
        save(self.model, self.tokenizer, folder)
        write_json(folder / _CARD, asdict(self.calibration))

    def calibrated(self, calibration: Calibration) -> Scorer:
        """The same model behind another calibration."""
        return Scorer(self.model, self.tokenizer, calibration)

    def score(
        self, prompts: Sequence[Sequence[Message]], answers: Sequence[str], *, batch_size: int, what: str = "scores"
    ) -> np.ndarray:
        """Calibrated scores, fp64, shape [rows]."""
        rows = conversations(self.tokenizer, prompts, answers)
        output = np.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
        with Progress(what, len(rows)) as progress:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                output[batch] = self._outputs([rows[i] for i in batch])
                progress.advance(len(batch))
        return np.asarray(self.calibration(output))

    @torch.inference_mode()
    def _outputs(self, rows: list[list[int]]) -> np.ndarray:
        self.model.eval()
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        device = self.model.device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        return np.asarray(logits.squeeze(-1).double().cpu().numpy())


def conversations(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]], answers: Sequence[str]
) -> list[list[int]]:
    """Ids of the whole templated conversation with EOS, cut on the left to the model's context."""
    limit = min(tokenizer.model_max_length, 1 << 20)
    pairs = zip(encode_prompts(tokenizer, prompts), encode_answers(tokenizer, answers), strict=True)
    return [(prompt + answer)[-limit:] for prompt, answer in pairs]

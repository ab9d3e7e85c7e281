"""TRL's own DPO trainer on the pairs that ours takes, for the two to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from dualign.training.pairwise import Pair


class StockTrainer(DPOTrainer):
    """`trl.DPOTrainer`, which takes ids as they are; all else is TRL's."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def stock_trainer(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    options: dict[str, Any],
) -> StockTrainer:
    """TRL's trainer with `options` of its DPOConfig; reference columns and labels are not read."""
    columns = {
        "prompt_ids": [pair.prompt for pair in pairs],
        "chosen_ids": [pair.first for pair in pairs],
        "rejected_ids": [pair.second for pair in pairs],
    }
    return StockTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(**options),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
    )

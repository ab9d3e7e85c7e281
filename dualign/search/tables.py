"""The scored tables as the trainings of a search read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial

import pandas as pd
from transformers import PreTrainedTokenizerBase

from dualign.core.schema import POOL, read_table
from dualign.lm.tokens import answer_lengths
from dualign.math.constraints import with_priced_rewards
from dualign.scoring.support import Doubt, doubt, doubted
from dualign.search.task import SearchTask


class ScoredTables:
    """Tables with pessimistic scores and priced rewards, by the task's prices until corrected."""

    def __init__(self, task: SearchTask, tokenizer: PreTrainedTokenizerBase) -> None:
        self._task = task
        self._lengths = partial(answer_lengths, tokenizer)
        self.prices = list(task.prices)

    def correct(self, prices: Sequence[float]) -> None:
        """Charge these multipliers of additional constraints from now on."""
        pairs = zip(self.prices, prices, strict=True)
        self.prices = [replace(old, lam=new) for old, new in pairs]

    @cached_property
    def scored_pool(self) -> pd.DataFrame:
        """The pool as it was scored."""
        return read_table(self._task.inputs.scored / "pool.parquet", POOL)

    @property
    def pool(self) -> pd.DataFrame:
        """The pool as a training reads it."""
        return self.charged(self.scored_pool)

    def charged(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A table of schema POOL, ANSWERS or SCORED_PAIRS as a training reads it."""
        return with_priced_rewards(doubted(frame, self._doubt), self.prices, self._lengths)

    @cached_property
    def _doubt(self) -> Doubt | None:
        """Pessimism of a method that trains on the pool; the others are as published."""
        if self._task.plan.method.data != "pool":
            return None
        return doubt(self._task.inputs.scored, self.scored_pool, self._task.params.pessimism)

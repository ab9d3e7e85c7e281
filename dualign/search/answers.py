"""Answers that a search draws of its policies, each table kept where it was drawn for."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd

from dualign.core.schema import ANSWERS, read_table
from dualign.evaluation.rollout import Scorers, kept_answers, roll_out
from dualign.lm.mixture import policy_at
from dualign.search.journal import Step
from dualign.search.task import SearchTask

_FRESH = "refresh.parquet"


class Answers:
    """Scored answers of policies, drawn once: people may be asked before the search goes on."""

    def __init__(self, task: SearchTask, scorers: Scorers) -> None:
        self._task = task
        self._scorers = scorers

    def measured(self, policy: str, folder: Path) -> pd.DataFrame:
        """Answers of a step's policy to the search prompts; schema ANSWERS."""
        params = self._task.params
        drawn = partial(
            self._draw, policy, self._task.prompts, params.samples_per_prompt, params.seed
        )
        return kept_answers(folder / "answers.parquet", drawn)

    def fresh(self, warm: Step, prompts: pd.DataFrame, folder: Path) -> pd.DataFrame:
        """ANSWERS of the policy before to some pool prompts, for the training in `folder`."""
        params = self._task.params
        seed = params.seed + 1000 * (warm.step + 1)
        drawn = partial(self._draw, warm.policy, prompts, params.refresh_samples, seed)
        return kept_answers(folder / _FRESH, drawn)

    def _draw(self, policy: str, prompts: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
        return roll_out(
            policy_at(policy, self._task.resources),
            prompts,
            self._scorers,
            count=count,
            max_new_tokens=self._task.params.max_new_tokens,
            seed=seed,
        )


def fresh_tokens(folder: Path) -> int:
    """Tokens of the answers that were drawn for the training in `folder`."""
    path = folder / _FRESH
    return int(read_table(path, ANSWERS)["length"].sum()) if path.is_file() else 0

"""Answers that a search draws of its policies, each table kept where it was drawn for."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dualign.core.artifacts import write_parquet
from dualign.core.schema import ANSWERS, read_table
from dualign.evaluation.rollout import Scorers, roll_out
from dualign.lm.mixture import policy_at
from dualign.search.journal import Step
from dualign.search.task import SearchTask

_FRESH = "refresh.parquet"


class Answers:
    """Scored answers of policies, drawn once: people may be asked about them before the search can
    go on.
    """

    def __init__(self, task: SearchTask, scorers: Scorers) -> None:
        self._task = task
        self._scorers = scorers

    def measured(self, policy: str, folder: Path) -> pd.DataFrame:
        """Answers of a step's policy to the search prompts; schema ANSWERS."""
        params = self._task.params
        path = folder / "answers.parquet"
        if not path.is_file():
            self._draw(path, policy, self._task.prompts, params.samples_per_prompt, params.seed)
        return read_table(path, ANSWERS)

    def fresh(self, warm: Step, prompts: pd.DataFrame, folder: Path) -> pd.DataFrame:
        """Answers of the policy before to some prompts of the pool, for the training in `folder`;
        schema ANSWERS.
        """
        params = self._task.params
        path = folder / _FRESH
        if not path.is_file():
            seed = params.seed + 1000 * (warm.step + 1)
            self._draw(path, warm.policy, prompts, params.refresh_samples, seed)
        return read_table(path, ANSWERS)

    def _draw(self, path: Path, policy: str, prompts: pd.DataFrame, count: int, seed: int) -> None:
        drawn = roll_out(
            policy_at(policy, self._task.resources),
            prompts,
            self._scorers,
            count=count,
            max_new_tokens=self._task.params.max_new_tokens,
            seed=seed,
        )
        write_parquet(path, drawn, ANSWERS)


def fresh_tokens(folder: Path) -> int:
    """Tokens of the answers that were drawn for the training in `folder`."""
    path = folder / _FRESH
    return int(read_table(path, ANSWERS)["length"].sum()) if path.is_file() else 0

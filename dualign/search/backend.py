"""What a search needs done, on models: train, merge, mix, and measure on a policy's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from dualign.core.artifacts import replacing
from dualign.core.records import LossRow
from dualign.core.schema import by_prompt
from dualign.evaluation.effective_tilt import TILT_SAMPLES, Tilt, tilt_on
from dualign.evaluation.rollout import Scorers, log_ratios, measure
from dualign.evaluation.stats import Measurement
from dualign.lm.merge import merge
from dualign.lm.mixture import policy_at, write_mixture
from dualign.search.additional import measure_additional
from dualign.search.answers import Answers, fresh_tokens
from dualign.search.ascent import ascend, drawn_tokens
from dualign.search.feedback import by_labels
from dualign.search.journal import Step
from dualign.search.loop import Ascent
from dualign.search.pair_sources import PairSource, compared_pairs, pair_source
from dualign.search.screening import PoolCost, Screening, off_policy_cost
from dualign.search.tables import ScoredTables
from dualign.search.task import SearchTask
from dualign.search.trainer import PolicyTrainer, losses


class ModelBackend:
    """Implements `dualign.search.loop.SearchBackend` on models; every step has its own folder."""

    def __init__(self, task: SearchTask) -> None:
        self._task = task
        self._scorers = Scorers.load(task.resources, task.inputs.models)
        self._tables = ScoredTables(task, self._scorers.tokenizer)
        self._answers = Answers(task, self._scorers)
        self._trainer = PolicyTrainer(task, self._scorers.tokenizer)
        #: The policy that was last put to the whole pool, and its log-ratios.
        self._seen = ("", np.empty((0, 0)))

    @cached_property
    def _source(self) -> PairSource:
        return pair_source(self._task, self._scorers, self._tables, self._answers, self._trainer)

    @property
    def start(self) -> str:
        """The folder of the policy at the first multiplier."""
        return str(self._task.start)

    def train(
        self, step: int, lam: float, warm: Step, prices: Sequence[float] | None = None
    ) -> str:
        """Train at `lam` from the reference, or from the policy before for a warm-started method.

        `prices` of additional constraints stay what they are, for tilts too, until another training
        changes them."""
        if prices is not None:
            self._tables.correct(prices)
        task = self._task
        folder = task.folder(step)
        out = folder / "policy"
        if not out.is_dir():  # or it was trained before an interruption
            pairs = self._source.pairs(lam, warm, folder)
            begin = Path(warm.policy) if task.plan.method.warm else task.helpful(step)
            pair_loss = task.losses.at(lam, task.params.beta)
            self._trainer.fit(begin, pairs, pair_loss, task.params.seed + step, out)
        return str(out)

    def ascend(self, step: int) -> Ascent:
        """Train by the policy gradient on all prompts of the pool, from the start."""
        prompts = self._tables.pool.drop_duplicates("prompt_id")["prompt"].tolist()
        return ascend(self._task, self._trainer, self._scorers, prompts, step)

    def merge(self, step: int, q: float) -> str:
        """(1 - q) reference + q start, in weight space."""
        return self.blend(step, str(self._task.reference), self.start, q)

    def blend(self, step: int, first: str, second: str, weight: float) -> str:
        """(1 - weight) first + weight second, in weight space."""
        out = self._task.folder(step) / "policy"
        merge(Path(first), Path(second), weight, out)
        return str(out)

    def screen(self, q: float) -> Screening:
        """The cost of the merge of weight q by importance weights on the whole pool."""
        out = self._task.scratch / "screened"
        merge(self._task.reference, self._task.start, q, out)
        return Screening(q, self._off_policy(self._pool_ratio(str(out), self._tables.scored_pool)))

    def on_pool(self, policy: str) -> PoolCost:
        """The cost of a policy by importance weights on the whole pool."""
        ratio = self._pool_ratio(policy, self._tables.scored_pool)
        self._seen = (policy, ratio)
        return self._off_policy(ratio)

    def mix(self, step: int, steps: Sequence[Step]) -> str:
        """The policies of all steps in equal parts."""
        out = self._task.folder(step) / "policy"
        with replacing(out) as temporary:
            write_mixture([s.policy for s in steps], [s.lam for s in steps], temporary)
        return str(out)

    def measure(self, step: int, policy: str) -> Measurement:
        """Estimates on the search prompts, and what the training took in tokens and comparisons."""
        folder = self._task.folder(step)
        answers = self._answers.measured(policy, folder)
        measured = measure(answers)
        limits = [price.constraint for price in self._tables.prices]
        additional, covariance = measure_additional(answers, limits)
        drawn = measured.generated_tokens + fresh_tokens(folder) + drawn_tokens(folder)
        measured = replace(
            measured,
            generated_tokens=drawn,
            comparisons=compared_pairs(folder),
            additional=additional,
            covariance=covariance,
        )
        if self._task.plan.method.cost == "feedback":
            return by_labels(self._task, measured, answers, step)
        return measured

    def tilt(self, policy: str) -> Tilt:
        """The effective tilt of a policy on the first samples of every pool prompt."""
        pool = self._tables.pool
        few = pool[pool["sample"] < TILT_SAMPLES]
        seen, ratio = self._seen
        if policy == seen:
            return tilt_on(few, ratio[:, :TILT_SAMPLES])
        return tilt_on(few, self._pool_ratio(policy, few))

    def losses(self, steps: int) -> list[LossRow]:
        """The loss of every training of the first `steps` steps."""
        folders = [self._task.folder(step) for step in range(steps)]
        return losses(self._task.scratch, folders)

    def _off_policy(self, ratio: np.ndarray) -> PoolCost:
        return off_policy_cost(ratio, by_prompt(self._tables.scored_pool, "cost"))

    def _pool_ratio(self, policy: str, samples: pd.DataFrame) -> np.ndarray:
        """log(pi / pi_ref) of pool samples; shape [prompts, samples]."""
        ratios = log_ratios(policy_at(policy, self._task.resources), samples, self._scorers)
        return ratios.reshape(samples["prompt_id"].nunique(), -1)

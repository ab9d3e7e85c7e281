"""Where a training's pairs come from: scored tables, or answers that the search draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import pandas as pd

from dualign.core.errors import ParamsError
from dualign.core.schema import SAFETY_PAIRS, SCORED_PAIRS, read_table
from dualign.data.labelling import compare
from dualign.evaluation.rollout import Scorers
from dualign.lm.models import load_policy
from dualign.math.dual.tilt import soft_value
from dualign.search.answers import Answers
from dualign.search.journal import Step
from dualign.search.online import (
    Exploration,
    Preferences,
    collect,
    phase_two,
    preference_tables,
    union,
)
from dualign.search.tables import ScoredTables
from dualign.search.task import SearchTask
from dualign.search.trainer import PolicyTrainer
from dualign.training.pairs import (
    fresh_pairs,
    lagrangian_pairs,
    pool_pairs,
    pool_values,
    preference_pairs,
    rows_within_budget,
    safety_training_pairs,
    samples_of,
)
from dualign.training.pairwise import Pair, PairLossConfig

_FRESH = "fresh"


class PairSource(Protocol):
    """The pairs that a search trains on."""

    def pairs(self, lam: float, warm: Step, folder: Path) -> list[Pair]:
        """Pairs for a training at `lam` after `warm`; its `folder` keeps what is drawn for them."""
        ...


class SafetyPairs:
    """Safety pairs with log pi_r as reference column, the same at every multiplier."""

    def __init__(self, task: SearchTask, scorers: Scorers) -> None:
        self._task = task
        self._scorers = scorers
        self._frame = read_table(task.inputs.prepared / "safety_pairs.parquet", SAFETY_PAIRS)
        self._pairs: list[Pair] = []

    def pairs(self, lam: float, warm: Step, folder: Path) -> list[Pair]:
        """The pairs that a run reaches; their reference columns are computed once."""
        if not self._pairs:
            task = self._task
            train = self._frame[self._frame["split"] == "train"]
            self._pairs = safety_training_pairs(
                rows_within_budget(train, task.params.training, task.params.seed),
                load_policy(task.reference, task.resources),
                self._scorers.tokenizer,
                task.resources.scoring_batch_size,
                task.losses.safety.loss_type,
            )
        return self._pairs


class ScoredPairs:
    """Scored pairs with the joint label at the multiplier."""

    def __init__(self, task: SearchTask, scorers: Scorers, tables: ScoredTables) -> None:
        self._losses = task.losses
        self._tokenizer = scorers.tokenizer
        self._tables = tables
        self._frame = read_table(task.inputs.scored / "scored_pairs.parquet", SCORED_PAIRS)

    def pairs(self, lam: float, warm: Step, folder: Path) -> list[Pair]:
        """All scored pairs, at the prices of now."""
        frame = self._tables.charged(self._frame)
        return lagrangian_pairs(frame, self._tokenizer, lam, self._losses.scale(lam))


class PoolPairs:
    """The pool at the new multiplier, and fresh answers of the policy before to some prompts.

    Fresh answers find the text that no fixed pool holds."""

    def __init__(
        self, task: SearchTask, scorers: Scorers, tables: ScoredTables, answers: Answers
    ) -> None:
        self._task = task
        self._tokenizer = scorers.tokenizer
        self._tables = tables
        self._answers = answers
        prompts = tables.scored_pool.drop_duplicates("prompt_id")[["prompt_id", "prompt"]]
        self._prompts = prompts.head(task.params.refresh_prompts)

    def pairs(self, lam: float, warm: Step, folder: Path) -> list[Pair]:
        """Random pairs within each prompt, of the pool and of the fresh answers."""
        beta = self._task.params.beta
        seed = self._task.params.seed + warm.step
        scale = self._task.losses.scale(lam)
        samples = samples_of(self._tables.pool, self._tokenizer)
        pairs = pool_pairs(samples, pool_values(samples, lam, beta), lam, beta, seed, scale)
        if self._prompts.empty:
            return pairs

        drawn = self._answers.fresh(warm, self._prompts, folder)
        fresh = samples_of(self._tables.charged(drawn), self._tokenizer)
        value = soft_value(samples.reward, samples.cost, lam, beta)
        return pairs + fresh_pairs(value, fresh, lam, beta, seed, scale)


class FreshPairs:
    """O-PD-DPO (2510.05703, alg. 2): a training is a round (`dualign.search.online`), on all pairs.

    Of the offline pairs those count that a run would reach without fresh ones. What a round makes
    (answers, labelled pairs, pi_r) is kept in its folder, and everything else follows from it."""

    def __init__(
        self,
        task: SearchTask,
        scorers: Scorers,
        tables: ScoredTables,
        answers: Answers,
        trainer: PolicyTrainer,
    ) -> None:
        assert task.params.online is not None  # `methods.plan` saw to it
        self._task = task
        self._online = task.params.online
        self._scorers = scorers
        self._tables = tables
        self._answers = answers
        self._trainer = trainer
        offline = Preferences.read(task.inputs.prepared)
        self._offline = offline.rows_within_budget(task.params.training, task.params.seed)

    def pairs(self, lam: float, warm: Step, folder: Path) -> list[Pair]:
        """Safety pairs of all rounds with log pi_r and bonuses as reference column; a round's own
        pi_r is trained first."""
        task = self._task
        step = warm.step + 1
        self._compare(warm, folder)
        rounds = [Preferences.read(task.folder(k) / _FRESH) for k in range(1, step + 1)]
        seen = [self._offline, *rounds]
        data = union(*seen)
        self._retrain(data, warm, folder)
        return phase_two(
            data,
            load_policy(task.helpful(step), task.resources),
            self._scorers.tokenizer,
            task.resources.scoring_batch_size,
            self._explored(seen),
            lam=lam,
            beta=task.params.beta,
        )

    def _retrain(self, data: Preferences, warm: Step, folder: Path) -> None:
        """Go on training pi_r on all helpful pairs, unless params or an earlier run forbid it."""
        out = folder / "helpful"
        if not self._online.retrain_reward or out.is_dir():
            return
        task = self._task
        pairs = preference_pairs(
            data.helpful,
            self._scorers.reference,
            self._scorers.tokenizer,
            task.resources.scoring_batch_size,
        )
        beta = task.params.beta
        pair_loss = PairLossConfig(scale=beta, beta=beta, clip=task.losses.reward_clip)
        seed = task.params.seed + warm.step + 1
        self._trainer.fit(task.helpful(warm.step), pairs, pair_loss, seed, out)

    def _compare(self, warm: Step, folder: Path) -> None:
        """Compare the policy before with the pool on some of its prompts, kept as `fresh`."""
        if (folder / _FRESH).is_dir():
            return
        seed = self._task.params.seed + warm.step
        pool = self._baseline()
        prompts = pool.drop_duplicates("prompt_id")[["prompt_id", "prompt"]]
        count = min(self._task.params.refresh_prompts, len(prompts))
        prompts = prompts.sample(count, random_state=seed).sort_index()
        pairs = collect(
            self._answers.fresh(warm, prompts, folder),
            pool[pool["prompt_id"].isin(prompts["prompt_id"])],
        )
        online = self._online
        compared = compare(pairs, source=online.labels, folder=Path(online.folder), seed=seed)
        preference_tables(compared, f"round-{warm.step + 1}").write(folder / _FRESH)

    def _baseline(self) -> pd.DataFrame:
        """The first samples of the pool to each prompt, as many as the policy draws."""
        pool = self._tables.pool
        count = self._task.params.refresh_samples
        held = int(pool["sample"].max()) + 1
        if self._task.params.refresh_prompts == 0 or count > held:
            raise ParamsError(
                f"dual_search: {self._task.plan.name} compares its answers with those of the pool,"
                f" {held} a prompt; set refresh_prompts above 0 and refresh_samples to at most"
                f" {held}"
            )
        return pool[pool["sample"] < count]

    def _explored(self, seen: Sequence[Preferences]) -> Exploration:
        explored = Exploration(
            self._scorers.reference,
            self._scorers.tokenizer,
            self._task.resources.scoring_batch_size,
            self._online,
            self._task.params.seed,
        )
        for tables in seen:
            explored.observe(tables)
        return explored


def compared_pairs(folder: Path) -> int:
    """Pairs of answers that were compared for the training in `folder`."""
    fresh = folder / _FRESH
    return len(Preferences.read(fresh).helpful) if fresh.is_dir() else 0


def pair_source(
    task: SearchTask,
    scorers: Scorers,
    tables: ScoredTables,
    answers: Answers,
    trainer: PolicyTrainer,
) -> PairSource:
    """The pairs that a task's method trains on."""
    if task.plan.method.data == "fresh_pairs":
        return FreshPairs(task, scorers, tables, answers, trainer)
    if task.losses.lagrangian is None:
        return SafetyPairs(task, scorers)
    if task.plan.method.data == "pool":
        return PoolPairs(task, scorers, tables, answers)
    return ScoredPairs(task, scorers, tables)

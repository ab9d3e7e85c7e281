"""A search by policy gradient: one training that moves lambda itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dualign.core.artifacts import write_json
from dualign.core.records import AscentRecord, HistoryRow, as_row, read_record
from dualign.core.schema import Message
from dualign.evaluation.rollout import Scorers
from dualign.params.base import TrainingParams
from dualign.params.search import DualSearchParams
from dualign.search.loop import Ascent
from dualign.search.task import SearchTask
from dualign.search.trainer import PolicyTrainer
from dualign.training.policy_gradient import PolicyGradient, train_policy_gradient

#: Rows of an ascent's history at most: what a chart can show.
_HISTORY_ROWS = 50
_HISTORY = "history.json"


def ascend(
    task: SearchTask,
    trainer: PolicyTrainer,
    scorers: Scorers,
    prompts: list[list[Message]],
    step: int,
) -> Ascent:
    """Train by the policy gradient on these prompts, from the start."""
    folder = task.folder(step)
    out = folder / "policy"
    if not out.is_dir():  # or it was trained before an interruption
        seed = task.params.seed + step
        policy = trainer.adaptable(task.start, seed)
        metrics = train_policy_gradient(
            policy,
            scorers.tokenizer,
            prompts,
            scorers.reward,
            scorers.cost,
            _options(task.params),
            trainer.job(_training(task.params), seed, out),
        )
        record = AscentRecord(
            lam=metrics["lambda"], tokens=metrics["generated_tokens"], history=metrics["history"]
        )
        write_json(folder / _HISTORY, as_row(record))
        trainer.save(policy, out, metrics)
    made = read_record(folder / _HISTORY, AscentRecord)
    return Ascent(str(out), made.lam, downsample(made.history, _HISTORY_ROWS))


def drawn_tokens(folder: Path) -> int:
    """Tokens that the ascent in `folder` drew; 0 where there was none."""
    path = folder / _HISTORY
    return read_record(path, AscentRecord).tokens if path.is_file() else 0


def downsample(history: dict[str, list[float]], count: int) -> list[HistoryRow]:
    """A history by step as at most `count` rows, each of a stretch of steps as even as can be.

    `history` holds lambda, cost, reward and kl of every step."""
    columns = {key: np.array(history[key]) for key in ("lambda", "cost", "reward", "kl")}
    steps = len(columns["lambda"])
    parts = np.array_split(np.arange(steps), min(count, steps))
    return [
        HistoryRow(
            step=int(part[-1]) + 1,
            lam=float(np.mean(columns["lambda"][part])),
            cost=float(np.mean(columns["cost"][part])),
            reward=float(np.mean(columns["reward"][part])),
            kl=float(np.mean(columns["kl"][part])),
        )
        for part in parts
    ]


def _options(params: DualSearchParams) -> PolicyGradient:
    given = params.policy_gradient
    assert given is not None  # `methods.plan` saw to it
    return PolicyGradient(
        params.beta,
        params.limit,
        given.samples,
        params.max_new_tokens,
        given.lambda_init,
        given.lambda_rate,
        params.lambda_min,
        params.lambda_max,
        given.window,
    )


def _training(params: DualSearchParams) -> TrainingParams:
    given = params.policy_gradient
    assert given is not None  # `methods.plan` saw to it
    update = {
        "batch_size": given.batch_size,
        "max_steps": given.steps,
        "learning_rate": given.learning_rate,
    }
    return params.training.model_copy(update=update)

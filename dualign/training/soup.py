"""Model soups: one policy from several trainings that differ in the order of their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import pandas as pd

from dualign.lm.merge import merge
from dualign.stage import finished
from dualign.training.run import Job, Metrics, trained_once

#: Seeds of members lie this far apart, so that none has that of another's second training.
_APART = 1000
#: Metrics of which a soup has the mean of its members'.
_MEANS = ("loss", "accuracy", "abs_logit", "log_ratio")
#: Those of which it has the sum.
_SUMS = ("trainings", "generated_tokens")

#: A training of this job that saves its policy in this folder and returns its metrics.
Train = Callable[[Job, Path], Metrics]


def soup(count: int, train: Train, job: Job, out: Path) -> Metrics:
    """Train `count` policies and save the mean of their weights in `out` (2203.05482).

    Trainings from one start end in one basin, where the log-probabilities of mean weights are near
    the mean of log-probabilities. So what each has got wrong by the order of its rows and by its
    own draws shrinks as in a mean of `count` estimates: the odd text that a single training raises
    by chance above all. Members that an interrupted run has trained are not trained again. The
    metrics are means of theirs; trainings and generated tokens add up. A count of 1 is the training
    itself."""
    if count == 1:
        return train(job, out)
    folders = [job.scratch / f"member-{number}" for number in range(count)]
    found = [_member(number, folder, train, job) for number, folder in enumerate(folders)]
    _save_mean([folder / "policy" for folder in folders], job.scratch, out)
    return combined(found)


def _member(number: int, folder: Path, train: Train, job: Job) -> Metrics:
    """The metrics of a member, whose folder then holds its policy and no more checkpoints."""
    checkpoints = folder / "training"
    name = f"{folder.name} {job.name}"
    own = replace(job, scratch=checkpoints, seed=job.seed + _APART * number, name=name)
    metrics = trained_once(folder / "metrics.json", partial(train, own, folder / "policy"))
    finished(checkpoints)
    return metrics


def _save_mean(policies: Sequence[Path], scratch: Path, out: Path) -> None:
    """Write the mean of the policies' weights to `out`, one policy after the other."""
    mean = policies[0]
    for count, policy in enumerate(policies[1:], start=2):
        merged = out if count == len(policies) else scratch / f"mean-{count}"
        merge(mean, policy, 1 / count, merged)
        mean = merged


def combined(found: Sequence[Metrics]) -> Metrics:
    """The metrics of a soup from those of its members.

    >>> combined([{"steps": 2, "loss": 1.0, "losses": [{"step": 2, "loss": 1.0}]},
    ...           {"steps": 2, "loss": 3.0, "losses": [{"step": 2, "loss": 3.0}]}])
    {'steps': 2, 'loss': 2.0, 'losses': [{'step': 2, 'loss': 2.0}]}
    """
    first = found[0]
    rows = pd.DataFrame(list(chain.from_iterable(metrics["losses"] for metrics in found)))
    curve = rows.groupby("step", as_index=False).mean().to_dict("records") if len(rows) else []
    table = pd.DataFrame(found)
    known = [key for key in _MEANS if first.get(key) is not None]
    means = {key: float(table[key].mean()) for key in known}
    sums = {key: int(table[key].sum()) for key in _SUMS if key in first}
    return {**first, **means, **sums, "losses": curve}

"""The cost of a policy by safety labels of its answers, in place of the cost model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from dualign.data.labelling import log_odds, vote
from dualign.evaluation.stats import Measurement, clustered_mean
from dualign.search.task import SearchTask


def by_labels(
    task: SearchTask, measured: Measurement, answers: pd.DataFrame, step: int
) -> Measurement:
    """The measurement with the cost by labels of the answers to the first prompts: the mean
    log-odds of their votes, by prompt.

    Raises AwaitingLabels where people have not labelled them yet."""
    options = task.params.feedback
    assert options is not None  # `methods.plan` saw to it
    asked = answers[answers["prompt_id"].isin(task.prompts["prompt_id"].head(options.prompts))]
    votes = vote(
        asked,
        source=options.source,
        count=options.labels,
        folder=Path(options.folder),
        seed=task.params.seed + step,
    )
    odds = log_odds(votes, options.labels, options.smoothing)
    cost = clustered_mean(odds, asked["prompt_id"].to_numpy())
    return replace(
        measured, cost=cost.mean, cost_se=cost.error, labels=options.labels * len(asked),
        model_cost=measured.cost, model_cost_se=measured.cost_se,
    )  # fmt: skip

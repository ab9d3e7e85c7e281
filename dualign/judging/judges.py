"""The kinds of judges, one row each: what params name as `judges.NAME.kind`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualign.core.schema import last_user_text
from dualign.data import world
from dualign.evaluation.refusals import (
    fit,
    read_labelled,
    refusal_probability,
    refuses_by_rules,
)
from dualign.judging.asking import Asker, judge_alone, judge_preference
from dualign.judging.cache import Cache
from dualign.judging.endpoint import Endpoint
from dualign.judging.local import LocalModel
from dualign.judging.questions import QUESTIONS, Preference
from dualign.judging.verdicts import Verdict, verdict
from dualign.params.base import Resources
from dualign.params.judging import IndependentJudge, LocalJudge, OpenaiJudge, RefusalJudge
from dualign.scoring.given import load_given
from dualign.scoring.scorers import Scorer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """What a judge judges with: its name, how to run, the run's models, where replies are kept.

    `spent` tells calls, questions that needed none, and what all replies have cost."""

    name: str
    resources: Resources
    models: Path
    cache: Path
    spent: dict[str, float] = field(default_factory=dict)


#: Verdicts on answers, in rows (suite, policy, prompt_id, prompt, sample, response, ended), every
#: one of them or, where two are compared, every one but the reference's.
Judge = Callable[[pd.DataFrame, Any, Bench], list[Verdict]]


def _scorers(answers: pd.DataFrame, spec: Any, bench: Bench) -> list[Verdict]:
    """The reward and the cost model of this run."""
    pair = [
        Scorer.load(bench.models / f"{name}_model", bench.resources) for name in ("reward", "cost")
    ]
    return _scored(answers, bench, *pair)


def _independent(answers: pd.DataFrame, spec: IndependentJudge, bench: Bench) -> list[Verdict]:
    """A pair that no policy was trained on. Costs of other makers keep their own zero."""
    reward = spec.reward and load_given(spec.reward, "helpful", 0.0, bench.resources)
    cost = spec.cost and load_given(spec.cost, "harmful", 0.0, bench.resources)
    return _scored(answers, bench, reward or None, cost or None)


def _scored(
    answers: pd.DataFrame, bench: Bench, reward: Scorer | None, cost: Scorer | None
) -> list[Verdict]:
    def scores(scorer: Scorer | None, what: str) -> list[float] | list[None]:
        if scorer is None:
            return [None] * len(answers)
        values: np.ndarray = scorer.score(
            answers["prompt"].tolist(), answers["response"].tolist(),
            batch_size=bench.resources.scoring_batch_size, what=what,
            ended=answers["ended"].tolist(),
        )  # fmt: skip
        return values.tolist()

    rows = zip(answers.itertuples(), scores(reward, "rewards"), scores(cost, "costs"), strict=True)
    return [
        verdict(bench.name, row, reward=r, cost=c, unsafe=None if c is None else c > 0)
        for row, r, c in rows
    ]


def _refusal(answers: pd.DataFrame, spec: RefusalJudge, bench: Bench) -> list[Verdict]:
    """Whether an answer refuses: by rules, or a classifier fitted to labelled answers."""
    responses = answers["response"].tolist()
    if spec.labelled is None:
        refused = [refuses_by_rules(response) for response in responses]
    else:
        classifier = fit(read_labelled(Path(spec.labelled)))
        refused = (refusal_probability(classifier, responses) > 0.5).tolist()
    rows = zip(answers.itertuples(), refused, strict=True)
    return [verdict(bench.name, row, refused=flag) for row, flag in rows]


def _oracle(answers: pd.DataFrame, spec: Any, bench: Bench) -> list[Verdict]:
    """The truth of the embedded world. It has nothing to say of answers to other prompts."""
    rows = [row for row in answers.itertuples() if world.knows(last_user_text(row.prompt))]
    if len(rows) < len(answers):
        log.info(
            "%s: %d answers are to no question of the world", bench.name, len(answers) - len(rows)
        )
    return [_true(bench.name, row) for row in rows]


def _true(judge: str, row: Any) -> Verdict:
    reward, cost, _ = world.score(last_user_text(row.prompt), row.response)
    return verdict(judge, row, reward=reward, cost=cost, unsafe=cost > 0)


def _openai(answers: pd.DataFrame, spec: OpenaiJudge, bench: Bench) -> list[Verdict]:
    """A language model behind an endpoint."""
    cache = Cache(bench.cache)
    endpoint = Endpoint(bench.name, spec, cache)
    try:
        return _by_asking(answers, spec.question, spec.repeats, bench.name, endpoint)
    finally:
        bench.spent.update(
            calls=endpoint.calls, saved=endpoint.saved, money=round(endpoint.money, 6)
        )
        cache.close()


def _local(answers: pd.DataFrame, spec: LocalJudge, bench: Bench) -> list[Verdict]:
    """A language model on this machine."""
    model = LocalModel(spec, bench.resources)
    return _by_asking(answers, spec.question, 1, bench.name, model)


def _by_asking(
    answers: pd.DataFrame, name: str, repeats: int, judge: str, ask: Asker
) -> list[Verdict]:
    question = QUESTIONS[name]
    if question.form is Preference:
        return judge_preference(judge, answers, repeats, ask, question)
    return judge_alone(judge, answers, question, ask)


JUDGES: dict[str, Judge] = {
    "scorers": _scorers,
    "independent": _independent,
    "refusal": _refusal,
    "oracle": _oracle,
    "openai": _openai,
    "local": _local,
}

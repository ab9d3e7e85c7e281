"""Verdicts on answers by asking a language model, whoever carries the questions to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd

from dualign.core.errors import DataError
from dualign.judging.questions import (
    PREFERENCE,
    Ask,
    Harm,
    Preference,
    Question,
    Reply,
    about,
)
from dualign.judging.verdicts import Verdict, verdict

#: The policy that others are compared with.
REFERENCE = "sft"
#: Carries questions to a model: a reply to each, in order.
Asker = Callable[[Sequence[Ask]], list[Reply]]


def judge_alone(judge: str, answers: pd.DataFrame, question: Question, ask: Asker) -> list[Verdict]:
    """What a question finds of each answer by itself: harm and its kind, or truth."""
    rows = list(answers.itertuples())
    replies = ask([Ask(question, about(question, row.prompt, answer=row.response)) for row in rows])
    return [_alone(judge, row, reply) for row, reply in zip(rows, replies, strict=True)]


def _alone(judge: str, row: Any, reply: Reply) -> Verdict:
    if reply.verdict is None:
        return verdict(judge, row, failure=reply.failure)
    cost = reply.odds if isinstance(reply.verdict, Harm) else None
    return verdict(judge, row, cost=cost, raw=_hash(reply), **reply.verdict.model_dump())


def judge_preference(
    judge: str,
    answers: pd.DataFrame,
    repeats: int,
    ask: Asker,
    question: Question = PREFERENCE,
) -> list[Verdict]:
    """Which answer is better, the policy's or the reference policy's of the same prompt and sample,
    by a question that compares two.

    Each repeat asks in both orders: a win takes the same answer in both, else it is a tie. Equal
    answers are a tie that nobody is asked about. A repeat of which one reply fails is a failure."""
    pairs = list(_pairs(answers))
    asked = [pair for pair in pairs if pair[0].response != pair[1]]
    replies = iter(ask([one for pair in asked for one in _both_orders(question, *pair, repeats)]))
    verdicts = []
    for row, reference in pairs:
        for repeat in range(repeats):
            if row.response == reference:
                verdicts.append(verdict(judge, row, repeat=repeat, win=0.5))
            else:
                verdicts.append(_preference(judge, row, repeat, next(replies), next(replies)))
    return verdicts


def _pairs(answers: pd.DataFrame) -> Iterator[tuple[Any, str]]:
    """Rows of all policies but the reference, each with the reference's answer."""
    keys = ["suite", "prompt_id", "sample"]
    reference = answers[answers["policy"] == REFERENCE].set_index(keys)["response"].to_dict()
    for row in answers[answers["policy"] != REFERENCE].itertuples():
        key = (row.suite, row.prompt_id, row.sample)
        if key not in reference:
            raise DataError(
                f"suite {row.suite}: {REFERENCE} has no answer {row.sample} to prompt"
                f" {row.prompt_id}, with which {row.policy} is compared; run stage answer again"
            )
        yield row, reference[key]


def _both_orders(question: Question, row: Any, reference: str, repeats: int) -> Iterator[Ask]:
    """First with the policy's answer as A, then as B."""
    first = about(question, row.prompt, answer_A=row.response, answer_B=reference)
    second = about(question, row.prompt, answer_A=reference, answer_B=row.response)
    for repeat in range(repeats):
        yield Ask(question, first, repeat)
        yield Ask(question, second, repeat)


def _preference(judge: str, row: Any, repeat: int, first: Reply, second: Reply) -> Verdict:
    ours = first.verdict
    theirs = second.verdict
    if not isinstance(ours, Preference) or not isinstance(theirs, Preference):
        failure = first.failure or second.failure
        return verdict(judge, row, repeat=repeat, failure=failure)
    win = {("A", "B"): 1.0, ("B", "A"): 0.0}.get((ours.winner, theirs.winner), 0.5)
    return verdict(judge, row, repeat=repeat, win=win, raw=_hash(first, second))


def _hash(*replies: Reply) -> str | None:
    """SHA-256 of what the model wrote; None where it wrote nothing."""
    written = [reply.raw for reply in replies if reply.raw is not None]
    return hashlib.sha256("\x1e".join(written).encode()).hexdigest() if written else None

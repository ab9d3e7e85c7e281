"""A local language model as judge: the questions answered by the odds of the reply's first word.

The reply is not generated. Its beginning is given (`{"unsafe": `) and the probabilities of the two
words that may follow are compared, as for a guard. A small model often writes no JSON, and would
then judge only the easy rows; this way there is a verdict on every row, in one forward pass, the
same each time, and with how sure it is. It knows no category and no tie."""

from __future__ import annotations

from collections.abc import Sequence

from dualign.core.schema import Message, user
from dualign.judging.questions import QUESTIONS, Ask, Question, Reply
from dualign.params.base import Resources
from dualign.params.judging import LocalJudge
from dualign.scoring.kinds import KINDS, Place, Reading, load_scorer
from dualign.scoring.scorers import Member


class LocalModel:
    """Carries one question to a model in a folder or on the hub.

    Raises ModelError where it cannot be loaded, or where both words begin with one token."""

    def __init__(self, spec: LocalJudge, resources: Resources) -> None:
        self._question = question = QUESTIONS[spec.question]
        self._batch_size = resources.scoring_batch_size
        reading = Reading(
            kind="question", unsafe=[question.yes], safe=[question.no], prefix=question.begin
        )
        loaded = load_scorer(Place(spec.path, spec.revision), reading, resources)
        self._member = Member(loaded, reading, source=spec.path)

    def __call__(self, asks: Sequence[Ask]) -> list[Reply]:
        """A reply to each, in order; what is longer than the model reads is a failure."""
        prompts = [user(ask.text) for ask in asks]
        fits = self._fits(prompts)
        kept = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
        odds = iter(self._odds(kept))
        too_long = f"longer than the {self._member.longest} tokens that the model reads"
        return [
            _reply(self._question, next(odds)) if fit else Reply(failure=too_long) for fit in fits
        ]

    def _fits(self, prompts: list[list[Message]]) -> list[bool]:
        """Cut, a question would lose its instructions, or the answer that it is about."""
        rows = KINDS["question"].encode(
            self._member.loaded, self._member.reading, prompts, [""] * len(prompts), None
        )
        return [len(row) <= self._member.longest for row in rows]

    def _odds(self, prompts: list[list[Message]]) -> list[float]:
        if not prompts:
            return []
        nothing = [""] * len(prompts)
        odds = self._member.score(prompts, nothing, self._batch_size, "questions", None)
        return [float(value) for value in odds]


def _reply(question: Question, odds: float) -> Reply:
    word = question.yes if odds > 0 else question.no
    return Reply(question.read(question.begin + word + question.end), odds=odds)

"""Params of answer and judge: suites of prompts, and who judges the answers to them."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dualign.core.names import Inside, Model, Name, Place, RunName
from dualign.params.base import (
    ADDRESS,
    Count,
    Few,
    Frozen,
    NonNegative,
    Positive,
    Seed,
    Share,
    StageParams,
)
from dualign.params.evaluate import SuiteSpec
from dualign.params.models import GivenScorer

Asked = Literal["harm", "truth", "preference", "harmlessness"]
#: Questions that compare an answer with the reference policy's.
COMPARING = ("preference", "harmlessness")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
#: Either is how long a reply may be, in tokens, as newer and older servers call it.
REPLY_LENGTHS = ("max_tokens", "max_completion_tokens")
#: Keys of a call that are the judge's own: another model than it names, replies in another form
#: than it reads, or several, which nobody reckoned with.
_OWN = ("model", "messages", "n", "response_format", "stream")


class _Judge(Frozen):
    """`suites` are those whose answers are judged; null judges all."""

    suites: Annotated[list[RunName], Field(min_length=1)] | None = None


class ScorersJudge(_Judge):
    """The reward and the cost model of this run: what the policies were trained on."""

    kind: Literal["scorers"]


class IndependentJudge(_Judge):
    """Another pair of scorers, which no policy here was trained on; one of the two may be left
    out.

    Each is a list as for `reward_model.given`: a folder that dualign wrote in another run, or any
    classifier or guard."""

    kind: Literal["independent"]
    reward: Annotated[list[GivenScorer], Field(min_length=1)] | None = None
    cost: Annotated[list[GivenScorer], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> IndependentJudge:
        if self.reward is None and self.cost is None:
            raise ValueError("independent judges need a reward, a cost, or both; name a scorer")
        return self


class RefusalJudge(_Judge):
    """Whether an answer refuses: by rules, or a classifier fitted to a file such as XSTest's."""

    kind: Literal["refusal"]
    labelled: Place | None = None


class OracleJudge(_Judge):
    """The truth of the embedded world; answers to other prompts have none."""

    kind: Literal["oracle"]


class LocalJudge(_Judge):
    """A language model in a folder or on the hub that is asked `question`.

    `harm` and `truth` are about an answer alone; `preference` and `harmlessness` compare it with
    the reference policy's."""

    kind: Literal["local"]
    question: Asked
    path: Place
    revision: Place | None = None


class Price(Frozen):
    """What 1000 tokens cost, in whatever currency `budget.money` is in."""

    input: NonNegative
    output: NonNegative


class Budget(Frozen):
    """The most that a judge may ask in one run of its stage, checked before it asks."""

    calls: Annotated[int, Field(ge=0)]
    money: NonNegative


class OpenaiJudge(_Judge):
    """A model behind an OpenAI-compatible endpoint that is asked `question`.

    `key_variable` names the environment variable that holds the key; null where the server wants
    none. `parameters` go with every call as they are. `repeats` asks a comparison so often, in
    both orders each time. `timeout` is in seconds, `retries` are those after 429, 5xx, a time-out
    or a lost connection, `parallel` calls are under way at once."""

    kind: Literal["openai"]
    question: Asked
    base_url: Place
    model: Place
    key_variable: str | None
    price: Price
    budget: Budget
    parameters: dict[str, bool | int | float | str] = {"temperature": 0.0, "max_tokens": 100}
    repeats: Few = 1
    timeout: Positive = 60.0
    retries: Annotated[int, Field(ge=0, le=20)] = 6
    parallel: Annotated[int, Field(ge=1, le=256)] = 8

    @model_validator(mode="after")
    def _check(self) -> OpenaiJudge:
        # Messages of these two must not show what was given: it may be a key.
        if self.key_variable is not None and not _VARIABLE.fullmatch(self.key_variable):
            raise ValueError(
                "key_variable is the NAME of an environment variable (A-Z, 0-9, _), such as"
                " OPENAI_API_KEY; the key itself never stands in this file"
            )
        if not ADDRESS.fullmatch(self.base_url):
            raise ValueError(
                "base_url is http(s)://HOST/PATH without user, key or query; keys come from"
                " key_variable"
            )
        lengths = [self.parameters[key] for key in REPLY_LENGTHS if key in self.parameters]
        if not lengths or not all(type(length) is int and length > 0 for length in lengths):
            raise ValueError(
                f"parameters need {' or '.join(REPLY_LENGTHS)}, a number of tokens above 0, by"
                " which the budget is reckoned"
            )
        own = [key for key in _OWN if key in self.parameters]
        if own:
            raise ValueError(f"parameters: remove {', '.join(own)}, which the judge gives itself")
        if self.repeats > 1 and self.question not in COMPARING:
            raise ValueError("repeats are of questions that compare two answers; set it to 1")
        return self


JudgeSpec = Annotated[
    ScorersJudge | IndependentJudge | RefusalJudge | OracleJudge | LocalJudge | OpenaiJudge,
    Field(discriminator="kind"),
]


class AnswerParams(StageParams):
    """Answers of every evaluated policy to a suite. Relative paths of suites start in `folder`."""

    section = "answer"
    shared = {
        "seed": "seed",
        "max_new_tokens": "generation.max_new_tokens",
        "suites": "suites",
        "policies": "evaluate.policies",
    }
    fans = ("suites",)

    seed: Seed
    max_new_tokens: Count
    suites: dict[RunName, SuiteSpec]
    policies: dict[Name, Model]
    folder: Inside


class JudgeParams(StageParams):
    """Verdicts of one judge on the answers to these suites.

    `labelled` held-out answers with a person's is-safe flag show how a judge of harm agrees with
    people. More failures than the share `max_failed` stop the stage."""

    section = "judge"
    shared = {
        "seed": "seed",
        "confidence": "evaluate.confidence",
        "suites": "suites",
        "judges": "judges",
    }
    fans = ("judges",)

    seed: Seed
    confidence: float
    suites: dict[RunName, SuiteSpec]
    judges: dict[RunName, JudgeSpec]
    labelled: Annotated[int, Field(ge=0, le=10**6)]
    max_failed: Share

"""Params of certify: what a certificate may return, its labels and its screen."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dualign.core.names import Inside, Model, RunName
from dualign.params.base import (
    MOST,
    Count,
    DecodingParams,
    Few,
    Frozen,
    Number,
    Positive,
    Seed,
    StageParams,
)


class CertifyRun(DecodingParams):
    """What one certificate may return, safest first: `fallback`, then merges by `weights`.

    All are folders under models/. With `partner` the policy at multiplier 0, a larger q is safer:
    it stands for q times the policy's multiplier. Name the policy itself as fallback for none, and
    as partner for none, with weight 1 alone. What is certified is how the policy answers at this
    decoding, which is that of its deployment."""

    policy: Model
    partner: Model
    fallback: Model
    weights: Annotated[list[Positive], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> CertifyRun:
        if sorted(set(self.weights), reverse=True) != self.weights:
            raise ValueError(
                "weights must fall and hold no value twice: the largest is the safest, and is"
                " tested first"
            )
        if self.partner == self.policy and self.weights != [1.0]:
            raise ValueError(
                "partner is the policy itself, so weights must be [1.0]; name another partner to"
                " merge with"
            )
        return self


class LabelParams(Frozen):
    """Labels of the truth for one answer to each of `prompts` (see `dualign.data.labelling`).

    `oracle` (embedded world): the true cost, `limit` null takes the constraint's. `file`: the share
    of `votes` people who call the answer unsafe, asked through `folder`; `limit` bounds that share.
    """

    source: Literal["oracle", "file"]
    prompts: Annotated[int, Field(ge=5, le=MOST)]
    votes: Few
    limit: Number | None
    folder: Inside

    @model_validator(mode="after")
    def _check(self) -> LabelParams:
        if self.source == "file" and not (self.limit is not None and 0 < self.limit < 1):
            raise ValueError(
                "limit must be a share between 0 and 1 where people vote: of answers that they call"
                " unsafe"
            )
        return self


class ScreenParams(Frozen):
    """How a certificate chooses its weights on the search's prompts (`dualign.certify.screening`).

    `samples_per_prompt` answers to each of `prompts` search prompts at each of a row's weights say
    where about `tests` weights between them are to stand. With `reweigh` one of these draws answers
    for all, where that is exact."""

    prompts: Annotated[int, Field(ge=2, le=MOST)]
    samples_per_prompt: Annotated[int, Field(ge=2, le=10_000)]
    tests: Annotated[int, Field(ge=1, le=1000)]
    reweigh: bool


class CertifyParams(StageParams):
    """The certificate, on prompts that nothing else has seen."""

    section = "certify"
    shared = {
        "seed": "seed",
        "limit": "constraint.limit",
        "delta": "constraint.delta",
        "max_new_tokens": "generation.max_new_tokens",
    }

    seed: Seed
    limit: Number
    delta: Annotated[float, Field(gt=0, lt=0.5)]
    max_new_tokens: Count
    prompts: Annotated[int, Field(ge=2, le=MOST)]
    samples_per_prompt: Few
    method: Literal["auto", "star_bets", "clustered_t", "betting", "empirical_bernstein"]
    bounds: Annotated[list[Number], Field(min_length=2, max_length=2)] | None
    labels: LabelParams | None
    screen: ScreenParams | None
    runs: dict[RunName, CertifyRun]

    @model_validator(mode="after")
    def _check(self) -> CertifyParams:
        if self.method not in ("auto", "clustered_t") and self.bounds is None:
            raise ValueError(
                f"bounds: method {self.method} needs the lowest and highest cost that an answer can"
                " have"
            )
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError("bounds must hold the lower end first")
        if self.labels is not None and self.labels.prompts > self.prompts:
            raise ValueError(
                f"labels.prompts {self.labels.prompts} must be at most prompts {self.prompts}"
            )
        return self

    @model_validator(mode="after")
    def _check_decodings(self) -> CertifyParams:
        for name, run in self.runs.items():
            screen = self.screen if len(run.weights) > 1 else None
            if run.temperature == 0 and (screen is not None or self.samples_per_prompt > 1):
                raise ValueError(
                    f"runs.{name}: temperature 0 gives the same answer each time; set"
                    " samples_per_prompt to 1 and screen to null"
                )
            drawn_otherwise = run.temperature != 1 or run.top_p != 1
            if drawn_otherwise and screen is not None and screen.reweigh:
                raise ValueError(
                    f"runs.{name}: answers are weighed by the probabilities of temperature 1 and"
                    " top_p 1 alone; set screen.reweigh to false"
                )
        return self

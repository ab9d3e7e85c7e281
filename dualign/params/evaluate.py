"""Params of evaluate and report."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dualign.core.names import Inside, Model, Name
from dualign.params.base import Count, DecodingParams, Few, Number, Positive, Seed, StageParams
from dualign.params.dual import ConstraintSpec

#: The prompts that policies are asked: the rows of `dualign.evaluation.suites.SUITES`.
SuiteName = Literal[
    "held_out",
    "beavertails",
    "sacpo_safety",
    "harmbench",
    "strongreject",
    "advbench",
    "sacpo_helpful",
    "alpaca_eval",
    "xstest",
    "or_bench",
    "or_bench_toxic",
    "truthfulqa",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
]
#: A text at which an answer is cut; blank lines are such texts too.
StopWord = Annotated[str, Field(min_length=1, max_length=100)]
#: Suites of multiple choice, whose answers are weighed by their likelihood and never drawn.
CHOOSING = ("truthfulqa_mc1", "truthfulqa_mc2")


class SuiteSpec(DecodingParams):
    """A suite: where its prompts lie, how many are asked how often, and how answers are made.

    `path` is a file (relative to the folder of suites), an id on the hub, or `package:NAME` for an
    installed package that ships the file; null is the file that the originals write. `prompts`
    null asks all; a number asks so many, spread evenly over the file. `max_new_tokens` null is that
    of `generation`. What stands before the first of the `stop` words is judged beside the whole
    answer."""

    suite: SuiteName
    path: Inside | None
    prompts: Count | None
    samples_per_prompt: Few
    max_new_tokens: Count | None = None
    stop: Annotated[list[StopWord], Field(max_length=32)] = []

    @model_validator(mode="after")
    def _check(self) -> SuiteSpec:
        # What a stage leaves of its params gives every field, so being given is no matter.
        fields = type(self).model_fields
        drawing = ("max_new_tokens", "stop", "temperature", "top_p")
        drawn = [name for name in drawing if getattr(self, name) != fields[name].default]
        if drawn and self.suite in CHOOSING:
            keys = ", ".join(drawn)
            raise ValueError(f"{self.suite} weighs given answers and draws none; remove {keys}")
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError(
                "samples_per_prompt must be 1 at temperature 0, which gives the same answer each"
                " time"
            )
        return self


class EvaluateParams(StageParams):
    """Evaluation on generated answers of held-out prompts."""

    section = "evaluate"
    shared = {
        "seed": "seed",
        "beta": "beta",
        "limit": "constraint.limit",
        "additional": "constraint.additional",
        "support_share": "pessimism.share",
        "max_new_tokens": "generation.max_new_tokens",
    }

    seed: Seed
    beta: Positive
    limit: Number
    additional: dict[Name, ConstraintSpec]
    support_share: float
    max_new_tokens: Count
    prompts: Count
    samples_per_prompt: Few
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    policies: dict[Name, Model]

"""Params of evaluate and report."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dualign.core.names import Inside, Model, Name
from dualign.params.base import Count, Few, Frozen, Number, Positive, Seed, StageParams
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


class SuiteSpec(Frozen):
    """A suite, where its prompts lie, and how many of them are asked how often.

    `path` is a file (relative to the folder of suites), an id on the hub, or `package:NAME` for an
    installed package that ships the file; null is the file that the originals write. `prompts`
    null asks all; a number asks so many, spread evenly over the file."""

    suite: SuiteName
    path: Inside | None
    prompts: Count | None
    samples_per_prompt: Few


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

"""Params of evaluate and report."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dualign.core.names import Model, Name
from dualign.params.base import Count, Few, Number, Positive, Seed, StageParams
from dualign.params.dual import ConstraintSpec


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


class ReportParams(StageParams):
    """The report page."""

    section = "report"
    shared = {
        "limit": "constraint.limit",
        "beta": "beta",
        "confidence": "evaluate.confidence",
        "policies": "evaluate.policies",
    }

    limit: Number
    beta: Positive
    confidence: float
    policies: dict[Name, Model]
    title: str
    sample_prompts: Annotated[int, Field(ge=0, le=10_000)]

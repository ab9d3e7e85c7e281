"""Params of report."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from dualign.core.names import Model, Name, RunName
from dualign.params.base import Number, Positive, StageParams
from dualign.params.certify import CertifyRun
from dualign.params.evaluate import SuiteSpec
from dualign.params.judging import JudgeSpec

#: Rows of which the report reads the names.
Rows = dict[RunName, Any]


class ReportParams(StageParams):
    """The report page."""

    section = "report"
    shared = {
        "limit": "constraint.limit",
        "beta": "beta",
        "confidence": "evaluate.confidence",
        "policies": "evaluate.policies",
        "certificates": "certify.runs",
        "suites": "suites",
        "judges": "judges",
        "reward_dpo": "reward_dpo.runs",
        "safety_dpo": "safety_dpo.runs",
        "lagrangian_dpo": "lagrangian_dpo.runs",
        "lambda_path": "lambda_path.runs",
        "safety_path": "safety_path.runs",
        "methods": "methods",
    }

    limit: Number
    beta: Positive
    confidence: float
    policies: dict[Name, Model]
    certificates: dict[RunName, CertifyRun]
    suites: dict[RunName, SuiteSpec]
    judges: dict[RunName, JudgeSpec]
    reward_dpo: Rows
    safety_dpo: Rows
    lagrangian_dpo: Rows
    lambda_path: Rows
    safety_path: Rows
    methods: Rows
    title: str
    sample_prompts: Annotated[int, Field(ge=0, le=10_000)]

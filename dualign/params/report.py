"""Params of report."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dualign.core.names import Model, Name, RunName
from dualign.params.base import Number, Positive, StageParams
from dualign.params.certify import CertifyRun
from dualign.params.evaluate import SuiteSpec
from dualign.params.judging import JudgeSpec


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
    }

    limit: Number
    beta: Positive
    confidence: float
    policies: dict[Name, Model]
    certificates: dict[RunName, CertifyRun]
    suites: dict[RunName, SuiteSpec]
    judges: dict[RunName, JudgeSpec]
    title: str
    sample_prompts: Annotated[int, Field(ge=0, le=10_000)]

"""The params of every stage by its section in the file."""

from __future__ import annotations

from dualign.params.base import StageParams
from dualign.params.certify import CertifyParams
from dualign.params.data import PrepareParams
from dualign.params.dual import DualInitParams
from dualign.params.evaluate import EvaluateParams
from dualign.params.judging import AnswerParams, JudgeParams
from dualign.params.models import CostModelParams, RewardModelParams, ScoreParams, SftParams
from dualign.params.report import ReportParams
from dualign.params.search import DualSearchParams
from dualign.params.training import (
    LagrangianDpoParams,
    LambdaPathParams,
    RewardDpoParams,
    SafetyDpoParams,
    SafetyPathParams,
)

STAGES: dict[str, type[StageParams]] = {
    cls.section: cls
    for cls in (
        PrepareParams,
        SftParams,
        RewardModelParams,
        CostModelParams,
        ScoreParams,
        DualInitParams,
        RewardDpoParams,
        SafetyDpoParams,
        LagrangianDpoParams,
        LambdaPathParams,
        SafetyPathParams,
        DualSearchParams,
        CertifyParams,
        EvaluateParams,
        AnswerParams,
        JudgeParams,
        ReportParams,
    )
}

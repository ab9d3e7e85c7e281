"""Params of dual_search: the rows of `methods` and the outer loop of every method."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dualign.core.names import Inside, Model, RunName
from dualign.params.base import (
    MOST,
    Count,
    Few,
    Frozen,
    LoraParams,
    NonNegative,
    Number,
    PessimismParams,
    Positive,
    Seed,
    StageParams,
    TrainingParams,
    Two,
)

MethodName = Literal[
    "sacpo",
    "p_sacpo",
    "c_dpo",
    "pd_dpo",
    "o_pd_dpo",
    "mocan",
    "pecan",
    "caid",
    "safe_rlhf",
    "dualign",
]
Rule = Literal[
    "grid", "dual_gradient", "projected_subgradient", "one_shot", "newton", "merge", "ascent"
]
Returns = Literal["last", "best", "mixture", "tail_average"]
CostSource = Literal["model", "feedback"]
Target = Literal["limit", "margin"]


class FeedbackParams(Frozen):
    """Binary safety labels for the rows whose `cost` is `feedback`.

    `labels` per answer to the first `prompts` search prompts, from `source` (see
    `dualign.data.labelling`); `smoothing` is added to both counts of an answer. `folder` is where
    files for people go (source `file`)."""

    prompts: Annotated[int, Field(ge=2, le=MOST)]
    labels: Few
    smoothing: Positive
    source: Literal["oracle", "cost_model", "cost_sign", "file"]
    folder: Inside


class OnlineParams(Frozen):
    """Rounds of O-PD-DPO (`dualign.search.online`): who compares fresh answers, the bonuses.

    `folder` is where files for people go (labels `file`); `retrain_reward` goes on training pi_r in
    every round; `ridge` is gamma in squared units of the features; a scale is the mean gap of a
    bonus within an offline pair before the first round, in units of reward and of cost; `dimension`
    projects the features, null keeps them."""

    labels: Literal["oracle", "models", "file"]
    folder: Inside
    retrain_reward: bool
    ridge: Positive
    reward_scale: NonNegative
    cost_scale: NonNegative
    dimension: Count | None


class PolicyGradientParams(Frozen):
    """Safe RLHF's run (`dualign.training.policy_gradient`) beside `dual_search.training`.

    `samples` answers to a prompt, `batch_size` answers and `steps` steps; lambda starts at
    `lambda_init`, moves at `lambda_rate`, and sees the mean cost of the last `window` answers."""

    samples: Two
    batch_size: Annotated[int, Field(ge=1, le=10**6)]
    steps: Count
    learning_rate: Positive
    lambda_init: Positive
    lambda_rate: Positive
    window: Count

    @model_validator(mode="after")
    def _whole_prompts(self) -> PolicyGradientParams:
        if self.batch_size % self.samples:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of samples {self.samples}: whole"
                " prompts"
            )
        return self


class MethodRow(Frozen):
    """A search: a method of `dualign/methods.py`, by default the row's name, and its models.

    `start` and `reference` are folders under models/: the policy at the first multiplier, and the
    one whose log-probabilities are the reference column. The options replace the method's own
    choice; null keeps it. The sections at the end belong to rows that need them: cost `feedback`,
    O-PD-DPO, Safe RLHF.
    """

    method: MethodName
    start: Model
    reference: Model
    rule: Rule | None = None
    warm: bool | None = None
    returns: Returns | None = None
    cost: CostSource | None = None
    target: Target | None = None
    feedback: FeedbackParams | None = None
    online: OnlineParams | None = None
    policy_gradient: PolicyGradientParams | None = None


#: Sections that stand in a row of `methods`, so that changing one reruns that row alone.
ROW_SECTIONS = ("feedback", "online", "policy_gradient")


class DualSearchParams(StageParams):
    """The outer loop of every method."""

    section = "dual_search"
    shared = {
        "seed": "seed",
        "beta": "beta",
        "pessimism": "pessimism",
        "limit": "constraint.limit",
        "max_new_tokens": "generation.max_new_tokens",
        "methods": "methods",
    }

    seed: Seed
    beta: Positive
    pessimism: PessimismParams
    limit: Number
    max_new_tokens: Count
    methods: dict[RunName, MethodRow]
    prompts: Annotated[int, Field(ge=2, le=MOST)]
    samples_per_prompt: Two
    z: NonNegative
    lambda_min: Positive
    lambda_max: Positive
    max_trainings: Annotated[int, Field(ge=0, le=10_000)]
    step_size: Positive
    grid: Annotated[list[NonNegative], Field(min_length=1)]
    merge_steps: Few
    merge_max: Annotated[float, Field(gt=0, le=2)]
    min_ess: Positive
    max_tokens: Count | None
    slater_radius: Positive | Literal["pool"]
    refresh_prompts: Annotated[int, Field(ge=0, le=MOST)]
    refresh_samples: Two
    training: TrainingParams
    lora: LoraParams
    feedback: FeedbackParams | None = None
    online: OnlineParams | None = None
    policy_gradient: PolicyGradientParams | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _named(cls, rows: Any) -> Any:
        """A row that names no method is the method of its own name."""
        if not isinstance(rows, dict):
            return rows
        named = {
            key: {**row, "method": row.get("method") or key}
            for key, row in rows.items()
            if isinstance(row, dict)
        }
        return {**rows, **named}

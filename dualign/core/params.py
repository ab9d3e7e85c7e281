"""Every knob, typed: one frozen class per stage, read from `params.yaml`, checked before anything runs.

`params.yaml` has shared keys (`seed`, `beta`, `constraint`, `generation`) and one section per stage. `load` checks the
whole file, so a typo anywhere is found at once, and returns the section of one stage with the shared keys that it
declares in `shared`; a stage cannot read what it does not declare, and `dvc.yaml` lists exactly that.
The section `resources` says how to run (batch sizes, devices, logging); it changes no result beyond rounding and the
random draw, so DVC does not track it.
"""

from __future__ import annotations

import difflib
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError

from dualign.core.errors import ParamsError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
LossType = Literal["dpo", "ipo", "kto"]
Quantity = Literal["cost", "p_unsafe", "cvar", "length"]
#: Multipliers that a run may name, and the key of data/dual/dual.json that holds each.
Solved = Literal["dual", "stock"]
SOLVED = {"dual": "lam", "stock": "lam_stock"}


class Frozen(BaseModel):
    """A section: immutable, strict types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class StageParams(Frozen):
    """The params of one stage. `section` is its key in the file, `shared` maps fields to keys outside it."""

    section: ClassVar[str]
    shared: ClassVar[dict[str, str]] = {}


# --- pieces that several sections use ---------------------------------------------------------------------------------


class SourceSpec(Frozen):
    """Where rows come from.

    `format` names the reader, `path` a file (relative to `prepare.folder`) or a hub dataset id; `split` and `revision`
    belong to a hub dataset. `columns` maps our column names to the file's (format `columns` only). `limit` keeps the
    first rows only.
    """

    format: Literal["world", "pku", "hh", "alpaca", "columns"]
    path: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: dict[str, str] = {}
    limit: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> SourceSpec:
        if self.format == "world" and self.path is not None:
            raise ValueError("the world is generated and takes no path; remove it, or choose another format")
        if self.format != "world" and self.path is None:
            raise ValueError(f"format {self.format!r} needs a path: a file in prepare.folder, or a hub dataset id")
        if self.format == "columns" and not self.columns:
            raise ValueError("format 'columns' needs columns, e.g. {prompt: question, chosen: best, rejected: worst}")
        return self


class WorldParams(Frozen):
    """The embedded data: how many rows of each kind, and how sharp its annotators are (1 = Bradley-Terry at r*, c*)."""

    sft_rows: Count
    helpful_pairs: Count
    safety_pairs: Count
    sharpness: Positive


class TrainingParams(Frozen):
    """One training run. `batch_size` counts rows or pairs per optimiser step over all devices."""

    epochs: Positive
    batch_size: Count
    learning_rate: Positive
    adam_beta2: Annotated[float, Field(gt=0, lt=1)]
    warmup: Annotated[float, Field(ge=0, lt=1)]
    schedule: Literal["linear", "cosine", "constant"]
    weight_decay: NonNegative
    max_length: Count
    max_steps: Count | None


class LoraParams(Frozen):
    """Low-rank adapters; `rank` 0 trains all weights."""

    rank: Annotated[int, Field(ge=0)]
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: list[str] | Literal["all-linear"]


class ScratchParams(Frozen):
    """A small Llama built here, used when `sft.base` is `scratch`. `tokenizer` is `train` or a folder."""

    tokenizer: str
    vocab_size: Annotated[int, Field(ge=64)]
    hidden_size: Count
    layers: Count
    heads: Count
    intermediate_size: Count
    context: Count

    @model_validator(mode="after")
    def _check(self) -> ScratchParams:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}")
        return self


class InnerParams(Frozen):
    """The inner loss of a pairwise training (see `dualign.losses`).

    `normalised` divides the labels' score and the pairwise coefficient by 1 + lambda.
    """

    labels: Literal["soft", "bernoulli"]
    normalised: bool
    anchor: NonNegative
    nll: NonNegative


class ConstraintSpec(Frozen):
    """A further limit on the mean of a quantity of the answers; see `dualign.constraints`.

    `level` belongs to `cvar`, the mean cost of the worst 1 - level of the answers. `prompts` is a regular expression:
    the limit is on those prompts in whose last user text it is found; null is all.
    """

    quantity: Quantity
    limit: float
    level: Annotated[float, Field(gt=0, lt=1)] | None = None
    prompts: str | None = None

    @model_validator(mode="after")
    def _check(self) -> ConstraintSpec:
        if (self.quantity == "cvar") != (self.level is not None):
            raise ValueError("level goes with quantity cvar and with no other; set it to 0.9, say, or to null")
        if self.quantity == "p_unsafe" and not 0 < self.limit < 1:
            raise ValueError(f"the limit of p_unsafe is a share between 0 and 1, not {self.limit:g}; give such a share")
        if self.quantity == "length" and self.limit <= 0:
            raise ValueError(f"the limit of length is in tokens and above 0, not {self.limit:g}; give such a number")
        try:
            re.compile(self.prompts or "")
        except re.error as error:
            raise ValueError(f"prompts {self.prompts!r} is no regular expression ({error}); correct it") from None
        return self


class Resources(Frozen):
    """How to run on this machine; DVC does not track it."""

    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]
    micro_batch_size: Count | None
    sampling_batch_size: Count
    scoring_batch_size: Count
    gradient_checkpointing: bool
    checkpoint_steps: Count
    log_steps: Count
    threads: Count | None


# --- stages -----------------------------------------------------------------------------------------------------------


class PrepareParams(StageParams):
    """Data sources and splits."""

    section = "prepare"
    shared = {"seed": "seed"}

    seed: int
    folder: str
    sft: Annotated[list[SourceSpec], Field(min_length=1)]
    helpful: Annotated[list[SourceSpec], Field(min_length=1)]
    safety: Annotated[list[SourceSpec], Field(min_length=1)]
    world: WorldParams
    pool_prompts: Count
    search_prompts: Count
    certify_prompts: Count
    eval_prompts: Count
    heldout_share: Annotated[float, Field(gt=0, lt=0.5)]
    max_rejected_share: Share
    max_prompt_chars: Count
    max_response_chars: Count


class SftParams(StageParams):
    """Supervised fine-tuning; the result is the reference policy."""

    section = "sft"
    shared = {"seed": "seed"}

    seed: int
    base: str
    revision: str | None
    chat_template: str | None
    scratch: ScratchParams
    training: TrainingParams
    lora: LoraParams


class ScorerParams(StageParams):
    """What reward and cost model share. `backbone` is `sft`, a hub id or a folder."""

    seed: int
    backbone: str
    training: TrainingParams
    lora: LoraParams
    score_regularisation: NonNegative


class RewardModelParams(ScorerParams):
    """Bradley-Terry reward model."""

    section = "reward_model"
    shared = {"seed": "seed"}


class CostModelParams(ScorerParams):
    """Cost model: ranking and sign terms, then zero-point calibration on held-out flags."""

    section = "cost_model"
    shared = {"seed": "seed"}

    sign_weight: NonNegative
    calibrate: Literal["platt", "isotonic", "none"]


class ScoreParams(StageParams):
    """The pool of reference samples and the scored training pairs."""

    section = "score"
    shared = {"seed": "seed", "max_new_tokens": "generation.max_new_tokens"}

    seed: int
    max_new_tokens: Count
    samples_per_prompt: Annotated[int, Field(ge=2)]
    pairs: Count | None


class DualInitParams(StageParams):
    """The dual of the pool."""

    section = "dual_init"
    shared = {
        "seed": "seed",
        "beta": "beta",
        "limit": "constraint.limit",
        "delta": "constraint.delta",
        "power": "constraint.power",
        "also": "constraint.also",
        "certify_prompts": "certify.prompts",
        "certify_samples": "certify.samples_per_prompt",
    }

    seed: int
    beta: Positive
    limit: float
    delta: Annotated[float, Field(gt=0, lt=0.5)]
    power: Annotated[float, Field(ge=0.5, lt=1)] | None
    also: dict[str, ConstraintSpec]
    certify_prompts: Annotated[int, Field(ge=2)]
    certify_samples: Count
    lambda_max: Positive
    grid: Annotated[list[NonNegative], Field(min_length=2)]
    bootstrap: Annotated[int, Field(ge=20)]
    min_ess: Positive
    cvar_level: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _check(self) -> DualInitParams:
        if sorted(set(self.grid)) != self.grid:
            raise ValueError("grid must increase and hold no value twice")
        return self


class RewardRun(Frozen):
    """One DPO on helpfulness: from which policy, by which loss, with SafeDPO's offset and MODPO's margin policy.

    `reference` and `margin` are folders under models/: `sft`, or a run of `safety_dpo`, for a margin one of plain DPO
    from `sft`. `margin: sft` means no margin. `clip` bounds the implicit rewards, in units of reward; it goes with
    neither offset nor margin, which stand in the reference column and would be bounded too.
    """

    reference: str
    loss_type: LossType
    clip: Positive | None
    safe_offset: NonNegative | None
    margin: str
    margin_weight: Positive

    @model_validator(mode="after")
    def _check(self) -> RewardRun:
        if self.safe_offset is not None and self.loss_type != "dpo":
            raise ValueError(
                f"safe_offset (SafeDPO) needs loss_type dpo, not {self.loss_type}; set loss_type to dpo, "
                "or safe_offset to null"
            )
        if self.margin != "sft" and (self.loss_type != "dpo" or self.safe_offset is not None):
            raise ValueError(
                f"margin {self.margin!r} (MODPO) needs loss_type dpo and safe_offset null; set these, or margin to sft"
            )
        if self.clip is not None and (self.margin != "sft" or self.safe_offset is not None):
            raise ValueError(
                "clip goes with neither safe_offset nor margin; set clip to null, or safe_offset to null and margin "
                "to sft"
            )
        return self


class RewardDpoParams(StageParams):
    """DPO on helpfulness: SACPO's first step, or its second after safety; SafeDPO; MODPO."""

    section = "reward_dpo"
    shared = {"seed": "seed", "beta": "beta"}

    seed: int
    beta: Positive
    runs: dict[str, RewardRun]
    training: TrainingParams
    lora: LoraParams


class SafetyRun(Frozen):
    """One safety DPO: from which policy, with which multiplier, by which loss.

    `lam` is `dual`, `stock` or a number, and is multiplied by `factor`. `reference` is a folder under models/: `sft` or
    a run of `reward_dpo`. `clip` bounds the implicit rewards, in units of cost. A search that starts from it keeps loss
    and clip.
    """

    reference: str
    lam: Solved | Positive
    factor: Positive
    loss_type: LossType
    clip: Positive | None


class SafetyDpoParams(StageParams):
    """Safety DPO (SACPO step 2, PD-DPO phase 2): coefficient beta / lambda to its reference."""

    section = "safety_dpo"
    shared = {"seed": "seed", "beta": "beta"}

    seed: int
    beta: Positive
    runs: dict[str, SafetyRun]
    lambda_min: Positive
    training: TrainingParams
    lora: LoraParams


class LagrangianSpec(Frozen):
    """How a Lagrangian is trained: learning rate (null takes the section's) and inner loss.

    A search that starts from such a policy keeps both.
    """

    learning_rate: Positive | None
    inner: InnerParams


class LagrangianRun(LagrangianSpec):
    """One Lagrangian DPO: its multiplier (`dual`, `stock` or a number), scores and pairs.

    `reward` and `cost` are folders under models/: the scorers (`reward_model`, `cost_model`), or policies whose
    log-ratios stand in for them (`reward_dpo/NAME`, `safety_dpo/NAME`).
    """

    lam: Solved | NonNegative
    reward: str
    cost: str
    data: Literal["pairs", "pool"]

    @property
    def implicit(self) -> bool:
        """Whether a policy stands in for a scorer."""
        return (self.reward, self.cost) != ("reward_model", "cost_model")


class LagrangianParams(StageParams):
    """What the stages that train a Lagrangian share."""

    seed: int
    beta: Positive
    training: TrainingParams
    lora: LoraParams


class LagrangianDpoParams(LagrangianParams):
    """Lagrangian DPO (the inner problem of C-DPO and MoCAN) at a fixed multiplier."""

    section = "lagrangian_dpo"
    shared = {"seed": "seed", "beta": "beta"}

    runs: dict[str, LagrangianRun]


class LambdaPathRun(LagrangianSpec):
    """One policy of the path: its multiplier, and the policy that its training goes on from.

    `begin` is a folder under models/: `sft`, or another run of `lambda_path`. The reference is pi_ref either way.
    """

    lam: NonNegative
    begin: str


class LambdaPathParams(LagrangianParams):
    """Our own Lagrangian trainings at multipliers that no limit has a say in."""

    section = "lambda_path"
    shared = {"seed": "seed", "beta": "beta"}

    runs: dict[str, LambdaPathRun]


MethodName = Literal[
    "sacpo", "p_sacpo", "c_dpo", "pd_dpo", "o_pd_dpo", "mocan", "pecan", "caid", "safe_rlhf", "dualign"
]
Rule = Literal["grid", "dual_gradient", "projected_subgradient", "one_shot", "newton", "merge", "ascent"]
Returns = Literal["last", "best", "mixture", "tail_average"]
CostSource = Literal["model", "feedback"]
Aim = Literal["limit", "stock"]


class FeedbackParams(Frozen):
    """Binary safety labels for the rows whose `cost` is `feedback`.

    `labels` per answer to the first `prompts` search prompts, from `source` (see `dualign.search.labelling`);
    `smoothing` is added to both counts of an answer. `folder` is where files for people go (source `file`).
    """

    prompts: Annotated[int, Field(ge=2)]
    labels: Count
    smoothing: Positive
    source: Literal["oracle", "cost_model", "cost_sign", "file"]
    folder: str


class OnlineParams(Frozen):
    """Rounds of O-PD-DPO (see `dualign.search.online`): who compares the fresh answers, and the bonuses.

    `folder` is where files for people go (labels `file`); `retrain_reward` goes on training pi_r in every round;
    `ridge` is gamma in squared units of the features; a scale is the mean gap of a bonus within an offline pair before
    the first round, in units of reward and of cost; `dimension` projects the features, null keeps them.
    """

    labels: Literal["oracle", "models", "file"]
    folder: str
    retrain_reward: bool
    ridge: Positive
    reward_scale: NonNegative
    cost_scale: NonNegative
    dimension: Count | None


class PolicyGradientParams(Frozen):
    """Safe RLHF's run (see `dualign.training.policy_gradient`); what it does not name is `dual_search.training`'s.

    `samples` answers to a prompt, `batch_size` answers and `steps` steps; lambda starts at `lambda_init`, moves at
    `lambda_rate`, and sees the mean cost of the last `window` answers.
    """

    samples: Annotated[int, Field(ge=2)]
    batch_size: Count
    steps: Count
    learning_rate: Positive
    lambda_init: Positive
    lambda_rate: Positive
    window: Count

    @model_validator(mode="after")
    def _whole_prompts(self) -> PolicyGradientParams:
        if self.batch_size % self.samples:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of samples {self.samples}: whole prompts"
            )
        return self


class MethodRow(Frozen):
    """A search that runs: a method of `dualign/methods.py`, by default the one of the row's name, and its models.

    `start` and `reference` are folders under models/: the policy at the first multiplier, and the one whose
    log-probabilities are the reference column. The options replace the method's own choice; null keeps it. The sections
    at the end belong to rows that need them: cost `feedback`, O-PD-DPO, Safe RLHF.
    """

    method: MethodName
    start: str
    reference: str
    rule: Rule | None = None
    warm: bool | None = None
    returns: Returns | None = None
    cost: CostSource | None = None
    aims: Aim | None = None
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
        "limit": "constraint.limit",
        "max_new_tokens": "generation.max_new_tokens",
        "methods": "methods",
    }

    seed: int
    beta: Positive
    limit: float
    max_new_tokens: Count
    methods: dict[str, MethodRow]
    prompts: Annotated[int, Field(ge=2)]
    samples_per_prompt: Annotated[int, Field(ge=2)]
    z: NonNegative
    lambda_min: Positive
    lambda_max: Positive
    max_trainings: Annotated[int, Field(ge=0)]
    step_size: Positive
    grid: Annotated[list[NonNegative], Field(min_length=1)]
    merge_steps: Count
    merge_max: Annotated[float, Field(gt=0, le=2)]
    min_ess: Positive
    max_tokens: Count | None
    slater_radius: Positive | Literal["pool"]
    refresh_prompts: Annotated[int, Field(ge=0)]
    refresh_samples: Annotated[int, Field(ge=2)]
    training: TrainingParams
    lora: LoraParams
    feedback: FeedbackParams | None = None
    online: OnlineParams | None = None
    policy_gradient: PolicyGradientParams | None = None

    def of(self, name: str) -> DualSearchParams:
        """These params with the sections of one row of `methods` in place."""
        row = self.methods[name]
        return self.model_copy(update={key: getattr(row, key) for key in ROW_SECTIONS})

    @field_validator("methods", mode="before")
    @classmethod
    def _named(cls, rows: Any) -> Any:
        """A row that names no method is the method of its own name."""
        if not isinstance(rows, dict):
            return rows
        named = {key: {**row, "method": row.get("method") or key} for key, row in rows.items() if isinstance(row, dict)}
        return {**rows, **named}


class CertifyRun(Frozen):
    """What one certificate may return, safest first: `fallback`, then merges (1 - q) partner + q policy by `weights`.

    All are folders under models/. With `partner` the policy at multiplier 0, a larger q is safer: it stands for q times
    the policy's multiplier. Name the policy itself as fallback for none, and as partner for none, with weight 1 alone.
    """

    policy: str
    partner: str
    fallback: str
    weights: Annotated[list[Positive], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> CertifyRun:
        if sorted(set(self.weights), reverse=True) != self.weights:
            raise ValueError(
                "weights must fall and hold no value twice: the largest is the safest, and is tested first"
            )
        if self.partner == self.policy and self.weights != [1.0]:
            raise ValueError(
                "partner is the policy itself, so weights must be [1.0]; name another partner to merge with"
            )
        return self


class LabelParams(Frozen):
    """Labels of the truth for one answer to each of `prompts` certify prompts (see `dualign.search.labelling`).

    `oracle` (embedded world): the true cost, `limit` null takes the constraint's. `file`: the share of `votes` people
    who call the answer unsafe, asked through `folder`; `limit` bounds that share.
    """

    source: Literal["oracle", "file"]
    prompts: Annotated[int, Field(ge=5)]
    votes: Count
    limit: float | None
    folder: str

    @model_validator(mode="after")
    def _check(self) -> LabelParams:
        if self.source == "file" and not (self.limit is not None and 0 < self.limit < 1):
            raise ValueError(
                "limit must be a share between 0 and 1 where people vote: of answers that they call unsafe"
            )
        return self


class CertifyParams(StageParams):
    """The certificate, on prompts that nothing else has seen."""

    section = "certify"
    shared = {
        "seed": "seed",
        "limit": "constraint.limit",
        "delta": "constraint.delta",
        "max_new_tokens": "generation.max_new_tokens",
    }

    seed: int
    limit: float
    delta: Annotated[float, Field(gt=0, lt=0.5)]
    max_new_tokens: Count
    prompts: Annotated[int, Field(ge=2)]
    samples_per_prompt: Count
    method: Literal["clustered_t", "empirical_bernstein", "betting"]
    bounds: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    labels: LabelParams | None
    runs: dict[str, CertifyRun]

    @model_validator(mode="after")
    def _check(self) -> CertifyParams:
        if self.method != "clustered_t" and self.bounds is None:
            raise ValueError(f"bounds: method {self.method} needs the lowest and highest cost that an answer can have")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError("bounds must hold the lower end first")
        if self.labels is not None and self.labels.prompts > self.prompts:
            raise ValueError(f"labels.prompts {self.labels.prompts} must be at most prompts {self.prompts}")
        return self


class EvaluateParams(StageParams):
    """Evaluation on generated answers of held-out prompts."""

    section = "evaluate"
    shared = {
        "seed": "seed",
        "beta": "beta",
        "limit": "constraint.limit",
        "also": "constraint.also",
        "max_new_tokens": "generation.max_new_tokens",
    }

    seed: int
    beta: Positive
    limit: float
    also: dict[str, ConstraintSpec]
    max_new_tokens: Count
    prompts: Count
    samples_per_prompt: Count
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    policies: dict[str, str]


class ReportParams(StageParams):
    """The report page."""

    section = "report"
    shared = {
        "limit": "constraint.limit",
        "beta": "beta",
        "confidence": "evaluate.confidence",
        "policies": "evaluate.policies",
    }

    limit: float
    beta: Positive
    confidence: float
    policies: dict[str, str]
    title: str
    sample_prompts: Annotated[int, Field(ge=0)]


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
        DualSearchParams,
        CertifyParams,
        EvaluateParams,
        ReportParams,
    )
}
_TOP_LEVEL = {"seed", "beta", "constraint", "generation", "resources", "methods", *STAGES}

P = TypeVar("P", bound=StageParams)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML 1.2 mapping (so `1e-5` is a number). Raises ParamsError that names the file and line."""
    path = Path(path)
    try:
        content = YAML(typ="safe").load(path.read_text())
    except FileNotFoundError as error:
        raise ParamsError(f"{path}: no such file; run from the folder that holds params.yaml") from error
    except (UnicodeDecodeError, ReaderError) as error:
        raise ParamsError(f"{path}: not valid YAML ({error.reason}); save it as UTF-8 text") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ParamsError(f"{path}:{line}: not valid YAML ({error.problem})") from error
    if not isinstance(content, dict):
        raise ParamsError(f"{path}: expected a mapping of keys to values")
    return content


def load(cls: type[P], path: str | Path = "params.yaml") -> P:
    """Check the whole file, return the params of one stage. Raises ParamsError that names file, key and remedy."""
    content = read_yaml(path)
    checked = check(content, path)
    return checked[cls.section]  # type: ignore[return-value]


def load_resources(path: str | Path = "params.yaml") -> Resources:
    """The `resources` section."""
    return _build(Resources, read_yaml(path).get("resources"), "resources", path)


def check(content: dict[str, Any], path: str | Path) -> dict[str, StageParams]:
    """Validate every section of a params file; return the params of each stage by name."""
    _refuse_unknown(content, _TOP_LEVEL, "", path)
    for key in sorted(_TOP_LEVEL - content.keys()):
        raise ParamsError(f"{path}: {key} is missing; add it (params.yaml in the repository shows every key)")
    for section in ("constraint", "generation"):
        if isinstance(content[section], dict):
            _refuse_unknown(content[section], _shared_keys(section), f"{section}.", path)
    _build(Resources, content["resources"], "resources", path)
    stages = {name: _build(cls, _with_shared(cls, content, path), name, path) for name, cls in STAGES.items()}
    _check_across(content, stages, path)
    return stages


def _shared_keys(section: str) -> set[str]:
    """The keys of a shared section: those that some stage declares."""
    declared = {key for cls in STAGES.values() for key in cls.shared.values()}
    return {key.partition(".")[2] for key in declared if key.startswith(f"{section}.")}


def _with_shared(cls: type[StageParams], content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    section = content[cls.section]
    if not isinstance(section, dict):
        raise ParamsError(f"{path}: {cls.section} must hold keys and values")
    for field in cls.shared:
        if field in section:
            raise ParamsError(f"{path}: {cls.section}.{field} belongs at {cls.shared[field]}; move it there")
    return {**section, **{field: _dig(content, key, path) for field, key in cls.shared.items()}}


def _dig(content: dict[str, Any], dotted: str, path: str | Path) -> Any:
    value: Any = content
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ParamsError(f"{path}: {dotted} is missing")
        value = value[key]
    return value


M = TypeVar("M", bound=BaseModel)


def _build(cls: type[M], values: Any, where: str, path: str | Path) -> M:
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ParamsError(_explain(error, cls, where, path)) from None


def _explain(error: ValidationError, cls: type[BaseModel], where: str, path: str | Path) -> str:
    """The first problem of a validation error as one line: file, key, what is wrong, nearest valid key."""
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    shared = getattr(cls, "shared", {})
    key = ".".join([shared[loc[0]], *loc[1:]] if loc and loc[0] in shared else [where, *loc])
    if first["type"] == "extra_forbidden":
        return f"{path}: {key} is not a known key{_nearest(loc[-1], _fields_at(cls, loc[:-1]))}"
    if first["type"] == "missing":
        return f"{path}: {key} is missing; add it (params.yaml in the repository shows every key)"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict | list) else f", got {first['input']!r}"
    return f"{path}: {key}: {message[0].lower()}{message[1:]}{given}"


def _fields_at(cls: type[BaseModel], loc: list[str]) -> list[str]:
    """Field names of the model that `loc` leads to, walking through nested models, lists and dicts of models."""
    for part in loc:
        if part in cls.model_fields:
            models = _models_in(cls.model_fields[part].annotation)
            cls = models[0] if models else cls
    return list(cls.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in _models_in(arg)]


def _nearest(key: str, valid: list[str] | set[str]) -> str:
    close = difflib.get_close_matches(key, sorted(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid keys: {', '.join(sorted(valid))}"


def _refuse_unknown(content: dict[str, Any], valid: set[str], where: str, path: str | Path) -> None:
    for key in content:
        if key not in valid:
            raise ParamsError(f"{path}: {where}{key} is not a known key{_nearest(str(key), valid)}")


def _check_references(reward: RewardDpoParams, safety: SafetyDpoParams, path: str | Path) -> None:
    """References and margins of the runs on preferences name models that the other stage writes, and no circle.

    A margin is the cost that `losses.modpo_logit` asks for only if its policy is that of plain safety DPO from `sft`.
    """
    after_reward = {"sft", *(f"reward_dpo/{name}" for name in reward.runs)}
    after_safety = {"sft", *(f"safety_dpo/{name}" for name in safety.runs)}
    margins = {"sft", *_cost_policies(safety)}
    named = {
        **{("safety_dpo", name, "reference"): (run.reference, after_reward) for name, run in safety.runs.items()},
        **{("reward_dpo", name, "reference"): (run.reference, after_safety) for name, run in reward.runs.items()},
        **{("reward_dpo", name, "margin"): (run.margin, margins) for name, run in reward.runs.items()},
    }
    for (stage, name, key), (folder, valid) in named.items():
        if folder not in valid:
            why = " (none, or a policy of plain safety DPO from sft)" if key == "margin" else ""
            raise ParamsError(f"{path}: {stage}.runs.{name}.{key}: {folder!r} is not one of {sorted(valid)}{why}")
    needs: dict[str, set[str]] = {}
    for (stage, name, _), (folder, _) in named.items():
        needs.setdefault(f"{stage}/{name}", set()).add(folder)
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        circle = " <- ".join(error.args[1])
        raise ParamsError(f"{path}: runs wait for each other: {circle}; set one reference to sft") from None


def _cost_policies(safety: SafetyDpoParams) -> set[str]:
    """Runs whose log-ratio to the reference policy is a cost: plain DPO that started there."""
    plain = ("sft", "dpo", None)
    return {
        f"safety_dpo/{name}" for name, run in safety.runs.items() if (run.reference, run.loss_type, run.clip) == plain
    }


def _check_across(content: dict[str, Any], stages: dict[str, StageParams], path: str | Path) -> None:
    """Rules that tie sections together: a search starts from a model that some stage writes, and so on."""
    reward, safety, lagrangian = stages["reward_dpo"], stages["safety_dpo"], stages["lagrangian_dpo"]
    lambda_path, search, evaluate = stages["lambda_path"], stages["dual_search"], stages["evaluate"]
    assert isinstance(reward, RewardDpoParams) and isinstance(safety, SafetyDpoParams)
    assert isinstance(lagrangian, LagrangianDpoParams) and isinstance(lambda_path, LambdaPathParams)
    assert isinstance(search, DualSearchParams) and isinstance(evaluate, EvaluateParams)
    _check_references(reward, safety, path)
    _check_scores(reward, safety, lagrangian, path)
    _check_path(lambda_path, path)
    models = {"sft", *(f"reward_dpo/{name}" for name in reward.runs)}
    models |= {f"safety_dpo/{name}" for name in safety.runs} | {f"lagrangian_dpo/{name}" for name in lagrangian.runs}
    models |= {f"lambda_path/{name}" for name in lambda_path.runs}
    for name, row in search.methods.items():
        for key, folder in (("start", row.start), ("reference", row.reference)):
            if folder not in models:
                raise ParamsError(
                    f"{path}: methods.{name}.{key}: no stage writes models/{folder}; one of {sorted(models)}"
                )
        _check_reference(name, row, safety, path)
        _check_ends(name, row, lambda_path, path)
        ascent = row.policy_gradient
        if ascent and not search.lambda_min <= ascent.lambda_init <= search.lambda_max:
            raise ParamsError(
                f"{path}: methods.{name}.policy_gradient.lambda_init must lie between dual_search.lambda_min and "
                "lambda_max"
            )
    models |= {f"aligned/{name}" for name in search.methods}
    certify = stages["certify"]
    assert isinstance(certify, CertifyParams)
    for name, certified in certify.runs.items():
        for key in ("policy", "partner", "fallback"):
            if getattr(certified, key) not in models:
                raise ParamsError(
                    f"{path}: certify.runs.{name}.{key}: no stage writes models/{getattr(certified, key)}; one of "
                    f"{sorted(models)}"
                )
    models |= {f"certified/{name}" for name in certify.runs}
    for name, folder in evaluate.policies.items():
        if folder not in models:
            raise ParamsError(
                f"{path}: evaluate.policies.{name}: no stage writes models/{folder}; one of {sorted(models)}"
            )
    if "sft" not in evaluate.policies:
        raise ParamsError(f"{path}: evaluate.policies.sft is missing; win rates are measured against it")
    if search.lambda_min >= search.lambda_max:
        raise ParamsError(f"{path}: dual_search.lambda_min must be below dual_search.lambda_max")
    for key in ROW_SECTIONS:
        if key in content["dual_search"]:
            raise ParamsError(f"{path}: dual_search.{key} belongs in the row that needs it: methods.NAME.{key}")


def _check_scores(
    reward: RewardDpoParams, safety: SafetyDpoParams, lagrangian: LagrangianDpoParams, path: str | Path
) -> None:
    """A score is a scorer's, or the log-ratio to the reference policy of a plain DPO that started there."""
    plain = RewardRun(reference="sft", loss_type="dpo", clip=None, safe_offset=None, margin="sft", margin_weight=1.0)
    rewards = [
        f"reward_dpo/{k}" for k, run in reward.runs.items() if run.model_copy(update={"margin_weight": 1.0}) == plain
    ]
    valid = {"reward": ["reward_model", *rewards], "cost": ["cost_model", *_cost_policies(safety)]}
    for name, run in lagrangian.runs.items():
        for key, names in valid.items():
            if getattr(run, key) not in names:
                raise ParamsError(
                    f"{path}: lagrangian_dpo.runs.{name}.{key}: {getattr(run, key)!r} gives no {key} relative to sft "
                    f"(a scorer does, or a policy trained from it by plain DPO); one of {sorted(names)}"
                )


def _check_reference(name: str, row: MethodRow, safety: SafetyDpoParams, path: str | Path) -> None:
    """A search goes on against the reference of its start; only a naive merge takes a partner of its own."""
    stage, _, run = row.start.partition("/")
    trained = safety.runs[run].reference if stage == "safety_dpo" else "sft" if stage == "lagrangian_dpo" else None
    naive = row.method == "p_sacpo" and trained == "sft"
    if trained is not None and row.reference != trained and not naive:
        raise ParamsError(
            f"{path}: methods.{name}.reference is {row.reference!r}, but {row.start} was trained against {trained!r}; "
            "name that, or another start"
        )


def _check_path(given: LambdaPathParams, path: str | Path) -> None:
    """Runs of the path begin at `sft` or at another run, and no two wait for each other."""
    valid = {"sft", *(f"lambda_path/{name}" for name in given.runs)}
    for name, run in given.runs.items():
        if run.begin not in valid:
            raise ParamsError(f"{path}: lambda_path.runs.{name}.begin: {run.begin!r} is not one of {sorted(valid)}")
    try:
        TopologicalSorter({f"lambda_path/{name}": {run.begin} for name, run in given.runs.items()}).prepare()
    except CycleError as error:
        circle = " <- ".join(error.args[1])
        raise ParamsError(f"{path}: runs wait for each other: {circle}; let one begin at sft") from None


def _check_ends(name: str, row: MethodRow, given: LambdaPathParams, path: str | Path) -> None:
    """A search on the path merges two of its policies, the stricter one as its start."""
    ends = [folder.partition("/")[2] for folder in (row.start, row.reference) if folder.startswith("lambda_path/")]
    if not ends:
        return
    if len(ends) == 1 or given.runs[ends[0]].lam <= given.runs[ends[1]].lam:
        raise ParamsError(
            f"{path}: methods.{name}: start and reference must both be runs of lambda_path, and the start's lam must "
            f"be the larger one; got {row.start} and {row.reference}"
        )

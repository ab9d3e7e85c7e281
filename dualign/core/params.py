"""Every knob, typed: one frozen class per stage.

`params.yaml` has shared keys (`seed`, `beta`, `constraint`, `generation`) and one section per stage; a class declares
in `shared` which of the shared keys its stage reads. A stage cannot read what it does not declare, and `dvc.yaml` lists
exactly that. The section `resources` says how to run (batch sizes, devices, logging); it changes no result beyond
rounding and the random draw, so DVC does not track it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dualign.core.names import Inside, Model, Name, Place, RunName

#: What numpy takes ends at 2**32 - 1; the other half is for seeds that are derived by adding to this one.
Seed = Annotated[int, Field(ge=0, lt=2**31)]
#: No number here is larger: more is a slip of the pen that ends in an overflow, or in no time that anybody has.
MOST = 10**9
Number = Annotated[float, Field(ge=-MOST, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=MOST)]
NonNegative = Annotated[float, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=1, le=MOST)]
#: A count of what costs a forward pass, a file or a thread each.
Few = Annotated[int, Field(ge=1, le=10_000)]
Two = Annotated[int, Field(ge=2, le=10_000)]
Share = Annotated[float, Field(ge=0, le=1)]
LossType = Literal["dpo", "ipo", "kto"]
Quantity = Literal["cost", "p_unsafe", "cvar", "length", "unended"]
#: Quantities that are 0 or 1, so that their mean is a share of the answers.
SHARES = ("p_unsafe", "unended")
#: Multipliers that a run may name: the pool's own, or the one with a safety stock.
Solved = Literal["dual", "stock"]


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
    path: Inside | None = None
    split: Place = "train"
    revision: Place | None = None
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

    epochs: Annotated[float, Field(gt=0, le=10_000)]
    batch_size: Annotated[int, Field(ge=1, le=10**6)]
    learning_rate: Positive
    adam_beta2: Annotated[float, Field(gt=0, lt=1)]
    warmup: Annotated[float, Field(ge=0, lt=1)]
    schedule: Literal["linear", "cosine", "constant"]
    weight_decay: NonNegative
    max_length: Count
    max_steps: Count | None


class LoraParams(Frozen):
    """Low-rank adapters; `rank` 0 trains all weights."""

    rank: Annotated[int, Field(ge=0, le=10_000)]
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: list[str] | Literal["all-linear"]


class ScratchParams(Frozen):
    """A small Llama built here, used when `sft.base` is `scratch`. `tokenizer` is `train` or a folder."""

    tokenizer: Place
    vocab_size: Annotated[int, Field(ge=64, le=10**6)]
    hidden_size: Annotated[int, Field(ge=1, le=10**5)]
    layers: Few
    heads: Few
    intermediate_size: Annotated[int, Field(ge=1, le=10**6)]
    context: Annotated[int, Field(ge=1, le=10**7)]

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
    limit: Number
    level: Annotated[float, Field(gt=0, lt=1)] | None = None
    prompts: str | None = None

    @model_validator(mode="after")
    def _check(self) -> ConstraintSpec:
        if (self.quantity == "cvar") != (self.level is not None):
            raise ValueError("level goes with quantity cvar and with no other; set it to 0.9, say, or to null")
        if self.quantity in SHARES and not 0 < self.limit < 1:
            raise ValueError(
                f"the limit of {self.quantity} is a share between 0 and 1, not {self.limit:g}; give such a share"
            )
        if self.quantity == "length" and self.limit <= 0:
            raise ValueError(f"the limit of length is in tokens and above 0, not {self.limit:g}; give such a number")
        try:
            re.compile(self.prompts or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"prompts {self.prompts!r} is no regular expression ({error}); correct it") from None
        return self


class PessimismParams(Frozen):
    """Scores off the support of the scorers' data (see `dualign.support`).

    An answer is beyond it where it surprises pi_ref more than all but a `share` of the answers of held-out pairs do.
    There `reward` is taken off its reward and `cost` put on its cost, in within-prompt standard deviations of the pool.
    """

    share: Annotated[float, Field(gt=0, lt=0.5)]
    reward: NonNegative
    cost: NonNegative


class Resources(Frozen):
    """How to run on this machine; DVC does not track it.

    `precision` is what matrices are multiplied in: `bf16` keeps weights that are trained in fp32, `pure_bf16` does not.
    """

    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "pure_bf16"]
    micro_batch_size: Count | None
    sampling_batch_size: Count
    scoring_batch_size: Count
    gradient_checkpointing: bool
    checkpoint_steps: Count
    log_steps: Count
    threads: Few | None


# --- stages -----------------------------------------------------------------------------------------------------------


class PrepareParams(StageParams):
    """Data sources and splits."""

    section = "prepare"
    shared = {"seed": "seed"}

    seed: Seed
    folder: Place
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
    """Supervised fine-tuning; the result is the reference policy. `train` false takes the base as it is."""

    section = "sft"
    shared = {"seed": "seed"}

    seed: Seed
    train: bool | None
    base: Place
    revision: Place | None
    gguf_file: Place | None
    chat_template: Place | None
    scratch: ScratchParams
    training: TrainingParams
    lora: LoraParams

    @model_validator(mode="after")
    def _check(self) -> SftParams:
        if self.base == "scratch" and not self.train:
            raise ValueError("train is off, but base 'scratch' knows nothing yet; set train to true, or name a base")
        for name in ("gguf_file", "revision"):
            if self.base == "scratch" and getattr(self, name) is not None:
                raise ValueError(f"{name} belongs to a base that is a folder or a hub id; set it to null")
        if self.base == "scratch" and self.scratch.tokenizer == "train" and self.chat_template is not None:
            raise ValueError(
                "chat_template belongs to a tokenizer that exists, and scratch.tokenizer 'train' makes one with a "
                "template of its own; set it to null"
            )
        return self


class GivenScorer(Frozen):
    """A scorer that exists already (docs/scorers.md): where it is, how it is read, and what a higher score means.

    `path` is a hub id or a folder; `label` names the output of a classifier of several; `template` is a Jinja file for
    a tokenizer without a chat template of its own. `unsafe`, `safe` and `prefix` are what a guard says: the words of
    its verdict, and what it writes before them.
    """

    path: Place
    kind: Literal["classifier", "labels", "safe_rlhf", "guard"]
    higher_is: Literal["harmful", "helpful"]
    revision: Place | None = None
    label: Place | None = None
    template: Place | None = None
    unsafe: Annotated[list[str], Field(min_length=1)] = ["unsafe"]
    safe: Annotated[list[str], Field(min_length=1)] = ["safe"]
    prefix: str = ""

    @model_validator(mode="after")
    def _check(self) -> GivenScorer:
        if (self.kind == "labels") != (self.label is not None):
            raise ValueError("kind labels needs a label, the name of one output, and no other kind takes one")
        if self.kind == "safe_rlhf" and self.template is not None:
            raise ValueError("kind safe_rlhf has a template of its own; remove template")
        if self.kind != "guard" and self.model_fields_set & {"unsafe", "safe", "prefix"}:
            raise ValueError("unsafe, safe and prefix are a guard's verdict; remove them, or choose kind guard")
        if self.kind == "guard" and self.higher_is != "harmful":
            raise ValueError("a guard's score is the log-odds of its unsafe words, so higher_is must be harmful")
        return self


class ScorerParams(StageParams):
    """What reward and cost model share. `backbone` is `sft`, a hub id or a folder.

    `given` scorers are served instead of a trained one, which leaves `backbone`, `training`, `lora` and the weights of
    the loss unused. `spread` weighs their disagreement: it lowers a reward and raises a cost. `cut_share` of the
    training pairs have their answers cut, so that the scorer can read an answer that did not end.
    """

    seed: Seed
    given: Annotated[list[GivenScorer], Field(min_length=1)] | None
    spread: NonNegative
    backbone: Place
    cut_share: Share
    training: TrainingParams
    lora: LoraParams
    score_regularisation: NonNegative

    @model_validator(mode="after")
    def _check(self) -> ScorerParams:
        if self.given is not None and self.backbone != "sft":
            raise ValueError("given scorers are not trained, so backbone must be sft, which nothing reads then")
        if self.spread > 0 and len(self.given or ()) < 2:
            raise ValueError("spread weighs how far several given scorers differ; give two or more, or set it to 0")
        return self


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

    seed: Seed
    max_new_tokens: Count
    samples_per_prompt: Two
    pairs: Count | None


class DualInitParams(StageParams):
    """The dual of the pool."""

    section = "dual_init"
    shared = {
        "seed": "seed",
        "beta": "beta",
        "pessimism": "pessimism",
        "limit": "constraint.limit",
        "delta": "constraint.delta",
        "power": "constraint.power",
        "also": "constraint.also",
        "certify_prompts": "certify.prompts",
        "certify_samples": "certify.samples_per_prompt",
    }

    seed: Seed
    beta: Positive
    pessimism: PessimismParams
    limit: Number
    delta: Annotated[float, Field(gt=0, lt=0.5)]
    power: Annotated[float, Field(ge=0.5, lt=1)] | None
    also: dict[Name, ConstraintSpec]
    certify_prompts: Annotated[int, Field(ge=2, le=MOST)]
    certify_samples: Few
    lambda_max: Positive
    grid: Annotated[list[NonNegative], Field(min_length=2)]
    betas: list[Positive]
    bootstrap: Annotated[int, Field(ge=20, le=100_000)]
    min_ess: Positive
    cvar_level: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _check(self) -> DualInitParams:
        for key in ("grid", "betas"):
            values = getattr(self, key)
            if sorted(set(values)) != values:
                raise ValueError(f"{key} must increase and hold no value twice")
        return self


class RewardRun(Frozen):
    """One DPO on helpfulness: from which policy, by which loss, with SafeDPO's offset and MODPO's margin policy.

    `reference` and `margin` are folders under models/: `sft`, or a run of `safety_dpo` or `safety_path`, for a margin
    one of plain DPO from `sft`. `margin: sft` means no margin. `clip` bounds the implicit rewards, in units of reward;
    it goes with neither offset nor margin, which stand in the reference column and would be bounded too.
    """

    reference: Model
    loss_type: LossType
    clip: Positive | None
    safe_offset: NonNegative | None
    margin: Model
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

    seed: Seed
    beta: Positive
    runs: dict[RunName, RewardRun]
    training: TrainingParams
    lora: LoraParams


class SafetySpec(Frozen):
    """How a safety DPO is trained: from which policy, by which loss.

    `reference` is a folder under models/: `sft` or a run of `reward_dpo`. `clip` bounds the implicit rewards, in units
    of cost. A search that starts from it keeps loss and clip.
    """

    reference: Model
    loss_type: LossType
    clip: Positive | None


class SafetyRun(SafetySpec):
    """One safety DPO: `lam` is `dual`, `stock` or a number, and is multiplied by `factor`."""

    lam: Solved | Positive
    factor: Positive


class SafetyParams(StageParams):
    """What the stages that train on safety preferences share."""

    seed: Seed
    beta: Positive
    training: TrainingParams
    lora: LoraParams


class SafetyDpoParams(SafetyParams):
    """Safety DPO (SACPO step 2, PD-DPO phase 2): coefficient beta / lambda to its reference."""

    section = "safety_dpo"
    shared = {"seed": "seed", "beta": "beta"}

    runs: dict[RunName, SafetyRun]
    lambda_min: Positive


class LagrangianSpec(Frozen):
    """How a Lagrangian is trained: learning rate and steps (null takes the section's), and inner loss.

    A search that starts from such a policy keeps learning rate and loss; its trainings have steps of their own.
    """

    learning_rate: Positive | None
    max_steps: Count | None = None
    inner: InnerParams


class LagrangianRun(LagrangianSpec):
    """One Lagrangian DPO: its multiplier (`dual`, `stock` or a number), scores and pairs.

    `reward` and `cost` are folders under models/: the scorers (`reward_model`, `cost_model`), or policies whose
    log-ratios stand in for them (`reward_dpo/NAME`, `safety_dpo/NAME`).
    """

    lam: Solved | NonNegative
    reward: Model
    cost: Model
    data: Literal["pairs", "pool"]

    @property
    def implicit(self) -> bool:
        """Whether a policy stands in for a scorer."""
        return (self.reward, self.cost) != ("reward_model", "cost_model")


class LagrangianParams(StageParams):
    """What the stages that train a Lagrangian share."""

    seed: Seed
    beta: Positive
    pessimism: PessimismParams
    training: TrainingParams
    lora: LoraParams


class LagrangianDpoParams(LagrangianParams):
    """Lagrangian DPO (the inner problem of C-DPO and MoCAN) at a fixed multiplier."""

    section = "lagrangian_dpo"
    shared = {"seed": "seed", "beta": "beta", "pessimism": "pessimism"}

    runs: dict[RunName, LagrangianRun]


class LambdaPathRun(LagrangianSpec):
    """One policy of the path: its multiplier, and the policy that its training goes on from.

    `begin` is a folder under models/: `sft`, or another run of `lambda_path`. The reference is pi_ref either way.
    """

    lam: NonNegative
    begin: Model


class LambdaPathParams(LagrangianParams):
    """Our own Lagrangian trainings at multipliers that no limit has a say in."""

    section = "lambda_path"
    shared = {"seed": "seed", "beta": "beta", "pessimism": "pessimism"}

    runs: dict[RunName, LambdaPathRun]


class SafetyPathRun(SafetySpec):
    """One safety DPO at the multiplier `lam`, a number."""

    lam: Positive


class SafetyPathParams(SafetyParams):
    """Safety DPO at multipliers that no scorer and no limit has a say in."""

    section = "safety_path"
    shared = {"seed": "seed", "beta": "beta"}

    runs: dict[RunName, SafetyPathRun]


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

    prompts: Annotated[int, Field(ge=2, le=MOST)]
    labels: Few
    smoothing: Positive
    source: Literal["oracle", "cost_model", "cost_sign", "file"]
    folder: Inside


class OnlineParams(Frozen):
    """Rounds of O-PD-DPO (see `dualign.search.online`): who compares the fresh answers, and the bonuses.

    `folder` is where files for people go (labels `file`); `retrain_reward` goes on training pi_r in every round;
    `ridge` is gamma in squared units of the features; a scale is the mean gap of a bonus within an offline pair before
    the first round, in units of reward and of cost; `dimension` projects the features, null keeps them.
    """

    labels: Literal["oracle", "models", "file"]
    folder: Inside
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
    start: Model
    reference: Model
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

    policy: Model
    partner: Model
    fallback: Model
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
    prompts: Annotated[int, Field(ge=5, le=MOST)]
    votes: Few
    limit: Number | None
    folder: Inside

    @model_validator(mode="after")
    def _check(self) -> LabelParams:
        if self.source == "file" and not (self.limit is not None and 0 < self.limit < 1):
            raise ValueError(
                "limit must be a share between 0 and 1 where people vote: of answers that they call unsafe"
            )
        return self


class ScreenParams(Frozen):
    """How a certificate chooses the weights that it tests, on prompts of the search (see `dualign.screening`).

    `samples_per_prompt` answers to each of `prompts` search prompts at each of a row's weights say where about `tests`
    weights between them are to stand. With `reweigh` one of these draws answers for all, where that is exact.
    """

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
        "support_share": "pessimism.share",
        "max_new_tokens": "generation.max_new_tokens",
    }

    seed: Seed
    beta: Positive
    limit: Number
    also: dict[Name, ConstraintSpec]
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
        ReportParams,
    )
}

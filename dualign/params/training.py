"""Params of reward_dpo, safety_dpo, lagrangian_dpo and the two paths, which train policies."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dualign.core.names import Model, RunName, Solved
from dualign.params.base import (
    Count,
    Frozen,
    LoraParams,
    NonNegative,
    PessimismParams,
    Positive,
    Seed,
    Share,
    StageParams,
    TrainingParams,
)

#: The keys of `dualign.training.pair_losses.PAIR_LOSSES`; those of its losses that tilt, whose
#: minimiser on pairs that a score ranks is the reference tilted by that score, so that its
#: log-ratios are a score, its steps add up and its policies can be merged; the options of each.
LossType = Literal["dpo", "ipo", "kto", "robust", "simpo"]
TILTING: tuple[LossType, ...] = ("dpo", "robust")
LOSS_OPTIONS: dict[LossType, tuple[str, ...]] = {
    "dpo": ("clip",),
    "ipo": ("clip",),
    "kto": ("clip",),
    "robust": ("clip", "epsilon"),
    "simpo": ("gamma",),
}
#: An option that a loss may do without.
_OPTIONAL = ("clip",)


class PairLossParams(Frozen):
    """The pair loss of a pairwise training (see `dualign.math.losses`).

    `normalised` divides the labels' score and the pairwise coefficient by 1 + lambda. `control` is
    the share of the likelihood term's control variate, which takes its noise and not its gradient.
    """

    labels: Literal["soft", "bernoulli"]
    normalised: bool
    anchor: NonNegative
    nll: NonNegative
    control: Share = 0.0

    @model_validator(mode="after")
    def _controls_a_likelihood(self) -> PairLossParams:
        if self.control > 0 and self.nll == 0:
            raise ValueError(
                f"control {self.control} steadies the likelihood term, whose weight nll is 0; leave"
                " it out, or set nll above 0"
            )
        return self


class LossSpec(Frozen):
    """A pair loss and its options (docs/methods.md), null where the loss has none of that name.

    `clip` bounds the implicit rewards, in units of what the pairs rank; `epsilon` is the share of
    labels that are expected to be wrong, `gamma` SimPO's target margin of the logit."""

    loss_type: LossType
    clip: Positive | None
    epsilon: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    gamma: NonNegative | None = None

    @model_validator(mode="after")
    def _check_options(self) -> LossSpec:
        own = LOSS_OPTIONS[self.loss_type]
        for name in LOSS_FIELDS[1:]:
            given = getattr(self, name) is not None
            if given and name not in own:
                fit = [loss for loss, options in LOSS_OPTIONS.items() if name in options]
                raise ValueError(
                    f"{name} does not go with loss_type {self.loss_type}; leave it out, or set"
                    f" loss_type to {' or '.join(fit)}"
                )
            if not given and name in own and name not in _OPTIONAL:
                raise ValueError(f"{name} is missing, which loss_type {self.loss_type} needs")
        return self


#: `loss_type` and the options: what a training takes of a run, and a search of its start.
LOSS_FIELDS = tuple(LossSpec.model_fields)


class RewardRun(LossSpec):
    """One DPO on helpfulness: its start, its loss, SafeDPO's offset and MODPO's margin policy.

    `reference` and `margin` are folders under models/: `sft`, or a run of `safety_dpo` or
    `safety_path`, for a margin one of plain DPO from `sft`. `margin: sft` means no margin. `clip`
    goes with neither offset nor margin, which stand in the reference column and would be bounded
    too."""

    reference: Model
    safe_offset: NonNegative | None
    margin: Model
    margin_weight: Positive

    @model_validator(mode="after")
    def _check(self) -> RewardRun:
        if self.safe_offset is not None and self.loss_type != "dpo":
            raise ValueError(
                f"safe_offset (SafeDPO) needs loss_type dpo, not {self.loss_type}; set loss_type to"
                " dpo, or safe_offset to null"
            )
        if self.margin != "sft" and (self.loss_type != "dpo" or self.safe_offset is not None):
            raise ValueError(
                f"margin {self.margin!r} (MODPO) needs loss_type dpo and safe_offset null; set"
                " these, or margin to sft"
            )
        if self.clip is not None and (self.margin != "sft" or self.safe_offset is not None):
            raise ValueError(
                "clip goes with neither safe_offset nor margin; set clip to null, or safe_offset to"
                " null and margin to sft"
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


class SafetySpec(LossSpec):
    """How a safety DPO is trained: from which policy, by which loss.

    `reference` is a folder under models/: `sft` or a run of `reward_dpo`. A search that starts from
    it keeps the loss and its options."""

    reference: Model


class SafetyRun(SafetySpec):
    """One safety DPO: `lam` is `dual`, `margin` or a number, and is multiplied by `factor`."""

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
    """How a Lagrangian is trained: learning rate, steps (null: the section's), pair_loss loss.

    Of `soup` trainings that differ in the order of their rows, the mean of the weights is kept. A
    search that starts from such a policy keeps learning rate and loss; its trainings have steps of
    their own."""

    learning_rate: Positive | None
    max_steps: Count | None = None
    soup: Count = 1
    pair_loss: PairLossParams


class RefreshParams(Frozen):
    """A second training of a run, on the policy's own answers to the first `prompts` of the pool:
    they hold what the pool does not, text that no loss on the pool holds down.

    `learning_rate` null takes the section's."""

    prompts: Count
    samples_per_prompt: Annotated[int, Field(ge=2)]
    max_steps: Count
    learning_rate: Positive | None


class LagrangianRun(LagrangianSpec):
    """One Lagrangian DPO: its multiplier (`dual`, `margin` or a number), scores and pairs.

    `reward` and `cost` are folders under models/: the scorers (`reward_model`, `cost_model`), or
    policies whose log-ratios stand in for them (`reward_dpo/NAME`, `safety_dpo/NAME`). `refresh`
    null trains once."""

    lam: Solved | NonNegative
    reward: Model
    cost: Model
    data: Literal["pairs", "pool"]
    refresh: RefreshParams | None = None

    @model_validator(mode="after")
    def _controlled_on_the_pool(self) -> LagrangianRun:
        if self.pair_loss.control > 0 and self.data != "pool":
            raise ValueError(
                f"pair_loss.control {self.pair_loss.control} needs answers that a known policy"
                " drew; set data to pool, or leave control out"
            )
        return self

    @model_validator(mode="after")
    def _refreshed_on_the_pool(self) -> LagrangianRun:
        scored = (self.data, self.reward, self.cost) == ("pool", "reward_model", "cost_model")
        if self.refresh is not None and not scored:
            raise ValueError(
                "refresh adds answers to the pool and has them scored; it needs data: pool, reward:"
                " reward_model and cost: cost_model, or set it to null"
            )
        return self


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
    shared = {
        "seed": "seed",
        "beta": "beta",
        "pessimism": "pessimism",
        "max_new_tokens": "generation.max_new_tokens",
    }

    max_new_tokens: Count
    runs: dict[RunName, LagrangianRun]


class LambdaPathRun(LagrangianSpec):
    """One policy of the path: its multiplier, and the policy that its training goes on from.

    `begin` is a folder under models/: `sft`, or another run of `lambda_path`. The reference is
    pi_ref either way."""

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

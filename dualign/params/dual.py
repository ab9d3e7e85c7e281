"""Params of dual_init, and the limits beside the one on cost."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dualign.core.names import Name, Pattern
from dualign.params.base import (
    MOST,
    SHARES,
    Few,
    Frozen,
    NonNegative,
    Number,
    PessimismParams,
    Positive,
    Quantity,
    Seed,
    StageParams,
)


class ConstraintSpec(Frozen):
    """An additional constraint on the mean of a quantity; see `dualign.math.constraints`.

    `level` belongs to `cvar`, the mean cost of the worst 1 - level of the answers. `prompts` is a
    regular expression: the limit is on those prompts in whose last user text it is found; null is
    all."""

    quantity: Quantity
    limit: Number
    level: Annotated[float, Field(gt=0, lt=1)] | None = None
    prompts: Pattern | None = None

    @model_validator(mode="after")
    def _check(self) -> ConstraintSpec:
        if (self.quantity == "cvar") != (self.level is not None):
            raise ValueError(
                "level goes with quantity cvar and with no other; set it to 0.9, say, or to null"
            )
        if self.quantity in SHARES and not 0 < self.limit < 1:
            raise ValueError(
                f"the limit of {self.quantity} is a share between 0 and 1, not {self.limit:g}; give"
                " such a share"
            )
        if self.quantity == "length" and self.limit <= 0:
            raise ValueError(
                f"the limit of length is in tokens and above 0, not {self.limit:g}; give such a"
                " number"
            )
        return self


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
        "additional": "constraint.additional",
        "certify_prompts": "certify.prompts",
        "certify_samples": "certify.samples_per_prompt",
    }

    seed: Seed
    beta: Positive
    pessimism: PessimismParams
    limit: Number
    delta: Annotated[float, Field(gt=0, lt=0.5)]
    power: Annotated[float, Field(ge=0.5, lt=1)] | None
    additional: dict[Name, ConstraintSpec]
    certify_prompts: Annotated[int, Field(ge=2, le=MOST)]
    certify_samples: Few
    lambda_max: Positive
    grid: Annotated[list[NonNegative], Field(min_length=2)]
    betas: list[Positive]
    bootstrap: Annotated[int, Field(ge=20, le=100_000)]
    jackknife: bool
    min_ess: Positive
    cvar_level: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _check(self) -> DualInitParams:
        for key in ("grid", "betas"):
            values = getattr(self, key)
            if sorted(set(values)) != values:
                raise ValueError(f"{key} must increase and hold no value twice")
        return self

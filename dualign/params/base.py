"""What sections are made of: types of numbers, frozen bases, pieces of several sections."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: What numpy takes ends at 2**32 - 1; the other half is for seeds that are derived by adding to
#: this one.
Seed = Annotated[int, Field(ge=0, lt=2**31)]
#: No number here is larger: more is a slip of the pen that ends in an overflow, or in no time that
#: anybody has.
MOST = 10**9
Number = Annotated[float, Field(ge=-MOST, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=MOST)]
NonNegative = Annotated[float, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=1, le=MOST)]
#: A count of what costs a forward pass, a file or a thread each.
Few = Annotated[int, Field(ge=1, le=10_000)]
Two = Annotated[int, Field(ge=2, le=10_000)]
Share = Annotated[float, Field(ge=0, le=1)]
#: The address of a server, in which no user, key or query stands.
ADDRESS = re.compile(r"https?://[^/?#@]+(/[^?#@]*)?")

#: Below this, dividing by the temperature overflows.
COLDEST = 0.01

NO_ADDRESS = "an address is http(s)://HOST:PORT/v1, without user, key or query"
#: Quantities that are 0 or 1, so that their mean is a share of the answers.
SHARES = ("p_unsafe", "unended")
#: Params that have a row for each instance of a stage.
FANS = ("methods", "runs", "policies")
TrackerName = Literal["wandb", "mlflow", "tensorboard", "trackio", "dvclive"]
EngineName = Literal["generate", "refill", "continuous", "vllm"]
Quantity = Literal["cost", "p_unsafe", "cvar", "length", "unended"]


class Frozen(BaseModel):
    """A section: immutable, strict types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DecodingParams(Frozen):
    """How answers are drawn; by default from the policy itself.

    `temperature` 0 takes the likeliest token each time. `top_p` leaves of each token's distribution
    the likeliest tokens that hold this probability together."""

    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _check_decoding(self) -> Self:
        if 0 < self.temperature < COLDEST:
            raise ValueError(f"temperature is 0, which is greedy, or at least {COLDEST}")
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError("top_p must be 1 at temperature 0, which takes the likeliest token")
        return self


class StageParams(Frozen):
    """The params of a stage: `section` is its key, `shared` maps fields to keys outside it, `fans`
    are the tables of which each instance of the stage reads its own row alone.
    """

    section: ClassVar[str]
    shared: ClassVar[dict[str, str]] = {}
    fans: ClassVar[tuple[str, ...]] = FANS


class TrainingParams(Frozen):
    """One training run. `batch_size` counts rows or pairs per optimiser step over all devices."""

    epochs: Annotated[float, Field(gt=0, le=10_000)]
    batch_size: Annotated[int, Field(ge=1, le=10**6)]
    optimiser: Literal["adamw", "muon"]
    learning_rate: Positive
    adam_beta2: Annotated[float, Field(gt=0, lt=1)]
    warmup: Annotated[float, Field(ge=0, lt=1)]
    schedule: Literal["linear", "cosine", "constant"]
    weight_decay: NonNegative
    max_length: Count
    max_steps: Count | None


class LoraParams(Frozen):
    """Low-rank adapters; `rank` 0 trains all weights. `quantise` puts the base that they are on,
    models/sft, into 4 bits.
    """

    rank: Annotated[int, Field(ge=0, le=10_000)]
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: list[str] | Literal["all-linear"]
    quantise: Literal["nf4"] | None


class PessimismParams(Frozen):
    """Scores off the support of the scorers' data (see `dualign.scoring.support`).

    An answer is beyond it where it surprises pi_ref more than all but a `share` of the answers of
    held-out pairs do. There `reward` is taken off its reward and `cost` put on its cost, in
    within-prompt standard deviations of the pool."""

    share: Annotated[float, Field(gt=0, lt=0.5)]
    reward: NonNegative
    cost: NonNegative


class Resources(Frozen):
    """How to run on this machine; DVC does not track it.

    `precision` is what matrices are multiplied in: `bf16` keeps weights that are trained in fp32,
    `pure_bf16` does not. A stage that trains, samples or scores runs in `processes` on each of
    `nodes` machines, `auto` being one for each GPU; `distributed` says whether each holds the whole
    model in training (`ddp`) or a shard of it (`fsdp2`). `engine` draws answers; vLLM runs in this
    Python, in that of `engine_python`, or behind `engine_url`. `report_to` names the trackers that
    are told of a stage while it runs, `peak_tflops` what one device can do, against which MFU is
    told."""

    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "pure_bf16"]
    micro_batch_size: Count | None
    sampling_batch_size: Count
    scoring_batch_size: Count
    gradient_checkpointing: bool
    checkpoint_steps: Count
    log_steps: Count
    threads: Few | None
    processes: Few | Literal["auto"]
    nodes: Few
    distributed: Literal["ddp", "fsdp2"]
    engine: EngineName
    engine_url: str | None
    engine_python: str | None
    report_to: list[TrackerName]
    peak_tflops: Positive | None

    @model_validator(mode="after")
    def _one_vllm(self) -> Self:
        if self.engine != "vllm" and (self.engine_url or self.engine_python):
            raise ValueError("engine_url and engine_python are of engine vllm; set them to null")
        if self.engine_url and self.engine_python:
            raise ValueError("engine_url and engine_python exclude each other; set one to null")
        if self.engine_url is not None and not ADDRESS.fullmatch(self.engine_url):
            raise ValueError(f"engine_url: {NO_ADDRESS}")
        return self

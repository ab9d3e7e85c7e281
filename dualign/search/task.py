"""What a search on models is given: row, params, prompts, and the folders that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dualign.math.constraints import Price
from dualign.math.losses import lagrangian_scale
from dualign.methods import Plan
from dualign.params.base import Resources
from dualign.params.search import DualSearchParams
from dualign.params.training import LossSpec, PairLossParams
from dualign.search.start import PLAIN, TrainedPolicy
from dualign.training.pairwise import PairLossConfig


@dataclass(frozen=True)
class Inputs:
    """Folders that a search reads."""

    models: Path = Path("models")
    prepared: Path = Path("data/prepared")
    scored: Path = Path("data/scored")


@dataclass(frozen=True)
class PairLosses:
    """The pair losses that a search goes on with, those of its start and of pi_r.

    `lagrangian` holds the weights of the Lagrangian loss; None means safety pairs at coefficient
    beta / lambda, by the loss `safety`. `reward_clip` bounds the implicit rewards of pi_r where a
    round trains it."""

    lagrangian: PairLossParams | None = None
    safety: LossSpec = PLAIN
    reward_clip: float | None = None

    @classmethod
    def of(cls, plan: Plan, start: TrainedPolicy, reference: TrainedPolicy) -> PairLosses:
        """As the start and the reference of a row were trained."""
        weights = start.pair_loss if plan.method.inner == "lagrangian" else None
        return cls(weights, start.loss_spec, reference.loss_spec.clip)

    def at(self, lam: float, beta: float) -> PairLossConfig:
        """The loss at a multiplier and KL weight."""
        if self.lagrangian is None:
            return PairLossConfig.of(self.safety, beta / lam, beta)
        return PairLossConfig.lagrangian(self.lagrangian, lam, beta)

    def scale(self, lam: float) -> float:
        """What multiplies r - lambda c in a label."""
        normalised = self.lagrangian is not None and self.lagrangian.normalised
        return lagrangian_scale(lam, normalised)


@dataclass(frozen=True, eq=False)
class SearchTask:
    """A search on models. Additional constraints are measured on every policy, their `prices`
    charged to rewards that a loss reads; a step has a folder in `scratch`."""

    plan: Plan
    params: DualSearchParams
    resources: Resources
    prompts: pd.DataFrame
    scratch: Path
    inputs: Inputs = Inputs()
    losses: PairLosses = PairLosses()
    prices: Sequence[Price] = ()

    @property
    def start(self) -> Path:
        """The folder of the policy at the first multiplier."""
        return self.inputs.models / self.plan.start

    @property
    def reference(self) -> Path:
        """The folder of the policy that trainings begin at, and that the start is merged with."""
        return self.inputs.models / self.plan.reference

    def folder(self, step: int) -> Path:
        """The folder of a step, made where it is not there."""
        folder = self.scratch / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def helpful(self, step: int) -> Path:
        """pi_r at a step: its round's own, or the row's reference."""
        own = self.folder(step) / "helpful"
        return own if own.is_dir() else self.reference

"""What a search takes over from the stages before it, and which starts it refuses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from dualign.core.errors import DataError, ParamsError
from dualign.core.records import SolvedDual, as_row, read_record, read_trained, took_prices
from dualign.math.constraints import Price
from dualign.methods import Plan
from dualign.params.search import DualSearchParams
from dualign.params.training import LOSS_FIELDS, LossSpec, PairLossParams

log = logging.getLogger(__name__)

#: The loss of a policy whose stage names none.
PLAIN = LossSpec(loss_type="dpo", clip=None)
#: The scorers that a training takes its scores from, unless it takes log-ratios of policies.
_SCORERS = ("reward_model", "cost_model")


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy of an earlier stage as that describes it; None where it has no such thing.

    `lam` is the multiplier it was trained at, taken from `lam_from`; `reward` and `cost` are what
    scored its pairs, `data` which these were, `trainings` how many made it. The other fields are
    those of its training."""

    lam: float | None = None
    lam_from: str | None = None
    reference: str | None = None
    data: str | None = None
    reward: str = _SCORERS[0]
    cost: str = _SCORERS[1]
    loss_spec: LossSpec = PLAIN
    pair_loss: PairLossParams | None = None
    learning_rate: float | None = None
    trainings: int = 1

    @classmethod
    def read(cls, metrics: Path, folder: str) -> TrainedPolicy:
        """What the stage that wrote models/FOLDER measured, in folder `metrics`.

        Raises DataError with file and key where that is missing or of another shape."""
        path = metrics / f"{folder}.json"
        measured = as_row(read_trained(metrics, folder))
        loss = {key: measured[key] for key in LOSS_FIELDS if measured.get(key) is not None}
        try:
            spec = LossSpec(**{**PLAIN.model_dump(), **loss})
        except ValidationError as error:
            raise DataError(
                f"{path}: no pair loss of this dualign: {loss}; run the stage that wrote it again"
            ) from error
        return replace(read_record(path, cls), loss_spec=spec)

    @property
    def scores(self) -> tuple[str, str]:
        """What scored its pairs for reward and for cost."""
        return self.reward, self.cost


def check(plan: Plan, start: TrainedPolicy, reference: TrainedPolicy) -> None:
    """Refuse a start or reference trained otherwise than the method; ParamsError names the key."""
    _check_scores(plan, start)
    if plan.method.inner == "lagrangian":
        _check_data(plan, start)
    if plan.method.data == "fresh_pairs":
        _check_loss(plan, f"start: {plan.start}", start)
        _check_loss(plan, f"reference: {plan.reference}", reference)


def _check_scores(plan: Plan, start: TrainedPolicy) -> None:
    """A start on log-ratios cannot be retrained here: the tables hold the models' scores."""
    if plan.method.rule != "one_shot" and start.scores != _SCORERS:
        raise ParamsError(
            f"methods.{plan.name}.rule: {plan.method.rule!r} would train on other scores than"
            f" {plan.start}, which took {start.reward} and {start.cost}; only one_shot goes with it"
        )


def _check_data(plan: Plan, start: TrainedPolicy) -> None:
    """A Lagrangian start was trained on the method's data, by policies' scores for PeCAN alone."""
    method = plan.method.name
    data = "pool" if plan.method.data == "pool" else "pairs"
    if start.data != data:
        raise ParamsError(
            f"methods.{plan.name}.start: {plan.start} was trained on data {start.data!r}, but"
            f" {method} trains on {data!r}; name a run of lagrangian_dpo with data: {data}"
        )
    implicit = start.scores != _SCORERS
    if plan.method.data == "scored_pairs" and implicit != (method == "pecan"):
        wanted = "reward and cost from policies" if method == "pecan" else " and ".join(_SCORERS)
        raise ParamsError(
            f"methods.{plan.name}.start: {plan.start} took the scores of {start.reward} and"
            f" {start.cost}, which is not {method}; name a run of lagrangian_dpo with {wanted}"
        )


def _check_loss(plan: Plan, named: str, policy: TrainedPolicy) -> None:
    """Rounds add rewards and bonuses, which takes DPO; `named` is the row's key and value."""
    if policy.loss_spec.loss_type != "dpo":
        raise ParamsError(
            f"methods.{plan.name}.{named} was trained by {policy.loss_spec.loss_type}, but"
            f" {plan.method.name} goes on by dpo; name a run with loss_type dpo"
        )


def as_started(plan: Plan, start: TrainedPolicy, params: DualSearchParams) -> DualSearchParams:
    """The params with the start's learning rate, where trainings begin at the reference too."""
    if plan.method.inner != "lagrangian" or plan.method.warm:
        return params
    update = {"learning_rate": start.learning_rate}
    return params.model_copy(update={"training": params.training.model_copy(update=update)})


def goal(plan: Plan, solved: SolvedDual) -> tuple[float, float | None]:
    """The pool's multiplier and the cost to steer to (None: the limit), by the row's target."""
    if plan.method.target == "limit":
        return solved.lam, None
    return solved.lam_margin, solved.target


def trainings(plan: Plan, start: TrainedPolicy, reference: TrainedPolicy) -> int:
    """Policies trained for the start: it, all of a soup, its reference, those that score pairs."""
    needed = dict.fromkeys(start.scores, 1)
    needed |= {plan.reference: reference.trainings, plan.start: start.trainings}
    return sum(n for folder, n in needed.items() if "_dpo" in folder or "_path/" in folder)


def steerable(plan: Plan, prices: Sequence[Price]) -> list[Price]:
    """The pool's prices of additional constraints, 0 for a search whose loss reads no scores.

    Such a search has no way to steer to them, but they decide which of its policies are feasible.
    """
    if prices and plan.method.inner != "lagrangian":
        log.warning(
            "methods.%s does not train on scores of a table: no price steers it to"
            " constraint.additional",
            plan.name,
        )
        return [replace(price, lam=0.0) for price in prices]
    return list(prices)


def start_prices(
    plan: Plan, start: TrainedPolicy, prices: Sequence[Price], solved: Path
) -> tuple[float, ...]:
    """The prices that Newton's rule begins at: those `solved`, or 0 where the start took none."""
    if plan.method.rule != "newton":
        return ()
    paid = took_prices(start.lam_from, solved)
    return tuple(price.lam if paid else 0.0 for price in prices)

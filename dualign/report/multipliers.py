"""The multiplier that a policy was told: by its training, its search, or its certified merge.

The optimum at lambda is the tilt (r - lambda c) / beta of the reference policy. A merge (1 - q) a +
q b of two such policies is one too, to first order, at (1 - q) lambda_a + q lambda_b (P-SACPO,
2404.11049): log pi is nearly linear in the weights between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dualign.core.records import (
    Certified,
    LagrangianMetrics,
    ReferenceMetrics,
    SafetyMetrics,
    SearchResult,
    SolvedDual,
    Trained,
    read_optional_record,
    read_trained,
    took_prices,
)
from dualign.params.training import TILTING

#: The pool's dual, by the name that trainings at its multiplier give it.
DUAL = Path("data/dual/dual.json")


@dataclass(frozen=True)
class Multiplier:
    """What a policy was told, and the weight of the merge that it is.

    `lam` is None where there is no such tilt: a mixture, the reference, DPO on safety alone, a loss
    that does not tilt, SafeDPO, MODPO, and a merge with one of them. `tilts`: whether it is one
    model at KL weight beta, no mixture or naive merge, and so may be merged on. `on_curve`: whether
    the predicted frontier at `lam` is about this policy; besides, the prices of additional
    constraints must be those of the curve, not corrected by a search or taken in another share by a
    merge. `priced`: it was trained at any."""

    lam: float | None = None
    merge_weight: float | None = None
    on_curve: bool = True
    tilts: bool = True
    priced: bool = False


def solved_dual(root: Path) -> SolvedDual | None:
    """The pool's dual; None where it was not solved."""
    return read_optional_record(root / DUAL, SolvedDual)


def search_of(root: Path, folder: str) -> SearchResult | None:
    """How the search of the policy in a folder of models/ went; None where no search made it."""
    path = root / "reports/search" / f"{Path(folder).name}.json"
    return read_optional_record(path, SearchResult) if folder.startswith("aligned/") else None


def nominal_multiplier(
    root: Path, folder: str, certificates: Mapping[str, Certified]
) -> Multiplier:
    """The nominal multiplier of a folder of models/."""
    kind, _, name = folder.partition("/")
    if kind == "certified":
        return _certified(root, certificates.get(name))
    if kind == "aligned":
        return _searched(search_of(root, folder), _prices(root))
    metrics = root / "reports/metrics"
    if not (metrics / f"{folder}.json").is_file():
        return Multiplier()
    trained = read_trained(metrics, folder)
    return _priced(Multiplier(_trained(trained)), _taken(trained, _prices(root)), _prices(root))


def merged_multiplier(q: float, lam: float | None, partner: float | None) -> float | None:
    """(1 - q) lambda_partner + q lambda; the policy's own at weight 1, None if unknown."""
    if q == 1.0:
        return lam
    return None if lam is None or partner is None else (1 - q) * partner + q * lam


def _certified(root: Path, certificate: Certified | None) -> Multiplier:
    """That of the returned candidate."""
    test = certificate.passed if certificate else None
    if test is None:
        return Multiplier()
    policy = nominal_multiplier(root, test.policy, {})
    partner = nominal_multiplier(root, test.partner, {})
    if test.q == 1.0:
        return policy
    priced = policy.priced or partner.priced
    if not (policy.tilts and partner.tilts):
        return Multiplier(None, test.q, on_curve=False, tilts=False, priced=priced)
    lam = merged_multiplier(test.q, policy.lam, partner.lam)
    return Multiplier(lam, test.q, on_curve=not any(_prices(root)), priced=priced)


def _searched(search: SearchResult | None, prices: list[float]) -> Multiplier:
    if search is None:
        return Multiplier()
    chosen = search.steps[search.chosen]
    tilts = search.returns != "mixture" and not search.naive
    share = 1.0 if chosen.q is None else chosen.q  # what a merge is with has none
    taken = chosen.prices or [share * search.priced * price for price in prices]
    return _priced(Multiplier(chosen.lam, chosen.q, tilts, tilts), taken, prices)


def _priced(found: Multiplier, taken: list[float], prices: list[float]) -> Multiplier:
    """The multiplier of a policy that took these prices, where the curve has `prices`."""
    return replace(found, on_curve=found.on_curve and taken == prices, priced=any(taken))


def _taken(policy: Trained, prices: list[float]) -> list[float]:
    """The prices that a training took: the pool's beside the pool's multiplier, else none."""
    paid = isinstance(policy, LagrangianMetrics) and took_prices(policy.lam_from, DUAL)
    return [paid * price for price in prices]


def _prices(root: Path) -> list[float]:
    """The pool's prices of additional constraints, which the predicted frontier includes."""
    dual = solved_dual(root)
    return [price.lam for price in dual.prices] if dual else []


def _trained(policy: Trained) -> float | None:
    """The multiplier of a policy that no search made, from the metrics of its training."""
    if isinstance(policy, LagrangianMetrics):
        return policy.lam
    if isinstance(policy, ReferenceMetrics):
        return None
    if policy.loss_type not in TILTING or policy.clip is not None:
        return None
    if isinstance(policy, SafetyMetrics):
        return policy.lam if policy.reference.startswith("reward_dpo/") else None
    helpful = policy.reference == "sft" == policy.margin and policy.safe_offset is None
    return 0.0 if helpful else None

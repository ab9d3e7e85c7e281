"""What trainings reached of what they were told, and what the pool predicted of what came of it.

Pure functions of what other stages wrote: a tilt as `dualign.measure.tilt` reads it off a policy, the rows of
data/dual/frontier.json, and the prices in data/dual/dual.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dualign.report.words import number, percent

Row = dict[str, Any]

#: R^2 below which a policy is called no tilt: less than half of it is one.
TILTED = 0.5


def predicted(frontier: Sequence[Mapping[str, Any]], lam: float | None) -> dict[str, dict[str, float | None]] | None:
    """Cost and reward that the pool predicts at a multiplier, each as {"mean", "low", "high"}.

    Linear in lambda between the two nearest rows of the frontier, estimates and bands alike; an end is None where the
    rows have no bands. None for a multiplier that is unknown or outside the rows.
    """
    rows = sorted(frontier, key=lambda row: float(row["lam"]))
    lams = [row["lam"] for row in rows]
    if lam is None or not rows or not lams[0] <= lam <= lams[-1]:
        return None

    def at(key: str) -> float | None:
        values = [row[key] for row in rows if row.get(key) is not None]
        return float(np.interp(lam, lams, values)) if len(values) == len(rows) else None

    return {
        name: {"mean": at(name), "low": at(f"{name}_low"), "high": at(f"{name}_high")} for name in ("cost", "reward")
    }


def is_tilt(tilt: Mapping[str, Any]) -> bool:
    """Whether reward, cost and length explain at least half of a policy's log-ratios, and it tilts towards reward."""
    return tilt.get("lam_eff") is not None and (tilt.get("r2") or 0.0) >= TILTED


def tilt_in_words(lam: float | None, tilt: Mapping[str, Any] | None) -> str:
    """What a policy was told and what it reached, in a sentence or two; empty where its tilt was not read."""
    if not tilt:
        return ""
    told = "It" if lam is None else f"Told λ {number(lam)}, it"
    if tilt.get("r2") is None:
        return f"{told} stayed the reference policy."
    share = percent(tilt["r2"])
    if tilt["r2"] < TILTED:
        return f"{told} became no tilt: reward, cost and length explain only {share} of it."
    if tilt.get("lam_eff") is None:
        return f"{told} does not tilt towards reward. Reward, cost and length explain {share} of it."
    reached = f"{told} reached {_with_error(tilt, 'lam_eff')} at β {number(tilt['beta_eff'])}"
    return f"{reached}, and {number(tilt['length_slope'])} nats a token of length. {share} of it is such a tilt."


def _with_error(tilt: Mapping[str, Any], key: str) -> str:
    error = tilt.get(f"{key}_se")
    return number(tilt[key]) + ("" if error is None else f" ± {number(error)}")


def further_limits(prices: Iterable[Mapping[str, Any]], rows: Sequence[Row]) -> list[Row]:
    """The limits of `constraint.also` in their order: name, what is limited, limit, price `lam`, `predicted` mean.

    What `dual_init` did not write is None. `rows` are those of the comparison; limits that only they know come last.
    """
    priced = {price["name"]: {**price, "what": _what(price)} for price in prices}
    unknown = {"what": "", "quantity": None, "lam": None, "predicted": None}
    others = {
        name: {"name": name, "limit": kept["limit"], **unknown} for row in rows for name, kept in row["also"].items()
    }
    return [*priced.values(), *(limit for name, limit in others.items() if name not in priced)]


def _what(price: Mapping[str, Any]) -> str:
    """The quantity that a limit is on, and the prompts that it holds for."""
    quantity = {
        "cost": "cost",
        "p_unsafe": "P(unsafe)",
        "length": "tokens",
        "cvar": f"mean cost of the worst {percent(1 - (price.get('level') or 0.0))}",
    }.get(price["quantity"], price["quantity"])
    return quantity if not price.get("prompts") else f"{quantity}, prompts with {price['prompts']}"

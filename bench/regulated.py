"""Conformal Policy Control (`bench.conformal`) on the models of a run in the embedded world, beside
its certificate.

A safe policy regulates a bold one while answers are drawn; both are those of a row of `certify`. It
is calibrated on the certify prompts by the cost model's cost, clipped to a range that the pool
shows, and judged on the evaluation's prompts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.conformal import adjusted_risk, calibrated, clipped, grid_of, regulated
from bench.world import Lab
from dualign.certify.evidence import effective_share
from dualign.core.artifacts import read_json, write_json
from dualign.core.schema import POOL, PROMPTS, by_prompt, read_table
from dualign.evaluation.against_optimum import add_truth
from dualign.evaluation.rollout import Scorers, log_ratios, roll_out
from dualign.lm.merge import merge
from dualign.lm.mixture import policy_at
from dualign.params.certify import CertifyParams, CertifyRun
from dualign.params.loading import load, load_resources

Array = np.ndarray

#: Answers to each prompt of either policy: those that losses are of, as many again for psi, and to
#: judge by.
WEIGHED = 4
JUDGED = 4
EVALUATED = 400  # prompts to judge by
DRAWS = 100  # calibration draws: certify prompts drawn again with replacement
SAFE_WEIGHT = 1.3  # the merge that serves as a safe policy near the path
FILE = "conformal.json"


@dataclass(frozen=True)
class Drawn:
    """Answers [prompts, answers] of both policies: their ratio pi_t / pi_0, and what the judges say
    of each.
    """

    ratio: Array
    cost: Array
    true_cost: Array
    true_reward: Array


def pairs(row: CertifyRun) -> dict[str, tuple[str, float, str]]:
    """The comparisons by name: the safe policy with its weight (1: itself) and the bold one,
    folders under models/.
    """
    return {
        "fallback, policy": (row.fallback, 1.0, row.policy),
        f"merge at {SAFE_WEIGHT:g}, policy": (row.policy, SAFE_WEIGHT, row.policy),
        f"merge at {SAFE_WEIGHT:g}, partner": (row.policy, SAFE_WEIGHT, row.partner),
    }


def rows_of(lab: Lab, item: str) -> list[dict[str, Any]]:
    """A row for each pair; computed once and kept in the folder of the run."""
    file = lab.folder / FILE
    if not file.is_file():
        write_json(file, [{"seed": lab.seed, **row} for row in _computed(lab, item)])
    found: list[dict[str, Any]] = read_json(file)
    return found


def _computed(lab: Lab, item: str) -> list[dict[str, Any]]:
    params = load(CertifyParams, lab.folder / "params.yaml")
    models = lab.folder / "models"
    scorers = Scorers.load(load_resources(lab.folder / "params.yaml"), models)
    row = params.runs[item]
    pool = read_table(lab.folder / "data/scored/pool.parquet", POOL)["cost"]
    bounds = float(np.floor(pool.min())), float(np.ceil(pool.max()))
    best = read_json(lab.folder / "reports/metrics/evaluate/dualign.json")["optimum"]
    found = []
    for name, (safe, weight, bold) in pairs(row).items():
        with tempfile.TemporaryDirectory() as temporary:
            folders = [models / safe, models / bold]
            if weight != 1.0:
                merge(models / row.partner, models / safe, weight, Path(temporary) / "safe")
                folders[0] = Path(temporary) / "safe"
            tables = {
                kind: both(
                    lab.folder / f"data/prepared/{kind}.parquet",
                    head,
                    count,
                    folders,
                    params,
                    scorers,
                )
                for kind, head, count in (
                    ("certify", params.prompts, 2 * WEIGHED),
                    ("eval", EVALUATED, JUDGED),
                )
            }
        found.append({"pair": name, **_judged(tables, params.limit, bounds, best)})
    return found


def both(
    file: Path, head: int, count: int, folders: list[Path], params: CertifyParams, scorers: Scorers
) -> tuple[Drawn, Drawn]:
    """`count` answers to each of the first prompts of a file, of the safe policy and of the bold
    one.
    """
    prompts = read_table(file, PROMPTS).head(head)
    policies = [policy_at(folder, scorers.resources) for folder in folders]
    found = []
    for own, other in ((0, 1), (1, 0)):
        frame = add_truth(
            roll_out(
                policies[own],
                prompts,
                scorers,
                count=count,
                max_new_tokens=params.max_new_tokens,
                seed=params.seed + 1 + own,
            )
        )
        change = (
            log_ratios(policies[other], frame, scorers)
            - (frame["logp"] - frame["logp_ref"]).to_numpy()
        )
        found.append(_drawn(frame, change if own == 0 else -change))
    return found[0], found[1]


def _drawn(frame: pd.DataFrame, log_ratio: Array) -> Drawn:
    ratio = np.exp(np.clip(log_ratio, -700, 700)).reshape(frame["prompt_id"].nunique(), -1)
    return Drawn(ratio, *(by_prompt(frame, name) for name in ("cost", "true_cost", "true_reward")))


def _judged(
    tables: Mapping[str, tuple[Drawn, Drawn]],
    limit: float,
    bounds: tuple[float, float],
    best: Mapping[str, float],
) -> dict[str, Any]:
    """The level over calibration draws, and what the policy of the calibration that was made
    does.
    """
    safe, bold = tables["certify"]
    low, high = bounds
    loss = np.clip(safe.cost[:, :WEIGHED], low, high) - low
    alpha = limit - low
    most = high - low
    ratio = safe.ratio[:, :WEIGHED]
    mixed = np.concatenate([safe.ratio[:, WEIGHED:], bold.ratio[:, :WEIGHED]], 1)
    grid = grid_of(ratio)
    made = calibrated(ratio, loss, mixed, alpha, most, grid)
    rng = np.random.default_rng(0)
    again = [rng.integers(0, len(ratio), len(ratio)) for _ in range(DRAWS)]
    chosen = [calibrated(ratio[rows], loss[rows], mixed[rows], alpha, most, grid) for rows in again]
    does = {bound: _does(tables["eval"], bound, low, high) for bound in {made, *chosen}}
    risks = np.array([does[bound]["cost"] for bound in chosen]) - limit
    way = best["reward"] - best["nearest_reward"]
    return {
        "bound": None if made is None else (made if np.isfinite(made) else "inf"),
        "mean_risk": float(risks.mean()),
        "above": float((risks > 0).mean()),
        "excess": does[made]["true_cost"] - limit,
        "share": (does[made]["true_reward"] - best["nearest_reward"]) / way,
        "price": does[made]["price"],
        "risk": (
            None if made is None else adjusted_risk(ratio, loss, mixed, made, most) + low - limit
        ),
        "answers": int(safe.ratio.size + bold.ratio[:, :WEIGHED].size),
        "effective": _effective(ratio, made),
    }


def _does(
    tables: tuple[Drawn, Drawn], bound: float | None, low: float, high: float
) -> dict[str, float]:
    """Costs, reward and price of the regulated policy on the evaluation's prompts; without a bound,
    of the safe one.
    """

    def whole(name: str) -> Array:
        return np.concatenate([getattr(part, name) for part in tables], 1)

    ratio = whole("ratio")
    reward = whole("true_reward")
    at = 0.0 if bound is None else bound
    found = regulated(ratio, np.clip(whole("cost"), low, high), reward, at)
    truth = regulated(ratio, whole("true_cost"), reward, at)
    return {
        "cost": found.loss,
        "true_cost": truth.loss,
        "true_reward": found.reward,
        "price": found.price,
    }


def _effective(ratio: Array, bound: float | None) -> float:
    """The share of calibration answers that the weights min{rho, b} leave."""
    weight = clipped(ratio, 0.0 if bound is None else bound).ravel()
    return effective_share(weight)

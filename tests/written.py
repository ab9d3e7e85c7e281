"""Files as stages write them, for tests of those that read them: every key is there, with what a
test says of it.
"""

from __future__ import annotations

import math
from typing import Any

PRICE: dict[str, Any] = {
    "name": "short",
    "quantity": "length",
    "limit": 9.0,
    "level": None,
    "prompts": None,
    "threshold": None,
    "lam": 0.1,
    "predicted": 9.0,
}
STEP: dict[str, Any] = {
    "step": 0,
    "lam": 0.8,
    "q": None,
    "cost": -0.2,
    "cost_se": 0.05,
    "reward": 0.1,
    "kl": 0.3,
    "tilt": None,
    "prices": [],
}


def solved(**told: Any) -> dict[str, Any]:
    """data/dual/dual.json; prices are completed. Without a margin its multiplier and target are
    those of the limit."""
    found: dict[str, Any] = {
        "lam": 0.8,
        "lam_low": 0.6,
        "lam_high": 1.0,
        "limit": -0.3,
        "beta": 0.5,
        "lambda_max": 50.0,
        "slack": False,
        "messages": [],
        **told,
    }
    prices = [PRICE | price for price in told.get("prices", [])]
    return {"lam_margin": found["lam"], "target": found["limit"], **found, "prices": prices}


def held_out(answers: int = 400) -> list[dict[str, Any]]:
    """Rows of data/scored/support.parquet: answers of up to 60 tokens at 6 nats a token, give or
    take 4.
    """
    return [
        {"length": 1 + i % 60, "logp_ref": -(6.0 + 4 * math.sin(i)) * (1 + i % 60)}
        for i in range(answers)
    ]


def helpful(**told: Any) -> dict[str, Any]:
    """reports/metrics/reward_dpo/RUN.json."""
    plain = {
        "reference": "sft",
        "loss_type": "dpo",
        "clip": None,
        "safe_offset": None,
        "margin": "sft",
    }
    return {**plain, **told}


def safety(**told: Any) -> dict[str, Any]:
    """reports/metrics/safety_dpo/RUN.json or safety_path/RUN.json."""
    return {
        "lam": 1.25,
        "coefficient": 0.4,
        "reference": "sft",
        "loss_type": "dpo",
        "clip": None,
        **told,
    }


def lagrangian(**told: Any) -> dict[str, Any]:
    """reports/metrics/lagrangian_dpo/RUN.json or lambda_path/RUN.json."""
    scores = {"reward": "reward_model", "cost": "cost_model", "data": "pool"}
    return {
        "lam": 0.8,
        "lam_from": "data/dual/dual.json",
        **scores,
        "pair_loss": {"labels": "soft", "normalised": False, "anchor": 0.3, "nll": 2.0},
        "learning_rate": 1e-3,
        **told,
    }


def searched(*steps: dict[str, Any], **told: Any) -> dict[str, Any]:
    """reports/search/NAME.json of these steps, the last one chosen."""
    rows = [STEP | {"step": k} | step for k, step in enumerate(steps)]
    return {
        "name": "dualign",
        "method": "dualign",
        "title": "dualign",
        "rule": "newton",
        "returns": "best",
        "cost_source": "model",
        "target": -0.3,
        "steps": rows,
        "screened": [],
        "chosen": len(rows) - 1,
        "feasible": True,
        "trainings": len(rows),
        "generated_tokens": 0,
        "labels": 0,
        "comparisons": 0,
        "stopped": "on the limit",
        **told,
    }

"""cost_model: pi_ref or another backbone, and safety pairs with is-safe flags -> models/cost_model.

    python -m stages.cost_model

Ranking and sign terms (Safe RLHF), then Platt's calibration of scale and zero on half of the held-out answers; the
other half measures it. Cost above 0 means unsafe.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualign.core.artifacts import replacing
from dualign.core.params import CostModelParams
from dualign.core.stage import Run, execute, finished
from dualign.data.schema import SAFETY_PAIRS, read_table
from dualign.lm.models import load_scorer_backbone, load_tokenizer, merged, with_lora
from dualign.scoring.calibration import Platt, expected_calibration_error, fit_platt, sigmoid
from dualign.scoring.scorers import Scorer, conversations
from dualign.training.run import Job
from dualign.training.scorer import ScoredPair, train_scorer

log = logging.getLogger("dualign")

PAIRS = Path("data/prepared/safety_pairs.parquet")
REFERENCE = Path("models/sft")
OUT = Path("models/cost_model")


def main(run: Run[CostModelParams]) -> None:
    """Run the stage."""
    params = run.params
    pairs = read_table(PAIRS, SAFETY_PAIRS)
    train, heldout = (pairs[pairs["split"] == split] for split in ("train", "heldout"))
    backbone = str(REFERENCE) if params.backbone == "sft" else params.backbone
    tokenizer = load_tokenizer(backbone)
    model = with_lora(load_scorer_backbone(backbone, tokenizer, run.resources, params.seed), params.lora, head=True)
    scratch = run.scratch(PAIRS, REFERENCE)
    job = Job(params.training, run.resources, scratch, params.seed)
    harmful, safer = (conversations(tokenizer, train["prompt"], train[side]) for side in ("rejected", "chosen"))
    flags = zip(train["rejected_is_safe"], train["chosen_is_safe"], strict=True)
    rows = [
        ScoredPair(high, low, (_unsafe(a), _unsafe(b))) for high, low, (a, b) in zip(harmful, safer, flags, strict=True)
    ]
    metrics = train_scorer(
        model, tokenizer, rows, job, sign_weight=params.sign_weight, regularisation=params.score_regularisation
    )

    scorer = Scorer(merged(model), tokenizer, Platt())
    answers = heldout_answers(scorer, heldout, run.resources.scoring_batch_size)
    calibration, calibrated = calibrate(answers, params.calibrate)
    with replacing(OUT) as folder:
        scorer.calibrated(calibration).save(folder)
    ranking = (
        answers[answers["side"] == "rejected"]["score"].to_numpy()
        > answers[answers["side"] == "chosen"]["score"].to_numpy()
    )
    run.metrics(
        {
            **metrics,
            **calibrated,
            "pairs": {"train": len(train), "heldout": len(heldout)},
            "ranking_accuracy": float(ranking.mean()),
        }
    )
    finished(scratch)


def heldout_answers(scorer: Scorer, heldout: pd.DataFrame, batch_size: int) -> pd.DataFrame:
    """Both answers of every held-out pair: side, prompt_id, score, unsafe (None where there is no flag)."""
    parts = [
        pd.DataFrame(
            {
                "side": side,
                "prompt_id": heldout["prompt_id"].to_numpy(),
                "score": scorer.score(heldout["prompt"], heldout[side], batch_size=batch_size),
                "unsafe": [_unsafe(flag) for flag in heldout[f"{side}_is_safe"]],
            }
        )
        for side in ("chosen", "rejected")
    ]
    return pd.concat(parts, ignore_index=True)


def calibrate(answers: pd.DataFrame, kind: str) -> tuple[Platt, dict[str, Any]]:
    """The calibration fitted on every other prompt, and its metrics on the rest."""
    flagged = answers[answers["unsafe"].notna()]
    if flagged.empty:
        log.warning("no held-out answer has an is-safe flag: cost keeps an arbitrary zero, so the limit is relative")
        return Platt(), {"sign_accuracy": None, "ece_before": None, "ece_after": None, "scale": 1.0, "offset": 0.0}
    order = {prompt: i for i, prompt in enumerate(sorted(flagged["prompt_id"].unique()))}
    fit = np.array([order[prompt] % 2 == 0 for prompt in flagged["prompt_id"]])
    score, unsafe = flagged["score"].to_numpy(float), flagged["unsafe"].to_numpy(bool)
    platt = fit_platt(score[fit], unsafe[fit]) if kind == "platt" else Platt()
    rest, truth = score[~fit], unsafe[~fit]
    return platt, {
        "sign_accuracy": float(((platt(rest) > 0) == truth).mean()),
        "ece_before": expected_calibration_error(sigmoid(rest), truth),
        "ece_after": expected_calibration_error(sigmoid(platt(rest)), truth),
        "scale": platt.scale,
        "offset": platt.offset,
    }


def _unsafe(is_safe: bool | None) -> bool | None:
    return None if pd.isna(is_safe) else not is_safe


if __name__ == "__main__":
    execute(main, CostModelParams)

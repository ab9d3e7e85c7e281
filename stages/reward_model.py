"""reward_model: pi_ref or another backbone, or given scorers, and helpful pairs ->
models/reward_model.

    python -m stages.reward_model

Bradley-Terry on the training pairs. The unit is that in which P(chosen is better) = sigma(gap), by
the held-out pairs of every other prompt; the other half measures it. The zero is where held-out
answers average 0."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualign.core.artifacts import replacing
from dualign.core.errors import DataError
from dualign.core.schema import HELPFUL_PAIRS, read_table
from dualign.params.models import RewardModelParams
from dualign.scoring.calibration import (
    Platt,
    brier_score,
    expected_calibration_error,
    fit_slope,
    sigmoid,
)
from dualign.scoring.scorers import Scorer
from dualign.stage import Run, execute
from dualign.training.fitting import (
    crosswise,
    gaps,
    heldout_answers,
    judged,
    local_inputs,
    obtain,
    on_one_scale,
)

log = logging.getLogger("dualign")

PAIRS = Path("data/prepared/helpful_pairs.parquet")
OUT = Path("models/reward_model")


def main(run: Run[RewardModelParams]) -> None:
    """Run the stage."""
    params = run.params
    pairs = read_table(PAIRS, HELPFUL_PAIRS)
    train, heldout = (pairs[pairs["split"] == split] for split in ("train", "heldout"))
    scratch = run.scratch(PAIRS, *local_inputs(params))
    scorer, metrics = obtain(run, train, "helpful", scratch)

    def measured(each: Scorer) -> tuple[Platt, dict[str, Any]]:
        answers = heldout_answers(each, heldout, run.resources.scoring_batch_size)
        return calibrate(answers, each.members[0].unit, given=params.given is not None)

    scorer = on_one_scale(scorer, lambda member: measured(member)[0])
    calibration, quality = measured(scorer)
    cut = heldout_answers(scorer, heldout, run.resources.scoring_batch_size, ended=False)
    quality["accuracy_cut"] = float((gaps(cut) > 0).mean())
    with replacing(OUT) as folder:
        scorer.calibrated(calibration).save(folder)
    pairs_read = {**metrics["pairs"], "heldout": len(heldout)}
    run.trained({**metrics, **quality, "pairs": pairs_read}, scratch)


def calibrate(answers: pd.DataFrame, unit: float, *, given: bool) -> tuple[Platt, dict[str, Any]]:
    """The scale by all held-out pairs, with the zero at the mean; and how well it does.

    `unit` is the slope that the scorer's training aimed at, 0 where that is unknown. `ece` and
    `brier` judge P(chosen is better) before and after, each half of the prompts by the slope that
    was fitted to the other."""
    gap = gaps(answers)
    parts = crosswise(answers[answers["side"] == "chosen"]["prompt_id"])
    scale = _slope(gap, unit, given=given) if parts else _unfitted(given=given)
    served = Platt(scale, -scale * float(answers["score"].mean()))
    quality = {"ece_before": None, "ece_after": None, "brier_before": None, "brier_after": None}
    helps: dict[str, Any] = {**quality, "calibration_helps": None}
    if parts:
        helps = judged(_quality(gap), _quality(_crossed(gap, parts, unit)), "reward")
    return served, {
        **helps,
        "accuracy": float((gap > 0).mean()),
        "mean_gap": scale * float(gap.mean()),
        "scale": scale,
        "offset": served.offset,
    }


def _crossed(
    gap: np.ndarray, parts: list[tuple[np.ndarray, np.ndarray]], unit: float
) -> np.ndarray:
    """The gaps, each half scaled by the slope that was fitted to the other."""
    crossed = gap.copy()
    for fit, judge in parts:
        crossed[judge] *= fit_slope(gap[fit], unit)
    return crossed


def _slope(gap: np.ndarray, unit: float, *, given: bool) -> float:
    """The slope; a trained reward of the wrong way keeps its own, a given one is refused."""
    slope = fit_slope(gap, unit)
    if slope > 0:
        return slope
    if given:
        raise DataError(
            "reward_model: the given scorer scores the better answers of held-out pairs below the"
            " others; its higher_is in reward_model.given may be wrong"
        )
    log.warning(
        "the reward model scores the better answers of held-out pairs below the others; its scale"
        " is kept"
    )
    return 1.0


def _unfitted(*, given: bool) -> float:
    """The scale where fewer than two prompts are held out, which cannot both fit and judge."""
    if given:
        raise DataError(
            "pairs of at least two prompts must be held out to give a scorer its scale; raise"
            " prepare.heldout_share"
        )
    log.warning(
        "pairs of fewer than two prompts are held out: the reward keeps the scale that training"
        " gave it"
    )
    return 1.0


def _quality(gap: np.ndarray) -> dict[str, float]:
    """How well sigma(gap) fits that chosen is better: Brier score, ECE of the likelier answer."""
    right = gap > 0
    return {
        "ece": expected_calibration_error(sigmoid(np.abs(gap)), right),
        "brier": brier_score(sigmoid(gap), np.ones(len(gap))),
    }


if __name__ == "__main__":
    execute(main, RewardModelParams)

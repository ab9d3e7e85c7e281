"""The zero of cost from more flags than are held out.

A scorer that has read each row once or twice has hardly learned any of them by heart, so its
training flags tell its zero nearly as held-out ones do, and there are many more of them. Slopes,
which optimism inflates first, stay with the held-out flags, and where the two zeros differ by more
than chance has it, so does the zero."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd

from dualign.params.base import TrainingParams
from dualign.scoring.calibration import Calibration, fit_shift, shift_error, shifted

log = logging.getLogger("dualign")

Flagged = tuple[np.ndarray, np.ndarray, np.ndarray]
#: Times that a row may be read whose flag sets the zero.
_READINGS = 2
#: Standard errors by which the two zeros may differ.
_AGREE = 3.0


def by_heart(training: TrainingParams, rows: int) -> bool:
    """Whether so many rows are read so often that a flag tells of its row and not of the zero."""
    if training.max_steps is None:
        return training.epochs > _READINGS
    return training.max_steps * training.batch_size > _READINGS * rows


def flagged_arrays(answers: pd.DataFrame) -> Flagged:
    """Scores, flags and prompts of the answers that have a flag; each [answers]."""
    own = answers[answers["unsafe"].notna()]
    return (own["score"].to_numpy(float), own["unsafe"].to_numpy(bool), own["prompt_id"].to_numpy())


def together(first: Flagged, second: Flagged) -> Flagged:
    """The answers of both."""
    score, unsafe, prompts = map(np.concatenate, zip(first, second, strict=True))
    return score, unsafe, prompts


def with_zero(calibration: Calibration, heldout: Flagged, seen: Flagged) -> Calibration:
    """The calibration with its zero by all of these flags."""
    score, unsafe, _ = together(heldout, seen)
    return shifted(calibration, fit_shift(calibration(score), unsafe))


def agree(calibration: Calibration, heldout: Flagged, seen: Flagged) -> bool:
    """Whether flags that the training saw put the zero where held-out ones do, but for chance, or
    warns. Flags that are all alike, or none, put it nowhere."""
    if len(set(seen[1].tolist())) < 2:
        return False
    ours, its = (_zero(calibration, answers) for answers in (heldout, seen))
    apart = its[0] - ours[0]
    chance = float(np.hypot(ours[1], its[1]))
    if abs(apart) > _AGREE * chance:
        log.warning(
            "flags that the training saw put the zero of cost %+.3f from the held-out ones, %.1f"
            " standard errors: it has learned rows by heart; the held-out flags alone set the zero",
            apart,
            abs(apart) / chance,
        )
        return False
    return True


def _zero(calibration: Calibration, answers: Flagged) -> tuple[float, float]:
    """The shift that these flags ask for, and its standard error."""
    score, unsafe, prompts = answers
    cost = calibration(score)
    shift = fit_shift(cost, unsafe)
    return shift, shift_error(cost + shift, unsafe, prompts)

"""cost_model: pi_ref or another backbone, or given scorers, and safety pairs with is-safe flags ->
models/cost_model.

    python -m stages.cost_model

Ranking and sign terms (Safe RLHF), then a calibration of scale and zero on the held-out answers,
each half measured by the other; flags of the training set the zero too where no row was read more
than twice. Cost above 0 means unsafe."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualign.core.artifacts import replacing, write_rows
from dualign.core.errors import DataError
from dualign.core.records import CostModelMetrics, as_row
from dualign.core.schema import SAFETY_PAIRS, read_table
from dualign.params.models import CostModelParams
from dualign.scoring.calibration import (
    Calibration,
    Isotonic,
    Platt,
    brier_score,
    expected_calibration_error,
    fit_isotonic,
    fit_platt,
    isotonic_zero_error,
    platt_zero_error,
    reliability,
    shifted_zero_error,
    sigmoid,
)
from dualign.scoring.scorers import Scorer
from dualign.scoring.zero import Flagged, agree, by_heart, flagged_arrays, together, with_zero
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

PAIRS = Path("data/prepared/safety_pairs.parquet")
OUT = Path("models/cost_model")
#: No flags of the training.
NOTHING: Flagged = (np.zeros(0), np.zeros(0, bool), np.zeros(0, object))
#: Metrics that need held-out flags.
_FLAG_METRICS = (
    "sign_accuracy ece_before brier_before ece_after brier_after calibration_helps platt isotonic"
    " zero_error zero_flags".split()
)


def main(run: Run[CostModelParams]) -> None:
    """Run the stage."""
    params = run.params
    pairs = read_table(PAIRS, SAFETY_PAIRS)
    train, heldout = (pairs[pairs["split"] == split] for split in ("train", "heldout"))
    if params.calibrate != "none":
        check_flags(train, heldout)
    scratch = run.scratch(PAIRS, *local_inputs(params))
    scorer, metrics = obtain(run, train, "harmful", scratch, params.sign_weight)

    def scored(each: Scorer) -> pd.DataFrame:
        return heldout_answers(each, heldout, run.resources.scoring_batch_size)

    scorer = on_one_scale(scorer, lambda member: calibration_of(scored(member), params.calibrate))
    answers = scored(scorer)
    seen = seen_flags(run, scorer, train)
    calibration, quality, reliable = calibrate(answers, params.calibrate, params.seed, seen)
    cut = heldout_answers(scorer, heldout, run.resources.scoring_batch_size, ended=False)
    with replacing(OUT) as folder:
        scorer.calibrated(calibration).save(folder)
        write_rows(folder / "reliability.json", reliable, ("predicted", "observed", "answers"))
    told = CostModelMetrics(
        ranking_accuracy=float((gaps(answers) < 0).mean()),
        ranking_accuracy_cut=float((gaps(cut) < 0).mean()),
        **quality,
    )
    pairs_read = {**metrics["pairs"], "heldout": len(heldout)}
    metrics.pop("accuracy", None)  # of the last training steps: it reads as one of held-out pairs
    run.trained({**metrics, **as_row(told), "pairs": pairs_read}, scratch)


def check_flags(train: pd.DataFrame, heldout: pd.DataFrame) -> None:
    """Refuse held-out flags that are all alike before anything is trained: no zero of cost is
    fitted to them. Raises DataError.
    """
    held = _kinds_of_flags(heldout)
    if len(held) != 1:
        return
    (safe,) = held
    words = ("safe", "unsafe") if safe else ("unsafe", "safe")
    more = (
        "raise prepare.heldout_share"
        if len(_kinds_of_flags(train)) > 1
        else f"add pairs with answers that are flagged {words[1]}"
    )
    raise DataError(
        f"{PAIRS}: every flag that is held out says {words[0]}, to which no calibration can be"
        f" fitted; {more}, or set cost_model.calibrate to none"
    )


def _kinds_of_flags(pairs: pd.DataFrame) -> set[bool]:
    """The flags that stand in pairs: none, one kind, or both."""
    flags = pairs[["chosen_is_safe", "rejected_is_safe"]].to_numpy().ravel()
    return {bool(flag) for flag in flags if pd.notna(flag)}


def seen_flags(run: Run[CostModelParams], scorer: Scorer, train: pd.DataFrame) -> Flagged:
    """Scored training flags that set the zero beside the held-out ones; none where nothing is
    calibrated, and where the training read a row more than twice or is not known, as that of a
    given scorer.
    """
    params = run.params
    flagged = train[train[["chosen_is_safe", "rejected_is_safe"]].notna().any(axis=1)]
    count = min(params.zero_pairs, len(flagged))
    if count == 0 or params.calibrate == "none":
        return NOTHING
    if params.given is not None or by_heart(params.training, len(train)):
        why = "is not known" if params.given else "read rows more than twice"
        log.info("the scorer's training %s: held-out flags alone set the zero", why)
        return NOTHING
    some = flagged.sample(count, random_state=params.seed).sort_index()
    return flagged_arrays(heldout_answers(scorer, some, run.resources.scoring_batch_size))


def calibration_of(answers: pd.DataFrame, kind: str) -> Calibration:
    """The calibration fitted on all held-out answers; none where no answer has a flag."""
    flagged = answers[answers["unsafe"].notna()]
    return _fitted(flagged, kind)[kind] if len(flagged) else Platt()


def calibrate(
    answers: pd.DataFrame, kind: str, seed: int, seen: Flagged = NOTHING
) -> tuple[Calibration, dict[str, Any], list[dict[str, Any]]]:
    """The calibration fitted on all flagged held-out answers, with its zero by those that the
    training has `seen` too; the metrics of every kind, and its reliability diagram.

    `ece` and `brier` judge P(unsafe): before calibration, after the one that is served, and after
    each kind, each half of the prompts by what was fitted to the other. `offset` is the cost at raw
    score 0; `zero_error` the standard error of the zero in units of cost, None if uncalibrated, by
    `zero_flags` flags. The diagram is that of the served one, judged likewise."""
    flagged = answers[answers["unsafe"].notna()]
    if flagged.empty:
        log.warning(
            "no held-out answer has an is-safe flag: cost keeps an arbitrary zero, so the limit is"
            " relative"
        )
        return Platt(), {**dict.fromkeys(_FLAG_METRICS), "scale": 1.0, "offset": 0.0}, []
    parts = crosswise(flagged["prompt_id"])
    if not parts:
        raise DataError(
            "flags of at least two prompts must be held out to judge the cost; raise"
            " prepare.heldout_share"
        )
    fitted = _fitted(flagged, kind)
    more = seen if agree(fitted[kind], flagged_arrays(flagged), seen) else NOTHING
    costs, unsafe = _crosswise(flagged, parts, kind, more)
    fitted = _zeroed(fitted, flagged, more)
    quality = {name: _quality(cost, unsafe) for name, cost in costs.items()}
    served = fitted[kind]
    after = quality[kind]
    metrics = {
        "sign_accuracy": after["sign_accuracy"],
        **judged(quality["none"], after, "cost"),
        **({"calibration_helps": None} if kind == "none" else {}),
        **{name: quality.get(name) for name in ("platt", "isotonic")},
        "scale": served.scale,
        "offset": float(served(np.zeros(1))[0]),
        "zero_error": _zero_error(fitted, kind, flagged, more, seed),
        "zero_flags": 0 if kind == "none" else len(flagged) + len(more[0]),
    }
    return served, metrics, reliability(sigmoid(costs[kind]), unsafe)


def _crosswise(
    answers: pd.DataFrame, parts: list[tuple[np.ndarray, np.ndarray]], kind: str, seen: Flagged
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Costs by each calibration, half the answers by what fitted the other half; and flags.

    A half that cannot be fitted, its flags being all alike, judges nothing; raises DataError where
    both cannot."""
    costs: dict[str, list[np.ndarray]] = {}
    flags: list[np.ndarray] = []
    refused: list[DataError] = []
    for fit, judge in parts:
        try:
            fitted = _zeroed(_fitted(answers[fit], kind), answers[fit], seen)
        except DataError as error:
            refused.append(error)
            continue
        flags.append(answers[judge]["unsafe"].to_numpy(bool))
        for name, each in fitted.items():
            costs.setdefault(name, []).append(each(answers[judge]["score"].to_numpy(float)))
    if not flags:
        raise refused[-1]
    whole = {name: np.concatenate(own) for name, own in costs.items() if len(own) == len(flags)}
    return whole, np.concatenate(flags)


def _fitted(answers: pd.DataFrame, kind: str) -> dict[str, Calibration]:
    """Every kind of calibration; the raw score alone where that is asked for and no other fits."""
    score = answers["score"].to_numpy(float)
    unsafe = answers["unsafe"].to_numpy(bool)
    try:
        line = fit_platt(score, unsafe)
    except DataError as error:
        if kind != "none":
            raise
        log.warning("the uncalibrated cost is compared with no calibration: %s", error)
        return {"none": Platt()}
    return {"none": Platt(), "platt": line, "isotonic": fit_isotonic(score, unsafe, line)}


def _zeroed(
    found: dict[str, Calibration], answers: pd.DataFrame, seen: Flagged
) -> dict[str, Calibration]:
    """These calibrations with their zeros by the training's flags too; the raw score stays."""
    if not len(seen[0]):
        return found
    own = flagged_arrays(answers)
    return {
        name: each if name == "none" else with_zero(each, own, seen) for name, each in found.items()
    }


def _zero_error(
    found: dict[str, Calibration], kind: str, answers: pd.DataFrame, seen: Flagged, seed: int
) -> float | None:
    """The standard error of the zero that is served; None where no flag has set it. That of a curve
    is by the held-out flags alone, and so too large where others set the zero.
    """
    data = flagged_arrays(answers)
    line = found.get("platt")
    served = found[kind]
    if kind == "none" or not isinstance(line, Platt):
        return None
    if isinstance(served, Isotonic):
        return isotonic_zero_error(served, *data, line, np.random.default_rng(seed))
    if len(seen[0]):
        return shifted_zero_error(line, data, together(data, seen))
    return platt_zero_error(line, *data)


def _quality(cost: np.ndarray, unsafe: np.ndarray) -> dict[str, float]:
    """How well P(unsafe) fits flags of answers not fitted to; both [answers]."""
    probability = sigmoid(cost)
    return {
        "sign_accuracy": float(((cost > 0) == unsafe).mean()),
        "ece": expected_calibration_error(probability, unsafe),
        "brier": brier_score(probability, unsafe),
    }


if __name__ == "__main__":
    execute(main, CostModelParams)

"""Data, models, and what each stage took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dualign.core.artifacts import listed, read_optional_json
from dualign.core.records import (
    IntervalRow,
    PreparedMetrics,
    Provenance,
    read_optional_record,
)
from dualign.report.formatting import MINUS, NONE, compact, number, percent, spoken
from dualign.report.sections.base import FinishedRun, Row, Section

#: Stages whose metrics the page prints as they are, under these headings.
_MODELS = {
    "sft": "Reference policy",
    "reward_model": "Reward model",
    "cost_model": "Cost model",
    "score": "Scores",
}
#: Metrics whose key is not how one would say it.
_WORDS = {
    "accuracy_cut": "accuracy, answers cut",
    "brier": "Brier score",
    "brier_after": "Brier score after calibration",
    "brier_before": "Brier score before calibration",
    "calibration_helps": "calibration makes it no worse",
    "ece": "ECE",
    "ece_before": "ECE before calibration",
    "ece_after": "ECE after calibration",
    "heldout": "held out",
    "heldout_loss": "held-out loss",
    "loss": "training loss, last steps",
    "mean_gap": "mean gap of a pair",
    "offset": "shift of the zero",
    "p_unsafe": "P(unsafe)",
    "ranking_accuracy_cut": "ranking accuracy, answers cut",
    "retokenised": "tokenised otherwise than drawn",
    "reward_within_sd": "reward, sd within a prompt",
    "scale": "slope of the calibration",
    "support_answers": "answers that show the support",
    "cost_within_sd": "cost, sd within a prompt",
    "zero_error": "standard error of the zero",
    "zero_flags": "flags that set the zero",
}
#: Metrics that the table of calibrations shows.
_CALIBRATED = ("ece_before", "ece_after", "brier_before", "brier_after", "platt", "isotonic")
#: Rates that read best in per cent.
_SHARES = ("accuracy", "share", "ended", "unsafe", "retokenised")


def section(run: FinishedRun) -> Section:
    """Always there, with what the run has of it."""
    values = {
        "prepared": _prepared(run.root),
        "quarantine": _quarantine(run.root),
        "models": _models(run.root),
        "provenance": run.provenance,
        "rates": rates,
    }
    return Section("facts", "Data and models", values)


def _prepared(root: Path) -> list[tuple[str, int]]:
    """Rows of every prepared table, by name."""
    return [
        (path.stem, pq.read_metadata(path).num_rows)
        for path in listed(root / "data/prepared", "*.parquet")
    ]


def _quarantine(root: Path) -> list[tuple[str, int]]:
    """Rejected rows by reason, most frequent first; the file lists the first rows only."""
    metrics = read_optional_record(root / "reports/metrics/prepare.json", PreparedMetrics)
    counts = Counter(metrics.rejected if metrics else {})
    return [(reason.replace("_", " "), count) for reason, count in counts.most_common()]


def _models(root: Path) -> list[Row]:
    """The metrics of the models that the run rests on, flattened and worded."""
    models = [
        (heading, read_optional_json(root / f"reports/metrics/{stage}.json"))
        for stage, heading in _MODELS.items()
    ]
    return [_model(heading, metrics) for heading, metrics in models if metrics]


def _model(heading: str, metrics: Row) -> Row:
    """A model's card; compared calibrations have a table in place of numbers before and after."""
    kinds = _calibrations(metrics)
    shown = {key: value for key, value in metrics.items() if not kinds or key not in _CALIBRATED}
    return {"heading": heading, "facts": list(_facts(shown)), "calibrations": kinds}


def _calibrations(metrics: Row) -> list[Row]:
    """How well P(unsafe) fits held-out flags by each calibration; empty where none was."""
    if not any(metrics.get(key) for key in ("platt", "isotonic")):
        return []
    after = [metrics.get(f"{key}_after") for key in ("ece", "brier")]
    before = {key: metrics.get(f"{key}_before") for key in ("ece", "brier")}
    kinds = {
        "none": before,
        "line (Platt)": metrics.get("platt"),
        "curve (isotonic)": metrics.get("isotonic"),
    }
    return [
        {
            "kind": kind,
            "sign_accuracy": None,
            **quality,
            "served": [quality["ece"], quality["brier"]] == after,
        }
        for kind, quality in kinds.items()
        if quality
    ]


def _facts(metrics: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Label and value of every number, those of its parents in front; no curves."""
    for key, value in metrics.items():
        label = prefix + _WORDS.get(key, key.replace("_", " "))
        if isinstance(value, list):
            continue
        if isinstance(value, dict) and value.keys() == {"mean", "low", "high"}:
            yield label, spoken(IntervalRow(**value), percent if _is_share(key) else number)
        elif isinstance(value, dict):
            yield from _facts(value, f"{label}, ")
        else:
            yield label, _fact(key, value)


def _fact(key: str, value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NONE}[value]
    if isinstance(value, float):
        told = f"{100 * value:.1f}%" if _is_share(key) else f"{value:,.3f}"
        return told.replace("-", MINUS)
    return compact(value) if isinstance(value, int) else str(value)


def _is_share(key: str) -> bool:
    return any(word in key for word in _SHARES)


def rates(stage: Provenance) -> str:
    """How fast a stage was, in words."""
    rates = [_rate(key, value) for key, value in stage.throughput.items()]
    rates += [_work_rate(name, done) for name, done in stage.work.items()]
    return ", ".join(rates)


def _work_rate(name: str, done: dict[str, float | None]) -> str:
    """Tokens a second of a training or a sampling, and MFU where a peak is known."""
    told = f"{name} {compact(done['tokens_per_second'])} tokens/s"
    mfu = done.get("mfu")
    return told if mfu is None else f"{told}, MFU {100 * mfu:.0f}%"


def _rate(key: str, value: float | None) -> str:
    return f"{compact(value)} {key.replace('_per_second', '/s').replace('_', ' ')}"

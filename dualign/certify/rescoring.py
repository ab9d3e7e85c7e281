"""The costs of a certificate's answers, scored again: finds costs that the cost model did not give.

The same model gives the same costs but for rounding, which depends on device, precision and batch
size: 1e-5 or so in fp32, 1e-2 or more in bf16."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dualign.certify.certificate import Certificate
from dualign.certify.evidence import DRAWN, check_files, read_answers, read_labels
from dualign.core.errors import DataError
from dualign.data.labelling import truth
from dualign.params.loading import load_resources
from dualign.scoring.scorers import Scorer


def rescore(
    found: Certificate, path: Path, tolerance: float, cost_model: Path | None = None
) -> float:
    """The largest difference between saved costs and what the cost model gives now.

    `path` is the certificate's file, `cost_model` where the model lies now, if not where it lay. In
    the embedded world true costs that serve as labels are taken from the world again. `resources`
    of ./params.yaml say how to run.

    Raises DataError where a difference is above `tolerance`, in units of cost, or the model is
    another."""
    if found.cost_model is None:
        raise DataError(f"{path}: names no cost model, so its costs cannot be scored again")
    folder = cost_model or path.parent / found.cost_model.path
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name that of the cost model with --cost-model")
    check_files(folder, found.cost_model.files, "the cost model")
    resources = load_resources()
    scorer = Scorer.load(folder, resources)
    largest = 0.0
    shared = False
    for name, table in found.tables.items():
        answers = read_answers(path.parent / table.path)
        if DRAWN in answers and shared:  # the same answers at the same costs, as `verify` has seen
            continue
        shared = shared or DRAWN in answers
        again = scorer.score(
            answers["prompt"].tolist(),
            answers["response"].tolist(),
            batch_size=resources.scoring_batch_size,
            what=f"costs of {name}",
            ended=answers["ended"].tolist(),
        )
        saved = answers["cost"].to_numpy()
        largest = max(largest, _compared(saved, again, tolerance, f"{path}: cost of {name!r}"))
    if any(required.quantity == "truth" for required in found.requirements):
        for name, table in found.labels.items():
            labels = read_labels(path.parent / table.path)
            again = np.asarray(truth(labels, "response")[1], float)
            _compared(
                labels["truth"].to_numpy(), again, tolerance, f"{path}: true cost of {name!r}"
            )
    return largest


def _compared(saved: np.ndarray, again: np.ndarray, tolerance: float, what: str) -> float:
    """The largest difference of two arrays [rows]."""
    difference = np.abs(saved - again)
    row = int(difference.argmax())
    if not difference[row] <= tolerance:
        raise DataError(
            f"{what}: {saved[row]:.6g} is saved in row {row}, and scored again it is"
            f" {again[row]:.6g}; {int((difference > tolerance).sum())} of {len(saved)} differ by"
            f" more than {tolerance:g} (--tolerance; rounding differs between devices and"
            " precisions)"
        )
    return float(difference[row])

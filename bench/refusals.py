"""Refusals as rules, a fitted classifier and the labels that XSTest publishes see them, beside what
people say.

    python -m bench.refusals --data FOLDER

FOLDER holds xstest_v2_completions_MODEL.csv of XSTest's repository (folder model_completions, and
beside them its files of automated labels, where they are to be compared)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupKFold

from bench import options
from dualign.core.errors import DataError, one_line
from dualign.data.files import read_file
from dualign.evaluation.agreement import Agreement, agreement
from dualign.evaluation.refusals import (
    LABELS,
    fit,
    read_labelled,
    refusal_probability,
    refused,
    refuses_by_rules,
)

log = logging.getLogger(__name__)

Array = np.ndarray

_PREFIX = "xstest_v2_completions_"
#: Labels that XSTest publishes beside those of people: suffix of the file, column, and whose they
#: are.
_PUBLISHED = {
    "streval": ("strmatch_label", "XSTest's string match"),
    "gpteval": ("gpt4_label", "XSTest's GPT-4"),
}


def read(folder: Path) -> pd.DataFrame:
    """Every labelled answer, with its `model`, the two annotators' own labels and those that XSTest
    publishes.
    """
    files = [path for path in sorted(folder.rglob(f"{_PREFIX}*.csv")) if "eval" not in path.stem]
    if not files:
        raise DataError(f"{folder}: no file {_PREFIX}MODEL.csv; give XSTest's repository")
    return pd.concat([_with_labels(path, folder) for path in files], ignore_index=True)


def _with_labels(path: Path, folder: Path) -> pd.DataFrame:
    model = path.stem.removeprefix(_PREFIX)
    frame = read_labelled(path).assign(model=model)
    for name in ("annotation_1", "annotation_2"):
        frame[name] = _column(path, name)
    for suffix, (column, title) in _PUBLISHED.items():
        found = next(folder.rglob(f"{path.stem}_{suffix}.csv"), None)
        frame[title] = None if found is None else _column(found, column)
    return frame


def _column(path: Path, name: str) -> list[str]:
    return [row[name] for _, row in read_file(path) if isinstance(row, dict)]


# --- who says what --------------------------------------------------------------------------------


def crosswise(data: pd.DataFrame, folds: int) -> Array:
    """P(refuses) of every answer by a classifier that has seen no answer to its prompt."""
    found = np.full(len(data), np.nan)
    for seen, asked in GroupKFold(folds).split(data, groups=data["prompt"]):
        responses = data["response"].iloc[asked].tolist()
        found[asked] = refusal_probability(fit(data.iloc[seen]), responses)
    return found


def left_out(data: pd.DataFrame, folds: int) -> Array:
    """P(refuses) of every answer by a classifier that has seen neither its prompt nor its model."""
    codes = pd.factorize(data["prompt"])[0] % folds
    found = np.full(len(data), np.nan)
    for model in data["model"].unique():
        for fold in range(folds):
            asked = ((data["model"] == model) & (codes == fold)).to_numpy()
            seen = ((data["model"] != model) & (codes != fold)).to_numpy()
            classifier = fit(data[seen])
            found[asked] = refusal_probability(classifier, data["response"][asked].tolist())
        log.info("without %s", model)
    return found


def judged(data: pd.DataFrame, folds: int) -> dict[str, Array]:
    """What each judge says: whether an answer refuses, in full or in part."""
    compliance = next(iter(LABELS))
    found: dict[str, Array] = {
        "rules": np.array([refuses_by_rules(text) for text in data["response"]]),
        "classifier, prompts left out": crosswise(data, folds) > 0.5,
        "classifier, prompts and models left out": left_out(data, folds) > 0.5,
    }
    for _, title in _PUBLISHED.values():
        if data[title].notna().all():
            found[title] = (data[title] != compliance).to_numpy()
    return found


def compared(data: pd.DataFrame, judges: dict[str, Array]) -> dict[str, Any]:
    """Agreement with people of each judge, over all answers and for each model."""
    human = refused(data)
    models = data["model"].to_numpy()
    clusters = data["prompt"].to_numpy()
    found: dict[str, Any] = {}
    for name, said in judges.items():
        whole = agreement(human.tolist(), said.tolist(), clusters.tolist())
        by_model = {}
        for model in data["model"].unique():
            own = models == model
            one = agreement(
                human[own].tolist(), said[own].tolist(), clusters[own].tolist(), draws=1
            )
            by_model[model] = one.kappa
        found[name] = {"all": _plain(whole), "models": by_model}
    return found


def _plain(one: Agreement) -> dict[str, Any]:
    return asdict(one) | {"confusion": one.confusion.tolist()}


def between_people(data: pd.DataFrame) -> dict[str, Any]:
    """Agreement of the two annotators with each other."""
    compliance = next(iter(LABELS))
    one, two = ((data[f"annotation_{k}"] != compliance).tolist() for k in (1, 2))
    return _plain(agreement(one, two, data["prompt"].tolist()))


# --- the page -------------------------------------------------------------------------------------


def page(found: dict[str, Any], people: dict[str, Any], answers: int, prompts: int) -> str:
    """The tables in markdown."""
    models = list(next(iter(found.values()))["models"])
    head = ["judge", "kappa", "95 % interval", "agree", "missed", "false alarms", *models]
    lines = options.head(head)
    for name, row in found.items():
        own = [f"{row['models'][model]:.2f}" for model in models]
        lines.append(options.line([name, *_cells(row["all"]), *own]))
    lines.append(
        options.line(["one annotator by the other", *_cells(people), *["" for _ in models]])
    )
    parts = [
        "# Does an answer refuse? Beside people's labels of XSTest",
        "    python -m bench.refusals --data FOLDER",
        "\n".join(lines),
        _NOTES.format(answers=answers, prompts=prompts),
    ]
    return "\n\n".join(parts) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    (_, alarms), (missed, _) = row["confusion"]
    return [
        f"{row['kappa']:.3f}",
        f"{row['low']:.3f} to {row['high']:.3f}",
        f"{row['accuracy']:.1%}",
        f"{missed}",
        f"{alarms}",
    ]


_NOTES = """\
{answers} answers to {prompts} prompts, each with the final label of two people; a refusal is full
or partial. Kappa is Cohen's, its interval draws prompts with replacement; the last columns are the
kappa on the answers of one model. `missed` are refusals that the judge calls compliance, `false
alarms` the reverse. The rules' words were chosen on these answers, so theirs is an upper
bound; the classifier is judged only on prompts, and in its second row on models too, that it has
not seen. That an answer with "I cannot help" in it counts as a refusal, whatever the classifier
makes of the rest, was decided on the second row: without it, its kappa is 0.80, and 0.47 on GPT-4,
which refuses in one sentence that no other model says. None of the answers is in this
repository."""


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; write refusals.json and refusals.md."""
    parser = options.parser("python -m bench.refusals", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="a copy of XSTest's repository")
    parser.add_argument("--folds", type=int, default=5, help="(default: %(default)s)")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    data = read(given.data)
    found = compared(data, judged(data, given.folds))
    people = between_people(data)
    content = {"judges": found, "people": people}
    text = page(found, people, len(data), data["prompt"].nunique())
    options.publish(given.out, "refusals", content, text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

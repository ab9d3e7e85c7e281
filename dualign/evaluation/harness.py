"""Results of other evaluation harnesses as records that the report shows.

    dualign import-results .scratch/harness/results_2026-11-28T11-21-27.json

Read are the results file of lm-evaluation-harness and the JSON log of Inspect, as these tools write
them (docs/evaluation.md has the commands). Each task of a model becomes one file, reports/harness/
HARNESS-MODEL-TASK.json, which a later import of the same replaces."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from dualign.core.artifacts import listed, write_json
from dualign.core.errors import DataError, one_line
from dualign.core.records import Record, as_row, fault, read_record

PROG = "python -m dualign.evaluation.harness"
FOLDER = Path("reports/harness")
#: Characters of a record's name; files of 255 bytes at most are named.
LONGEST = 200


class HarnessRow(Record):
    """One metric of a task. `error` is the tool's own standard error, None where it has none.

    `items` were scored of the `total` that the task has; None where the tool does not say, as for a
    group of tasks."""

    metric: str
    value: float | None
    error: float | None
    items: int | None
    total: int | None


class HarnessRecord(Record):
    """reports/harness/NAME.json: what one harness says of one model on one task.

    `model` is the folder or name that the tool was given, `created` an ISO time."""

    harness: str
    version: str
    model: str
    task: str
    created: str
    rows: list[HarnessRow]

    @property
    def name(self) -> str:
        """The name of its file, cut where no file is called so, with a digest of the whole."""
        parts = (self.harness, self.model.removeprefix("models/"), self.task)
        name = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part).strip("_.") for part in parts)
        digest = sha256(name.encode()).hexdigest()[:8]
        return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{digest}"


# --- lm-evaluation-harness ------------------------------------------------------------------------


class _LmEval(Record):
    """A results file: values by task and by `METRIC,FILTER`, counts of items by task."""

    lm_eval_version: str
    model_name: str
    date: float
    results: dict[str, dict[str, Any]]
    items: dict[str, dict[str, int]] = Field(alias="n-samples")
    config: dict[str, Any]


def from_lm_eval(content: dict[str, Any]) -> list[HarnessRecord]:
    """The tasks in a results file of lm-evaluation-harness. Raises pydantic's ValidationError, and
    DataError where there is none."""
    results = _LmEval.model_validate(content)
    if not results.results:
        raise DataError("holds no task; run the evaluation again")
    adapter = _arguments(results.config.get("model_args")).get("peft")
    return [
        HarnessRecord(
            harness="lm-eval",
            version=results.lm_eval_version,
            model=_shown(adapter or results.model_name),
            task=task,
            created=datetime.fromtimestamp(results.date, UTC).isoformat(timespec="seconds"),
            rows=list(_lm_eval_rows(values, results.items.get(task, {}))),
        )
        for task, values in results.results.items()
    ]


def _arguments(given: Any) -> dict[str, Any]:
    """What the model was loaded with: a mapping, or `KEY=VALUE,...` as on the command line."""
    if isinstance(given, str):
        pairs = (part.partition("=") for part in given.split(","))
        return {key.strip(): value for key, _, value in pairs}
    return given if isinstance(given, dict) else {}


def _lm_eval_rows(values: dict[str, Any], items: dict[str, int]) -> Iterator[HarnessRow]:
    """The metrics of a task; its standard error has a key of its own, and may be `N/A`."""
    for key, value in values.items():
        metric, comma, way = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = values.get(f"{metric}_stderr,{way}")
        yield HarnessRow(
            metric=metric if way == "none" else f"{metric} ({way})",
            value=value,
            error=error if isinstance(error, float) else None,
            items=items.get("effective"),
            total=items.get("original"),
        )


# --- Inspect --------------------------------------------------------------------------------------


class _Metric(Record):
    value: float


class _Score(Record):
    """`reducer` is how the scores of several epochs became one, None of a single epoch."""

    name: str
    reducer: str | None = None
    scored_samples: int | None = None
    metrics: dict[str, _Metric]


class _Scores(Record):
    scores: list[_Score]


class _Dataset(Record):
    samples: int


class _Eval(Record):
    task: str
    model: str
    model_args: dict[str, Any]
    created: str
    dataset: _Dataset
    packages: dict[str, str]


class _Inspect(Record):
    """A log: what was asked of whom, and the scores."""

    eval: _Eval
    results: _Scores


def from_inspect(content: dict[str, Any]) -> list[HarnessRecord]:
    """The task in a JSON log of Inspect. Raises pydantic's ValidationError, and DataError where the
    evaluation did not come to its end."""
    status = content.get("status")
    if status != "success":
        raise DataError(f"the evaluation ended with status {status!r}; run it again")
    evaluation = _Inspect.model_validate(content)
    scores = evaluation.results.scores
    record = HarnessRecord(
        harness="inspect",
        version=evaluation.eval.packages.get("inspect_ai", ""),
        model=_shown(evaluation.eval.model_args.get("model_path") or evaluation.eval.model),
        task=evaluation.eval.task,
        created=evaluation.eval.created,
        rows=[
            row for score in scores for row in _inspect_rows(score, evaluation.eval.dataset.samples)
        ],
    )
    return [record]


def _inspect_rows(score: _Score, total: int) -> Iterator[HarnessRow]:
    """The metrics of a scorer; `stderr` is the error of the one that stands beside it."""
    error = score.metrics.get("stderr")
    named = {name: metric for name, metric in score.metrics.items() if name != "stderr"}
    way = f" ({score.reducer})" if score.reducer else ""
    for name, metric in named.items():
        yield HarnessRow(
            metric=f"{score.name}, {name}{way}",
            value=metric.value,
            error=error.value if error and len(named) == 1 else None,
            items=score.scored_samples,
            total=total,
        )


# --- either ---------------------------------------------------------------------------------------


def read_results(file: Path) -> list[HarnessRecord]:
    """The records in a file of either tool. Raises DataError that names the file."""
    if file.suffix == ".eval":
        raise DataError(
            f"{file}: is a binary log; `inspect log convert {file} --to json --output-dir FOLDER`"
            " makes JSON of it"
        )
    content = _content(file)
    keys = set(content) if isinstance(content, dict) else set()
    try:
        if "lm_eval_version" in keys:
            return from_lm_eval(content)
        if {"eval", "status"} <= keys:
            return from_inspect(content)
    except ValidationError as error:
        raise DataError(
            f"{file}: {fault(error)}; no version of the tool that we know writes so"
        ) from error
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    raise DataError(
        f"{file}: neither a results file of lm-evaluation-harness nor a JSON log of Inspect"
    )


def _content(file: Path) -> Any:
    """The JSON of a tool's file."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: cannot be read as JSON ({error}); name a results file or a JSON log"
        ) from error


def _shown(model: str) -> str:
    """A folder below this one by its path from here, any other name as it is."""
    path = Path(model)
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else model


def read_imported(root: Path) -> list[HarnessRecord]:
    """All records under a repository root, by task and model."""
    records = [read_record(file, HarnessRecord) for file in listed(root / FOLDER, "*.json")]
    return sorted(records, key=lambda record: (record.task, record.harness, record.model))


# --- the command ----------------------------------------------------------------------------------


@one_line
def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """The command, called `prog`; returns its exit status. All files are read before one is
    written."""
    asked = parser(prog).parse_args(argv)
    records: dict[str, HarnessRecord] = {}
    for file in asked.files:
        for record in read_results(file):
            if records.setdefault(record.name, record) != record:
                raise DataError(
                    f"{file}: {record.task} of {record.model} has other results than before it, and"
                    f" {record.name}.json can hold one; import one of them"
                )
    places = {asked.out / f"{record.name}.json": record for record in records.values()}
    for place, record in places.items():
        _check_place(place, record)
    for place, record in places.items():
        write_json(place, as_row(record))
        sys.stdout.write(f"{place}: {_told(record)}\n")
    return 0


def _check_place(place: Path, record: HarnessRecord) -> None:
    """Refuse to take the place of another model's or task's results, whose name differs by signs
    that a file name has not.
    """
    known = read_record(place, HarnessRecord) if place.is_file() else record
    if (known.model, known.task) != (record.model, record.task):
        raise DataError(
            f"{place}: holds {known.task} of {known.model}, and {record.task} of {record.model}"
            " would take its place; move the file away, or call one of the two otherwise"
        )


def _told(record: HarnessRecord) -> str:
    """Its metrics in a line."""
    metrics = [f"{row.metric} {_figure(row.value)}" for row in record.rows]
    return ", ".join(metrics) or "no metric"


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The parser of this command."""
    made = argparse.ArgumentParser(
        prog=prog,
        description="Take results of lm-evaluation-harness or Inspect into the report.",
    )
    made.add_argument("files", type=Path, nargs="+", metavar="FILE")
    made.add_argument(
        "--out",
        type=Path,
        default=FOLDER,
        metavar="FOLDER",
        help="where records go (default: %(default)s)",
    )
    return made


if __name__ == "__main__":
    sys.exit(main())

"""TruthfulQA by lm-evaluation-harness and by us: the same items, the same likelihoods, the same MC1
and MC2.

    python -m bench.truthful models/base/smollm2 --python ../lm-eval/bin/python --data FOLDER

lm-eval lives in an environment of its own; `--python` is its interpreter. It runs its own task,
of which only the data set is replaced by a local file; `--data` is the folder of mc_task.json.
Items that differ by more than `LARGE` in float32 are scored once more in float64 by both, norms
too (`bench/harness/exact_norms.py`).
`--asked` takes all items and no model: what lm-eval asks for, token by token, and how it scores."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bench import options
from bench.harness.exact_norms import exact_norms
from dualign.core.errors import DualignError
from dualign.core.schema import last_user_text
from dualign.evaluation.suites import read_suite
from dualign.evaluation.truthful import (
    PREAMBLE,
    choice_ids,
    choice_log_probabilities,
    mc1,
    mc2,
)
from dualign.lm.models import load_policy, load_tokenizer
from dualign.params.evaluate import SuiteName, SuiteSpec
from dualign.params.loading import load_resources

SCORES = {"mc1": mc1, "mc2": mc2}
SUITES: dict[str, SuiteName] = {"mc1": "truthfulqa_mc1", "mc2": "truthfulqa_mc2"}

Rows = list[dict[str, Any]]
#: lm-eval's command line, with models that read the preamble once, or nothing.
MODELS = "bench.harness.lm_eval_models"
#: A difference of an item's score that wants explaining.
LARGE = 1e-6


def chosen(folder: Path, count: int | None) -> dict[str, pd.DataFrame]:
    """The same items of both suites; all where `count` is None."""
    return {
        targets: read_suite(
            SuiteSpec(suite=name, path=None, prompts=count, samples_per_prompt=1), folder
        )
        for targets, name in SUITES.items()
    }


# --- theirs ---------------------------------------------------------------------------------------


def write_tasks(folder: Path, tasks: Path, suites: dict[str, pd.DataFrame]) -> None:
    """The items as a file of the hub's form, and for each score a task that includes lm-eval's own
    from the folder `tasks`."""
    items = folder / "items.jsonl"
    columns = {targets: frame.to_dict("records") for targets, frame in suites.items()}
    with items.open("w") as stream:
        for one, two in zip(columns["mc1"], columns["mc2"], strict=True):
            row: dict[str, Any] = {"question": last_user_text(one["prompt"])}
            for targets, cells in (("mc1", one), ("mc2", two)):
                row[f"{targets}_targets"] = {
                    "choices": cells["choices"],
                    "labels": cells["correct"],
                }
            stream.write(json.dumps(row) + "\n")
    for targets in SUITES:
        task = {
            "include": str(tasks / f"truthfulqa_{targets}.yaml"),
            "task": f"local_{targets}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(items)}},
        }
        (folder / f"local_{targets}.yaml").write_text(json.dumps(task))  # JSON is YAML too


def theirs(
    python: str, policy: Path, suites: dict[str, pd.DataFrame], precision: str
) -> dict[str, Rows]:
    """What lm-eval says of each item: its likelihoods `logp` and its `score`."""
    stem = len(load_tokenizer(policy)(PREAMBLE)["input_ids"]) - 1  # the last may go on differently
    with tempfile.TemporaryDirectory() as name:
        model = ("hf-stem", f"pretrained={policy},dtype={precision},stem={stem}")
        return lm_eval(python, model, suites, Path(name))


def lm_eval(
    python: str, model: tuple[str, str], suites: dict[str, pd.DataFrame], folder: Path
) -> dict[str, Rows]:
    """Run both tasks by lm-eval with a model and its arguments; its files lie in the folder."""
    write_tasks(folder, tasks_of(python), suites)
    command = [python, "-m", MODELS, "run", "--model", model[0], "--model_args", model[1]]
    command += ["--tasks", *(f"local_{targets}" for targets in SUITES)]
    command += ["--include_path", str(folder), "--device", "cpu", "--batch_size", "32"]
    command += ["--log_samples", "--output_path", str(folder / "out")]
    subprocess.run(command, check=True)
    return {targets: _logged(folder / "out", targets) for targets in SUITES}


@cache
def tasks_of(python: str) -> Path:
    """The folder of lm-eval's tasks of TruthfulQA. Raises DualignError without an lm-eval."""
    code = "import lm_eval.tasks as t; print(t.__path__[0])"
    try:
        answer = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise DualignError(
            f"--python {python}: no interpreter with lm-eval; make an environment for it and"
            " `pip install 'lm-eval[hf]'` there"
        ) from error
    return Path(answer.stdout.split()[-1]) / "truthfulqa"


def _logged(out: Path, targets: str) -> Rows:
    (file,) = out.rglob(f"samples_local_{targets}_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows.sort(key=lambda row: row["doc_id"])
    return list(map(_item, rows))


def _item(row: dict[str, Any]) -> dict[str, Any]:
    """A row of lm-eval's samples, whose responses begin with a likelihood each."""
    logp = [float(response[0]) for response in row["filtered_resps"]]
    return {"logp": logp, "score": float(row["acc"])}


# --- ours -----------------------------------------------------------------------------------------


def ours(policy: Path, suites: dict[str, pd.DataFrame], precision: str) -> dict[str, Rows]:
    """The same of our code."""
    resources = load_resources().model_copy(update={"precision": "fp32", "device": "cpu"})
    model = load_policy(policy, resources).to(getattr(torch, precision))
    if precision == "float64":
        exact_norms(model)
    tokenizer = load_tokenizer(policy)
    found: dict[str, Rows] = {}
    for targets, frame in suites.items():
        logp = choice_log_probabilities(model, tokenizer, frame, batch_size=8)
        found[targets] = [
            {"logp": row.tolist(), "score": SCORES[targets](row, correct)}
            for row, correct in zip(logp, frame["correct"], strict=True)
        ]
    return found


# --- without a model ------------------------------------------------------------------------------


def asked(python: str, policy: Path, suites: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Which ids lm-eval asks a model for, and its scores of likelihoods that are drawn, beside ours
    of the same: everything but the forward pass."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "asked.jsonl"
        model = ("hf-asked", f"pretrained={policy},asked={file}")
        scored = lm_eval(python, model, suites, Path(name))
        requests = [json.loads(line) for line in file.read_text().splitlines()]
    drawn = {_key(row["before"], row["answer"]): float(row["logp"]) for row in requests}
    tokenizer = load_tokenizer(policy)
    found = {}
    for targets, frame in suites.items():
        logp = [drawn.get(_key(*ids), float("nan")) for ids in choice_ids(tokenizer, frame)]
        found[targets] = alike(targets, frame, logp, scored[targets])
    return found


def _key(before: Sequence[int], answer: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(before), tuple(answer)


def alike(
    targets: str, suite: pd.DataFrame, logp: Sequence[float], scored: Rows
) -> dict[str, int | float]:
    """How many choices of a suite lm-eval asked for by the same ids (the others' `logp` is NaN),
    and how far its scores of these likelihoods are from ours where all ids are the same."""
    rows = np.split(np.asarray(logp), np.cumsum(suite["choices"].map(len))[:-1])
    pairs = zip(rows, suite["correct"], strict=True)
    mine = np.array([SCORES[targets](row, correct) for row, correct in pairs])
    return {
        "items": len(rows),
        "choices": len(logp),
        "same_ids": int(np.isfinite(logp).sum()),
        "largest_difference_of_score": float(np.nanmax(np.abs(mine - _scores(scored)))),
    }


def page_of_asked(found: dict[str, dict[str, Any]], command: str) -> str:
    """The page of `asked` in markdown."""
    lines = options.head(
        ["score", "items", "choices", "asked by the same ids", "largest difference of an item"]
    )
    for targets, row in found.items():
        cells = [targets.upper(), *(f"{row[key]}" for key in ("items", "choices", "same_ids"))]
        lines.append(options.line([*cells, f"{row['largest_difference_of_score']:.1e}"]))
    return options.page(
        "TruthfulQA: what lm-evaluation-harness asks a model, and how it scores the replies",
        command,
        "\n".join(lines),
        "No forward pass: the likelihood of a choice is a number drawn by its ids, the same for"
        " lm-eval and for us. [The other page](truthful.md) has the likelihoods of a model.",
    )


# --- side by side ---------------------------------------------------------------------------------


def compared(one: Rows, other: Rows) -> dict[str, Any]:
    """Largest differences of an item's score and of a choice's likelihood, and both means."""
    likelihoods = [
        np.abs(np.subtract(a["logp"], b["logp"])).max() for a, b in zip(one, other, strict=True)
    ]
    mine = _scores(one)
    their = _scores(other)
    return {
        "items": len(one),
        "choices": sum(len(row["logp"]) for row in one),
        "score": float(mine.mean()),
        "score_lm_eval": float(their.mean()),
        "largest_difference_of_score": float(np.abs(mine - their).max()),
        "largest_difference_of_logp": float(max(likelihoods)),
    }


def differing(one: dict[str, Rows], other: dict[str, Rows]) -> list[int]:
    """The items of which some score differs by more than `LARGE`."""
    apart = [np.abs(_scores(one[targets]) - _scores(other[targets])) > LARGE for targets in one]
    return np.flatnonzero(np.any(apart, axis=0)).tolist()


def _scores(rows: Rows) -> np.ndarray:
    """The score of each item."""
    return np.array([row["score"] for row in rows])


def once_more(
    python: str, policy: Path, suites: dict[str, pd.DataFrame], items: list[int]
) -> dict[str, Any]:
    """Some of the items in float64 by both, compared; nothing where there are none."""
    if not items:
        return {}
    some = {targets: frame.iloc[items].reset_index() for targets, frame in suites.items()}
    mine = ours(policy, some, "float64")
    other = theirs(python, policy, some, "float64")
    return {targets: compared(mine[targets], other[targets]) for targets in SUITES}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Comparisons in markdown."""
    lines = options.head(
        [
            "score",
            "items",
            "choices",
            "ours",
            "lm-eval",
            "largest difference of an item",
            "of a logp",
        ]
    )
    for targets, row in found.items():
        cells = [targets.upper(), f"{row['items']}", f"{row['choices']}"]
        cells += [f"{row['score']:.6f}", f"{row['score_lm_eval']:.6f}"]
        cells += [f"{row[f'largest_difference_of_{what}']:.1e}" for what in ("score", "logp")]
        lines.append(options.line(cells))
    return "\n".join(lines)


def page(found: dict[str, Any], exact: dict[str, Any], command: str) -> str:
    """The page in markdown."""
    parts = [
        "# TruthfulQA: our MC1 and MC2 beside lm-evaluation-harness",
        f"    {command}",
        table(found),
        "float32 on a CPU; likelihoods in nats. lm-eval reads the six questions that stand before"
        " all items once (`bench/harness/lm_eval_models.py`).",
    ]
    if exact:
        parts += [f"Items that differ by more than {LARGE:g}, in float64, norms too:", table(exact)]
    return "\n\n".join(parts) + "\n"


def results(policy: Path, python: str, suites: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """What truthful.json holds."""
    mine = ours(policy, suites, "float32")
    other = theirs(python, policy, suites, "float32")
    found = {targets: compared(mine[targets], other[targets]) for targets in SUITES}
    exact = once_more(python, policy, suites, differing(mine, other))
    return {"compared": found, "float64": exact, "ours": mine, "lm_eval": other}


def main(argv: Sequence[str] | None = None) -> int:
    """Score by both and compare; write truthful.json and truthful.md."""
    parser = options.parser("python -m bench.truthful", __doc__)
    parser.add_argument("policy", type=Path, help="folder of whole weights")
    parser.add_argument("--python", required=True, help="interpreter that has lm-eval")
    parser.add_argument("--data", type=Path, required=True, help="folder of mc_task.json")
    parser.add_argument("--prompts", type=int, default=40, help="items (default: %(default)s)")
    parser.add_argument(
        "--asked", action="store_true", help="all items, but no forward pass: truthful-asked.md"
    )
    given = parser.parse_args(argv)
    try:
        tasks_of(given.python)  # told at once, where ours take an hour
        suites = chosen(given.data, None if given.asked else given.prompts)
    except DualignError as error:
        parser.exit(error.status, f"{error}\n")
    command = f"python -m bench.truthful {given.policy.name} --python PYTHON --data FOLDER"
    policy = given.policy.absolute()
    if given.asked:
        found = asked(given.python, policy, suites)
        text = page_of_asked(found, f"{command} --asked")
        options.publish(given.out, "truthful-asked", found, text)
        return 0
    content = results(policy, given.python, suites)
    command = f"{command} --prompts {given.prompts}"
    text = page(content["compared"], content["float64"], command)
    options.publish(given.out, "truthful", content, text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

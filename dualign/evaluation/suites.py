"""Suites: the prompts that policies are asked, read from the files that the originals publish.

`SUITES` has a row for each. Nothing of theirs is shipped: a file lies in a folder, on the hub or in
an installed package. A row that cannot be used stops the reading: a benchmark with holes is another
benchmark."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from dualign.core.errors import DataError
from dualign.core.schema import PROMPTS, prompt_id, read_table, user
from dualign.data.cells import is_missing
from dualign.data.files import Raw, read_file
from dualign.data.hub import HUB_ID, dataset
from dualign.data.messages import check_unicode
from dualign.data.rows import BadRow, Row
from dualign.params.evaluate import SuiteName, SuiteSpec

log = logging.getLogger(__name__)

COLUMNS = ("prompt_id", "prompt", "category", "label", "choices", "correct")
_PACKAGE = "package:"


@dataclass(frozen=True)
class Item:
    """What a row asks: its text, what kind of question it is, and the answers to choose from.

    `correct` has a 1 for every choice that is true and a 0 for the others."""

    text: str
    category: str = ""
    label: str = ""
    choices: list[str] | None = None
    correct: list[int] | None = None


@dataclass(frozen=True)
class Suite:
    """A benchmark: the file of its originals, where that is from, and how a row of it is read.

    `config` and `split` are those of the data set on the hub. `item` reads a row; a table of our
    own has none."""

    file: str
    licence: str
    source: str
    item: Callable[[Row], Item] | None
    config: str | None = None
    split: str = "train"


# --- rows of the originals ------------------------------------------------------------------------


def cell(row: Row, *names: str) -> str:
    """The text in the first of these columns that the row has."""
    name = next((name for name in names if name in row), None)
    if name is None:
        has = ", ".join(map(repr, row)) or "none"
        raise BadRow("missing_column", f"no column {names[0]!r}, only {has}")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise BadRow("not_text", f"{name} is {value!r:.60}, expected a text")
    return check_unicode(value, name)


def _prompt_and_category(row: Row, label: str = "") -> Item:
    """BeaverTails-Evaluation, SACPO and OR-Bench."""
    return Item(cell(row, "prompt"), cell(row, "category"), label)


def _harmbench(row: Row) -> Item:
    """A behaviour, after the text that it is about, as HarmBench's own attacks put it."""
    behaviour = cell(row, "Behavior")
    context = "" if is_missing(row.get("ContextString")) else cell(row, "ContextString")
    text = f"{context}\n\n---\n\n{behaviour}" if context else behaviour
    return Item(text, cell(row, "SemanticCategory"), cell(row, "FunctionalCategory"))


def _strongreject(row: Row) -> Item:
    return Item(cell(row, "forbidden_prompt"), cell(row, "category"))


def _advbench(row: Row) -> Item:
    return Item(cell(row, "goal"))


def _alpaca_eval(row: Row) -> Item:
    return Item(cell(row, "instruction"), cell(row, "dataset"))


def _xstest(row: Row) -> Item:
    """Versions 2 and 3: the unsafe prompts are those whose type begins with `contrast`."""
    kind = cell(row, "type")
    label = "unsafe" if kind.startswith("contrast") else "safe"
    if row.get("label", label) != label:
        raise BadRow("bad_label", f"label is {row['label']!r:.60}, but type {kind!r} is {label}")
    return Item(cell(row, "prompt"), kind, label)


def _truthful(row: Row, targets: Literal["mc1", "mc2"] | None = None) -> Item:
    """TruthfulQA: its CSV, its mc_task.json, and both forms on the hub."""
    question = cell(row, "question", "Question")
    category = cell(row, "category", "Category") if {"category", "Category"} & {*row} else ""
    if targets is None:
        return Item(question, category)
    choices, correct = _answers(row, targets)
    if 0 not in correct or 1 not in correct or (targets == "mc1" and sum(correct) != 1):
        raise BadRow("bad_label", f"{sum(correct)} of {len(correct)} answers are true")
    return Item(question, category, choices=choices, correct=correct)


def _answers(row: Row, targets: Literal["mc1", "mc2"]) -> tuple[list[str], list[int]]:
    """The answers to choose from: one of them true for MC1, some of them for MC2."""
    if "Incorrect Answers" in row:
        true = cell(row, "Best Answer" if targets == "mc1" else "Correct Answers")
        right = _sentences(true)
        wrong = _sentences(cell(row, "Incorrect Answers"))
        return right + wrong, [1] * len(right) + [0] * len(wrong)
    given = row.get(f"{targets}_targets")
    if not isinstance(given, dict):
        raise BadRow("missing_column", f"neither 'Incorrect Answers' nor '{targets}_targets'")
    listed = {"choices", "labels"} == {*given}
    choices = given["choices"] if listed else [*given]
    correct = given["labels"] if listed else [*given.values()]
    if not (isinstance(choices, list) and all(isinstance(text, str) for text in choices)):
        raise BadRow("not_text", f"{targets}_targets: expected a list of texts to choose from")
    if (
        not isinstance(correct, list)
        or len(choices) != len(correct)
        or not all(label in (0, 1) for label in correct)
    ):
        raise BadRow("bad_label", f"{targets}_targets: expected 0 or 1 for each answer")
    return choices, [int(label) for label in correct]


def _sentences(cell: str) -> list[str]:
    """The answers of a cell, which semicolons part, each with a full stop as in mc_task.json."""
    parts = [part.strip() for part in cell.split(";")]
    return [part if part.endswith(".") else f"{part}." for part in parts if part]


#: Every suite that params may name.
SUITES: dict[SuiteName, Suite] = {
    "held_out": Suite("data/prepared/eval.parquet", "of the data", "prepare", None),
    "beavertails": Suite(
        "BeaverTails-Evaluation.json", "CC-BY-NC-4.0", "PKU-Alignment/BeaverTails-Evaluation",
        _prompt_and_category, split="test",
    ),
    "sacpo_safety": Suite(
        "safety_problem.json", "Apache-2.0", "https://github.com/line/sacpo", _prompt_and_category,
    ),
    "harmbench": Suite(
        "harmbench_behaviors_text_all.csv", "MIT", "https://github.com/centerforaisafety/HarmBench",
        _harmbench,
    ),
    "strongreject": Suite(
        "strongreject_dataset.csv", "MIT", "https://github.com/alexandrasouly/strongreject",
        _strongreject,
    ),
    "advbench": Suite(
        "harmful_behaviors.csv", "MIT", "https://github.com/llm-attacks/llm-attacks", _advbench,
    ),
    "sacpo_helpful": Suite(
        "helpful_problem.json", "CC-BY-NC-4.0", "https://github.com/line/sacpo",
        _prompt_and_category,
    ),
    "alpaca_eval": Suite(
        "alpaca_eval.json", "CC-BY-NC-4.0", "tatsu-lab/alpaca_eval", _alpaca_eval, split="eval",
    ),
    "xstest": Suite("xstest_prompts.csv", "CC-BY-4.0", "Paul/XSTest", _xstest),
    "or_bench": Suite(
        "or-bench-hard-1k.csv", "CC-BY-4.0", "bench-llm/or-bench",
        partial(_prompt_and_category, label="safe"), "or-bench-hard-1k",
    ),
    "or_bench_toxic": Suite(
        "or-bench-toxic.csv", "CC-BY-4.0", "bench-llm/or-bench",
        partial(_prompt_and_category, label="unsafe"), "or-bench-toxic",
    ),
    "truthfulqa": Suite(
        "TruthfulQA.csv", "Apache-2.0", "truthfulqa/truthful_qa", _truthful, "generation",
        "validation",
    ),
    "truthfulqa_mc1": Suite(
        "mc_task.json", "Apache-2.0", "truthfulqa/truthful_qa", partial(_truthful, targets="mc1"),
        "multiple_choice", "validation",
    ),
    "truthfulqa_mc2": Suite(
        "mc_task.json", "Apache-2.0", "truthfulqa/truthful_qa", partial(_truthful, targets="mc2"),
        "multiple_choice", "validation",
    ),
}  # fmt: skip


# --- stop words -----------------------------------------------------------------------------------


def before_stop(answer: str, words: Sequence[str]) -> str:
    """What of an answer stands before the first of the stop words, without the blanks around the
    answer, as SACPO's protocol cuts (2404.11049, its `remove_keywords`).

    >>> before_stop("\\n\\nStir it.\\n\\nUSER: And then?", ["USER", "\\n\\n"])
    'Stir it.'
    """
    text = answer.strip()
    places = [at for at in map(text.find, words) if at >= 0]
    return text[: min(places, default=len(text))]


# --- reading --------------------------------------------------------------------------------------


def read_suite(spec: SuiteSpec, folder: Path) -> pd.DataFrame:
    """The prompts of a suite, in order of its file; columns as in `COLUMNS`.

    `prompt_id` and `prompt` (a list of turns) are as in `dualign.core.schema`; `category` and
    `label` are "" where the suite has none; `choices` and `correct` (0 or 1 for each choice) are
    None but for multiple choice. A prompt that stands twice is asked once, which is logged.

    Raises:
        DataError: there is no such file, or a row of it is not as the suite's are.
    """
    item = SUITES[spec.suite].item
    frame = _table(spec, folder) if item is None else _rows(spec, folder, item)
    once = frame.drop_duplicates("prompt_id", ignore_index=True)
    if len(once) < len(frame):
        log.warning("%s: %d prompts stand twice", spec.suite, len(frame) - len(once))
    count = len(once) if spec.prompts is None else min(spec.prompts, len(once))
    chosen = [index * len(once) // count for index in range(count)]
    return once.iloc[chosen].reset_index(drop=True)


def _table(spec: SuiteSpec, folder: Path) -> pd.DataFrame:
    """Prompts that `prepare` wrote, here or elsewhere."""
    table = read_table(folder / spec.path if spec.path else SUITES["held_out"].file, PROMPTS)
    empty = [None] * len(table)
    table = table.assign(category=table["source"], label="", choices=empty, correct=empty)
    return table[list(COLUMNS)]


def _rows(spec: SuiteSpec, folder: Path, item: Callable[[Row], Item]) -> pd.DataFrame:
    place, raw = _located(spec, folder)
    items = [_item(row, item, spec, f"{place}:{line}") for line, row in raw]
    if not items:
        raise DataError(f"{place}: holds no rows; is the download complete?")
    prompts = [user(item.text) for item in items]
    rows = {
        "prompt_id": map(prompt_id, prompts),
        "prompt": prompts,
        **{name: map(attrgetter(name), items) for name in COLUMNS[2:]},
    }
    return pd.DataFrame({name: pd.Series(list(rows[name]), dtype=object) for name in COLUMNS})


def _item(row: Row | BadRow, item: Callable[[Row], Item], spec: SuiteSpec, where: str) -> Item:
    try:
        if isinstance(row, BadRow):
            raise row
        return item(row)
    except BadRow as bad:
        suite = SUITES[spec.suite]
        raise DataError(
            f"{where}: {bad}; suite {spec.suite!r} reads {suite.file} of {suite.source}"
        ) from bad


def _located(spec: SuiteSpec, folder: Path) -> tuple[str, Raw]:
    """The place of a suite and its raw rows."""
    suite = SUITES[spec.suite]
    path = spec.path or suite.file
    if path.startswith(_PACKAGE):
        file = _shipped(path.removeprefix(_PACKAGE), suite.file)
        return str(file), read_file(file)
    file = folder / path
    if file.is_file():
        return str(file), read_file(file)
    if HUB_ID.fullmatch(path) and not file.suffix:
        return path, dataset(path, folder, split=suite.split, name=suite.config)
    raise DataError(
        f"{file}: no such file; put {suite.file} of {suite.source} ({suite.licence}) there, or"
        f" correct the path of suite {spec.suite!r}"
    )


def _shipped(package: str, name: str) -> Path:
    """The file of a suite in an installed package."""
    module = importlib.util.find_spec(package) if package.isidentifier() else None
    roots: Sequence[Any] = (module and module.submodule_search_locations) or []
    if not roots:
        raise DataError(f"{_PACKAGE}{package}: no such package is installed; pip install it")
    files = [file for root in roots for file in sorted(Path(root).rglob(name))]
    if len(files) != 1:
        raise DataError(
            f"{_PACKAGE}{package}: the package holds {len(files)} files of the name {name}; give"
            " the path of one"
        )
    return files[0]

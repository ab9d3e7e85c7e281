"""The evidence of a certificate: tables of answers and labels, file hashes, and how they agree.

All of it can be seen without running a model. Whether the answers are those that the policy gave
cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dualign.core.artifacts import hashes, sha256
from dualign.core.errors import DataError
from dualign.core.records import WholeRecord
from dualign.core.schema import ANSWERS, LABELS, PROMPTS, prompt_id, read_table

#: The part of a policy's folder that is written after the certificate, from it.
CARD = "README.md"
#: What tells one answer from another; equal in all of these, two candidates' answers are the same.
_NEVER_NULL = ("prompt_id", "prompt", "sample", "response", "length", "ended")
_IDENTITY = ("prompt_id", "sample", "response", "logp", "cost")
_LABELLED = ("prompt_id", "response", "cost")
#: What to do about files that do not belong together.
ONE_RUN = "take the files of one run, or certify again"
#: The column of answers that other policies drew, by which they are weighed, and what is equal in
#: all tables of such.
DRAWN = "logp_drawn"
_DRAWN_ALIKE = ("prompt_id", "sample", "response", "length", "ended", "cost", DRAWN)


class Table(WholeRecord):
    """A saved table; `path` is relative to the certificate's folder."""

    path: str
    sha256: str


class Folder(WholeRecord):
    """A model's folder, `path` relative to the certificate's; `files` are hashes, no README.md."""

    path: str
    files: dict[str, str]


class Evidence(NamedTuple):
    """The files of a candidate's answers (schema `ANSWERS`) and of their labels (`LABELS`)."""

    answers: Path
    labels: Path | None = None


# --- files ----------------------------------------------------------------------------------------


def table(file: Path, folder: Path) -> Table:
    """A file as a certificate in `folder` records it."""
    return Table(path=relative(file, folder), sha256=sha256(file))


def model(place: Path, folder: Path) -> Folder:
    """A model's folder as a certificate in `folder` records it."""
    return Folder(path=relative(place, folder), files=files(place))


def files(folder: Path) -> dict[str, str]:
    """The hashes of all files of a model's folder but its README.md, by their paths in it."""
    return {name: found for name, found in hashes(folder).items() if name != CARD}


def check_files(folder: Path, recorded: Mapping[str, str], what: str) -> None:
    """Raises DataError for the first file of a model that is not as recorded; `what` names it."""
    for name, how in changes(recorded, files(folder)):
        raise DataError(f"{what} ({folder}) is not the one certified: {name} {how}")


def changes(recorded: Mapping[str, str], present: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The files whose hashes are not as recorded, and what became of each."""
    for name in sorted({*recorded, *present}):
        if name not in recorded:
            yield name, "was added"
        elif name not in present:
            yield name, "is missing"
        elif recorded[name] != present[name]:
            yield name, "was changed"


def relative(path: Path, folder: Path) -> str:
    """A path as it is seen from `folder`."""
    return Path(os.path.relpath(path, folder)).as_posix()


# --- tables ---------------------------------------------------------------------------------------


def read_answers(path: Path) -> pd.DataFrame:
    """The answers of a candidate. Raises DataError where a column is missing or of another type."""
    frame = _read(
        path, pa.schema([ANSWERS.field(name) for name in (*_NEVER_NULL, "tokens", "cost", "logp")])
    )
    _check_whole(frame, _NEVER_NULL, path, "draw the answers again (run certify)")
    if DRAWN in pq.read_schema(path).names:
        drawn = read_table(path, pa.schema([(DRAWN, pa.float64())]))[DRAWN]
        frame = frame.assign(**{DRAWN: drawn, "weight": _weights(frame["logp"], drawn, path)})
    return frame


def _weights(own: pd.Series, drawn: pd.Series, path: Path) -> np.ndarray:
    """w = exp(log pi - log pi_drawn) of answers that others drew: E_drawn[w f] = E[f] for every f.

    Where the mixture of two policies drew, w is at most 2 for either (the balance heuristic; Veach
    and Guibas 1995)."""
    with np.errstate(over="ignore"):
        weights: np.ndarray = np.exp(own.to_numpy(float) - drawn.to_numpy(float))
    wrong = np.flatnonzero(~np.isfinite(weights))
    if len(wrong):
        raise DataError(
            f"{path}: row {wrong[0]} has no weight: logp and {DRAWN} must be finite; run certify"
            " again"
        )
    return weights


def effective_share(weight: np.ndarray) -> float:
    """(sum w)^2 / (n sum w^2): the share of answers that weighted ones are worth, 1 if alike."""
    return float(weight.sum() ** 2 / (len(weight) * (weight**2).sum()))


def weights_of(labels: pd.DataFrame, answers: pd.DataFrame) -> np.ndarray:
    """The weight of each labelled answer, which is one of the candidate's."""
    keys = list(_LABELLED)
    by_answer = answers.drop_duplicates(keys).set_index(keys)["weight"]
    weights: np.ndarray = by_answer.reindex(pd.MultiIndex.from_frame(labels[keys])).to_numpy(float)
    return weights


def check_drawn(tables: Mapping[str, pd.DataFrame]) -> None:
    """Raises DataError where candidates judged by another's answers have different ones."""
    ordered = {
        name: _in_order(answers, _DRAWN_ALIKE)
        for name, answers in tables.items()
        if DRAWN in answers
    }
    for (one, its), (other, others) in pairwise(ordered.items()):
        if not its.equals(others):
            raise DataError(
                f"candidates {one!r} and {other!r} are judged by answers that another policy drew,"
                " and these are not the same ones"
            )


def read_labels(path: Path) -> pd.DataFrame:
    """Labels of some of them; raises as `read_answers`."""
    labels = _read(path, LABELS)
    _check_whole(labels, LABELS.names, path, "label the answer, or leave the row out")
    return labels


def check_labels(labels: pd.DataFrame, answers: pd.DataFrame, path: Path) -> None:
    """Raises DataError where a label is on no answer of the candidate with that cost."""
    check_ids(labels, path)
    keys = list(_LABELLED)
    given = set(answers[keys].itertuples(index=False, name=None))
    for row, key in enumerate(labels[keys].itertuples(index=False, name=None)):
        if key not in given:
            raise DataError(
                f"{path}: row {row}: the labelled answer to {key[0]} is none of the candidate's"
                " answers"
            )


def _check_whole(frame: pd.DataFrame, names: Sequence[str], path: Path, remedy: str) -> None:
    """Raises DataError for the first row that lacks something."""
    for name in names:
        empty = np.flatnonzero(frame[name].isna().to_numpy())
        if len(empty):
            raise DataError(f"{path}: row {empty[0]} has no {name}; {remedy}")


def _read(path: Path, schema: pa.Schema) -> pd.DataFrame:
    frame = read_table(path, schema)
    stored = pq.read_schema(path)
    for field in schema:
        kind = _kind(stored.field(field.name).type)
        expected = _kind(field.type)
        if kind != expected:
            raise DataError(
                f"{path}: column {field.name!r} holds {kind}, not {expected}; another program"
                " wrote it"
            )
    return frame


def _kind(kind: pa.DataType) -> str:
    """What a column holds, in words; the width of numbers and texts does not matter."""
    kinds = {
        "texts": pa.types.is_string(kind) or pa.types.is_large_string(kind),
        "numbers": pa.types.is_integer(kind) or pa.types.is_floating(kind),
        "flags": pa.types.is_boolean(kind),
        "turns": pa.types.is_struct(kind) and {field.name for field in kind} == {"role", "content"},
    }
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"lists of {_kind(kind.value_type)}"
    return next((name for name, fits in kinds.items() if fits), str(kind))


def samples_per_prompt(answers: pd.DataFrame, path: Path) -> int:
    """Answers to a prompt. Raises DataError where prompts differ in it, or one stands twice."""
    counts = answers.groupby("prompt_id").size()
    few = counts.index[counts != counts.max()]
    if len(few):
        raise DataError(
            f"{path}: prompt {few[0]} has {counts[few[0]]} answers and others have {counts.max()};"
            " every answer that was drawn must be there"
        )
    count = int(counts.max())
    numbers = answers["sample"].to_numpy(float)
    twice = answers.duplicated(["prompt_id", "sample"]).to_numpy() | ~np.isin(
        numbers, np.arange(count)
    )
    if twice.any():
        row = int(np.flatnonzero(twice)[0])
        raise DataError(
            f"{path}: row {row}: sample {numbers[row]:g} is not one of 0 to {count - 1}, each once"
            " a prompt"
        )
    return count


def check_answers(answers: pd.DataFrame, path: Path) -> None:
    """Raises DataError where an id is not its prompt's, or a length not that of the tokens."""
    check_ids(answers, path)
    lengths = np.array([0 if tokens is None else len(tokens) for tokens in answers["tokens"]])
    wrong = np.flatnonzero(lengths != answers["length"].to_numpy())
    if len(wrong):
        stated = answers["length"].iloc[wrong[0]]
        raise DataError(
            f"{path}: row {wrong[0]}: length {stated}, but the answer has {lengths[wrong[0]]}"
            " tokens"
        )


def check_ids(frame: pd.DataFrame, path: Path) -> None:
    """Raises DataError where a prompt's id is not the hash of the prompt."""
    ids: dict[tuple[tuple[Any, Any], ...], str] = {}
    for row, (stated, prompt) in enumerate(zip(frame["prompt_id"], frame["prompt"], strict=True)):
        key = tuple((turn["role"], turn["content"]) for turn in prompt)
        if key not in ids:
            if not all(isinstance(part, str) for turn in key for part in turn):
                raise DataError(
                    f"{path}: row {row}: a turn of the prompt has no role or no content"
                )
            ids[key] = prompt_id(prompt)
        if stated != ids[key]:
            raise DataError(
                f"{path}: row {row}: prompt_id {stated} is not that of its prompt, {ids[key]}"
            )


def check_together(tables: Mapping[str, pd.DataFrame], counts: Mapping[str, int]) -> None:
    """Raises DataError where candidates have other prompts, or not the stated number of answers.

    Tables of answers by candidate.
    """
    asked = {name: set(answers["prompt_id"]) for name, answers in tables.items()}
    first = next(iter(tables))
    for name, answers in tables.items():
        each = len(answers) / max(len(asked[name]), 1)
        if asked[name] != asked[first]:
            raise DataError(f"candidates {first!r} and {name!r} have answers to different prompts")
        if each != counts.get(name):
            raise DataError(
                f"candidate {name!r} has {each:g} answers to each prompt, and {counts.get(name)}"
                f" are stated; {ONE_RUN}"
            )


def same(tables: Mapping[str, pd.DataFrame]) -> tuple[tuple[str, str], ...]:
    """Pairs of candidates with the same answers, of the same probabilities and costs.

    They are one policy, or next to it, as merges of policies that hardly differ are; or one was
    copied from the other."""
    ordered = {name: _in_order(answers, _IDENTITY) for name, answers in tables.items()}
    return tuple(
        (one, other)
        for one, other in combinations(tables, 2)
        if ordered[one].equals(ordered[other])
    )


def _in_order(answers: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    return answers[list(columns)].sort_values(["prompt_id", "sample"], ignore_index=True)


def check_prompts(file: Path, answers: pd.DataFrame) -> None:
    """Raises DataError where the answers are not to the file's first prompts (`PROMPTS`)."""
    asked = set(answers["prompt_id"])
    given = set(read_table(file, PROMPTS)["prompt_id"].head(len(asked)))
    if asked != given:
        raise DataError(
            f"the answers are not to the first {len(asked)} prompts of {file}: {len(asked - given)}"
            " are others"
        )

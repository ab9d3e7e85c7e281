"""Labels of fresh answers: from the world's oracle, from the models, or from people by a file.

People are asked through a folder: a call writes `to-label-HASH.jsonl` and raises `AwaitingLabels`;
once `labelled-HASH.jsonl` lies beside it, the same call reads the labels. HASH is over what is
asked, so that a rerun finds its own file; equal items are asked once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import expit

from dualign.core.artifacts import replacing
from dualign.core.errors import AwaitingLabels, DataError
from dualign.core.schema import Message, identity, last_user_text
from dualign.data import world

Array = np.ndarray
VoteSource = Literal["oracle", "cost_model", "cost_sign", "file"]
CompareSource = Literal["oracle", "models", "file"]
Item = dict[str, Any]

_SIDES = ("a", "b")
_README = """\
Each file `to-label-HASH.jsonl` asks for labels. Copy it to `labelled-HASH.jsonl`, replace \
every `null` and run the
stage again. Leave `id` as it is; rows may stand in any order, other fields are not read.

- `unsafe_votes`: how many of the `votes` people who read `answer` call it unsafe, a whole number \
from 0 to `votes`.
- `more_helpful`, `safer`: which answer to the conversation is it, "a" or "b"? Judge each without \
regard to the other.
"""


def vote(
    answers: pd.DataFrame, *, source: VoteSource, count: int, folder: Path, seed: int
) -> Array:
    """Of `count` votes on each answer, how many call it unsafe; int [rows], 0 to count.

    The votes are PD-DPO's binary feedback Z_j ~ Bernoulli(sigma(c)), j <= count (2510.05703, alg.
    1): with c = c*, the truth of the embedded world (`oracle`), or with the column `cost`
    (`cost_model`). `cost_sign`: all votes follow the sign of that column. `file`: people vote,
    asked through `folder`; equal answers to a prompt share their votes.

    `answers` has columns prompt_id, prompt, response and, where the source reads it, cost.

    Raises:
        AwaitingLabels: the file with the people's votes is not there yet; the questions are.
        DataError: a row of that file is wrong, a prompt is none of the world's, or a cost is no
            finite number.
    """
    if source == "file":
        return _people_vote(answers, count, folder)
    cost = truth(answers, "response")[1] if source == "oracle" else _finite(answers, "cost")
    if source == "cost_sign":
        return np.where(cost > 0, count, 0)
    return np.random.default_rng(seed).binomial(count, expit(cost))


def compare(pairs: pd.DataFrame, *, source: CompareSource, folder: Path, seed: int) -> pd.DataFrame:
    """The pairs with boolean columns first_more_helpful and first_safer.

    Drawn from Bradley-Terry: P(first more helpful) = sigma(r(first) - r(second)), P(first safer) =
    sigma(c(second) - c(first)), independently; with the world's r* and c* (`oracle`) or with
    columns reward_first, reward_second, cost_first, cost_second (`models`). `file`: people compare;
    which answer they see as "a" says nothing about which policy wrote it. Needs columns prompt_id,
    prompt, first, second; the texts of a pair differ.

    Raises:
        AwaitingLabels: the file with the people's labels is not there yet; the questions are.
        DataError: a row of that file is wrong, a prompt is none of the world's, or a score is no
            finite number.
    """
    if source == "file":
        return _people_compare(pairs, folder)
    if source == "oracle":
        reward_first, cost_first = truth(pairs, "first")
        reward_second, cost_second = truth(pairs, "second")
    else:
        reward_first = _finite(pairs, "reward_first")
        reward_second = _finite(pairs, "reward_second")
        cost_first = _finite(pairs, "cost_first")
        cost_second = _finite(pairs, "cost_second")
    drawn = np.random.default_rng(seed).random((2, len(pairs)))
    return pairs.assign(
        first_more_helpful=drawn[0] < expit(reward_first - reward_second),
        first_safer=drawn[1] < expit(cost_second - cost_first),
    )


def log_odds(votes: Array, count: int, smoothing: float) -> Array:
    """c_hat = log((k + s) / (M - k + s)), cost by k unsafe votes of M; [answers], nats.

    PD-DPO's sigma^{-1}(k / M) (2510.05703, alg. 1) with s > 0 votes added to either side. Without
    them it is infinite wherever all votes agree: 41 % of the answers with c = 1 at M = 3, 4 % at M
    = 10. s = 1/2 (Haldane, 1956) removes the bias of order 1 / M. What is left draws c_hat towards
    0, most where votes agree, for |c_hat| cannot exceed log((M + s) / s), 3.04 at M = 10. E c_hat -
    c at M = 10, for c = 1, 2, 3:

        s = 1/2:   0.00  -0.09  -0.47
        s = 1:    -0.12  -0.40  -0.95"""
    return np.log((votes + smoothing) / (count - votes + smoothing))


# --- scores ---------------------------------------------------------------------------------------


def truth(frame: pd.DataFrame, column: str) -> tuple[Array, Array]:
    """r* and c* of the texts in `column`; shape [rows] each."""
    asked = [last_user_text(prompt) for prompt in frame["prompt"]]
    for name, question in zip(frame["prompt_id"], asked, strict=True):
        if not world.knows(question):
            raise DataError(
                f"prompt {name}: no question of the embedded world, so the oracle does not know it;"
                " take labels from the models or from a file"
            )
    scored = [
        world.score(question, text) for question, text in zip(asked, frame[column], strict=True)
    ]
    reward, cost, _ = np.array(scored, float).reshape(-1, 3).T
    return reward, cost


def _finite(frame: pd.DataFrame, column: str) -> Array:
    values = frame[column].to_numpy(float)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        name = frame["prompt_id"].iloc[row]
        raise DataError(
            f"prompt {name}: {column} is {values[row]}, which gives no label; score the answers"
            " again"
        )
    return values


# --- people ---------------------------------------------------------------------------------------


def _people_vote(answers: pd.DataFrame, count: int, folder: Path) -> Array:
    items = [
        _item(prompt, {"answer": text, "votes": count}, {"unsafe_votes": None})
        for prompt, text in zip(answers["prompt"], answers["response"], strict=True)
    ]
    labels = _labels(items, {"unsafe_votes": range(count + 1)}, folder)
    return np.array([labels[item["id"]]["unsafe_votes"] for item in items], dtype=int)


def _people_compare(pairs: pd.DataFrame, folder: Path) -> pd.DataFrame:
    shown = [
        _sides(*row)
        for row in zip(pairs["prompt_id"], pairs["first"], pairs["second"], strict=True)
    ]
    items = [
        _item(prompt, {"a": a, "b": b}, {"more_helpful": None, "safer": None})
        for prompt, (a, b) in zip(pairs["prompt"], shown, strict=True)
    ]
    labels = _labels(items, {"more_helpful": _SIDES, "safer": _SIDES}, folder)
    side = [_SIDES[texts.index(first)] for texts, first in zip(shown, pairs["first"], strict=True)]

    def first_is(field: str) -> np.ndarray:
        chosen = [labels[item["id"]][field] for item in items]
        return np.array([a == b for a, b in zip(chosen, side, strict=True)], dtype=bool)

    return pairs.assign(first_more_helpful=first_is("more_helpful"), first_safer=first_is("safer"))


def _sides(prompt_id: str, *texts: str) -> list[str]:
    """Both texts in the order of a hash, so that liking the first favours no policy."""
    return sorted(texts, key=lambda text: identity(f"{prompt_id}\x1e{text}"))


def _item(prompt: Sequence[Message], content: Item, empty: Item) -> Item:
    """One row to label: what is asked, with an id of its content, and the fields to fill."""
    asked = {"conversation": [dict(turn) for turn in prompt], **content}
    return {"id": identity(json.dumps(asked)), **asked, **empty}


def _labels(items: list[Item], allowed: dict[str, Sequence[Any]], folder: Path) -> dict[str, Item]:
    """The labelled row of each id, with `allowed` values; asks if there are none yet."""
    if not items:
        return {}
    unique = {item["id"]: item for item in sorted(items, key=lambda item: str(item["id"]))}
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in unique.values())
    name = identity(lines)
    asked = folder / f"to-label-{name}.jsonl"
    given = folder / f"labelled-{name}.jsonl"
    if given.is_file():
        return _read(given, unique, allowed)
    for path, text in ((folder / "README.md", _README), (asked, lines)):
        if not path.is_file():  # people may have begun to fill the file in place
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    raise AwaitingLabels(
        f"{asked}: {len(unique)} rows wait for labels; fill in {' and '.join(allowed)} "
        f"(see README.md there), save as {given.name} and run the stage again"
    )


def _read(path: Path, asked: dict[str, Item], allowed: dict[str, Sequence[Any]]) -> dict[str, Item]:
    """Rows by id, checked: each that was asked once, with a label in every field."""
    labels: dict[str, Item] = {}
    for number, row in _rows(path):
        where = f"{path}:{number}"
        name = str(row.get("id"))
        if name not in asked:
            source = path.name.replace("labelled", "to-label", 1)
            raise DataError(f"{where}: id {name!r} was not asked for; copy the ids of {source}")
        if name in labels:
            raise DataError(f"{where}: id {name!r} stands in two rows; leave one")
        for field, values in allowed.items():
            label = _whole(row.get(field))
            if type(label) is not type(values[0]) or label not in values:
                whole = isinstance(values, range)
                choice = f"0 to {values[-1]}" if whole else " or ".join(values)
                raise DataError(f"{where}: id {name!r}: {field} is {label!r}; it must be {choice}")
        labels[name] = {**row, **{field: _whole(row.get(field)) for field in allowed}}
    missing = [name for name in asked if name not in labels]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} rows are missing, the first has id {missing[0]!r}; label"
            " them too"
        )
    return labels


def _whole(label: Any) -> Any:
    """A whole number that a table program has written as 1.0, as the number that it is."""
    return int(label) if isinstance(label, float) and label.is_integer() else label


def _rows(path: Path) -> Iterator[tuple[int, Item]]:
    """Line numbers and objects of a JSON lines file; empty lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as UTF-8 text ({error}); save it as such"
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}:{number}: not valid JSON ({error}); one object a line"
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: not a JSON object; one object a line")
            yield number, row

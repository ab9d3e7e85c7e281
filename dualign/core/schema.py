"""The one place that knows the tables: their columns, their types, and the sign of cost.

Cost: bigger is more harmful; c > 0 means unsafe, c < 0 means safe (the Safe RLHF convention).
Reward: bigger is more helpful. In every preference table `chosen` is the answer that the annotator
preferred: the more helpful one in helpful pairs, the **safer** one in safety pairs."""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dualign.core.errors import DataError


class Message(TypedDict):
    """One turn of a conversation; a prompt is a list of turns that ends with the user's."""

    role: str
    content: str


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

_PROMPT = [("prompt_id", pa.string()), ("prompt", MESSAGES)]
_PAIR = [
    ("pair_id", pa.string()),
    *_PROMPT,
    ("chosen", pa.string()),
    ("rejected", pa.string()),
    ("source", pa.string()),
    ("split", pa.string()),
]
_SCORES = ("logp_ref", "reward", "cost")
_FLAGS = [("chosen_is_safe", pa.bool_()), ("rejected_is_safe", pa.bool_())]
_SAMPLE = [
    *_PROMPT,
    ("sample", pa.int32()),
    ("response", pa.string()),
    ("tokens", pa.list_(pa.int32())),
    ("length", pa.int32()),
    ("ended", pa.bool_()),
    ("logp_ref", pa.float64()),
    ("reward", pa.float64()),
    ("cost", pa.float64()),
]

#: Supervised rows. `split` is "train" or "heldout".
SFT = pa.schema(
    [*_PROMPT, ("response", pa.string()), ("source", pa.string()), ("split", pa.string())]
)
#: Helpfulness preferences: `chosen` is the more helpful answer. Flags are null where the source has
#: none.
HELPFUL_PAIRS = pa.schema([*_PAIR, *_FLAGS])
#: Safety preferences: `chosen` is the safer answer. Flags are null where the source has none.
SAFETY_PAIRS = pa.schema([*_PAIR, *_FLAGS])
#: A set of prompts (`pool`, `search`, `certify`, `eval`).
PROMPTS = pa.schema([*_PROMPT, ("source", pa.string())])
#: Training pairs with the reference log-probability (nats, summed over tokens), reward and cost of
#: both answers. `kind` is "helpful" or "safety".
SCORED_PAIRS = pa.schema(
    [
        *_PAIR,
        *_FLAGS,
        ("kind", pa.string()),
        *[
            (f"{score}_{side}", pa.float64())
            for side in ("chosen", "rejected")
            for score in _SCORES
        ],
    ]
)
#: Answers of held-out pairs as the reference policy sees them: what the scorers' own data cover
#: (`dualign.scoring.support`).
SUPPORT = pa.schema([("length", pa.int32()), ("logp_ref", pa.float64())])
#: Scored samples of the reference policy at temperature 1. `tokens` are the ids as drawn (text may
#: not encode back to them), `length` counts them with EOS, `ended` says that EOS was drawn before
#: the length limit.
POOL = pa.schema(_SAMPLE)
#: The solved dual by pool prompt, at its multiplier: effective samples, soft value, KL (nats),
#: predicted cost.
DUAL_PROMPTS = pa.schema(
    [_PROMPT[0], *[(name, pa.float64()) for name in ("ess", "value", "kl", "cost")]]
)
#: In the embedded world: every grammatical answer to the eval prompts, its true scores, and
#: logp_ref (else empty).
ENUMERATED = pa.schema(
    [
        *_PROMPT,
        ("response", pa.string()),
        *[(name, pa.float64()) for name in ("reward", "cost", "logp_ref")],
    ]
)
#: One generated answer of an evaluated policy. The true_* columns are null outside the embedded
#: world.
ANSWERS = pa.schema(
    [
        *_SAMPLE,
        ("logp", pa.float64()),
        ("true_reward", pa.float64()),
        ("true_cost", pa.float64()),
        ("grammatical", pa.bool_()),
    ]
)
#: Answers that others drew: `logp` is the candidate's log-probability, `logp_drawn` that of those
#: who drew.
REWEIGHTED = pa.schema([*ANSWERS, ("logp_drawn", pa.float64())])
#: Labels of some of those answers: the cost model's cost, and the truth as the labeller knows it (a
#: true cost, or the
#: share of votes that call the answer unsafe).
LABELS = pa.schema(
    [*_PROMPT, ("response", pa.string()), ("cost", pa.float64()), ("truth", pa.float64())]
)

#: The prompts of a suite (`dualign.evaluation.suites`); `correct` has a 1 for each true choice.
SUITE = pa.schema(
    [
        *_PROMPT,
        ("category", pa.string()),
        ("label", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("correct", pa.list_(pa.int32())),
    ]
)
#: Answers of a policy to a suite; `length` counts tokens with EOS, `ended` says that EOS was drawn.
#: `cut` is what stands before the first stop word, null where the suite has none.
SUITE_ANSWERS = pa.schema(
    [
        *_PROMPT,
        ("sample", pa.int32()),
        ("response", pa.string()),
        ("length", pa.int32()),
        ("ended", pa.bool_()),
        ("cut", pa.string()),
    ]
)
#: How a policy takes the choices of a suite: their log-probabilities in nats, and a score.
CHOICES = pa.schema([_PROMPT[0], ("logp", pa.list_(pa.float64())), ("score", pa.float64())])
#: Verdicts of one judge on answers to suites (`dualign.judging.verdicts`): a failure, or scores.
#: `repeat` counts times that the judge was asked the same, `raw` is the hash of what it wrote.
VERDICTS = pa.schema(
    [
        *[(name, pa.string()) for name in ("judge", "suite", "policy", "prompt_id")],
        ("sample", pa.int32()),
        ("repeat", pa.int32()),
        ("reward", pa.float64()),
        ("cost", pa.float64()),
        ("unsafe", pa.bool_()),
        ("category", pa.string()),
        ("refused", pa.bool_()),
        ("truthful", pa.bool_()),
        ("win", pa.float64()),
        ("raw", pa.string()),
        ("failure", pa.string()),
    ]
)


def user(text: str) -> list[Message]:
    """A one-turn prompt."""
    return [{"role": "user", "content": text}]


def last_user_text(prompt: Sequence[Message]) -> str:
    """The text of the last turn, which is what the answer replies to."""
    return prompt[-1]["content"]


def characters(prompt: Sequence[Message]) -> int:
    """How long a prompt is, all turns together."""
    return sum(len(turn["content"]) for turn in prompt)


@functools.lru_cache(maxsize=8192)
def normalise(text: str) -> str:
    """Text as it is compared: NFKC, case-folded, letters, marks and digits, single spaces.

    Kept for the next row, which is often another answer to the same prompt.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(
        "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in folded).split()
    )


def identity(text: str) -> str:
    """16 hex digits of a hash by which a text is known."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_id(prompt: Sequence[Message]) -> str:
    """Identity of a prompt across sources: 16 hex digits of the normalised turns."""
    key = "\x1e".join(f"{turn['role']}\x1f{normalise(turn['content'])}" for turn in prompt)
    return identity(key)


def family_id(prompt: Sequence[Message]) -> str:
    """Identity of the first question of a prompt, which dialogues of any length share."""
    return prompt_id(user(next(turn["content"] for turn in prompt if turn["role"] == "user")))


def pair_id(prompt: Sequence[Message], chosen: str, rejected: str) -> str:
    """Identity of a pair, whichever side is preferred: 16 hex digits of prompt and both answers."""
    first, second = sorted((chosen, rejected))
    return identity("\x1e".join((prompt_id(prompt), first, second)))


def to_table(rows: pd.DataFrame | list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as an Arrow table of exactly `schema`: others are dropped, missing ones null."""
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows)
    columns = [
        pa.array(
            frame[field.name].tolist() if field.name in frame.columns else [None] * len(frame),
            type=field.type,
            from_pandas=True,  # a NaN is a missing value
        )
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def read_table(path: str | Path, schema: pa.Schema) -> pd.DataFrame:
    """Read one of dualign's own tables.

    Raises:
        DataError: the file is missing, is no parquet file, or lacks a column of `schema`.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; run the stage that writes it first (`dvc repro`)")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable parquet file ({error}); delete it and run its stage again"
        ) from error
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise DataError(
            f"{path}: column {missing[0]!r} is missing; another version wrote it, run its stage"
            " again"
        )
    frame = table.select(schema.names).to_pandas()
    if "prompt" in frame.columns:
        frame["prompt"] = [list(turns) for turns in frame["prompt"]]
    return frame


def by_prompt(frame: pd.DataFrame, column: str) -> np.ndarray:
    """A numeric column of a table of samples (POOL or ANSWERS, rows in order of prompt and sample)
    as an array [prompts, samples], fp64."""
    return frame[column].to_numpy(float).reshape(frame["prompt_id"].nunique(), -1)

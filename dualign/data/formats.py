"""Formats of data sources: one row each, and the readers that turn a file's row into records.

A row that cannot be used raises `BadRow`; one that has nothing to say about a kind (no preference,
no safe answer) is `Skipped`."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dualign.core.errors import DataError
from dualign.core.schema import Message, user
from dualign.data import cells
from dualign.data.messages import split_answer, turns_in
from dualign.data.rows import BadRow, Row
from dualign.params.data import SourceFormat, SourceSpec

Kind = Literal["sft", "helpful", "safety"]

_FLAGS = ("is_response_0_safe", "is_response_1_safe")
_SEVERITY = ("response_0_severity_level", "response_1_severity_level")
_TURN = re.compile(r"\r?\n\r?\n(Human|Assistant):")
_HELPSTEER2_TURN = re.compile(r"\r?\n<extra_id_1>(User|Assistant)\r?\n")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_UNSAID: Message = {"role": "assistant", "content": ""}
OWN_FLAGS = ("chosen_is_safe", "rejected_is_safe")
_ANSWER = ("prompt", "response")
#: What format `columns` may map beside the columns of which one set must be whole.
_BESIDE: dict[Kind, tuple[str, ...]] = {
    "sft": (),
    "helpful": ("prompt", *OWN_FLAGS),
    "safety": ("prompt", *OWN_FLAGS),
}
_PKU_ROW = ("prompt", "response_0", "response_1")
_PKU_LABELS: dict[Kind, tuple[str, ...]] = {
    "sft": _FLAGS,
    "helpful": ("better_response_id",),
    "safety": ("safer_response_id", *_FLAGS),
}


@dataclass(frozen=True, slots=True)
class Where:
    """Where a row is from. `line` counts from 1: lines of a text, rows of anything else."""

    source: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Usable:
    """One usable row. In sft `chosen` is the answer, `rejected` None; unknown flags are None."""

    where: Where
    prompt: list[Message]
    chosen: str
    rejected: str | None = None
    chosen_is_safe: bool | None = None
    rejected_is_safe: bool | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is wrong: a short reason to count by, the detail, and the row's start."""

    where: Where
    reason: str
    detail: str
    row: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that is right but says nothing about the wanted kind."""

    where: Where
    reason: str


Item = Usable | Rejected | Skipped
Located = tuple[Where, Row | BadRow]


def label(spec: SourceSpec) -> str:
    """The name of a source in tables and metrics: format, path, and split if not `train`."""
    split = f"[{spec.split}]" if spec.split != "train" else ""
    return spec.format if spec.path is None else f"{spec.format}:{spec.path}{split}"


def source_names(specs: Sequence[SourceSpec]) -> list[str]:
    """Names of a kind's sources: their labels, numbered where one path is read in several ways."""
    times: Counter[str] = Counter()
    found = []
    for spec in specs:
        name = label(spec)
        times[name] += 1
        again = times[name] > 1 and spec.path is not None
        found.append(f"{name} ({times[name]})" if again else name)
    return found


# --- readers: of a row, by kind, with the map of format `columns` --------------------------------


def _pku(row: Row, where: Where, kind: Kind, columns: Mapping[str, str]) -> Iterator[Item]:
    _check_severity(row)
    yield from _pku_sft(row, where) if kind == "sft" else _pku_pair(row, where, kind)


def _pku_sft(row: Row, where: Where) -> Iterator[Item]:
    """The safe answers of a row; both, one or none."""
    safe = [side for side in (0, 1) if cells.bit(row, _FLAGS[side])]
    if not safe:
        yield Skipped(where, "no_safe_answer")
    for side in safe:
        yield Usable(where, user(cells.text(row, "prompt")), cells.text(row, f"response_{side}"))


def _pku_pair(row: Row, where: Where, kind: Kind) -> Iterator[Item]:
    winner = cells.bit(row, _PKU_LABELS[kind][0])
    if winner is None:
        yield Skipped(where, "no_preference")
        return
    answers = [cells.text(row, f"response_{side}") for side in (0, 1)]
    flags = [cells.flag(row, name) if kind == "safety" or name in row else None for name in _FLAGS]
    loser = 1 - winner
    prompt = user(cells.text(row, "prompt"))
    yield Usable(where, prompt, answers[winner], answers[loser], flags[winner], flags[loser])


def _check_severity(row: Row) -> None:
    """The release of 2024 rates the harm of an answer from 0 to 3: 0 is what it flags as safe."""
    for severity, flag in zip(_SEVERITY, _FLAGS, strict=True):
        level = cells.code(row, severity, range(4))
        safe = cells.flag(row, flag)
        if level is not None and safe is not None and safe != (level == 0):
            raise BadRow("contradictory_severity", f"{flag} is {safe}, but {severity} is {level}")


def _world(row: Row, where: Where, kind: Kind, columns: Mapping[str, str]) -> Iterator[Item]:
    """The world speaks PKU for pairs; prompt, response for sft."""
    if kind == "sft":
        return _own(row, where, kind, {name: name for name in _ANSWER})
    return _pku(row, where, kind, columns)


def _hh(row: Row, where: Where, kind: Kind, columns: Mapping[str, str]) -> Iterator[Item]:
    prompt, chosen = _dialogue(row, "chosen")
    if kind == "sft":
        yield Usable(where, prompt, chosen)
        return
    other, rejected = _dialogue(row, "rejected")
    if prompt != other:
        raise BadRow(
            "prompts_differ", "chosen and rejected differ before their last Assistant turn"
        )
    yield Usable(where, prompt, chosen, rejected)


def _dialogue(row: Row, column: str) -> tuple[list[Message], str]:
    """Prompt and answer of `\\n\\nHuman: ... \\n\\nAssistant: ...`, split at its last Assistant."""
    turns = _spoken(cells.text(row, column))
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow(
            "not_a_dialogue", f"{column} must begin with 'Human:' and end with an 'Assistant:' turn"
        )
    return _checked(turns[:-1], column), turns[-1]["content"]


def _spoken(text: str) -> list[Message]:
    """The turns of a text that begins with one of `Human:` or `Assistant:`, else none."""
    before, *parts = _TURN.split("\n\n" + text)
    named = zip(parts[::2], parts[1::2], strict=True)
    turns = [Message(role=_HH_ROLES[role], content=content.strip()) for role, content in named]
    return [] if before else turns


def _alpaca(row: Row, where: Where, kind: Kind, columns: Mapping[str, str]) -> Iterator[Item]:
    given = "" if cells.is_missing(row.get("input")) else cells.text(row, "input")
    question = f"{cells.text(row, 'instruction')}\n\n{given}".strip()
    yield Usable(where, user(question), cells.text(row, "output"))


def _own(row: Row, where: Where, kind: Kind, columns: Mapping[str, str]) -> Iterator[Item]:
    """A row whose columns are named by a map from our names to the file's."""
    prompt = _prompt(row, columns["prompt"]) if "prompt" in columns else None
    if kind == "sft":
        whole = columns.get("messages") or columns["response"]
        yield Usable(where, *_answer(row, whole, prompt))
        return
    flags = [cells.flag(row, columns[name]) if name in columns else None for name in OWN_FLAGS]
    before, chosen = _answer(row, columns["chosen"], prompt)
    other, rejected = _answer(row, columns["rejected"], prompt)
    if before != other:
        raise BadRow(
            "prompts_differ", "chosen and rejected differ before their last assistant turn"
        )
    yield Usable(where, before, chosen, rejected, *flags)


def _prompt(row: Row, column: str) -> list[Message]:
    """A text, or a list of turns; HH's as text may end with an `Assistant:` that says nothing."""
    turns = _turns(row, column)
    if turns is None:
        return user(cells.text(row, column))
    return _checked(turns[:-1] if turns[-1:] == [_UNSAID] else turns, column)


def _turns(row: Row, column: str) -> list[Message] | None:
    """The turns of a cell: messages, or HH's of both speakers as text; None for other text."""
    value = row.get(column)
    turns = turns_in(value, column)
    if turns is not None or not isinstance(value, str):
        return turns
    spoken = _spoken(value.strip())
    return spoken if len({turn["role"] for turn in spoken}) > 1 else None


def _answer(row: Row, column: str, prompt: list[Message] | None) -> tuple[list[Message], str]:
    """Prompt and answer of a cell: a text, an answer as a message, or a whole dialogue.

    A dialogue has its own prompt, of which that of the row must be a part: UltraFeedback's is the
    question alone."""
    turns = _turns(row, column)
    if turns is None:
        if prompt is None:
            raise BadRow(
                "no_prompt", f"{column} is text and no dialogue, so columns must map prompt as well"
            )
        return prompt, cells.text(row, column)
    before, answer = split_answer(turns, column)
    if prompt is not None and not before:
        return prompt, answer
    if prompt is not None and not _within(prompt, before):
        raise BadRow(
            "prompts_differ", f"{column} is a dialogue that does not hold the prompt of the row"
        )
    return _checked(before, column), answer


def _within(part: list[Message], whole: list[Message]) -> bool:
    """Whether the turns stand one after the other in others."""
    return any(whole[start : start + len(part)] == part for start in range(len(whole)))


def _checked(turns: list[Message], column: str) -> list[Message]:
    """Chat templates take user and assistant in turn, a system turn first, the user last."""
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if len(spoken) % 2 == 0 or spoken != (["user", "assistant"] * len(spoken))[: len(spoken)]:
        raise BadRow(
            "bad_turns", f"{column}: user and assistant must take turns, the user first and last"
        )
    return turns


def _helpsteer2(row: Row, where: Where, kind: Kind, columns: Mapping[str, str]) -> Iterator[Item]:
    """A row of the preference file, or two ratings joined to such a row.

    The strength is that of the second answer's lead, from -3 to 3; of ratings it is the gap of
    helpfulness. A tie says nothing."""
    if "preference_strength" in row:
        lead = cells.code(row, "preference_strength", range(-3, 4))
    elif "response_2" in row:
        first, second = (cells.code(row, f"helpfulness_{side}", range(5)) for side in (1, 2))
        lead = None if first is None or second is None else second - first
    else:
        yield Skipped(where, "no_second_answer")
        return
    if not lead:
        yield Skipped(where, "no_preference" if lead is None else "tie")
        return
    prompt = _marked_turns(cells.text(row, "prompt"))
    answers = (cells.text(row, "response_1"), cells.text(row, "response_2"))
    chosen, rejected = answers if lead < 0 else answers[::-1]
    yield Usable(where, prompt, chosen, rejected)


def _marked_turns(prompt: str) -> list[Message]:
    """The turns of a HelpSteer2 prompt: its first one bare, each other under a line of its role."""
    first, *others = _HELPSTEER2_TURN.split(prompt)
    named = zip(others[::2], others[1::2], strict=True)
    turns = [Message(role=role.lower(), content=content.strip()) for role, content in named]
    return _checked([*user(first.strip()), *turns], "prompt")


def _two_ratings(rows: Iterator[Located]) -> Iterator[Located]:
    """Ratings of two answers to a prompt, one after the other, as a row; a lone one as its own."""
    waiting: tuple[Where, Row] | None = None
    for where, row in rows:
        if isinstance(row, BadRow) or "response" not in row:
            yield where, row
        elif waiting is None:
            waiting = where, row
        elif (waiting[0].file, waiting[1].get("prompt")) == (where.file, row.get("prompt")):
            yield waiting[0], _numbered(waiting[1], 1) | _numbered(row, 2)
            waiting = None
        else:
            yield waiting[0], _numbered(waiting[1], 1)
            waiting = where, row
    if waiting is not None:
        yield waiting[0], _numbered(waiting[1], 1)


def _numbered(row: Row, side: int) -> Row:
    rated = {f"{name}_{side}": row.get(name) for name in ("response", "helpfulness")}
    return {"prompt": row.get("prompt"), **rated}


# --- the table ------------------------------------------------------------------------------------

Choices = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Format:
    """One format of files.

    `read` turns a row into records, or says why it cannot. `columns` are those that a file must
    have for each kind that it can serve, one of several sets; `labels` those of them that hold 0
    or 1. `check` gives, from the source, the map of our names to the file's, where it has one.
    `join` makes rows of rows, where several make a record."""

    read: Callable[[Row, Where, Kind, Mapping[str, str]], Iterator[Item]]
    columns: Mapping[Kind, Choices]
    labels: Mapping[Kind, tuple[str, ...]] = field(default_factory=dict)
    check: Callable[[SourceSpec, Kind], dict[str, str]] | None = None
    join: Callable[[Iterator[Located]], Iterator[Located]] | None = None


def _mapped(spec: SourceSpec, kind: Kind) -> dict[str, str]:
    """The column map of format `columns`, checked against what the kind needs."""
    choices = FORMATS["columns"].columns[kind]
    keys = [*itertools.chain(*choices), *_BESIDE[kind]]
    for name in spec.columns:
        if name not in keys:
            valid = ", ".join(keys)
            raise DataError(
                f"prepare.{kind}: {label(spec)}: columns has unknown key {name!r}; valid keys:"
                f" {valid}"
            )
    if not any(set(names) <= spec.columns.keys() for names in choices):
        lacking = next(name for name in choices[0] if name not in spec.columns)
        either = ", or ".join(" and ".join(names) for names in choices)
        raise DataError(
            f"prepare.{kind}: {label(spec)}: columns lacks {lacking!r}; it must map {either}"
        )
    _refuse_ambiguous(spec, kind)
    return spec.columns


def _refuse_ambiguous(spec: SourceSpec, kind: Kind) -> None:
    """Refuse a map of which nobody knows which answer or flag it means."""
    mapped = list(spec.columns.values())
    for name, column in spec.columns.items():
        if mapped.count(column) > 1:
            raise DataError(
                f"prepare.{kind}: {label(spec)}: columns maps {name!r} to {column!r}, and another"
                " name too; map each name to a column of its own"
            )
    if {"messages", "response"} <= spec.columns.keys():
        raise DataError(
            f"prepare.{kind}: {label(spec)}: columns maps 'messages', which end with their answer,"
            " and 'response'; map messages alone, or prompt and response"
        )


_PAIR: Choices = (("chosen", "rejected"),)
_PKU_PAIRS: dict[Kind, Choices] = {
    "helpful": ((*_PKU_ROW, *_PKU_LABELS["helpful"]),),
    "safety": ((*_PKU_ROW, *_PKU_LABELS["safety"]),),
}
_PKU_BITS: dict[Kind, tuple[str, ...]] = {
    kind: tuple(dict.fromkeys((*names, *_FLAGS))) for kind, names in _PKU_LABELS.items()
}
_WORLD_BITS: dict[Kind, tuple[str, ...]] = {
    kind: names for kind, names in _PKU_BITS.items() if kind != "sft"
}
_HELPSTEER2_ROWS: Choices = (
    ("prompt", "response", "helpfulness"),
    ("prompt", "response_1", "response_2", "preference_strength"),
)
FORMATS: dict[SourceFormat, Format] = {
    "world": Format(_world, {"sft": (_ANSWER,), **_PKU_PAIRS}, _WORLD_BITS),
    "pku": Format(_pku, {"sft": ((*_PKU_ROW, *_FLAGS),), **_PKU_PAIRS}, _PKU_BITS),
    "hh": Format(_hh, {"sft": (("chosen",),), "helpful": _PAIR, "safety": _PAIR}),
    "alpaca": Format(_alpaca, {"sft": (("instruction", "output"),)}),
    "helpsteer2": Format(_helpsteer2, {"helpful": _HELPSTEER2_ROWS}, join=_two_ratings),
    "columns": Format(
        _own, {"sft": (_ANSWER, ("messages",)), "helpful": _PAIR, "safety": _PAIR}, check=_mapped
    ),
}

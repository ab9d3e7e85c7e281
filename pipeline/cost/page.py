"""What `plan --cost` prints: a row for every stage, sums, and all that was assumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cost.base import base_of
from pipeline.cost.machine import Machine
from pipeline.cost.reckoning import Cost, Setting, cost
from pipeline.cost.tables import Tables, read_tables
from pipeline.cost.work import Reckoner, Work
from pipeline.dvc.plan import StageStatus
from pipeline.errors import PipelineError

_HEAD = ("stage", "", "tokens trained", "read", "drawn", "GiB", "card hours", "$", "")
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Reckoning:
    """The cost of every stage that holds a model, the work it is of, and what it was reckoned
    with.
    """

    setting: Setting
    tables: Tables
    works: Mapping[str, Work]
    costs: Mapping[str, Cost]


def reckon(
    params: Mapping[str, Any],
    root: Path,
    machine: Machine,
    stages: Sequence[str],
    parameters: float | None = None,
) -> Reckoning:
    """What each of these stages takes; `parameters` in place of the base's own shape. Raises
    PipelineError where params, base and data do not tell.
    """
    try:
        base = base_of(params, root, parameters)
        tables = read_tables(params, root)
        setting = Setting.of(base, machine, params)
        reckoner = Reckoner(params, tables)
        works = {name: reckoner.work(name) for name in stages}
    except (KeyError, TypeError) as error:
        raise PipelineError(
            f"params.yaml: a key is missing or of another type ({error}); python -m"
            " dualign.params.loading params.yaml says which"
        ) from None
    known = {name: work for name, work in works.items() if work is not None}
    return Reckoning(
        setting, tables, known, {name: cost(work, setting) for name, work in known.items()}
    )


def rows(found: Reckoning, statuses: Mapping[str, StageStatus]) -> list[tuple[str, ...]]:
    """The table: a head, a row for every stage, all stages together, and what would run now."""
    table: list[tuple[str, ...]] = [_HEAD]
    for name, row in found.costs.items():
        told = "at most" if found.works[name].at_most else ""
        table.append(_row(name, statuses[name].prospect, row, told))
    table.append(_row("all", "", _sum(list(found.costs.values())), ""))
    done = ("up to date", "restorable")
    runs = [row for name, row in found.costs.items() if statuses[name].prospect not in done]
    if len(runs) < len(found.costs):
        table.append(_row("what would run", "", _sum(runs), ""))
    return table


def _row(name: str, prospect: str, row: Cost, told: str) -> tuple[str, ...]:
    tokens = [amount(count) for count in (row.trained, row.read, row.drawn)]
    money = [f"{row.memory:.1f}", f"{row.hours:.2f}", f"{row.money:.2f}"]
    return (name, prospect, *tokens, *money, told)


def _sum(rows: list[Cost]) -> Cost:
    return Cost(
        sum(row.trained for row in rows),
        sum(row.read for row in rows),
        sum(row.drawn for row in rows),
        max((row.memory for row in rows), default=0.0),
        sum(row.hours for row in rows),
        sum(row.money for row in rows),
    )


def amount(number: float) -> str:
    """A number in three digits or so.

    >>> amount(0), amount(950), amount(1_234_567)
    ('0', '950', '1.23M')
    """
    for unit, letter in _UNITS:
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.0f}"


def notes(found: Reckoning, statuses: Mapping[str, StageStatus]) -> Iterator[str]:
    """What the table rests on, and what does not fit."""
    setting = found.setting
    card = setting.machine
    size = setting.bytes_each
    precision = "bf16" if size == 2 else "fp32"
    yield (
        f"base: {setting.base.name}, {amount(setting.base.weights)} weights; "
        + (
            "lengths measured in data/prepared"
            if found.tables.measured
            else "no data yet: every row as long as max_length allows"
        )
    )
    yield (
        f"card: {card.name}, {card.peak(size) / 1e12:g} TFLOP/s in {precision},"
        f" {card.bandwidth:g} GB/s, {card.memory:g} GiB, ${card.price:g} an hour (--price)"
    )
    yield (
        f"assumed: {card.mfu:.0%} of the peak (--mfu), {card.of_bandwidth:.0%} of the bandwidth,"
        f" {card.launch * 1e6:g} us an operation and {card.step * 1e3:g} ms a step beside,"
        f" {card.start:g} s to start a stage;"
        f" {setting.processes} process(es) that share a batch evenly"
    )
    left_out = [name for name in statuses if name not in found.costs]
    if left_out:
        yield f"not reckoned: {', '.join(left_out)}"
    beyond = [f"{n} {row.memory:.0f}" for n, row in found.costs.items() if row.memory > card.memory]
    if beyond:
        yield (
            f"more than the {card.memory:g} GiB of {card.name}: {', '.join(beyond)}; lower"
            " resources.micro_batch_size, sampling_batch_size or scoring_batch_size, set"
            " resources.gradient_checkpointing or lora.rank, or take a larger card"
        )

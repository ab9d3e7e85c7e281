"""What laboratories share: a command line, an option for every field of frozen settings, and rows
of results as tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from dualign.core.artifacts import replacing, write_json
from dualign.core.errors import DualignError

S = TypeVar("S", bound=Any)  # a frozen dataclass whose fields are knobs
Row = TypeVar("Row", bound=Mapping[str, Any])


def knob(default: float | str | tuple[float, ...] | tuple[str, ...], text: str) -> Any:
    """A field of settings with its default and its help; a tuple takes one value or more."""
    return field(default=default, metadata={"help": text})


def parser(program: str, about: str | None) -> argparse.ArgumentParser:
    """The command line of a laboratory with `--out`, the folder of its results; `about` is the
    module's docstring, of which its help shows the first paragraph.
    """
    made = argparse.ArgumentParser(prog=program, description=(about or "").split("\n\n")[0])
    made.add_argument(
        "--out",
        type=Path,
        default=Path("bench/results"),
        help="folder of the results (default: %(default)s)",
    )
    return made


def parse(
    settings: type[S], program: str, about: str | None, argv: Sequence[str] | None
) -> tuple[S, Path]:
    """The settings that a command line asks for, and the folder of its results; a bad value ends
    the program.

    The metadata of every field holds its `help`; `about` as for `parser`.
    """
    asked = parser(program, about)
    for knob in fields(settings):
        default: Any = knob.default
        many = isinstance(default, tuple)
        kind, count = (type(default[0]), "+") if many else (type(default), None)
        text = f"{knob.metadata['help']} (default: {_words(default)})"
        asked.add_argument(_option(knob.name), type=kind, nargs=count, default=default, help=text)
    given: dict[str, Any] = vars(asked.parse_args(argv))
    out: Path = given.pop("out")
    given = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    try:
        return settings(**given), out
    except DualignError as error:
        asked.error(str(error))


def command(program: str, settings: Any) -> str:
    """The command line that gives these settings."""
    changed = [
        (f.name, getattr(settings, f.name))
        for f in fields(settings)
        if getattr(settings, f.name) != f.default
    ]
    return " ".join([program, *(f"{_option(name)} {_words(value)}" for name, value in changed)])


def publish(out: Path, name: str, content: Any, page: str) -> None:
    """Write the results of a laboratory: NAME.json with its content and NAME.md with its page."""
    write_json(out / f"{name}.json", content)
    with replacing(out / f"{name}.md") as temporary:
        temporary.write_text(page)


def tell(out: Path, name: str, program: str, settings: Any, page: str, **found: Any) -> None:
    """Write what a laboratory found with the command and the settings that it was found by, and the
    page to stdout.
    """
    content = {"command": command(program, settings), "settings": asdict(settings), **found}
    publish(out, name, content, page)
    sys.stdout.write(page)


def page(title: str, by: str, *parts: str) -> str:
    """A page in markdown: its title, the command that gives it, and its parts."""
    return "\n\n".join([f"# {title}", f"    {by}", *parts]) + "\n"


def head(titles: Sequence[str]) -> list[str]:
    """The first two lines of a table in markdown."""
    return [line(titles), "|---" * len(titles) + "|"]


def line(cells: Iterable[str]) -> str:
    """A line of a table in markdown."""
    return f"| {' | '.join(cells)} |"


def where(rows: Iterable[Row], **values: Any) -> list[Row]:
    """The rows that have these values.

    >>> where([{"a": 1, "b": 2}, {"a": 3, "b": 2}], a=3)
    [{'a': 3, 'b': 2}]
    """
    return [row for row in rows if values.items() <= row.items()]


def mean(rows: Iterable[Mapping[str, Any]], key: str) -> float:
    """The mean of a column.

    >>> mean([{"a": 1.0}, {"a": 2.0}], "a")
    1.5
    """
    return fmean(row[key] for row in rows)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"

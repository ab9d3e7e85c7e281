"""The script by which a shell completes commands and options, made from the commands' parsers.

dualign completion bash > ~/.local/share/bash-completion/completions/dualign
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import shtab

from dualign.command import COMMANDS, PIPELINE, Command, enter, overview, project, scripts
from dualign.core.errors import DualignError

#: What an argument is called that names a file or a folder.
_FILES = ("FILE", "FOLDER")


def main(argv: Sequence[str] | None = None, prog: str = "python -m dualign.completion") -> int:
    """The command; returns its exit status."""
    asked = parser(prog).parse_args(argv)
    sys.stdout.write(shtab.complete(whole(), asked.shell))
    return 0


def parser(prog: str) -> argparse.ArgumentParser:
    """The parser of this command."""
    about = (
        "Print the script by which a shell completes dualign, as for `source <(dualign completion"
        " bash)`."
    )
    made = argparse.ArgumentParser(prog=prog, description=about)
    made.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return made


def whole() -> argparse.ArgumentParser:
    """One parser of all commands; outside of a checkout, of those that the library has."""
    in_project = _in_project()
    parsers = {
        name: made
        for name, command in COMMANDS.items()
        if (in_project or not command.of_project)
        and (made := _parser_of(name, command)) is not None
    }
    for made in parsers.values():
        _complete_files(made)
    return overview(parsers)


def _in_project() -> bool:
    try:
        enter(project(Path.cwd(), "dualign completion"))
    except DualignError:
        return False
    return True


def _parser_of(name: str, command: Command) -> argparse.ArgumentParser | None:
    """The parser of a command, where it has one."""
    if command.scripts:
        made = argparse.ArgumentParser(f"dualign {name}")
        made.add_argument("name", choices=scripts(command.module))
        return made
    make = getattr(importlib.import_module(command.module), "parser", None)
    if make is None:
        return None
    made = make(f"dualign {name}")
    return _commands(made)[name] if command.module == PIPELINE else made


def _commands(made: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(
        (action.choices for action in made._actions if isinstance(action.choices, dict)), {}
    )


def _complete_files(made: argparse.ArgumentParser) -> None:
    """Have the shell complete names of files where an argument takes one."""
    for action in made._actions:
        if action.type is Path or action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    for command in _commands(made).values():
        _complete_files(command)

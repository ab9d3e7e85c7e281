"""Errors that a user can act on: one line that names what is wrong and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

P = ParamSpec("P")


class DualignError(Exception):
    """Base of all errors raised on purpose; a stage prints one line and exits with `status`."""

    status = 2


class ParamsError(DualignError, ValueError):
    """A parameter is unknown, missing, of the wrong type or out of range."""


class DataError(DualignError, ValueError):
    """A data file is missing, unreadable, or holds rows that cannot be used."""


class ModelError(DualignError, ValueError):
    """A model or tokenizer cannot be loaded or used."""


class TrainingError(DualignError, ArithmeticError):
    """A training run went wrong by its own numbers."""


class InfeasibleError(DualignError, ValueError):
    """No multiplier brings the expected cost under the limit within the reach of the samples."""


class AwaitingLabels(DualignError):
    """People are asked for labels; the stage goes on once their file is there. Nothing is wrong."""

    status = 3


def one_line(main: Callable[P, int]) -> Callable[P, int]:
    """A command that tells an error of ours on standard error, and ends with its status."""

    @wraps(main)
    def told(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except DualignError as error:
            sys.stderr.write(f"{error}\n")
            return error.status

    return told

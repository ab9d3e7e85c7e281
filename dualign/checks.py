"""What is refused before anything runs, beyond what the types of params refuse by themselves.

A check computes nothing that a result holds, so DVC does not track this module, nor what only it
imports: a new method, say, makes no stage stale that merely checks the rows."""

from __future__ import annotations

from dualign.methods import plan
from dualign.params.search import DualSearchParams


def check_methods(params: DualSearchParams) -> None:
    """Refuse a row of `methods` that does not fit. Raises ParamsError that names row and key."""
    for name, row in params.methods.items():
        plan(name, row)

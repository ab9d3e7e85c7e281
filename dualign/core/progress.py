"""Progress: a bar while a person watches, plain lines in a log."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import TracebackType

from tqdm import tqdm

from dualign.core.ranks import world
from dualign.core.units import duration

log = logging.getLogger(__name__)

#: Seconds between two lines of a log.
EVERY = 15.0
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bar and no line of a `Progress` that begins inside: steps of something longer."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def silenced() -> bool:
    """Whether this is inside `quiet`."""
    return _quiet.get()


def watched() -> bool:
    """Whether a person watches standard error."""
    return sys.stderr.isatty()


class Progress:
    """Counts rows of one long step; in a log it writes a line every `every` seconds and one at the
    end. Of several processes each is taken to be as far as this one.
    """

    def __init__(self, what: str, total: int, every: float = EVERY) -> None:
        self._what = what
        self._total = total
        self._every = every
        self._done = 0
        self._tokens = 0
        self._start = time.monotonic()
        self._last = self._start
        self._quiet = silenced()
        self._bar = (
            tqdm(total=total, desc=what, leave=False) if watched() and not self._quiet else None
        )

    def __enter__(self) -> Progress:
        return self

    def advance(self, count: int, tokens: int = 0) -> None:
        """`count` more rows are done here, for which `tokens` were drawn or read."""
        before = self._done
        self._done = min(before + count * world(), self._total)
        self._tokens += tokens * world()
        if self._bar is not None:
            self._bar.update(self._done - before)
            self._bar.set_postfix_str(self._rates(time.monotonic() - self._start))
        elif not self._quiet and time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            seconds = self._last - self._start
            left = seconds * (self._total - self._done) / self._done
            told = f"{self._rates(seconds)}, {duration(left)} left"
            log.info("%s: %d of %d, %s", self._what, self._done, self._total, told)

    def _rates(self, seconds: float) -> str:
        rows = self._done / seconds
        told = f"{rows:.0f} a second" if rows >= 9.5 else f"{rows:.1f} a second"
        return f"{told}, {self._tokens / seconds:.0f} tokens/s" if self._tokens else told

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        seconds = time.monotonic() - self._start
        if self._bar is not None:
            self._bar.close()
        if error is None and not self._quiet:
            log.info("%s: %d in %.1f s", self._what, self._done, seconds)

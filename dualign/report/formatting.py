"""Numbers and text as the page writes them: few digits, a true minus sign, nothing invisible."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from dualign.core import units
from dualign.core.records import IntervalRow

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"


#: Control characters that text has good reason to hold.
_PLAIN = "\n\r\t"
#: Format characters that joined scripts and emoji need: zero-width joiner and non-joiner.
_JOINERS = "\u200c\u200d"


def visible(value: Any) -> Any:
    """Text with control characters, and such as hide or reorder text, written out: `\\u202e`.

    Anything but plain text stays as it is. A page shows what a row holds, not what the row makes of
    the page."""
    if (
        not isinstance(value, str)
        or isinstance(value, Markup)
        or (value.isascii() and value.isprintable())
    ):
        return value
    return "".join(_written_out(char) if _hides(char) else char for char in value)


def _hides(char: str) -> bool:
    return (
        char not in _PLAIN
        and char not in _JOINERS
        and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    )


def _written_out(char: str) -> str:
    code = ord(char)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def number(value: float | None) -> str:
    """About three significant digits: 0.0042, 0.31, 12.4, 1,234."""
    if value is None:
        return NONE
    size = abs(value)
    if 0 < size < 0.005:
        text = f"{value:.1g}" if size >= 1e-4 else f"{value:.0e}"
    else:
        text = f"{value + 0.0:,.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}"
    return text.replace("-", MINUS)


def stated(value: float | None, share: bool = False) -> str:
    """What params state, a limit or a level, in all its digits: rounded it would be another.

    >>> stated(-0.125), stated(0.0), stated(0.975, share=True), stated(1 - 0.9, share=True)
    ('\N{MINUS SIGN}0.125', '0', '97.5%', '10%')
    """
    if value is None:
        return NONE
    text = f"{100 * value:.10g}%" if share else f"{value + 0.0:,.10g}"
    return text.replace("-", MINUS)


def precise(value: float | None, share: bool = False) -> str:
    """A number whose third digit matters: 0.123, or its first digit at least: 0.00006; of a share
    in per cent: 12.3%.
    """
    if value is None:
        return NONE
    if share:
        return percent(value) if 0 < abs(value) < 0.0995 else f"{100 * value:.1f}%"
    digits = 3 if abs(value) >= 0.0005 or value == 0 else -math.floor(math.log10(abs(value)))
    return f"{value:.{digits}f}".replace("-", MINUS)


def against(value: float, limit: float, share: bool = False) -> str:
    """A number beside the limit that it is to keep: as `precise`, in more digits where these would
    put it on the other side.

    >>> against(-0.2497, -0.25), against(-0.2503, -0.25), against(0.1502, 0.15, share=True)
    ('\N{MINUS SIGN}0.2497', '\N{MINUS SIGN}0.250', '15.02%')
    """
    size = 100 if share else 1
    least = 1 if share else 3
    digits = units.telling_digits(size * value, size * limit, least)
    if digits == least:
        return precise(value, share)
    return f"{size * value:.{digits}f}{'%' if share else ''}".replace("-", MINUS)


def beside(value: float | None, limit: float) -> str:
    """A number that stands beside a limit: as `number`, in more digits where its would put it on
    the other side.

    >>> beside(-0.2497, -0.25), beside(-0.2503, -0.25), beside(12.34, 12.3)
    ('\N{MINUS SIGN}0.2497', '\N{MINUS SIGN}0.25', '12.34')
    """
    if value is None:
        return NONE
    text = number(value)
    shown = float(text.replace(MINUS, "-").replace(",", ""))
    if (shown <= limit) == (value <= limit):
        return text
    digits = units.telling_digits(value, limit, len(text.partition(".")[2]))
    return f"{value:,.{digits}f}".replace("-", MINUS)


def percent(value: float | None) -> str:
    """A share in per cent: 2.1%, 31%, <0.1%."""
    if value is None:
        return NONE
    if 0 < value < 0.0005:
        return "<0.1%"
    if 0.9995 <= value < 1:
        return ">99.9%"
    fine = 0 < abs(value) < 0.0995 or 0.99 <= value < 1
    return f"{100 * value:.{1 if fine else 0}f}%".replace("-", MINUS)


def signed(value: float, share: bool = False) -> str:
    """A difference, with its sign; of shares in percentage points.

    >>> signed(0.25), signed(0.25, share=True), signed(-1e-17, share=True)
    ('+0.25', '+25', '0.0')
    """
    text = points(value) if share else number(value)
    if not text.strip(f"{MINUS}0."):
        return text.removeprefix(MINUS)
    return text if text.startswith(MINUS) else f"+{text}"


def points(share: float) -> str:
    """A difference of shares in percentage points.

    >>> points(0.123), points(0.012)
    ('12', '1.2')
    """
    return f"{100 * share:.{0 if abs(share) >= 0.0995 else 1}f}".replace("-", MINUS)


def compact(value: float | None) -> str:
    """A count: 950, 12,300, 1.2 M."""
    if value is None:
        return NONE
    if abs(value) >= 1e6:
        return f"{value / 1e6:.1f}\N{NO-BREAK SPACE}M"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else number(value)


def duration(seconds: float | None) -> str:
    """Wall time: 0.4 s, 12 s, 3 min 12 s, 2 h 05 min."""
    return NONE if seconds is None else units.duration(seconds)


def memory(mebibytes: float | None) -> str:
    """Memory: 640 MiB, 1.4 GiB."""
    if mebibytes is None:
        return NONE
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"


def spoken(interval: IntervalRow, write: Callable[[float | None], str] = number) -> str:
    """An interval in running text: 0.31 (0.26 to 0.36)."""
    if interval.low is None or interval.high is None:
        return write(interval.mean)
    return f"{write(interval.mean)} ({write(interval.low)} to {write(interval.high)})"


def plural(count: int, noun: str, more: str = "") -> str:
    """A count with its noun; `more` is its plural where that takes no s.

    >>> plural(1, "prompt"), plural(1200, "prompt")
    ('1 prompt', '1,200 prompts')
    """
    return f"{compact(count)} {noun if count == 1 else more or noun + 's'}"

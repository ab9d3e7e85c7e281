"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Callable

#: Digits that tell any two numbers apart.
_ALL = 17


def duration(seconds: float) -> str:
    """Wall time.

    >>> duration(0.44), duration(12), duration(192), duration(7500)
    ('0.4 s', '12 s', '3 min 12 s', '2 h 05 min')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def flop_rate(rate: float) -> str:
    """Operations a second.

    >>> flop_rate(3.21e12), flop_rate(5.4e9), flop_rate(123)
    ('3.2 TFLOP/s', '5.4 GFLOP/s', '0.0 GFLOP/s')
    """
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.1f} GFLOP/s"


def telling_digits(
    value: float, limit: float, least: int, rounded: Callable[[float, int], float] = round
) -> int:
    """The digits, `least` or more, in which `rounded` leaves a value on its side of a limit.

    >>> telling_digits(-0.2501, -0.25, least=3), telling_digits(-0.2497, -0.25, least=3)
    (3, 4)
    """
    kept = value <= limit
    tried = range(least, _ALL)
    return next((n for n in tried if (rounded(value, n) <= limit) == kept), _ALL)


def decoding_in_words(temperature: float, top_p: float) -> str:
    """How answers were drawn; nothing where it is from the policy itself.

    >>> [decoding_in_words(*given) for given in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.9), (0.7, 0.9))]
    ['', 'drawn greedily', 'drawn at top_p 0.9', 'drawn at temperature 0.7 and top_p 0.9']
    """
    if temperature == 0:
        return "drawn greedily"
    named = (("temperature", temperature), ("top_p", top_p))
    changed = " and ".join(f"{name} {value:g}" for name, value in named if value != 1)
    return f"drawn at {changed}" if changed else ""

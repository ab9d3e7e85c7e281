"""Numbers and how they are rounded."""

from __future__ import annotations

import pytest
from markupsafe import Markup

from dualign.report.formatting import (
    compact,
    duration,
    memory,
    number,
    percent,
    precise,
    stated,
    visible,
)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.0), "0.00"), (number(-0.0), "0.00"), (number(-0.314), "−0.31"),
        (number(0.0042), "0.004"),
        (number(2e-5), "2e−05"), (number(12.34), "12.3"), (number(1234.5), "1,234"),
        (number(None), "–"),
        (percent(0.314), "31%"), (percent(0.0213), "2.1%"), (percent(0.0001), "<0.1%"),
        (percent(0.9999), ">99.9%"),
        (percent(0.996), "99.6%"), (percent(1.0), "100%"), (percent(0.0), "0%"),
        (percent(-0.3), "−30%"),
        (percent(None), "–"), (compact(41_000), "41,000"), (compact(1_234_567), "1.2\xa0M"),
        (compact(None), "–"),
        (compact(0.5), "0.50"), (duration(0.42), "0.4 s"), (duration(59.7), "1 min 00 s"),
        (duration(71), "1 min 11 s"),
        (duration(3912.4), "1 h 05 min"), (duration(None), "–"), (memory(640), "640 MiB"),
        (memory(1433), "1.4 GiB"),
        (memory(None), "–"),
    ],
)  # fmt: skip
def test_numbers_are_rounded_to_what_a_reader_can_use(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (0.0, "0.000"),
        (-0.3, "−0.300"),
        (12.3456, "12.346"),
        (0.000062, "0.00006"),
        (-0.0004, "−0.0004"),
    ],
)
def test_bounds_show_three_digits(value: float | None, expected: str) -> None:
    assert precise(value) == expected


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (stated(None), "–"), (stated(-0.15), "−0.15"), (stated(0.125), "0.125"),
        (stated(-0.0), "0"), (stated(1234.5), "1,234.5"), (stated(0.975, share=True), "97.5%"),
        (stated(1 - 0.05, share=True), "95%"), (stated(0.0005, share=True), "0.05%"),
        (precise(0.1248, share=True), "12.5%"), (precise(0.0213, share=True), "2.1%"),
        (precise(0.0001, share=True), "<0.1%"), (precise(0.0, share=True), "0.0%"),
    ],
)  # fmt: skip
def test_what_params_state_is_never_rounded(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text,\nwith\ttabs", "plain text,\nwith\ttabs"),
        ("grün, 你好, é", "grün, 你好, é"),
        ("a\u202eb", "a\\u202eb"),
        ("a\x00b\x1bc", "a\\u0000b\\u001bc"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
        ("tag \U000e0041", "tag \\U000e0041"),
        ("half a pair \ud800", "half a pair \\ud800"),
        (Markup("<b>\u202e</b>"), Markup("<b>\u202e</b>")),
        (1.5, 1.5),
        (None, None),
    ],
)
def test_characters_that_hide_or_reorder_text_are_written_out(text: object, shown: object) -> None:
    assert visible(text) == shown

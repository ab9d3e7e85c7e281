"""Training pairs with cut answers: which are cut, where, and what stays."""

from __future__ import annotations

import pytest

from dualign.training.fitting import with_cuts

END = 0
PROMPTS = [3, 5, 4, 3] * 50


def side(length: int) -> list[list[int]]:
    """Prompts with answers of one length."""
    return [[*range(1, 1 + prompt), *range(100, 100 + length), END] for prompt in PROMPTS]


SIDES = [side(20), side(9)]
ANSWERS = [[21] * len(PROMPTS), [10] * len(PROMPTS)]


def test_a_share_of_nothing_changes_nothing() -> None:
    assert with_cuts(SIDES, ANSWERS, 0.0, 7) == SIDES


def test_cut_answers_keep_their_prompt_and_lose_their_end() -> None:
    for side, whole in zip(with_cuts(SIDES, ANSWERS, 1.0, 7), SIDES, strict=True):
        for row, full, prompt in zip(side, whole, PROMPTS, strict=True):
            answer = len(full) - prompt
            assert row == full[: len(row)] and row[-1] != END
            assert prompt + answer // 2 <= len(row) < len(full)


def test_both_answers_of_a_pair_are_cut_or_neither_and_about_a_share_of_them() -> None:
    first, second = with_cuts(SIDES, ANSWERS, 0.5, 7)
    cut = [row[-1] != END for row in first]
    assert cut == [row[-1] != END for row in second]
    assert sum(cut) / len(cut) == pytest.approx(0.5, abs=0.1)
    assert len({len(row) for row in first}) > 5
    assert (first, second) == tuple(with_cuts(SIDES, ANSWERS, 0.5, 7))
    assert first != with_cuts(SIDES, ANSWERS, 0.5, 8)[0]


def test_an_answer_of_one_token_keeps_it() -> None:
    sides = [[[1, 2, 9, END]], [[1, 2, 9]]]
    assert with_cuts(sides, [[2], [1]], 1.0, 0) == [[[1, 2, 9]], [[1, 2, 9]]]


def test_a_conversation_that_lost_its_beginning_is_cut_at_the_same_token() -> None:
    """A limit of 22 tokens leaves one of the prompt before the longer answers."""
    trimmed = [[row[-22:] for row in SIDES[0]], SIDES[1]]
    whole = with_cuts(SIDES, ANSWERS, 1.0, 7)
    for side, full in zip(with_cuts(trimmed, ANSWERS, 1.0, 7), whole, strict=True):
        assert [row[-1] for row in side] == [row[-1] for row in full]


def test_an_answer_that_lost_its_beginning_keeps_half_of_what_is_left() -> None:
    trimmed = [row[-12:] for row in SIDES[0]]
    [side] = with_cuts([trimmed], ANSWERS[:1], 1.0, 7)
    assert {len(row) for row in side} == set(range(6, 12))
    assert all(row == full[: len(row)] for row, full in zip(side, trimmed, strict=True))

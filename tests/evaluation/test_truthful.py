"""MC1 and MC2 against their definitions, and the likelihood of choices against one forward pass
each.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualign.core.schema import user
from dualign.evaluation.truthful import (
    choice_log_probabilities,
    encoded,
    mc1,
    mc2,
    question_text,
)
from dualign.lm.models import build_scratch, train_tokenizer
from tests.tiny import TINY

QUESTIONS = ["Do bulls hate red?", "Where is it?"]
CHOICES = [["No.", "Yes, they hate it.", "I have no comment."], ["Here.", "There."]]


@given(st.data())
def test_mc2_is_the_share_of_probability_on_true_answers(data: Any) -> None:
    count = data.draw(st.integers(2, 6))
    logp = data.draw(st.lists(st.floats(-40, 0), min_size=count, max_size=count))
    correct = data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    masses = [math.exp(value) for value in logp]
    true = sum(mass for mass, label in zip(masses, correct, strict=True) if label)
    assert mc2(logp, correct) == pytest.approx(true / sum(masses), abs=1e-12)


def test_mc2_of_long_answers_does_not_underflow() -> None:
    assert mc2([-2000.0, -2000.0 - math.log(3)], [1, 0]) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("logp", "expected"), [([-1.0, -2.0], 1.0), ([-2.0, -1.0], 0.0), ([-1.0, -1.0], 1.0)]
)
def test_mc1_is_whether_the_true_answer_is_the_likeliest(
    logp: list[float], expected: float
) -> None:
    assert mc1(logp, [1, 0]) == expected


def test_an_unknown_likelihood_makes_no_score() -> None:
    assert math.isnan(mc1([-1.0, math.nan], [1, 0])) and math.isnan(mc2([-1.0, math.nan], [1, 0]))


def test_choices_are_scored_as_single_forward_passes_score_them() -> None:
    tokenizer = train_tokenizer([*QUESTIONS, *CHOICES[0], *CHOICES[1], question_text("?")], 300)
    shape = TINY.model_copy(update={"intermediate_size": 32, "context": 2048})
    model = build_scratch(shape, tokenizer, seed=1)
    frame = pd.DataFrame({"prompt": [user(text) for text in QUESTIONS], "choices": CHOICES})
    found = choice_log_probabilities(model, tokenizer, frame, batch_size=2)
    assert [len(row) for row in found] == [3, 2]
    for question, choices, row in zip(QUESTIONS, CHOICES, found, strict=True):
        before = question_text(question)
        for choice, logp in zip(choices, row, strict=True):
            assert logp == pytest.approx(alone(model, tokenizer, before, choice), abs=1e-4)


def alone(model: Any, tokenizer: Any, before: str, choice: str) -> float:
    whole = tokenizer(f"{before} {choice}")["input_ids"]
    start = len(tokenizer(before)["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return float(sum(logits[at - 1, whole[at]] for at in range(start, len(whole))))


def test_an_answer_is_what_follows_its_question() -> None:
    tokenizer = train_tokenizer([question_text("Why? Because.")], 300)
    before, answer = encoded(tokenizer, "Q: Why?\nA:", "Because.")
    assert tokenizer.decode(before + answer).endswith("A: Because.")
    assert tokenizer.decode(answer).strip() == "Because." and np.all(np.array(answer) >= 0)

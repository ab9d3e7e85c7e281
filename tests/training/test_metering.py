"""What is counted of a training, and the lines between two logged steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaForCausalLM, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from dualign.core import reporting, work
from dualign.lm.flops import Tokens, size_of, training_flop
from dualign.training import metering
from dualign.training.metering import Meter, Metered, Telling
from pipeline.run.progress import read_progress
from tests.tiny import llama


@pytest.fixture
def model() -> LlamaForCausalLM:
    return llama(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1)


def batch() -> dict[str, torch.Tensor]:
    """Rows of 3 and 5 tokens, of which 1 and 2 are answers."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    answers = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 1, 1]])
    return {"attention_mask": mask, "completion_mask": answers}


@pytest.mark.parametrize("kind", ["completion_mask", "labels"])
def test_padding_and_prompts_are_told_apart(model: LlamaForCausalLM, kind: str) -> None:
    given = batch()
    if kind == "labels":
        answered = given.pop("completion_mask").bool()
        given["labels"] = torch.full((2, 5), 7).masked_fill(~answered, metering.IGNORED)
    trainer = Metered()
    trainer.measure(given)  # nobody counts, as in a laboratory
    trainer.meter = Meter(model)
    trainer.measure(given)
    trainer.measure(given)
    first = trainer.meter.recent()
    assert first.tokens == 16
    each = Tokens.of(2, 1) + Tokens.of(3, 2)
    assert first.flop == pytest.approx(2 * training_flop(size_of(model), each))
    assert trainer.meter.recent().tokens == 0
    assert trainer.meter.whole().tokens == 16


@pytest.fixture
def known_peak() -> Iterator[None]:
    """A stage on a device of 1 TFLOP/s; the tests after it know of none again."""
    work.begin(1e12)
    yield
    work.begin(None)


@pytest.mark.usefixtures("known_peak")
def test_a_long_step_is_told_before_the_next_logged_one(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metering, "watched", lambda: False)
    told: list[tuple[str, int, dict[str, float]]] = []
    monkeypatch.setattr(
        reporting, "report", lambda values, step, group: told.append((group, step, values))
    )
    given = Arguments("unused", use_cpu=True, report_to="none")
    meter = Meter(model)
    telling = Telling("step-1 policy", meter)
    state = TrainerState(max_steps=4)
    control = TrainerControl()
    caplog.set_level(logging.INFO)
    telling.on_train_begin(given, state, control)
    for state.global_step, every in ((1, 3600.0), (2, 0.0)):
        monkeypatch.setattr(metering, "EVERY", every)
        meter.count(batch()["attention_mask"], None)
        telling.on_step_end(given, state, control)
    telling.on_log(given, state, control, {"loss": 0.5, "grad_norm": 1.0})
    lines = [read_progress(record.getMessage()) for record in caplog.records]
    assert [(line.what, line.done, line.total) for line in lines if line] == [
        ("step-1 policy step", 2, 4)
    ] * 2
    assert lines[1] is not None and lines[1].detail.startswith("loss 0.5000, 0 tokens/s")
    assert lines[0] is not None and "MFU" in lines[0].detail
    ((group, step, values),) = told
    assert (group, step) == ("step-1_policy", 2)
    assert {"loss", "grad_norm", "tokens_per_second", "mfu", "memory_gib"} <= values.keys()

"""The comparison of another engine's answers with ours."""

from __future__ import annotations

import torch

from bench.engine import compared
from tests.lm.layouts import CHATS, byte_level


def test_prompts_ends_and_log_probabilities_are_compared() -> None:
    tokenizer = byte_level(CHATS["chatml"])
    end = tokenizer.eos_token_id
    rows = [
        {"prompt": [1, 2], "ids": [5, end], "ended": True, "logp": -1.0},
        {"prompt": [1, 9], "ids": [5, end, 6], "ended": False, "logp": -2.0},
    ]
    found = compared(rows, [[1, 2], [1, 3]], torch.tensor([-1.0, -2.5]), tokenizer)
    assert found == {
        "prompts": 2,
        "same_prompt_ids": 1,
        "ended": 1,
        "ended_with": [tokenizer.eos_token],
        "went_on_after_an_end": 1,
        "tokens": 5,
        "largest_difference_of_logp": 0.5,
    }

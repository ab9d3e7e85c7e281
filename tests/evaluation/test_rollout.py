"""A rollout on a tiny model: whether an answer ended reaches the scorers, which judge a cut one as
it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualign.core.schema import prompt_id, user
from dualign.evaluation.rollout import Scorers, roll_out
from dualign.lm.models import build_scratch, train_tokenizer
from tests.tiny import TINY, on_cpu

SCRATCH = TINY.model_copy(update={"vocab_size": 260})


class Listener:
    """A scorer that keeps what it was asked: the answers, and which of them ended."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], list[bool]]] = []

    def score(
        self, prompts: Any, answers: Sequence[str], *, ended: Sequence[bool], **how: Any
    ) -> np.ndarray:
        self.asked.append((list(answers), list(ended)))
        return np.arange(len(answers), dtype=float)


def test_both_scorers_are_told_which_answers_ended(repo_root: Path, one_thread: None) -> None:
    texts = ["how are you", "what is this", "why not"]
    tokenizer = train_tokenizer(texts, 260)
    resources = on_cpu()
    reward = Listener()
    cost = Listener()
    scorers = Scorers(build_scratch(SCRATCH, tokenizer, 0), tokenizer, reward, cost, resources)  # type: ignore[arg-type]
    prompts = pd.DataFrame(
        {"prompt_id": [prompt_id(user(t)) for t in texts], "prompt": [user(t) for t in texts]}
    )
    frame = roll_out(scorers.reference, prompts, scorers, count=20, max_new_tokens=40, seed=0)
    assert (
        set(frame["ended"]) == {True, False} and (frame.loc[~frame["ended"], "length"] == 40).all()
    )
    told = (frame["response"].tolist(), frame["ended"].tolist())
    assert reward.asked == cost.asked == [told]
    assert frame["reward"].tolist() == frame["cost"].tolist() == list(range(60))

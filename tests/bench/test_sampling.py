"""The laboratory of sampling engines: all draw, ratios are of one round, and a run tells each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import sampling
from dualign.core.artifacts import write_parquet
from dualign.core.errors import DualignError
from dualign.core.schema import PROMPTS, user
from dualign.data import world
from dualign.lm.models import build_scratch, save, train_tokenizer
from tests.tiny import TINY


def test_each_round_is_told_and_its_answers_are_checked(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([one.text for one in world.answers(world.prompts()[0])], 300)
    save(build_scratch(TINY, tokenizer, seed=0), tokenizer, tmp_path / "base")
    asked = [user(text) for text in ("How do I cook?", "Why?", "How?")]
    rows = [{"prompt_id": str(i), "prompt": p, "source": "x"} for i, p in enumerate(asked)]
    write_parquet(tmp_path / "prompts.parquet", rows, PROMPTS)
    given = ["--base", str(tmp_path / "base"), "--prompts", str(tmp_path / "prompts.parquet")]
    sizes = "--engines generate refill --count 2 --draws 2 --batch 3 --max-new-tokens 6 --rounds 2"
    assert sampling.main([*given, *sizes.split(), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "sampling.json").read_text())
    assert [row["round"] for row in found["rows"]] == [0, 0, 1, 1]
    assert all(row["answers"] == 4 and row["seconds"] > 0 for row in found["rows"])
    page = (tmp_path / "sampling.md").read_text()
    assert "medians of 2 rounds, by seconds of the processor" in page
    assert str(tmp_path) not in page


def test_ratios_are_of_one_round() -> None:
    def row(engine: str, seconds: float) -> dict[str, Any]:
        return {"engine": engine, "seconds": seconds, "answers": 8, "tokens": 80}

    given = sampling.Settings(engines=("generate", "refill"))
    taken = [row("generate", 4.0), row("refill", 1.0), row("generate", 9.0), row("refill", 3.0)]
    base, ours = sampling.summary(given, taken)
    assert (base["ratio"], ours["ratio"], ours["least"], ours["most"]) == (1.0, 3.5, 3.0, 4.0)
    assert ours["mean_length"] == 10 and ours["answers_per_second"] == pytest.approx(16 / 3)


def test_an_engine_of_another_process_is_refused() -> None:
    with pytest.raises(DualignError, match="no engine that draws in this process: vllm"):
        sampling.Settings(engines=("generate", "vllm"))

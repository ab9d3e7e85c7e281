"""The simulated answers are as the laboratory says, and its page holds what it found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.paired import KINDS, Settings, battles, main, pairs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 4])
def test_the_true_difference_is_as_stated(kind: str, samples: int) -> None:
    draw, truth = KINDS[kind]
    drawn = draw(np.random.default_rng(0), 400, 500, samples)
    assert drawn.shape == (400, 500)
    assert drawn.mean() == pytest.approx(truth, abs=5 * drawn.std() / np.sqrt(drawn.size))


def test_every_pair_meets_twice_at_every_prompt() -> None:
    drawn = battles(np.random.default_rng(0), 5)
    assert drawn.groupby(["first", "second", "prompt_id"]).size().eq(2).all() and len(drawn) == 60


def test_coverage_is_near_what_the_intervals_say() -> None:
    held = [row["held"] for row in pairs(Settings(repeats=60))]
    assert 0.9 < np.mean(held) < 0.99


def test_the_page_is_written(tmp_path: Path) -> None:
    main(["--repeats", "20", "--rankings", "2", "--draws", "20", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "paired.json").read_text())
    assert len(found["pairs"]) == 24 and len(found["tests"]) == 5
    assert "## 4. Tests at 5 %" in (tmp_path / "paired.md").read_text()

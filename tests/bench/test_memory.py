"""Peaks are those of the phase, and what is compared reads the same."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from bench import memory
from dualign.core.errors import DualignError
from dualign.training.pairwise import Pair

PAIRS = [Pair([1, 2], [3], [4, 5], 0.0, 0.0)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_peak_is_of_the_phase_alone() -> None:
    memory.peak()
    large = np.ones(32 << 20)
    with_it = memory.peak()
    del large
    memory.peak()
    assert with_it - memory.peak() > 200


def test_sft_reads_what_dpo_reads() -> None:
    assert memory.supervised(PAIRS, both=True) == [([1, 2], [3]), ([1, 2], [4, 5])]
    assert memory.supervised(PAIRS, both=False) == [([1, 2], [3])]


def test_the_page_compares_with_sft() -> None:
    def row(peak: float) -> dict[str, float]:
        return {"loaded": 1024.0, "before": 512.0, "training": peak}

    rounds = {"sft": [row(4096), row(2048), row(2048)], "dpo": [row(2560)] * 3}
    rounds |= {"copy": [row(3072)] * 3, "chosen": [row(1024)] * 3}
    held = {name: {"held": 1024.0, "peak": 2048.0, "processes": 5} for name in memory.HOLDING}
    found = {"weights": 1 << 28, "rounds": rounds, "sides": memory._medians(rounds), "stage": held}
    page = memory.page(memory.Settings(), found)
    assert "| DPO | 1.00 | 0.50 | 2.50 | 2.50 | 1.250 × | 3 |" in page
    assert "1.00 GiB once" in page and "| one base for all | 1.00 | 2.00 | 5 |" in page


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(DualignError, match="--precision"):
        memory.Settings(precision="fp8")
    with pytest.raises(DualignError, match="at least 1"):
        memory.Settings(rounds=0)

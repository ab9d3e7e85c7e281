"""What a policy misses of its tilt: by hand, and of runs that are not there. tests/e2e reads a real
run.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import fit


def test_the_divergence_is_that_among_the_answers_by_hand() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (np.log(rng.dirichlet(np.ones(4), 3)[:, :3]) for _ in range(2))
    by_hand = []
    for p, q in zip(np.exp(ours), np.exp(theirs), strict=True):
        p, q = p / p.sum(), q / q.sum()
        by_hand.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))
    assert fit.divergence(ours, theirs) == pytest.approx(np.mean(by_hand))
    assert fit.divergence(ours, ours - 1) == pytest.approx(0)


def test_a_run_that_is_not_there_is_refused_and_no_folder_made_of_it(
    repo_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = ["--seeds", "3", "--params", str(repo_root / "params.yaml")]
    assert fit.main([*given, "--work", str(tmp_path / "work"), "--out", str(tmp_path)]) == 1
    assert "no run of" in caplog.text and "python -m bench.world --seeds 3" in caplog.text
    assert not list(tmp_path.iterdir())

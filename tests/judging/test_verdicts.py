"""What verdicts come to: rates with their failures beside them, and agreement with people."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from dualign.core.artifacts import write_parquet
from dualign.core.schema import VERDICTS, read_table
from dualign.evaluation.stats import clustered_share
from dualign.judging.verdicts import (
    Verdict,
    agreement,
    failures,
    summarise,
    table,
    verdict,
)
from dualign.scoring.calibration import expected_calibration_error, sigmoid


def verdicts() -> list[Verdict]:
    """Four prompts of two answers each, of which one has no verdict."""
    found = []
    for i in range(8):
        row = SimpleNamespace(suite="tea", policy="ours", prompt_id=f"x{i // 2}", sample=i % 2)
        if i == 5:
            found.append(verdict("gpt", row, failure="refused"))
        else:
            found.append(verdict("gpt", row, win=(0.0, 0.5, 1.0)[i % 3], refused=i < 2))
    return found


def test_failures_are_counted_and_are_no_ties() -> None:
    rows = table(verdicts())
    told = summarise(rows, {}, 0.9)["tea"]["ours"]
    good = rows[rows["failure"].isna()]
    assert (told["verdicts"], told["failed"], failures(rows)) == (7, 1, {"refused": 1})
    expected = clustered_share(good["win"].to_numpy(float), good["prompt_id"].to_numpy(), 0.9)
    assert told["win"] == expected.as_dict()
    assert told.keys() == {"verdicts", "failed", "win", "refused"}, "nothing that nobody judged"


def test_rates_by_the_labels_of_the_prompts() -> None:
    labels = {("tea", "x0"): "safe", ("tea", "x1"): "unsafe", ("tea", "x2"): "unsafe"}
    told = summarise(table(verdicts()), labels, 0.9)["tea"]["ours"]["labels"]
    assert told["safe"]["refused"]["mean"] == 1 and told["unsafe"]["refused"]["mean"] == 0
    assert (told["safe"]["verdicts"], told["unsafe"]["verdicts"], told["unsafe"]["failed"]) == (
        2,
        3,
        1,
    )


def test_a_judge_without_any_verdict_has_no_rates() -> None:
    row = SimpleNamespace(suite="tea", policy="ours", prompt_id="x", sample=0)
    told = summarise(table([verdict("gpt", row, failure="HTTP 500")]), {}, 0.9)
    assert told == {"tea": {"ours": {"verdicts": 0, "failed": 1}}}


def test_a_table_comes_back_as_it_was_written(tmp_path) -> None:  # type: ignore[no-untyped-def]
    write_parquet(tmp_path / "v.parquet", table(verdicts()), VERDICTS)
    back = read_table(tmp_path / "v.parquet", VERDICTS)
    assert summarise(back, {}, 0.9) == summarise(table(verdicts()), {}, 0.9)


def test_agreement_with_people_leaves_failures_out() -> None:
    cost = np.tile([2.0, -1.0, 0.5, -3.0], 4)
    rows = [
        Verdict("gpt", "s", "p", f"x{i}", 0, cost=c, unsafe=bool(c > 0)) for i, c in enumerate(cost)
    ]
    truth = np.tile([True, False, False, False], 4)
    told = agreement(
        table([*rows, Verdict("gpt", "s", "p", "y", 0, failure="refused")]),
        np.append(truth, True),
        0.9,
    )
    assert told is not None
    assert (told["answers"], told["failed"], told["accuracy"]) == (16, 1, 0.75)
    assert told["kappa_low"] <= told["kappa"] <= told["kappa_high"]
    assert told["kappa"] == pytest.approx(cohen_kappa_score(cost > 0, truth))
    assert told["ece"] == expected_calibration_error(sigmoid(cost), truth)


def test_a_judge_of_other_things_agrees_with_nobody() -> None:
    assert agreement(table(verdicts()), np.zeros(8, bool), 0.9) is None
    assert pd.isna(table(verdicts())["unsafe"]).all()

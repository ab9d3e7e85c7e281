"""What judges said: read as far as params name it, and compared prompt by prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dualign.core.artifacts import write_parquet
from dualign.core.errors import DataError
from dualign.core.schema import SUITE, VERDICTS, read_table
from dualign.evaluation.paired import differences, holm, mcnemar
from dualign.evaluation.power import difference_found, prompts_needed
from dualign.evaluation.stats import mean_of
from dualign.params.report import ReportParams
from dualign.report.judged import (
    LIKELIHOOD,
    found_differences,
    gaps,
    means,
    read_lengths,
    read_verdicts,
)

Run = tuple[Path, ReportParams]
POLICIES = {"sft", "reward_dpo", "safety_only", "dualign"}


def asked(run: Run) -> pd.DataFrame:
    verdicts = read_verdicts(*run)
    return verdicts[verdicts["suite"] == "asked"]


def test_every_verdict_is_read_with_what_its_prompt_is(judged: Run) -> None:
    verdicts = read_verdicts(*judged)
    assert set(verdicts["judge"]) == {"ours", "other", "refusal", "gpt", LIKELIHOOD}
    assert verdicts.groupby("judge").size().to_dict() == {
        "ours": 192, "other": 192, "refusal": 192, "gpt": 144, LIKELIHOOD: 80
    }  # fmt: skip
    suite = read_table(judged[0] / "reports/answers/asked/_suite.parquet", SUITE)
    for column in ("label", "category"):
        expected = suite.set_index("prompt_id")[column]
        own = verdicts[verdicts["suite"] == "asked"]
        assert (own[column] == expected.loc[own["prompt_id"]].to_numpy()).all()
    assert set(verdicts.loc[verdicts["judge"] == LIKELIHOOD, "label"]) == {""}


def test_what_params_no_longer_name_is_passed_by(judged: Run) -> None:
    """DVC leaves the outputs of a judge, suite or policy where they are when it is taken out."""
    root, params = judged
    changes = {
        "suites": {"asked": params.suites["asked"]},
        "judges": {"ours": params.judges["ours"]},
        "policies": {"sft": "sft", "dualign": "aligned/dualign"},
    }
    verdicts = read_verdicts(root, params.model_copy(update=changes))
    assert set(verdicts["judge"]) == {"ours"} and set(verdicts["suite"]) == {"asked"}
    assert set(verdicts["policy"]) == {"sft", "dualign"}


def test_without_suites_and_judges_there_is_nothing(run: Run) -> None:
    assert read_verdicts(*run).empty
    root, params = run
    (root / "reports/answers").mkdir()
    (root / "reports/judgements").mkdir()
    assert read_verdicts(root, params).empty


def test_a_table_without_a_column_is_named(judged: Run) -> None:
    path = judged[0] / "reports/judgements/ours/verdicts.parquet"
    lacking = VERDICTS.remove(VERDICTS.get_field_index("win"))
    write_parquet(path, pd.read_parquet(path).drop(columns="win"), lacking)
    with pytest.raises(DataError, match=r"ours/verdicts\.parquet.*win"):
        read_verdicts(*judged)


def test_failures_count_in_no_mean(judged: Run) -> None:
    rows = asked(judged)
    rows = rows[(rows["judge"] == "gpt") & (rows["policy"] == "dualign")]
    failed = rows["failure"].notna()
    assert 0 < failed.sum() < len(rows)
    assert means(rows, 0.95)["win"].mean == pytest.approx(rows.loc[~failed, "win"].mean())


def test_differences_are_paired_and_corrected_over_the_whole_suite(judged: Run) -> None:
    rows = asked(judged)
    table = gaps(rows, 0.95)
    # Two labels: three scores of ours, one of each other, for three policies.
    assert len(table) == 2 * (3 + 1 + 1 + 1) * 3
    assert table["p_holm"].to_numpy() == pytest.approx(holm(table["p_value"].to_numpy()))
    assert (table["p_holm"] > table["p_value"] - 1e-12).all()
    own = rows[(rows["judge"] == "ours") & (rows["label"] == "unsafe")]
    by_policy = own.pivot(index="prompt_id", columns="policy", values="cost")
    expected = mean_of((by_policy["dualign"] - by_policy["sft"]).to_numpy())
    found = table[
        (table["judge"] == "ours") & (table["label"] == "unsafe")
        & (table["first"] == "dualign") & (table["score"] == "cost")
    ].iloc[0]  # fmt: skip
    assert (found["mean"], found["error"]) == pytest.approx((expected.mean, expected.error))
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["p_holm"] < 0.05, "it refuses unsafe prompts far more often"


def test_refusals_of_one_answer_a_prompt_are_compared_by_mcnemar(judged: Run) -> None:
    rows = asked(judged)
    table = gaps(rows[rows["judge"] == "refusal"], 0.95)
    for _, found in table.iterrows():
        own = rows[(rows["judge"] == "refusal") & (rows["label"] == found["label"])]
        by_policy = own.pivot(index="prompt_id", columns="policy", values="refused")
        expected = mcnemar(by_policy[found["first"]].to_numpy(), by_policy["sft"].to_numpy())
        assert found["p_value"] == expected.p_value


def test_two_prompts_alone_tell_no_refusals_apart(judged: Run) -> None:
    """Their differences have no spread, for which a t-test would be certain."""
    rows = asked(judged)
    two = sorted(rows.loc[rows["label"] == "safe", "prompt_id"].unique())[:2]
    rows = rows[(rows["judge"] == "refusal") & rows["prompt_id"].isin(two)].copy()
    rows["refused"] = (rows["policy"] == "dualign").astype(float)
    table = gaps(rows, 0.95).set_index("first")
    assert table.loc["dualign", "mean"] == 1 and table.loc["dualign", "p_value"] == 0.5


def test_several_answers_a_prompt_are_compared_by_their_means(judged: Run) -> None:
    rows = asked(judged)
    rows = rows[rows["judge"] == "refusal"]
    again = pd.concat([rows, rows.assign(sample=1)])
    expected = differences(rows[rows["label"] == "safe"], "refused", [("dualign", "sft")])
    found = gaps(again, 0.95)
    row = found[(found["label"] == "safe") & (found["first"] == "dualign")].iloc[0]
    assert row["p_value"] == pytest.approx(expected["p_value"][0])


def test_a_preference_is_compared_with_its_being_level(judged: Run) -> None:
    rows = asked(judged)
    table = gaps(rows[rows["judge"] == "gpt"], 0.95)
    assert set(table["score"]) == {"win"} and set(table["first"]) == POLICIES - {"sft"}
    row = table[(table["first"] == "safety_only") & (table["label"] == "safe")].iloc[0]
    own = rows[(rows["judge"] == "gpt") & (rows["policy"] == "safety_only")]
    won = own.loc[own["label"] == "safe", "win"].dropna()
    assert row["mean"] == pytest.approx(won.mean() - 0.5) and row["prompts"] == len(won)


def test_without_the_reference_policy_nothing_is_compared(judged: Run) -> None:
    rows = asked(judged)
    table = gaps(rows[(rows["policy"] != "sft") & (rows["judge"] == "ours")], 0.95)
    assert table.empty and found_differences(table, 0.95) == []


def test_policies_that_share_no_prompt_with_the_reference_are_left_out(judged: Run) -> None:
    rows = asked(judged)
    rows = rows[rows["judge"] == "ours"]
    half = sorted(rows["prompt_id"].unique())[:24]
    apart = (rows["policy"] == "sft") == rows["prompt_id"].isin(half)
    table = gaps(rows[apart | (rows["policy"] == "dualign")], 0.95)
    assert set(table["first"]) == {"dualign"}


def test_the_difference_that_is_told_takes_these_prompts(judged: Run) -> None:
    table = gaps(asked(judged), 0.95)
    (row,) = (
        row for row in found_differences(table, 0.95)
        if (row["judge"], row["label"]) == ("ours", "safe")
    )  # fmt: skip
    own = table[
        (table["judge"] == "ours") & (table["label"] == "safe") & (table["score"] == "cost")
    ]
    deviation = float(np.median(own["error"] * np.sqrt(24)))
    needed = prompts_needed(row["difference"], deviation, comparisons=len(table))
    assert row["prompts"] == 24 and abs(needed - 24) <= 1


def test_no_difference_of_shares_beyond_a_whole_is_told(judged: Run) -> None:
    rows = asked(judged)
    few = sorted(rows.loc[rows["label"] == "safe", "prompt_id"].unique())[:7]
    rows = rows[(rows["judge"] == "refusal") & rows["prompt_id"].isin(few)].copy()
    turns = {"sft": 0, "dualign": 1, "reward_dpo": 2, "safety_only": 3}
    at = rows["prompt_id"].map(few.index)
    rows["refused"] = (at % (rows["policy"].map(turns) + 2) == 0).astype(float)
    table = gaps(rows, 0.95)
    assert (table["error"] > 0.1).all(), "they differ"
    assert found_differences(pd.concat([table] * 40), 0.95) == []


def test_no_preference_beyond_always_is_told(judged: Run) -> None:
    """Always preferred is 50 points above level: 60 points are no difference of a preference."""
    rows = asked(judged)
    rows = rows[(rows["judge"] == "gpt") & (rows["policy"] == "dualign") & rows["win"].notna()]
    few = rows.groupby("label").head(8).assign(label="safe").head(8)
    table = gaps(few.assign(win=[1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]), 0.95)
    assert difference_found(8, float(table["error"].iloc[0] * np.sqrt(8))) > 0.5
    assert found_differences(table, 0.95) == []


def test_lengths_are_those_of_the_answers(judged: Run) -> None:
    lengths = read_lengths(judged[0], "asked", POLICIES)
    assert len(lengths) == 4 * 48 and set(lengths["policy"]) == POLICIES

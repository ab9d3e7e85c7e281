"""The sections of suites, rankings, refusals, judges and categories, against what was planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as t_distribution

from dualign.core.artifacts import read_json, write_json, write_parquet
from dualign.core.errors import DualignError
from dualign.core.schema import SUITE, VERDICTS, read_table
from dualign.params.report import ReportParams
from dualign.report.sections import categories, judges, ranking, refusals, suites
from dualign.report.sections.base import FinishedRun, Section

Run = tuple[Path, ReportParams]
SECTIONS = (suites.section, ranking.section, refusals.section, judges.section, categories.section)


def shown(found: Section | None) -> dict[str, Any]:
    assert found is not None
    return dict(found.values)


def verdicts(run: Run, judge: str) -> pd.DataFrame:
    return read_table(run[0] / f"reports/judgements/{judge}/verdicts.parquet", VERDICTS)


@pytest.mark.parametrize("make", SECTIONS)
def test_where_nothing_was_judged_there_is_no_section(run: Run, make: Any) -> None:
    assert make(FinishedRun(*run)) is None


# --- suites ---------------------------------------------------------------------------------------


def test_a_suite_has_a_column_for_every_score_judge_and_label(judged: Run) -> None:
    found = shown(suites.section(FinishedRun(*judged)))["suites"]
    assert [suite["name"] for suite in found] == ["asked", "chosen"]
    columns = [(c["measure"].key, c["judge"], c["label"]) for c in found[0]["columns"]]
    assert columns[:4] == [
        ("reward", "ours", "safe"), ("reward", "ours", "unsafe"),
        ("reward", "other", "safe"), ("reward", "other", "unsafe"),
    ]  # fmt: skip
    assert len(columns) == 2 * 6 and len(set(columns)) == len(columns)
    refused = [c["better"] for c in found[0]["columns"] if c["measure"].key == "refused"]
    assert refused == ["less", "more"], "refusing is right where the prompt is unsafe"
    assert [row["name"] for row in found[0]["rows"]] == [
        "dualign", "sft", "safety_only", "reward_dpo"
    ]  # fmt: skip


def test_what_chance_hardly_makes_is_called_better_or_worse(judged: Run) -> None:
    table = shown(suites.section(FinishedRun(*judged)))["suites"][0]
    cells = {
        (row["name"], c["measure"].key, c["judge"], c["label"]): cell
        for row in table["rows"]
        for c, cell in zip(table["columns"], row["cells"], strict=True)
    }
    assert cells["safety_only", "refused", "refusal", "safe"]["gap"]["standing"] == "worse"
    assert cells["safety_only", "refused", "refusal", "unsafe"]["gap"]["standing"] == "better"
    assert cells["dualign", "cost", "ours", "unsafe"]["gap"]["standing"] == "better"
    assert cells["dualign", "refused", "refusal", "safe"]["gap"]["standing"] == ""
    assert cells["sft", "cost", "ours", "safe"]["gap"] is None
    assert cells["sft", "win", "gpt", "safe"]["mean"] is None, "it is what others are compared with"
    failed = int(verdicts(judged, "gpt")["failure"].notna().sum())
    (told,) = table["failures"]
    assert told.startswith(f"{failed} of 144 verdicts by gpt")
    assert any("in cost (ours, 24 unsafe prompts)" in sentence for sentence in table["power"])


def test_labels_of_one_policy_alone_have_no_differences(judged: Run) -> None:
    root, params = judged
    alone = params.model_copy(update={"policies": {"sft": "sft"}})
    table = shown(suites.section(FinishedRun(root, alone)))["suites"][0]
    assert table["tests"] == 0 and table["power"] == []


# --- rankings -------------------------------------------------------------------------------------


def test_rankings_are_by_pairs_by_reward_and_by_cost(judged: Run) -> None:
    tables = shown(ranking.section(FinishedRun(*judged)))["tables"]
    assert [(table["judge"], table["what"]) for table in tables] == [
        ("ours", "more reward wins"), ("ours", "less cost wins"),
        ("other", "more reward wins"), ("gpt", "preference of pairs"),
    ]  # fmt: skip
    by_ours, _, by_other, by_pairs = (
        {row["name"]: row for row in table["rows"]} for table in tables
    )
    assert next(iter(by_ours)) == "reward_dpo" and list(by_ours)[-1] == "safety_only"
    assert by_ours["reward_dpo"]["win"]["mean"] > by_other["reward_dpo"]["win"]["mean"]
    own = verdicts(judged, "gpt")
    won = own.loc[own["policy"] == "dualign", "win"].dropna()
    assert by_pairs["dualign"]["win"]["mean"] == pytest.approx(won.mean())
    level = by_pairs["dualign"]["level"]
    assert level["low"] < level["mean"] < level["high"]
    assert by_pairs["sft"]["win"] is None and by_pairs["sft"]["elo"]["mean"] > 0


def test_a_policy_of_which_every_verdict_failed_is_in_no_ranking(judged: Run) -> None:
    own = verdicts(judged, "gpt")
    own.loc[own["policy"] == "dualign", ["win", "failure"]] = [None, "time-out"]
    write_parquet(judged[0] / "reports/judgements/gpt/verdicts.parquet", own, VERDICTS)
    tables = shown(ranking.section(FinishedRun(*judged)))["tables"]
    assert "dualign" not in {row["name"] for row in tables[-1]["rows"]}


def test_answers_that_were_judged_and_are_gone_are_named(judged: Run) -> None:
    (judged[0] / "reports/answers/asked/sft.parquet").unlink()
    with pytest.raises(DualignError, match=r"answers/asked/sft\.parquet"):
        ranking.section(FinishedRun(*judged))


# --- refusals -------------------------------------------------------------------------------------


def test_refusals_of_safe_prompts_stand_against_harm_on_unsafe_ones(judged: Run) -> None:
    (figure,) = shown(refusals.section(FinishedRun(*judged)))["figures"]
    assert (figure["suite"], figure["judge"], figure["by"]) == ("asked", "refusal", "ours")
    points = {point.label: point for point in figure["points"]}
    run = FinishedRun(*judged)
    label = run.verdicts.set_index(["judge", "policy"])["label"]
    assert set(label) == {"safe", "unsafe", ""}
    for name in ("sft", "dualign", "safety_only"):
        rows = run.verdicts[run.verdicts["policy"] == name]
        safe = rows[(rows["judge"] == "refusal") & (rows["label"] == "safe")]
        unsafe = rows[(rows["judge"] == "ours") & (rows["label"] == "unsafe")]
        assert points[name].mean == pytest.approx((safe["refused"].mean(), unsafe["unsafe"].mean()))
    assert 'aria-label="harm against over-refusal of every policy"' in figure["wide"]


def test_where_nobody_judges_harm_it_is_whether_unsafe_prompts_are_answered(judged: Run) -> None:
    root, params = judged
    alone = params.model_copy(update={"judges": {"refusal": params.judges["refusal"]}})
    (figure,) = shown(refusals.section(FinishedRun(root, alone)))["figures"]
    rows = FinishedRun(root, alone).verdicts
    own = rows[(rows["policy"] == "dualign") & (rows["label"] == "unsafe")]
    point = next(point for point in figure["points"] if point.label == "dualign")
    assert figure["what"] == "answered" and point.y.mean == pytest.approx(1 - own["refused"].mean())


def test_safe_and_unsafe_prompts_may_be_suites_of_their_own(judged: Run) -> None:
    """OR-Bench has its toxic prompts in another file."""
    root, params = judged
    for label in ("safe", "unsafe"):
        folder = root / "reports/answers" / f"only_{label}"
        suite = pd.read_parquet(root / "reports/answers/asked/_suite.parquet")
        kept = suite[suite["label"] == label]
        write_parquet(folder / "_suite.parquet", kept, SUITE)
    for judge in ("ours", "refusal"):
        own = verdicts(judged, judge)
        suite = pd.read_parquet(root / "reports/answers/asked/_suite.parquet")
        labels = suite.set_index("prompt_id")["label"]
        named = "only_" + labels.loc[own["prompt_id"]].to_numpy()
        path = root / f"reports/judgements/{judge}/verdicts.parquet"
        write_parquet(path, own.assign(suite=named), VERDICTS)
    spec = params.suites["asked"]
    split = params.model_copy(update={"suites": {"only_safe": spec, "only_unsafe": spec}})
    (figure,) = shown(refusals.section(FinishedRun(root, split)))["figures"]
    assert (figure["suite"], figure["other"]) == ("only_safe", "only_unsafe")


# --- judges ---------------------------------------------------------------------------------------


def test_a_learnt_scorer_is_seen_as_a_gap(judged: Run) -> None:
    """reward_dpo gains 1.2 by the training's scorers that the other judge does not see."""
    (group,) = shown(judges.section(FinishedRun(*judged)))["hacked"]
    assert (group["ours"], group["other"]) == ("ours", "other")
    found = {row["name"]: row["gains"]["reward"] for row in group["rows"]}
    ours = verdicts(judged, "ours").pivot(index="prompt_id", columns="policy", values="reward")
    other = verdicts(judged, "other").pivot(index="prompt_id", columns="policy", values="reward")
    gain = (ours["reward_dpo"] - ours["sft"]) / ours["sft"].std()
    seen = (other["reward_dpo"] - other["sft"]) / other["sft"].std()
    hacked = found["reward_dpo"]
    assert (hacked.ours, hacked.other) == pytest.approx((gain.mean(), seen.mean()), rel=0.05)
    assert hacked.gap["mean"] == pytest.approx(hacked.ours - hacked.other)
    assert hacked.overrated(0.05)
    assert not found["dualign"].overrated(0.05)
    assert group["overrated"] == {"reward": 1, "cost": 0}
    assert group["most"]["name"] == "reward_dpo" and "cost" not in group["rows"][0]["gains"]


def test_the_gap_knows_that_the_deviation_is_an_estimate(judged: Run) -> None:
    """Its error is that of leaving out one prompt after the other, deviation and all."""
    run = FinishedRun(*judged)
    found = judges.gains(run.verdicts, "ours", "other", 0.95)["safety_only"]["reward"]
    tables = {
        name: verdicts(judged, name).pivot(index="prompt_id", columns="policy", values="reward")
        for name in ("ours", "other")
    }

    def gap(prompts: pd.Index) -> float:
        ours, other = (tables[name].loc[prompts] for name in tables)
        gains = [(t["safety_only"] - t["sft"]).mean() / t["sft"].std() for t in (ours, other)]
        return float(gains[0] - gains[1])

    prompts = tables["ours"].index
    without = np.array([gap(prompts.drop(prompt)) for prompt in prompts])
    count = len(prompts)
    error = np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    mean = count * gap(prompts) - (count - 1) * without.mean()
    reach = float(t_distribution.ppf(0.975, count - 1)) * error
    assert found.gap["mean"] == pytest.approx(mean)
    assert (found.gap["low"], found.gap["high"]) == pytest.approx((mean - reach, mean + reach))


def test_the_gap_of_two_judges_of_one_mind_holds_the_truth_as_often_as_it_says() -> None:
    """The other judge has its own unit and some noise."""
    rng = np.random.default_rng(0)
    names = [f"{prompt}" for prompt in range(48)]
    held = []
    for _ in range(150):
        tables = []
        for policy, gain in (("sft", 0.0), ("aligned", -1.0)):
            reward = rng.normal(gain, 1, len(names))
            noisy = 10 * (reward + rng.normal(0, 0.1, len(names)))
            for judge, scores in (("ours", reward), ("other", noisy)):
                own = {"judge": judge, "policy": policy, "prompt_id": names, "reward": scores}
                tables.append(pd.DataFrame(own).assign(cost=np.nan))
        gap = judges.gains(pd.concat(tables), "ours", "other", 0.95)["aligned"]["reward"].gap
        held.append(gap["low"] <= 1 / np.sqrt(1.01) - 1 <= gap["high"])
    assert 0.9 <= np.mean(held) <= 0.99


def test_judges_agree_as_far_as_they_give_the_same_score(judged: Run) -> None:
    values = shown(judges.section(FinishedRun(*judged)))
    (suite,) = values["pairs"]
    (pair,) = suite["rows"]
    assert (pair["first"], pair["second"], values["compared"]) == ("ours", "other", ["reward"])
    ours, other = (verdicts(judged, name)["reward"] for name in ("ours", "other"))
    expected = ours.corr(other, method="spearman")
    assert pair["scores"]["reward"]["mean"] == pytest.approx(expected)
    assert [judge.judge for judge in values["people"]] == ["ours"]


def test_two_judges_of_one_opinion_have_no_kappa(judged: Run) -> None:
    root, params = judged
    own = verdicts(judged, "refusal").assign(refused=False)
    write_parquet(root / "reports/judgements/refusal/verdicts.parquet", own, VERDICTS)
    write_parquet(root / "reports/judgements/other/verdicts.parquet", own, VERDICTS)
    values = shown(judges.section(FinishedRun(root, params)))
    assert values["pairs"] == []


def test_metrics_of_another_shape_are_named(judged: Run) -> None:
    path = judged[0] / "reports/metrics/judge/ours.json"
    write_json(path, {key: value for key, value in read_json(path).items() if key != "agreement"})
    with pytest.raises(DualignError, match=r"ours\.json: agreement: field required"):
        judges.section(FinishedRun(*judged))


# --- categories -----------------------------------------------------------------------------------


def test_categories_of_a_suite_are_told_by_every_judge(judged: Run) -> None:
    tables = shown(categories.section(FinishedRun(*judged)))["tables"]
    assert [table["what"] for table in tables] == ["unsafe answers by ours", "refusals by refusal"]
    rows = {row["name"]: row for row in tables[1]["categories"]}
    assert len(rows) == 4 and rows["homonyms"]["prompts"] == 12
    run = FinishedRun(*judged)
    own = run.verdicts[
        (run.verdicts["judge"] == "refusal") & (run.verdicts["policy"] == "safety_only")
    ]
    expected = own.loc[own["category"] == "homonyms", "refused"].mean()
    assert rows["homonyms"]["shares"]["safety_only"]["mean"] == pytest.approx(expected)

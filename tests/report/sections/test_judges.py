"""Agreement of judges, and a planted scorer that a policy has learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as t_distribution

from dualign.core.artifacts import read_json, write_json, write_parquet
from dualign.core.errors import DualignError
from dualign.core.schema import VERDICTS
from dualign.evaluation.stats import mean_of
from dualign.params.report import ReportParams
from dualign.publishing.suites import judged_suites
from dualign.report.sections import judges
from dualign.report.sections.base import FinishedRun
from tests.report.conftest import shown, verdicts

Run = tuple[Path, ReportParams]


def test_where_nothing_was_judged_there_is_no_such_section(run: Run) -> None:
    assert judges.section(FinishedRun(*run)) is None


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
    assert hacked.gap.mean == pytest.approx(hacked.ours - hacked.other)
    assert hacked.overrated(0.05)
    assert not found["dualign"].overrated(0.05)
    assert group["overrated"] == {"reward": 1, "cost": 0}
    assert group["most"]["name"] == "reward_dpo" and "cost" not in group["rows"][0]["gains"]


def test_an_answer_on_which_a_judge_failed_is_not_compared() -> None:
    verdict = {"policy": "sft", "sample": 0, "repeat": 0, "failure": None}
    scores = dict.fromkeys(("reward", "cost", "refused", "truthful", "win"))
    rows = [
        {**verdict, **scores, "judge": judge, "prompt_id": str(number), "unsafe": number % 2}
        for judge in ("one", "other")
        for number in range(20)
    ]
    for row in rows[32:]:
        row.update(unsafe=None, failure="time-out")
    (pair,) = judges.judge_pairs(pd.DataFrame(rows), 0.95)
    assert pair["answers"] == 12 and pair["scores"]["unsafe"].mean == 1


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
    pseudo = count * gap(prompts) - (count - 1) * without
    expected = mean_of(pseudo)
    assert expected.error == pytest.approx(error)
    assert found.gap.mean == pytest.approx(mean)
    assert (found.gap.low, found.gap.high) == pytest.approx((expected.low, expected.high))
    low, high = t_distribution.interval(0.95, count - 1, mean, error)
    assert found.gap.low == pytest.approx(low) or found.gap.high == pytest.approx(high)


def test_the_gap_of_two_judges_of_one_mind_holds_the_truth_as_often_as_it_says() -> None:
    """The other judge has its own unit and some noise."""
    rng = np.random.default_rng(0)
    names = [f"{prompt}" for prompt in range(48)]
    held = []
    for _ in range(100):
        tables = []
        for policy, gain in (("sft", 0.0), ("aligned", -1.0)):
            reward = rng.normal(gain, 1, len(names))
            noisy = 10 * (reward + rng.normal(0, 0.1, len(names)))
            for judge, scores in (("ours", reward), ("other", noisy)):
                own = {"judge": judge, "policy": policy, "prompt_id": names, "reward": scores}
                tables.append(pd.DataFrame(own).assign(cost=np.nan))
        gap = judges.gains(pd.concat(tables), "ours", "other", 0.95)["aligned"]["reward"].gap
        held.append(gap.low <= 1 / np.sqrt(1.01) - 1 <= gap.high)
    assert 0.9 <= np.mean(held) <= 0.99


def test_judges_agree_as_far_as_they_give_the_same_score(judged: Run) -> None:
    values = shown(judges.section(FinishedRun(*judged)))
    (suite,) = values["pairs"]
    (pair,) = suite["rows"]
    assert (pair["first"], pair["second"], values["compared"]) == ("ours", "other", ["reward"])
    ours, other = (verdicts(judged, name)["reward"] for name in ("ours", "other"))
    expected = ours.corr(other, method="spearman")
    assert pair["scores"]["reward"].mean == pytest.approx(expected)
    assert [judge.judge for judge in values["people"]] == ["ours"]


def test_a_judge_that_was_calibrated_on_such_answers_is_told(judged: Run) -> None:
    root, params = judged
    path = root / "reports/metrics/cost_model.json"
    for flags, told in ((188, ["ours"]), (0, [])):
        write_json(path, read_json(path) | {"zero_flags": flags})
        assert shown(judges.section(FinishedRun(root, params)))["calibrated"] == told
        card = judged_suites(root, params, "dualign")
        assert ("Its cost was calibrated on such answers." in card) == bool(told)


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

"""The comparison against brute force, and what it recommends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from dualign.core.artifacts import read_json, write_json
from dualign.core.errors import DualignError
from dualign.core.records import Comparison, Interval, TiltRow, as_row, read_record
from dualign.params.base import StageParams
from dualign.params.loading import load
from dualign.params.report import ReportParams
from dualign.params.stages import STAGES
from dualign.report.comparison import compare, mean_gain, params_digests, win_rate
from tests.report.conftest import certify

ROOT = Path(__file__).resolve().parents[2]

Run = tuple[Path, ReportParams]


def answers(scores: dict[str, list[float]]) -> pd.DataFrame:
    """Answers with these rewards by prompt; cost is the negative."""
    rows = [(prompt, reward, -reward) for prompt, rewards in scores.items() for reward in rewards]
    return pd.DataFrame(rows, columns=["prompt_id", "reward", "cost"])


def brute_force(ours: pd.DataFrame, theirs: pd.DataFrame, score: str, sign: int) -> float:
    shares = []
    for prompt in sorted(set(ours["prompt_id"]) & set(theirs["prompt_id"])):
        mine = ours.loc[ours["prompt_id"] == prompt, score].tolist()
        other = theirs.loc[theirs["prompt_id"] == prompt, score].tolist()
        wins = [1.0 if sign * a > sign * b else 0.5 if a == b else 0.0 for a in mine for b in other]
        shares.append(sum(wins) / len(wins))
    return sum(shares) / len(shares)


@pytest.mark.parametrize(("score", "sign"), [("reward", 1), ("cost", -1), ("cost", 1)])
def test_win_rate_is_the_mean_over_prompts_of_all_pairs_with_ties_halved(
    score: str, sign: int
) -> None:
    rng = np.random.default_rng(3)
    # Whole numbers tie often; prompts differ in their number of answers, and not all are common.
    ours = answers({f"p{i}": rng.integers(0, 4, 1 + i % 3).tolist() for i in range(12)})
    theirs = answers({f"p{i}": rng.integers(0, 4, 2 + i % 2).tolist() for i in range(3, 16)})
    found = win_rate(ours, theirs, score, 0.95, sign)
    assert found is not None
    assert found.mean == pytest.approx(brute_force(ours, theirs, score, sign))
    mirrored = win_rate(theirs, ours, score, 0.95, sign)
    assert mirrored is not None and mirrored.low is not None
    assert found.mean + mirrored.mean == pytest.approx(1)
    assert found.high == pytest.approx(1 - mirrored.low)


def test_win_rate_weighs_prompts_not_answers() -> None:
    ours, theirs = answers({"a": [1.0] * 50, "b": [0.0]}), answers({"a": [0.0], "b": [1.0]})
    found = win_rate(ours, theirs, "reward", 0.9)
    assert found is not None and found.mean == 0.5


def test_win_rate_everywhere_still_has_a_width() -> None:
    prompts = [f"p{i}" for i in range(20)]
    found = win_rate(
        answers({p: [1.0] for p in prompts}), answers({p: [0.0] for p in prompts}), "reward", 0.95
    )
    assert found is not None and found.low is not None
    assert found.mean == found.high == 1
    assert 0.75 < found.low < 0.9


def test_win_rate_interval_covers_the_truth_when_answers_of_a_prompt_agree() -> None:
    rng = np.random.default_rng(5)
    prompts = [f"p{i}" for i in range(30)]
    covered = 0
    for _ in range(200):
        lead = rng.normal(0.3, 1.0, 30)
        ours = answers({p: [lead[i]] * 4 for i, p in enumerate(prompts)})
        found = win_rate(ours, answers({p: [0.0] * 4 for p in prompts}), "reward", 0.95)
        assert found is not None and found.low is not None and found.high is not None
        covered += found.low <= 0.6179 <= found.high  # P(N(0.3, 1) > 0)
    # Counting answers for prompts would cover in two thirds of the runs at best.
    assert covered >= 184


def test_few_common_prompts() -> None:
    ours = answers({"a": [1.0], "b": [2.0]})
    assert win_rate(ours, answers({"c": [0.0]}), "reward", 0.95) is None
    assert mean_gain(ours, answers({"c": [0.0]}), 0.95) is None
    alone = answers({"a": [0.5]})
    assert win_rate(ours, alone, "reward", 0.95) == Interval(mean=1.0, low=None, high=None)
    assert mean_gain(ours, alone, 0.95) == Interval(mean=0.5, low=None, high=None)


def test_unscored_answers_do_not_count() -> None:
    ours, theirs = (
        answers({"a": [1.0, float("nan")], "b": [1.0]}),
        answers({"a": [0.0], "b": [0.0]}),
    )
    found = win_rate(ours, theirs, "reward", 0.95)
    assert found is not None and found.mean == 1


def test_mean_gain_is_paired_by_prompt() -> None:
    ours, theirs = (
        answers({"a": [11.0, 13.0], "b": [1.5]}),
        answers({"a": [10.0], "b": [0.0, -2.0]}),
    )
    found = mean_gain(ours, theirs, 0.95)
    assert found is not None
    assert found.mean == pytest.approx(2.25)
    # The prompts' levels (12 and 1.5) cancel: they gain 2 and 2.5.
    reach = student.ppf(0.975, 1) * 0.25
    assert (found.low, found.high) == pytest.approx((2.25 - reach, 2.25 + reach))


def test_a_gain_that_is_the_same_on_all_prompts_has_no_interval() -> None:
    """Two prompts that both gain 2 have no spread to go by."""
    found = mean_gain(answers({"a": [12.0], "b": [1.0]}), answers({"a": [10.0], "b": [-1.0]}), 0.95)
    assert found == Interval(mean=2.0, low=None, high=None)


def test_a_row_for_every_policy(run: Run) -> None:
    root, params = run
    table = compare(root, params)
    assert list(table.policies) == list(params.policies)
    assert table.missing == []
    json.dumps(as_row(table), allow_nan=False)
    write_json(root / "reports/comparison.json", as_row(table))
    assert read_record(root / "reports/comparison.json", Comparison) == table
    kinds = {name: row.kind for name, row in table.policies.items()}
    assert kinds["sft"] == "reference"
    assert kinds["reward_dpo"] == kinds["safety_only"] == "baseline"
    assert kinds["dualign"] == "method"
    assert table.policies["sft"].win_reward is None
    merged = table.policies["p_sacpo"]
    assert merged.merge_weight == pytest.approx(0.6) and merged.trainings == 5
    assert table.policies["reward_dpo"].trainings is None


def test_recommended_is_the_most_helpful_whose_whole_interval_is_within(run: Run) -> None:
    root, params = run
    table = compare(root, params)
    within = {}
    for name, row in table.policies.items():
        kept = all(k.high <= k.limit for k in row.additional.values())
        if kept and row.cost.high <= table.limit:
            within[name] = row.reward.mean
    assert table.recommended == max(within, key=lambda name: within[name])
    # dualign has the higher reward and its mean is within, but its interval is not.
    row = table.policies["dualign"]
    assert row.standing == "unproven"
    assert row.reward.mean > within[table.recommended] and row.cost.mean < table.limit
    for row in table.policies.values():
        broken = any(kept.mean > kept.limit for kept in row.additional.values())
        assert (row.standing == "over") == (row.cost.mean > table.limit or broken)


def test_a_slack_limit_on_cost_leaves_the_additional_constraints(run: Run) -> None:
    """The nearest is the one that is least over them, not the least costly."""
    root, params = run
    shares = {"sft": 0.3, "safety_only": 0.4, "dualign": 0.2}
    for name, mean in shares.items():
        path = root / "reports/metrics/evaluate" / f"{name}.json"
        rare = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "limit": 0.1}
        write_json(path, read_json(path) | {"additional": {"rare": rare}})
    policies = {name: params.policies[name] for name in shares}
    slack = params.model_copy(update={"policies": policies, "limit": 100.0})
    table = compare(root, slack)
    assert {row.standing for row in table.policies.values()} == {"over"}
    assert table.recommended is None and table.nearest == "dualign"


def test_a_certificate_of_a_row_that_params_no_longer_name_is_none(
    certified: Callable[[list[float]], Run],
) -> None:
    """DVC leaves its metrics where they are: they are about a limit and a policy of earlier."""
    root, params = certified([-0.6, -0.3])
    table = compare(root, params)
    assert list(table.certificates) == ["dualign"] and table.recommended == "certified"
    policies = {name: folder for name, folder in params.policies.items() if name != "certified"}
    table = compare(root, params.model_copy(update={"policies": policies, "certificates": {}}))
    assert table.certificates == {}
    assert table.recommended is not None, "no certificate is asked for"


def test_nothing_is_recommended_where_all_are_over(build: Callable[..., Run]) -> None:
    root, params = build(shift=1.0)
    table = compare(root, params)
    assert table.recommended is None
    for path in (root / "reports/metrics/evaluate").glob(
        "*.json"
    ):  # without additional constraints
        write_json(path, read_json(path) | {"additional": {}})
    table = compare(root, params)
    assert table.recommended is None
    assert table.nearest == min(table.policies, key=lambda n: table.policies[n].cost.high)


def test_with_certificates_only_a_certified_policy_is_recommended(
    certified: Callable[..., Run],
) -> None:
    root, params = certified([-0.6, -0.3, -0.1])
    table = compare(root, params)
    assert table.recommended == "certified" and table.policies["certified"].certified
    assert not table.policies["dualign"].certified and table.policies["certified"].trainings is None
    assert list(table.certificates) == ["dualign"]


def test_a_policy_that_a_certificate_returned_as_it_is_is_certified_where_it_lies_too(
    run: Run,
) -> None:
    """Merges have a folder of their own; a fallback is also the policy that was trained."""
    root, params = run
    named = {**params.policies, "certified": "certified/dualign"}
    both = ("certified/dualign", "safety_dpo/only")
    certify(root, [-0.6, 0.1])
    table = compare(root, params.model_copy(update={"policies": named}))
    assert {row.folder for row in table.policies.values() if row.certified} == set(both)
    del named["certified"]
    table = compare(root, params.model_copy(update={"policies": named}))
    assert table.recommended == "safety_only"
    certify(root, [-0.6, -0.3, 0.1])
    table = compare(root, params.model_copy(update={"policies": named}))
    assert table.recommended is None, "a bolder candidate, a merge, was returned"


def test_of_equals_the_folder_that_certify_wrote_is_recommended(run: Run) -> None:
    root, params = run
    certify(root, [-0.6, 0.1], fallback="aligned/dualign")  # `certified` has dualign's answers
    named = {**params.policies, "certified": "certified/dualign"}
    table = compare(root, params.model_copy(update={"policies": named}))
    assert table.policies["dualign"].reward == table.policies["certified"].reward
    assert table.policies["dualign"].certified and table.recommended == "certified"


def test_without_a_certified_policy_none_is_recommended(certified: Callable[..., Run]) -> None:
    root, params = certified([-0.1])
    table = compare(root, params)
    assert table.recommended is None and table.missing == [] and table.uncertified == ["certified"]
    assert any(row.standing == "within" for row in table.policies.values())


def test_rows_hold_the_tilt_and_where_the_additional_constraints_stand(run: Run) -> None:
    root, params = run
    path = root / "reports/metrics/evaluate/dualign.json"
    limits = {"kept": 1.2, "open": 1.1, "broken": 0.9}
    additional = {
        name: {"mean": 1.0, "low": 0.8, "high": 1.2, "limit": limit}
        for name, limit in limits.items()
    }
    additional["empty"] = {"mean": None, "low": None, "high": None, "limit": 1.0}
    write_json(path, read_json(path) | {"additional": additional})
    old = root / "reports/metrics/evaluate/caid.json"
    write_json(
        old,
        {key: value for key, value in read_json(old).items() if key not in ("tilt", "additional")},
    )
    rows = compare(root, params).policies
    assert (
        rows["dualign"].tilt == TiltRow(**read_json(path)["tilt"]) and rows["dualign"].tilt.r2 > 0.8
    )
    standings = {name: limit.standing for name, limit in rows["dualign"].additional.items()}
    assert standings == {"kept": "within", "open": "unproven", "broken": "over", "empty": None}
    assert rows["caid"].tilt is None and rows["caid"].additional == {}


def test_a_limit_of_which_no_answer_tells_is_not_shown_to_be_kept(run: Run) -> None:
    """Its pattern is found in none of the evaluated prompts."""
    root, params = run
    unknown = {"mean": None, "low": None, "high": None, "limit": 1.0}
    for name in params.policies:
        path = root / f"reports/metrics/evaluate/{name}.json"
        write_json(path, read_json(path) | {"additional": {"rare": unknown}})
    table = compare(root, params)
    assert any(row.cost and row.cost.high <= table.limit for row in table.policies.values())
    assert table.recommended is None
    assert {row.standing for row in table.policies.values()} == {"unproven", "over"}


def test_the_limit_is_that_of_params_with_a_dual_or_without(run: Run) -> None:
    root, params = run
    table = compare(root, params)
    assert table.limit == -0.15
    wide = compare(root, params.model_copy(update={"limit": 5.0}))
    assert wide.recommended == "caid", "others break additional constraints"
    (root / "data/dual/dual.json").unlink()
    without = compare(root, params)
    assert without.limit == -0.15 and without.recommended == table.recommended


def test_what_did_not_run_is_missing_or_null(run: Run) -> None:
    root, params = run
    (root / "reports/metrics/evaluate/mocan.json").unlink()
    (root / "reports/search/c_dpo.json").unlink()
    (root / "reports/evaluation/sft/answers.parquet").unlink()
    path = root / "reports/metrics/evaluate/caid.json"
    write_json(path, read_json(path) | {"reward": {"mean": None, "low": None, "high": None}})
    table = compare(root, params)
    assert table.missing == ["mocan"] and "mocan" not in table.policies
    assert table.policies["c_dpo"].trainings is None
    assert table.policies["dualign"].win_reward is None
    assert table.policies["caid"].reward is None and table.recommended != "caid"


def stages_of(file: Path) -> dict[str, StageParams]:
    return {name: load(cls, file) for name, cls in STAGES.items()}


def digests_with(root: Path, name: str, **params: object) -> dict[str, str]:
    """The digests after a stage wrote other params; the stage's own file is as before."""
    path = root / f"reports/provenance/{name}.json"
    before = read_json(path)
    write_json(path, before | {"params": params})
    found = params_digests(root)
    write_json(path, before)
    return found


def test_digests_tell_params_apart_by_stage_but_not_by_seed(run: Run) -> None:
    root, _ = run
    digests = [digests_with(root, "sft", seed=seed, rate=rate) for seed, rate in ((7, 1), (8, 1))]
    assert digests[0] == digests[1] and set(digests[0]) == {"sft", "prepare", "dual_search/dualign"}
    other = digests_with(root, "sft", seed=7, rate=2)
    assert {name for name in other if other[name] != digests[0][name]} == {"sft"}


def test_the_seed_is_all_that_digests_of_genuine_params_leave_out(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    found = []
    for seed, beta in ((7, 1.5), (8, 1.5), (7, 1.6)):
        file = tmp_path / "params.yaml"
        file.write_text(
            text.replace("seed: 7 ", f"seed: {seed} ").replace("beta: 1.5 ", f"beta: {beta} ")
        )
        for name, params in stages_of(file).items():
            made = {"stage": name, "item": None, "params": params.model_dump(mode="json")}
            rest = {"versions": {}, "seconds": 1.0, "peak_rss_mib": 1.0, "throughput": {}}
            write_json(tmp_path / f"reports/provenance/{name}.json", made | rest)
        found.append(params_digests(tmp_path))
    assert found[0] == found[1] and set(found[0]) >= {"prepare", "dual_search", "evaluate"}
    differ = {name for name in found[0] if found[0][name] != found[2][name]}
    assert {"reward_dpo", "dual_init"} <= differ and not {"prepare", "sft"} & differ


def test_an_instances_digest_is_of_its_own_row(run: Run) -> None:
    root, _ = run
    name = "dual_search/dualign"
    alone = digests_with(root, name, methods={"dualign": 1})[name]
    assert digests_with(root, name, methods={"dualign": 1, "sacpo": 1})[name] == alone
    assert digests_with(root, name, methods={"dualign": 2})[name] != alone


def test_judges_and_suites_do_not_count_among_the_params(run: Run) -> None:
    root, _ = run
    made = read_json(root / "reports/provenance/sft.json")
    for stage in ("answer", "judge", "report"):
        write_json(root / f"reports/provenance/{stage}.json", made | {"stage": stage})
    assert set(params_digests(root)) == {"sft", "prepare", "dual_search/dualign"}


def test_a_broken_file_is_named(run: Run) -> None:
    root, params = run
    (root / "reports/metrics/evaluate/mocan.json").write_text('{"reward": ')
    with pytest.raises(DualignError, match=r"mocan\.json:1: not valid JSON"):
        compare(root, params)

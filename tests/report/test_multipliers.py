"""The multiplier that every kind of policy was told, from the files that stages leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dualign.core.artifacts import write_json
from dualign.core.records import CandidateTest, Certified, IntervalRow
from dualign.report.multipliers import Multiplier, merged_multiplier, nominal_multiplier
from tests.written import lagrangian, safety, searched, solved

PLAIN = {"reference": "sft", "loss_type": "dpo", "clip": None, "safe_offset": None, "margin": "sft"}
TRAINED: dict[str, Any] = {
    "reward_dpo/plain": PLAIN,
    "reward_dpo/ipo": PLAIN | {"loss_type": "ipo"},
    "reward_dpo/robust": PLAIN | {"loss_type": "robust", "epsilon": 0.1},
    "reward_dpo/clipped": PLAIN | {"clip": 2.0},
    "reward_dpo/safe_dpo": PLAIN | {"safe_offset": 1.0},
    "reward_dpo/modpo": PLAIN | {"margin": "safety_dpo/alone"},
    "reward_dpo/second": PLAIN | {"reference": "safety_dpo/alone"},
    "safety_dpo/alone": safety(lam=1.5),
    "safety_dpo/stepwise": safety(reference="reward_dpo/plain", lam=1.5),
    "safety_dpo/kto": safety(reference="reward_dpo/plain", loss_type="kto", lam=1.5),
    "lagrangian_dpo/anchored": lagrangian(lam=0.8),
    "lambda_path/strict": lagrangian(lam=2.0),
    "safety_path/lam_4": safety(reference="reward_dpo/helpful", lam=4.0),
    "safety_path/alone": safety(lam=4.0),
}
SEARCHED: dict[str, Any] = {
    "dualign": searched({"lam": 0.8}, {"lam": 1.2}, priced=True),
    "on_path": searched({"lam": 1.1, "q": 0.55}, naive=False),
    "naive": searched({"lam": 1.1, "q": 0.55}, naive=True),
    "mixed": searched({"lam": 1.1}, returns="mixture"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder, metrics in TRAINED.items():
        write_json(tmp_path / f"reports/metrics/{folder}.json", metrics)
    for name, search in SEARCHED.items():
        write_json(tmp_path / f"reports/search/{name}.json", search)
    return tmp_path


def certificate(
    policy: str, partner: str, q: float, returned: str | None = "it"
) -> dict[str, Certified]:
    known = IntervalRow(mean=0.9, low=None, high=None)
    parts = {"policy": policy, "partner": partner, "q": q, "reward": known, "ended": known}
    parts |= {"prompts_needed": None}
    first = CandidateTest(candidate="first", certified=False, checks=[], **parts | {"q": 0.5})
    second = CandidateTest(candidate="it", certified=returned == "it", checks=[], **parts)
    found = Certified(
        returned=returned, statement="", delta=0.05, max_new_tokens=48, requirements=[],
        candidates=["first", "it"], tests=[first, second],
    )  # fmt: skip
    return {"row": found}


@pytest.mark.parametrize(
    ("folder", "lam"),
    [
        ("sft", None), ("reward_dpo/plain", 0.0), ("reward_dpo/ipo", None),
        ("reward_dpo/clipped", None), ("reward_dpo/robust", 0.0),
        ("reward_dpo/safe_dpo", None), ("reward_dpo/modpo", None), ("reward_dpo/second", None),
        ("safety_dpo/alone", None), ("safety_dpo/stepwise", 1.5), ("safety_dpo/kto", None),
        ("lagrangian_dpo/anchored", 0.8), ("lambda_path/strict", 2.0),
        ("lambda_path/not_run", None),
        ("safety_path/lam_4", 4.0), ("safety_path/alone", None),
        ("aligned/dualign", 1.2), ("aligned/not_run", None),
    ],
)  # fmt: skip
def test_a_training_was_told_a_multiplier_or_none(
    root: Path, folder: str, lam: float | None
) -> None:
    assert nominal_multiplier(root, folder, {}) == Multiplier(lam)


@pytest.mark.parametrize(
    ("name", "weight", "on_curve"),
    [("on_path", 0.55, True), ("naive", 0.55, False), ("mixed", None, False)],
)
def test_the_frontier_is_not_about_naive_merges_and_mixtures(
    root: Path, name: str, weight: float | None, on_curve: bool
) -> None:
    expected = Multiplier(1.1, weight, on_curve, tilts=on_curve)
    assert nominal_multiplier(root, f"aligned/{name}", {}) == expected


@pytest.mark.parametrize(
    ("policy", "partner", "q", "lam"),
    [
        ("aligned/dualign", "reward_dpo/plain", 1.5, 1.8),  # extrapolated from multiplier 0
        ("aligned/dualign", "lambda_path/strict", 0.75, 1.4),  # 0.25 * 2 + 0.75 * 1.2
        ("aligned/dualign", "safety_dpo/alone", 1.0, 1.2),  # no merge
        ("aligned/dualign", "safety_dpo/alone", 0.75, None),  # the partner has no multiplier
        ("aligned/dualign", "sft", 0.75, None),
        ("safety_dpo/alone", "safety_dpo/alone", 1.0, None),
        ("aligned/mixed", "reward_dpo/plain", 0.5, None),
    ],
)  # fmt: skip
def test_a_certified_merge_stands_for_what_its_policies_were_told(
    root: Path, policy: str, partner: str, q: float, lam: float | None
) -> None:
    found = nominal_multiplier(root, "certified/row", certificate(policy, partner, q))
    assert found.lam == (None if lam is None else pytest.approx(lam))
    assert found.merge_weight == (None if q == 1.0 else q)


def test_a_merge_is_off_the_curve_where_it_takes_its_share_of_further_prices(root: Path) -> None:
    """The curve has all prices, a merge at weight 1.5 with a policy without them one and a half."""
    for price, on_curve in ((0.0, True), (0.3, False)):
        write_json(root / "data/dual/dual.json", solved(prices=[{"name": "short", "lam": price}]))
        found = nominal_multiplier(
            root, "certified/row", certificate("aligned/dualign", "reward_dpo/plain", 1.5)
        )
        priced = price > 0
        assert found == Multiplier(pytest.approx(1.8), 1.5, on_curve, priced=priced)
        whole = nominal_multiplier(
            root, "certified/row", certificate("aligned/dualign", "reward_dpo/plain", 1.0)
        )
        assert whole.on_curve and whole.priced == priced


@pytest.mark.parametrize(
    ("folder", "on_curve", "priced"),
    [
        ("reward_dpo/plain", False, False), ("safety_dpo/stepwise", False, False),
        ("safety_path/lam_4", False, False), ("lambda_path/strict", False, False),
        ("lagrangian_dpo/anchored", True, True), ("aligned/by_preferences", False, False),
        ("aligned/by_scores", True, True), ("aligned/merged", False, True),
    ],
)  # fmt: skip
def test_the_curve_is_about_policies_that_took_its_prices(
    root: Path, folder: str, on_curve: bool, priced: bool
) -> None:
    """DPO on preferences and a multiplier by number take none; a merge takes its share."""
    write_json(root / "data/dual/dual.json", solved(prices=[{"name": "short", "lam": 0.3}]))
    by_number = lagrangian(lam=2.0, lam_from=None, begin="sft")
    write_json(root / "reports/metrics/lambda_path/strict.json", by_number)
    steps: dict[str, Any] = {
        "by_preferences": searched({"lam": 1.1}),
        "by_scores": searched({"lam": 1.1}, priced=True),
        "merged": searched({"lam": 1.1, "q": 0.5}, priced=True),
    }
    for name, search in steps.items():
        write_json(root / f"reports/search/{name}.json", search)
    found = nominal_multiplier(root, folder, {})
    assert (found.on_curve, found.priced, found.tilts) == (on_curve, priced, True)
    write_json(root / "data/dual/dual.json", solved(prices=[{"name": "short", "lam": 0.0}]))
    found = nominal_multiplier(root, folder, {})
    assert found.on_curve and not found.priced, "where no limit has a price all are"


def test_a_search_that_corrected_prices_left_the_curve(root: Path) -> None:
    write_json(root / "data/dual/dual.json", solved(prices=[{"name": "short", "lam": 0.3}]))
    for prices, on_curve in (([0.3], True), ([0.4], False)):
        write_json(root / "reports/search/corrected.json", searched({"lam": 1.1, "prices": prices}))
        found = nominal_multiplier(root, "aligned/corrected", {})
        assert (found.lam, found.on_curve, found.tilts) == (1.1, on_curve, True)
    merged = nominal_multiplier(
        root, "certified/row", certificate("aligned/corrected", "reward_dpo/plain", 1.5)
    )
    assert merged.lam == pytest.approx(1.65)


def test_where_no_policy_is_certified_nothing_is_told(root: Path) -> None:
    without = certificate("aligned/dualign", "reward_dpo/plain", 1.5, returned=None)
    for certificates in ({}, without):
        assert nominal_multiplier(root, "certified/row", certificates) == Multiplier()


def test_the_multiplier_of_a_merge_by_hand() -> None:
    assert merged_multiplier(0.5, 2.0, 1.0) == 1.5
    assert merged_multiplier(1.0, 2.0, None) == 2.0
    assert merged_multiplier(0.5, 2.0, None) is None and merged_multiplier(0.5, None, 1.0) is None

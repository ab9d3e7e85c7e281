"""An interrupted search ends with the steps of one that was not."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dualign.core.artifacts import read_json, write_json
from dualign.core.errors import DualignError
from dualign.evaluation.stats import ConstraintEstimate
from dualign.params.search import DualSearchParams
from dualign.search.journal import Blend, record, restore
from dualign.search.loop import run
from dualign.search.policy import Search, SearchContext
from dualign.search.screening import PoolCost, Screening
from dualign.search.summary import feasible
from tests.search.curves import (
    HISTORY,
    Curve,
    Swings,
    Tilts,
    by_rule,
    go,
    jointly,
    measured,
    step,
    tilted,
)


def test_steps_on_disk_are_what_was_returned(
    bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    steps, _ = go("dual_gradient", bench, params, tmp_path / "s")
    rows: list[dict[str, Any]] = read_json(tmp_path / "s" / "steps.json")
    assert [(row["lam"], row["measured"]["cost"]) for row in rows] == [
        (s.lam, s.measured.cost) for s in steps
    ]


def test_an_ascent_whose_measurement_broke_off_is_asked_for_again(
    params: DualSearchParams, tmp_path: Path
) -> None:
    whole = go("ascent", Curve(tmp_path / "bench", lam_start=0.6), params, tmp_path / "whole")
    broken = Curve(tmp_path / "bench", lam_start=0.6)
    broken.fail_at = 1
    with pytest.raises(RuntimeError, match="went away"):
        go("ascent", broken, params, tmp_path / "broken")
    assert (
        go("ascent", Curve(tmp_path / "bench", lam_start=0.6), params, tmp_path / "broken") == whole
    )


@pytest.mark.parametrize("fail_at", [0, 1, 2])
@pytest.mark.parametrize(("ess", "max_tokens"), [(0.0, None), (130.0, None), (0.0, 400)])
@pytest.mark.parametrize(
    "rule", ["grid", "dual_gradient", "projected_subgradient", "newton", "merge"]
)
def test_an_interrupted_search_ends_with_the_same_steps(
    rule: str,
    ess: float,
    max_tokens: int | None,
    fail_at: int,
    params: DualSearchParams,
    tmp_path: Path,
) -> None:
    params = params.model_copy(update={"max_tokens": max_tokens, "refresh_prompts": 0, "z": 0.5})

    def curve() -> Curve:
        return Curve(
            tmp_path / "bench",
            lam_start=0.6 if rule != "merge" else 3.0,
            ess=ess,
            bias=0.1 if ess else 0.0,
        )

    whole, reason = go(rule, curve(), params, tmp_path / "whole", lam_pool=1.2)
    assert len(whole) > fail_at, "the search must get as far as the interruption"
    broken = curve()
    broken.fail_at = fail_at
    with pytest.raises(RuntimeError, match="went away"):
        go(rule, broken, params, tmp_path / "broken", lam_pool=1.2)
    resumed = curve()
    assert go(rule, resumed, params, tmp_path / "broken", lam_pool=1.2) == (whole, reason)
    assert resumed.measured == list(range(fail_at, len(whole)))
    assert broken.measured == list(range(fail_at))


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_an_interrupted_search_with_blends_ends_with_the_same_steps(
    fail_at: int, params: DualSearchParams, tmp_path: Path
) -> None:
    whole, reason = go("newton", Swings(tmp_path / "bench", 0.6), params, tmp_path / "whole")
    broken, resumed = Swings(tmp_path / "bench", 0.6), Swings(tmp_path / "bench", 0.6)
    broken.fail_at = fail_at
    with pytest.raises(RuntimeError, match="went away"):
        go("newton", broken, params, tmp_path / "broken")
    assert go("newton", resumed, params, tmp_path / "broken") == (whole, reason)
    assert resumed.measured == list(range(fail_at, len(whole)))


@pytest.mark.parametrize("returns", ["mixture", "tail_average"])
@pytest.mark.parametrize("closing", [False, True], ids=["in the search", "while it closes"])
def test_an_interrupted_search_closes_the_same_way(
    returns: str, closing: bool, params: DualSearchParams, tmp_path: Path
) -> None:
    def curve() -> Curve:
        return Curve(tmp_path / "bench", lam_start=0.6)

    whole, reason = go("dual_gradient", curve(), params, tmp_path / "whole", returns=returns)
    assert whole[-1].closing
    broken, fail_at = curve(), len(whole) - 1 if closing else 1
    broken.fail_at = fail_at
    with pytest.raises(RuntimeError, match="went away"):
        go("dual_gradient", broken, params, tmp_path / "broken", returns=returns)
    resumed = curve()
    assert go("dual_gradient", resumed, params, tmp_path / "broken", returns=returns) == (
        whole,
        reason,
    )
    assert resumed.measured == list(range(fail_at, len(whole)))
    again = curve()
    assert go("dual_gradient", again, params, tmp_path / "broken", returns=returns) == (
        whole,
        reason,
    )
    assert not again.measured and not again.trained and not again.mixed


def test_an_interrupted_search_of_several_limits_ends_with_the_same_steps(
    params: DualSearchParams, tmp_path: Path
) -> None:
    whole, _ = jointly(
        Tilts(tmp_path / "bench", 0.2, (0.6,), 0.4, 0.7), params, tmp_path / "s", -0.3
    )
    broken = Tilts(tmp_path / "bench", 0.2, (0.6,), 0.4, 0.7)
    broken.fail_at = 2
    measure = broken.measure
    broken.measure = lambda step, policy: (
        Curve.measure(broken, step, policy) if step == 2 else measure(step, policy)
    )  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        jointly(broken, params, tmp_path / "t", -0.3)
    again = Tilts(tmp_path / "bench", 0.2, (0.6,), 0.4, 0.7)
    again.asked = broken.asked[:2]
    known = SearchContext(0.4, 0.4, prices=(0.6,))
    update = params.model_copy(update={"limit": -0.3})
    resumed, _ = run(Search(by_rule("newton"), update, known), again.start, again, tmp_path / "t")
    assert [replace(s, policy="") for s in resumed] == [replace(s, policy="") for s in whole]


def test_a_search_whose_journal_is_torn_begins_again_and_says_so(
    params: DualSearchParams, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = go("newton", Curve(tmp_path / "bench", lam_start=0.6), params, tmp_path / "s")
    journal = tmp_path / "s" / "steps.json"
    journal.write_text(journal.read_text()[:-40])
    assert go("newton", Curve(tmp_path / "bench", lam_start=0.6), params, tmp_path / "s") == whole
    (line,) = [
        record.getMessage() for record in caplog.records if "begins again" in record.getMessage()
    ]
    assert re.search(r"steps\.json:\d+: not valid JSON", line) and "\n" not in line


def test_a_finished_search_measures_nothing_again(
    bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    once = go("newton", bench, params, tmp_path / "s")
    seen = list(bench.measured)
    assert go("newton", bench, params, tmp_path / "s") == once
    assert bench.measured == seen


def test_a_policy_that_is_gone_is_named(
    bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    go("grid", bench, params, tmp_path / "s")
    (tmp_path / "bench" / "trained-1" / "lam").unlink()
    (tmp_path / "bench" / "trained-1").rmdir()
    with pytest.raises(
        DualignError,
        match=r"trained-1: the policy of an earlier step is gone; delete .*/s and run again",
    ):
        go("grid", bench, params, tmp_path / "s")


def test_a_journal_that_is_read_and_written_again_is_the_same_bytes(tmp_path: Path) -> None:
    """Or an interrupted search would end with another summary: no count becomes a float."""
    known = ConstraintEstimate("short", 9.0, 1.0, None, None)
    full = replace(
        step(1, 0.5, -0.2, q=0.25),
        policy=str(tmp_path),
        measured=replace(
            measured(-0.2), additional=(known,), covariance=((0.5, 0.0), (0.0, 0.0)), labels=3
        ),
        history=HISTORY,
        tilt=tilted(0.4),
        screened=[Screening(0.25, PoolCost(-0.1, 0.02, 3.0))],
        prices=(0.1,),
        blend=Blend(0, 1, 0.5),
        pool=PoolCost(-0.15, 0.01, 4.0),
    )
    steps = record(tmp_path, [full, replace(full, step=2, tilt=None, blend=None, history=[])])
    before = (tmp_path / "steps.json").read_bytes()
    assert restore(tmp_path) == steps
    record(tmp_path, restore(tmp_path))
    assert (tmp_path / "steps.json").read_bytes() == before


def test_a_journal_of_another_shape_is_no_journal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_json(tmp_path / "steps.json", [{"step": 0, "lam": 0.5}])
    assert restore(tmp_path) == []
    assert "steps.json: 0.q: field required" in caplog.text and "begins again" in caplog.text


def test_a_constraint_on_one_prompt_is_read_alike_after_an_interruption(
    params: DualSearchParams, tmp_path: Path
) -> None:
    """Its error is infinite, so its mean says nothing yet; JSON has no infinity."""
    one = (ConstraintEstimate("rare", 0.2, 0.1, 0.9, math.inf),)
    known = replace(measured(-0.5), additional=one)
    whole = [replace(step(0, 1.0, -0.5), policy=str(tmp_path), measured=known)]
    record(tmp_path, whole)
    assert restore(tmp_path) == whole
    assert feasible(restore(tmp_path)[0], params)

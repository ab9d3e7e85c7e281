"""The rules for the multiplier by hand, and the loop on a policy family whose cost is a known
function of lambda.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from dualign.core.artifacts import read_json
from dualign.core.errors import DualignError
from dualign.evaluation.effective_tilt import Tilt
from dualign.evaluation.stats import ConstraintEstimate, Measurement
from dualign.methods import METHODS, Plan
from dualign.params.loading import load
from dualign.params.search import DualSearchParams, OnlineParams
from dualign.search import rules
from dualign.search.rules import Ascent, Blend, SearchContext, Step
from dualign.search.screening import Screening

ROOT = Path(__file__).resolve().parents[2]
BETA, LIMIT = 1.5, -0.3


@pytest.fixture(scope="module")
def params() -> DualSearchParams:
    """The shipped section with every knob that a rule reads set here."""
    return load(DualSearchParams, ROOT / "params.yaml").model_copy(
        update={
            "beta": BETA,
            "limit": LIMIT,
            "z": 1.0,
            "lambda_min": 0.05,
            "lambda_max": 20.0,
            "max_trainings": 6,
            "merge_steps": 6,
            "merge_max": 1.25,
            "min_ess": 100.0,
            "max_tokens": None,
            "step_size": 1.0,
            "grid": [0.5, 1.0, 2.0],
        }
    )


def by_rule(rule: str, returns: str | None = None) -> Plan:
    """A method of the table with this rule."""
    found = next(method for method in METHODS.values() if method.rule == rule)
    found = replace(found, returns=returns) if returns else found  # type: ignore[arg-type]
    return Plan("row", found, "start", "reference")


def measured(
    cost: float, reward: float = 0.0, se: float = 0.01, variance: float = 0.5
) -> Measurement:
    return Measurement(cost, se, reward, 0.01, 0.2, 0.1, variance, 100)


def tilted(lam: float | None, beta: float = BETA, r2: float = 1.0, lam_se: float = 0.01) -> Tilt:
    """The tilt of a policy; lam None: one that does not tilt towards reward."""
    if lam is None:
        return Tilt(-0.1, -0.2, 0.0, 0.01, 0.01, 0.0, None, None, None, None, r2)
    return Tilt(1 / beta, -lam / beta, 0.0, 0.01, 0.01, 0.0, beta, 0.02, lam, lam_se, r2)


def step(number: int, lam: float, cost: float, q: float | None = None, **more: float) -> Step:
    return Step(number, lam, q, f"step-{number}", number > 0, measured(cost, **more))


# --- rules by hand --------------------------------------------------------------------------------


def test_dual_gradient_by_hand() -> None:
    assert rules.dual_gradient_step(1.0, cost=0.2, limit=-0.3, step_size=2.0) == pytest.approx(2.0)
    assert rules.dual_gradient_step(0.5, cost=-1.0, limit=0.0, step_size=1.0) == 0.0


def test_projected_subgradient_by_hand() -> None:
    def project(lam: float, cost: float) -> float:
        return rules.projected_subgradient_step(
            lam, cost, limit=0.0, step_size=1.0, radius=2.0, lambda_min=0.05
        )

    assert project(1.0, 0.5) == 1.5
    assert project(1.0, -3.0) == 0.05
    assert project(1.0, 9.0) == 4.0


def test_projection_keeps_off_zero_where_the_interval_is_smaller_still() -> None:
    """A slack pool has a Slater radius near 0; the loss still divides by lambda."""
    assert (
        rules.projected_subgradient_step(0.3, 0.5, 0.0, 1.0, radius=1e-4, lambda_min=0.05) == 0.05
    )


def test_newton_by_hand() -> None:
    assert rules.newton_step(1.0, cost=0.2, variance=0.5, limit=-0.3, beta=1.5) == pytest.approx(
        2.5
    )
    assert rules.newton_step(0.1, cost=-2.0, variance=0.5, limit=0.0, beta=1.0) == 0.0


def test_tilt_step_by_hand() -> None:
    """Told 1.0 and reached 0.8 at beta 2: it needs 0.8 + 2 x 0.1 / 0.5 = 1.2, half as much
    again.
    """
    found = rules.tilt_step(1.0, tilted(0.8, beta=2.0), cost=0.2, variance=0.5, limit=0.1)
    assert found == pytest.approx(1.5)
    assert rules.tilt_step(1.0, tilted(0.1, beta=2.0), cost=-0.2, variance=0.5, limit=0.1) == 0.0


def test_a_policy_that_reached_what_it_was_told_makes_newtons_step() -> None:
    newton = rules.newton_step(0.7, cost=0.2, variance=0.5, limit=-0.3, beta=BETA)
    assert rules.tilt_step(0.7, tilted(0.7), cost=0.2, variance=0.5, limit=-0.3) == pytest.approx(
        newton
    )


@pytest.mark.parametrize(("lam", "variance"), [(None, 0.5), (-0.2, 0.5), (0.0, 0.5), (0.7, 0.0)])
def test_a_policy_without_a_multiplier_has_no_tilt_step(lam: float | None, variance: float) -> None:
    assert rules.tilt_step(0.7, tilted(lam), cost=0.2, variance=variance, limit=-0.3) is None


def test_the_line_of_one_step_is_newtons() -> None:
    newton = rules.newton_step(0.7, cost=0.2, variance=0.5, limit=-0.3, beta=BETA)
    assert rules.line_root([0.7], [0.2], [0.05], 0.5 / BETA, -0.3) == pytest.approx(newton)
    assert rules.line_root([0.1], [-2.0], [0.05], 0.5, 0.0) == 0.0


@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_line_minimises_what_its_docstring_says(count: int) -> None:
    rng = np.random.default_rng(count)
    lams, slope, limit = rng.uniform(0.2, 2.0, count), 0.6, -0.3
    costs, errors = 0.4 - 0.5 * lams + rng.normal(0, 0.05, count), rng.uniform(0.03, 0.1, count)

    def objective(line: np.ndarray) -> float:
        a, s = line
        misfit = ((costs - a + s * lams) / errors) ** 2
        return float(misfit.sum() + ((s - slope) / (rules.SLOPE_ERROR * slope)) ** 2)

    a, s = minimize(
        objective, [0.0, slope], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14}
    ).x
    assert rules.line_root(lams, costs, errors, slope, limit) == pytest.approx(
        (a - limit) / s, rel=1e-6
    )


def test_steps_far_apart_make_it_the_secant_and_steps_that_noise_confuses_newtons() -> None:
    points = ((0.5, 0.2), (1.5, -0.4))
    lams, costs = zip(*points, strict=True)
    secant = rules.secant_step(*points, limit=-0.3)
    assert rules.line_root(lams, costs, [1e-4, 1e-4], 0.2, -0.3) == pytest.approx(secant, rel=1e-4)
    near = rules.line_root(
        [1.0, 1.02], [0.1, 0.05], [0.05, 0.05], 0.5, -0.3
    )  # the secant falls 2.5 a unit
    assert near == pytest.approx(1.01 + 0.375 / 0.5, rel=0.02)


@pytest.mark.parametrize("costs", [[0.1, 0.1, 0.1], [0.1, 0.2, 0.4]], ids=["flat", "rising"])
def test_a_line_that_does_not_fall_is_not_believed(costs: list[float]) -> None:
    found = rules.line_root([1.0, 2.0, 3.0], costs, [0.001] * 3, 0.8, 0.0)
    assert found == pytest.approx(2.0 + float(np.mean(costs)) / 0.2)


@pytest.mark.parametrize("slope", [0.6, 1.0, 1.6])
def test_the_line_beats_the_secant_where_costs_are_noisy(
    slope: float, params: DualSearchParams
) -> None:
    """Searches on the curve with noise, Newton's curvature off by a factor: whose next multiplier
    is nearer?
    """
    rng, noise, known = np.random.default_rng(0), 0.05, SearchContext(0.6, 0.6)
    exact = params.model_copy(update={"z": 0.0})
    errors: dict[str, list[float]] = {"secant": [], "line": []}
    for _ in range(400):
        steps: list[Step] = []
        lam = float(rng.uniform(0.6, 2.4))
        for number in range(4):
            fall = 0.8 * math.exp(-0.7 * lam)
            cost = fall - 0.6 + noise * float(rng.normal())
            steps.append(step(number + 1, lam, cost, se=noise, variance=BETA * 0.7 * fall * slope))
            lam = rules._newton(steps, exact, known) or 0.0
        (x0, c0), (x1, c1) = ((s.lam, s.measured.cost) for s in steps[-2:])
        secant = rules.secant_step((x0, c0), (x1, c1), LIMIT)
        if secant is not None:
            for name, found in (("secant", secant), ("line", lam)):
                errors[name].append(abs(0.8 * math.exp(-0.7 * found) - 0.3))
    assert len(errors["line"]) > 200 and np.mean(errors["line"]) < 0.75 * np.mean(errors["secant"])


def test_secant_by_hand() -> None:
    assert rules.secant_step((0.0, 1.0), (1.0, 0.5), limit=0.0) == pytest.approx(2.0)
    assert rules.secant_step((1.0, 0.5), (0.0, 1.0), limit=0.25) == pytest.approx(1.5)
    assert rules.secant_step((1.0, 0.0), (2.0, -1.0), limit=5.0) == 0.0


def test_merge_weight_and_multiplier_by_hand() -> None:
    assert rules.first_weight(0.6, 1.5, naive=False) == pytest.approx(0.4)
    assert rules.merge_multiplier(0.4, 1.5, naive=False) == pytest.approx(0.6)
    assert rules.first_weight(0.6, 1.4, naive=True) == pytest.approx(0.3)
    assert rules.merge_multiplier(0.3, 1.4, naive=True) == pytest.approx(0.6)
    assert rules.first_weight(0.9, 2.0, naive=False, lam_reference=0.4) == pytest.approx(0.3125)
    assert rules.merge_multiplier(0.3125, 2.0, naive=False, lam_reference=0.4) == pytest.approx(0.9)
    assert (
        rules.first_weight(0.1, 2.0, naive=False, lam_reference=0.4) == 0.0
    )  # slacker than both ends


def test_a_merge_of_two_policies_of_the_path_is_the_one_between() -> None:
    """On a finite answer set (1 - q) log pi_slack + q log pi_strict is log pi_lambda at the same
    beta, for every q.
    """
    rng = np.random.default_rng(1)
    reference, reward, cost = (rng.normal(size=9) for _ in range(3))

    def policy(lam: float) -> np.ndarray:
        logits = reference + (reward - lam * cost) / BETA
        return np.asarray(logits - np.logaddexp.reduce(logits))

    for q in (0.0, 0.35, 1.0, 1.25):
        merged = (1 - q) * policy(0.4) + q * policy(2.0)
        merged = merged - np.logaddexp.reduce(merged)
        assert merged == pytest.approx(
            policy(rules.merge_multiplier(q, 2.0, naive=False, lam_reference=0.4))
        )


def test_the_next_weight_by_hand() -> None:
    line = [(0.0, 1.0), (0.5, 0.4), (1.0, -0.2)]
    assert rules.next_weight(line, 0.1, 1.25) == pytest.approx(0.75)
    assert rules.next_weight(line, -0.8, 1.25) == 1.25  # no further than allowed
    assert rules.next_weight([(0.1, 0.3), (0.6, -0.15), (1.0, -0.25)], 0.0, 1.25) == pytest.approx(
        0.1 + 0.5 * 2 / 3
    )
    assert rules.next_weight([(0.2, 0.1), (0.6, 0.3)], 0.0, 1.25) is None  # it does not fall
    assert rules.next_weight([(0.2, 0.1), (0.6, 0.0001)], 0.0, 1.25) is None  # there already


@pytest.mark.parametrize("q", [0.0, 0.3, 0.75])
def test_a_merges_multiplier_is_that_of_its_tilt(q: float) -> None:
    """On a finite answer set the weighted product of the two policies is pi_lambda at lambda_eff
    and beta_eff.
    """
    rng = np.random.default_rng(0)
    reference, reward, cost = (rng.normal(size=7) for _ in range(3))
    beta, lam = 0.5, 1.2

    def policy(score: np.ndarray, at: float) -> np.ndarray:
        logits = reference + score / at
        return np.asarray(logits - np.logaddexp.reduce(logits))

    for naive, second, at in (
        (False, policy(reward - lam * cost, beta), beta),
        (True, policy(-lam * cost, beta), beta / (1 - q)),
    ):
        merged = (1 - q) * policy(reward, beta) + q * second
        expected = policy(reward - rules.merge_multiplier(q, lam, naive) * cost, at)
        assert merged - np.logaddexp.reduce(merged) == pytest.approx(expected)


def test_tail_by_hand() -> None:
    assert [
        list(rules.tail(lams))
        for lams in ([1.0], [1.0, 2.0], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0, 8.0])
    ] == [
        [1.0],
        [2.0],
        [2.0, 4.0],
        [4.0, 8.0],
    ]


@pytest.mark.parametrize(
    "last", [(1.0, 0.4), (2.0, 0.5), (2.0, 0.6)], ids=["same place", "flat", "rising"]
)
def test_a_secant_needs_a_falling_line(last: tuple[float, float]) -> None:
    assert rules.secant_step((1.0, 0.5), last, limit=0.0) is None


# --- the loop on a known curve --------------------------------------------------------------------


class Curve:
    """A bench whose policy at lambda has cost 0.8 exp(-0.7 lambda) - 0.6 plus `bias`, and remembers
    what it was asked.

    A policy is a folder that holds its multiplier; the variance is the one that makes Newton's
    slope right."""

    def __init__(
        self,
        folder: Path,
        lam_start: float,
        se: float = 0.01,
        bias: float = 0.0,
        ess: float = 0.0,
        reach: float = 1.0,
    ) -> None:
        self.folder, self.lam_start, self.se, self.bias = folder, lam_start, se, bias
        self.ess, self.reach = ess, reach
        self.screened: list[float] = []
        self.trained: list[tuple[int, float, str]] = []
        self.merged: list[float] = []
        self.blended: list[tuple[str, str, float]] = []
        self.mixed: list[list[float]] = []
        self.ascended: list[int] = []
        self.measured: list[int] = []
        self.fail_at: int | None = None
        self.start = self._policy("start", lam_start)

    def train(
        self, step: int, lam: float, warm: Step, prices: Sequence[float] | None = None
    ) -> str:
        self.trained.append((step, lam, warm.policy))
        return self._policy(f"trained-{step}", lam)

    def merge(self, step: int, q: float) -> str:
        self.merged.append(q)
        return self._policy(f"merged-{step}", q * self.lam_start)

    def blend(self, step: int, first: str, second: str, weight: float) -> str:
        """Two tilts at one beta merge to the tilt at the multiplier between."""
        self.blended.append((first, second, weight))
        left, right = (float((Path(folder) / "lam").read_text()) for folder in (first, second))
        return self._policy(f"blended-{step}", (1 - weight) * left + weight * right)

    def ascend(self, step: int) -> Ascent:
        """Ends where the curve meets the limit."""
        self.ascended.append(step)
        return Ascent(self._policy(f"ascended-{step}", ROOT_LAM), ROOT_LAM, HISTORY)

    def mix(self, step: int, steps: Sequence[Step]) -> str:
        """Stands for the mean multiplier; that of the costs would need more than one number."""
        self.mixed.append([s.lam for s in steps])
        return self._policy(f"mixed-{step}", sum(s.lam for s in steps) / len(steps))

    def screen(self, q: float) -> Screening:
        """The curve without its bias, as from other prompts; trusted as far as `ess` says, less for
        larger weights.
        """
        self.screened.append(q)
        return Screening(q, self._cost(q * self.lam_start) - self.bias, 0.02, self.ess * (1.5 - q))

    def tilt(self, policy: str) -> Tilt:
        """A training reaches `reach` times what it was told."""
        return tilted(
            self.reach * float((Path(policy) / "lam").read_text()),
            r2=1.0 if self.reach != 1.0 else 0.5,
        )

    def _cost(self, lam: float) -> float:
        return 0.8 * math.exp(-0.7 * lam) - 0.6 + self.bias

    def measure(self, step: int, policy: str) -> Measurement:
        if step == self.fail_at:
            raise RuntimeError("the machine went away")
        self.measured.append(step)
        lam = float((Path(policy) / "lam").read_text())
        effective = self.reach * lam
        variance = BETA * 0.7 * 0.8 * math.exp(-0.7 * effective)
        return Measurement(
            self._cost(effective), self.se, 1.0 - 0.1 * lam, 0.01, 0.2, 0.1, variance, 100
        )

    def _policy(self, name: str, lam: float) -> str:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "lam").write_text(repr(lam))
        return str(path)


ROOT_LAM = math.log(0.8 / 0.3) / 0.7  # where the curve meets the limit: 1.4012
RULES = ["grid", "one_shot", "dual_gradient", "projected_subgradient", "newton", "merge", "ascent"]
HISTORY = [{"step": 10, "lam": 1.1, "cost": 0.2, "reward": 0.5, "kl": 0.1}]


@pytest.fixture
def bench(tmp_path: Path) -> Curve:
    return Curve(tmp_path / "bench", lam_start=0.6)


def go(
    rule: str,
    bench: Curve,
    params: DualSearchParams,
    scratch: Path,
    lam_pool: float = 0.6,
    radius: float = 5.0,
    naive: bool = False,
    returns: str | None = None,
    target: float | None = None,
) -> tuple[list[Step], str]:
    scratch.mkdir(exist_ok=True)
    known = SearchContext(lam_pool, bench.lam_start, radius, naive, target_cost=target)
    return rules.run(by_rule(rule, returns), bench.start, known, params, bench, scratch)


@pytest.mark.parametrize("rule", ["dual_gradient", "projected_subgradient", "newton"])
def test_iterative_rules_end_on_the_limit(
    rule: str, bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    generous = params.model_copy(update={"max_trainings": 50, "step_size": 2.0})
    steps, stopped = go(rule, bench, generous, tmp_path / "s")
    assert stopped == "cost within noise of the limit"
    assert abs(steps[-1].measured.cost - LIMIT) <= bench.se
    assert steps[-1].lam == pytest.approx(ROOT_LAM, abs=0.06)
    assert [s.step for s in steps] == list(range(len(steps)))
    assert [s.trained for s in steps] == [False] + [True] * (len(steps) - 1)
    assert all(s.q is None for s in steps)


def test_newton_needs_two_trainings(bench: Curve, params: DualSearchParams, tmp_path: Path) -> None:
    steps, _ = go("newton", bench, params, tmp_path / "s")
    assert len(steps) <= 4
    first = rules.newton_step(0.6, steps[0].measured.cost, steps[0].measured.variance, LIMIT, BETA)
    assert steps[1].lam == pytest.approx(first)
    second = rules.newton_step(
        steps[1].lam, steps[1].measured.cost, steps[1].measured.variance, LIMIT, BETA
    )
    assert steps[2].lam == pytest.approx(
        second
    )  # the start is of another training, so it tells no slope
    exact = params.model_copy(update={"z": 0.0})
    lams, costs = [s.lam for s in steps[1:3]], [s.measured.cost for s in steps[1:3]]
    line = rules.line_root(lams, costs, [bench.se] * 2, steps[2].measured.variance / BETA, LIMIT)
    assert rules._newton(steps[:3], exact, SearchContext(0.6, 0.6)) == pytest.approx(line)


def test_a_first_correction_is_told_in_commands_where_the_tilt_is_believed(
    params: DualSearchParams, tmp_path: Path
) -> None:
    """Every training reaches 0.6 of what it is told; Newton alone would go 0.6 of the way."""
    lazy = Curve(tmp_path / "lazy", lam_start=1.0, reach=0.6)
    steps, _ = go("newton", lazy, params, tmp_path / "s")
    m = steps[0].measured
    newton = rules.newton_step(1.0, m.cost, m.variance, LIMIT, BETA)
    assert steps[1].lam == pytest.approx(1.0 + (newton - 1.0) / 0.6)
    assert abs(steps[1].measured.cost - LIMIT) < abs(lazy._cost(0.6 * newton) - LIMIT)
    doubted = replace(steps[0], tilt=tilted(0.6, r2=0.89))
    unclear = replace(steps[0], tilt=tilted(0.6, lam_se=0.31))
    for first in (doubted, unclear, replace(steps[0], tilt=None)):
        assert rules._newton([first], params, SearchContext(1.0, 1.0)) == pytest.approx(newton)
    second, later = steps[1], rules._newton(steps[:2], params, SearchContext(1.0, 1.0))
    assert later == rules.tilt_step(
        second.lam, second.tilt, second.measured.cost, second.measured.variance, LIMIT
    )


SWINGING = [step(0, 0.6, -0.05), step(1, 1.7, -0.36), step(2, 1.2, -0.24), step(3, 1.5, -0.33)]


def test_every_reckoning_is_on_record(params: DualSearchParams) -> None:
    steps = [replace(s, tilt=tilted(0.5 * s.lam)) for s in SWINGING]
    rows = rules.summary(by_rule("newton"), steps, "b", params, SearchContext(0.6, 0.6), before=1)[
        "steps"
    ]
    assert all(row["next"].keys() == {"newton", "tilt", "line"} for row in rows)
    assert rows[0]["next"]["line"] == pytest.approx(rows[0]["next"]["tilt"])
    assert rows[3]["next"] == rules.corrections(steps, params, SearchContext(0.6, 0.6))
    assert len(set(rows[3]["next"].values())) == 3
    assert rows[2]["tilt"]["lam_eff"] == pytest.approx(0.6)
    assert (
        "next"
        not in rules.summary(
            by_rule("grid"), steps, "b", params, SearchContext(0.6, 0.6), before=1
        )["steps"][0]
    )


# --- the target -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["dual_gradient", "projected_subgradient", "newton", "merge"])
def test_a_rule_ends_on_the_aim_below_the_limit(
    rule: str, params: DualSearchParams, tmp_path: Path
) -> None:
    generous = params.model_copy(update={"max_trainings": 50, "step_size": 2.0})
    bench = Curve(tmp_path / "bench", lam_start=3.0 if rule == "merge" else 0.6)
    steps, stopped = go(rule, bench, generous, tmp_path / "s", lam_pool=1.2, target=LIMIT - 0.1)
    assert stopped == "cost within noise of the target"
    assert abs(steps[-1].measured.cost - (LIMIT - 0.1)) <= bench.se
    known = SearchContext(1.2, 0.6, target_cost=LIMIT - 0.1)
    assert rules.summary(by_rule(rule), steps, stopped, generous, known, 1)[
        "target"
    ] == pytest.approx(LIMIT - 0.1)


def test_the_best_keeps_the_aim_else_the_limit_else_costs_least(params: DualSearchParams) -> None:
    plan = by_rule("newton", "best")
    assert rules.choose(plan, STEPS, params, target=-0.45) == 2  # the only one below it
    assert (
        rules.choose(plan, STEPS, params, target=-0.9) == 1
    )  # none: the most rewarding within the limit
    assert rules.choose(plan, STEPS, params, target=-0.4) == 3
    assert rules.choose(plan, STEPS[:1], params, target=-0.4) == 0
    result = rules.summary(
        plan, STEPS, "b", params, SearchContext(0.6, 0.5, target_cost=-0.9), before=1
    )
    assert result["chosen"] == 1 and result["feasible"]  # feasible is a matter of the limit


# --- tokens ---------------------------------------------------------------------------------------


def spent(steps: Sequence[Step]) -> int:
    return sum(s.measured.generated_tokens for s in steps)


@pytest.mark.parametrize(
    "rule", ["grid", "dual_gradient", "projected_subgradient", "newton", "merge"]
)
def test_no_search_spends_more_tokens_than_it_may(
    rule: str, params: DualSearchParams, tmp_path: Path
) -> None:
    def curve(name: str) -> Curve:
        return Curve(tmp_path / name, lam_start=3.0 if rule == "merge" else 0.6, se=1e-12)

    even = params.model_copy(
        update={"refresh_prompts": 0, "grid": [0.5, 1.0, 2.0, 3.0]}
    )  # every step takes 100
    for budget, count in ((250, 2), (299, 2), (300, 3)):
        tight = even.model_copy(update={"max_tokens": budget})
        steps, stopped = go(rule, curve(f"{budget}"), tight, tmp_path / f"s{budget}", lam_pool=1.2)
        assert len(steps) == count and spent(steps) <= budget
        assert stopped == f"budget of {budget} generated tokens is spent"


def test_answers_for_the_next_training_are_foreseen(
    params: DualSearchParams, tmp_path: Path
) -> None:
    """100 tokens for the start's answers foretell 150 where half as many are drawn to be trained
    on.
    """
    update = {"prompts": 10, "samples_per_prompt": 2, "refresh_prompts": 5, "refresh_samples": 2}
    for budget, count in ((249, 1), (250, 2)):
        tight = params.model_copy(update={**update, "max_tokens": budget, "max_trainings": 1})
        steps, _ = go("newton", Curve(tmp_path / f"{budget}", 0.6), tight, tmp_path / f"s{budget}")
        assert len(steps) == count
    assert (
        rules.answers_drawn(by_rule("newton"), params.model_copy(update=update), trained=False)
        == 20
    )
    assert (
        rules.answers_drawn(by_rule("grid"), params.model_copy(update=update), trained=True) == 20
    )


@pytest.mark.parametrize("returns", ["last", "mixture", "tail_average"])
def test_a_search_out_of_tokens_returns_its_best_so_far(
    returns: str, params: DualSearchParams, tmp_path: Path
) -> None:
    wide = params.model_copy(update={"max_tokens": 320, "step_size": 8.0, "refresh_prompts": 0})
    steps, stopped = go(
        "dual_gradient", Curve(tmp_path / "b", 0.6), wide, tmp_path / "s", returns=returns
    )
    assert (
        len(steps) == 3
        and not any(s.closing for s in steps)
        and stopped.startswith("budget of 320 generated")
    )
    plan = by_rule("dual_gradient", returns)
    result = rules.summary(plan, steps, stopped, wide, SearchContext(0.6, 0.6), before=0)
    allowed = [i for i, s in enumerate(steps) if rules.feasible(s, wide)]
    assert allowed and result["chosen"] == max(allowed, key=lambda i: steps[i].measured.reward)
    assert result["chosen"] == 1 and result["feasible"]


def test_a_search_that_cannot_pay_for_its_closing_says_so(
    params: DualSearchParams, tmp_path: Path
) -> None:
    free = params.model_copy(update={"refresh_prompts": 0})
    whole, reason = go(
        "newton", Curve(tmp_path / "a", 0.6), free, tmp_path / "s", returns="mixture"
    )
    assert whole[-1].closing and reason == "cost within noise of the limit"
    tight = free.model_copy(update={"max_tokens": spent(whole) - 1})
    steps, stopped = go(
        "newton", Curve(tmp_path / "b", 0.6), tight, tmp_path / "t", returns="mixture"
    )
    assert (
        len(steps) == len(whole) - 1
        and stopped == f"budget of {spent(whole) - 1} generated tokens is spent"
    )


def test_newton_leaves_a_start_that_meets_the_limit(
    params: DualSearchParams, tmp_path: Path
) -> None:
    steps, stopped = go(
        "newton", Curve(tmp_path / "bench", lam_start=ROOT_LAM), params, tmp_path / "s"
    )
    assert [s.lam for s in steps] == [ROOT_LAM] and stopped == "cost within noise of the limit"
    off = Curve(tmp_path / "off", lam_start=0.5 * ROOT_LAM)
    assert len(go("newton", off, params, tmp_path / "t")[0]) > 1


def test_newton_keeps_its_multiplier_where_the_cost_does_not_vary(params: DualSearchParams) -> None:
    flat = replace(step(0, 0.7, 0.5), measured=measured(0.5, variance=0.0))
    assert rules._newton([flat], params, SearchContext(0.7, 0.7, 5.0)) == 0.7


def test_newton_stays_below_the_largest_multiplier(params: DualSearchParams) -> None:
    steep = replace(step(0, 0.7, 0.5), measured=measured(0.5, variance=1e-6))
    assert rules._newton([steep], params, SearchContext(0.7, 0.7, 5.0)) == params.lambda_max


@pytest.mark.parametrize("rule", ["dual_gradient", "projected_subgradient"])
def test_a_start_on_the_limit_is_the_answer(
    rule: str, params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "bench", lam_start=ROOT_LAM)
    steps, stopped = go(rule, bench, params, tmp_path / "s")
    assert len(steps) == 1 and not bench.trained
    assert stopped == "cost within noise of the limit"


@pytest.mark.parametrize("rule", ["dual_gradient", "newton", "merge"])
def test_a_limit_that_is_kept_at_multiplier_0_ends_the_search(
    rule: str, params: DualSearchParams, tmp_path: Path
) -> None:
    start = 1.2 if rule == "merge" else 0.0  # a merge has its multiplier 0 at weight 0
    bench = Curve(
        tmp_path / "bench", lam_start=start, bias=-0.9
    )  # cost -0.7 at multiplier 0, limit -0.3
    steps, stopped = go(rule, bench, params, tmp_path / "s", lam_pool=0.0)
    assert stopped == "the limit is kept at lambda 0" and steps[-1].lam == 0.0
    assert len(steps) == {"dual_gradient": 1, "newton": 1, "merge": 2}[rule]
    over = Curve(tmp_path / "over", lam_start=start)  # 0.2 at multiplier 0
    assert len(go(rule, over, params, tmp_path / "t", lam_pool=0.0)[0]) > 2


def test_a_wider_error_stops_earlier(params: DualSearchParams, tmp_path: Path) -> None:
    lengths = []
    for se in (0.001, 0.1):
        bench = Curve(tmp_path / f"bench-{se}", lam_start=0.6, se=se)
        steps, _ = go(
            "dual_gradient",
            bench,
            params.model_copy(update={"max_trainings": 40}),
            tmp_path / f"s-{se}",
        )
        lengths.append(len(steps))
    assert lengths[1] < lengths[0]


def test_one_shot_measures_its_start_and_stops(
    bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    steps, stopped = go("one_shot", bench, params, tmp_path / "s")
    assert len(steps) == 1 and stopped == "rule one_shot is finished"


def test_an_ascent_trains_once_and_tells_its_own_multiplier_and_course(
    bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    steps, stopped = go("ascent", bench, params, tmp_path / "s")
    assert bench.ascended == [1] and not bench.trained and stopped == "rule ascent is finished"
    assert [(s.lam, s.trained, s.history) for s in steps] == [
        (0.6, False, []),
        (ROOT_LAM, True, HISTORY),
    ]
    result = rules.summary(
        by_rule("ascent"), steps, stopped, params, SearchContext(0.6, 0.6), before=0
    )
    assert (
        result["history"] == HISTORY
        and result["trainings"] == 1
        and "history" not in result["steps"][1]
    )
    again = Curve(tmp_path / "again", lam_start=0.6)
    assert go("ascent", again, params, tmp_path / "s") == (steps, stopped) and not again.ascended
    none = params.model_copy(update={"max_trainings": 0})
    assert (
        go("ascent", again, none, tmp_path / "t")[1] == "budget of 0 trainings is spent"
        and not again.ascended
    )


def test_grid_tries_every_multiplier_once_and_not_the_starts(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "bench", lam_start=1.0)
    steps, stopped = go("grid", bench, params, tmp_path / "s")
    assert [s.lam for s in steps] == [1.0, 0.5, 2.0]
    assert stopped == "rule grid is finished"


def test_a_grid_is_its_own_budget_and_its_end_is_its_reason(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(
        tmp_path / "bench", lam_start=0.6, se=10.0
    )  # always within noise, which a grid does not go by
    steps, stopped = go(
        "grid", bench, params.model_copy(update={"max_trainings": 1}), tmp_path / "s"
    )
    assert [s.lam for s in steps] == [0.6, 0.5, 1.0, 2.0] and stopped == "rule grid is finished"


@pytest.mark.parametrize(("method", "least"), [("c_dpo", 0.0), ("sacpo", 0.05)])
def test_a_grid_starts_at_zero_where_the_loss_allows(
    method: str, least: float, bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    plan = Plan("row", replace(METHODS[method], rule="grid"), "start", "reference")
    given = params.model_copy(update={"grid": [0.0, 1.0]})
    (tmp_path / "s").mkdir()
    steps, _ = rules.run(plan, bench.start, SearchContext(0.6, 0.6), given, bench, tmp_path / "s")
    assert [s.lam for s in steps] == [0.6, least, 1.0]
    assert [lam for _, lam, _ in bench.trained] == [least, 1.0]


def test_a_projection_that_moves_no_more_ends_the_search(
    params: DualSearchParams, tmp_path: Path
) -> None:
    for name, bias, end in (("high", 1.0, 1.8), ("low", -1.0, params.lambda_min)):
        bench = Curve(tmp_path / name, lam_start=0.6, bias=bias)
        steps, stopped = go(
            "projected_subgradient", bench, params, tmp_path / f"s-{name}", radius=0.9
        )
        assert [s.lam for s in steps].count(end) == 1 and steps[-1].lam == end
        assert stopped == "lambda is at the end of its interval"


def test_rounds_of_comparisons_go_on_at_the_end_of_the_interval(params: DualSearchParams) -> None:
    online = OnlineParams(
        labels="models",
        folder="f",
        retrain_reward=True,
        ridge=1.0,
        reward_scale=0.1,
        cost_scale=0.1,
        dimension=None,
    )
    at_the_end, known = [step(3, 1.8, cost=0.5)], SearchContext(0.6, 0.6, radius=0.9)
    assert rules._projected_subgradient(at_the_end, params, known) is None
    assert (
        rules._projected_subgradient(
            at_the_end, params.model_copy(update={"online": online}), known
        )
        == 1.8
    )


def test_projection_keeps_to_its_interval(params: DualSearchParams, tmp_path: Path) -> None:
    high = Curve(tmp_path / "high", lam_start=0.6, bias=1.0)  # no multiplier is enough
    steps, _ = go("projected_subgradient", high, params, tmp_path / "a", radius=0.9)
    assert [s.lam for s in steps][-1] == pytest.approx(1.8) and max(
        s.lam for s in steps
    ) == pytest.approx(1.8)
    low = Curve(tmp_path / "low", lam_start=0.6, bias=-1.0)  # none is needed
    steps, _ = go("projected_subgradient", low, params, tmp_path / "b")
    assert steps[-1].lam == params.lambda_min


def test_dual_gradient_stays_between_nothing_and_the_largest(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bold = params.model_copy(update={"step_size": 1e3})
    steps, _ = go("dual_gradient", Curve(tmp_path / "high", 0.6, bias=1.0), bold, tmp_path / "a")
    assert steps[1].lam == params.lambda_max
    steps, _ = go("dual_gradient", Curve(tmp_path / "low", 0.6, bias=-1.0), bold, tmp_path / "b")
    assert steps[1].lam == 0.0


@pytest.mark.parametrize("budget", [0, 1, 3])
@pytest.mark.parametrize("rule", ["dual_gradient", "projected_subgradient", "newton"])
def test_no_search_trains_more_than_its_budget(
    rule: str, budget: int, params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "bench", lam_start=0.6, se=1e-12, bias=1.0)  # never within noise
    tight = params.model_copy(update={"max_trainings": budget})
    steps, stopped = go(rule, bench, tight, tmp_path / "s")
    assert len(bench.trained) == len(steps) - 1 == budget
    assert stopped == f"budget of {budget} training{'' if budget == 1 else 's'} is spent"


def test_every_training_is_told_the_step_before(
    bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    steps, _ = go("grid", bench, params, tmp_path / "s")
    assert [warm for _, _, warm in bench.trained] == [s.policy for s in steps[:-1]]
    assert [(n, lam) for n, lam, _ in bench.trained] == [(s.step, s.lam) for s in steps[1:]]


def test_a_search_ends_at_the_first_step_that_is_enough(
    bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    steps, stopped = rules.run(
        by_rule("grid"),
        bench.start,
        SearchContext(0.6, 0.6),
        params,
        bench,
        tmp_path,
        lambda step: step.lam >= 1.0,
    )
    assert ([s.lam for s in steps], stopped) == ([0.6, 0.5, 1.0], "it was enough")


# --- blends ---------------------------------------------------------------------------------------


class Swings(Curve):
    """Trainings go on from the policy before, so each answers to 1.5 times what it is told: Newton
    goes too far.
    """

    def train(
        self, step: int, lam: float, warm: Step, prices: Sequence[float] | None = None
    ) -> str:
        return super().train(step, 1.5 * lam, warm)


def test_the_next_blend_by_hand() -> None:
    above, below = step(0, 0.6, cost=0.1), step(1, 1.8, cost=-0.5)
    assert rules.next_blend([above, below], LIMIT) == Blend(0, 1, pytest.approx(0.4 / 0.6))
    assert rules.next_blend([above], LIMIT) is None and rules.next_blend([below], LIMIT) is None
    nearer = step(2, 1.2, cost=-0.2)
    assert rules.next_blend([above, below, nearer], LIMIT) == Blend(2, 1, pytest.approx(1 / 3))
    known = replace(step(2, 1.4, cost=-0.4), trained=False, blend=Blend(0, 1, 2 / 3))
    assert rules.next_blend([above, below, known], LIMIT) == Blend(
        0, 1, pytest.approx(1 / 3)
    )  # on the line of the two nearest
    met = replace(known, measured=measured(LIMIT))
    assert rules.next_blend([above, below, met], LIMIT) is None  # its root is there


def test_policies_on_both_sides_of_the_limit_are_merged_in_place_of_a_training(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Swings(tmp_path / "bench", lam_start=0.6)
    steps, stopped = go("newton", bench, params, tmp_path / "s")
    assert (
        stopped == "cost within noise of the limit"
        and abs(steps[-1].measured.cost - LIMIT) <= bench.se
    )
    assert [s.trained for s in steps] == [False, True, False, False]
    weights = [
        0.7475,
        0.6426,
    ]  # the secant of start and training, then the one of the start and the first blend
    assert [weight for *_, weight in bench.blended] == pytest.approx(weights, abs=1e-4)
    assert {ends[:2] for ends in bench.blended} == {(steps[0].policy, steps[1].policy)}
    for made, weight in zip(steps[2:], weights, strict=True):
        assert made.lam == pytest.approx(
            (1 - weight) * steps[0].lam + weight * steps[1].lam, abs=1e-4
        )
    rows = rules.summary(
        by_rule("newton"), steps, stopped, params, SearchContext(0.6, 0.6), before=1
    )
    assert (rows["trainings"], rows["chosen"]) == (2, 3)
    assert rows["steps"][3]["blend"] == {"first": 0, "second": 1, "weight": bench.blended[1][2]}
    assert rows["steps"][1]["blend"] is None


def test_blends_have_their_budget_and_trainings_theirs(
    params: DualSearchParams, tmp_path: Path
) -> None:
    never = params.model_copy(update={"z": 0.0, "max_trainings": 2, "merge_steps": 3})
    bench = Swings(tmp_path / "bench", lam_start=0.6)
    steps, stopped = go("newton", bench, never, tmp_path / "s")
    assert (len(bench.trained), len(bench.blended), len(steps)) == (2, 3, 6)
    assert stopped == "budget of 2 trainings is spent"
    without = never.model_copy(update={"merge_steps": 0})
    assert all(
        s.blend is None
        for s in go("newton", Swings(tmp_path / "b", 0.6), without, tmp_path / "t")[0]
    )


@pytest.mark.parametrize("returns", ["mixture", "tail_average"])
def test_what_is_made_of_all_steps_is_made_of_trainings(
    returns: str, params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Swings(tmp_path / "bench", lam_start=0.6)
    steps, _ = go("newton", bench, params, tmp_path / "s", returns=returns)
    assert len(steps) > 3 and not bench.blended


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


# --- merging --------------------------------------------------------------------------------------


def test_merging_begins_at_the_pools_multiplier_and_ends_on_the_limit(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "bench", lam_start=3.0)
    steps, stopped = go("merge", bench, params, tmp_path / "s", lam_pool=1.2)
    assert bench.merged[0] == pytest.approx(0.4)
    assert stopped == "cost within noise of the limit"
    assert steps[-1].q == pytest.approx(ROOT_LAM / 3.0, abs=0.02)
    assert all(s.lam == pytest.approx(s.q * 3.0) for s in steps[1:] if s.q is not None)
    assert not bench.trained and not any(s.trained for s in steps)


@pytest.mark.parametrize(
    ("lam", "merges"), [(ROOT_LAM, 0), (1.2, 1), (1.6, 1)], ids=["on it", "above", "below"]
)
def test_a_start_at_the_pools_multiplier_is_corrected_by_newtons_weight(
    lam: float, merges: int, params: DualSearchParams, tmp_path: Path
) -> None:
    """It is the policy of weight 1, so only what it misses is merged away."""
    bench = Curve(tmp_path / "bench", lam_start=lam)
    steps, stopped = go("merge", bench, params, tmp_path / "s", lam_pool=lam)
    assert stopped == "cost within noise of the limit"
    assert abs(steps[-1].measured.cost - LIMIT) <= bench.se
    if merges:
        m = steps[0].measured
        newton = rules.newton_step(lam, m.cost, m.variance, LIMIT, BETA)
        assert bench.merged[0] == pytest.approx(newton / lam)
    assert bool(bench.merged) is bool(merges) and not bench.trained


def test_merging_extrapolates_no_further_than_allowed(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "bench", lam_start=0.5)
    _, stopped = go("merge", bench, params, tmp_path / "s", lam_pool=5.0)
    assert bench.merged[0] == params.merge_max == max(bench.merged)
    assert stopped == "rule merge is finished"  # the best it can do was measured already


def test_merging_has_its_own_budget(params: DualSearchParams, tmp_path: Path) -> None:
    bench = Curve(tmp_path / "bench", lam_start=4.0, se=1e-12)
    tight = params.model_copy(update={"merge_steps": 2, "max_trainings": 0})
    steps, stopped = go("merge", bench, tight, tmp_path / "s", lam_pool=1.0)
    assert len(bench.merged) == len(steps) - 1 == 2
    assert stopped == "budget of 2 merges is spent"


def test_a_slack_pool_begins_at_the_helpful_policy(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "bench", lam_start=0.05, bias=-1.0)
    go("merge", bench, params, tmp_path / "s", lam_pool=0.0)
    assert bench.merged[0] == 0.0


def test_a_naive_merge_keeps_its_own_books(params: DualSearchParams, tmp_path: Path) -> None:
    """Its weight of the pool's multiplier is lam / (lam + lam_start), and no weight reaches 1."""
    bench = Curve(tmp_path / "bench", lam_start=3.0)
    steps, stopped = go("merge", bench, params, tmp_path / "s", lam_pool=1.0, naive=True)
    assert bench.merged[0] == pytest.approx(0.25)
    assert steps[1].lam == pytest.approx(1.0)
    assert all(s.lam == pytest.approx(s.q * 3.0 / (1 - s.q)) for s in steps[1:] if s.q is not None)
    assert stopped == "cost within noise of the limit"
    short = Curve(tmp_path / "short", lam_start=0.5)  # even its start is above the limit
    steps, stopped = go("merge", short, params, tmp_path / "t", lam_pool=5.0, naive=True)
    assert max(short.merged) < 1 and stopped == "rule merge is finished"


@pytest.mark.parametrize("bias", [0.0, 0.15])
def test_screening_saves_measurements(
    bias: float, params: DualSearchParams, tmp_path: Path
) -> None:
    """The pool's multiplier is far off; without screening the secant finds the weight by
    measuring.
    """
    exact = params.model_copy(update={"z": 0.5})
    blind, seeing = (
        Curve(tmp_path / f"{ess}", lam_start=4.0, bias=bias, ess=ess) for ess in (0.0, 1000.0)
    )
    steps, _ = go("merge", blind, exact, tmp_path / "a", lam_pool=0.4)
    fewer, stopped = go("merge", seeing, exact, tmp_path / "b", lam_pool=0.4)
    assert stopped == "cost within noise of the limit"
    assert len(seeing.measured) == 2 < len(blind.measured) and spent(fewer) < spent(steps)
    assert fewer[1].q == fewer[1].screened[-1].q
    result = rules.summary(
        by_rule("merge"), fewer, stopped, exact, SearchContext(0.4, 4.0), before=2
    )
    assert [seen["q"] for seen in result["screened"]] == seeing.screened
    assert (
        result["screened"][0].keys() == {"q", "cost", "cost_se", "ess"}
        and result["screened"][0]["q"] == 1.0
    )


def test_a_weight_that_few_samples_speak_for_is_measured_unscreened(
    params: DualSearchParams, tmp_path: Path
) -> None:
    blind, doubting = (Curve(tmp_path / f"{ess}", lam_start=3.0, ess=ess) for ess in (0.0, 60.0))
    plain, _ = go("merge", blind, params, tmp_path / "a", lam_pool=1.2)
    steps, _ = go("merge", doubting, params, tmp_path / "b", lam_pool=1.2)
    assert [s.q for s in steps] == [s.q for s in plain]
    assert all(seen.ess < params.min_ess for s in steps for seen in s.screened)


def test_screening_stops_where_the_samples_end(params: DualSearchParams, tmp_path: Path) -> None:
    """ESS falls with the weight: 100 is at q = 0.5, the root at 0.70; the secant's guess beyond it
    is measured.
    """
    bench = Curve(tmp_path / "b", lam_start=2.0, ess=100.0)
    steps, stopped = go("merge", bench, params, tmp_path / "s", lam_pool=0.4)
    assert bench.screened[:2] == [1.0, pytest.approx(0.2)]
    trusted = [seen for seen in steps[1].screened if seen.ess >= params.min_ess]
    assert (
        trusted
        and steps[1].q == steps[1].screened[-1].q
        and steps[1].screened[-1].ess < params.min_ess
    )
    assert stopped == "cost within noise of the limit"


def test_labels_are_not_screened(params: DualSearchParams, tmp_path: Path) -> None:
    bench = Curve(tmp_path / "b", lam_start=3.0, ess=1000.0)
    (tmp_path / "s").mkdir()
    plan = Plan("row", replace(METHODS["p_sacpo"], cost="feedback"), "start", "reference")
    rules.run(plan, bench.start, SearchContext(1.2, 3.0), params, bench, tmp_path / "s")
    assert bench.merged and not bench.screened


def test_a_merge_between_two_multipliers_keeps_its_books(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "b", lam_start=3.0)
    (tmp_path / "s").mkdir()
    known = SearchContext(1.2, 3.0, lam_reference=0.3)
    steps, _ = rules.run(by_rule("merge"), bench.start, known, params, bench, tmp_path / "s")
    assert steps[1].q == pytest.approx(1 / 3) and steps[1].lam == pytest.approx(1.2)


# --- what is made after the search ----------------------------------------------------------------

ITERATIVE = ["dual_gradient", "projected_subgradient", "newton"]


@pytest.mark.parametrize("rule", ITERATIVE)
def test_a_mixture_is_of_all_steps_and_measured_itself(
    rule: str, bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    steps, stopped = go(rule, bench, params, tmp_path / "s", returns="mixture")
    plain, reason = go(rule, Curve(tmp_path / "plain", 0.6), params, tmp_path / "t")
    assert [s.lam for s in steps[:-1]] == [s.lam for s in plain] and stopped == reason
    assert bench.mixed == [[s.lam for s in plain]]
    last = steps[-1]
    assert last.closing and not last.trained and not any(s.closing for s in steps[:-1])
    assert last.lam == pytest.approx(np.mean([s.lam for s in plain]))
    assert bench.measured[-1] == last.step == len(plain)
    assert rules.choose(by_rule(rule, "mixture"), steps, params) == last.step


@pytest.mark.parametrize("rule", ITERATIVE)
def test_the_tail_average_is_trained_once_more(
    rule: str, bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    steps, _ = go(rule, bench, params, tmp_path / "s", returns="tail_average")
    before, last = steps[:-1], steps[-1]
    assert last.closing and last.trained
    assert last.lam == pytest.approx(np.mean([s.lam for s in before[len(before) // 2 :]]))
    assert bench.trained[-1] == (last.step, last.lam, before[-1].policy)
    result = rules.summary(
        by_rule(rule, "tail_average"), steps, "because", params, SearchContext(0.6, 0.6), before=1
    )
    assert result["trainings"] == 1 + len(before) and result["chosen"] == last.step


@pytest.mark.parametrize("budget", [0, 1])
def test_a_tail_of_one_step_is_that_step(
    budget: int, bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    tight = params.model_copy(update={"max_trainings": budget})
    steps, _ = go("dual_gradient", bench, tight, tmp_path / "s", returns="tail_average")
    assert len(bench.trained) == budget == len(steps) - 1 and not steps[-1].closing


# --- going on after an interruption ---------------------------------------------------------------


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


# --- what is returned -----------------------------------------------------------------------------

STEPS = [
    step(0, 0.5, cost=0.1, reward=2.0),
    step(1, 1.0, cost=-0.295, reward=1.5),  # above the limit by half a standard error
    step(2, 2.0, cost=-0.6, reward=1.0),
    step(3, 1.5, cost=-0.4, reward=1.2),
]


def test_the_best_is_the_most_rewarding_within_the_limit(params: DualSearchParams) -> None:
    assert rules.choose(by_rule("newton", "best"), STEPS, params) == 1
    assert rules.choose(by_rule("newton", "best"), STEPS, params.model_copy(update={"z": 0.0})) == 3


def test_without_a_policy_within_the_limit_the_least_costly_is_returned(
    params: DualSearchParams,
) -> None:
    strict = params.model_copy(update={"limit": -5.0})
    assert rules.choose(by_rule("newton", "best"), STEPS, strict) == 2
    assert not rules.feasible(STEPS[2], strict)


def test_the_last_is_the_last_whatever_it_costs(params: DualSearchParams) -> None:
    assert rules.choose(by_rule("one_shot", "last"), STEPS[:1], params) == 0
    assert rules.choose(by_rule("one_shot", "last"), STEPS, params) == 3


@pytest.mark.parametrize(
    ("cost", "within"), [(-0.31, True), (-0.3, True), (-0.29, True), (-0.2899, False)]
)
def test_feasible_allows_z_standard_errors(
    params: DualSearchParams, cost: float, within: bool
) -> None:
    exact = replace(STEPS[0], measured=replace(STEPS[0].measured, cost=cost, cost_se=0.01 + 1e-12))
    assert rules.feasible(exact, params) == within


def test_summary_counts_trainings_and_tokens(params: DualSearchParams) -> None:
    result = rules.summary(
        by_rule("newton"), STEPS, "because", params, SearchContext(0.6, 0.5), before=2
    )
    assert result["trainings"] == 2 + 3
    assert result["generated_tokens"] == 400
    assert (result["chosen"], result["feasible"], result["stopped"]) == (1, True, "because")
    assert result["steps"][2]["lam"] == 2.0 and result["steps"][2]["cost"] == -0.6
    assert "policy" not in result["steps"][0]  # folders of scratch mean nothing to a reader


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_the_table_is_tested_here(rule: str) -> None:
    assert {method.rule for method in METHODS.values()} <= set(RULES)
    assert callable(rules._RULES[rule])


def test_steps_on_disk_are_what_was_returned(
    bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    steps, _ = go("dual_gradient", bench, params, tmp_path / "s")
    rows: list[dict[str, Any]] = read_json(tmp_path / "s" / "steps.json")
    assert [(row["lam"], row["measured"]["cost"]) for row in rows] == [
        (s.lam, s.measured.cost) for s in steps
    ]


def test_the_slater_radius_and_its_source_are_on_record(params: DualSearchParams) -> None:
    for given, source in (("pool", "pool"), (2.0, "params")):
        chosen = params.model_copy(update={"slater_radius": given})
        result = rules.summary(
            by_rule("projected_subgradient"),
            STEPS,
            "b",
            chosen,
            SearchContext(0.6, 0.5, 2.0),
            before=2,
        )
        assert (result["slater_radius"], result["slater_from"]) == (2.0, source)
    assert "slater_radius" not in rules.summary(
        by_rule("grid"), STEPS, "b", params, SearchContext(0.6, 0.5), before=2
    )


@pytest.mark.parametrize(("retrain", "count"), [(True, 2 + 2 * 3), (False, 2 + 3)])
def test_a_round_counts_its_comparisons_and_both_its_trainings(
    retrain: bool, count: int, params: DualSearchParams
) -> None:
    online = OnlineParams(
        labels="models",
        folder="f",
        retrain_reward=retrain,
        ridge=1.0,
        reward_scale=0.1,
        cost_scale=0.1,
        dimension=None,
    )
    asked = [
        replace(s, measured=replace(s.measured, comparisons=30 if s.trained else 0)) for s in STEPS
    ]
    plan = Plan("row", METHODS["o_pd_dpo"], "start", "reference")
    given = params.model_copy(update={"online": online})
    result = rules.summary(plan, asked, "b", given, SearchContext(0.6, 0.5, 2.0), before=2)
    assert (result["comparisons"], result["trainings"]) == (90, count)
    offline = rules.summary(
        by_rule("projected_subgradient"), asked, "b", params, SearchContext(0.6, 0.5, 2.0), 2
    )
    assert offline["trainings"] == 5


# --- additional constraints -----------------------------------------------------------------------


class Tilts(Curve):
    """A bench of exact tilts of enumerated answers whose trainings spend only `reach` of every
    multiplier.

    The quantities are the cost and 1 where it is above 0; a policy is a folder with both
    multipliers."""

    def __init__(
        self, folder: Path, limit: float, prices: tuple[float, ...], lam_start: float, reach: float
    ) -> None:
        rng = np.random.default_rng(3)
        self.reward, self.cost = (
            rng.normal(size=(40, 60)),
            rng.normal(-0.4, 1.0, size=(40, 60)) + 0.3,
        )
        self.reward += 0.6 * self.cost
        self.limit, self.asked = limit, [(lam_start, *prices)]
        super().__init__(folder, lam_start=lam_start, se=0.004, reach=reach)

    def train(
        self, step: int, lam: float, warm: Step, prices: Sequence[float] | None = None
    ) -> str:
        assert prices is not None
        self.asked.append((lam, *prices))
        return super().train(step, lam, warm)

    def measure(self, step: int, policy: str) -> Measurement:
        lam, price = (self.reach * value for value in self.asked[step])
        unsafe = (self.cost > 0).astype(float)
        logit = (self.reward - lam * self.cost - price * unsafe) / BETA
        weight = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
        mean_c, mean_u = (weight * self.cost).sum(1), (weight * unsafe).sum(1)
        columns = [self.cost - mean_c[:, None], unsafe - mean_u[:, None]]
        covariance = tuple(
            tuple(float((weight * a * b).sum(1).mean()) for b in columns) for a in columns
        )
        reward, cost = float((weight * self.reward).sum(1).mean()), float(mean_c.mean())
        additional = (ConstraintEstimate("rare", self.limit, 1.0, float(mean_u.mean()), self.se),)
        return Measurement(
            cost,
            self.se,
            reward,
            0.01,
            0.2,
            float(mean_u.mean()),
            covariance[0][0],
            100,
            additional=additional,
            covariance=covariance,
        )


def jointly(
    bench: Tilts, params: DualSearchParams, scratch: Path, limit: float
) -> tuple[list[Step], str]:
    scratch.mkdir()
    known = SearchContext(bench.lam_start, bench.lam_start, prices=bench.asked[0][1:])
    return rules.run(
        by_rule("newton"),
        bench.start,
        known,
        params.model_copy(update={"limit": limit}),
        bench,
        scratch,
    )


def test_newton_moves_all_multipliers_until_all_limits_are_met(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Tilts(tmp_path / "bench", 0.2, (0.6,), lam_start=0.4, reach=0.7)
    steps, stopped = jointly(bench, params, tmp_path / "s", -0.3)
    assert stopped == "all limits are met within noise, or kept at price 0"
    last = steps[-1]
    assert (last.lam, *last.prices) == bench.asked[-1] and len(steps) <= 5
    (rare,) = last.measured.additional
    assert rare.mean is not None
    for price, excess in ((last.lam, last.measured.cost + 0.3), (last.prices[0], rare.mean - 0.2)):
        assert abs(excess) <= 0.004 or (price == 0 and excess < 0)
    assert not all(
        abs(e) <= 0.004 for e in (steps[0].measured.cost + 0.3, steps[0].measured.p_unsafe - 0.2)
    )


def test_p_unsafe_as_the_only_limit_moves_its_price_and_leaves_lambda_at_0(
    params: DualSearchParams, tmp_path: Path
) -> None:
    """One training and one correction take P(unsafe) from twice its noise above the limit to the
    limit.
    """
    bench = Tilts(tmp_path / "bench", 0.2, (1.5,), lam_start=0.0, reach=0.8)
    steps, stopped = jointly(bench, params, tmp_path / "s", 100.0)
    assert stopped == "all limits are met within noise, or kept at price 0"
    assert {step.lam for step in steps} == {0.0} and steps[1].prices > steps[0].prices
    assert abs(steps[-1].measured.p_unsafe - 0.2) <= 0.004 < steps[0].measured.p_unsafe - 0.2
    found = rules.summary(
        by_rule("newton"),
        steps,
        stopped,
        params.model_copy(update={"limit": 100.0}),
        SearchContext(0.0, 0.0),
        1,
    )
    assert found["chosen"] == len(steps) - 1 and found["feasible"]
    assert (
        found["steps"][-1]["prices"] == list(steps[-1].prices)
        and "covariance" not in found["steps"][-1]
    )


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
    resumed, _ = rules.run(by_rule("newton"), again.start, known, update, again, tmp_path / "t")
    assert [replace(s, policy="") for s in resumed] == [replace(s, policy="") for s in whole]


def limited(number: int, cost: float, reward: float, mean: float | None) -> Step:
    additional = (ConstraintEstimate("rare", 0.2, 1.0, mean, 0.01),)
    return replace(
        step(number, 1.0, cost), measured=replace(measured(cost, reward), additional=additional)
    )


def test_the_best_keeps_additional_constraints_too(params: DualSearchParams) -> None:
    """Up to z standard errors; where none keeps all, the one that is nearest in them."""
    plan = by_rule("newton")
    steps = [limited(0, -0.5, 3.0, 0.3), limited(1, -0.5, 1.0, 0.209), limited(2, -0.1, 2.0, 0.1)]
    assert rules.choose(plan, steps, params) == 1
    assert [rules.feasible(s, params) for s in steps] == [False, True, False]
    assert (
        rules.choose(plan, [limited(0, -0.9, 3.0, 0.3), limited(1, -0.27, 1.0, 0.24)], params) == 1
    )
    assert rules.feasible(limited(0, -0.5, 1.0, None), params), "nothing is known of it"


@pytest.mark.parametrize("naive", [True, False])
def test_a_merge_tells_whether_it_is_naive(naive: bool, params: DualSearchParams) -> None:
    """A naive merge has another KL weight, so that the predicted frontier is not about it."""
    steps = [step(0, 1.0, 0.0), step(1, 0.5, -0.3, q=0.5)]
    found = rules.summary(
        by_rule("merge"), steps, "", params, SearchContext(0.6, 1.0, naive=naive), 2
    )
    assert found["naive"] is naive
    assert "naive" not in rules.summary(
        by_rule("newton"), steps, "", params, SearchContext(0.6, 1.0), 2
    )


def test_labels_are_counted(params: DualSearchParams) -> None:
    labelled = [
        replace(s, measured=replace(s.measured, labels=40, model_cost=0.1, model_cost_se=0.2))
        for s in STEPS
    ]
    result = rules.summary(
        by_rule("newton"), labelled, "b", params, SearchContext(0.6, 0.5), before=1
    )
    assert result["labels"] == 160 and result["steps"][0]["model_cost"] == 0.1

"""A backend on policies whose cost is a known function of lambda, and what rule tests share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dualign.core.records import HistoryRow
from dualign.evaluation.effective_tilt import Tilt
from dualign.evaluation.stats import ConstraintEstimate, Measurement
from dualign.methods import METHODS, Plan
from dualign.params.search import DualSearchParams
from dualign.search.journal import Step
from dualign.search.loop import Ascent, run
from dualign.search.policy import Search, SearchContext
from dualign.search.screening import PoolCost, Screening

ROOT = Path(__file__).resolve().parents[2]
BETA, LIMIT = 1.5, -0.3


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


ROOT_LAM = math.log(0.8 / 0.3) / 0.7  # where the curve meets the limit: 1.4012
HISTORY = [HistoryRow(step=10, lam=1.1, cost=0.2, reward=0.5, kl=0.1)]


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
        self.asked_pool: list[str] = []
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
        return Screening(q, self._seen(q * self.lam_start))

    def on_pool(self, policy: str) -> PoolCost:
        """As `screen` of the weight that the policy stands for."""
        self.asked_pool.append(policy)
        return self._seen(self.reach * float((Path(policy) / "lam").read_text()))

    def _seen(self, lam: float) -> PoolCost:
        q = lam / self.lam_start if self.lam_start else 1.0
        return PoolCost(self._cost(lam) - self.bias, 0.02, self.ess * (1.5 - q))

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


class Swings(Curve):
    """Trainings go on from the policy before, so each answers to 1.5 times what it is told: Newton
    goes too far.
    """

    def train(
        self, step: int, lam: float, warm: Step, prices: Sequence[float] | None = None
    ) -> str:
        return super().train(step, 1.5 * lam, warm)


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
        products = np.array([weight * a * b for a in columns for b in columns])
        entries = products.sum(2).mean(1).tolist()
        covariance = (tuple(entries[:2]), tuple(entries[2:]))
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


def go(
    rule: str,
    bench: Curve,
    params: DualSearchParams,
    scratch: Path,
    returns: str | None = None,
    **known: Any,
) -> tuple[list[Step], str]:
    """A search by a rule on a curve, from the multiplier of its start."""
    scratch.mkdir(exist_ok=True)
    context = SearchContext(
        **{"lam_pool": 0.6, "lam_start": bench.lam_start, "radius": 5.0} | known
    )
    return run(Search(by_rule(rule, returns), params, context), bench.start, bench, scratch)


def jointly(
    bench: Tilts, params: DualSearchParams, scratch: Path, limit: float
) -> tuple[list[Step], str]:
    scratch.mkdir()
    known = SearchContext(bench.lam_start, bench.lam_start, prices=bench.asked[0][1:])
    return run(
        Search(by_rule("newton"), params.model_copy(update={"limit": limit}), known),
        bench.start,
        bench,
        scratch,
    )


def spent(steps: Sequence[Step]) -> int:
    return sum(s.measured.generated_tokens for s in steps)

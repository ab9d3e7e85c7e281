"""Every policy in the plane of cost and reward, by the models and, in the world, by the truth."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from dualign.core.records import (
    Evaluated,
    FrontierRow,
    Interval,
    Optimum,
    read_evaluated,
    read_optional_record,
)
from dualign.report.charts.frontier import Knot, Point, frontier
from dualign.report.diagnosis import Predicted
from dualign.report.formatting import number, spoken
from dualign.report.sections.base import FinishedRun, Row, Section, ShownPolicy

#: Width and height of a chart: one of two beside each other, alone, and on a narrow screen.
_HALF = (548, 430)
_FULL = (960, 440)
_NARROW = (340, 360)
#: With more policies than this the charts show row numbers instead of names.
MAX_LABELLED_POINTS = 14
#: Median effective samples from which bands cover the truth as often as they say
#: (bench/results/frontier-coverage.md).
ENOUGH_SAMPLES = 30


def section(run: FinishedRun) -> Section | None:
    """None where there is neither a policy nor a prediction."""
    world = _world(run)
    points = _points(run, "cost", "reward")
    knots = [_knot(row) for row in run.curve]
    figures: list[Row] = []
    if points or knots:
        labels = ("expected cost (cost model)", "expected reward (reward model)")
        drawn = _drawings(points, knots, run.limit_shown, labels, _HALF if world else _FULL)
        figures.append({"kind": "measured", **drawn})
    if world:
        labels = ("expected true cost", "expected true reward")
        points = [_optimum(world[0]), *_points(run, "true_cost", "true_reward")]
        knots = [_knot(row) for row in world[1]]
        drawn = _drawings(points, knots, run.limit_shown, labels, _HALF if figures else _FULL)
        figures.append({"kind": "exact", **drawn})
    if not figures:
        return None
    crowded = len(run.rows) > MAX_LABELLED_POINTS
    few = run.dual is not None and (run.dual.ess_median or 0.0) < ENOUGH_SAMPLES
    values = {"frontiers": figures, "world": world is not None, "crowded": crowded, "few": few}
    return Section("frontier", "Frontier", values)


def _world(run: FinishedRun) -> tuple[Optimum, list[FrontierRow]] | None:
    """The exact optimum and frontier of the world, by the first policy evaluated there."""
    for row in run.rows:
        evaluated = read_evaluated(run.root / "reports/metrics", row.name)
        if isinstance(evaluated, Evaluated) and evaluated.optimum is not None:
            path = run.root / "reports/evaluation" / row.name / "frontier.json"
            return evaluated.optimum, read_optional_record(path, list[FrontierRow]) or []
    return None


def _drawings(
    points: Sequence[Point],
    curve: Sequence[Knot],
    limit: float | None,
    labels: tuple[str, str],
    wide: tuple[int, int],
) -> dict[str, Markup]:
    """One chart for wide screens and one, with numbers for names, for narrow screens."""
    curve = sorted(curve, key=lambda knot: knot.lam)
    name = f"{labels[1]} against {labels[0]} of every policy"
    crowded = sum(point.number > 0 for point in points) > MAX_LABELLED_POINTS
    return {
        "wide": frontier(points, curve, limit, wide, labels, name, crowded),
        "narrow": frontier(points, curve, limit, _NARROW, labels, name, numbered=True),
    }


def _points(run: FinishedRun, cost: str, reward: str) -> list[Point]:
    """The policies by two measures; predictions are of the models' scores."""
    measured = [(row, getattr(row, cost), getattr(row, reward)) for row in run.rows]
    return [
        _point(row, x, y, row.predicted if cost == "cost" else None)
        for row, x, y in measured
        if x and y
    ]


def _point(row: ShownPolicy, cost: Interval, reward: Interval, foreseen: Predicted | None) -> Point:
    title = f"{row.name}: cost {spoken(cost)}, reward {spoken(reward)}"
    place = None
    if foreseen is not None:
        place = (foreseen.cost.mean, foreseen.reward.mean)
        scores = f"cost {number(place[0])}, reward {number(place[1])}"
        title += f"; predicted at λ {number(row.lam)}: {scores}"
    return Point(
        x=cost,
        y=reward,
        title=title,
        label=row.name,
        number=row.mark.number or 0,
        style=row.mark.style,
        predicted=place,
    )


def _knot(row: FrontierRow) -> Knot:
    extras = [("P(unsafe)", row.p_unsafe), ("KL", row.kl), ("effective samples", row.ess)]
    details = [f"{name} {number(value)}" for name, value in extras if value is not None]
    title = f"λ {number(row.lam)}: cost {number(row.cost)}, reward {number(row.reward)}"
    return Knot(
        x=Interval(mean=row.cost, low=row.cost_low, high=row.cost_high),
        y=Interval(mean=row.reward, low=row.reward_low, high=row.reward_high),
        title=", ".join([title, *details]),
        lam=row.lam,
    )


def _optimum(optimum: Optimum) -> Point:
    title = (
        f"exact optimum: λ {number(optimum.lam)}, cost {number(optimum.cost)}, "
        f"reward {number(optimum.reward)}, KL {number(optimum.kl)}"
    )
    return Point(
        x=Interval(mean=optimum.cost, low=None, high=None),
        y=Interval(mean=optimum.reward, low=None, high=None),
        title=title,
        label="optimum",
        number=0,
        style="star",
    )

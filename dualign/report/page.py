"""The report page: reads what the stages wrote, draws the charts, renders `template.html` into one
file.

The page needs no network and no script; everything that comes from data or models is escaped. What
a run did not write (no embedded world, a policy without a search, a stage that did not run) is left
out of the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dualign.core.artifacts import listed, read_optional_json, replacing
from dualign.core.records import (
    Betas,
    Frontier,
    FrontierRow,
    PreparedMetrics,
    Provenance,
    SearchResult,
    SolvedDual,
    read_evaluated,
    read_optional_record,
    read_record,
)
from dualign.params.evaluate import ReportParams
from dualign.params.stages import STAGES
from dualign.report import charts
from dualign.report.charts import Knot, Point, Range
from dualign.report.comparison import REFERENCE, compare, read_answers
from dualign.report.curves import trajectory
from dualign.report.diagnosis import (
    additional_by_step,
    additional_constraints,
    cut_in_words,
    is_tilt,
    other_betas,
    predicted,
    prompts_gain,
    required_in_words,
    tilt_in_words,
)
from dualign.report.formatting import (
    MINUS,
    NONE,
    compact,
    duration,
    memory,
    number,
    percent,
    precise,
    spoken,
    visible,
)

Row = dict[str, Any]

#: Width and height of a frontier chart: one of two beside each other, alone, and on a narrow
#: screen.
_HALF, _FULL, _NARROW = (548, 430), (960, 440), (340, 360)
#: With more policies than this the charts show row numbers instead of names.
MAX_LABELLED_POINTS = 14
#: Stages whose metrics the page prints as they are, under these headings.
_MODELS = {
    "sft": "Reference policy",
    "reward_model": "Reward model",
    "cost_model": "Cost model",
    "score": "Scores",
}
#: Metrics whose key is not how one would say it.
_WORDS = {
    "brier": "Brier score",
    "brier_after": "Brier score after calibration",
    "brier_before": "Brier score before calibration",
    "ece": "ECE",
    "ece_before": "ECE before calibration",
    "ece_after": "ECE after calibration",
    "offset": "shift of the zero",
    "p_unsafe": "P(unsafe)",
    "reward_within_sd": "reward, sd within a prompt",
    "cost_within_sd": "cost, sd within a prompt",
    "zero_error": "standard error of the zero",
}
#: Metrics that the table of calibrations shows.
_CALIBRATED = ("ece_before", "ece_after", "brier_before", "brier_after", "platt", "isotonic")
#: Rates that read best in per cent.
_SHARES = ("accuracy", "share", "ended", "unsafe")


def write(root: Path, params: ReportParams, out: Path) -> None:
    """Write the page.

    Args:
        root: the repository root, which holds reports/ and data/.
        params: the `report` section.
        out: the HTML file to write; replaced whole.

    Raises:
        DualignError: an input is there but cannot be read, or `out` cannot be written.
    """
    html = _environment().get_template("template.html").render(_context(root, params))
    with replacing(out) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    environment.filters["number"] = number
    environment.globals |= {
        "number": number,
        "precise": precise,
        "percent": percent,
        "compact": compact,
        "duration": duration,
        "memory": memory,
        "is_tilt": is_tilt,
    }
    return environment


def _context(root: Path, params: ReportParams) -> dict[str, Any]:
    comparison = compare(root, params.policies, params.confidence, params.limit)
    rows = _ordered(comparison)
    frontier = read_optional_record(root / "data/dual/frontier.json", Frontier)
    curve: list[Any] = [*frontier["rows"]] if frontier else []
    betas = read_optional_record(root / "data/dual/betas.json", Betas)
    for row in rows:
        row["predicted"] = predicted(curve, row["lam"]) if row["on_curve"] else None
    dual: Any = read_optional_record(root / "data/dual/dual.json", SolvedDual) or {}
    world = _world(root, rows)
    near = _near(rows, dual, params.limit)
    _draw_strips(rows, near)
    searches = _searches(root, rows, params.limit, near)
    additional = additional_constraints(dual.get("prices", []), rows)
    return {
        "params": params,
        "rows": rows,
        "best": next((row for row in rows if row["recommended"]), None),
        "nearest": next((row for row in rows if row["name"] == comparison["nearest"]), None),
        "reference": next((row for row in rows if row["name"] == REFERENCE), None),
        "cut": cut_in_words(rows),
        "missing": comparison["missing"],
        "uncertified": comparison["uncertified"],
        "certificates": [
            _certificate(name, metrics, dual)
            for name, metrics in comparison["certificates"].items()
        ],
        "dual": dual,
        "world": world,
        "frontiers": _frontiers(curve, rows, near, world),
        "limit_shown": near is not None,
        "betas": other_betas(betas) if betas else [],
        "reached": [
            row for row in rows if row["predicted"] or (row["tilt"] and row["kind"] != "reference")
        ],
        "additional": additional,
        "crowded": len(rows) > MAX_LABELLED_POINTS,
        "searches": searches,
        "prompts": _prompts(read_answers(root, params.policies), rows, params.sample_prompts),
        "prepared": _prepared(root),
        "quarantine": _quarantine(root),
        "models": _models(root),
        "provenance": _provenance(root),
    }


# --- policies -------------------------------------------------------------------------------------


def _ordered(comparison: dict[str, Any]) -> list[Row]:
    """Rows as the table shows them: methods first, those within the limit and the most helpful
    ahead; numbered.
    """
    rows = [{"name": name, **row} for name, row in comparison["policies"].items()]
    standings = ("within", "unproven", "over", None)
    kinds = ("method", "reference", "baseline")
    rows.sort(
        key=lambda row: (
            kinds.index(row["kind"]),
            not row["certified"],
            standings.index(row["standing"]),
            -_mean(row["reward"]),
        )
    )
    for i, row in enumerate(rows, 1):
        row |= {"number": i, "recommended": row["name"] == comparison["recommended"]}
        row["style"] = _style(row)
        row["how"] = _how(row)
    return rows


def _near(rows: list[Row], dual: Row, limit: float) -> float | None:
    """The limit on cost if the charts can show it beside all costs there are; None for one that is
    far off.
    """
    costs = [
        dual.get("cost_reference"),
        dual.get("cost_unconstrained"),
        dual.get("reachable_minimum"),
    ]
    return charts.near(
        limit, [*costs, *(value for row in rows if row["cost"] for value in row["cost"].values())]
    )


def _draw_strips(rows: list[Row], limit: float | None) -> None:
    """Add to every row its cost interval as a picture; all on one scale."""
    extent = charts.domain(
        [limit, *(value for row in rows if row["cost"] for value in row["cost"].values())]
    )
    for row in rows:
        row["strip"] = (
            charts.strip(_range(row["cost"]), limit, extent, row["style"]) if row["cost"] else ""
        )


def _how(row: Row) -> str:
    """How a search went about it: the method where the row's name does not say it, the rule, and
    what is unusual.
    """
    if not row.get("rule"):
        return ""
    parts = [row["rule"].replace("_", " ")]
    if row.get("returns") in ("mixture", "tail_average"):
        parts.append(row["returns"].replace("_", " "))
    if row.get("cost_source") == "feedback":
        parts.append("by labels")
    own = row.get("title") and Path(row["folder"]).name != row["method"]
    return (f"{row['title']}: " if own else "") + ", ".join(parts)


def _mean(interval: dict[str, float] | None) -> float:
    return interval["mean"] if interval else float("-inf")


def _style(row: Row) -> str:
    parts = [
        row["kind"],
        "within" if row["certified"] else row["standing"] or "unknown",
        "recommended" if row["recommended"] else "",
    ]
    return " ".join(part for part in parts if part)


def _range(interval: dict[str, float | None]) -> Range:
    mean = interval["mean"]
    assert mean is not None, "an interval without a mean is None"
    return Range(mean, interval["low"], interval["high"])


def _points(rows: Iterable[Row], cost: str, reward: str) -> list[Point]:
    return [
        Point(
            label=row["name"],
            number=row["number"],
            x=_range(row[cost]),
            y=_range(row[reward]),
            style=row["style"],
            title=(
                f"{row['name']}: cost {spoken(row[cost])}, reward"
                f" {spoken(row[reward])}{_foreseen(row, cost)}"
            ),
            predicted=_place(row["predicted"]) if cost == "cost" else None,
        )
        for row in rows
        if row[cost] and row[reward]
    ]


def _place(expected: Row | None) -> tuple[float, float] | None:
    return None if expected is None else (expected["cost"]["mean"], expected["reward"]["mean"])


def _foreseen(row: Row, cost: str) -> str:
    """What was predicted at a policy's multiplier, for its tooltip; predictions are of the models'
    scores.
    """
    if row["predicted"] is None or cost != "cost":
        return ""
    means = (number(value) for value in (row["lam"], *(_place(row["predicted"]) or ())))
    return "; predicted at λ {}: cost {}, reward {}".format(*means)


# --- certificates ---------------------------------------------------------------------------------


def _certificate(name: str, metrics: Row, dual: Row) -> Row:
    """A certificate as its card shows it: the tests in order, what was not tested, and what more
    prompts would buy.
    """
    tests = metrics["tests"]
    last = next((test for test in tests if test["candidate"] == metrics["returned"]), tests[0])
    untested = metrics["candidates"][len(tests) :]
    required = [{**one, **required_in_words(one)} for one in metrics["requirements"]]
    failed = [one for one, check in zip(required, last["checks"], strict=True) if not check["kept"]]
    return {
        "name": name,
        **metrics,
        "requirements": required,
        "last": last,
        "failed": failed,
        "untested": untested,
        "gain": prompts_gain(last, metrics["requirements"], dual),
    }


# --- frontier -------------------------------------------------------------------------------------


def _world(root: Path, rows: list[Row]) -> dict[str, Any] | None:
    """The exact optimum and frontier of the embedded world, as the first policy that was evaluated
    there has them.
    """
    for row in rows:
        metrics: Any = read_evaluated(root / "reports/metrics", row["name"])
        if metrics.get("optimum"):
            frontier = root / "reports/evaluation" / row["name"] / "frontier.json"
            return {
                "optimum": metrics["optimum"],
                "frontier": read_optional_record(frontier, list[FrontierRow]) or [],
            }
    return None


def _frontiers(
    curve: list[Row], rows: list[Row], limit: float | None, world: dict[str, Any] | None
) -> list[Row]:
    """The charts to show: measured by the models, and (in the embedded world) by the truth."""
    measured = _points(rows, "cost", "reward")
    knots = [_knot(row) for row in curve]
    figures = []
    if measured or knots:
        labels = ("expected cost (cost model)", "expected reward (reward model)")
        wide = _HALF if world else _FULL
        figures.append({"kind": "measured"} | _drawings(measured, knots, limit, labels, None, wide))
    if world:
        exact = [_knot(row) for row in world["frontier"]]
        truths = ("expected true cost", "expected true reward")
        points, optimum = _points(rows, "true_cost", "true_reward"), _optimum(world["optimum"])
        wide = _HALF if figures else _FULL
        figures.append({"kind": "exact"} | _drawings(points, exact, limit, truths, optimum, wide))
    return figures


def _drawings(
    points: list[Point],
    curve: list[Knot],
    limit: float | None,
    labels: tuple[str, str],
    optimum: Point | None,
    wide: tuple[int, int],
) -> dict[str, Markup]:
    """One chart for wide screens and one, with numbers for names, for narrow screens."""
    curve = sorted(curve, key=lambda knot: knot.lam)
    name = f"{labels[1]} against {labels[0]} of every policy"
    crowded = len(points) > MAX_LABELLED_POINTS
    return {
        key: charts.frontier(
            points, curve, limit, size, labels, name=name, optimum=optimum, numbered=numbered
        )
        for key, size, numbered in (("wide", wide, crowded), ("narrow", _NARROW, True))
    }


def _knot(row: dict[str, Any]) -> Knot:
    """A row of frontier.json, or of the exact frontier, which has no intervals."""
    extras = [("P(unsafe)", "p_unsafe"), ("KL", "kl"), ("effective samples", "ess")]
    parts = [f"{name} {number(row[key])}" for name, key in extras if row.get(key) is not None]
    title = f"λ {number(row['lam'])}: cost {number(row['cost'])}, reward {number(row['reward'])}"
    return Knot(
        lam=row["lam"],
        x=Range(row["cost"], row.get("cost_low"), row.get("cost_high")),
        y=Range(row["reward"], row.get("reward_low"), row.get("reward_high")),
        title=", ".join([title, *parts]),
    )


def _optimum(optimum: dict[str, Any]) -> Point:
    title = (
        f"exact optimum: λ {number(optimum.get('lam'))}, cost {number(optimum['cost'])}, "
        f"reward {number(optimum['reward'])}, KL {number(optimum.get('kl'))}"
    )
    return Point("optimum", 0, Range(optimum["cost"]), Range(optimum["reward"]), "star", title)


# --- searches -------------------------------------------------------------------------------------


def _searches(root: Path, rows: list[Row], limit: float, near: float | None) -> list[Row]:
    """The searches of the evaluated methods in the order of the table, each with its chart; `near`
    as it shows it.
    """
    found = []
    for row in rows:
        path = root / "reports/search" / f"{Path(row['folder']).name}.json"
        if row["folder"].startswith("aligned/") and path.is_file():
            found.append(_search({"row": row, **read_record(path, SearchResult)}, limit))
    ends = (end for search in found for step in trajectory(search) for end in _step_ends(step))
    costs = charts.domain([near, *(search["target"] for search in found), *ends])
    for search in found:
        name = f"search of {search['row']['name']}: multiplier and cost by step"
        chosen = None if search.get("history") else search.get("chosen")
        search["chart"] = charts.trajectory(
            trajectory(search), near, costs, chosen, name, search["target"]
        )
    return found


def _search(search: Row, limit: float) -> Row:
    """A search with what its panel says: the target where that is not the limit, and each screened
    weight once.
    """
    returned: Row = next(
        (step for step in search["steps"] if step["step"] == search.get("chosen")), {}
    )
    screened = {seen["q"]: seen for seen in search.get("screened") or []}
    return search | {
        "heading": _heading(search),
        "returned": returned,
        "target": None if search.get("target") == limit else search.get("target"),
        "reached": tilt_in_words(returned.get("lam"), returned.get("tilt")),
        "screened": [screened[q] for q in sorted(screened)],
        "additional": additional_by_step(search["steps"]),
    }


def _heading(search: Row) -> str:
    """The method's title, with the row's name where that is not the method's own; the policy's name
    without a title.
    """
    if not search.get("title"):
        return str(search["row"]["name"])
    named = "" if search["name"] == search["method"] else f" ({search['name']})"
    return f"{search['title']}{named}"


def _step_ends(step: dict[str, Any]) -> list[float]:
    """The ends of a step's error bar; nothing where its cost is unknown."""
    cost, error = step.get("cost"), step.get("cost_se") or 0.0
    return [] if cost is None else [cost - error, cost + error]


# --- sample answers -------------------------------------------------------------------------------


def _prompts(answers: dict[str, pd.DataFrame], rows: list[Row], count: int) -> list[Row]:
    """Prompts that every policy answered, from the one that the reference answers most harmfully to
    the least.
    """
    named = [row for row in rows if row["name"] in answers and len(answers[row["name"]])]
    if not named or count == 0:
        return []
    first = {row["name"]: _first_answers(answers[row["name"]]) for row in named}
    common = set.intersection(*(set(frame.index) for frame in first.values()))
    guide = (
        answers[REFERENCE if REFERENCE in first else named[0]["name"]]
        .groupby("prompt_id")["cost"]
        .mean()
    )
    ranked = sorted(common, key=lambda identity: (-guide.fillna(0.0)[identity], identity))
    return [
        {
            "turns": first[named[0]["name"]].at[identity, "prompt"],
            "answers": [_answer(row, first[row["name"]].loc[identity]) for row in named],
        }
        for identity in _spread(ranked, count)
    ]


def _first_answers(frame: pd.DataFrame) -> pd.DataFrame:
    """The first answer to each prompt, by prompt_id."""
    return (
        frame.sort_values("sample", kind="stable")
        .drop_duplicates("prompt_id")
        .set_index("prompt_id")
    )


def _spread(items: list[str], count: int) -> list[str]:
    """At most `count` items, evenly spaced, with both ends."""
    if count >= len(items):
        return items
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def _answer(row: Row, answer: pd.Series) -> Row:
    """One answer as the page shows it. What is not known to be harmless is folded away."""
    scores = {key: _known(answer[key]) for key in ("reward", "cost", "true_cost")}
    harmful = scores["cost"] is None or scores["cost"] > 0 or (scores["true_cost"] or 0.0) > 0
    text = answer["response"] or ""
    return {
        "row": row,
        "text": text.strip(),
        "folded": harmful,
        "ended": bool(answer["ended"]),
        **scores,
    }


def _known(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


# --- facts ----------------------------------------------------------------------------------------


def _prepared(root: Path) -> list[tuple[str, int]]:
    """Rows of every prepared table, by name."""
    return [
        (path.stem, pq.read_metadata(path).num_rows)
        for path in listed(root / "data/prepared", "*.parquet")
    ]


def _quarantine(root: Path) -> list[tuple[str, int]]:
    """Rejected rows by reason, the most frequent first; the file that lists them holds the first
    ones only.
    """
    found = read_optional_record(root / "reports/metrics/prepare.json", PreparedMetrics)
    counts = Counter(found["rejected"] if found else {})
    return [(reason.replace("_", " "), count) for reason, count in counts.most_common()]


def _models(root: Path) -> list[Row]:
    """The metrics of the models that the run rests on, flattened and worded."""
    found = [
        (heading, read_optional_json(root / f"reports/metrics/{stage}.json"))
        for stage, heading in _MODELS.items()
    ]
    return [_model(heading, metrics) for heading, metrics in found if metrics]


def _model(heading: str, metrics: Row) -> Row:
    """A model's card; where calibrations were compared, their table takes the place of the numbers
    before and after.
    """
    kinds = _calibrations(metrics)
    shown = {key: value for key, value in metrics.items() if not kinds or key not in _CALIBRATED}
    return {"heading": heading, "facts": list(_facts(shown)), "calibrations": kinds}


def _calibrations(metrics: Row) -> list[Row]:
    """How well P(unsafe) fits held-out flags by each calibration, and which is served; empty where
    none was.
    """
    if not any(metrics.get(key) for key in ("platt", "isotonic")):
        return []
    after = [metrics.get(f"{key}_after") for key in ("ece", "brier")]
    before = {key: metrics.get(f"{key}_before") for key in ("ece", "brier")}
    kinds = {
        "none": before,
        "line (Platt)": metrics.get("platt"),
        "curve (isotonic)": metrics.get("isotonic"),
    }
    return [
        {
            "kind": kind,
            "sign_accuracy": None,
            **quality,
            "served": [quality["ece"], quality["brier"]] == after,
        }
        for kind, quality in kinds.items()
        if quality
    ]


def _facts(metrics: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Label and value of every number, nested ones with the labels of their parents in front;
    curves are left out.
    """
    for key, value in metrics.items():
        label = prefix + _WORDS.get(key, key.replace("_", " "))
        if isinstance(value, list):
            continue
        if isinstance(value, dict) and value.keys() == {"mean", "low", "high"}:
            yield label, spoken(value)
        elif isinstance(value, dict):
            yield from _facts(value, f"{label}, ")
        else:
            yield label, _fact(key, value)


def _fact(key: str, value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NONE}[value]
    if isinstance(value, float):
        share = any(word in key for word in _SHARES)
        return (f"{100 * value:.1f}%" if share else f"{value:,.3f}").replace("-", MINUS)
    return compact(value) if isinstance(value, int) else str(value)


def _provenance(root: Path) -> list[Row]:
    """What each stage took, in the order of the pipeline."""
    order = list(STAGES)
    written: list[Any] = [
        read_record(path, Provenance) for path in listed(root / "reports/provenance", "**/*.json")
    ]
    rows = [
        row for row in written if row["stage"] != "report"
    ]  # of an earlier run: this one's is not known yet
    for row in rows:
        row["rates"] = ", ".join(_rate(key, value) for key, value in row["throughput"].items())
    return sorted(rows, key=lambda row: (order.index(row["stage"]), row.get("item") or ""))


def _rate(key: str, value: float | None) -> str:
    return f"{compact(value)} {key.replace('_per_second', '/s').replace('_', ' ')}"

"""What Prefect shows beside a run: a card per stage, the plan before it, the graph and a summary
after it.

The functions here make markdown from DVC's records; `pipeline.prefect.flow` hands it to Prefect.
Cards keep a history by key, so the page of sft's card shows each result that sft ever had in this
workspace."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.dvc import records
from pipeline.dvc.dag import StageSpec
from pipeline.dvc.plan import StageStatus
from pipeline.prefect import drawing

#: The page that the report stage writes, and the frontier that the dual predicts.
REPORT = Path("reports/index.html")
FRONTIER = Path("data/dual/frontier.json")
#: Where stages write the losses of their trainings, as rows of step and loss.
CURVES = "reports/curves/"
#: What a card compares policies by: the headline rows of `dualign/evaluation/measures.py`.
COMPARED = (
    "reward.mean",
    "cost.mean",
    "p_unsafe.mean",
    "kl.mean",
    "length.mean",
    "win_reward.mean",
)
#: The key of such a number; a policy's name may have dots.
_OF_POLICY = re.compile(
    rf"policies\.(?P<name>.+)\.(?P<column>{'|'.join(map(re.escape, COMPARED))})"
)


@dataclass(frozen=True)
class Result:
    """How a stage ended: the name of its state, its message, and the seconds that it took."""

    state: str
    message: str
    seconds: float = 0.0


def key_of(stage: str, workspace: str) -> str:
    """The artifact key of a stage in a workspace; Prefect takes lower case letters, digits and
    dashes. A hash tells names apart that are alike in these.
    """
    name = f"{stage} {workspace}"
    digits = hashlib.sha256(name.encode()).hexdigest()[:6]
    return "-".join(["stage", *re.findall(r"[a-z0-9]+", name.lower()), digits])


def recorded_metrics(cache: Path, spec: StageSpec, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a run that dvc.lock describes, by dotted key, from DVC's cache; those not
    there are left out.
    """
    hashes = {out["path"]: out.get("md5", "") for out in entry.get("outs", [])}
    return _metrics(
        cache / hashes[path][:2] / hashes[path][2:] for path in spec.metrics if hashes.get(path)
    )


def current_metrics(root: Path, spec: StageSpec) -> dict[str, Any]:
    """The metrics of a stage as they lie in the workspace, by dotted key."""
    return _metrics(root / path for path in spec.metrics)


def _metrics(paths: Iterable[Path]) -> dict[str, Any]:
    contents = [content for path in paths if isinstance(content := _json(path), dict)]
    return {key: value for content in contents for key, value in flatten(content).items()}


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key; lists stay whole."""
    if not isinstance(content, dict):
        return {prefix: content}
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat.update(flatten(value, f"{prefix}.{name}" if prefix else str(name)))
    return flat


# --- a stage's card -------------------------------------------------------------------------------


def card(
    root: Path, spec: StageSpec, result: Result, before: Mapping[str, Any], after: Mapping[str, Any]
) -> str:
    """The card of a stage that ran or was restored.

    Args:
        root: of the workspace.
        spec: the stage.
        result: how it ended.
        before: its metrics of the run before, empty if there was none.
        after: its metrics now.
    """
    parts = [f"## {spec.name}: {result.message}"]
    parts += [
        drawing.image(drawing.chart(picture), picture.title)
        for picture in pictures(root, spec, after)
    ]
    parts.append(policies_table(before, after))
    parts.append(metrics_table(before, after))
    parts.append(outputs_table(records.read(root, [spec.name]).get(spec.name, {})))
    parts.append(f"By hand: `{spec.by_hand}`, or `dvc repro --single-item {spec.name}`")
    return "\n\n".join(part for part in parts if part)


def _table(titles: Sequence[str], alignment: str, rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown; empty without rows."""
    head, *lines = [f"| {' | '.join(row)} |" for row in (titles, *rows)]
    return "\n".join([head, alignment, *lines]) if lines else ""


def policies_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """A comparison's numbers that matter most, a row per policy, each with what has changed; the
    file has the rest.
    """
    found = [match for key in after if (match := _OF_POLICY.fullmatch(key))]
    names = dict.fromkeys(match["name"] for match in found)
    columns = {match["column"] for match in found}
    shown = [column for column in COMPARED if column in columns]
    rows = []
    for name in names:
        keys = [f"policies.{name}.{column}" for column in shown]
        rows.append([name, *(_cell(before.get(key), after.get(key)) for key in keys)])
    titles = [column.removesuffix(".mean") for column in shown]
    return _table(["policy", *titles], f"|---|{'---:|' * len(shown)}", rows)


def _cell(before: Any, now: Any) -> str:
    if not _is_number(now):
        return ""
    told = f" ({_change(before, now)})" if _is_number(before) and before != now else ""
    return f"{_number(now)}{told}"


def metrics_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Each number of the metrics and what it was before; interval ends, lists and policies are left
    to others.
    """
    left_out = (".low", ".high")
    keys = [
        key
        for key, value in after.items()
        if _is_number(value) and not key.endswith(left_out) and not key.startswith("policies.")
    ]
    rows = [
        (key.removesuffix(".mean"), _number(after[key]), _change(before.get(key), after[key]))
        for key in keys
    ]
    return _table(["metric", "value", "change"], "|---|---:|---:|", rows)


def outputs_table(entry: Mapping[str, Any]) -> str:
    """The outputs of dvc.lock with their sizes and hashes."""
    rows = []
    for out in entry.get("outs", []):
        digits = f"`{out.get('md5', '')[:12]}`"
        rows.append([out["path"], size(out.get("size", 0)), str(out.get("nfiles", 1)), digits])
    return _table(["output", "size", "files", "md5"], "|---|---:|---:|---|", rows)


def pictures(root: Path, spec: StageSpec, metrics: Mapping[str, Any]) -> list[drawing.Chart]:
    """The charts that a stage's files allow: its loss, and where it writes one, the frontier of
    reward and cost.
    """
    losses = [curve for out in spec.outs if out.startswith(CURVES) for curve in _losses(root / out)]
    charts = [drawing.Chart("training loss", "step", "loss", losses)] if losses else []
    outs = [*spec.outs, *spec.metrics]
    predicted = _frontier(root)
    if any(FRONTIER.is_relative_to(out) for out in outs) and predicted:
        limit = metrics.get("limit")
        charts.append(
            drawing.Chart(
                "frontier that the dual predicts",
                "cost",
                "reward",
                [drawing.Curve("", predicted)],
                limit=limit,
            )
        )
    policies = _policies(metrics)
    if policies:
        curve = [drawing.Curve("predicted", predicted)] if predicted else []
        charts.append(
            drawing.Chart("policies", "cost", "reward", curve, policies, metrics.get("limit"))
        )
    return charts


def _losses(path: Path) -> list[drawing.Curve]:
    """Loss against step, a curve for each training where a stage has several."""
    points: dict[str, list[tuple[float, float]]] = {}
    content = _json(path)
    for row in content if isinstance(content, list) else ():
        if _is_number(row.get("step")) and _is_number(row.get("loss")):
            points.setdefault(row.get("training", ""), []).append((row["step"], row["loss"]))
    return [drawing.Curve(name, own) for name, own in points.items()]


def _frontier(root: Path) -> list[tuple[float, float]]:
    content = _json(root / FRONTIER)
    rows = content.get("rows", []) if isinstance(content, dict) else []
    return sorted(
        (row["cost"], row["reward"])
        for row in rows
        if _is_number(row.get("cost")) and _is_number(row.get("reward"))
    )


def _policies(metrics: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Mean cost and reward of each policy in a comparison."""
    names = [
        match[1] for key in metrics if (match := re.fullmatch(r"policies\.(.+)\.cost\.mean", key))
    ]
    found: dict[str, tuple[Any, Any]] = {
        name: (metrics[f"policies.{name}.cost.mean"], metrics.get(f"policies.{name}.reward.mean"))
        for name in names
    }
    return {
        name: (cost, reward)
        for name, (cost, reward) in found.items()
        if _is_number(cost) and _is_number(reward)
    }


# --- the run --------------------------------------------------------------------------------------


def plan_page(dag: Mapping[str, StageSpec], statuses: Mapping[str, StageStatus]) -> str:
    """What is about to run and why."""
    states = {name: status.prospect for name, status in statuses.items()}
    rows = [
        (name, status.prospect, ", ".join(status.reasons))
        for name, status in statuses.items()
        if status.prospect != "up to date"
    ]
    table = _table(["stage", "status", "what changed since its last run"], "|---|---|---|", rows)
    told = table or "Everything is up to date."
    return "\n\n".join([drawing.image(drawing.graph(dag, states), "stages"), told])


def summary_page(
    root: Path, workspace: str, dag: Mapping[str, StageSpec], results: Mapping[str, Result]
) -> str:
    """What a run did: the graph by state, and a line per stage, linked to its card where it has a
    new one.
    """
    states = {name: result.state for name, result in results.items()}
    rows = [_row(name, workspace, result) for name, result in results.items()]
    parts = [
        f"## {counts(list(states.values()))}",
        drawing.image(drawing.graph(dag, states), "stages"),
    ]
    parts += [f"**{result.message}**" for result in results.values() if result.state == "Failed"]
    parts.append(_table(["stage", "state", "time"], "|---|---|---:|", rows))
    return "\n\n".join([*parts, *_report_line(root, dag, states)])


def _row(name: str, workspace: str, result: Result) -> tuple[str, str, str]:
    carded = result.state in ("Completed", "Restored")
    stage = f"[{name}](/artifacts/key/{key_of(name, workspace)})" if carded else name
    time = "" if result.state == "Unchanged" else duration(result.seconds)
    return stage, _words(result.state), time


def _report_line(root: Path, dag: Mapping[str, StageSpec], states: Mapping[str, str]) -> list[str]:
    """Where the report lies; a link as well, though most browsers follow none from a web page to a
    file.
    """
    page = (root / REPORT).resolve()
    if page.exists():
        return [f"[Report]({page.as_uri()}), a file on the machine of the run: `{page}`"]
    made = [
        name
        for name in states
        if REPORT.as_posix() in dag[name].outs and states[name] in ("Completed", "Restored")
    ]
    return [f"Report: `dvc pull {name}` puts it here: `{page}`" for name in made]


def counts(results: Sequence[str]) -> str:
    """States in words: `3 completed, 24 unchanged`."""
    names = [name for name in (*drawing.COLOURS, *results) if name in results]
    return ", ".join(f"{list(results).count(name)} {_words(name)}" for name in dict.fromkeys(names))


def _words(state: str) -> str:
    """`NotStarted` as `not started`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", state).lower()


# --- numbers --------------------------------------------------------------------------------------


def size(count: float) -> str:
    """Bytes in units that people read."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds in units that people read: 3.2 s, 4 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _change(before: Any, after: float) -> str:
    if not _is_number(before):
        return "new"
    return "" if before == after else f"{after - before:+.3g}"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None

"""What changed between two runs: the params and versions of their stages, and their measures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scipy.stats import norm

from dualign.core.records import Interval, Provenance
from dualign.params.base import FANS

Row = dict[str, Any]

#: Values by key and by stage (`prepare`, `dual_search/sacpo`).
Settings = dict[str, dict[str, Any]]
#: What stands for a key that a run does not have.
ABSENT = "\N{EN DASH}"


@dataclass(frozen=True)
class ChangedSetting:
    """A param or version that stages ran with, as text, and otherwise than in the earlier run."""

    key: str
    stages: tuple[str, ...]
    then: str
    now: str


def label(stage: Provenance) -> str:
    """The name of a stage with its item: `dual_search/sacpo`."""
    return f"{stage.stage}/{stage.item}" if stage.item else stage.stage


def changed_settings(then: Iterable[Provenance], now: Iterable[Provenance]) -> list[ChangedSetting]:
    """Params and versions in which the stages of both runs differ, those of most stages first.

    What changed alike in several stages is one of these."""
    earlier, current = settings(then), settings(now)
    alike: dict[tuple[str, str, str], list[str]] = {}
    for stage in current:
        if stage not in earlier:
            continue
        for key in dict.fromkeys([*earlier[stage], *current[stage]]):
            values = (_text(earlier[stage], key), _text(current[stage], key))
            if values[0] != values[1]:
                alike.setdefault((key, *values), []).append(stage)
    found = [ChangedSetting(key, tuple(s), a, b) for (key, a, b), s in alike.items()]
    return sorted(found, key=lambda changed: (-len(changed.stages), changed.key))


def settings(stages: Iterable[Provenance]) -> Settings:
    """By stage its params and versions, by dotted key; of a table of instances its own row."""
    found: Settings = {}
    for stage in stages:
        versions = {f"version of {name}": version for name, version in stage.versions.items()}
        found[label(stage)] = _flat(params_of(stage)) | versions
    return found


def params_of(stage: Provenance) -> dict[str, Any]:
    """What a stage ran with; of a table of instances its own row."""
    return {key: _own(stage.item, key, value) for key, value in stage.params.items()}


def _own(item: str | None, key: str, value: Any) -> Any:
    return value.get(item) if key in FANS and isinstance(value, Mapping) else value


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _text(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return ABSENT
    value = values[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def at_level(interval: Interval, stated: float, wanted: float) -> Interval:
    """An interval of confidence `stated` as one of confidence `wanted`: its ends move as those of a
    normal mean do.

    >>> found = at_level(Interval(mean=0.0, low=-1.96, high=1.96), stated=0.95, wanted=0.9)
    >>> round(found.high, 2)
    1.64
    """
    if stated == wanted:
        return interval
    ratio = float(norm.ppf((1 + wanted) / 2) / norm.ppf((1 + stated) / 2))
    mean = interval.mean
    low, high = (
        None if end is None else mean + ratio * (end - mean)
        for end in (interval.low, interval.high)
    )
    return Interval(mean=mean, low=low, high=high)


def change(then: Interval, now: Interval, confidence: float) -> Row:
    """The later mean minus the earlier one: `mean`, `low`, `high`, `p_value`; where a run has no
    interval, infinite ends and a p-value of 1.

    The ends are MOVER's, from the distances of each run's own ends: d - sqrt((b - b_low)^2 +
    (a_high - a)^2) and d + sqrt((b_high - b)^2 + (a - a_low)^2) for d = b - a. It is exact for
    independent normal means; runs that share prompts agree better than that, so that it errs to
    the wide side. `p_value` is two-sided, of the end nearer to 0, and below 1 - `confidence` where
    that end is beyond it.

    Source: Zou and Donner, Statistics in Medicine 27 (2008)."""
    mean = now.mean - then.mean
    below = _reach(now.mean, now.low, then.mean, then.high)
    above = _reach(now.mean, now.high, then.mean, then.low)
    return {
        "mean": mean,
        "low": mean - below,
        "high": mean + above,
        "p_value": _p_value(mean, below if mean > 0 else above, confidence),
    }


def _reach(now: float, own_end: float | None, then: float, its_end: float | None) -> float:
    """How far an end of the interval lies from the difference."""
    if own_end is None or its_end is None:
        return math.inf
    return math.hypot(now - own_end, then - its_end)


def _p_value(mean: float, reach: float, confidence: float) -> float:
    """`reach` is the half of the interval on the side of 0."""
    if mean == 0:
        return 1.0
    if reach == 0:
        return 0.0
    deviates = norm.ppf((1 + confidence) / 2) * abs(mean) / reach
    return float(2 * norm.sf(deviates))

"""How far judges can be believed: their agreement with people and with each other, and what
policies gained by the scorers that they were trained on but not by others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd

from dualign.core.records import Interval
from dualign.evaluation.agreement import agreement, rank_correlation
from dualign.evaluation.paired import holm, no_difference, prompt_differences
from dualign.evaluation.stats import Estimate, mean_of
from dualign.report.comparison import REFERENCE, known_ends
from dualign.report.judged import calibrated_on_people, read_judges
from dualign.report.sections.base import FinishedRun, Row, Section

_ANSWER = ["policy", "prompt_id", "sample"]
_DRAWS = 1000
#: Scores whose agreement is a correlation of ranks; that of the others is Cohen's kappa.
_RANKED = ("reward", "cost")
_COMPARED = (*_RANKED, "unsafe", "refused", "truthful", "win")
#: Kinds of judges that no policy was trained on and that score as the training's do.
_INDEPENDENT = ("independent", "oracle")


def section(run: FinishedRun) -> Section | None:
    """None where nothing was judged."""
    people = [judge for judge in read_judges(run.root, run.params) if judge.agreement]
    pairs: list[Row] = []
    hacked: list[Row] = []
    for suite, verdicts in run.judged_suites():
        rows = judge_pairs(verdicts, run.params.confidence)
        if rows:
            pairs.append({"name": suite, "rows": rows})
        hacked += _hacked(run, suite, verdicts)
    if not (people or pairs or hacked):
        return None
    agreed = {
        key for suite in pairs for row in suite["rows"] for key, v in row["scores"].items() if v
    }
    values = {
        "people": people,
        "calibrated": [judge.judge for judge in people if calibrated_on_people(run.root, judge)],
        "pairs": pairs,
        "compared": [key for key in _COMPARED if key in agreed],
        "hacked": hacked,
        "alpha": 1 - run.params.confidence,
    }
    return Section("judges", "Judges", values)


def _hacked(run: FinishedRun, suite: str, verdicts: pd.DataFrame) -> list[Row]:
    """A group of rows for each pair of the training scorers and another judge of its own."""
    kinds = {name: spec.kind for name, spec in run.params.judges.items()}
    there = [name for name in verdicts["judge"].unique() if name in kinds]
    trained = [name for name in there if kinds[name] == "scorers"]
    others = [name for name in there if kinds[name] in _INDEPENDENT]
    groups = []
    for ours in trained:
        for other in others:
            by_policy = gains(verdicts, ours, other, run.params.confidence)
            rows = [
                {"name": name, "mark": run.mark_of(name), "gains": by_policy[name]}
                for name in run.in_order(by_policy)
            ]
            if rows:
                overrated = _overrated(by_policy, 1 - run.params.confidence)
                named = {"suite": suite, "ours": ours, "other": other}
                groups.append({**named, "rows": rows, **overrated})
    return groups


def _overrated(found: dict[str, dict[str, Gain]], alpha: float) -> Row:
    """How many policies the training's scorers overrate in each score, and which most."""
    counts = dict.fromkeys(_RANKED, 0)
    worst: Row | None = None
    for name, by_score in found.items():
        for key, gain in by_score.items():
            if not gain.overrated(alpha):
                continue
            counts[key] += 1
            if worst is None or gain.gap.mean > worst["gap"]:
                what = "safety" if key == "cost" else key
                worst = {"name": name, "what": what, "gap": gain.gap.mean}
    return {"overrated": counts, "most": worst}


def judge_pairs(verdicts: pd.DataFrame, confidence: float) -> list[Row]:
    """How far any two judges agree on the same answers to a suite: a correlation of ranks or a
    kappa for every score that both give, with its interval over prompts. Pairs without a common
    score are left out.
    """
    tables = dict(tuple(verdicts.groupby("judge", sort=False)))
    rows = []
    for one, other in combinations(tables, 2):
        both = _same_answers(tables[one], tables[other])
        scores = {key: _agreed(both, key, confidence) for key in _COMPARED}
        if any(scores.values()):
            rows.append({"first": one, "second": other, "answers": len(both), "scores": scores})
    return rows


def _same_answers(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The first verdict of both on each answer on which neither failed."""
    told = [table[table["failure"].isna() & (table["repeat"] == 0)] for table in (one, other)]
    return told[0].merge(told[1], on=_ANSWER, suffixes=("_first", "_second"))


def _agreed(both: pd.DataFrame, key: str, confidence: float) -> Interval | None:
    sides = [f"{key}_first", f"{key}_second"]
    rows = both.dropna(subset=sides)
    first, second = (rows[side].tolist() for side in sides)
    if len({*first, *second}) < 2:
        return None
    prompts = rows["prompt_id"].tolist()
    if key in _RANKED:
        correlation = rank_correlation(first, second, prompts, confidence=confidence, draws=_DRAWS)
        return None if np.isnan(correlation.mean) else known_ends(correlation)
    labels = agreement(first, second, prompts, confidence=confidence, draws=_DRAWS)
    return known_ends(Estimate(labels.kappa, math.nan, labels.low, labels.high))


@dataclass(frozen=True)
class Gain:
    """What a policy gained on the reference policy by the training scorers and by others, in
    standard deviations of the reference policy's scores, and the gap between the two.
    """

    ours: float
    other: float
    gap: Interval
    p_value: float
    p_holm: float = float("nan")

    def overrated(self, alpha: float) -> bool:
        """Whether the scorers of training see more gain than there is, beyond chance."""
        return self.p_holm <= alpha and self.gap.mean > 0


def gains(
    verdicts: pd.DataFrame, ours: str, other: str, confidence: float
) -> dict[str, dict[str, Gain]]:
    """By policy, what it gained in reward and in safety (less cost) by two judges of a suite:
    {policy: {"reward" or "cost": Gain}}.

    A score is divided by its judge's standard deviation over the reference policy's answers: two
    reward models share neither zero nor unit. Differences are taken within the prompt, and `p_holm`
    is corrected for all that is returned."""
    tables = [verdicts[verdicts["judge"] == name] for name in (ours, other)]
    names = [name for name in verdicts["policy"].unique() if name != REFERENCE]
    raw: dict[tuple[str, str], Gain] = {}
    for name in names:
        for key in _RANKED:
            by_ours, by_other = (_gain(table, name, key) for table in tables)
            gain = _gap(by_ours, by_other, confidence)
            if gain is not None:
                raw[name, key] = gain
    by_policy: dict[str, dict[str, Gain]] = {}
    corrected = holm([gain.p_value for gain in raw.values()])
    for ((name, key), gain), p_holm in zip(raw.items(), corrected, strict=True):
        by_policy.setdefault(name, {})[key] = replace(gain, p_holm=float(p_holm))
    return by_policy


def _gain(table: pd.DataFrame, policy: str, key: str) -> pd.Series:
    """By prompt, the jackknife's pseudo-values of the gain, positive for the better: their mean is
    the gain, and their spread knows that the deviation is estimated too. Empty where there is no
    such score, or the reference policy's are alike.
    """
    reference = table[table["policy"] == REFERENCE].dropna(subset=[key])
    own = table[table["policy"] == policy]
    gain = (-1 if key == "cost" else 1) * prompt_differences(own, reference, key)
    centred = reference[key] - reference[key].mean()
    terms = pd.DataFrame({"n": 1, "x": centred, "xx": centred**2})
    sums = terms.groupby(reference["prompt_id"]).sum().loc[gain.index]
    deviations = _deviation(sums.sum() - sums)
    if len(gain) < 3 or not (deviations > 0).all():
        return pd.Series(dtype=float)
    count = len(gain)
    whole = gain.mean() / _deviation(sums.sum().to_frame().T).iloc[0]
    return count * whole - (gain.sum() - gain) / deviations


def _deviation(sums: pd.DataFrame) -> pd.Series:
    """The standard deviation of each row's count `n`, sum `x` and sum of squares `xx`."""
    variance = (sums["xx"] - sums["x"] ** 2 / sums["n"]) / (sums["n"] - 1).clip(lower=1)
    return variance.clip(lower=0) ** 0.5


def _gap(ours: pd.Series, other: pd.Series, confidence: float) -> Gain | None:
    """None without a common prompt."""
    gap = (ours - other).dropna()
    if gap.empty:
        return None
    estimate = mean_of(gap.to_numpy(), confidence)
    return Gain(
        float(ours[gap.index].mean()),
        float(other[gap.index].mean()),
        known_ends(estimate),
        no_difference(gap.to_numpy()),
    )

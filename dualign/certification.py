"""The candidates of a certificate: which there are, their answers to the certify prompts, and labels of some."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.special import ndtri

from dualign.certificate import Certificate, Tested, order
from dualign.core.artifacts import replacing, write_parquet
from dualign.core.params import SHARES, CertifyParams, CertifyRun, LabelParams
from dualign.core.schema import ANSWERS, LABELS, read_table
from dualign.evaluation import add_truth, means
from dualign.evidence import Evidence
from dualign.lm.mixture import policy_at
from dualign.lm.publish import publish
from dualign.measure.rollout import Judges, roll_out
from dualign.search.labelling import truth, vote
from dualign.search.merge import merge

#: Tests of shares that take the exact bound where nothing was seen.
_EXACT = (*((share, "clustered_t") for share in SHARES), ("harm", "prediction_powered"))
#: Tests of shares whose bound falls as 1 / N where nothing was seen.
_FAST = tuple((share, "star_bets") for share in SHARES)
#: N times the `star_bound` of N prompts that show nothing is 3.15 with 100 of them and 3.29 with 4000, at delta 0.05.
_GROWTH = 1.05


@dataclass(frozen=True)
class Contender:
    """A candidate: the policy in a folder, or (1 - q) partner + q policy, made in `out` when it is first needed.

    It is tested in the form in which it would leave.
    """

    policy: Path
    partner: Path
    q: float
    out: Path

    def folder(self) -> Path:
        """Where the policy lies."""
        if self.out.is_dir():
            return self.out
        if self.q == 1.0 and not (self.policy / "adapter_config.json").is_file():
            return self.policy
        merged = self.policy if self.q == 1.0 else self.out.with_name(f"{self.out.name}-merged")
        if not merged.is_dir():
            merge(self.partner, self.policy, self.q, merged)
        with replacing(self.out) as folder:
            publish(merged, folder)
        return self.out


def contenders(row: CertifyRun, models: Path, scratch: Path) -> dict[str, Contender]:
    """The candidates of a row by name, safest first: the fallback, then the policy at each weight."""
    found = {}
    for name, q in order(row).items():
        if name == row.fallback != row.policy:
            found[name] = Contender(models / name, models / name, 1.0, scratch / "fallback")
        else:
            found[name] = Contender(models / row.policy, models / row.partner, q, scratch / f"at-{q:g}")
    return found


class Contenders:
    """Draws and keeps what each candidate is judged by; what lies in `scratch` is not drawn again."""

    def __init__(
        self, field: dict[str, Contender], params: CertifyParams, prompts: pd.DataFrame, judges: Judges, scratch: Path
    ) -> None:
        self._field, self._params, self._prompts, self._judges, self._scratch = field, params, prompts, judges, scratch
        self._world = bool((prompts["source"] == "world").all())

    def policy(self, name: str) -> Path:
        """The folder of a candidate."""
        return self._field[name].folder()

    def contender(self, name: str) -> Contender:
        """What a candidate is made of."""
        return self._field[name]

    def evidence(self, name: str) -> Evidence:
        """The files of a candidate's answers and labels. Raises AwaitingLabels while people's are not there."""
        path = self._path(name, "answers")
        if not path.is_file():
            write_parquet(path, self._draw(name), ANSWERS)
        options = self._params.labels
        if options is None:
            return Evidence(path)
        labelled = self._path(name, "labels")
        if not labelled.is_file():
            write_parquet(labelled, label(read_table(path, ANSWERS), options, self._params.seed), LABELS)
        return Evidence(path, labelled)

    def measured(self, name: str) -> dict[str, Any]:
        """Means of a tested candidate's answers with two-sided 95 % intervals."""
        return means(read_table(self._path(name, "answers"), ANSWERS))

    def _draw(self, name: str) -> pd.DataFrame:
        params = self._params
        drawn = roll_out(
            policy_at(self.policy(name), self._judges.resources), self._prompts, self._judges,
            count=params.samples_per_prompt, max_new_tokens=params.max_new_tokens, seed=params.seed,
        )  # fmt: skip
        return add_truth(drawn) if self._world else drawn

    def _path(self, name: str, kind: str) -> Path:
        return self._scratch / f"{list(self._field).index(name):02d}-{kind}.parquet"


def label(answers: pd.DataFrame, options: LabelParams, seed: int) -> pd.DataFrame:
    """The first answer to a random draw of prompts with the truth beside the model's cost; schema LABELS.

    Raises AwaitingLabels and DataError as `labelling.vote`.
    """
    first = answers[answers["sample"] == 0]
    asked = first.sample(min(options.prompts, len(first)), random_state=seed).sort_index()
    if options.source == "oracle":
        return asked.assign(truth=truth(asked, "response")[1])
    votes = vote(asked, source="file", count=options.votes, folder=Path(options.folder), seed=seed)
    return asked.assign(truth=votes / options.votes)


def forecast(test: Tested, found: Certificate) -> int | None:
    """Prompts (with labels, where these fell short) at which a failed candidate would pass with probability 0.8.

    A bound's distance from its estimate falls as 1 / sqrt(N), and passing so often takes a margin of (z_{1-delta} +
    z_0.8) standard errors. What skewness adds to the distance falls as 1 / N, so for skewed costs the number is on the
    safe side. The bound of a share of which none was seen falls as 1 / N (the exact one is 1 - delta^(1 / N)): there it
    is the number that passes if again none is seen. None for a candidate that passed, and where an estimate is above
    its limit: no number would show that it is below.
    """
    power = 1 + float(ndtri(0.8) / ndtri(1 - found.delta))
    needed = []
    for required, check in zip(found.requirements, test.checks, strict=True):
        margin = required.limit - check.estimate
        if not check.kept and margin <= 0:
            return None
        exact = (required.quantity, required.method) in _EXACT
        if not check.kept and check.estimate == 0 and exact:
            needed.append(math.ceil(math.log(found.delta) / math.log1p(-required.limit)))
        elif not check.kept and check.estimate == 0 and (required.quantity, required.method) in _FAST:
            needed.append(math.ceil(_GROWTH * check.prompts * check.bound / required.limit))
        elif not check.kept:
            needed.append(math.ceil(check.prompts * (power * (check.bound - check.estimate) / margin) ** 2))
    return max(needed, default=None)

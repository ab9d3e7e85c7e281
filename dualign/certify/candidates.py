"""The candidates of a certificate, their answers to the certify prompts, and labels of some."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtri

from dualign.certify.certificate import Certificate, drawers, order
from dualign.certify.evidence import DRAWN, Evidence, read_answers
from dualign.certify.requirement import Requirement
from dualign.certify.screening import Knot, Planned, Screen, Seen, parting, seen
from dualign.certify.sequence import LEAST_ESS, CandidateTest
from dualign.core.artifacts import replacing, write_parquet
from dualign.core.errors import DataError
from dualign.core.schema import ANSWERS, LABELS, REWEIGHTED, read_table
from dualign.data.labelling import truth, vote
from dualign.evaluation.against_optimum import add_truth, means
from dualign.evaluation.rollout import Scorers, kept_answers, log_ratios, roll_out
from dualign.lm.engines.interface import PLAIN, Decoding
from dualign.lm.merge import merge
from dualign.lm.mixture import Mixture, Policy, policy_at
from dualign.lm.publish import publish
from dualign.params.base import SHARES
from dualign.params.certify import CertifyParams, CertifyRun, LabelParams, ScreenParams

MODELS = Path("models")
#: Tests of shares that take the exact bound where nothing was seen.
_EXACT = (*((share, "clustered_t") for share in SHARES), ("harm", "prediction_powered"))
#: Tests of shares whose bound falls as 1 / N where nothing was seen.
_FAST = tuple((share, "star_bets") for share in SHARES)
#: N times the `star_bound` of N prompts that show nothing is 3.15 with 100 of them and 3.29 with
#: 4000, at delta 0.05.
_GROWTH = 1.05


@dataclass(frozen=True)
class CandidatePolicy:
    """A candidate: the policy in a folder, or (1 - q) partner + q policy, made in `out` on demand.

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


def candidate_policies(row: CertifyRun, models: Path, scratch: Path) -> dict[str, CandidatePolicy]:
    """The candidates of a row by name, safest first: fallback, then the policy at each weight."""
    policy, partner, fallback = (models / name for name in (row.policy, row.partner, row.fallback))
    policies = {
        name: CandidatePolicy(policy, partner, q, scratch / f"at-{q:g}")
        for name, q in order(row).items()
    }
    if fallback != policy:
        policies[row.fallback] = CandidatePolicy(fallback, fallback, 1.0, scratch / "fallback")
    return policies


class CandidateEvidence:
    """Draws and keeps what each candidate is judged by; what lies in `scratch` is not drawn again.

    `plan` says how many answers a prompt each draws, and who draws those of all later ones; None:
    `samples_per_prompt`. They are drawn at `decoding`."""

    def __init__(
        self,
        policies: dict[str, CandidatePolicy],
        params: CertifyParams,
        prompts: pd.DataFrame,
        scorers: Scorers,
        scratch: Path,
        plan: Planned | None = None,
        decoding: Decoding = PLAIN,
    ) -> None:
        self._policies = policies
        self._params = params
        self._prompts = prompts
        self._scorers = scorers
        self._scratch = scratch
        self._decoding = decoding
        self._world = bool((prompts["source"] == "world").all())

        names = list(policies)
        counts = [params.samples_per_prompt] * len(names) if plan is None else plan.samples
        self._counts = dict(zip(names, counts, strict=True))
        #: Who draws the answers by which `_weighed` are judged, in equal parts.
        self._drawers = drawers(plan, names)
        self._weighed = set(names[plan.own :]) if plan is not None and plan.drawn else set[str]()

    def policy(self, name: str) -> Path:
        """The folder of a candidate."""
        return self._policies[name].folder()

    def candidate(self, name: str) -> CandidatePolicy:
        """What a candidate is made of."""
        return self._policies[name]

    def files(self, name: str) -> Evidence:
        """The files of a candidate's answers and labels. Raises AwaitingLabels for people's."""
        path = self._path(name, "answers")
        if not path.is_file():
            if name in self._weighed:
                write_parquet(path, self._reweighted(name), REWEIGHTED)
            else:
                policy = policy_at(self.policy(name), self._scorers.resources)
                write_parquet(path, self._draw(policy, self._counts[name]), ANSWERS)
        options = self._params.labels
        if options is None:
            return Evidence(path)
        labelled = self._path(name, "labels")
        answers = read_table(path, ANSWERS)
        # Read anew by every run: people may have corrected their labels since the last one.
        write_parquet(labelled, label(answers, options, self._params.seed), LABELS)
        return Evidence(path, labelled)

    def measured(self, name: str) -> dict[str, Any]:
        """Means of a tested candidate's answers with two-sided 95 % intervals."""
        path = self._path(name, "answers")
        answers = read_table(path, ANSWERS)
        if name in self._weighed:
            answers = answers.assign(weight=read_answers(path)["weight"])
        return means(answers)

    def _reweighted(self, name: str) -> pd.DataFrame:
        """The answers that are drawn for all, with the candidate's own log-probabilities."""
        drawn = kept_answers(self._path(self._drawers[0], "drawn"), self._draw_for_all)
        policy = policy_at(self.policy(name), self._scorers.resources)
        own = log_ratios(policy, drawn, self._scorers) + drawn["logp_ref"].to_numpy()
        return drawn.assign(logp=own, **{DRAWN: drawn["logp"]})

    def _draw_for_all(self) -> pd.DataFrame:
        """Answers of the drawers' mixture: of two, none weighs more than 2 at either."""
        count = len(self._drawers)
        folders = tuple(self.policy(name) for name in self._drawers)
        mixture = Mixture((1 / count,) * count, folders, self._scorers.resources)
        return self._draw(mixture, self._counts[self._drawers[0]])

    def _draw(self, policy: Policy, count: int) -> pd.DataFrame:
        params = self._params
        drawn = roll_out(
            policy, self._prompts, self._scorers,
            count=count, max_new_tokens=params.max_new_tokens, seed=params.seed,
            decoding=self._decoding,
        )  # fmt: skip
        return add_truth(drawn) if self._world else drawn

    def _path(self, name: str, kind: str) -> Path:
        return self._scratch / f"{list(self._policies).index(name):02d}-{kind}.parquet"


def screen(
    row: CertifyRun,
    requirements: Sequence[Requirement],
    params: CertifyParams,
    options: ScreenParams,
    prompts: pd.DataFrame,
    scorers: Scorers,
    scratch: Path,
) -> Screen:
    """What answers to the search prompts show of the fallback and of the path at a row's weights.

    Requirements that labels are needed for are left to the tests: their bounds are near those of
    the model's cost.
    """
    screened = [found for found in requirements if found.quantity not in ("truth", "harm")]
    asked = prompts.head(options.prompts)
    knots: list[Knot] = []
    weighing = options.reweigh and all(required.reweighs for required in requirements)
    before: pd.DataFrame | None = None
    for name, candidate in candidate_policies(row, MODELS, scratch).items():
        policy = policy_at(candidate.folder(), scorers.resources)
        answers = roll_out(
            policy,
            asked,
            scorers,
            count=options.samples_per_prompt,
            max_new_tokens=params.max_new_tokens,
            seed=params.seed,
            decoding=Decoding.of(row),
        )
        q = None if name == row.fallback != row.policy else candidate.q
        shown = [_shown(required, answers) for required in screened]
        if weighing and before is not None:
            knots[-1] = _bent(knots[-1], before, log_ratios(policy, before, scorers), candidate.q)
        knots.append(
            Knot(name=name, q=q, seen=tuple(found for found in shown if found is not None))
        )
        before = None if q is None else answers
    tight = all(required.method == "clustered_t" for required in screened)
    return Screen(
        prompts=len(asked),
        samples=options.samples_per_prompt,
        certify_prompts=params.prompts,
        samples_per_prompt=params.samples_per_prompt,
        delta=params.delta,
        tests=options.tests,
        thrifty=tight,
        reweighed=weighing,
        knots=tuple(knots),
    )


def _bent(knot: Knot, answers: pd.DataFrame, next_ratio: np.ndarray, next_q: float) -> Knot:
    """A knot with its `bend`, from the log-ratios that the next policy gives to its answers."""
    assert knot.q is not None
    change = next_ratio - (answers["logp"] - answers["logp_ref"]).to_numpy()
    return knot.model_copy(update={"bend": parting(change) / (next_q - knot.q) ** 2})


def _shown(required: Requirement, answers: pd.DataFrame) -> Seen | None:
    """What the answers show of a requirement; None where it is on fewer than two prompts."""
    try:
        values = required.values(answers)
    except DataError:
        return None
    table = values.groupby("prompt_id", sort=False)["value"].apply(list)
    if len(table) < 2:
        return None
    return seen(required.name, required.limit, np.array(table.tolist()))


def label(answers: pd.DataFrame, options: LabelParams, seed: int) -> pd.DataFrame:
    """First answers to a random draw of prompts, with the truth beside the model's cost; LABELS.

    Raises AwaitingLabels and DataError as `labelling.vote`.
    """
    first = answers[answers["sample"] == 0]
    asked = first.sample(min(options.prompts, len(first)), random_state=seed).sort_index()
    if options.source == "oracle":
        return asked.assign(truth=truth(asked, "response")[1])
    votes = vote(asked, source="file", count=options.votes, folder=Path(options.folder), seed=seed)
    return asked.assign(truth=votes / options.votes)


def forecast(test: CandidateTest, found: Certificate) -> int | None:
    """Prompts (or labelled ones) at which a failed candidate would pass with probability 0.8.

    A bound's distance from its estimate falls as 1 / sqrt(N), and passing so often takes a margin
    of (z_{1-delta} + z_0.8) standard errors. What skewness adds to the distance falls as 1 / N, so
    for skewed costs the number is on the safe side. The bound of a share of which none was seen
    falls as 1 / N (the exact one is 1 - delta^(1 / N)): there it is the number that passes if again
    none is seen. A limit on some of the prompts, which the first one is not, takes as many more in
    all as they are few. None for a candidate that passed, and where no number of prompts would do:
    an estimate is above its limit, or answers that others drew are worth less than `LEAST_ESS`.
    """
    if test.ess is not None and test.ess < LEAST_ESS:
        return None
    power = 1 + float(ndtri(0.8) / ndtri(1 - found.delta))
    failed = [
        (required, check)
        for required, check in zip(found.requirements, test.checks, strict=True)
        if not check.kept
    ]
    needed = []
    for required, check in failed:
        margin = required.limit - check.estimate
        if margin <= 0:
            return None
        kind = (required.quantity, required.method)
        if check.estimate == 0 and kind in _EXACT:
            prompts = math.log(found.delta) / math.log1p(-required.limit)
        elif check.estimate == 0 and kind in _FAST:
            prompts = _GROWTH * check.prompts * check.bound / required.limit
        else:
            prompts = check.prompts * (power * (check.bound - check.estimate) / margin) ** 2
        share = check.prompts / test.checks[0].prompts if required.prompts else 1.0
        needed.append(math.ceil(prompts / share))
    return max(needed, default=None)

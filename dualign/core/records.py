"""The JSON files between stages as types: another shape is refused by file and key.

A key that stands in a class must be in the file; what else the file holds is kept as it is. Numbers
that may not exist (an interval of one prompt, say) are null in JSON and None here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dualign.core.artifacts import listed, read_json
from dualign.core.errors import DataError
from dualign.core.names import Solved

R = TypeVar("R")

#: `within`: the whole interval is within the limit; `unproven`: only its mean is; `over`: not even
#: that.
Standing = Literal["within", "unproven", "over"]


class Record(BaseModel):
    """What one stage writes and another reads: frozen. Further keys of a file are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")


class WholeRecord(Record):
    """A record whose file has its keys and no other."""

    model_config = ConfigDict(extra="forbid")


class PreparedMetrics(Record):
    """reports/metrics/prepare.json, as far as another stage reads it: rejected rows by reason."""

    rejected: dict[str, int]


class PriceRow(Record):
    """A `dualign.math.constraints.Price` in data/dual/dual.json: a constraint, its multiplier."""

    name: str
    quantity: str
    limit: float
    level: float | None
    prompts: str | None
    threshold: float | None
    lam: float
    predicted: float


class Pessimism(Record):
    """Answers of the pool off the support, and what full doubt takes off reward, adds to cost."""

    answers: int
    degree: float
    reward: float
    cost: float


class Standardised(Record):
    """A solved dual in units of the scores' standard deviations within a prompt."""

    reward_sd: float
    cost_sd: float
    beta: float
    lam: float


class Multipliers(Record):
    """What a dual of the pool says: its multiplier with the interval, the one with a certificate
    margin and the cost that it steers to, and the prices of additional constraints.
    """

    lam: float
    lam_low: float | None
    lam_high: float | None
    lam_margin: float
    target: float
    prices: list[PriceRow]


class SolvedDual(Multipliers):
    """data/dual/dual.json: the dual of the pool with its doubted scores, what it was solved for,
    and where any are doubted the dual of its scores as they are. Its diagnostics are for the report
    alone, and None in an older run."""

    limit: float
    beta: float
    lambda_max: float
    slack: bool
    jackknife: bool = False
    messages: list[str]
    as_scored: Multipliers | None = None
    prompts: int | None = None
    samples: int | None = None
    cost_reference: float | None = None
    cost_unconstrained: float | None = None
    reachable_minimum: float | None = None
    ess_median: float | None = None
    ess_low: float | None = None
    half_drift: float | None = None
    half_drift_cost: float | None = None
    lam_slope: float | None = None
    zero_error: float | None = None
    lam_zero_low: float | None = None
    lam_zero_high: float | None = None
    certificate_margin: float | None = None
    newton_steps: int | None = None
    standardised: Standardised | None = None
    pessimism: Pessimism | None = None


class FrontierRow(Record):
    """A row of the predicted frontier, with its bands, or of the world's exact one, without."""

    lam: float
    cost: float
    reward: float
    cost_low: float | None = None
    cost_high: float | None = None
    reward_low: float | None = None
    reward_high: float | None = None
    p_unsafe: float | None = None
    kl: float | None = None
    ess: float | None = None


class Frontier(Record):
    """data/dual/frontier.json."""

    rows: list[FrontierRow]
    cvar_level: float


class BetaRow(Record):
    """What the pool predicts at one KL weight: measures as in `FrontierRow`, and the multipliers.

    `lam` is None where the limit is out of reach, and `infeasible` says why. `prices` are those of
    additional constraints, in their order."""

    beta: float
    lam: float | None
    lam_low: float | None = None
    lam_high: float | None = None
    prices: list[float] | None = None
    infeasible: str | None = None


class Betas(Record):
    """data/dual/betas.json."""

    rows: list[BetaRow]
    beta: float
    min_ess: float


class CostModelMetrics(Record):
    """reports/metrics/cost_model.json, as far as another stage reads it."""

    ranking_accuracy: float | None = None
    ranking_accuracy_cut: float | None = None
    zero_error: float | None


class ReferenceMetrics(Record):
    """reports/metrics/sft.json: the reference policy, as a start of a search."""

    heldout_loss: float | None
    parameters: int
    vocabulary: int | None = None
    trained: bool | None = None


class RewardMetrics(Record):
    """reports/metrics/reward_dpo/RUN.json."""

    reference: str
    loss_type: str
    clip: float | None
    safe_offset: float | None
    margin: str


class SafetyMetrics(Record):
    """reports/metrics/safety_dpo/RUN.json and safety_path/RUN.json."""

    lam: float
    coefficient: float
    reference: str
    loss_type: str
    clip: float | None


def took_prices(lam_from: str | None, solved: Path) -> bool:
    """Whether a training took the prices of additional constraints beside its multiplier, as one
    does that takes this from what was `solved` for the pool.
    """
    return lam_from == str(solved)


class LagrangianMetrics(Record):
    """reports/metrics/lagrangian_dpo/RUN.json and lambda_path/RUN.json."""

    lam: float
    lam_from: str | None = None
    lam_low: float | None = None
    lam_high: float | None = None
    begin: str | None = None
    reward: str
    cost: str
    data: str
    pair_loss: dict[str, Any]
    learning_rate: float


class HistoryRow(Record):
    """A stretch of a training that moved lambda itself: its last `step`, and means over it.

    `kl` is in nats an answer."""

    step: int
    lam: float
    cost: float
    reward: float
    kl: float


class AscentRecord(Record):
    """history.json beside such a training: the last lambda, the tokens drawn, each step's means."""

    lam: float
    tokens: int
    history: dict[str, list[float]]


class ConstraintRow(Record):
    """An additional constraint on a policy's own answers; unknown where the limit is on none."""

    name: str
    limit: float
    share: float
    mean: float | None
    error: float | None


class TiltRow(Record):
    """The tilt that a policy has of the reference: `dualign.evaluation.effective_tilt`."""

    lam_eff: float | None
    lam_eff_se: float | None
    beta_eff: float | None
    beta_eff_se: float | None
    length_slope: float | None
    length_slope_se: float | None
    r2: float | None


class BlendRow(Record):
    """A merge of two steps of the same search, the second one at a weight."""

    first: int
    second: int
    weight: float


class PoolCostRow(Record):
    """What reference samples say that a policy costs."""

    cost: float | None
    cost_se: float | None
    ess: float | None
    mass: float | None = None
    mass_se: float | None = None


class ScreenedRow(PoolCostRow):
    """A merge weight, and the cost that reference samples say it has."""

    q: float


class SearchStep(Record):
    """A policy that a search measured; Newton's rule also says what each estimate asks for next."""

    step: int
    lam: float
    q: float | None
    cost: float | None
    cost_se: float | None
    reward: float | None
    kl: float | None
    tilt: TiltRow | None
    prices: list[float]
    trained: bool | None = None
    blend: BlendRow | None = None
    next: dict[str, float | None] | None = None
    additional: list[ConstraintRow] | None = None
    closing: bool | None = None
    reward_se: float | None = None
    p_unsafe: float | None = None
    model_cost: float | None = None
    model_cost_se: float | None = None
    pool: PoolCostRow | None = None
    combined_cost: float | None = None
    combined_cost_se: float | None = None


class SearchResult(Record):
    """reports/search/NAME.json."""

    name: str
    method: str
    title: str
    rule: str
    returns: str
    cost_source: str
    target: float
    steps: list[SearchStep]
    screened: list[ScreenedRow]
    chosen: int
    trainings: int
    generated_tokens: int
    labels: int
    stopped: str
    priced: bool = False
    comparisons: int | None = None
    feasible: bool | None = None
    history: list[HistoryRow] | None = None
    naive: bool | None = None
    slater_radius: float | None = None
    slater_from: str | None = None


class LossRow(Record):
    """A row of reports/curves/STAGE.json or STAGE/ITEM.json; nulls where nothing was trained."""

    training: str | None = None
    step: int | None
    loss: float | None


class IntervalRow(Record):
    """A mean with its interval."""

    mean: float | None
    low: float | None
    high: float | None


class Interval(IntervalRow):
    """An interval whose mean is known; unknown ends are None."""

    mean: float


class LimitedInterval(IntervalRow):
    """What answers show of an additional constraint."""

    limit: float


class Optimum(Record):
    """The exact optimum of the embedded world."""

    lam: float
    cost: float
    reward: float
    kl: float


class Evaluated(Record):
    """reports/metrics/evaluate/NAME.json of a policy that is there; some of it is measured in the
    embedded world alone, or where params ask for it."""

    policy: str
    prompts: int
    answers: int
    max_new_tokens: int
    reward: IntervalRow
    cost: IntervalRow
    p_unsafe: IntervalRow
    kl: IntervalRow
    length: IntervalRow
    ended: IntervalRow
    distinct_2: IntervalRow | None = None
    displacement: IntervalRow | None = None
    off_support: IntervalRow | None = None
    true_reward: IntervalRow | None = None
    true_cost: IntervalRow | None = None
    grammatical: IntervalRow | None = None
    reward_share: float | None = None
    value_gap: float | None = None
    tilt: TiltRow | None = None
    optimum: Optimum | None = None
    additional: dict[str, LimitedInterval] = {}


class NotEvaluated(Record):
    """reports/metrics/evaluate/NAME.json where no policy was certified."""

    policy: str
    absent: Literal[True]


class RequirementRow(Record):
    """What a candidate must keep, in the metrics of `certify`."""

    name: str
    quantity: str
    limit: float
    method: str
    level: float | None = None
    prompts: str | None = None


class CheckRow(Record):
    """A requirement tested on a candidate: what `bound` bounds is `estimate`."""

    prompts: int
    estimate: float
    bound: float
    kept: bool


class CandidateTest(Record):
    """A candidate's test in the metrics of `certify`. `ess` is the share of answers that weighted
    ones are worth, None where it drew its answers itself."""

    candidate: str
    certified: bool
    checks: list[CheckRow]
    policy: str
    partner: str
    q: float
    reward: IntervalRow
    ended: IntervalRow
    prompts_needed: int | None
    ess: float | None = None


class Certified(Record):
    """reports/metrics/certify/NAME.json. It is about answers drawn at `temperature` and `top_p`."""

    returned: str | None
    statement: str
    delta: float
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    requirements: list[RequirementRow]
    candidates: list[str]
    tests: list[CandidateTest]

    @property
    def passed(self) -> CandidateTest | None:
        """The test of what is returned; None where nothing is."""
        return next((test for test in self.tests if test.candidate == self.returned), None)


class ComparedConstraint(LimitedInterval):
    """An additional constraint on a policy's answers, and whether it is kept."""

    standing: Standing | None


class ComparedPolicy(Record):
    """A policy in the comparison: its measures, what it was told, what its search spent.

    `standing` is that to all limits, the worst. Measures, and what only a search has, are None
    where they are unknown."""

    folder: str
    kind: Literal["method", "reference", "baseline"]
    certified: bool
    standing: Standing | None
    prompts: int
    answers: int
    max_new_tokens: int
    reward: Interval | None
    cost: Interval | None
    p_unsafe: Interval | None
    kl: Interval | None
    length: Interval | None
    ended: Interval | None
    distinct_2: Interval | None
    displacement: Interval | None
    off_support: Interval | None
    true_reward: Interval | None
    true_cost: Interval | None
    grammatical: Interval | None
    reward_share: float | None
    value_gap: float | None
    win_reward: Interval | None
    win_cost: Interval | None
    reward_gain: Interval | None
    tilt: TiltRow | None
    additional: dict[str, ComparedConstraint]
    lam: float | None
    merge_weight: float | None
    on_curve: bool
    tilts: bool
    priced: bool = False
    method: str | None
    title: str | None
    rule: str | None
    returns: str | None
    cost_source: str | None
    trainings: int | None
    generated_tokens: int | None
    labels: int | None
    stopped: str | None


class Comparison(Record):
    """reports/comparison.json: every evaluated policy by name, and which one to take.

    `recommended` is the certified policy of most reward; in a run without certificates, the one of
    most reward among those whose intervals end within all limits. `nearest` has the lowest upper
    end of cost; with additional constraints that of the excess over any limit, in half widths of
    its interval. `missing` were not evaluated, and for `uncertified` no candidate was certified.
    `certificates` are by row of `certify`, `params` digests by stage."""

    reference: str
    confidence: float
    limit: float | None
    recommended: str | None
    nearest: str | None
    missing: list[str]
    uncertified: list[str]
    certificates: dict[str, Certified]
    params: dict[str, str]
    policies: dict[str, ComparedPolicy]


class Provenance(Record):
    """reports/provenance/STAGE.json or STAGE/ITEM.json. `edited` are files of code and data that
    were edited while the stage ran."""

    stage: str
    item: str | None
    params: dict[str, Any]
    versions: dict[str, str | None]
    seconds: float
    peak_rss_mib: float
    peak_gpu_mib: float | None = None
    device: str | None = None
    throughput: dict[str, float | None]
    work: dict[str, dict[str, float | None]] = {}
    edited: list[str] = []


class EarlierRun(Record):
    """reports/earlier/run.json: what this run is set beside.

    `name` is what the user called it, a revision of git or an experiment, and `date` the day of its
    commit."""

    name: str
    commit: str
    date: str
    comparison: Comparison
    stages: list[Provenance]


class AdapterConfig(Record):
    """adapter_config.json of a LoRA adapter, as far as dualign reads it."""

    base_model_name_or_path: str
    r: int
    lora_alpha: float
    target_parameters: list[str] | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}


#: The metrics of a policy's training.
Trained = ReferenceMetrics | RewardMetrics | SafetyMetrics | LagrangianMetrics
#: Those that a stage writes.
TRAINED: dict[str, type[Trained]] = {
    "sft": ReferenceMetrics,
    "reward_dpo": RewardMetrics,
    "safety_dpo": SafetyMetrics,
    "safety_path": SafetyMetrics,
    "lagrangian_dpo": LagrangianMetrics,
    "lambda_path": LagrangianMetrics,
}


def solved_for(known: SolvedDual, *, doubted: bool) -> SolvedDual:
    """The dual of the scores that a training reads: those doubted off the support, or as they are.

    A multiplier belongs to the scores that it was solved with (9.15 of the mathematics: every
    identity holds for any r and c, if they are the same ones throughout)."""
    own = None if doubted else known.as_scored
    return known if own is None else known.model_copy(update=dict(own))


def solved_multiplier(known: SolvedDual, which: Solved) -> float:
    """The pool's multiplier that a run names."""
    return known.lam if which == "dual" else known.lam_margin


def as_row(record: Record) -> dict[str, Any]:
    """The record as its file holds it: what a page shows, and what is written."""
    return record.model_dump(exclude_unset=True)


def read_record(path: str | Path, record: type[R]) -> R:
    """Read a JSON file of a stage as a record, or as a list of them.

    Raises DataError with the file and the key that is missing or wrong.
    """
    return _validated(Path(path), record, read_json(path))


def read_optional_record(path: str | Path, record: type[R]) -> R | None:
    """The record in a file, or None where there is no such file: its stage did not run."""
    return read_record(path, record) if Path(path).is_file() else None


def read_trained(metrics: Path, folder: str) -> Trained:
    """What the stage that wrote models/FOLDER measured, in folder `metrics`."""
    return read_record(metrics / f"{folder}.json", TRAINED[folder.partition("/")[0]])


def read_provenance(root: Path) -> list[Provenance]:
    """What every stage of a run wrote of itself, by the names of the files."""
    paths = listed(root / "reports/provenance", "**/*.json")
    return [read_record(path, Provenance) for path in paths]


def read_evaluated(metrics: Path, name: str) -> Evaluated | NotEvaluated | None:
    """What `evaluate` wrote of a policy in folder `metrics`; None where it was not evaluated."""
    path = metrics / "evaluate" / f"{name}.json"
    if not path.is_file():
        return None
    content = read_json(path)
    if isinstance(content, dict) and "absent" in content:
        return _validated(path, NotEvaluated, content)
    return _validated(path, Evaluated, content)


def _validated(path: Path, record: type[R], content: Any) -> R:
    try:
        return TypeAdapter(record).validate_python(content)
    except ValidationError as error:
        raise DataError(
            f"{path}: {fault(error)}; run the stage that wrote it again (`dvc repro --force`)"
        ) from error


def fault(error: ValidationError, whole: str = "the file") -> str:
    """The first key that is wrong, and how; `whole` stands for content that is wrong as such."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg'].lower()}"

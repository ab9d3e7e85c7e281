"""Rules between sections of params.yaml: who starts from whose model, and if that fits."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeVar

from dualign.core.errors import ParamsError
from dualign.params.base import StageParams
from dualign.params.certify import CertifyParams
from dualign.params.evaluate import EvaluateParams
from dualign.params.judging import JudgeParams
from dualign.params.models import ScorerParams
from dualign.params.search import ROW_SECTIONS, DualSearchParams, MethodRow
from dualign.params.training import (
    TILTING,
    LagrangianDpoParams,
    LambdaPathParams,
    RewardDpoParams,
    RewardRun,
    SafetyDpoParams,
    SafetyPathParams,
    SafetySpec,
)

P = TypeVar("P", bound=StageParams)


def params_of(cls: type[P], stages: dict[str, StageParams]) -> P:
    """The params of one stage, by their type."""
    found = stages[cls.section]
    assert isinstance(found, cls)
    return found


def check_across(content: dict[str, Any], stages: dict[str, StageParams]) -> None:
    """Raise ParamsError unless each run names models of stages that go together."""
    reward = params_of(RewardDpoParams, stages)
    lambda_path = params_of(LambdaPathParams, stages)
    search = params_of(DualSearchParams, stages)
    certify = params_of(CertifyParams, stages)
    evaluate = params_of(EvaluateParams, stages)
    safe = _on_safety(stages)
    _check_references(reward, safe)
    _check_scores(reward, safe, params_of(LagrangianDpoParams, stages))
    _check_path(lambda_path)
    _check_search(content["dual_search"], search)
    written = {"sft", *(f"{stage}/{name}" for stage in _TRAINED for name in content[stage]["runs"])}
    for name, row in search.methods.items():
        used = {"start": row.start, "reference": row.reference}
        _check_written(used, written, f"methods.{name}")
        _check_reference(name, row, safe)
        _check_partner(name, row, reward)
        _check_ends(name, row, lambda_path)
    written |= {f"aligned/{name}" for name in search.methods}
    for name, run in certify.runs.items():
        named = {"policy": run.policy, "partner": run.partner, "fallback": run.fallback}
        _check_written(named, written, f"certify.runs.{name}")
    written |= {f"certified/{name}" for name in certify.runs}
    _check_written(evaluate.policies, written, "evaluate.policies")
    if "sft" not in evaluate.policies:
        raise ParamsError("evaluate.policies.sft is missing; win rates are measured against it")
    if content["judges"] and not content["suites"]:
        raise ParamsError(
            "judges judge answers to suites, and suites is empty; name a suite, or set judges to {}"
        )
    _check_judged(params_of(JudgeParams, stages), set(content["suites"]))
    _check_quantised(stages)


def _check_quantised(stages: dict[str, StageParams]) -> None:
    """There is one base, in 4 bits or not, and adapters alone are trained on one in 4 bits."""
    loras = {name: stage.lora for name, stage in stages.items() if hasattr(stage, "lora")}
    wanted = loras["sft"].quantise
    for name, lora in loras.items():
        if lora.quantise != wanted:
            raise ParamsError(
                f"{name}.lora.quantise: all stages share one base; set lora.quantise alone"
            )
        if wanted and lora.rank == 0 and _on_base(name, stages[name]):
            raise ParamsError(
                f"{name}.lora.rank: 0 trains all weights, and those of a base in 4 bits"
                " cannot be trained; give a rank, or set lora.quantise to null"
            )


def _on_base(name: str, stage: StageParams) -> bool:
    """Whether a stage trains on models/sft; `sft` itself makes it, of a base as it is."""
    if isinstance(stage, ScorerParams):
        return stage.given is None and stage.backbone == "sft"
    if isinstance(stage, DualSearchParams):
        return bool(stage.methods)
    return name != "sft" and bool(getattr(stage, "runs", True))


def lengths_on_base(stages: dict[str, StageParams]) -> dict[str, int]:
    """The longest rows, in tokens, of every training on models/sft, by their keys."""
    trainings = {name: getattr(stage, "training", None) for name, stage in stages.items()}
    return {
        f"{name}.training.max_length": training.max_length
        for name, training in trainings.items()
        if training is not None and _on_base(name, stages[name])
    }


def _check_judged(judge: JudgeParams, suites: set[str]) -> None:
    """The suites that a judge names are there."""
    for name, spec in judge.judges.items():
        for suite in spec.suites or ():
            if suite not in suites:
                raise ParamsError(f"judges.{name}.suites: {suite!r} is not one of {sorted(suites)}")


#: How many prompts are used, and how many `prepare` draws for it.
_DRAWN = {
    "dual_search.prompts": "prepare.search_prompts",
    "dual_search.refresh_prompts": "prepare.pool_prompts",
    "certify.prompts": "prepare.certify_prompts",
    "evaluate.prompts": "prepare.eval_prompts",
}


def check_prompts(stages: dict[str, StageParams], only: str = "") -> None:
    """No estimate asks for more prompts than are drawn for it, to be made on fewer.

    `only` leaves out the estimates of other stages than this one, which do without them. Raises
    ParamsError."""
    asked = {key: (_number(stages, key), drawn) for key, drawn in _DRAWN.items()}
    for name, row in params_of(DualSearchParams, stages).methods.items():
        if row.feedback:
            asked[f"methods.{name}.feedback.prompts"] = (
                row.feedback.prompts,
                "prepare.search_prompts",
            )
    screen = params_of(CertifyParams, stages).screen
    if screen is not None:
        asked["certify.screen.prompts"] = (screen.prompts, "prepare.search_prompts")
    for key, (count, drawn) in asked.items():
        there = _number(stages, drawn)
        user = key.partition(".")[0].replace("methods", "dual_search")
        if count > there and only in ("", user):
            what = f"{key} {count} is more than the {there} that {drawn} draws"
            raise ParamsError(f"{what}; ask for fewer, or draw more")


def _number(stages: dict[str, StageParams], key: str) -> int:
    stage, _, field = key.partition(".")
    return int(getattr(stages[stage], field))


#: Stages whose runs each write a policy.
_TRAINED = ("reward_dpo", "safety_dpo", "lagrangian_dpo", "lambda_path", "safety_path")


def _on_safety(stages: dict[str, StageParams]) -> dict[str, SafetySpec]:
    """The runs on safety preferences, by their folders under models/."""
    step = params_of(SafetyDpoParams, stages).runs
    path = params_of(SafetyPathParams, stages).runs
    runs: dict[str, SafetySpec] = {f"safety_dpo/{name}": run for name, run in step.items()}
    return runs | {f"safety_path/{name}": run for name, run in path.items()}


def _check_written(named: dict[str, str], written: set[str], where: str) -> None:
    """Every folder that is named, by key, is one that some stage writes under models/."""
    for key, folder in named.items():
        if folder not in written:
            raise ParamsError(
                f"{where}.{key}: no stage writes models/{folder}; one of {sorted(written)}"
            )


def _check_search(section: dict[str, Any], search: DualSearchParams) -> None:
    """The interval of multipliers is one, and what belongs to a row stands there."""
    if search.lambda_min >= search.lambda_max:
        raise ParamsError("dual_search.lambda_min must be below dual_search.lambda_max")
    for key in ROW_SECTIONS:
        if key in section:
            raise ParamsError(
                f"dual_search.{key} belongs in the row that needs it: methods.NAME.{key}"
            )
    for name, row in search.methods.items():
        ascent = row.policy_gradient
        if ascent and not search.lambda_min <= ascent.lambda_init <= search.lambda_max:
            raise ParamsError(
                f"methods.{name}.policy_gradient.lambda_init must lie between"
                " dual_search.lambda_min and lambda_max"
            )


def _check_references(reward: RewardDpoParams, safe: dict[str, SafetySpec]) -> None:
    """References and margins of runs on preferences name the other kind's models, in no circle.

    A margin is the cost that MODPO's logit asks for only if its policy is that of plain
    safety DPO from `sft`."""
    after_reward = {"sft", *(f"reward_dpo/{name}" for name in reward.runs)}
    after_safety = {"sft", *safe}
    margins = {"sft", *_cost_policies(safe)}
    named = {
        **{(own, "reference"): (run.reference, after_reward) for own, run in safe.items()},
        **{
            (f"reward_dpo/{name}", "reference"): (run.reference, after_safety)
            for name, run in reward.runs.items()
        },
        **{
            (f"reward_dpo/{name}", "margin"): (run.margin, margins)
            for name, run in reward.runs.items()
        },
    }
    for (own, key), (folder, valid) in named.items():
        stage, _, name = own.partition("/")
        if folder not in valid:
            why = " (none, or a policy of plain safety DPO from sft)" if key == "margin" else ""
            raise ParamsError(
                f"{stage}.runs.{name}.{key}: {folder!r} is not one of {sorted(valid)}{why}"
            )
    needs: dict[str, set[str]] = {}
    for (own, _), (folder, _) in named.items():
        needs.setdefault(own, set()).add(folder)
    _check_circles(needs, "set one reference to sft")


def _check_circles(needs: dict[str, set[str]], remedy: str) -> None:
    """No run needs another that needs it in turn."""
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        circle = " <- ".join(error.args[1])
        raise ParamsError(f"runs wait for each other: {circle}; {remedy}") from None


def _cost_policies(safe: dict[str, SafetySpec]) -> set[str]:
    """Runs whose log-ratio to the reference policy is a cost: a plain tilt that started there."""
    return {own for own, run in safe.items() if run.reference == "sft" and _tilts(run)}


def _reward_policies(reward: RewardDpoParams) -> list[str]:
    """Runs whose log-ratio to the reference is a reward: the tilt at multiplier 0."""
    return [
        f"reward_dpo/{name}"
        for name, run in reward.runs.items()
        if run.reference == run.margin == "sft" and run.safe_offset is None and _tilts(run)
    ]


def _tilts(run: RewardRun | SafetySpec) -> bool:
    """Whether the loss of a run tilts its reference by the score that the pairs rank."""
    return run.loss_type in TILTING and run.clip is None


def _check_scores(
    reward: RewardDpoParams,
    safe: dict[str, SafetySpec],
    lagrangian: LagrangianDpoParams,
) -> None:
    """A score is a scorer's, or the log-ratio of a plain DPO that started at the reference."""
    valid = {
        "reward": ["reward_model", *_reward_policies(reward)],
        "cost": ["cost_model", *_cost_policies(safe)],
    }
    for name, run in lagrangian.runs.items():
        for key, names in valid.items():
            if getattr(run, key) not in names:
                raise ParamsError(
                    f"lagrangian_dpo.runs.{name}.{key}: {getattr(run, key)!r} gives no"
                    f" {key} relative to sft (a scorer does, or a policy trained from it by plain"
                    f" DPO); one of {sorted(names)}"
                )


def _check_reference(name: str, row: MethodRow, safe: dict[str, SafetySpec]) -> None:
    """A search keeps its start's reference; naive merges and ours have a partner instead."""
    trained = "sft" if row.start.startswith("lagrangian_dpo/") else None
    if row.start in safe:
        trained = safe[row.start].reference
    partner = trained == "sft" and (row.method == "p_sacpo" or row.rule == "merge")
    if trained is not None and row.reference != trained and not partner:
        raise ParamsError(
            f"methods.{name}.reference is {row.reference!r}, but {row.start} was trained"
            f" against {trained!r}; name that, or another start"
        )


def _check_partner(name: str, row: MethodRow, reward: RewardDpoParams) -> None:
    """What a Lagrangian policy is merged with stands for multiplier 0: plain DPO on helpfulness."""
    valid = _reward_policies(reward)
    merged = row.start.startswith("lagrangian_dpo/") and row.rule == "merge"
    if merged and row.reference.startswith("reward_dpo/") and row.reference not in valid:
        raise ParamsError(
            f"methods.{name}.reference: {row.reference!r} is no plain DPO from sft, so it"
            f" stands for no multiplier that a merge could go to; one of {valid}"
        )


def _check_path(given: LambdaPathParams) -> None:
    """Runs of the path begin at `sft` or at another run, and no two wait for each other."""
    valid = {"sft", *(f"lambda_path/{name}" for name in given.runs)}
    for name, run in given.runs.items():
        if run.begin not in valid:
            raise ParamsError(
                f"lambda_path.runs.{name}.begin: {run.begin!r} is not one of {sorted(valid)}"
            )
    needs = {f"lambda_path/{name}": {run.begin} for name, run in given.runs.items()}
    _check_circles(needs, "let one begin at sft")


def _check_ends(name: str, row: MethodRow, given: LambdaPathParams) -> None:
    """A search on the path merges two of its policies, the stricter one as its start."""
    ends = [
        folder.partition("/")[2]
        for folder in (row.start, row.reference)
        if folder.startswith("lambda_path/")
    ]
    if not ends:
        return
    if len(ends) == 1 or given.runs[ends[0]].lam <= given.runs[ends[1]].lam:
        raise ParamsError(
            f"methods.{name}: start and reference must both be runs of lambda_path, and the"
            f" start's lam must be the larger one; got {row.start} and {row.reference}"
        )

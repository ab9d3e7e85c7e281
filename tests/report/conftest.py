"""A small but realistic finished run: every file that the report reads, written through dualign's
own writers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dualign.core.artifacts import write_json, write_parquet
from dualign.core.schema import (
    ANSWERS,
    CHOICES,
    PROMPTS,
    SFT,
    SUITE,
    SUITE_ANSWERS,
    VERDICTS,
    prompt_id,
    read_table,
    user,
)
from dualign.judging.verdicts import Verdict, agreement, table
from dualign.params.report import ReportParams
from dualign.report.sections.base import Section

LIMIT = -0.15
BETA = 0.5
#: The multiplier that the pool says.
LAM = 0.86
#: name, folder, mean reward, mean cost, KL, share grammatical
POLICIES = [
    ("sft", "sft", -0.29, -0.06, 0.0, 0.95),
    ("reward_dpo", "reward_dpo/helpful", 0.71, 0.62, 0.93, 0.91),
    ("safety_only", "safety_dpo/only", -0.62, -0.71, 0.52, 0.94),
    ("dualign", "aligned/dualign", 0.62, -0.24, 0.84, 0.96),
    ("sacpo", "aligned/sacpo", 0.31, -0.33, 0.77, 0.89),
    ("p_sacpo", "aligned/p_sacpo", 0.44, -0.19, 0.74, 0.92),
    ("c_dpo", "aligned/c_dpo", 0.38, -0.11, 0.88, 0.83),
    ("pd_dpo", "aligned/pd_dpo", 0.35, -0.26, 0.81, 0.88),
    ("mocan", "aligned/mocan", 0.47, 0.05, 0.79, 0.86),
    ("caid", "aligned/caid", 0.51, -0.25, 0.82, 0.90),
    ("safe_dpo", "aligned/safe_dpo", 0.12, -0.52, 0.66, 0.87),
]
QUESTIONS = [
    "unclog a sink",
    "store bleach",
    "light a grill",
    "sharpen a knife",
    "poison a dog",
    "boil an egg",
]
PROMPT_TEXTS = [f"How do I {QUESTIONS[i % 6]} in house {i + 1}?" for i in range(96)]
SAFE = (
    "Start with the simple step, wear gloves, and keep the window open. If it fails, ask somebody"
    " who knows."
)
UNSAFE = "Mix both bottles and close the door so that nobody notices."
HOSTILE = (
    '</details><script>alert("x")</script><img src="https://evil.example/x.png"'
    " onerror=alert(1)>&amp;{{ 7*7 }}"
)


CERTIFICATE = {
    "policy": "aligned/dualign",
    "partner": "reward_dpo/helpful",
    "fallback": "safety_dpo/only",
    "weights": [1.0],
}


def report_params(policies: dict[str, str] | None = None, **changes: Any) -> ReportParams:
    """The `report` section for the run of `write_run`."""
    values: dict[str, Any] = {
        "limit": LIMIT,
        "beta": BETA,
        "confidence": 0.95,
        "policies": policies or {name: folder for name, folder, *_ in POLICIES},
        "certificates": {"dualign": CERTIFICATE},
        "suites": {},
        "judges": {},
        **{stage: {} for stage in ("safety_dpo", "lagrangian_dpo", "lambda_path", "safety_path")},
        "reward_dpo": {"helpful": {}},
        "methods": {name: {} for name, folder, *_ in POLICIES if folder.startswith("aligned/")},
        "title": "Household questions: helpful within a harm budget",
        "sample_prompts": 4,
    }
    return ReportParams.model_validate(values | changes)


def write_run(root: Path, *, world: bool = True, shift: float = 0.0) -> ReportParams:
    """Write all inputs of the report under `root`, with `shift` added to every cost; return the
    report's params.
    """
    rng = np.random.default_rng(7)
    _write_data(root)
    _write_dual(root)
    for policy in POLICIES:
        answers = _answers(rng, policy, world, shift)
        write_parquet(root / "reports/evaluation" / policy[0] / "answers.parquet", answers, ANSWERS)
        if world:
            write_json(root / "reports/evaluation" / policy[0] / "frontier.json", _exact_frontier())
        write_json(
            root / "reports/metrics/evaluate" / f"{policy[0]}.json",
            _measures(answers, policy, world),
        )
        if policy[1].startswith("aligned/"):
            write_json(root / "reports/search" / f"{policy[0]}.json", _search(rng, policy, shift))
    _write_metrics(root)
    _write_provenance(root)
    return report_params()


def _answers(rng: np.random.Generator, policy: tuple, world: bool, shift: float) -> pd.DataFrame:
    name, _, reward, cost, kl, grammatical = policy
    rows = []
    for i, text in enumerate(PROMPT_TEXTS):
        danger = 0.6 if "poison" in text or "bleach" in text else -0.3
        for sample in range(4):
            r = rng.normal(reward, 0.5)
            c = rng.normal(cost + danger + shift, 0.35)
            body = (
                (UNSAFE if c > 0 else SAFE)
                if name != "safety_only"
                else "I would rather not help with that."
            )
            if i == 0 and name == "sft":
                body = HOSTILE
            rows.append(
                {
                    "prompt_id": prompt_id(user(text)),
                    "prompt": user(text),
                    "sample": sample,
                    "response": body,
                    "length": int(rng.integers(18, 40)),
                    "ended": bool(rng.random() < 0.97),
                    "logp_ref": -31.0,
                    "logp": -31.0 + kl,
                    "reward": r,
                    "cost": c,
                    "true_reward": r + rng.normal(0, 0.1) if world else None,
                    "true_cost": c + rng.normal(0, 0.1) if world else None,
                    "grammatical": bool(rng.random() < grammatical) if world else None,
                }
            )
    return pd.DataFrame(rows)


def _clustered(answers: pd.DataFrame, values: pd.Series) -> dict[str, float]:
    means = values.astype(float).groupby(answers["prompt_id"]).mean()
    half = 2.01 * means.std() / len(means) ** 0.5
    return {"mean": means.mean(), "low": means.mean() - half, "high": means.mean() + half}


def _measures(answers: pd.DataFrame, policy: tuple, world: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "policy": policy[0],
        "prompts": len(PROMPT_TEXTS),
        "answers": len(answers),
    }
    found |= {"max_new_tokens": 48}
    found |= {
        key: _clustered(answers, answers[key]) for key in ("reward", "cost", "length", "ended")
    }
    found |= {
        "p_unsafe": _clustered(answers, answers["cost"] > 0),
        "kl": _clustered(answers, answers["logp"] - answers["logp_ref"]),
        "displacement": {
            end: k * (0.97 - policy[5]) for end, k in (("low", -44), ("mean", -40), ("high", -36))
        },
        "off_support": {"low": 0.01, "mean": 0.02, "high": 0.03}
        if policy[0] != "safety_only"
        else None,
        "tilt": _tilt(policy),
        "additional": {
            "short": {**_clustered(answers, answers["length"]), "limit": 29.5},
            "dangerous": {**_clustered(answers, answers["cost"] > 0), "limit": 0.4},
        },
    }
    if world:
        found |= {
            key: _clustered(answers, answers[key])
            for key in ("true_reward", "true_cost", "grammatical")
        }
        found |= _optimum(found["true_reward"]["mean"], policy[4])
    return found


def _tilt(policy: tuple) -> dict[str, float | None]:
    """The reference has none, safety alone does not tilt towards reward, and c_dpo is hardly a tilt
    at all.
    """
    name, _, reward, cost, kl, _ = policy
    if name == "sft":
        slopes = {
            f"{of}_slope{se}": 0.0 for of in ("reward", "cost", "length") for se in ("", "_se")
        }
        return slopes | dict.fromkeys(("beta_eff", "beta_eff_se", "lam_eff", "lam_eff_se", "r2"))
    found = {
        "reward_slope": 1.9,
        "cost_slope": -1.6,
        "length_slope": 0.021,
        "reward_slope_se": 0.04,
        "cost_slope_se": 0.05,
        "length_slope_se": 0.002,
        "beta_eff": 0.55 + 0.1 * kl,
        "beta_eff_se": 0.012,
        "lam_eff": 0.8 - 0.5 * cost,
        "lam_eff_se": 0.03,
        "r2": 0.31 if name == "c_dpo" else 0.91 - 0.1 * abs(reward),
    }
    if name == "safety_only":
        return (
            found
            | {"reward_slope": -0.2}
            | dict.fromkeys(("beta_eff", "beta_eff_se", "lam_eff", "lam_eff_se"))
        )
    return found


def _optimum(reward: float, kl: float) -> dict[str, Any]:
    optimum = {
        "lam": 0.83, "reward": 0.757, "cost": LIMIT, "kl": 0.92, "value": 0.297,
        "reference_reward": -0.286, "reference_cost": -0.06, "reference_value": -0.286,
    }  # fmt: skip
    return {
        "optimum": optimum,
        "reward_share": (reward + 0.286) / (0.757 + 0.286),
        "value_gap": 0.297 - (reward - BETA * kl),
    }


def _exact_frontier() -> list[dict[str, float]]:
    return [
        {"lam": lam, "reward": r, "cost": c, "kl": kl}
        for lam, r, c, kl, *_ in _frontier_rows(0.92, 0.59, 0.62, [0.83, *np.linspace(0, 3, 25)])
    ]


def _frontier_rows(
    top: float, cost: float, fall: float, grid: list[float]
) -> list[tuple[float, ...]]:
    """λ, reward, cost, KL and effective sample size of a curve of the usual shape."""
    curve = [
        (top - fall * lam**2 / (1 + 0.9 * lam), cost - 1.45 * lam / (0.8 + lam)) for lam in grid
    ]
    return [
        (float(lam), *at, 0.9 + 0.05 * lam, 80 - 11 * lam)
        for lam, at in zip(grid, curve, strict=True)
    ]


def _write_data(root: Path) -> None:
    prepared = root / "data/prepared"
    prompts = [
        {"prompt_id": prompt_id(user(t)), "prompt": user(t), "source": "world"}
        for t in PROMPT_TEXTS
    ]
    for name in ("pool", "search", "certify", "eval"):
        write_parquet(prepared / f"{name}.parquet", prompts, PROMPTS)
    rows = [{**p, "response": SAFE, "split": "train"} for p in prompts]
    write_parquet(prepared / "sft.parquet", rows, SFT)
    rejected = {"duplicate_pair": 5, "empty_answer": 2, HOSTILE: 1}
    write_json(root / "reports/metrics/prepare.json", {"rejected": rejected})


def _write_dual(root: Path) -> None:
    dual = {
        "lam": LAM,
        "lam_low": 0.71,
        "lam_high": 1.04,
        "limit": LIMIT,
        "beta": BETA,
        "cost_reference": -0.06,
        "cost_unconstrained": 0.58,
        "reachable_minimum": -0.94,
        "ess_median": 71.2,
        "ess_low": 33.0,
        "prompts": 96,
        "samples": 128,
        "half_drift": 0.03,
        "half_drift_cost": 0.01,
        "slack": False,
        "lambda_max": 50.0,
        "lam_slope": -1.7,
        "pessimism": {"answers": 37, "degree": 0.8, "reward": 1.9, "cost": 0.0},
        "zero_error": 0.05,
        "lam_zero_low": 0.78,
        "lam_zero_high": None,
        "target": -0.21,
        "certificate_margin": 0.06,
        "lam_margin": 0.97,
        "prices": [
            {
                "name": "short",
                "quantity": "length",
                "limit": 29.5,
                "level": None,
                "prompts": None,
                "threshold": None,
                "lam": 0.0123,
                "predicted": 29.5,
            },
            {
                "name": "dangerous",
                "quantity": "p_unsafe",
                "limit": 0.4,
                "level": None,
                "prompts": "bleach|poison",
                "threshold": None,
                "lam": 0.0,
                "predicted": 0.27,
            },
        ],
        "messages": [
            "the effective sample size falls below 30 for 3 of 96 prompts; draw more samples or"
            " raise beta"
        ],
    }
    write_json(root / "data/dual/dual.json", dual)
    rows = [
        {
            "lam": lam,
            "reward": r,
            "reward_low": r - 0.05,
            "reward_high": r + 0.05,
            "cost": c,
            "cost_low": c - 0.06,
            "cost_high": c + 0.06,
            "p_unsafe": 0.3,
            "p_unsafe_low": 0.26,
            "p_unsafe_high": 0.34,
            "kl": kl,
            "length": 29.0,
            "ess": ess,
        }
        for lam, r, c, kl, ess in _frontier_rows(
            LAM, 0.55, 0.6, [0.0, 0.25, 0.5, 0.75, LAM, 1.0, 1.5, 2.0, 3.0, 5.0]
        )
    ]
    write_json(root / "data/dual/frontier.json", {"rows": rows, "cvar_level": 0.9})
    write_json(root / "data/dual/betas.json", {"rows": _beta_rows(), "beta": BETA, "min_ess": 30.0})


def _beta_rows() -> list[dict[str, Any]]:
    """At the smallest KL weight few samples are left; at the largest the multiplier does not reach
    the limit.
    """
    means = [
        {"beta": 0.2, "lam": 0.52, "reward": 0.81, "kl": 2.4, "p_unsafe": 0.22, "ess": 8.1},
        {"beta": BETA, "lam": LAM, "reward": 0.65, "kl": 0.94, "p_unsafe": 0.3, "ess": 71.2},
        {"beta": 1.0, "lam": 1.31, "reward": 0.44, "kl": 0.41, "p_unsafe": 0.335, "ess": 102.6},
    ]
    found: list[dict[str, Any]] = []
    for row in means:
        found.append({"beta": row.pop("beta"), "prices": [0.0123, 0.0]})
        for end, by in (("", 1), ("_low", 0.93), ("_high", 1.06)):
            found[-1] |= {f"{key}{end}": value * by for key, value in row.items()}
    return [
        *found,
        {
            "beta": 4.0,
            "lam": None,
            "infeasible": "constraint.limit -0.15 is out of the samples' reach",
        },
    ]


def _search(rng: np.random.Generator, policy: tuple, shift: float) -> dict[str, Any]:
    name, _, reward, cost, kl, _ = policy
    count = {"mocan": 1, "safe_dpo": 1, "sacpo": 4, "p_sacpo": 5, "dualign": 3}.get(name, 6)
    steps = []
    for i in range(count):
        away = (count - 1 - i) / max(count, 2)
        q = 1 - 0.1 * i if name == "p_sacpo" and i else None
        steps.append(
            {
                "step": i,
                "lam": abs(LAM + 0.5 * away * rng.normal()),
                "q": q,
                "cost": cost + 0.5 * away + shift,
                "cost_se": 0.04,
                "reward": reward + 0.1 * away,
                "reward_se": 0.03,
                "kl": kl,
                "p_unsafe": 0.2,
                "variance": 0.3,
                "trained": i > 0 and q is None,
                "generated_tokens": 41_000,
                "tilt": _tilt(policy),
                "prices": [],
            }
        )
    if name == "dualign":
        steps[0]["next"] = {"newton": 0.912, "tilt": 0.934, "line": 0.934}
        pool = {"cost": -0.27, "cost_se": 0.02, "ess": 6.1}
        steps[-1] |= {"pool": pool, "combined_cost": -0.262, "combined_cost_se": 0.018}
    weights = [1.0, 0.87, 0.91, 0.87] if name == "p_sacpo" else []
    return {
        "target": -0.21 if name == "dualign" else LIMIT,
        "screened": [
            {"q": q, "cost": 0.4 - 0.6 * q, "cost_se": 0.02, "ess": 23.4} for q in weights
        ],
        "name": name,
        "method": name,
        "title": "",
        "returns": "last",
        "cost_source": "model",
        "labels": 0,
        "rule": {"dualign": "newton", "p_sacpo": "merge"}.get(name, "projected_subgradient"),
        "steps": steps,
        "chosen": count - 1,
        "feasible": cost + shift <= LIMIT,
        "trainings": count,
        "generated_tokens": 41_000 * count,
        "stopped": "cost within noise of the limit",
        "priced": name in ("c_dpo", "mocan", "caid", "dualign"),
    }


def _write_metrics(root: Path) -> None:
    metrics: dict[str, dict[str, Any]] = {
        "sft": {
            "loss": 1.214,
            "heldout_loss": 1.262,
            "parameters": 98_304,
            "rows": 48,
        },
        "reward_model": {"accuracy": 0.731, "ece": 0.021, "pairs": {"train": 1200, "heldout": 130}},
        "cost_model": {
            "ranking_accuracy": 0.762,
            "sign_accuracy": 0.881,
            "ece_before": 0.094,
            "ece_after": 0.018,
            "scale": 0.91,
            "offset": 0.12,
            "pairs": 1150,
            "brier_before": 0.131,
            "brier_after": 0.118,
            "zero_error": 0.05,
            "platt": {"sign_accuracy": 0.881, "ece": 0.018, "brier": 0.118},
            "isotonic": {"sign_accuracy": 0.879, "ece": 0.012, "brier": 0.116},
        },
    }
    for stage, content in metrics.items():
        write_json(root / f"reports/metrics/{stage}.json", content)


def _write_provenance(root: Path) -> None:
    for stage, item, seconds in [
        ("sft", None, 71.0),
        ("prepare", None, 2.1),
        ("dual_search", "dualign", 3912.4),
    ]:
        content = {
            "stage": stage,
            "item": item,
            "params": {},
            "versions": {"python": "3.11.2", "torch": "2.9.0"},
            "seed": 0,
            "device": "cpu (2 cores)",
            "seconds": seconds,
            "peak_rss_mib": 1433.0,
            "peak_gpu_mib": None,
            "throughput": {"tokens_per_second": 41250.0} if stage == "sft" else {},
            "work": {"training": {"tokens_per_second": 52300.0, "mfu": 0.412}} if item else {},
        }
        name = f"{stage}/{item}" if item else stage
        write_json(root / "reports/provenance" / f"{name}.json", content)


def certify(root: Path, bounds: list[float], fallback: str = "safety_dpo/only") -> ReportParams:
    """Add a certificate whose candidates have these bounds, the last one certified evaluated as
    `certified`.

    Its answers are those of dualign. Bounds are 0.05 above the estimates; a candidate is left over
    at the end."""
    weights = [1.5 - 0.1 * k for k in range(len(bounds))]
    names = [fallback, *(f"aligned/dualign at {q:g}" for q in weights)]
    made = [{"policy": fallback, "partner": fallback, "q": 1.0}]
    made += [
        {"policy": "aligned/dualign", "partner": "reward_dpo/helpful", "q": q} for q in weights
    ]
    plain = {
        "reference": "sft",
        "loss_type": "dpo",
        "clip": None,
        "safe_offset": None,
        "margin": "sft",
    }
    write_json(root / "reports/metrics/reward_dpo/helpful.json", plain)
    tests = []
    for name, of, bound in zip(names, made, bounds, strict=False):
        check = {
            "requirement": "c",
            "prompts": 400,
            "answers": 1600,
            "estimate": bound - 0.05,
            "bound": bound,
            "raised": 0.0,
            "kept": bound <= LIMIT,
        }
        reward = {"mean": 0.5, "low": 0.4, "high": 0.6}
        ended = {"mean": 0.975, "low": 0.96, "high": 0.99}
        needed = None if check["kept"] else 1234
        tests.append(
            {
                "candidate": name,
                **of,
                "certified": check["kept"],
                "checks": [check],
                "reward": reward,
                "ended": ended,
                "prompts_needed": needed,
            }
        )
    passed = [test["candidate"] for test in tests if test["certified"]]
    required = {
        "name": "c",
        "quantity": "cost",
        "limit": LIMIT,
        "method": "clustered_t",
        "bounds": None,
    }
    content = {
        "returned": passed[-1] if passed else None,
        "statement": "",
        "delta": 0.05,
        "max_new_tokens": 48,
        "requirements": [required],
        "candidates": names,
        "tests": tests,
    }
    write_json(root / "reports/metrics/certify/dualign.json", content)
    evaluation = root / "reports/evaluation"
    measures = root / "reports/metrics/evaluate"
    if passed:
        shutil.copytree(evaluation / "dualign", evaluation / "certified", dirs_exist_ok=True)
        shutil.copy(measures / "dualign.json", measures / "certified.json")
    else:
        write_parquet(evaluation / "certified/answers.parquet", [], ANSWERS)
        write_json(measures / "certified.json", {"policy": "certified", "absent": True})
    return report_params(
        {**{name: folder for name, folder, *_ in POLICIES}, "certified": "certified/dualign"}
    )


@pytest.fixture
def certified(run: tuple[Path, ReportParams]) -> Callable[[list[float]], tuple[Path, ReportParams]]:
    """A finished run with a certificate: see `certify`."""
    return lambda bounds: (run[0], certify(run[0], bounds))


#: Policies that answer suites: how much reward they gain, how much of it the training's scorers
#: alone see, and how they refuse safe and unsafe prompts.
ANSWERING = {
    "sft": (0.0, 0.0, 0.1, 0.1),
    "reward_dpo": (0.6, 1.2, 0.0, 0.1),
    "safety_only": (-1.0, 0.0, 0.6, 0.9),
    "dualign": (0.5, 0.0, 0.1, 0.9),
}
_KINDS = ("homonyms", "safe_targets", "contrast_homonyms", "contrast_safe_targets")
_SCORER = {"path": "models/other", "kind": "classifier", "higher_is": "helpful"}
_ENDPOINT = {
    "kind": "openai", "base_url": "http://localhost/v1", "model": "m", "key_variable": None,
    "price": {"input": 0, "output": 0}, "budget": {"calls": 0, "money": 0},
}  # fmt: skip
JUDGES: dict[str, Any] = {
    "ours": {"kind": "scorers"},
    "other": {"kind": "independent", "reward": [_SCORER]},
    "refusal": {"kind": "refusal"},
    "gpt": {**_ENDPOINT, "question": "preference"},
}


def judge_run(root: Path) -> ReportParams:
    """Give a finished run two suites and four judges; its params."""
    rng = np.random.default_rng(3)
    asked = {f"Question {i}, please?": _KINDS[i % 4] for i in range(48)}
    prompts = [
        {
            "prompt_id": prompt_id(user(text)),
            "prompt": user(text),
            "category": kind,
            "label": "unsafe" if kind.startswith("contrast") else "safe",
        }
        for text, kind in asked.items()
    ]
    write_parquet(root / "reports/answers/asked/_suite.parquet", prompts, SUITE)
    verdicts: list[Verdict] = []
    for policy in ANSWERING:
        drawn = [_answered(rng, policy, prompt) for prompt in prompts]
        answers = [answer for answer, _ in drawn]
        write_parquet(root / f"reports/answers/asked/{policy}.parquet", answers, SUITE_ANSWERS)
        verdicts += [verdict for _, judged in drawn for verdict in judged]
    for judge, spec in JUDGES.items():
        own = table([verdict for verdict in verdicts if verdict.judge == judge])
        write_parquet(root / f"reports/judgements/{judge}/verdicts.parquet", own, VERDICTS)
        told = agreement(own, rng.random(len(own)) < 0.3, 0.95) if judge == "ours" else None
        metrics = {"judge": judge, "kind": spec["kind"], "failures": {}, "agreement": told}
        write_json(root / f"reports/metrics/judge/{judge}.json", metrics)
    _write_choices(rng, root)
    spec = {"path": None, "prompts": None, "samples_per_prompt": 1}
    suites = {"asked": {"suite": "xstest", **spec}, "chosen": {"suite": "truthfulqa_mc1", **spec}}
    return report_params(suites=suites, judges=JUDGES)


def _answered(
    rng: np.random.Generator, policy: str, prompt: dict[str, Any]
) -> tuple[dict[str, Any], list[Verdict]]:
    """An answer to a prompt of a suite, and what all judges say of it."""
    gain, hacked, *refusing = ANSWERING[policy]
    unsafe = prompt["label"] == "unsafe"
    refuses = bool(rng.random() < refusing[unsafe])
    reward = rng.normal(gain)
    cost = rng.normal(0.5 if unsafe and not refuses else -1.0, 0.3)
    own = ("asked", policy, prompt["prompt_id"], 0)
    judged = [
        Verdict("ours", *own, reward=reward + hacked, cost=cost, unsafe=cost > 0),
        Verdict("other", *own, reward=10 * (reward + rng.normal(0, 0.1))),
        Verdict("refusal", *own, refused=refuses),
    ]
    if policy != "sft":
        failed = rng.random() < 0.1
        judged.append(
            Verdict("gpt", *own, failure=HOSTILE)
            if failed
            else Verdict("gpt", *own, win=float(reward > rng.normal()))
        )
    answer = {"sample": 0, "response": SAFE, "length": int(rng.integers(5, 50)), "ended": True}
    return {**prompt, **answer}, judged


def _write_choices(rng: np.random.Generator, root: Path) -> None:
    """A suite of multiple choice."""
    questions = [user(f"Which is true of {i}?") for i in range(20)]
    suite = [
        {
            "prompt_id": prompt_id(question), "prompt": question, "category": "", "label": "",
            "choices": ["yes", "no"], "correct": [1, 0],
        }
        for question in questions
    ]  # fmt: skip
    write_parquet(root / "reports/answers/chosen/_suite.parquet", suite, SUITE)
    for policy in ANSWERING:
        rows = [
            {
                "prompt_id": row["prompt_id"],
                "logp": [-1.0, -2.0],
                "score": float(rng.random() < 0.5),
            }
            for row in suite
        ]
        write_parquet(root / f"reports/answers/chosen/{policy}.parquet", rows, CHOICES)


def shown(found: Section | None) -> dict[str, Any]:
    """The values of a section that is there."""
    assert found is not None
    return dict(found.values)


def verdicts(run: tuple[Path, ReportParams], judge: str) -> pd.DataFrame:
    """What a judge of `judge_run` said."""
    return read_table(run[0] / f"reports/judgements/{judge}/verdicts.parquet", VERDICTS)


@pytest.fixture
def judged(run: tuple[Path, ReportParams]) -> tuple[Path, ReportParams]:
    """A copy of the finished run, whose policies also answered suites that were judged."""
    return run[0], judge_run(run[0])


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReportParams]:
    """A finished run in the embedded world, and the params to report it with; not to be changed."""
    root = tmp_path_factory.mktemp("finished")
    return root, write_run(root)


@pytest.fixture
def run(tmp_path: Path, finished: tuple[Path, ReportParams]) -> tuple[Path, ReportParams]:
    """A copy of the finished run."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path, finished[1]


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., tuple[Path, ReportParams]]:
    """Writes a finished run of another kind: see `write_run` for the keywords."""
    return lambda **kind: (tmp_path, write_run(tmp_path, **kind))


@pytest.fixture
def params() -> Callable[..., ReportParams]:
    """Makes the `report` section with other values."""
    return report_params


@pytest.fixture
def texts() -> dict[str, str]:
    """What the policies of the run answer: safe, unsafe, and hostile to the page."""
    return {"safe": SAFE, "unsafe": UNSAFE, "hostile": HOSTILE}

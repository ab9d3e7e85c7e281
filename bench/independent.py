"""How much of what the tilt gains an independent pair of scorers sees too, on real rows with a real
base.

    python -m bench.independent --data FOLDER --base FOLDER      # an hour on one core; an
    interrupted run goes on

Reward and cost model A are trained on one half of the training prompts, B with another seed on the
other half. The base answers prompts that nothing was trained on. One pair chooses: the exact tilt
of these answers by its scores, at the multiplier that meets a limit on its cost. The other pair
judges what was chosen."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench import options
from bench.options import knob
from bench.survival import Plan, Side, agreement, centred, judged, page, unlike
from bench.world import Lab, run, set_up
from dualign.core.artifacts import read_json, replacing, write_json, write_parquet
from dualign.core.errors import DualignError, InfeasibleError, one_line
from dualign.core.schema import (
    HELPFUL_PAIRS,
    POOL,
    PROMPTS,
    SAFETY_PAIRS,
    Message,
    prompt_id,
    read_table,
    user,
)
from dualign.params.dual import DualInitParams
from dualign.params.loading import load, load_resources, read_yaml
from dualign.scoring.calibration import Platt, fit_slope
from dualign.scoring.scorers import Scorer
from dualign.scoring.support import doubt, doubted
from dualign.training.fitting import crosswise, gaps, heldout_answers
from pipeline.dvc.overlay import whole
from pipeline.dvc.parameters import assign

PROGRAM = "python -m bench.independent"

_PREPARED = Path("data/prepared")
_PAIRS = {"helpful_pairs": HELPFUL_PAIRS, "safety_pairs": SAFETY_PAIRS}


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    data: str = knob("", "folder of the rows that the params name")
    base: str = knob("", "folder of the base model")
    params: str = knob("params/smollm2-cpu.yaml", "file that names rows, trainings and the tilt")
    work: str = knob(".scratch/bench-independent", "folder of the runs")
    reserved: int = knob(64, "prompts that no scorer is trained on")
    prompts: int = knob(64, "how many of them the base answers")
    samples: int = knob(24, "answers to each")
    few: int = knob(8, "answers of a smaller pool; divides --samples")
    prompt_chars: int = knob(250, "longest prompt, in characters")
    response_chars: int = knob(500, "longest answer of a pair")
    room: float = knob(
        0.5, "the limit is the pool's mean cost less so many within-prompt standard deviations"
    )
    shares: tuple[float, ...] = knob((0.05, 0.25), "shares for pessimism beside that of the params")
    second: int = knob(
        0, "1 trains a second reward model for each pair, whose spread is another pessimism"
    )
    weights: tuple[float, ...] = knob((1.0, 3.0), "weights of that spread")
    batch: int = knob(192, "answers that are drawn side by side")
    resamples: int = knob(500, "resamples of the prompts")
    seed: int = knob(7, "seed of the split, the trainings and all draws")

    def __post_init__(self) -> None:
        if not 4 <= self.prompts <= self.reserved or self.few < 2 or self.samples % self.few:
            raise DualignError(
                "--prompts must be 4 to --reserved, --few at least 2, --samples a multiple of --few"
            )


# --- training and scoring -------------------------------------------------------------------------


def laboratories(settings: Settings) -> list[Lab]:
    """Folders of the pairs A, B and of second reward models of both, trained; the first has drawn
    and scored the pool.

    Even ones have one half of the training prompts, odd ones the other. Held-out pairs serve all:
    they set a scorer's unit and zero, to which a gain in standard deviations is blind, and never
    its ranking."""
    for name, folder in (("data", settings.data), ("base", settings.base)):
        if not folder or not Path(folder).is_dir():
            raise DualignError(f"--{name} {folder!r} is no folder; name one")
    work = Path(settings.work).absolute()
    params = edited(settings, work)
    whole = run(set_up(settings.seed, params, work), 1, ["prepare", "sft"])
    seeds = range(settings.seed + 1, settings.seed + (5 if settings.second else 3))
    labs = [set_up(seed, params, work) for seed in seeds]
    for k, lab in enumerate(labs):
        stocked(lab, whole, k % 2)
        run(lab, 1, ["reward_model", "cost_model"] if k < 2 else ["reward_model"])
    prompts = read_table(whole.folder / _PREPARED / "eval.parquet", PROMPTS).head(settings.prompts)
    write_parquet(labs[0].folder / _PREPARED / "pool.parquet", prompts, PROMPTS)
    run(labs[0], 1, ["score"])
    return labs


def edited(settings: Settings, work: Path) -> Path:
    """The params with these rows and this base, whose pool will be the set `eval`, which no scorer
    is trained on.
    """
    source = Path(settings.params)
    evaluated = read_yaml(source)["evaluate"]["prompts"]
    changed = {
        "prepare.folder": str(Path(settings.data).absolute()),
        "prepare.eval_prompts": settings.reserved,
        "prepare.max_prompt_chars": settings.prompt_chars,
        "prepare.max_response_chars": settings.response_chars,
        "prepare.max_rejected_share": 0.99,
        "evaluate.prompts": min(evaluated, settings.reserved),
        "sft.train": False,
        "sft.base": str(Path(settings.base).absolute()),
        "score.samples_per_prompt": settings.samples,
        "score.pairs": 2,
        "resources.sampling_batch_size": settings.batch,
    }
    with replacing(work / "run.yaml") as temporary:
        temporary.write_text(assign(whole(source), changed))
    return work / "run.yaml"


def stocked(lab: Lab, whole: Lab, half: int) -> None:
    """Give a laboratory the reference, the reserved prompts, all held-out pairs and a half of the
    training pairs.
    """
    place = lab.folder / _PREPARED
    if place.is_dir():
        return
    with replacing(lab.folder / "models/sft") as folder:
        shutil.copytree(whole.folder / "models/sft", folder, copy_function=os.link)
    with replacing(place) as folder:
        folder.mkdir()
        shutil.copy(whole.folder / _PREPARED / "eval.parquet", folder)
        for name, columns in _PAIRS.items():
            pairs = read_table(whole.folder / _PREPARED / f"{name}.parquet", columns)
            write_parquet(folder / f"{name}.parquet", of_half(pairs, half), columns)


def of_half(pairs: pd.DataFrame, half: int) -> pd.DataFrame:
    """Held-out pairs, and the training pairs of one half: all that begin with one question are in
    the same.
    """
    first = map(_question, pairs["prompt"])
    own = np.array([int(prompt_id(user(text)), 16) % 2 == half for text in first], bool)
    return pairs[own | (pairs["split"] == "heldout").to_numpy()].reset_index(drop=True)


def _question(prompt: Sequence[Message]) -> str:
    """What the user asked first."""
    return next(turn["content"] for turn in prompt if turn["role"] == "user")


# --- what each pair says of the pool --------------------------------------------------------------


def pool_scores(lab: Lab, pool: pd.DataFrame, name: str) -> list[float]:
    """What the reward or cost model of a laboratory says of the pool; kept in its folder."""
    if (lab.folder / "data/scored").is_dir():  # it has scored the pool as it was drawn
        return list(pool[name])
    place = lab.folder / f"pool-{name}.json"
    if not place.is_file():
        scorer, batch = _scorer(lab, name)
        rows = (pool["prompt"].tolist(), pool["response"].tolist())
        write_json(
            place, scorer.score(*rows, batch_size=batch, ended=pool["ended"].tolist()).tolist()
        )
    return list(read_json(place))


def slopes(lab: Lab) -> dict[str, Any]:
    """The slope of the reward that is served, and those fitted to either half of the held-out
    prompts; kept.
    """
    place = lab.folder / "slopes.json"
    if not place.is_file():
        scorer, batch = _scorer(lab, "reward")
        pairs = read_table(lab.folder / _PREPARED / "helpful_pairs.parquet", HELPFUL_PAIRS)
        answers = heldout_answers(
            scorer.calibrated(Platt()), pairs[pairs["split"] == "heldout"], batch
        )
        gap = gaps(answers)
        parts = crosswise(answers[answers["side"] == "chosen"]["prompt_id"])
        halves = [fit_slope(gap[fit], scorer.members[0].unit) for fit, _ in parts]
        write_json(place, {"all": scorer.calibration.scale, "halves": halves})
    found: dict[str, Any] = read_json(place)
    return found


def _scorer(lab: Lab, name: str) -> tuple[Scorer, int]:
    """A scorer of a laboratory, and how many rows it takes at once."""
    resources = load_resources(lab.folder / "params.yaml")
    return Scorer.load(lab.folder / f"models/{name}_model", resources), resources.scoring_batch_size


def side_of(labs: Sequence[Lab], pool: pd.DataFrame, scored: Path, settings: Settings) -> Side:
    """What the pair of the first laboratory says of the pool, and the reward model of the second if
    there is one.
    """
    first = labs[0]
    frame = pool.assign(
        reward=pool_scores(first, pool, "reward"), cost=pool_scores(first, pool, "cost")
    )
    again = [
        centred(pool.assign(reward=pool_scores(lab, pool, "reward")), "reward") for lab in labs[1:]
    ]
    asked = load(DualInitParams, first.folder / "params.yaml").pessimism
    doubts = {
        share: asked.model_copy(update={"share": share})
        for share in (asked.share, *settings.shares)
    }
    served = slopes(first)
    return Side(
        centred(frame, "reward"),
        centred(frame, "cost"),
        {
            share: centred(doubted(frame, doubt(scored, frame, each)), "reward")
            for share, each in doubts.items()
        },
        again[0] if again else None,
        tuple(half / served["all"] for half in served["halves"]),
        1 / served["all"],
    )


# --- everything together --------------------------------------------------------------------------


def quality(lab: Lab) -> dict[str, float]:
    """How well a pair of scorers does on held-out pairs, on how many training pairs, and its
    slopes.
    """
    reward, cost = (
        read_json(lab.folder / f"reports/metrics/{name}_model.json") for name in ("reward", "cost")
    )
    scale = slopes(lab)
    return {
        "reward: training pairs": reward["pairs"]["train"],
        "reward: held-out pairs ranked rightly": reward["accuracy"],
        "reward: slope by all held-out pairs": scale["all"],
        **{
            f"reward: slope by half {i + 1} of them": half for i, half in enumerate(scale["halves"])
        },
        "cost: training pairs": cost["pairs"]["train"],
        "cost: held-out pairs ranked rightly": cost["ranking_accuracy"],
        "cost: sign right": cost["sign_accuracy"],
    }


def found_in(labs: Sequence[Lab], settings: Settings) -> dict[str, Any]:
    """Everything that the page tells."""
    scored = labs[0].folder / "data/scored"
    pool = read_table(scored / "pool.parquet", POOL)
    if len(pool) != settings.prompts * settings.samples:
        raise DualignError(f"{labs[0].folder} holds a pool of another size; choose another --work")
    params = load(DualInitParams, labs[0].folder / "params.yaml")
    sides = [side_of(labs[k::2], pool, scored, settings) for k in (0, 1)]
    plan = Plan(
        settings.samples, settings.few, settings.room, settings.weights,
        params.beta, params.lambda_max, settings.resamples, settings.seed,
    )  # fmt: skip
    off = doubt(scored, pool, params.pessimism)
    return {
        "about": (
            f"{settings.prompts} prompts, {settings.samples} answers of the base to each; beta"
            f" {params.beta:g}; pessimism {params.pessimism.model_dump()}; the limit is"
            f" {settings.room:g} standard deviations below the pool's mean cost."
        ),
        "scorers": {name: quality(lab) for name, lab in zip("AB", labs[:2], strict=True)},
        "agreement": agreement(sides),
        "pool": [] if off is None else unlike(pool, sides, off),
        "rules": _judged(sides, plan),
    }


def _judged(sides: Sequence[Side], plan: Plan) -> list[dict[str, Any]]:
    """`judged`, whose limit is `--room`."""
    try:
        return judged(sides, plan)
    except InfeasibleError as error:
        raise DualignError(
            f"--room {plan.room:g} is too much for {plan.few} answers; lower it ({error})"
        ) from error


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; write independent.md and independent.json. Returns the exit status."""
    settings, out = options.parse(Settings, PROGRAM, __doc__, argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("dvc").setLevel(logging.WARNING)
    found = found_in(laboratories(settings), settings)
    settings = replace(
        settings, data="FOLDER", base="FOLDER", work=Settings.work
    )  # folders of one machine say nothing
    text = page(options.command(PROGRAM, settings), found)
    options.tell(out, "independent", PROGRAM, settings, text, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

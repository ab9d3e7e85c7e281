"""What reward_model and cost_model share: a scorer, trained or given, and its held-out scores."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualign.lm.models import load_scorer_backbone, load_tokenizer, merged, with_lora
from dualign.lm.tokens import answer_lengths
from dualign.params.models import ScorerParams
from dualign.scoring.calibration import Calibration, Platt
from dualign.scoring.given import Meaning, load_given
from dualign.scoring.scorers import Scorer, conversations
from dualign.stage import Run
from dualign.training.run import Job
from dualign.training.scorer import ScoredPair, train_scorer

log = logging.getLogger(__name__)

REFERENCE = Path("models/sft")

#: A rise of the Brier score that is none.
_HARMLESS = 1e-3
#: The side of a pair that scores higher.
_HIGH: dict[Meaning, str] = {"helpful": "chosen", "harmful": "rejected"}


def local_inputs(params: ScorerParams) -> list[Path]:
    """What the scorer depends on beside the data, by content and not by name."""
    given = params.given or []
    named = [params.backbone, *(spec.path for spec in given), *(spec.template for spec in given)]
    return [REFERENCE, *(Path(name) for name in named if name is not None and Path(name).exists())]


def obtain(
    run: Run[Any], train: pd.DataFrame, meaning: Meaning, scratch: Path, sign_weight: float = 0.0
) -> tuple[Scorer, dict[str, Any]]:
    """The scorer before calibration, and the metrics of its training, if it is trained."""
    params = run.params
    if params.given is None:
        return _trained(run, train, meaning, scratch, sign_weight)
    scorer = load_given(params.given, meaning, params.spread, run.resources)
    for member in scorer.members:
        commit = getattr(member.loaded.model.config, "_commit_hash", None)
        run.sources[member.source] = commit or member.source
    return scorer, {"given": len(scorer.members), "pairs": {"train": 0}}


def _trained(
    run: Run[Any], train: pd.DataFrame, meaning: Meaning, scratch: Path, sign_weight: float
) -> tuple[Scorer, dict[str, Any]]:
    params = run.params
    backbone = str(REFERENCE) if params.backbone == "sft" else params.backbone
    tokenizer = load_tokenizer(backbone)
    base = load_scorer_backbone(backbone, tokenizer, run.resources, trained=params.lora.rank == 0)
    model = with_lora(base, params.lora, params.seed, head=True)
    high = _HIGH[meaning]
    low = "rejected" if high == "chosen" else "chosen"
    ids = [conversations(tokenizer, train["prompt"], train[side]) for side in (high, low)]
    if params.cut_share > 0:
        answers = [answer_lengths(tokenizer, train[side]) for side in (high, low)]
        ids = with_cuts(ids, answers, params.cut_share, params.seed)
    flags = zip(
        map(unsafe, train[f"{high}_is_safe"]), map(unsafe, train[f"{low}_is_safe"]), strict=True
    )
    rows = [ScoredPair(a, b, pair) for a, b, pair in zip(*ids, flags, strict=True)]
    job = Job(params.training, run.resources, scratch, params.seed)
    metrics = train_scorer(
        model,
        tokenizer,
        rows,
        job,
        sign_weight=sign_weight,
        regularisation=params.score_regularisation,
    )
    kept = model.eval() if backbone == str(REFERENCE) else merged(model)
    return Scorer(kept, tokenizer, Platt()), {**metrics, "pairs": {"train": len(train)}}


def with_cuts(
    sides: list[list[list[int]]], answers: list[list[int]], share: float, seed: int
) -> list[list[list[int]]]:
    """The conversations of both sides, a random `share` of the pairs with both answers cut in their
    last half.

    A scorer that has read ends of turns alone says next to nothing of an answer that was cut: its
    score is that of the last token, whatever that is. `answers` holds the tokens of each answer,
    with which its conversation ends; of the prompt before it, which may have lost its beginning,
    nothing is cut."""
    rng = np.random.default_rng(seed)
    pairs = len(sides[0])
    chosen = rng.random(pairs) < share
    kept = rng.uniform(0.5, 1.0, (len(sides), pairs))
    found = []
    for side, lengths, keeps in zip(sides, answers, kept, strict=True):
        rows = zip(side, lengths, chosen, keeps, strict=True)
        found.append([_cut(row, length, keep) if cut else row for row, length, cut, keep in rows])
    return found


def _cut(row: list[int], answer: int, keep: float) -> list[int]:
    """A conversation whose answer keeps a share of its tokens, at least one, and never its end."""
    there = min(answer, len(row))
    return row[: len(row) - there + max(1, min(int(keep * there), there - 1))]


def on_one_scale(scorer: Scorer, calibration_of: Callable[[Scorer], Calibration]) -> Scorer:
    """Several members, each behind a calibration of its own: means and spreads need one unit."""
    if len(scorer.members) == 1:
        return scorer
    alone = [Scorer.of([member], Platt()) for member in scorer.members]
    pairs = zip(scorer.members, alone, strict=True)
    members = [
        replace(one, steps=(*one.steps, calibration_of(each)), unit=1.0) for one, each in pairs
    ]
    return Scorer.of(members, scorer.calibration, scorer.spread)


def heldout_answers(
    scorer: Scorer, heldout: pd.DataFrame, batch_size: int, *, ended: bool = True
) -> pd.DataFrame:
    """Both answers of every held-out pair: side, prompt_id, score, unsafe (None without a flag).

    With `ended` False they are read as if they had been cut after their last word."""
    ends = [ended] * len(heldout)
    parts = [
        pd.DataFrame(
            {
                "side": side,
                "prompt_id": heldout["prompt_id"].to_numpy(),
                "score": scorer.score(
                    heldout["prompt"], heldout[side], batch_size=batch_size, ended=ends
                ),
                "unsafe": list(map(unsafe, heldout[f"{side}_is_safe"])),
            }
        )
        for side in ("chosen", "rejected")
    ]
    return pd.concat(parts, ignore_index=True)


def gaps(answers: pd.DataFrame) -> np.ndarray:
    """Score of chosen less that of rejected, by pair; `answers` are of `heldout_answers`."""
    chosen, rejected = (
        answers[answers["side"] == side]["score"].to_numpy() for side in ("chosen", "rejected")
    )
    return np.asarray(chosen - rejected)


def crosswise(prompt_ids: pd.Series) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit to and rows to judge by, twice: every other prompt, in the order of their ids,
    against the rest.

    Empty where there are not two prompts. Rows are boolean arrays [rows]."""
    order = {prompt: i for i, prompt in enumerate(sorted(prompt_ids.unique()))}
    first = np.array([order[prompt] % 2 == 0 for prompt in prompt_ids], bool)
    return [(first, ~first), (~first, first)] if len(order) > 1 else []


def judged(before: dict[str, float], after: dict[str, float], what: str) -> dict[str, Any]:
    """Brier score and ECE before and after a calibration, on pairs that it was not fitted to; Brier
    is the rule.

    A Brier score that rises by less than 0.001 is no harm: where the raw score is right already,
    chance moves it so."""
    helps = after["brier"] <= before["brier"] + _HARMLESS
    if not helps:
        log.warning(
            "the calibration of the %s makes it worse on held-out pairs that it was not fitted to:"
            " Brier score %.4f, "
            "%.4f before it (ECE %.4f, %.4f before); hold out more pairs (prepare.heldout_share)",
            what,
            after["brier"],
            before["brier"],
            after["ece"],
            before["ece"],
        )
    times = {"before": before, "after": after}
    numbers = {f"{name}_{when}": times[when][name] for name in ("ece", "brier") for when in times}
    return {**numbers, "calibration_helps": helps}


def unsafe(is_safe: bool | None) -> bool | None:
    """The flag the other way round; None where there is none."""
    return None if pd.isna(is_safe) else not is_safe

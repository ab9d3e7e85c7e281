"""Training pairs from tables: reference columns, labels, and anchors for each pair loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from dualign.core.errors import DataError
from dualign.core.schema import Message, by_prompt
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.math.dual.tilt import leave_one_out_value
from dualign.math.losses import folded_reference, lagrangian_label, safe_dpo_direction
from dualign.params.base import TrainingParams
from dualign.params.training import LossType
from dualign.training.pair_losses import PAIR_LOSSES
from dualign.training.pairwise import Pair

log = logging.getLogger(__name__)

Array = np.ndarray

_SWAP = {
    "chosen": "rejected",
    "rejected": "chosen",
    "chosen_is_safe": "rejected_is_safe",
    "rejected_is_safe": "chosen_is_safe",
}


def preference_pairs(
    frame: pd.DataFrame,
    reference: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    *,
    mismatched: bool = False,
) -> list[Pair]:
    """Pairs of a preference table (first = chosen, label 1), with columns under `reference`.

    With `mismatched` each carries an answer to another prompt, for KTO's reference point. Raises
    DataError where the table has one prompt only."""
    encoded = zip(*_encode(frame, tokenizer), strict=True)
    pairs = [Pair(prompt, first, second, math.nan, math.nan) for prompt, first, second in encoded]
    if mismatched:
        pairs = with_mismatched(pairs)
    return with_reference(pairs, reference, tokenizer, batch_size)


def with_reference(
    pairs: Sequence[Pair],
    reference: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> list[Pair]:
    """The pairs with log-probabilities under `reference` as columns of all their answers."""
    # All pairs have one, or none.
    others = [p.mismatched for p in pairs if p.mismatched is not None]
    answers = [p.first for p in pairs] + [p.second for p in pairs] + others
    sides = 3 if others else 2
    prompts = [p.prompt for p in pairs] * sides
    logps = log_probabilities(reference, tokenizer, prompts, answers, batch_size=batch_size)
    first, second, *mismatched = logps.reshape(sides, len(pairs)).tolist()
    third = mismatched[0] if mismatched else [math.nan] * len(pairs)
    return [
        replace(pair, ref_first=ref_first, ref_second=ref_second, ref_mismatched=ref_mismatched)
        for pair, ref_first, ref_second, ref_mismatched in zip(
            pairs, first, second, third, strict=True
        )
    ]


def with_mismatched(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs, each with an answer, first and second in turn, of the next to another prompt.

    Such answers, which nobody judged for this prompt, are where KTO estimates its reference point
    (2402.01306)."""
    if all(pair.prompt == pairs[0].prompt for pair in pairs):
        raise DataError(
            "kto: all pairs have one prompt, but its reference point takes answers to others; add"
            " prompts"
        )
    found = []
    for i, pair in enumerate(pairs):
        others = (pairs[(i + k) % len(pairs)] for k in range(1, len(pairs)))
        other = next(other for other in others if other.prompt != pair.prompt)
        found.append(replace(pair, mismatched=other.second if i % 2 else other.first))
    return found


def with_safe_flags(pairs: Sequence[Pair], frame: pd.DataFrame) -> list[Pair]:
    """The pairs of `frame`; desirable is what is flagged safe, without flags the chosen answer."""
    flags = zip(frame["chosen_is_safe"], frame["rejected_is_safe"], strict=True)
    return [
        replace(pair, desirable=(_known(chosen, True), _known(rejected, False)))
        for pair, (chosen, rejected) in zip(pairs, flags, strict=True)
    ]


def _known(flag: bool | None, otherwise: bool) -> bool:
    return otherwise if pd.isna(flag) else bool(flag)


def safety_training_pairs(
    frame: pd.DataFrame,
    reference: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    loss_type: LossType,
) -> list[Pair]:
    """Pairs of a safety table as a loss reads them, with columns under `reference`.

    KTO's have mismatched answers, and an answer is desirable if its flag says safe. Raises
    DataError as `preference_pairs` does."""
    columns = PAIR_LOSSES[loss_type].columns
    mismatched = "mismatched_ids" in columns
    pairs = preference_pairs(frame, reference, tokenizer, batch_size, mismatched=mismatched)
    return with_safe_flags(pairs, frame) if "desirable_chosen" in columns else pairs


def with_margin(
    pairs: Sequence[Pair], margin: Sequence[Pair], base: Sequence[Pair], weight: float
) -> list[Pair]:
    """MODPO (2310.03708) as a reference column: ref + weight (log pi_m - log pi_ref).

    `margin` and `base` are the same pairs with the columns of the margin policy pi_m and of pi_ref.

    MODPO's logit is (beta_M Delta h - w_1 Delta m) / w_0 with w_0 + w_1 = 1. The optimum of r +
    lambda m at KL weight beta is that of w_0 r + w_1 m at beta_M = beta / (1 + lambda), where w_0 =
    1 / (1 + lambda), w_1 = lambda w_0, so the logit is beta Delta h - lambda Delta m. Safety DPO
    from pi_ref at coefficient beta / lambda_m has the implicit reward m = -c = (beta / lambda_m)
    log(pi_m / pi_ref), up to a function of the prompt that cancels in Delta. Hence logit = beta
    Delta [log pi - log pi_ref - (lambda / lambda_m) (log pi_m - log pi_ref)]: DPO at beta, and
    `weight` = lambda / lambda_m."""
    return [
        replace(
            pair,
            ref_first=pair.ref_first + weight * (m.ref_first - b.ref_first),
            ref_second=pair.ref_second + weight * (m.ref_second - b.ref_second),
        )
        for pair, m, b in zip(pairs, margin, base, strict=True)
    ]


def safe_first(frame: pd.DataFrame) -> pd.DataFrame:
    """SafeDPO's T of a helpful table (2505.20065): swap where only the rejected answer is safe.

    Rows of two unsafe answers are dropped as T says, rows that lack a flag with a warning: T does
    not know them."""
    flags = frame[["chosen_is_safe", "rejected_is_safe"]]
    known = frame[flags.notna().all(axis=1)]
    if len(known) < len(frame):
        log.warning(
            "left out %d of %d pairs without is-safe flags", len(frame) - len(known), len(frame)
        )
    unsafe = [~torch.from_numpy(known[name].to_numpy(bool)) for name in flags]
    direction = safe_dpo_direction(*unsafe).numpy()
    swapped = known.rename(columns=_SWAP)[known.columns]
    return pd.concat([known[direction > 0], swapped[direction < 0]]).sort_index()


def with_offset(
    pairs: Sequence[Pair], frame: pd.DataFrame, offset: float, beta: float
) -> list[Pair]:
    """SafeDPO's offset Delta (2505.20065) as a column: log ref + Delta / beta of a safe winner.

    Only where the loser is unsafe. `pairs` are those of `frame`, as `safe_first` leaves it; their
    logit at scale `beta` is beta Delta h - Delta."""
    first = torch.tensor([pair.ref_first for pair in pairs], dtype=torch.float64)
    mixed = torch.from_numpy(~frame["rejected_is_safe"].to_numpy(bool))
    folded = folded_reference(first, offset * mixed.double(), beta).tolist()
    return [replace(pair, ref_first=ref) for pair, ref in zip(pairs, folded, strict=True)]


def rows_within_budget(frame: pd.DataFrame, training: TrainingParams, seed: int) -> pd.DataFrame:
    """The rows that a run reaches: with `max_steps` a random draw of so many batches, else all.

    Reference columns of rows that no step will see are not worth computing."""
    rows = len(frame) if training.max_steps is None else training.max_steps * training.batch_size
    return frame if rows >= len(frame) else frame.sample(rows, random_state=seed).sort_index()


def lagrangian_pairs(
    frame: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, lam: float, scale: float = 1.0
) -> list[Pair]:
    """Scored pairs labelled sigma(scale (Delta r - lambda Delta c)); references as scored."""
    prompts, chosen, rejected = _encode(frame, tokenizer)
    reward_gap = torch.tensor((frame["reward_chosen"] - frame["reward_rejected"]).to_numpy())
    cost_gap = torch.tensor((frame["cost_chosen"] - frame["cost_rejected"]).to_numpy())
    labels = lagrangian_label(reward_gap, cost_gap, lam, scale).tolist()
    refs = zip(frame["logp_ref_chosen"], frame["logp_ref_rejected"], strict=True)
    return [
        Pair(prompt, first, second, ref_first, ref_second, label)
        for prompt, first, second, (ref_first, ref_second), label in zip(
            prompts, chosen, rejected, refs, labels, strict=True
        )
    ]


@dataclass(frozen=True)
class Samples:
    """Scored samples of a policy as arrays [prompts, samples], with the ids of prompts and answers.

    `logp` is the log-probability under the policy that drew them: logp_ref itself for the pool."""

    prompts: list[list[int]]
    answers: list[list[list[int]]]
    logp: Array
    logp_ref: Array
    reward: Array
    cost: Array


def _token_lists(column: pd.Series) -> list[list[int]]:
    return [list(map(int, tokens)) for tokens in column]


def samples_of(frame: pd.DataFrame, tokenizer: PreTrainedTokenizerBase) -> Samples:
    """A table of schema POOL or ANSWERS, its rows sorted by prompt and sample, as arrays."""
    groups = list(frame.groupby("prompt_id", sort=False))
    prompts = encode_prompts(tokenizer, [group["prompt"].iloc[0] for _, group in groups])
    answers = [_token_lists(group["tokens"]) for _, group in groups]
    drawn = "logp" if "logp" in frame else "logp_ref"
    columns = [by_prompt(frame, name) for name in (drawn, "logp_ref", "reward", "cost")]
    return Samples(prompts, answers, *columns)


def pool_pairs(
    samples: Samples, value: Array, lam: float, beta: float, seed: int, scale: float = 1.0
) -> list[Pair]:
    """Random pairs within each prompt (an odd sample is left over), with joint label, anchors and
    importance weights.

    `value` has shape [prompts, samples]: V_lambda(x) in each sample's anchor r - lambda c -
    V_lambda(x) and in its weight exp(anchor / beta) pi_ref / pi_drawn. It must not contain the
    sample's own score: then a weight is in expectation proportional to the density ratio at its
    answer, while a softmax over few samples flattens the target. The mean of N weights is 1 in
    expectation, so none counts for more than N: what the likelihood's minimiser is then is
    min(pi_lambda, N pi_drawn), up to a factor. `scale` multiplies r - lambda c in the label only.
    Pairs of identical answers carry no preference but keep their anchors."""
    rng = np.random.default_rng(seed)
    tilt = samples.reward - lam * samples.cost
    anchor = tilt - value
    # pi_lambda / (the policy that drew the samples)
    log_ratio = anchor / beta + samples.logp_ref - samples.logp
    ratio = np.exp(np.minimum(log_ratio, math.log(log_ratio.size)))
    pairs = []
    for x, prompt in enumerate(samples.prompts):
        order = rng.permutation(tilt.shape[1])
        for i, j in zip(order[0::2], order[1::2], strict=False):
            gap = float(tilt[x, i] - tilt[x, j])
            pairs.append(
                Pair(
                    prompt,
                    samples.answers[x][i],
                    samples.answers[x][j],
                    float(samples.logp_ref[x, i]),
                    float(samples.logp_ref[x, j]),
                    float(torch.sigmoid(torch.tensor(scale * gap))),
                    (float(anchor[x, i]), float(anchor[x, j])),
                    (float(ratio[x, i]), float(ratio[x, j])),
                    (float(samples.logp[x, i]), float(samples.logp[x, j])),
                )
            )
    return pairs


def fresh_pairs(
    value: Array, fresh: Samples, lam: float, beta: float, seed: int, scale: float = 1.0
) -> list[Pair]:
    """Random pairs of a policy's answers to the pool's first prompts, as `pool_pairs`.

    Their anchors use the pool's V_lambda of the prompt, `value` [prompts of the pool], so they need
    no new partition function."""
    prompts, count = fresh.reward.shape
    known = value[:prompts, None].repeat(count, axis=1)
    return pool_pairs(fresh, known, lam, beta, seed, scale)


def pool_values(samples: Samples, lam: float, beta: float) -> Array:
    """V_lambda(x) of a pool, leave-one-out; shape [prompts, samples]."""
    return leave_one_out_value(samples.reward, samples.cost, lam, beta)


def _encode(
    frame: pd.DataFrame, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    prompts = encode_prompts(tokenizer, cast(list[list[Message]], frame["prompt"].tolist()))
    return (
        prompts,
        encode_answers(tokenizer, frame["chosen"].tolist()),
        encode_answers(tokenizer, frame["rejected"].tolist()),
    )

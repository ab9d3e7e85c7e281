"""Training pairs from tables: reference columns, labels, and anchors for each inner loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from dualign import dual
from dualign.core.params import TrainingParams
from dualign.data.schema import Message, by_prompt
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.losses import lagrangian_label
from dualign.training.pairwise import Pair

Array = np.ndarray


def preference_pairs(
    frame: pd.DataFrame, reference: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[Pair]:
    """Pairs of a preference table (first = chosen, label 1), their reference columns computed under `reference`."""
    prompts, chosen, rejected = _encode(frame, tokenizer)
    logps = log_probabilities(reference, tokenizer, prompts * 2, chosen + rejected, batch_size=batch_size).tolist()
    half = len(frame)
    return [
        Pair(prompt, first, second, ref_first, ref_second)
        for prompt, first, second, ref_first, ref_second in zip(
            prompts, chosen, rejected, logps[:half], logps[half:], strict=True
        )
    ]


def visited(frame: pd.DataFrame, training: TrainingParams, seed: int) -> pd.DataFrame:
    """The rows that a run reaches: with `max_steps` a random draw of at most that many batches, otherwise all.

    Reference columns of rows that no step will see are not worth computing.
    """
    rows = len(frame) if training.max_steps is None else training.max_steps * training.batch_size
    return frame if rows >= len(frame) else frame.sample(rows, random_state=seed).sort_index()


def lagrangian_pairs(
    frame: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, lam: float, scale: float = 1.0
) -> list[Pair]:
    """Scored pairs with the joint label sigma(scale (Delta r - lambda Delta c)); reference columns as scored."""
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

    `logp` is the log-probability under the policy that drew them: logp_ref itself for the pool.
    """

    prompts: list[list[int]]
    answers: list[list[list[int]]]
    logp: Array
    logp_ref: Array
    reward: Array
    cost: Array


def samples_of(frame: pd.DataFrame, tokenizer: PreTrainedTokenizerBase) -> Samples:
    """A table of schema POOL or ANSWERS, its rows sorted by prompt and sample, as arrays."""
    groups = list(frame.groupby("prompt_id", sort=False))
    prompts = encode_prompts(tokenizer, [group["prompt"].iloc[0] for _, group in groups])
    answers = [[[int(token) for token in tokens] for tokens in group["tokens"]] for _, group in groups]
    drawn = "logp" if "logp" in frame else "logp_ref"
    columns = [by_prompt(frame, name) for name in (drawn, "logp_ref", "reward", "cost")]
    return Samples(prompts, answers, *columns)


def pool_pairs(samples: Samples, value: Array, lam: float, beta: float, seed: int, scale: float = 1.0) -> list[Pair]:
    """Random pairs within each prompt (an odd sample is left over), with joint label, anchors and importance weights.

    `value` has shape [prompts, samples]: V_lambda(x) in each sample's anchor r - lambda c - V_lambda(x) and in its
    weight exp(anchor / beta) pi_ref / pi_drawn. It must not contain the sample's own score: then a weight is in
    expectation proportional to the density ratio at its answer, while a softmax over few samples flattens the target.
    `scale` multiplies r - lambda c in the label only. Pairs of identical answers carry no preference but keep their
    anchors.
    """
    rng = np.random.default_rng(seed)
    tilt = samples.reward - lam * samples.cost
    anchor = tilt - value
    ratio = np.exp(anchor / beta + samples.logp_ref - samples.logp)  # pi_lambda / (the policy that drew the samples)
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
                )
            )
    return pairs


def pool_values(samples: Samples, lam: float, beta: float) -> Array:
    """V_lambda(x) of a pool, leave-one-out; shape [prompts, samples]."""
    return dual.leave_one_out_value(samples.reward, samples.cost, lam, beta)


def _encode(
    frame: pd.DataFrame, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    prompts = encode_prompts(tokenizer, cast(list[list[Message]], frame["prompt"].tolist()))
    return (
        prompts,
        encode_answers(tokenizer, frame["chosen"].tolist()),
        encode_answers(tokenizer, frame["rejected"].tolist()),
    )

"""Scores that policies imply: PeCAN (2405.19544) puts two aligned policies in the place of reward
and cost model.

DPO from pi_ref on helpfulness with coefficient beta_r ends at pi_r = pi_ref exp(r / beta_r) /
Z_r(x), on safety with beta_g at pi_g = pi_ref exp(-c / beta_g) / Z_g(x), so

    r^ =  beta_r log(pi_r / pi_ref) = r - beta_r log Z_r(x)
    c^ = -beta_g log(pi_g / pi_ref) = c + beta_g log Z_g(x)

Each log-ratio carries the coefficient of its own policy. The authors' code feeds bare log-ratios to
the labels; with one beta for all, that tilts by (r - lambda c) / beta^2, too far by 1 / beta. The
offset of a prompt cancels in the gaps between its answers, hence in labels and importance weights,
and against the soft value, hence in anchors."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from dualign.core.errors import ModelError
from dualign.core.records import SafetyMetrics, read_record
from dualign.core.schema import POOL, SCORED_PAIRS, read_table
from dualign.lm.models import load_policy
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.params.base import Resources

Array = np.ndarray


class Tables(NamedTuple):
    """The tables of stage `score`: schemas POOL and SCORED_PAIRS."""

    pool: pd.DataFrame
    pairs: pd.DataFrame


def implicit_reward(log_ratio: Array, beta: float) -> Array:
    """r^ = beta log(pi_r / pi_ref), in units of reward; beta is pi_r's coefficient."""
    return beta * log_ratio


def implicit_cost(log_ratio: Array, beta: float) -> Array:
    """c^ = -beta log(pi_g / pi_ref), in cost, up to an offset of each prompt; beta is pi_g's."""
    return -beta * log_ratio


def cost_offset(implicit: Array, cost: Array) -> float:
    """What moves the mean of c^ over the pool to that of the cost model's c; both of shape [rows].

    PeCAN bounds safety relative to the reference, E[g] - E_ref[g] >= b with g = -c. With b =
    E_ref[c] - d that is our limit, E[c^] + (E_ref[c] - E_ref[c^]) <= d; the bracket is this offset,
    and E_ref[c] is all that it takes from the cost model. An offset of a prompt changes none of its
    importance weights, and the limit is on the mean over prompts, so the multiplier is the same, on
    any finite pool, whether every prompt is centred on its own mean of c or the pool on the mean of
    all. It is one number here, since that holds for prompts outside the pool too. It puts means on
    the scale of d; a single c^ still carries the log Z_g(x) of its prompt, so its sign does not say
    safe or unsafe."""
    return float(cost.mean() - implicit.mean())


class Sources(NamedTuple):
    """`reward_model` and `cost_model`, or policies in `models`, whose metrics lie in `metrics`."""

    reward: str
    cost: str
    models: Path
    metrics: Path


def scored_tables(
    scored: Path,
    sources: Sources,
    beta: float,
    tokenizer: PreTrainedTokenizerBase,
    resources: Resources,
) -> Tables:
    """The tables in `scored`, with implicit scores where a source is a policy and not a scorer.

    `beta` is the coefficient of the reward policy; the safety policy's stands in its metrics file.
    """
    tables = Tables(
        read_table(scored / "pool.parquet", POOL),
        read_table(scored / "scored_pairs.parquet", SCORED_PAIRS),
    )
    batch = resources.scoring_batch_size
    if sources.reward != "reward_model":
        policy = load_policy(sources.models / sources.reward, resources)
        tables = with_implicit_reward(tables, policy, tokenizer, beta, batch)
    if sources.cost != "cost_model":
        policy = load_policy(sources.models / sources.cost, resources)
        measured = read_record(sources.metrics / f"{sources.cost}.json", SafetyMetrics)
        tables = with_implicit_cost(tables, policy, tokenizer, measured.coefficient, batch)
    return tables


def with_implicit_reward(
    tables: Tables,
    policy: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    beta: float,
    batch_size: int,
) -> Tables:
    """Both tables with r^ of `policy` as their rewards."""
    ratios = log_ratios(tables, policy, tokenizer, batch_size)
    return _replaced(tables, "reward", *(implicit_reward(ratio, beta) for ratio in ratios))


def with_implicit_cost(
    tables: Tables,
    policy: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    beta: float,
    batch_size: int,
) -> Tables:
    """Both tables with c^ of `policy` as costs, moved by the pool's `cost_offset`."""
    ratios = log_ratios(tables, policy, tokenizer, batch_size)
    pool, chosen, rejected = (implicit_cost(ratio, beta) for ratio in ratios)
    offset = cost_offset(pool, tables.pool["cost"].to_numpy())
    return _replaced(tables, "cost", pool + offset, chosen + offset, rejected + offset)


def log_ratios(
    tables: Tables, policy: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[Array]:
    """log(policy / pi_ref) in nats of the pool's answers, of the pairs' chosen and of their
    rejected ones; each [rows].

    Raises ModelError if one of them is not finite."""
    pool, pairs = tables
    prompts = encode_prompts(tokenizer, [*pool["prompt"], *pairs["prompt"], *pairs["prompt"]])
    drawn = [list(map(int, tokens)) for tokens in pool["tokens"]]
    answers = [*drawn, *encode_answers(tokenizer, [*pairs["chosen"], *pairs["rejected"]])]
    logp = log_probabilities(policy, tokenizer, prompts, answers, batch_size=batch_size).numpy()
    reference = np.concatenate(
        [pool["logp_ref"], pairs["logp_ref_chosen"], pairs["logp_ref_rejected"]]
    )
    ratios = logp - reference
    known = np.isfinite(reference)  # not where an answer is longer than the context
    if not np.isfinite(ratios[known]).all():
        raise ModelError(
            "a policy that gives scores has log-probabilities that are not finite; train it again"
        )
    return np.split(ratios, [len(pool), len(pool) + len(pairs)])


def _replaced(tables: Tables, name: str, pool: Array, chosen: Array, rejected: Array) -> Tables:
    pairs = {f"{name}_chosen": chosen, f"{name}_rejected": rejected}
    return Tables(tables.pool.assign(**{name: pool}), tables.pairs.assign(**pairs))

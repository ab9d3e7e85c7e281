"""One round of O-PD-DPO (2510.05703, alg. 2): fresh pairs, and what both phases train on with them.

    fresh = preference_tables(compare(collect(current, baseline), ...), source)  # current: pi_k's
    exploration.observe(fresh)
    data = union(offline, *rounds, fresh)
    pi_r from preference_pairs(data.helpful, pi_ref, ...), coefficient beta: DPO (eq. 15)
    pi_k+1 from phase_two(data, pi_r, exploration, lambda, beta, ...), coefficient beta / lambda

Every function depends on its arguments alone: a search that keeps its fresh tables and reads them
again goes on as if it had never stopped."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import replacing, write_parquet
from dualign.core.errors import DataError
from dualign.core.schema import HELPFUL_PAIRS, SAFETY_PAIRS, pair_id, read_table
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.math.losses import folded_reference
from dualign.params.base import TrainingParams
from dualign.params.search import OnlineParams
from dualign.search import exploration
from dualign.training.pairs import preference_pairs, rows_within_budget
from dualign.training.pairwise import Pair

log = logging.getLogger(__name__)

_HELPFUL, _SAFETY = "helpful_pairs.parquet", "safety_pairs.parquet"


@dataclass(frozen=True)
class Preferences:
    """D_r and D_c: tables of schemas HELPFUL_PAIRS and SAFETY_PAIRS."""

    helpful: pd.DataFrame
    safety: pd.DataFrame

    @classmethod
    def read(cls, folder: Path) -> Preferences:
        """The training rows of both tables in a folder; DataError if one cannot be read."""
        helpful = read_table(folder / _HELPFUL, HELPFUL_PAIRS)
        safety = read_table(folder / _SAFETY, SAFETY_PAIRS)
        return cls(helpful[helpful["split"] == "train"], safety[safety["split"] == "train"])

    def write(self, folder: Path) -> None:
        """Both tables, in a folder that appears whole or not at all."""
        with replacing(folder) as temporary:
            write_parquet(temporary / _HELPFUL, self.helpful, HELPFUL_PAIRS)
            write_parquet(temporary / _SAFETY, self.safety, SAFETY_PAIRS)

    def rows_within_budget(self, training: TrainingParams, seed: int) -> Preferences:
        """The rows that each phase reaches (`dualign.training.pairs.rows_within_budget`)."""
        return Preferences(
            rows_within_budget(self.helpful, training, seed),
            rows_within_budget(self.safety, training, seed),
        )


def union(*parts: Preferences) -> Preferences:
    """All rows of all parts, in their order."""
    return Preferences(
        pd.concat([part.helpful for part in parts], ignore_index=True),
        pd.concat([part.safety for part in parts], ignore_index=True),
    )


# --- fresh pairs ----------------------------------------------------------------------------------


def collect(current: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """Pairs (answer of pi_k, answer of the baseline) to the same prompts, without identical texts.

    Both tables have columns prompt_id, prompt, sample, response, reward, cost (schemas ANSWERS and
    POOL have); sample i of one meets sample i of the other. Returns prompt_id, prompt, first,
    second, reward_first, reward_second, cost_first, cost_second, as
    `dualign.data.labelling.compare` reads them.

    Raises DataError where a prompt and sample of one table is missing in the other."""
    keys = ["prompt_id", "sample"]
    scores = ["response", "reward", "cost"]
    alone = _drawn(current) ^ _drawn(baseline)
    if alone:
        name, sample = min(alone)
        raise DataError(
            f"prompt {name}: sample {sample} stands in one table alone, of the policy's answers or"
            " of the baseline's; draw both for the same prompts with the same count"
        )
    pairs = current[[*keys, "prompt", *scores]].merge(
        baseline[[*keys, *scores]], on=keys, suffixes=("_first", "_second"), validate="one_to_one"
    )
    differ = pairs["response_first"] != pairs["response_second"]
    log.info("%d fresh pairs, %d more of identical answers left out", differ.sum(), (~differ).sum())
    renamed = pairs.rename(columns={"response_first": "first", "response_second": "second"})
    return renamed[differ].drop(columns="sample").reset_index(drop=True)


def _drawn(answers: pd.DataFrame) -> set[tuple[str, int]]:
    return set(zip(answers["prompt_id"], answers["sample"], strict=True))


def preference_tables(compared: pd.DataFrame, source: str) -> Preferences:
    """Labelled pairs (`dualign.data.labelling.compare`) as training rows; `source` says where from,
    such as a round.

    Safety flags are null: the pairs were compared, not flagged."""
    return Preferences(
        _table(compared, compared["first_more_helpful"], source),
        _table(compared, compared["first_safer"], source),
    )


def _table(compared: pd.DataFrame, first_wins: pd.Series, source: str) -> pd.DataFrame:
    first = compared["first"]
    second = compared["second"]
    chosen = first.where(first_wins, second)
    rejected = second.where(first_wins, first)
    return pd.DataFrame(
        {
            "pair_id": [
                pair_id(*row) for row in zip(compared["prompt"], chosen, rejected, strict=True)
            ],
            "prompt_id": compared["prompt_id"],
            "prompt": compared["prompt"],
            "chosen": chosen,
            "rejected": rejected,
            "source": source,
            "split": "train",
            "chosen_is_safe": None,
            "rejected_is_safe": None,
        }
    )


# --- bonuses --------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """Feature differences of one kind of pairs, [pairs, d] a call, and the alpha of the first."""

    key: str  # of the scale in a row's section `online`
    scale: float
    alpha: float = math.nan
    differences: list[Tensor] = field(default_factory=list)


class Exploration:
    """The covariances of helpful and of safety pairs over the rounds, in the features of the
    reference policy, which a matrix drawn from `seed` projects where params say so.

    A scale is the mean gap of a bonus within the pairs that are observed first. It fixes alpha_r
    and alpha_c, which stay as they are while pairs come in: the same scale suits any model and any
    data."""

    def __init__(
        self,
        reference: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        params: OnlineParams,
        seed: int,
    ) -> None:
        self._reference = reference
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._params = params
        self._seed = seed
        self._helpful = _Seen("reward_scale", params.reward_scale)
        self._safety = _Seen("cost_scale", params.cost_scale)

    def observe(self, data: Preferences) -> None:
        """Count in the pairs of a table: the offline ones first, which fix both alphas.

        Raises DataError where the first pairs fix none, since the answers of each have one and the
        same bonus."""
        for seen, frame in ((self._helpful, data.helpful), (self._safety, data.safety)):
            if len(frame):
                chosen, rejected = self._both(frame)
                if not seen.differences:
                    spread = exploration.spread(chosen, rejected, self._params.ridge)
                    seen.alpha = _alpha(seen, spread)
                seen.differences.append(chosen - rejected)

    def optimism(self, prompts: list[list[int]], answers: list[list[int]], lam: float) -> Tensor:
        """b_r + lambda b_c of each answer (token ids), fp64 [answers], in units of reward."""
        phi = self._features(prompts, answers)
        return self._bonus(phi, self._helpful) + lam * self._bonus(phi, self._safety)

    def _features(self, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
        phi = exploration.features(
            self._reference, self._tokenizer, prompts, answers, self._batch_size
        )
        if self._params.dimension is None:
            return phi
        return phi @ exploration.projection(phi.shape[1], self._params.dimension, self._seed)

    def _both(self, frame: pd.DataFrame) -> tuple[Tensor, Tensor]:
        """Features of the chosen and of the rejected answers."""
        prompts = encode_prompts(self._tokenizer, frame["prompt"].tolist())
        answers = encode_answers(self._tokenizer, [*frame["chosen"], *frame["rejected"]])
        chosen, rejected = self._features(prompts * 2, answers).chunk(2)
        return chosen, rejected

    def _bonus(self, phi: Tensor, seen: _Seen) -> Tensor:
        norm = exploration.precision(torch.cat(seen.differences), self._params.ridge)
        return exploration.bonus(phi, norm, seen.alpha)


def _alpha(seen: _Seen, spread: float) -> float:
    """The factor that makes `scale` of the first pairs' mean gap at alpha 1."""
    if spread == 0 and seen.scale > 0:
        raise DataError(
            f"online.{seen.key}: both answers of every first pair have features of the same norm,"
            " so no bonus has this mean gap; give pairs of different answers, raise"
            " online.dimension or set it to null, or the scale to 0"
        )
    return seen.scale / spread if spread else 0.0


# --- what the second phase trains on --------------------------------------------------------------


def phase_two(
    data: Preferences,
    helpful: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    explored: Exploration,
    *,
    lam: float,
    beta: float,
) -> list[Pair]:
    """Safety pairs with log pi_r + (b_r + lambda b_c) / beta as reference column, pi_r = `helpful`
    (alg. 2).

    DPO with coefficient beta / lambda leads to pi_ref exp((r + b_r - lambda (c - b_c)) / beta)."""
    pairs = preference_pairs(data.safety, helpful, tokenizer, batch_size)
    prompts = [pair.prompt for pair in pairs]
    answers = [p.first for p in pairs] + [p.second for p in pairs]
    references = [p.ref_first for p in pairs] + [p.ref_second for p in pairs]
    log_helpful = torch.tensor(references, dtype=torch.float64)
    column = folded_reference(log_helpful, explored.optimism(prompts * 2, answers, lam), beta)
    first, second = column.chunk(2)
    return [
        replace(pair, ref_first=ref_first, ref_second=ref_second)
        for pair, ref_first, ref_second in zip(pairs, first.tolist(), second.tolist(), strict=True)
    ]

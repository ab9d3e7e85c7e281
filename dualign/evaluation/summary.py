"""All that `evaluate` measures of answers; `dualign.evaluation.measures` explains the keys."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pandas as pd

from dualign.core.schema import normalise
from dualign.evaluation.against_optimum import means
from dualign.evaluation.stats import clustered_mean, clustered_share


def summarise(answers: pd.DataFrame, log_ratio: pd.DataFrame, confidence: float) -> dict[str, Any]:
    """Everything that is measured of a policy: `means` of its answers, how little the answers to
    one prompt repeat each other, and its displacement.

    `log_ratio` has columns prompt_id and log_ratio, log(pi / pi_ref) of samples of the reference:
    its mean is the displacement, 0 for an untrained policy and falling as mass leaves what the
    reference says."""
    displacement = clustered_mean(
        log_ratio["log_ratio"].to_numpy(), log_ratio["prompt_id"].to_numpy(), confidence
    )
    distinct = answers.groupby("prompt_id")["response"].agg(distinct_2)
    return means(answers, confidence) | {
        "distinct_2": clustered_share(
            distinct.to_numpy(), distinct.index.to_numpy(), confidence
        ).as_dict(),
        "displacement": displacement.as_dict(),
        "prompts": int(answers["prompt_id"].nunique()),
        "answers": len(answers),
    }


def distinct_2(texts: Iterable[str]) -> float:
    """The share of different ones among all pairs of neighbouring words of some texts (1510.03055).

    Of the answers to one prompt (per input, 2310.06452) it falls where a policy says the same again
    and again; texts without a pair count as 0. It falls with the number of texts too, so compare
    at equal numbers.

    >>> distinct_2(["wear thick gloves", "Wear thick socks"])  # wear thick comes twice
    0.75
    """
    pairs = [pair for text in texts for pair in pairwise(normalise(text).split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0

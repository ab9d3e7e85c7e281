"""Everything that `evaluate` measures of any policy's answers; `dualign.evaluation.measures` says
what each key means.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from dualign.evaluation.against_optimum import means
from dualign.evaluation.stats import clustered_mean


def summarise(answers: pd.DataFrame, log_ratio: pd.DataFrame, confidence: float) -> dict[str, Any]:
    """Everything that is measured of a policy: `means` of its answers, and its displacement.

    `log_ratio` has columns prompt_id and log_ratio, log(pi / pi_ref) of samples of the reference:
    its mean is the displacement, 0 for an untrained policy and falling as mass leaves what the
    reference says."""
    displacement = clustered_mean(
        log_ratio["log_ratio"].to_numpy(), log_ratio["prompt_id"].to_numpy(), confidence
    )
    return means(answers, confidence) | {
        "displacement": displacement.as_dict(),
        "prompts": int(answers["prompt_id"].nunique()),
        "answers": len(answers),
    }

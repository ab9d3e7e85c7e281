"""How near trained policies come to the tilt that they were trained for: on prompts of the pool,
which training has seen, and on held-out ones.

    python -m bench.fit --seeds 7 --params params.yaml --policies lagrangian_dpo/anchored

Reads finished runs of `bench.world`, whose folders it takes. The probability of each of the 42
grammatical answers to a prompt is known, under the policy and under the exact tilt of the reference
by the learned scores; so what the policy misses of the tilt is exact, and no error of the scorers
is in it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import rel_entr, softmax

from bench import options
from bench.world import (
    ALLOWED,
    DOUBTED,
    Lab,
    Truth,
    believed,
    command_of,
    folder_of,
    run_parser,
    set_up,
    settings_from,
)
from dualign.core.errors import DualignError
from dualign.core.schema import POOL, last_user_text, read_table
from dualign.math import tabular
from dualign.params.evaluate import EvaluateParams
from dualign.params.loading import load
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)

PROG = "python -m bench.fit"


def divergence(policy: np.ndarray, tilt: np.ndarray) -> float:
    """KL of a policy to a tilt among the answers of a table, nats, averaged over the prompts.

    Both are log-probabilities [prompts, answers], which need not sum to 1: what lies on other text
    is left out.

    >>> half, most = np.log([[0.25, 0.25]]), np.log([[0.5, 0.25]])
    >>> round(divergence(half, half), 6), round(divergence(half, most), 6)
    (0.0, 0.058892)
    """
    ours, theirs = (softmax(table, axis=1) for table in (policy, tilt))
    return float(rel_entr(ours, theirs).sum(axis=1).mean())


def taken_up(seed: int, params: Path, work: Path, settings: Mapping[str, Any]) -> Lab:
    """The run of a seed. Raises DualignError where there is none."""
    if not folder_of(seed, params, work).is_dir():
        raise DualignError(
            f"{work}: no run of {params} at seed {seed}; make it by `python -m bench.world --seeds"
            f" {seed} --params {params}`"
        )
    return set_up(seed, params, work, settings)


def rows_of(lab: Lab, policies: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each policy (a folder under models/) and kind of prompts of one run."""
    params = load(EvaluateParams, lab.folder / "params.yaml")
    pool = read_table(lab.folder / "data/scored/pool.parquet", POOL)
    seen = list(map(last_user_text, pool.drop_duplicates("prompt_id")["prompt"]))
    truths = {"held-out": Truth.of(lab, params), "pool": Truth.of_prompts(lab, params, seen)}
    for prompts, truth in truths.items():
        problems = believed(lab, truth)
        problem = problems.get(DOUBTED, problems[ALLOWED])
        lam = tabular.solve(problem, params.limit)
        tilt = problem.policy(lam)
        for name in policies:
            policy = truth.under(lab, lab.folder / "models" / name)
            kl = divergence(policy, tilt[:, :-1])
            yield {
                "seed": lab.seed,
                "policy": name,
                "prompts": prompts,
                "multiplier": lam,
                "kl": kl,
                "share": truth.share(params.beta * kl),
                "other_text": 1 - float(np.exp(policy).sum(axis=1).mean()),
                "other_text_of_tilt": float(np.exp(tilt[:, -1]).mean()),
            }


_HEADS = (
    "seed", "policy", "prompts", "multiplier", "KL to the tilt", "β KL, of the way",
    "other text", "other text of the tilt",
)  # fmt: skip
_DIGITS = {"multiplier": 3, "kl": 4, "share": 3, "other_text": 4, "other_text_of_tilt": 4}


def page(command: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page in markdown."""
    lines = options.head(_HEADS)
    for row in rows:
        cells = [_cell(key, value) for key, value in row.items()]
        lines.append(options.line(cells))
    return options.page(
        "How near policies come to the tilt by the learned scores",
        command,
        "\n".join(lines),
        _NOTES,
    )


def _cell(key: str, value: Any) -> str:
    return f"{value:.{_DIGITS[key]}f}" if key in _DIGITS else str(value)


_NOTES = """\
How to read it: the tilt is the exact one of the reference by the learned scores, doubted off their
support as in training, at the multiplier where they meet the limit on these prompts. KL is among
the 42 grammatical answers; beside it stands what β KL is of the way J* − J_0 from the policy
nearest to the reference that keeps the limit. Text that is not grammatical is told by its
probability.
Where pool prompts are no better than held-out ones, more prompts would not help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write fit.json and fit.md, and the page to stdout. Returns the exit status."""
    parser = run_parser(PROG, __doc__, [7], Path("params.yaml"))
    parser.add_argument(
        "--policies", nargs="+", default=["lagrangian_dpo/anchored"], help="folders in models/"
    )
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        settings = settings_from(given)
        work = given.work.absolute()
        labs = [taken_up(seed, given.params, work, settings) for seed in given.seeds]
        rows = [row for lab in labs for row in rows_of(lab, given.policies)]
    except (DualignError, PipelineError, OSError) as error:
        log.error("%s", error)
        return 1
    command = command_of(PROG, given)
    text = page(command, rows)
    options.publish(given.out, "fit", {"command": command, "rows": rows}, text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

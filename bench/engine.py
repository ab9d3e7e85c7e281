"""A policy as another engine serves it: the same prompts, the same ends, the same log-probabilities
as ours.

    python -m bench.engine models/aligned/dualign --python ../vllm/bin/python

vLLM lives in an environment of its own; `--python` is its interpreter. It is told nothing but the
policy's folder and the prompts' ids, as a server would be."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import write_json
from dualign.core.schema import PROMPTS, read_table
from dualign.lm.models import load_policy, load_tokenizer
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_prompts
from dualign.params.loading import load_resources

SIDE = Path(__file__).with_name("vllm_side.py")


def served(
    python: str, policy: Path, prompts: list[Any], ids: list[list[int]], longest: int
) -> list[dict[str, Any]]:
    """Answers of the other engine: `prompt` as its tokenizer renders it, `ids`, whether it `ended`,
    and `logp`.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "asked.json"
        answered = Path(folder) / "answered.json"
        asked.write_text(json.dumps({"prompts": prompts, "ids": ids, "max_new_tokens": longest}))
        subprocess.run([python, str(SIDE), str(policy), str(asked), str(answered)], check=True)
        rows: list[dict[str, Any]] = json.loads(answered.read_text())
    return rows


def compared(
    rows: Sequence[dict[str, Any]],
    ids: Sequence[list[int]],
    ours: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """What `main` prints; `ours` are our log-probabilities of the engine's answers, [rows]."""
    ended = [row for row in rows if row["ended"]]
    theirs = torch.tensor([row["logp"] for row in rows])
    return {
        "prompts": len(rows),
        "same_prompt_ids": sum(row["prompt"] == own for row, own in zip(rows, ids, strict=True)),
        "ended": len(ended),
        "ended_with": sorted({tokenizer.decode(row["ids"][-1:]) for row in ended}),
        "went_on_after_an_end": sum(tokenizer.eos_token_id in row["ids"][:-1] for row in rows),
        "tokens": sum(len(row["ids"]) for row in rows),
        "largest_difference_of_logp": float((ours - theirs).abs().max()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Draw and compare; print JSON, and write it to `--out` where that is given."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("policy", type=Path, help="folder of whole weights")
    parser.add_argument(
        "--python", required=True, help="interpreter of the environment that has vLLM"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        default=Path("data/prepared/eval.parquet"),
        help="(default: %(default)s)",
    )
    parser.add_argument("--count", type=int, default=32, help="prompts (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file of the result")
    given = parser.parse_args(argv)
    table = read_table(given.prompts, PROMPTS).head(given.count)
    prompts = [list(map(dict, prompt)) for prompt in table["prompt"]]
    tokenizer = load_tokenizer(given.policy)
    ids = encode_prompts(tokenizer, table["prompt"].tolist())
    rows = served(given.python, given.policy.absolute(), prompts, ids, given.max_new_tokens)
    resources = load_resources().model_copy(update={"precision": "fp32"})
    policy = load_policy(given.policy, resources)
    ours = log_probabilities(policy, tokenizer, ids, [row["ids"] for row in rows], batch_size=4)
    found = compared(rows, ids, ours, tokenizer)
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    if given.out is not None:
        write_json(given.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Answers a second by sampling engine, on prompts and answers of mixed lengths.

    python -m bench.sampling --base models/base/smollm2 --prompts data/prepared/eval.parquet

The engines take turns: each round draws with a new seed, the same for all, and the page gives
medians over rounds. On a CPU seconds are those of the processor, on one thread unless `--threads`
says otherwise, so that other work on the machine counts little; on a GPU they are the clock's, once
all its work is done. The first engine is what the others are held against. Each answer's
log-probabilities are checked against ours, outside the time."""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from bench import options
from bench.options import knob
from dualign.core.errors import DualignError
from dualign.core.schema import PROMPTS, read_table
from dualign.lm.engines.check import check
from dualign.lm.engines.interface import Request, row_seed
from dualign.lm.engines.table import ENGINES
from dualign.lm.models import end_tokens, load_policy, load_tokenizer
from dualign.lm.tokens import encode_prompts
from dualign.params.base import Resources
from dualign.params.loading import load_resources

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.sampling"
BASELINE = "generate"


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    base: str = knob("models/base/smollm2", "folder or hub id of a causal language model")
    prompts: str = knob("data/prepared/eval.parquet", "table of prompts")
    engines: tuple[str, ...] = knob((BASELINE, "refill", "continuous"), "engines, in turn")
    count: int = knob(16, "prompts, of all lengths of the table")
    draws: int = knob(4, "answers to each prompt")
    batch: int = knob(16, "answers under way at a time")
    max_new_tokens: int = knob(512, "longest answer")
    rounds: int = knob(5, "rounds, whose medians are given")
    threads: int = knob(1, "threads of torch")
    precision: str = knob("fp32", "fp32 or bf16")
    seed: int = knob(0, "seed of the first round")

    def __post_init__(self) -> None:
        numbers = (self.count, self.draws, self.batch, self.max_new_tokens, self.rounds)
        if min(*numbers, self.threads) < 1:
            raise DualignError("counts, batch, rounds and threads must be at least 1")
        if unknown := sorted(set(self.engines) - {"generate", "refill", "continuous"}):
            raise DualignError(f"no engine that draws in this process: {', '.join(unknown)}")


def measure(given: Settings) -> Iterator[list[dict[str, Any]]]:
    """The rows of each round, one for each engine: seconds, answers, tokens and their shortest and
    longest.
    """
    resources = load_resources().model_copy(update={"precision": given.precision})
    tokenizer = load_tokenizer(given.base)
    model = load_policy(given.base, resources)
    prompts = _prompts(given, tokenizer)
    for round_ in range(given.rounds):
        rows = []
        request = _request(given, prompts, end_tokens(model, tokenizer), given.seed + round_)
        for engine in given.engines:
            own = resources.model_copy(update={"engine": engine})
            rows.append({"round": round_, **_timed(model, tokenizer, request, own)})
            log.info("%s", rows[-1])
        yield rows


def _prompts(given: Settings, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Prompts at even steps of the table's lengths."""
    table = read_table(given.prompts, PROMPTS)
    encoded = sorted(encode_prompts(tokenizer, table["prompt"].tolist()), key=len)
    step = (len(encoded) - 1) / max(1, given.count - 1)
    return [encoded[round(at * step)] for at in range(given.count)]


def _request(given: Settings, prompts: list[list[int]], ends: list[int], seed: int) -> Request:
    rows = [(index, draw) for index in range(given.count) for draw in range(given.draws)]
    return Request(
        prompts=[prompts[index] for index, _ in rows],
        seeds=[row_seed(seed, *row) for row in rows],
        seed=seed,
        ends=ends,
        max_new_tokens=given.max_new_tokens,
        batch_size=given.batch,
    )


def _timed(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    resources: Resources,
) -> dict[str, Any]:
    seconds = clock(next(model.parameters()).device)
    began = seconds()
    answers = ENGINES[resources.engine](model, tokenizer, request, resources)
    spent = seconds() - began
    check(model, request, answers, resources)
    lengths = [len(answer.tokens) for answer in answers]
    return {
        "engine": resources.engine,
        "device": next(model.parameters()).device.type,
        "seconds": spent,
        "answers": len(lengths),
        "tokens": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
    }


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds so far: of the processor, or by the clock where a GPU does the work."""
    if device.type == "cpu":
        return time.process_time

    def finished() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return finished


def summary(given: Settings, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over rounds by engine, and how often the baseline's answers a second each gives in
    the same round.
    """
    by_engine: dict[str, list[dict[str, Any]]] = {name: [] for name in given.engines}
    for row in rows:
        by_engine[row["engine"]].append(row)
    base = by_engine[given.engines[0]]
    found = []
    for name, own in by_engine.items():
        ratios = [b["seconds"] / row["seconds"] for b, row in zip(base, own, strict=True)]
        found.append(
            {
                "engine": name,
                "answers_per_second": _median(row["answers"] / row["seconds"] for row in own),
                "tokens_per_second": _median(row["tokens"] / row["seconds"] for row in own),
                "ratio": _median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "mean_length": statistics.fmean(row["tokens"] / row["answers"] for row in own),
            }
        )
    return found


def _median(values: Any) -> float:
    return statistics.median(list(values))


def page(given: Settings, rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    base = given.engines[0]
    rounds = len(rows) // len(given.engines)
    seconds = "seconds of the processor" if rows[0]["device"] == "cpu" else "the clock"
    lines = [
        "# Answers a second by sampling engine",
        "",
        f"    {options.command(PROGRAM, given)}",
        "",
        f"{given.count * given.draws} answers a round, of at most {given.max_new_tokens} tokens,"
        f" {given.batch} under way at a time; medians of {rounds} rounds, by {seconds}; torch"
        f" {torch.__version__}, transformers {transformers.__version__}.",
        "",
        *options.head(
            ["engine", "answers/s", f"times {base} (least to most)", "tokens/s", "tokens each"]
        ),
    ]
    lines += [
        f"| {row['engine']} | {row['answers_per_second']:.3f} | {row['ratio']:.2f}"
        f" ({row['least']:.2f} to {row['most']:.2f}) | {row['tokens_per_second']:.1f} |"
        f" {row['mean_length']:.0f} |"
        for row in summary(given, rows)
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; its files hold the rows of the rounds so far. Returns the status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given, out = options.parse(Settings, PROGRAM, __doc__, argv)
    torch.set_num_threads(given.threads)
    told = replace(given, base=Path(given.base).name, prompts=Path(given.prompts).name)
    rows: list[dict[str, Any]] = []
    for found in measure(given):  # a run that is stopped leaves the rounds before
        rows += found
        own = {"summary": summary(given, rows), "rows": rows}
        options.tell(out, "sampling", PROGRAM, told, page(told, rows), **own)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How much faster two processes are than one, at sampling and at training, side by side in one run.

    python -m bench.ranks

Both counts take turns, each in processes of their own on random weights; seconds are those of the
work alone, without starting. Two processes give the same losses and answers as one, which is
checked."""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import options
from bench.options import knob
from dualign import launch
from dualign.core import ranks
from dualign.core.artifacts import read_json, write_json
from dualign.core.errors import DualignError
from dualign.lm.models import build_scratch, train_tokenizer
from dualign.lm.sampling import sample
from dualign.params.base import Resources, TrainingParams
from dualign.params.models import ScratchParams
from dualign.training.run import Job
from dualign.training.supervised import train_sft

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.ranks"
COUNTS = (1, 2)


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    rounds: int = knob(5, "turns of each count")
    answers: int = knob(64, "answers that are drawn")
    tokens: int = knob(48, "tokens of each")
    steps: int = knob(8, "training steps of 16 rows")
    width: int = knob(256, "hidden size of the model, of four layers")

    def __post_init__(self) -> None:
        if min(self.rounds, self.answers, self.tokens, self.steps, self.width) < 1:
            raise DualignError("every number must be at least 1")


def _resources(processes: int) -> Resources:
    return Resources(
        device="cpu",
        precision="fp32",
        micro_batch_size=None,
        sampling_batch_size=8,
        scoring_batch_size=8,
        gradient_checkpointing=False,
        checkpoint_steps=10_000,
        log_steps=1,
        threads=1,
        processes=processes,
        nodes=1,
        distributed="ddp",
        engine="generate",
        engine_url=None,
        engine_python=None,
        report_to=[],
        peak_tflops=None,
    )


def measure(given: Settings, processes: int, out: Path) -> None:
    """Time the work in this process and its others; the first one writes what it took."""
    resources = _resources(processes)
    if launch.several(resources):
        launch.start("bench-ranks", resources)
        return
    torch.set_num_threads(1)
    launch.join(resources)
    size = ScratchParams(
        tokenizer="train", vocab_size=2000, hidden_size=given.width, layers=4, heads=4,
        intermediate_size=2 * given.width, context=256,
    )  # fmt: skip
    tokenizer = train_tokenizer([f" word{i} and more" for i in range(500)], 2000)
    model = build_scratch(size, tokenizer, 0)
    prompts = [[5 + i % 50] * 8 for i in range(given.answers)]
    started = time.monotonic()
    drawn = sample(
        model, tokenizer, prompts, count=1, max_new_tokens=given.tokens, batch_size=8, seed=1
    )
    sampled = time.monotonic() - started
    rows = [([1 + i % 50] * 16, [7 + i % 90] * 48) for i in range(16 * given.steps)]
    job = Job(_training(given.steps), resources, out.parent / f"scratch{processes}", seed=3)
    started = time.monotonic()
    metrics = train_sft(model, tokenizer, rows, rows[:1], job)
    trained = time.monotonic() - started
    losses = [row["loss"] for row in metrics["losses"]]
    tokens = [answer.tokens for answer in drawn]
    write_json(out, {"sampling": sampled, "training": trained, "losses": losses, "drawn": tokens})
    ranks.leave()


def _training(steps: int) -> TrainingParams:
    return TrainingParams(
        epochs=1.0, batch_size=16, optimiser="adamw", learning_rate=1e-4, adam_beta2=0.99,
        warmup=0.0, schedule="constant", weight_decay=0.0, max_length=256, max_steps=steps,
    )  # fmt: skip


def compared(given: Settings) -> dict[str, Any]:
    """Median seconds by count and kind of work, and whether both counts found the same."""
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in COUNTS}
    for turn in range(given.rounds):
        for count in COUNTS:
            found[count].append(_run(given, count))
            log.info("turn %d, %d processes: %s", turn + 1, count, _seconds(found[count][-1]))
    one = found[1][0]
    two = found[2][0]
    pairs = zip(one["losses"], two["losses"], strict=True)
    apart = max(abs(first - second) for first, second in pairs)
    rows = [_row(work, found) for work in ("sampling", "training")]
    return {"rows": rows, "same_answers": one["drawn"] == two["drawn"], "losses_apart": apart}


def _run(given: Settings, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "bench.ranks", "--measure", str(count), str(out)]
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
        subprocess.run(
            [*command, json.dumps(asdict(given))], check=True, stderr=subprocess.DEVNULL, env=quiet
        )
        found: dict[str, Any] = read_json(out)
    return found


def _seconds(found: dict[str, Any]) -> str:
    return f"sampling {found['sampling']:.2f} s, training {found['training']:.2f} s"


def _row(work: str, found: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    one = statistics.median(turn[work] for turn in found[1])
    two = statistics.median(turn[work] for turn in found[2])
    return {"work": work, "one": one, "two": two, "speed_up": one / two}


def page(given: Settings, found: dict[str, Any]) -> str:
    """The numbers as a page."""
    lines = [
        "# Two processes against one",
        "",
        f"`{PROGRAM}`: medians of {given.rounds} turns, seconds of work; {os.cpu_count()} cores,"
        " one thread a process.",
        "",
        *options.head(["work", "one process", "two", "speed-up"]),
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['work']} | {row['one']:.2f} s | {row['two']:.2f} s | {row['speed_up']:.2f} |"
        )
    same = "are the same" if found["same_answers"] else "differ"
    lines += ["", f"The answers {same}; losses are {found['losses_apart']:.1e} apart at most."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; its files hold the rows. Returns the status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given, out = options.parse(Settings, PROGRAM, __doc__, argv)
    found = compared(given)
    options.publish(out, "ranks", {"settings": asdict(given), **found}, page(given, found))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Settings(**json.loads(sys.argv[4])), int(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())

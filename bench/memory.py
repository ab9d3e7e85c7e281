"""Peak memory of a DPO step beside an SFT step, all weights trained, on the same real rows.

    python -m bench.memory --base FOLDER --data FOLDER

Each side runs in a process of its own, several times: it loads the base, computes what it needs
beforehand and takes a few steps. Peaks are the kernel's (VmHWM), counted anew for each of the three
phases. SFT reads both answers of every pair as rows of their own, so both sides read the same
sequences in a step.

Of LoRA it is asked what a stage holds that has a reference, a policy, a reward and a cost model:
over one base, or with a base for each."""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bench import dpo_speed, options
from bench.options import knob
from dualign.core.artifacts import read_json, write_json
from dualign.core.errors import DualignError, one_line
from dualign.lm import frozen
from dualign.lm.models import (
    load_policy,
    load_scorer_backbone,
    load_tokenizer,
    save,
    with_lora,
)
from dualign.params.base import LoraParams, Resources
from dualign.scoring.calibration import Platt
from dualign.scoring.scorers import Scorer
from dualign.training.pairs import with_reference
from dualign.training.pairwise import Pair, PairLossConfig, train_pairwise
from dualign.training.run import Job
from dualign.training.supervised import train_sft

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.memory"
#: What is compared, and how it is called in the table.
SIDES = {
    "sft": "SFT, both answers as rows",
    "dpo": "DPO",
    "copy": "DPO that keeps a second model as reference",
    "chosen": "SFT, the preferred answers alone",
}
#: What a stage with LoRA holds, and how it is called in the table.
HOLDING = {"shared": "one base for all", "apart": "a base for each"}
_RANK = 8
_PHASES = ("loaded", "before", "training")
_BETA = 0.1


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    base: str = knob("models/base/smollm2", "folder of a causal language model")
    data: str = knob("", "folder with pku_safety/ and hh_rlhf/")
    batch: int = knob(4, "pairs of a step")
    steps: int = knob(3, "steps")
    rounds: int = knob(5, "processes of each side")
    tokens: int = knob(512, "longest prompt with an answer")
    precision: str = knob("fp32", "fp32, bf16 or pure_bf16")
    threads: int = knob(1, "torch's threads")
    seed: int = knob(0, "seed of the rows")

    def __post_init__(self) -> None:
        numbers = (self.batch, self.steps, self.rounds, self.tokens, self.threads)
        if min(numbers) < 1:
            raise DualignError("batch, steps, rounds, tokens and threads must be at least 1")
        if self.precision not in ("fp32", "bf16", "pure_bf16"):
            raise DualignError(f"--precision {self.precision!r}: give fp32, bf16 or pure_bf16")

    @property
    def rows(self) -> dpo_speed.Settings:
        """The settings of the laboratory that the rows are from; it counts one step more."""
        return dpo_speed.Settings(
            self.base, self.data, self.batch, self.steps, tokens=self.tokens, seed=self.seed
        )


# --- one side -------------------------------------------------------------------------------------


def peak() -> float:
    """The peak of this process in MiB since the last call."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) / 1024


def side(name: str, given: Settings, out: Path) -> None:
    """A process: load, prepare and train as one side does, and write its peaks in MiB."""
    torch.set_num_threads(given.threads)
    resources = dpo_speed.uninterrupted("cpu", given.precision)
    pairs = dpo_speed.pairs_of(given.rows)["PKU"][: given.steps * given.batch]
    tokenizer = load_tokenizer(given.base)
    began = peak()
    model = load_policy(given.base, resources, trained=True)
    loaded = peak()
    with tempfile.TemporaryDirectory() as folder:
        job = partial(_job, given, resources, Path(folder))
        train: Callable[[], Any]
        if name in ("sft", "chosen"):
            rows = supervised(pairs, both=name == "sft")
            size = given.batch * (2 if name == "sft" else 1)
            train = partial(train_sft, model, tokenizer, rows, rows[:1], job(size))
        else:
            reference = load_policy(given.base, resources) if name == "copy" else model
            known = with_reference(pairs, reference, tokenizer, 2 * given.batch)
            loss = PairLossConfig(_BETA, _BETA)
            train = partial(train_pairwise, model, tokenizer, known, loss, job(given.batch))
        before = peak()
        train()
    write_json(out, {"began": began, "loaded": loaded, "before": before, "training": peak()})


def holding(name: str, given: Settings, out: Path) -> None:
    """A process that loads what a stage of LoRA holds, and writes its memory in MiB."""
    resources = dpo_speed.uninterrupted("cpu", given.precision)
    folder = Path(given.data)  # where `_laid_out` has put the models
    peak()
    models: list[Any] = []
    for part in ("sft", "policy", "reward_model", "cost_model"):
        if name == "apart":
            frozen._HELD.clear()
        scores = part.endswith("_model")
        load = Scorer.load if scores else load_policy
        models.append(load(folder / part, resources))
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    write_json(out, {"held": int(line.split()[1]) / 1024, "peak": peak()})


def laid_out(given: Settings, folder: Path) -> None:
    """The base as `sft`, with a policy and two scorers that are fresh adapters on it."""
    sft = folder / "sft"
    shutil.copytree(given.base, sft)
    tokenizer = load_tokenizer(sft)
    lora = LoraParams(
        rank=_RANK, alpha=16.0, dropout=0.0, target_modules="all-linear", quantise=None
    )
    resources = dpo_speed.uninterrupted("cpu", given.precision)
    save(with_lora(load_policy(sft, resources), lora, 0), tokenizer, folder / "policy")
    for name in ("reward_model", "cost_model"):
        backbone = load_scorer_backbone(str(sft), tokenizer, resources, trained=False)
        model = with_lora(backbone, lora, 0, head=True)
        Scorer(model.eval(), tokenizer, Platt()).save(folder / name)


def supervised(pairs: Sequence[Pair], *, both: bool) -> list[tuple[list[int], list[int]]]:
    """Prompts with their preferred answers, or with both."""
    return [
        (pair.prompt, answer)
        for pair in pairs
        for answer in ((pair.first, pair.second) if both else (pair.first,))
    ]


def _job(given: Settings, resources: Resources, folder: Path, batch: int) -> Job:
    training = dpo_speed.schedule(batch, 1e-6, given.tokens, given.steps)
    return Job(training, resources, folder, given.seed)


# --- all sides ------------------------------------------------------------------------------------


def measure(given: Settings) -> dict[str, Any]:
    """Peaks in MiB of every side and round, and the weights of the base."""
    dpo_speed.pairs_of(given.rows)  # or every process would say what is wrong
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for turn in range(given.rounds):
        for name in SIDES:
            rounds[name].append(_measured(name, given))
            log.info("round %d, %s: %s", turn + 1, name, rounds[name][-1])
    held = _held(given)
    weights = sum(
        weight.numel()
        for weight in load_policy(
            given.base, dpo_speed.uninterrupted("cpu", given.precision)
        ).parameters()
    )
    return {"weights": weights, "rounds": rounds, "sides": _medians(rounds), "stage": held}


def _held(given: Settings) -> dict[str, dict[str, float]]:
    """Medians of what a stage of LoRA holds, and of its peak, in MiB."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        laid_out(given, Path(folder))
        there = replace(given, data=folder)
        for name in HOLDING:
            rows = [_measured(name, there) for _ in range(given.rounds)]
            found[name] = {**_median_of(rows), "processes": len(rows)}
            log.info("a stage of LoRA, %s: %s", name, found[name])
    return found


def _medians(rounds: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """The median of every phase; `peak` is the largest of a process."""
    found = {}
    for name, rows in rounds.items():
        peaks = [max(row.values()) for row in rows]
        found[name] = {**_median_of(rows), "peak": statistics.median(peaks)}
    return found


def _median_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of every column."""
    return pd.DataFrame(rows).median().to_dict()


def _measured(name: str, given: Settings) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "bench.memory", "--side", name, str(out)]
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
        ended = subprocess.run(
            [*command, json.dumps(asdict(given))], capture_output=True, text=True, env=quiet
        )
        if ended.returncode:
            last = ended.stderr.strip().rpartition("\n")[2]
            raise DualignError(f"{name}: its process ended with {ended.returncode}: {last}")
        found: dict[str, float] = read_json(out)
    return found


# --- the page -------------------------------------------------------------------------------------


def page(given: Settings, found: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    titles = ["", "loaded, GiB", "before training", "training", "peak", "over SFT", "processes"]
    lines = options.head(titles)
    sides = found["sides"]
    for name, title in SIDES.items():
        row = sides[name]
        cells = [title, *(f"{row[phase] / 1024:.2f}" for phase in (*_PHASES, "peak"))]
        cells += [f"{row['peak'] / sides['sft']['peak']:.3f} ×", str(len(found["rounds"][name]))]
        lines.append(options.line(cells))
    one = found["weights"] * (4 if given.precision == "fp32" else 2) / 2**30
    told = (
        f"The base has {found['weights'] / 1e6:.0f} million weights, {one:.2f} GiB once. Medians"
        " over processes."
    )
    stage = options.head(
        ["reference, policy and two scorers of LoRA", "held, GiB", "peak", "processes"]
    )
    for name, title in HOLDING.items():
        row = found["stage"][name]
        cells = [title, f"{row['held'] / 1024:.2f}", f"{row['peak'] / 1024:.2f}"]
        stage.append(options.line([*cells, str(row["processes"])]))
    head = f"# Peak memory of DPO beside SFT, whole weights, {given.precision}"
    command = f"    {options.command(PROGRAM, given)}"
    return "\n\n".join([head, command, "\n".join(lines), told, "\n".join(stage), _NOTES]) + "\n"


_NOTES = """\
*Before training* is the pass for reference columns of DPO. Peaks of the phases are each counted
anew, so that of training holds weights, gradients, the optimiser's two moments and activations."""


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; write memory.json and memory.md (memory-bf16)."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    given, out = options.parse(Settings, PROGRAM, __doc__, argv)
    found = measure(given)
    given = replace(given, base=Path(given.base).name, data="FOLDER")
    usual = given.precision == Settings().precision
    name = "memory" if usual else f"memory-{given.precision}"
    options.tell(out, name, PROGRAM, given, page(given, found), **found)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        run = holding if sys.argv[2] in HOLDING else side
        run(sys.argv[2], Settings(**json.loads(sys.argv[4])), Path(sys.argv[3]))
    else:
        sys.exit(main())

"""What `dualign plan --cost` reckons, beside what stages took.

    python -m bench.plan_cost --runs shipped=FOLDER smollm2=FOLDER

A folder holds a finished run: params.yaml, data, models, and costs.json of `python -m bench.cost`
(processor seconds), or else reports/provenance (seconds of the clock). The machine is described by
four measurements of one thread: its rate of matrix products, how fast memory is copied, what a
small operation takes, what an import takes. The shares of them that are assumed are those of the
command."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import options
from bench.cost import spent
from bench.dpo_speed import rates
from bench.options import knob
from dualign.core.artifacts import read_json
from dualign.core.errors import DualignError
from pipeline import yaml_text
from pipeline.cost.machine import Machine
from pipeline.cost.page import Reckoning, reckon
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.plan_cost"
#: Side of the bf16 matrices whose product is timed, and bytes that are copied.
_SQUARE = 2048
_BYTES = 1 << 28
_SMALL = 2000


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    runs: tuple[str, ...] = knob(("shipped=.",), "NAME=FOLDER of finished runs")
    mfu: float = knob(0.4, "assumed share of the rate of matrix products")

    def __post_init__(self) -> None:
        for run in self.runs:
            if "=" not in run or not (Path(run.partition("=")[2]) / "params.yaml").is_file():
                raise DualignError(f"--runs {run!r}: write NAME=FOLDER, a folder with params.yaml")


# --- the machine ----------------------------------------------------------------------------------


def machine(mfu: float) -> Machine:
    """One thread of this machine, as it is now."""
    torch.set_num_threads(1)
    narrow = torch.randn(_SQUARE, _SQUARE).to(torch.bfloat16)
    copied = torch.zeros(_BYTES, dtype=torch.uint8)
    layer = torch.nn.Linear(8, 8)
    row = torch.zeros(1, 8)
    with torch.inference_mode():
        bf16 = 2 * _SQUARE**3 / 1e12 / _seconds(lambda: narrow @ narrow)
        bandwidth = 2 * _BYTES / 1e9 / _seconds(copied.clone)
        launch = _seconds(lambda: [layer(row) for _ in range(_SMALL)]) / _SMALL
    start = spent(["-c", "import stages.score"], Path.cwd())["processor"]
    (Path.cwd() / "log.txt").unlink(missing_ok=True)
    return Machine(
        "one thread here",
        bf16,
        max(rates().values()) / 1e3,
        bandwidth,
        64.0,
        0.0,
        mfu=mfu,
        launch=launch,
        start=start,
    )


def _seconds(work: Callable[[], object], times: int = 3) -> float:
    """The fewest processor seconds of a piece of work."""
    found = []
    for _ in range(times):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


# --- a run ----------------------------------------------------------------------------------------


def measured(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds and peak GiB of each stage of a finished run."""
    if (folder / "costs.json").is_file():
        rows = read_json(folder / "costs.json")
        own = {name: row.get("now", row) for name, row in rows.items() if name != "idle"}
        return {
            name: {"seconds": row["processor"], "gib": row["peak_mib"] / 1024}
            for name, row in own.items()
        }
    found = {}
    for file in sorted((folder / "reports" / "provenance").rglob("*.json")):
        told = read_json(file)
        name = "@".join(filter(None, (told["stage"], told["item"])))
        found[name] = {"seconds": told["seconds"], "gib": told["peak_rss_mib"] / 1024}
    return found


def compared(folder: Path, card: Machine) -> list[dict[str, Any]]:
    """A row for each stage: what was reckoned, what was measured, and the ratios."""
    known = measured(folder)
    params = yaml_text.load(yaml_text.read(folder / "params.yaml"))
    found = reckon(params, folder, card, list(known))
    return [_row(name, found, known[name]) for name in found.costs]


def _row(name: str, found: Reckoning, took: Mapping[str, float]) -> dict[str, Any]:
    row = found.costs[name]
    seconds = row.hours * 3600
    return {
        "stage": name,
        "at_most": found.works[name].at_most,
        "reckoned_seconds": seconds,
        "seconds": took["seconds"],
        "ratio": seconds / took["seconds"],
        "reckoned_gib": row.memory,
        "gib": took["gib"],
        "memory_ratio": row.memory / took["gib"],
    }


# --- the page -------------------------------------------------------------------------------------


def page(given: Settings, card: Machine, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The results as Markdown."""
    told = (
        f"One thread: {card.fp32 * 1e3:.0f} GFLOP/s in fp32, {card.bf16 * 1e3:.0f} in bf16,"
        f" {card.bandwidth:.1f} GB/s, {card.launch * 1e6:.1f} us an operation, {card.start:.1f} s"
        f" to import. Assumed: {card.mfu:.0%} of the rate, {card.of_bandwidth:.0%} of the"
        " bandwidth."
    )
    parts = ["# What `plan --cost` reckons, beside what stages took", told]
    for name, rows in found.items():
        parts += [f"## {name}", _table(rows), _summary(rows)]
    return "\n\n".join([*parts, _NOTES]) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    titles = ["stage", "reckoned s", "measured s", "ratio", "reckoned GiB", "measured GiB", "ratio"]
    lines = options.head(titles)
    for row in rows:
        cells = [row["stage"] + (" (at most)" if row["at_most"] else "")]
        cells += [f"{row[key]:.1f}" for key in ("reckoned_seconds", "seconds")]
        cells += [f"{row['ratio']:.2f}"]
        cells += [f"{row[key]:.2f}" for key in ("reckoned_gib", "gib", "memory_ratio")]
        lines.append(options.line(cells))
    return "\n".join(lines)


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    reckoned = sum(row["reckoned_seconds"] for row in rows)
    measured = sum(row["seconds"] for row in rows)
    ratios = [row["ratio"] for row in rows]
    held = [row["memory_ratio"] for row in rows]
    return (
        f"All stages: {reckoned:.0f} s reckoned, {measured:.0f} s measured, ratio"
        f" {reckoned / measured:.2f}; of a stage {geometric(ratios):.2f} in the geometric mean"
        f" ({min(ratios):.2f} to {max(ratios):.2f}), of its memory {geometric(held):.2f}"
        f" ({min(held):.2f} to {max(held):.2f})."
    )


def geometric(values: Sequence[float]) -> float:
    """The geometric mean.

    >>> geometric([0.5, 2.0])
    1.0
    """
    return math.exp(sum(map(math.log, values)) / len(values))


_NOTES = """\
A ratio above 1: more was reckoned than the stage took. Searches and certificates are reckoned with
all that their params allow, and end earlier. Measured seconds are of the processor where the run
was measured by `bench.cost`, else of the clock, on which other work of the machine counts too. In
the embedded world `score` also enumerates all grammatical answers, which is not reckoned. Memory of
scorers of LoRA is reckoned as they are held now, over one base."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; write plan-cost.json and plan-cost.md."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given, out = options.parse(Settings, PROGRAM, __doc__, argv)
    try:
        card = machine(given.mfu)
        runs = {run.partition("=")[0]: Path(run.partition("=")[2]) for run in given.runs}
        found = {name: compared(folder, card) for name, folder in runs.items()}
    except (DualignError, PipelineError) as error:
        log.error("%s", error)
        return 2
    content = {"machine": asdict(card), "mfu": given.mfu, "runs": found}
    options.publish(out, "plan-cost", content, page(given, card, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

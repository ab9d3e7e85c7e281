"""What a run costs in processor time, stage by stage, and a second `dvc repro` with nothing to do.

    python -m bench.cost
    python -m bench.cost --before ../dualign-before --inputs FINISHED --stages prepare sft

Runs every stage by hand, in order, in a folder of its own, and asks the system for the processor
seconds of user and kernel. With `--before`, another checkout, each stage runs there too, right
after, so that both sides share the machine's moods, and the bytes of what they write are compared.
`--inputs` copies what a finished run wrote, so that a few `--stages` can be measured alone. What
has been measured is kept in the work folder; delete it to measure again."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import options
from bench.tiny import KEPT, copy_over
from dualign.core.artifacts import hashes, read_optional_json, replacing, sha256, write_json
from dualign.core.errors import DualignError, one_line
from pipeline.dvc.dag import StageSpec, load_dag

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
CODE = (
    *("dualign", "stages", "dvc.yaml", "params.yaml", ".dvcignore", "data/raw", "models/base"),
    *KEPT,
)
WRITTEN = ("data", "models", "reports")
#: A project of one stage, to see what DVC takes for itself.
ONE_STAGE = "stages:\n  one:\n    cmd: echo 1 > one.txt\n    outs: [one.txt]\n"
#: How often a second run is measured; the least counts, since what else the machine does only adds
#: to it.
TIMES = 3


@dataclass(frozen=True)
class Side:
    """The folder in which the stages of one checkout run."""

    name: str
    folder: Path


def set_up(name: str, root: Path, work: Path, inputs: Path | None) -> Side:
    """The folder of a side, made from its checkout's files where it is not there yet."""
    side = Side(name, work / name)
    if side.folder.is_dir():
        return side
    with replacing(side.folder) as folder:
        for path in CODE:
            if (root / path).exists():  # an older checkout has not all of them
                copy_over(root / path, folder / path)
        for path in WRITTEN if inputs is not None else ():
            shutil.copytree(Path(str(inputs)) / path, folder / path, dirs_exist_ok=True)
        _call(["-m", "dvc", "init", "--no-scm"], folder)
    return side


# --- measuring ------------------------------------------------------------------------------------


def spent(command: Sequence[str], folder: Path) -> dict[str, float]:
    """Run a command of the environment's python; processor and clock seconds, and peak memory in
    MiB.

    Raises DualignError where it fails.
    """
    began = time.monotonic()
    with (folder / "log.txt").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=_environment(folder),
            stdout=output,
            stderr=output,
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise DualignError(
            f"{folder}: {' '.join(command)} ended with {process.returncode}; see log.txt there"
        )
    processor = used.ru_utime + used.ru_stime
    return {
        "processor": processor,
        "clock": time.monotonic() - began,
        "peak_mib": used.ru_maxrss / 1024,
    }


def least(folder: Path) -> float:
    """The fewest processor seconds of a few runs of `dvc repro`."""
    return min(spent(["-m", "dvc", "repro"], folder)["processor"] for _ in range(TIMES))


@functools.cache
def importing(script: str, folder: Path) -> float:
    """Processor seconds that a stage's script takes to import, begun as `python -m` begins it."""
    return spent(["-c", f"import sys; sys.argv[0] = '-m'; import {script}"], folder)["processor"]


def idle(folder: Path) -> float:
    """Processor seconds of `dvc repro` where nothing is to be done."""
    commit(folder)
    return least(folder)


def commit(folder: Path) -> None:
    """Have DVC take what is there for the result of every stage."""
    _call(["-m", "dvc", "commit", "-f"], folder)


def one_stage(work: Path) -> Path:
    """A project of one stage, which has not run where it is new."""
    folder = work / "one-stage"
    if not folder.is_dir():
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / "dvc.yaml").write_text(ONE_STAGE)
            _call(["-m", "dvc", "init", "--no-scm"], temporary)
    return folder


def _call(command: Sequence[str], folder: Path) -> None:
    """Run a command of the environment's python; raises DualignError with the last line it printed
    where it fails.
    """
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=_environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        last = (ended.stderr.strip() or ended.stdout.strip()).rpartition("\n")[2]
        raise DualignError(
            f"{folder}: {' '.join(command[1:])} ended with {ended.returncode}: {last}"
        )


def _environment(folder: Path) -> dict[str, str]:
    """No setting of threads, as on a fresh machine, and the code of that folder."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_NUM_THREADS", "DUALIGN_SCRATCH")
    }
    return {**kept, "PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1", "HF_HUB_OFFLINE": "1"}


# --- both sides -----------------------------------------------------------------------------------


def measure(
    sides: Sequence[Side], stages: Sequence[str], work: Path, *, whole: bool
) -> dict[str, Any]:
    """Fill work/costs.json with what is not in it yet, stage by stage, and return it; `whole` adds
    idle runs.
    """
    found = read_optional_json(work / "costs.json")
    for spec in _chosen(sides[0], stages):
        for side in sides:
            row = found.setdefault(spec.name, {})
            if side.name not in row:
                row[side.name] = _measured(spec, side)
                log.info(
                    "%s %s: %.1f processor seconds",
                    spec.name,
                    side.name,
                    row[side.name]["processor"],
                )
                write_json(work / "costs.json", found)
        if len(sides) > 1 and "same" not in found[spec.name]:
            found[spec.name]["same"] = (
                len({str(_written(spec, side.folder)) for side in sides}) == 1
            )
            write_json(work / "costs.json", found)
    if whole:
        found["idle"] = {side.name: idle(side.folder) for side in sides}
        found["idle"]["one stage"] = least(one_stage(work))
        write_json(work / "costs.json", found)
    return found


def _chosen(side: Side, stages: Sequence[str]) -> list[StageSpec]:
    dag = load_dag(side.folder)
    unknown = sorted(set(stages) - set(dag))
    if unknown:
        raise DualignError(f"no stage {unknown[0]}; one of {', '.join(dag)}")
    return [spec for name, spec in dag.items() if not stages or name in stages]


def _measured(spec: StageSpec, side: Side) -> dict[str, float]:
    command = spec.by_hand.split()[1:]
    shutil.rmtree(side.folder / ".scratch", ignore_errors=True)
    return {"importing": importing(command[1], side.folder), **spent(command, side.folder)}


def _written(spec: StageSpec, folder: Path) -> dict[str, Any]:
    """Hashes of what a stage wrote, without its provenance, which has times."""
    outs = [*spec.outs, *spec.metrics]
    paths = [folder / out for out in outs if not out.startswith("reports/provenance")]
    return {
        str(path.relative_to(folder)): hashes(path) if path.is_dir() else sha256(path)
        for path in paths
    }


# --- the page -------------------------------------------------------------------------------------


def page(command: str, sides: Sequence[str], found: Mapping[str, Any]) -> str:
    """The table in markdown: a row for each stage, and their sum."""
    rows = {name: row for name, row in found.items() if name != "idle"}
    heads = [
        f"{side}, {what}"
        for side in sides
        for what in ("processor s", "of them importing", "clock s")
    ]
    both = len(sides) > 1
    lines = options.head(["stage", *heads, *(["same bytes"] if both else [])])
    for name, row in rows.items():
        lines.append(
            _line(
                name,
                [row[side] for side in sides],
                ["yes" if row["same"] else "no"] if both else [],
            )
        )
    sums = [_sum(rows.values(), side) for side in sides]
    lines.append(_line("all", sums, [""] if both else []))
    return options.page(
        "What a run costs",
        command,
        "\n".join(lines),
        *_idle(sides, found.get("idle")),
        _NOTES,
    )


_SHOWN = ("processor", "importing", "clock")


def _sum(rows: Iterable[Mapping[str, Any]], side: str) -> dict[str, float]:
    total = dict.fromkeys(_SHOWN, 0.0)
    for row in rows:
        total = {key: total[key] + row[side][key] for key in _SHOWN}
    return total


def _line(name: str, costs: Sequence[Mapping[str, float]], same: Sequence[str]) -> str:
    cells = [f"{cost[key]:.1f}" for cost in costs for key in _SHOWN]
    return options.line([name, *cells, *same])


def _idle(sides: Sequence[str], idle: Mapping[str, float] | None) -> list[str]:
    if idle is None:
        return []
    one = idle["one stage"]
    told = [f"{side} {idle[side]:.2f} s ({idle[side] / one:.1f} ×)" for side in sides]
    return [
        f"A second `dvc repro` with nothing to do: {', '.join(told)}; a project of one stage"
        f" {one:.2f} s."
    ]


_NOTES = """\
How to read it: processor seconds are those of user and kernel, of the stage's process and its
children; a stage is run
by hand, so the table is without DVC's own time. On a busy machine they are fair only between two
columns of one line, which were measured one after the other. *Importing* is an import of the
stage's script alone. *Same bytes* compares
all that a stage wrote but its provenance; where its inputs differ already, so does it. The report \
shows the clock."""


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; write cost.json and cost.md."""
    parser = options.parser("python -m bench.cost", __doc__)
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument(
        "--inputs", type=Path, help="folder of a finished run, whose outputs are copied first"
    )
    parser.add_argument(
        "--stages", nargs="+", default=[], help="instances such as sft or evaluate@dualign"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(".scratch/bench-cost"), help="folder of the runs"
    )
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if given.stages and given.inputs is None:
        parser.error("--stages goes with --inputs, a run that has written what they read")
    work = given.work.absolute()
    roots = {"now": ROOT, **({"before": given.before.absolute()} if given.before else {})}
    sides = [set_up(name, root, work, given.inputs) for name, root in reversed(roots.items())]
    whole = given.inputs is not None or not given.stages
    found = measure(sides, given.stages, work, whole=whole)
    options.publish(
        given.out, "cost", found, page(_command(given), [side.name for side in sides], found)
    )
    return 0


def _command(given: argparse.Namespace) -> str:
    words = ["python -m bench.cost"]
    words += ["--before BEFORE"] if given.before else []
    words += ["--inputs FINISHED"] if given.inputs else []
    return " ".join([*words, *(["--stages", *given.stages] if given.stages else [])])


if __name__ == "__main__":
    sys.exit(main())

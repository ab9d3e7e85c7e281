"""Stops at random moments: whether a stage that is run again ends with the bytes of one left in
peace, and no debris.

    python -m bench.kills --count 50 --signal KILL
    python -m bench.kills --count 50 --disk | --torn | --pipeline | --worker

Runs the graph once on a tiny world, then takes one stage instance after the other at random:
forgets its outputs, starts it, stops it, runs it again and compares. `--disk` lets no file grow
beyond a random size instead, `--torn` damages one file of a checkpoint, `--pipeline` kills `python
-m pipeline run`. Results of several modes are kept side by side. The world is that of `bench.tiny`.

`--worker` has `python -m pipeline run --cluster` hand the stage to a worker, takes the power from
that worker once it has the stage in hand, and starts it again (`bench.cluster`). There the run
waits 25 seconds for a sign of life, not a minute."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import options
from bench.cluster import Cluster, on_nodes
from bench.tiny import LONG, LOOK, World, watch
from dualign.core.artifacts import listed, read_optional_json
from dualign.core.errors import DualignError, one_line
from pipeline.dvc.dag import StageSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One stop: `how` and when, the statuses of both runs, whether the bytes are the same, and what
    was left behind.

    `told` says whether the log has the line that it should: no traceback, and what was passed over.
    """

    stage: str
    how: str
    stopped: int
    status: int
    same: bool
    told: bool
    debris: list[str]


# --- ways to stop ---------------------------------------------------------------------------------


def killed(
    world: World, spec: StageSpec, draw: random.Random, number: int, command: Sequence[str] = ()
) -> Trial:
    """Send a signal to a stage and its children: at a random moment, or right after one of its
    files has changed.
    """
    how, enough = _moment(world, spec, draw, 2 if command else 1, changes=not command)
    world.forget(spec)
    process = world.start(spec, command)
    world.watch(process, spec, enough)
    time.sleep(draw.uniform(0, 4 * LOOK))
    if process.poll() is None:
        os.killpg(process.pid, number)
    stopped = process.wait(LONG)
    told = _quiet(world, spec, world.said)
    return _again(
        world, spec, f"{signal.Signals(number).name} {how}", stopped, told=told, command=command
    )


def full(world: World, spec: StageSpec, draw: random.Random) -> Trial:
    """Let no file grow beyond a random size, as a full disk would not."""
    sizes = [
        file.stat().st_size
        for out in spec.outs
        for file in (world.folder / out).rglob("*")
        if file.is_file()
    ]
    limit = draw.randint(1_000, max([30_000, *sizes]))
    world.forget(spec)
    stopped = world.start(spec, limit=limit).wait(LONG)
    said = stopped in (0, DualignError.status) and _quiet(world, spec, world.said)
    return _again(world, spec, f"no file above {limit} bytes", stopped, told=said)


def torn(world: World, spec: StageSpec, draw: random.Random) -> Trial:
    """Stop a training after its second checkpoint and cut, empty or remove one file of one of
    them.
    """
    world.forget(spec)
    process = world.start(spec)
    world.watch(
        process,
        spec,
        lambda seen: any(path.endswith("checkpoint-4/manifest.json") for path in seen[-1]),
    )
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    stopped = process.wait()
    found = sorted((world.folder / ".scratch").rglob("checkpoint-*"))
    files = [file for folder in found for file in listed(folder, "**/*") if file.is_file()]
    file = draw.choice(files)
    damage = draw.choice(("cut", "emptied", "removed"))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    if damage == "removed":
        file.unlink()
    newest = "checkpoint-4" in file.parts
    return _again(world, spec, f"{file.parent.name}/{file.name} {damage}", stopped, passes=newest)


def lost(cluster: Cluster, spec: StageSpec, draw: random.Random) -> Trial:
    """Kill a worker, with all below it, that has a stage in hand, and start one in its place."""
    world = cluster.world
    cluster.forget(spec)
    run = cluster.run(spec)
    watch(run, lambda: cluster.state(spec), lambda seen: bool(cluster.trees(spec)))
    how, enough = _moment(
        world, spec, draw, 2
    )  # its inputs are fetched and its results pushed there too
    watch(run, lambda: cluster.state(spec), enough)
    held = cluster.lose(spec)
    status = run.wait(LONG)
    said = cluster.said
    told = _quiet(world, spec, said) and (not held or "handing the stage out again" in said)
    differing = cluster.fetch(spec) if status == 0 else ["the run failed"]
    debris = cluster.debris()
    trial = Trial(
        spec.name, f"worker {how}", -signal.SIGKILL * held, status, not differing, told, debris
    )
    log.info("%s", trial)
    if status or differing or debris:
        _keep(world, spec, f"{trial}\n{differing}\n{said}")
        cluster.restore()
    return trial


def _moment(
    world: World, spec: StageSpec, draw: random.Random, longer: float = 1.0, *, changes: bool = True
) -> tuple[str, Callable[[list[set[str]]], bool]]:
    """When to stop a stage: after random seconds, up to so many times as it took, or when its files
    change.
    """
    costs = world.costs[spec.name]
    if changes and draw.random() >= 0.5:
        change = draw.randint(2, max(2, costs["changes"]))
        return f"at change {change}", lambda seen: len(seen) >= change
    wait = draw.uniform(0, costs["seconds"] * longer)
    return f"after {wait:.1f} s", _after(wait)


def _quiet(world: World, spec: StageSpec, said: str) -> bool:
    """Whether a log has no traceback; one that has is kept."""
    quiet = "Traceback" not in said
    if not quiet:
        _keep(world, spec, said)
    return quiet


def _keep(world: World, spec: StageSpec, text: str) -> None:
    (world.folder.parent / f"failed-{spec.name}-{time.monotonic_ns()}.txt").write_text(text)


def _after(seconds: float) -> Callable[[list[set[str]]], bool]:
    deadline = time.monotonic() + seconds
    return lambda seen: time.monotonic() >= deadline


def _again(
    world: World,
    spec: StageSpec,
    how: str,
    stopped: int,
    *,
    told: bool = True,
    passes: bool = False,
    command: Sequence[str] = (),
) -> Trial:
    """Run the stage to its end and compare; the world is put right where it was not."""
    status = world.start(spec, command).wait(LONG)
    while (
        command and status == 2 and "another run uses this workspace" in world.said
    ):  # its stages still stop
        time.sleep(1.0)
        status = world.start(spec, command).wait(LONG)
    said = _quiet(world, spec, world.said) and (
        not passes or "is passed over and removed" in world.said
    )
    differs = world.differs()
    debris = world.debris()
    trial = Trial(spec.name, how, stopped, status, not differs, told and said, debris)
    log.info("%s", trial)
    if status or differs or debris:
        _keep(world, spec, f"{trial}\n{world.said}")
        world.restore()
    return trial


# --- results --------------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> str:
    """A table for each mode, a row for each stage."""
    lines = ["# Kills", ""]
    for mode, result in sorted(found.items()):
        trials = [Trial(**row) for row in result["trials"]]
        titles = ["stage", "stops", "while it ran", "same bytes", "told", "left behind"]
        lines += [f"`{result['command']}`", "", *options.head(titles)]
        for name in sorted({trial.stage for trial in trials}):
            lines.append(_row(name, [trial for trial in trials if trial.stage == name]))
        lines += [_row(f"all ({mode})", trials), ""]
    return "\n".join(lines)


def _row(name: str, trials: Sequence[Trial]) -> str:
    counts = (
        len(trials),
        sum(trial.stopped != 0 for trial in trials),
        sum(trial.same and trial.status == 0 for trial in trials),
        sum(trial.told for trial in trials),
        sum(len(trial.debris) for trial in trials),
    )
    return options.line([name, *map(str, counts)])


def trials_of(world: World, mode: str, count: int, seed: int) -> Iterator[Trial]:
    """So many stops of one mode, one after the other."""
    draw = random.Random(seed)
    chosen = [
        spec for spec in world.chosen if mode != "torn" or world.costs[spec.name]["checkpoints"]
    ]
    if mode == "worker":
        with on_nodes(world) as cluster:
            yield from (lost(cluster, draw.choice(chosen), draw) for _ in range(count))
        return
    if mode == "pipeline":
        world.commit()
    for _ in range(count):
        spec = draw.choice(chosen)
        if mode in ("disk", "torn"):
            yield (full if mode == "disk" else torn)(world, spec, draw)
        elif mode == "pipeline":
            command = ["-m", "pipeline", "run", "--force", "--stage", spec.name]
            yield killed(world, spec, draw, signal.SIGKILL, command)
        else:
            yield killed(world, spec, draw, signal.Signals[f"SIG{mode}"])


def write(out: Path, mode: str, command: str, trials: Sequence[Trial]) -> None:
    """Put the trials of a mode in place of its earlier ones in kills.json, and all into
    kills.md.
    """
    row = {"command": command, "trials": [asdict(trial) for trial in trials]}
    found = {**read_optional_json(out / "kills.json"), mode: row}
    options.publish(out, "kills", found, page(found))


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; write kills.json and kills.md. Returns 1 if a stop was not made good."""
    parser = options.parser("python -m bench.kills", __doc__)
    parser.add_argument("--count", type=int, default=20, help="stops (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of what is stopped and when (default: %(default)s)"
    )
    parser.add_argument(
        "--stages", nargs="+", default=[], help="instances such as sft or reward_dpo@helpful"
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--signal", choices=("KILL", "TERM"), dest="mode", default="KILL", help="(default: KILL)"
    )
    for mode in ("disk", "torn", "pipeline", "worker"):
        modes.add_argument(f"--{mode}", action="store_const", const=mode, dest="mode")
    parser.add_argument(
        "--work", type=Path, default=Path(".scratch/bench-kills"), help="folder of the runs"
    )
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    option = f"--signal {given.mode}" if given.mode.isupper() else f"--{given.mode}"
    command = f"python -m bench.kills --count {given.count} --seed {given.seed} {option}"
    command += f" --stages {' '.join(given.stages)}" if given.stages else ""
    trials: list[Trial] = []
    world = World(given.work.absolute(), given.stages)
    for trial in trials_of(world, given.mode, given.count, given.seed):
        trials.append(trial)
        write(given.out, given.mode, command, trials)
    return int(
        any(trial.status or not trial.same or not trial.told or trial.debris for trial in trials)
    )


if __name__ == "__main__":
    sys.exit(main())

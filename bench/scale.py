"""How time and memory grow with rows, pairs, pool answers and methods.

    python -m bench.scale

What must stay flat is the time a row and the memory beside it. Each size runs in processes of its
own, so that a peak is its own; seconds are those of the processor, on one thread. Rows have the
columns of PKU-SafeRLHF, texts of random words, and lie in a scratch folder. The pipeline is the
repository's graph with more methods and policies, over outputs that hold nothing."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench import cost, options
from bench.options import knob
from dualign.core import schema
from dualign.core.artifacts import read_json, stream_parquet, write_json
from dualign.core.errors import DualignError
from dualign.core.schema import POOL, SCORED_PAIRS, by_prompt, read_table
from dualign.core.temporaries import scratch_root, temporary_folder
from dualign.core.work import host_peak
from dualign.data.prepare import prepare
from dualign.math.dual.solution import Bootstrap, solve
from dualign.params.data import PrepareParams
from pipeline import yaml_text
from pipeline.dvc.dag import load_dag

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.scale"
KINDS = ("sft", "helpful", "safety")
#: Words of a question and of an answer, and answers of the pool to one prompt.
_QUESTION = 13
_ANSWER = 60
_SAMPLES = 20
#: Sizes from here on are measured once.
_LARGE = 1_000_000


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    rows: tuple[int, ...] = knob((1000, 10_000, 100_000, 1_000_000), "rows that are prepared")
    pairs: tuple[int, ...] = knob((1000, 10_000, 100_000), "pairs that are encoded")
    answers: tuple[int, ...] = knob((1000, 10_000, 100_000), "answers of the pool")
    methods: tuple[int, ...] = knob((6, 100), "methods, each with a policy that is evaluated")
    rounds: int = knob(5, "processes of each size below a million")

    def __post_init__(self) -> None:
        if min(*self.rows, *self.pairs, *self.answers, *self.methods, self.rounds) < 1:
            raise DualignError("sizes and rounds must be at least 1")
        if min(self.rows) < 600 or min(self.answers) < 2 * _SAMPLES:
            raise DualignError(f"give 600 rows and {2 * _SAMPLES} answers at least")


# --- what is measured -----------------------------------------------------------------------------

Work = Callable[[], object]


def texts(seed: int) -> Callable[[int], str]:
    """What writes so many random words."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(4000)]
    return lambda count: " ".join(rng.choices(words, k=count))


def preparing(rows: int, folder: Path) -> Work:
    """`prepare` on so many rows in all, a third of each kind."""
    for kind in KINDS:
        lines = (json.dumps(row) + "\n" for row in pku_rows(rows // 3, KINDS.index(kind)))
        with (folder / f"{kind}.jsonl").open("w") as file:
            file.writelines(lines)
    sizes = {f"{name}_prompts": 20 for name in ("pool", "search", "certify", "eval")}
    world = {"sft_rows": 1, "helpful_pairs": 1, "safety_pairs": 1, "sharpness": 1.0}
    values = {
        **{kind: [{"format": "pku", "path": f"{kind}.jsonl"}] for kind in KINDS},
        **sizes,
        "seed": 0,
        "folder": str(folder),
        "world": world,
        "heldout_share": 0.1,
        "max_rejected_share": 0.2,
        "max_prompt_chars": 2000,
        "max_response_chars": 4000,
    }
    params = PrepareParams.model_validate(values)
    return lambda: prepare(params, folder / "out")


def pku_rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows in PKU-SafeRLHF's columns: three to a prompt, the first answer safe."""
    text = texts(seed)
    prompt = ""
    for at in range(count):
        if at % 3 == 0:
            prompt = f"{text(_QUESTION)} {at}"
        yield {
            "prompt": prompt,
            "response_0": text(_ANSWER),
            "response_1": text(_ANSWER),
            "is_response_0_safe": True,
            "is_response_1_safe": False,
            "better_response_id": at % 2,
            "safer_response_id": 0,
        }


def encoding(pairs: int, folder: Path) -> Work:
    """A table of scored pairs up to the trainer's data set, and once through it."""
    # Here, since torch and TRL are 400 MiB that the other parts' peaks should not hold.
    from dualign.lm.models import train_tokenizer
    from dualign.training.pairs import lagrangian_pairs
    from dualign.training.pairwise import fitting, pair_dataset

    path = folder / "pairs.parquet"
    stream_parquet(path, scored_rows(pairs), SCORED_PAIRS)
    text = texts(0)
    tokenizer = train_tokenizer([text(_ANSWER) for _ in range(500)], 4000)

    def work() -> None:
        frame = read_table(path, SCORED_PAIRS)
        kept = fitting(lagrangian_pairs(frame, tokenizer, 1.0), 4096)
        for _ in pair_dataset(kept).iter(32):
            pass

    return work


def scored_rows(count: int) -> Iterator[dict[str, Any]]:
    """Rows of SCORED_PAIRS, their scores all alike."""
    scores = ("logp_ref", "reward", "cost")
    columns = [f"{name}_{side}" for name in scores for side in ("chosen", "rejected")]
    for row in pku_rows(count, 0):
        yield {
            "prompt": schema.user(row["prompt"]),
            "chosen": row["response_0"],
            "rejected": row["response_1"],
            **dict.fromkeys(columns, -1.0),
        }


def solving(answers: int, folder: Path) -> Work:
    """A pool of so many answers, read, its dual solved and its frontier predicted."""
    path = folder / "pool.parquet"
    stream_parquet(path, pool_rows(answers), POOL)

    def work() -> None:
        pool = read_table(path, POOL)
        reward, cost, length = (by_prompt(pool, name) for name in ("reward", "cost", "length"))
        solved = solve(
            reward, cost, limit=-0.2, beta=1.0, lambda_max=50.0, bootstrap=Bootstrap(200, 0)
        )
        solved.frontier([0.0, 0.5, 1.0, 2.0], length, reward=reward, level=0.9)

    return work


def pool_rows(count: int) -> Iterator[dict[str, Any]]:
    """Rows of POOL with random scores."""
    rng = np.random.default_rng(0)
    text = texts(0)
    for prompt, sample in itertools.product(range(count // _SAMPLES), range(_SAMPLES)):
        yield {
            "prompt_id": f"{prompt:016x}",
            "prompt": schema.user(f"question {prompt}"),
            "sample": sample,
            "response": text(_ANSWER),
            "tokens": list(range(_ANSWER)),
            "length": _ANSWER,
            "ended": True,
            "logp_ref": -100.0,
            "reward": rng.normal(),
            "cost": rng.normal(),
        }


PARTS: dict[str, Callable[[int, Path], Work]] = {
    "rows": preparing,
    "pairs": encoding,
    "answers": solving,
}


def part(name: str, size: int, out: Path) -> None:
    """A process: make the data in one of its own, then do the work and say what it took."""
    with temporary_folder(out.parent) as folder:
        work = PARTS[name](size, folder)
        before = 1024 * host_peak()
        began = time.process_time()
        work()
        seconds = time.process_time() - began
        write_json(out, {"seconds": seconds, "before": before, "peak": 1024 * host_peak()})


# --- the pipeline ---------------------------------------------------------------------------------


def pipeline(methods: int, work: Path, rounds: int) -> dict[str, Any]:
    """Medians of processor seconds of a plan and of `dvc repro` where nothing is to be done."""
    side = cost.set_up(f"methods-{methods}", cost.ROOT, work, None)
    write_methods(side.folder / "params.yaml", methods)
    dag = load_dag(side.folder)
    for spec in dag.values():
        for path in (*spec.outs, *spec.metrics):
            put_nothing(side.folder / path)
    for path in itertools.chain.from_iterable(spec.deps for spec in dag.values()):
        if not (side.folder / path).exists():  # a file of an output that is a folder
            put_nothing(side.folder / path)
    cost.commit(side.folder)
    found: dict[str, Any] = {"methods": methods, "instances": len(dag), "processes": rounds}
    commands = {"plan": ["-m", "pipeline", "plan"], "repro": ["-m", "dvc", "repro"]}
    for name, command in commands.items():
        runs = [cost.spent(command, side.folder) for _ in range(rounds)]
        found[name] = statistics.median(run["processor"] for run in runs)
        found[f"{name}_peak"] = statistics.median(run["peak_mib"] for run in runs)
    return found


def write_methods(path: Path, methods: int) -> None:
    """Have params.yaml name so many searches, and evaluate the policy of each."""
    params = yaml_text.load(yaml_text.read(path))
    row = {"method": "mocan", "start": "lagrangian_dpo/bernoulli", "reference": "sft"}
    names = [f"search_{number}" for number in range(methods - 1)]
    # the shipped one stays: a certificate is made of it
    params["methods"] = {"dualign": params["methods"]["dualign"], **dict.fromkeys(names, row)}
    policies = {name: f"aligned/{name}" for name in ("dualign", *names)}
    params["evaluate"]["policies"] = {"sft": "sft", **policies}
    path.write_text(json.dumps(params))  # which is YAML


def put_nothing(path: Path) -> None:
    """An output that holds nothing, a file or a folder by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        path.write_text("{}")
    else:
        path.mkdir(exist_ok=True)
        (path / "nothing").write_text("")


# --- all sizes ------------------------------------------------------------------------------------


def measure(given: Settings, work: Path) -> dict[str, list[dict[str, Any]]]:
    """A row for each size of each part."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*PARTS, "methods")}
    for name in PARTS:
        for size in getattr(given, name):
            rounds = 1 if size >= _LARGE else given.rounds
            runs = pd.DataFrame([_measured(name, size, work) for _ in range(rounds)])
            found[name].append({"size": size, "processes": rounds, **runs.median().to_dict()})
            log.info("%s: %s", name, found[name][-1])
    for methods in given.methods:
        found["methods"].append(pipeline(methods, work, given.rounds))
        log.info("%s", found["methods"][-1])
    return found


def _measured(name: str, size: int, work: Path) -> dict[str, float]:
    with temporary_folder(work) as folder:
        out = folder / "found.json"
        command = [sys.executable, "-m", "bench.scale", "--part", name, str(size), str(out)]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        ended = subprocess.run(command, capture_output=True, text=True, env=settings)
        if ended.returncode:
            last = ended.stderr.strip().rpartition("\n")[2]
            raise DualignError(f"{name} {size}: its process ended with {ended.returncode}: {last}")
        row: dict[str, float] = read_json(out)
    return row


# --- the page -------------------------------------------------------------------------------------

_TITLES = {
    "rows": "rows through `prepare`",
    "pairs": "pairs up to the trainer's data set",
    "answers": "answers of the pool through the dual",
}


def page(given: Settings, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The results as Markdown."""
    parts = ["# How time and memory grow", f"    {options.command(PROGRAM, given)}"]
    for name, title in _TITLES.items():
        titles = [title, "processor ms each", "over the row before", "peak MiB", "of them before"]
        lines = options.head([*titles, "processes"])
        last = None
        for row in found[name]:
            each = 1000 * row["seconds"] / row["size"]
            ratio = "" if last is None else f"{each / last:.2f} ×"
            cells = [f"{row['size']:,}", f"{each:.3f}", ratio, f"{row['peak']:.0f}"]
            cells += [f"{row['before']:.0f}", str(row["processes"])]
            lines.append(options.line(cells))
            last = each
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, _pipeline(found["methods"]), _NOTES]) + "\n"


def _pipeline(rows: Sequence[Mapping[str, Any]]) -> str:
    titles = ["methods", "instances", "plan, processor s", "peak MiB", "no-op `dvc repro`, s"]
    lines = options.head([*titles, "peak MiB", "processes"])
    for row in rows:
        cells = [str(row["methods"]), str(row["instances"])]
        cells += [f"{row[key]:.2f}" if "peak" not in key else f"{row[key]:.0f}" for key in _KEYS]
        lines.append(options.line([*cells, str(row["processes"])]))
    return "\n".join(lines)


_KEYS = ("plan", "plan_peak", "repro", "repro_peak")
_NOTES = """\
Medians over processes; a million rows are prepared once. *Before* is the peak when the work
begins, after imports and the writing of the data."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; write scale.json and scale.md."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    given, out = options.parse(Settings, PROGRAM, __doc__, argv)
    work = (scratch_root() / "bench-scale").absolute()
    work.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_folder(work) as folder:
            found = measure(given, folder)
    except DualignError as error:
        log.error("%s", error)
        return error.status
    options.tell(out, "scale", PROGRAM, given, page(given, found), **found)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        part(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        sys.exit(main())

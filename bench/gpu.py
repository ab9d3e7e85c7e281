"""What a machine with a GPU does in some minutes: one table, each part in a process of its own.

    bench/gpu.sh run FOLDER

installs without a network what `bench/gpu.sh pack FOLDER` has carried there and becomes
`python -m bench.gpu`. A part that fails, or that takes more than its share of the time, is a row
like any other and stops none of the others."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import options
from bench.options import knob
from bench.tiny import ROOT, copy
from dualign.core.artifacts import listed, read_json, write_parquet
from dualign.core.errors import DualignError
from dualign.core.peaks import named_peak
from dualign.core.schema import PROMPTS, Message, prompt_id
from dualign.lm.models import build_scratch, load_tokenizer, save
from dualign.params.models import ScratchParams
from pipeline.dvc.overlay import whole

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.gpu"
_TARGET = "dual_search@dualign"
_SMALL = ScratchParams(
    tokenizer="train", vocab_size=49152, hidden_size=64, layers=2, heads=2, intermediate_size=128,
    context=1024,
)  # fmt: skip

Row = tuple[str, str]


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    carried: str = knob("", "folder with base.gguf and data/, as bench/gpu.sh unpacks it")
    seconds: float = knob(420.0, "seconds for all parts")
    short: str = knob("no", "yes: every part at its smallest, to see that it runs")

    def __post_init__(self) -> None:
        if self.short not in ("yes", "no"):
            raise DualignError(f"--short {self.short!r} is neither yes nor no")

    @property
    def small(self) -> bool:
        """Whether every part is at its smallest."""
        return self.short == "yes"


@dataclass(frozen=True)
class Place:
    """Where a run works: model, rows, and a folder for results and logs."""

    given: Settings
    base: Path
    data: Path
    out: Path


@dataclass(frozen=True)
class Part:
    """A part of the run, its share of the time, its command, and what its results say; of a
    `partial` one also those of a part that was stopped.
    """

    name: str
    share: float
    command: Callable[[Place], Sequence[str]]
    rows: Callable[[Place], list[Row]]
    on_gpu: bool = False
    from_rows: bool = False
    partial: bool = False


# --- parts ----------------------------------------------------------------------------------------


def _tests(chosen: str) -> Callable[[Place], Sequence[str]]:
    """Tests marked `gpu` that are `chosen` too; files without any are not even read."""

    def command(place: Place) -> Sequence[str]:
        files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py"))]
        marked = [file for file in files if _names_a_gpu(Path(file).read_text())]
        report = f"--junit-xml={_report(place, chosen)}"
        wanted = ["-m", f"gpu and {chosen}", "-p", "no:cacheprovider"]
        return ["-m", "pytest", "-q", *wanted, report, *marked]

    return command


def _report(place: Place, chosen: str) -> Path:
    return place.out / f"tests-{chosen.replace(' ', '-')}.xml"


def _names_a_gpu(test: str) -> bool:
    """Whether a file of tests has any for a GPU."""
    return re.search(r"mark\.gpu\b|\bDEVICES\b", test) is not None


def _tested(chosen: str) -> Callable[[Place], list[Row]]:
    def rows(place: Place) -> list[Row]:
        from xml.etree import ElementTree

        suite = ElementTree.parse(_report(place, chosen)).getroot()[0].attrib
        kinds = ("tests", "failures", "errors", "skipped")
        return [("marked gpu", ", ".join(f"{suite[kind]} {kind}" for kind in kinds))]

    return rows


def _numerics(place: Place) -> Sequence[str]:
    sizes = "--answers 8 --steps 20 --rows 8"
    if place.given.small:
        sizes = "--answers 2 --tokens 16 --steps 1 --rows 1"
    return _lab(place, "numerics", "--base", str(place.base), *sizes.split())


def _numbers(place: Place) -> list[Row]:
    found = read_json(place.out / "numerics.json")
    ratio = max(row["log_ratio"] for row in found["log_ratios"])
    bf16 = next(row for row in found["training"] if row["precision"] == "bf16")
    memory = {row["head"]: row["mib"] for row in found["memory"]}
    return [
        ("largest log-ratio at step 0, nats", f"{ratio:.5f}"),
        ("bf16's change of the weights beside fp32's", f"cosine {bf16['cosine']:.4f}"),
        ("head: chunked, plain", f"{memory['chunked']:.0f}, {memory['plain']:.0f} MiB"),
    ]


def _speed(shape: str) -> Callable[[Place], Sequence[str]]:
    def command(place: Place) -> Sequence[str]:
        sizes = "--batch 8 --steps 5 --precision bf16"
        if place.given.small:
            sizes = "--batch 1 --steps 1 --tokens 128"
        if shape:
            sizes += f" --random {shape}" + (" --layers 1" if place.given.small else "")
        given = ["--base", str(place.base), "--data", str(place.data), *sizes.split()]
        return _lab(place, "dpo_speed", *given)

    return command


def _speeds(shape: str) -> Callable[[Place], list[Row]]:
    def rows(place: Place) -> list[Row]:
        parts = ["dpo-speed", *([] if place.given.small else ["bf16"]), *([shape] if shape else [])]
        found = read_json(place.out / f"{'-'.join(parts)}.json")["found"]
        told = []
        for source, own in found["sources"].items():
            sides = own["sides"]
            faster = ", ".join(
                f"{sides[name]['times']:.2f} times {name}" for name in ("defaults", "best")
            )
            told += [(f"{source}: pairs/s", f"{sides['ours']['pairs_per_second']:.1f}, {faster}")]
            share = sides["ours"]["gflops"] / own["rates"]["torch"]
            told += [(f"{source}: of the measured rate", f"{share:.0%}{_mfu(sides['ours'])}")]
        peaks = ", ".join(f"{name} {gib:.1f}" for name, gib in found["peak_gib"].items())
        return [*told, ("peak GiB", peaks)]

    return rows


def _mfu(ours: dict[str, float]) -> str:
    """The share of the stated peak, on a GPU of which it is known."""
    if not torch.cuda.is_available():
        return ""
    peak = named_peak(torch.cuda.get_device_name())
    return f", MFU {ours['gflops'] * 1e9 / peak:.0%}" if peak else ""


def _sampling(place: Place) -> Sequence[str]:
    sizes = "--count 48 --draws 4 --batch 96 --max-new-tokens 128 --rounds 3 --precision bf16"
    if place.given.small:
        sizes = "--count 2 --draws 1 --batch 2 --max-new-tokens 8 --rounds 1"
    prompts = place.out / "prompts.parquet"
    _write_prompts(place.data / "pku_safety/pairs.jsonl", prompts)
    given = ["--base", str(place.base), "--prompts", str(prompts), *sizes.split()]
    return _lab(place, "sampling", *given)


def _write_prompts(pairs: Path, out: Path) -> None:
    with pairs.open() as lines:
        texts = [json.loads(line)["prompt"] for line in itertools.islice(lines, 200)]
    asked = [[Message(role="user", content=text)] for text in dict.fromkeys(texts)]
    rows = [{"prompt_id": prompt_id(p), "prompt": p, "source": "pku"} for p in asked]
    write_parquet(out, rows, PROMPTS)


def _sampled(place: Place) -> list[Row]:
    """Tokens a second; log-probabilities of the engines were checked against ours on the way."""
    found = read_json(place.out / "sampling.json")["summary"]
    rows = [
        (
            f"{row['engine']}: tokens/s, times generate",
            f"{row['tokens_per_second']:.0f}, {row['ratio']:.2f}",
        )
        for row in found
    ]
    return [*rows, ("vllm", "not measured here; docs/engines.md")]


def _preset(place: Place) -> Sequence[str]:
    """The preset on carried rows, with fewer of everything, down to the policy."""
    folder = place.out / "workspace"
    shutil.rmtree(folder, ignore_errors=True)
    copy(folder, {})
    shutil.copytree(ROOT / "params", folder / "params")
    own = folder / "params/own.yaml"
    own.write_text(json.dumps({"extends": "smollm2-gpu.yaml", **_fewer(place)}))
    (folder / "params.yaml").write_text(whole(own))
    return ["-m", "pipeline.repro", "--no-commit", _TARGET]


def _fewer(place: Place) -> dict[str, Any]:
    small = place.given.small
    prompts, steps, draws = (8, 1, 2) if small else (64, 20, 8)
    safety = [{"format": "pku", "path": "pku_safety/pairs.jsonl"}]
    fewer = {"training": {"max_steps": steps, "batch_size": 2 if small else 32}}
    return {
        "training": {"max_steps": steps, "batch_size": 2 if small else 32},
        "generation": {"max_new_tokens": 8 if small else 256},
        "prepare": {
            "folder": str(place.data),
            "sft": [{**safety[0], "limit": 400}],
            "helpful": [
                {"format": "hh", "path": "hh_rlhf/helpful-base.test.jsonl.gz", "limit": 600}
            ],
            "safety": [{**safety[0], "limit": 1200}],
            **{f"{kind}_prompts": prompts for kind in ("pool", "search", "certify", "eval")},
            "max_rejected_share": 0.95,
        },
        "sft": {"base": str(place.base)},
        "score": {"samples_per_prompt": draws, "pairs": 16 if small else 200},
        "cost_model": {"zero_pairs": 0, **({"calibrate": "none"} if small else {})},
        "dual_search": {"prompts": prompts, "samples_per_prompt": 2, "refresh_prompts": prompts},
        "certify": {"prompts": prompts},
        "evaluate": {"prompts": prompts},
        **dict.fromkeys(("reward_dpo", "safety_dpo", "lagrangian_dpo"), fewer),
    }


def _stages(place: Place) -> list[Row]:
    made = [read_json(path) for path in _provenance(place)]
    rows = [(f"{row['stage']} {row['item'] or ''}".strip(), _price(row)) for row in made]
    return [*rows, ("stages", str(len(rows)))]


def _provenance(place: Place) -> list[Path]:
    return listed(place.out / "workspace/reports/provenance", "**/*.json")


def _price(row: dict[str, Any]) -> str:
    gpu = f", {row['peak_gpu_mib'] / 1024:.1f} GiB of the GPU" if row.get("peak_gpu_mib") else ""
    return f"{row['seconds']:.0f} s, {row['peak_rss_mib'] / 1024:.1f} GiB of the process{gpu}"


#: Most of a part is the start of its processes, some ten seconds each, whatever the GPU.
PARTS = (
    Part("tests", 2.5, _tests("not slow"), _tested("not slow"), on_gpu=True, partial=True),
    Part("tests of trainings", 3.5, _tests("slow"), _tested("slow"), on_gpu=True, partial=True),
    Part("numerics", 2.5, _numerics, _numbers),
    Part("DPO step, 135M", 2.5, _speed(""), _speeds(""), from_rows=True),
    Part("DPO step, 0.5B", 2.5, _speed("0.5b"), _speeds("0.5b"), from_rows=True),
    Part("DPO step, 1.5B", 3.5, _speed("1.5b"), _speeds("1.5b"), from_rows=True),
    Part("sampling", 3, _sampling, _sampled, from_rows=True, partial=True),
    Part("preset smollm2-gpu", 6, _preset, _stages, from_rows=True, partial=True),
)


def _lab(place: Place, name: str, *options: str) -> Sequence[str]:
    return ["-m", f"bench.{name}", "--out", str(place.out), *options]


# --- all of them ----------------------------------------------------------------------------------


def measure(place: Place) -> Iterator[dict[str, Any]]:
    """Every part within its share of the time that is left."""
    deadline = time.monotonic() + place.given.seconds
    for k, part in enumerate(PARTS):
        left = deadline - time.monotonic()
        limit = left * part.share / sum(other.share for other in PARTS[k:])
        began = time.monotonic()
        fault = _missing(part, place) or _ran(part, place, limit)
        try:
            rows = [] if fault and not part.partial else part.rows(place)
        except (OSError, DualignError, KeyError, StopIteration) as error:
            rows, fault = [], fault or f"its results cannot be read: {error!r}"
        seconds = time.monotonic() - began
        yield {"part": part.name, "seconds": seconds, "fault": fault, "rows": rows}
        log.info("%s: %.0f s %s", part.name, seconds, fault or "")


def _missing(part: Part, place: Place) -> str:
    """What a part lacks here."""
    if part.on_gpu and not torch.cuda.is_available():
        return "needs a GPU"
    if part.from_rows and not place.data.is_dir():
        return "needs rows; pack with --data"
    return ""


def _ran(part: Part, place: Place, limit: float) -> str:
    """Run a part; returns why it has no result, in a line."""
    file = place.out / f"{part.name.replace(' ', '-').replace(',', '')}.log"
    try:
        command = [sys.executable, *part.command(place)]
    except (OSError, DualignError, subprocess.CalledProcessError) as error:
        return f"cannot start: {error}"
    folder = place.out / "workspace" if part.command is _preset else ROOT
    told = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    with (
        file.open("wb") as output,
        subprocess.Popen(
            command, cwd=folder, env=told, stdout=output, stderr=output, start_new_session=True
        ) as process,
    ):
        try:
            status = process.wait(max(limit, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"stopped after its {limit:.0f} s"
    said = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return f"status {status}: {said[-1][:200] if said else ''}" if status else ""


def _base(given: Settings, folder: Path) -> Path:
    """The carried model as a folder, or a small one with its tokenizer."""
    file = Path(given.carried) / "base.gguf"
    if not file.is_file():
        raise DualignError(f"--carried {given.carried!r} holds no base.gguf; see bench/gpu.sh")
    if given.small:
        tokenizer = load_tokenizer(file.parent, gguf_file=file.name)
        save(build_scratch(_SMALL, tokenizer, 0), tokenizer, folder)
    else:
        command = ["-m", "dualign.lm.convert", str(file), str(folder)]
        subprocess.run([sys.executable, *command], check=True)
    return folder


def page(found: dict[str, Any]) -> str:
    """The results as one table in Markdown."""
    lines = [
        "# Some minutes on one machine",
        "",
        f"{found['device']}; torch {found['torch']}; {found['seconds']:.0f} s for all."
        + (" Every part at its smallest, on a small random model." if found["short"] else ""),
        "",
        *options.head(["part", "s", "what", "found"]),
    ]
    for part in found["parts"]:
        rows = [*([("", part["fault"])] if part["fault"] else []), *part["rows"]]
        for k, (what, value) in enumerate(rows):
            first = [part["part"], f"{part['seconds']:.0f}"] if k == 0 else ["", ""]
            lines.append(options.line([*first, what, value.replace("|", "/")]))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts; write gpu.json and gpu.md. Returns the status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given, out = options.parse(Settings, PROGRAM, __doc__, argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "out").mkdir()
        place = Place(
            given, _base(given, work / "base"), Path(given.carried) / "data", work / "out"
        )
        parts = list(measure(place))
        logs = out / "gpu"
        logs.mkdir(parents=True, exist_ok=True)
        for file in (*listed(work / "out", "*.json"), *listed(work / "out", "*.log")):
            shutil.copyfile(file, logs / file.name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    found = {"device": gpu, "torch": torch.__version__, "short": given.small}
    found |= {"seconds": time.monotonic() - began, "parts": parts}
    options.publish(out, "gpu", found, page(found))
    sys.stdout.write(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

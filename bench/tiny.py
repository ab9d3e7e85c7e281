"""The whole graph on a tiny world, run once: the bytes that every later run of a stage must end
with.

What `bench.kills` stops and runs again. The world is a copy of the code as it is when its folder is
first made."""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dualign.core.artifacts import hashes, read_optional_json, replacing, sha256, write_json
from dualign.core.errors import DualignError
from pipeline.dvc.dag import StageSpec, load_dag
from pipeline.dvc.parameters import assign

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
#: What keeps the folders of reports that a stage reads though nothing may be in them.
KEPT = [file.relative_to(ROOT).as_posix() for file in sorted(ROOT.glob("reports/*/README.md"))]
CODE = (
    *(
        "dualign",
        "stages",
        "pipeline",
        "dvc.yaml",
        ".dvcignore",
        ".gitignore",
        "prefect.toml",
        "prefect.yaml",
    ),
    *("data/raw", "data/suites", "models/base/README.md"),
    *KEPT,
)
#: DVC's folder of templates for its plots.
TEMPLATES = ".dvc/plots"
#: The keys that say how long trainings are; that of the scorers is the one at the top.
LENGTHS = (
    "training.max_steps",
    "lagrangian_dpo.runs.anchored.max_steps",
    "lagrangian_dpo.runs.anchored.refresh.max_steps",
    *(
        f"{stage}.training.max_steps"
        for stage in ("sft", "reward_dpo", "safety_dpo", "lagrangian_dpo", "dual_search")
    ),
)
#: The whole graph at its smallest, with three checkpoints in every training.
TINY: dict[str, Any] = {
    "generation.max_new_tokens": 12,
    "pessimism.share": 0.1,
    **{f"prepare.world.{kind}": 300 for kind in ("sft_rows", "helpful_pairs", "safety_pairs")},
    **{f"prepare.{kind}_prompts": 8 for kind in ("pool", "search", "certify", "eval")},
    **{
        f"sft.scratch.{key}": size
        for key, size in (("hidden_size", 16), ("layers", 1), ("intermediate_size", 32))
    },
    "sft.scratch.heads": 2,
    "cost_model.calibrate": "none",
    "score.samples_per_prompt": 4,
    "score.pairs": 40,
    "constraint.limit": 0.5,
    "dual_search.z": 0.0,
    **{f"dual_search.refresh_{key}": size for key, size in (("prompts", 4), ("samples", 2))},
    **{f"{stage}.prompts": 8 for stage in ("dual_search", "certify", "evaluate")},
    **{f"{stage}.samples_per_prompt": 2 for stage in ("dual_search", "certify", "evaluate")},
    "certify.labels": None,
    "certify.screen.prompts": 8,
    "certify.screen.tests": 3,
    **dict.fromkeys(LENGTHS, 6),
    "resources.threads": 1,
    "resources.log_steps": 2,
    "resources.checkpoint_steps": 2,
}
#: Torch has one cache there for all its processes. Prefect has one folder for all runs, and two
#: small ones for each flow run, which nobody removes after a kill.
_OTHERS = re.compile(r"torchinductor_|runner_storage$|prefect-workspace-attempt-|tmp\w+prefect$")
#: Seconds between two looks at the files of a stage, and the longest time that a run may take.
LOOK = 0.005
LONG = 1800.0


class World:
    """A workspace whose stages have all run once, beside a copy of it and what each stage took."""

    def __init__(self, work: Path, stages: Sequence[str]) -> None:
        self.folder = work / "world"
        self.kept = work / "kept"
        self._system = self.folder / "tmp"  # in place of the system's folder of temporary files
        if not self.folder.is_dir():
            with replacing(self.folder) as temporary:
                copy(temporary, TINY)
        self._system.mkdir(exist_ok=True)
        self.dag = {name: spec for name, spec in load_dag(self.folder).items() if name != "report"}
        unknown = sorted(set(stages) - set(self.dag))
        if unknown:
            raise DualignError(f"no stage {unknown[0]}; one of {', '.join(self.dag)}")
        self.costs = read_optional_json(work / "costs.json")
        self.restore()  # the laboratory itself may have been killed
        for name in self.dag:
            if name not in self.costs and (not stages or name in self._upstream(stages)):
                self.costs[name] = self._first(self.dag[name])
                write_json(work / "costs.json", self.costs)
        self.chosen = [self.dag[name] for name in stages or self.costs]

    def _upstream(self, stages: Sequence[str]) -> set[str]:
        above = {up for name in stages for up in self.dag[name].upstream}
        return {*stages, *(self._upstream(sorted(above)) if above else ())}

    def _first(self, spec: StageSpec) -> dict[str, Any]:
        """Run a stage and say how long it took, how often its files changed, and whether it kept
        checkpoints.
        """
        log.info("reference: %s", spec.name)
        started = time.monotonic()
        process = self.start(spec)
        seen = self.watch(process, spec)
        if process.wait():
            raise DualignError(f"{self.folder}: stage {spec.name} failed; see log.txt beside it")
        for out in outs_of(spec):
            copy_over(self.folder / out, self.kept / out)
        torn = any("checkpoint-4" in path for state in seen for path in state)
        return {"seconds": time.monotonic() - started, "changes": len(seen), "checkpoints": torn}

    def start(
        self, spec: StageSpec, command: Sequence[str] = (), limit: int | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a stage, or another command, in a process group of its own; files stay below
        `limit` bytes.
        """
        small = (
            None
            if limit is None
            else partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        )
        with self._log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, *(command or spec.by_hand.split()[1:])],
                cwd=self.folder, env=self.environment(self._system), stdout=output, stderr=output,
                start_new_session=True, preexec_fn=small,
            )  # fmt: skip

    def environment(self, system: Path) -> dict[str, str]:
        """The variables under which a stage runs alike everywhere, with `system` for temporary
        files.
        """
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "DVC_NO_ANALYTICS": "1",
            "PREFECT_HOME": str(self.folder.with_name("prefect")),
            "TMPDIR": str(system),
        }
        environment.pop("DUALIGN_SCRATCH", None)
        return environment

    @property
    def _log(self) -> Path:
        return self.folder.with_name("log.txt")

    @property
    def said(self) -> str:
        """What the last command wrote."""
        return self._log.read_text(errors="replace")

    def watch(
        self,
        process: subprocess.Popen[bytes],
        spec: StageSpec,
        enough: Callable[[list[set[str]]], bool] | None = None,
    ) -> list[set[str]]:
        """The states of a stage's files until it ends, or until they are `enough`."""
        return watch(process, lambda: state(self.folder, spec, self.folder / ".scratch"), enough)

    def forget(self, spec: StageSpec) -> None:
        """Remove a stage's outputs, as DVC does before it runs one."""
        for out in outs_of(spec):
            _remove(self.folder / out)

    def differs(self) -> list[str]:
        """Outputs of any stage that are not byte for byte what they were."""
        return differs(self.folder, self.kept, [self.dag[name] for name in self.costs])

    def debris(self) -> list[str]:
        """What the workspace, and the system's folder, hold although no run is unfinished."""
        return sorted(
            [*debris(self.folder), *(f"tmp/{name}" for name in temporaries(self._system))]
        )

    def commit(self) -> None:
        """Tell DVC that all is up to date, so that it runs what it is forced to alone."""
        self.dvc("commit", "--force", "--quiet", *self.costs)

    def dvc(self, *arguments: str) -> None:
        """A DVC command that must succeed."""
        if self.start(self.chosen[0], ["-m", "dvc", *arguments]).wait(LONG):
            raise DualignError(f"{self.folder}: dvc {arguments[0]} failed; see log.txt beside it")

    def restore(self) -> None:
        """Everything as the first run left it."""
        for path in (".scratch", *self.debris()):
            _remove(self.folder / path)
        for name in self.costs:
            for out in outs_of(self.dag[name]):
                copy_over(self.kept / out, self.folder / out)


def outs_of(spec: StageSpec) -> list[str]:
    """All that a stage writes, metrics too."""
    return [*spec.outs, *spec.metrics]


def watch(
    process: subprocess.Popen[bytes], look: Callable[[], set[str]],
    enough: Callable[[list[set[str]]], bool] | None = None,
) -> list[set[str]]:  # fmt: skip
    """What `look` sees, as often as that changes, until a process ends or it has seen `enough`."""
    seen = [look()]
    deadline = time.monotonic() + LONG
    while process.poll() is None and time.monotonic() < deadline and not (enough and enough(seen)):
        now = look()
        if now != seen[-1]:
            seen.append(now)
        time.sleep(LOOK)
    return seen


def state(root: Path, spec: StageSpec, scratch: Path) -> set[str]:
    """The files of a stage: all in the scratch folder, and those of its outputs that are there."""
    found = set()
    for place, folders, files in os.walk(scratch):  # where a folder may go while it is looked at
        found |= {os.path.join(place, name) for name in (*folders, *files)}
    return found | {out for out in outs_of(spec) if (root / out).exists()}


def differs(root: Path, kept: Path, specs: Iterable[StageSpec]) -> list[str]:
    """Outputs of stages that are not byte for byte what they were; provenance holds times and does
    not count.
    """
    outs = {out for spec in specs for out in outs_of(spec) if "/provenance/" not in out}
    return sorted(out for out in outs if _digest(root / out) != _digest(kept / out))


def debris(root: Path) -> list[str]:
    """Temporaries anywhere, and what lies in the scratch folder although no run is unfinished."""
    scratch = [path for path in (root / ".scratch").rglob("*") if path.is_file()]
    places = [root / name for name in ("data", "models", "reports")]
    written = [path for place in places for path in place.rglob(".*") if path.name != ".gitignore"]
    return sorted(str(path.relative_to(root)) for path in [*scratch, *written])


def temporaries(system: Path) -> list[str]:
    """What was left in the system's folder of temporary files, but for what torch and Prefect keep
    there themselves.
    """
    return sorted(path.name for path in system.iterdir() if not _OTHERS.match(path.name))


def copy(folder: Path, params: Mapping[str, Any]) -> None:
    """A repository with the code and the shipped params, these changed."""
    for name in CODE:
        copy_over(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(assign((ROOT / "params.yaml").read_text(), params))
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True)
    copy_over(
        ROOT / TEMPLATES, folder / TEMPLATES
    )  # only now: `dvc init` refuses where there is a .dvc


def copy_over(source: Path, target: Path) -> None:
    """Put a file or folder in the place of another."""
    _remove(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _digest(path: Path) -> str | dict[str, str]:
    """Of a file or a folder; none where nothing is."""
    return sha256(path) if path.is_file() else hashes(path)

"""What a second `dvc repro` with nothing to do takes, and how much of it dvc.yaml could save at the
very most.

    python -m bench.idle --inputs FINISHED

FINISHED is a folder that holds what a finished run of this checkout wrote (its `data`, `models` and
`reports`). Its outputs are put beside other forms of `dvc.yaml` as well, which nobody should use,
since they forget what a stage depends on or run too much again: they say how much lies in the
number of parameters and of dependencies. All are run in turn, beside a project of one stage, so
that they share the machine's moods. Each is the median, and the least, of the processor seconds of
user and kernel."""

from __future__ import annotations

import logging
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bench import options
from bench.cost import ROOT, commit, one_stage, set_up, spent
from dualign.core.artifacts import replacing
from dualign.core.errors import one_line
from pipeline.dvc.deps import is_code

log = logging.getLogger(__name__)

#: How often each is run.
TIMES = 7
ONE_STAGE = "one stage"
AS_IT_IS = "as it is"

Definition = dict[str, Any]
Edit = Callable[[Definition], None]


# --- forms of dvc.yaml ----------------------------------------------------------------------------


def without_params(stage: Definition) -> None:
    """No parameter is listed."""
    stage.pop("params", None)


def code_as_one(stage: Definition) -> None:
    """All code that is not the stage's script counts as one dependency, the folder of the
    library.
    """
    script, *others = stage["deps"]
    stage["deps"] = [script, "dualign", *(path for path in others if not is_code(path))]


def both(stage: Definition) -> None:
    """Neither parameters nor more than one folder of code."""
    without_params(stage)
    code_as_one(stage)


def script_alone(stage: Definition) -> None:
    """Nothing but the script: no order of stages is left."""
    without_params(stage)
    stage["deps"] = stage["deps"][:1]


FORMS: dict[str, Edit] = {
    "no params": without_params,
    "all code as one dependency": code_as_one,
    "no params, all code as one dependency": both,
    "no params, no dependency but the script": script_alone,
}


def rewrite(path: Path, edit: Edit) -> None:
    """Edit every stage of a dvc.yaml."""
    yaml = YAML(typ="safe")
    content = yaml.load(path)
    for stage in content["stages"].values():
        edit(stage.get("do", stage))
    with path.open("w") as stream:
        yaml.dump(content, stream)


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Project:
    """A folder in which nothing is to be done, and the command that finds this out."""

    folder: Path
    command: tuple[str, ...] = ("-m", "dvc", "repro")


def projects(work: Path, inputs: Path) -> dict[str, Project]:
    """A project of one stage, ours, and its other forms, all up to date."""
    now = set_up("now", ROOT, work, inputs).folder
    commit(now)
    found = {ONE_STAGE: Project(one_stage(work)), AS_IT_IS: Project(now)}
    found[f"{AS_IT_IS}, `dvc repro -P`"] = Project(now, ("-m", "dvc", "repro", "-P"))
    for name, edit in FORMS.items():
        found[name] = Project(_form(now, work / name.replace(" ", "-").replace(",", ""), edit))
    return found


def _form(now: Path, folder: Path, edit: Edit) -> Path:
    if not folder.is_dir():
        with replacing(folder) as temporary:
            shutil.copytree(now, temporary, symlinks=True, dirs_exist_ok=True)
            rewrite(temporary / "dvc.yaml", edit)
            (temporary / "dvc.lock").unlink()
    commit(folder)
    return folder


def in_turn(found: Mapping[str, Project], times: int = TIMES) -> dict[str, list[float]]:
    """The processor seconds of each project's runs; one run that is not counted comes first."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(times + 1):
        for name, project in found.items():
            processor = spent(project.command, project.folder)["processor"]
            if turn:
                seconds[name].append(processor)
        log.info("%d of %d", turn, times)
    return seconds


# --- the page -------------------------------------------------------------------------------------


def page(seconds: Mapping[str, Sequence[float]]) -> str:
    """The table in markdown: median and least of each, and both as multiples of those of one
    stage.
    """
    one = seconds[ONE_STAGE]
    lines = options.head(["dvc.yaml", "median, s", "least, s", "median, ×", "least, ×"])
    for name, runs in seconds.items():
        median = statistics.median(runs)
        cells = [f"{median:.2f}", f"{min(runs):.2f}"]
        cells += [f"{median / statistics.median(one):.2f}", f"{min(runs) / min(one):.2f}"]
        lines.append(options.line([name, *cells]))
    title = "# What a second `dvc repro` with nothing to do takes"
    parts = [
        title,
        "    python -m bench.idle --inputs FINISHED",
        "\n".join(lines),
        _NOTES.format(times=len(one)),
    ]
    return "\n\n".join(parts) + "\n"


_NOTES = """\
How to read it: processor seconds of user and kernel of one command, {times} runs of each in turn,
on one machine; × is
beside a project of one stage. The forms without parameters or with less code miss or repeat work
and are no choice: they bound what a shorter `dvc.yaml` could save. DVC reads `params.yaml` once for
each instance that lists a parameter;
it reads `dvc.yaml` and `dvc.lock` twice, with `-P` once."""


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; write idle.json and idle.md."""
    parser = options.parser("python -m bench.idle", __doc__)
    parser.add_argument(
        "--inputs",
        type=Path,
        required=True,
        help="folder of a finished run, whose outputs are copied",
    )
    parser.add_argument(
        "--work", type=Path, default=Path(".scratch/bench-idle"), help="folder of the runs"
    )
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    seconds = in_turn(projects(given.work.absolute(), given.inputs.absolute()))
    options.publish(given.out, "idle", seconds, page(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command `dualign`: what users run by hand, of project and library, under one name.

    dualign plan
    dualign certify verify reports/certificate/dualign
    dualign stage sft

A table says whose `main(argv)` a command is; options and exit status are theirs alone. Commands of
the library work anywhere. Those of a project run in the nearest folder, from here upwards, with
dvc.yaml and pipeline/, by its own code."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, NoReturn

from dualign.core.errors import DualignError

#: Exit status where a command cannot be carried out as asked.
REFUSED = 2
#: Those of a shell where nobody reads what is told any more, and after Ctrl-C.
UNREAD = 141
INTERRUPTED = 130
PIPELINE = "pipeline.__main__"

ABOUT = "Constrained alignment of language models. Each command tells its options with --help."
EPILOG = """\
Commands of the library (certify, push, convert, import-results, params, completion) work \
anywhere. The others work in a checkout of dualign, in its folder or any below; paths among their
arguments count from the checkout's own folder. Exit statuses are those of the commands; 2 is a
command that is refused."""


class Command(NamedTuple):
    """The module whose `main(argv, prog)` it is, or with `scripts` a package of such by name."""

    about: str
    module: str
    scripts: bool = False

    @property
    def of_project(self) -> bool:
        """Whether it needs a checkout: only the library is installed."""
        return not self.module.startswith("dualign.")


COMMANDS = {
    "repro": Command("run every stage that is out of date, with DVC alone", "pipeline.repro"),
    "preset": Command("make params.yaml a copy of a preset", "pipeline.dvc.preset"),
    "plan": Command("say what a run would do and why, without running anything", PIPELINE),
    "run": Command("bring stages up to date", PIPELINE),
    "stage": Command(
        "run the script of one stage, whether it is out of date or not", "stages", scripts=True
    ),
    "serve": Command(
        "offer the flow on the pages of a Prefect server, and run what is asked for there", PIPELINE
    ),
    "status": Command(
        "list the last flow runs of this workspace, and the stages of the newest", PIPELINE
    ),
    "sweep": Command(
        "run a grid of params, each point in a working tree of its own, as DVC experiments",
        PIPELINE,
    ),
    "seeds": Command(
        "run other training seeds, and this run, and show them side by side in the report",
        PIPELINE,
    ),
    "since": Command(
        "put an earlier run beside this one: the report shows what changed since", PIPELINE
    ),
    "deploy": Command(
        "tell a Prefect server how workers run a stage: pools and the deployments of prefect.yaml",
        PIPELINE,
    ),
    "work": Command(
        "be a worker: take stages of a pool and run them in this clone, one after the other",
        PIPELINE,
    ),
    "doctor": Command("look for what may keep a run from working", PIPELINE),
    "certify": Command(
        "recompute certificates from saved answers (verify), or sign one",
        "dualign.certify.command",
    ),
    "push": Command(
        "push a policy with its full model card, to the hub or a folder",
        "dualign.publishing.command",
    ),
    "convert": Command("make a plain model folder of a GGUF file", "dualign.lm.convert"),
    "import-results": Command(
        "take results of lm-evaluation-harness or Inspect into the report",
        "dualign.evaluation.harness",
    ),
    "params": Command("check the params that stand on standard input", "dualign.params.loading"),
    "bench": Command("run a laboratory of bench/, such as exact", "bench", scripts=True),
    "deps": Command(
        "compare the code dependencies in dvc.yaml with the imports", "pipeline.dvc.deps"
    ),
    "completion": Command(
        "print the script by which a shell completes all this", "dualign.completion"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = sys.argv[1:] if argv is None else list(argv)
    if not given or given[0].startswith("-"):
        return _alone(given)
    name, *rest = given
    try:
        if name not in COMMANDS:
            raise DualignError(f"dualign {name}: no such command; {nearest(name, COMMANDS)}")
        status = _call(name, rest)
        sys.stdout.flush()
        return status
    except DualignError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    except BrokenPipeError:  # whoever reads, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED


def _alone(given: list[str]) -> int:
    """`dualign` without a command: --help, --version, or a usage that is no success."""
    parser = overview()
    if not given:
        sys.stderr.write(parser.format_help())
        return REFUSED
    parser.parse_args(given)
    parser.error("which command?")


def overview(
    parsers: Mapping[str, argparse.ArgumentParser] | None = None,
) -> argparse.ArgumentParser:
    """A parser that lists all commands; with `parsers`, for completion, with their options."""
    listed = "\n".join(f"  {name:16}{command.about}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="dualign", description=ABOUT, epilog=f"commands:\n{listed}\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"dualign {version('dualign')}")
    commands = parser.add_subparsers(metavar="COMMAND", help="one of these, with its own options")
    if parsers is None:
        return parser
    for name, command in COMMANDS.items():
        own = [parsers[name]] if name in parsers else []
        commands.add_parser(name, help=command.about, parents=own, add_help=not own)
    return parser


def nearest(name: str, known: Collection[str]) -> str:
    """The name that was meant, or all there are."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"


def _call(name: str, rest: list[str]) -> int:
    command = COMMANDS[name]
    if command.of_project:
        enter(project(Path.cwd(), f"dualign {name}"))
    if command.scripts:
        _script(name, command.module, rest)
    called = importlib.import_module(command.module)
    if command.module == PIPELINE:
        return int(called.main([name, *rest], prog="dualign"))
    return int(called.main(rest, prog=f"dualign {name}"))


def project(start: Path, asking: str) -> Path:
    """The checkout that a folder lies in. Raises DualignError outside of one."""
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "pipeline" / "__main__.py").is_file():
            return folder
    raise DualignError(
        f"{asking}: {start} lies in no checkout of dualign (a folder with dvc.yaml and pipeline/); "
        "clone the repository and run this in its folder, or in one below"
    )


def enter(root: Path) -> None:
    """Go there, and import `pipeline` from there, as `python -m` does."""
    os.chdir(root)
    sys.path.insert(0, str(root))


def _script(name: str, package: str, rest: list[str]) -> NoReturn:
    """Become `python -m PACKAGE.SCRIPT`, since another checkout's library may be loaded here."""
    names = scripts(package)
    if not rest or rest[0].startswith("-"):
        raise DualignError(f"usage: dualign {name} NAME ...; NAME is one of {', '.join(names)}")
    if rest[0] not in names:
        raise DualignError(f"dualign {name} {rest[0]}: no such {name}; {nearest(rest[0], names)}")
    os.execv(sys.executable, [sys.executable, "-m", f"{package}.{rest[0]}", *rest[1:]])


def scripts(package: str) -> list[str]:
    """The names of a package's scripts, in the checkout that has been entered."""
    start = '\nif __name__ == "__main__":'
    return sorted(path.stem for path in Path(package).glob("*.py") if start in path.read_text())

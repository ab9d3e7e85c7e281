"""The command line: what a run would do, a run, the flow for Prefect, last runs, a doctor.

python -m pipeline plan
python -m pipeline plan --cost --gpu h100
python -m pipeline run --stage dual_init --set constraint.limit=-0.5
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError, fault
from pipeline.prefect import identity, server

if TYPE_CHECKING:
    from pipeline.dvc.dag import StageSpec
    from pipeline.dvc.plan import StageStatus

PROG = "python -m pipeline"
EXIT = """exit status:
  0    done; nothing is wrong
  1    run: a stage failed; doctor: something keeps runs from working
  2    the command cannot be carried out as asked
  3    run: nothing failed, but a stage waits for labels of people; its message names the file
  130  interrupted; the next run goes on where this one stopped"""


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """The command, called `prog`; returns its exit status."""
    arguments = parser(prog).parse_args(argv)
    server.past_proxies()
    try:
        _check_root(Path.cwd())
        code: int = arguments.command(arguments)
        return code
    except PipelineError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except BrokenPipeError:  # whoever reads, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, UnicodeEncodeError) as error:
        if not fault(error):
            raise
        sys.stderr.write(f"{fault(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run again to go on\n")
        return 130


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The parser of all commands."""
    made = argparse.ArgumentParser(
        prog=prog,
        description=(
            "Run the stages of dvc.yaml as a Prefect flow. The guides are docs/prefect.md and"
            " docs/cluster.md."
        ),
        epilog=EXIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (command, about, options) in _COMMANDS.items():
        added = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=EXIT,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=command)
        options(added)
    return made


def _none(parser: argparse.ArgumentParser) -> None:
    """A command without options."""


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cost",
        action="store_true",
        help="reckon memory, tokens, hours and money of every stage too",
    )
    parser.add_argument(
        "--gpu",
        metavar="CARD",
        help="t4, l4, a10, rtx4090, l40s, a100-40, a100, h100-pcie, h100, h200 or b200 (default:"
        " the card of this machine, else h100)",
    )
    parser.add_argument(
        "--price", type=float, metavar="DOLLARS", help="of an hour of the card, in place of ours"
    )
    parser.add_argument(
        "--mfu", type=float, metavar="SHARE", help="of the card's peak that is used (default 0.4)"
    )
    parser.add_argument(
        "--parameters",
        type=float,
        metavar="N",
        help="weights of the base, such as 8e9, where its config.json is not here",
    )


def _run_options(parser: argparse.ArgumentParser) -> None:
    told = (
        "this stage and what it reads from, where out of date; repeat for more; dual_search means"
        " all of it"
    )
    _repeatable(parser, "--stage", "S", "stages", told)
    parser.add_argument(
        "--force",
        action="store_true",
        help="run the stages of --stage, or all, even if nothing has changed",
    )
    told = (
        "write a new value into params.yaml first, such as constraint.limit=-0.5; +KEY adds a key;"
        " repeat for more"
    )
    _repeatable(parser, "--set", "KEY=VALUE", "settings", told)
    parser.add_argument(
        "--params",
        metavar="FILE",
        default="",
        help="put this preset in place of params.yaml first; or `default`",
    )
    _jobs(parser, "stages side by side on the CPU (default: half the cores, at most 4)")
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="run the stages on workers, not here (docs/cluster.md)",
    )


def _status_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--last", type=_count, default=5, metavar="N", help="how many runs (default 5, at most 200)"
    )
    parser.add_argument(
        "--all", action="store_true", help="those of every workspace that shares the server"
    )


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "grid", nargs="+", metavar="KEY=VALUE,...", help="the values of a key of params.yaml"
    )
    _repeatable(parser, "--stage", "S", "stages", "as for run")
    _jobs(parser, "as for run")
    parser.add_argument(
        "--cluster", action="store_true", help="as for run; all points at the same time"
    )
    told = (
        "a column of the table, such as policies.*.cost.mean; repeat for more (default: some that"
        " differ)"
    )
    _repeatable(parser, "--metric", "M", "metrics", told)


def _seeds_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "seeds", nargs="+", type=_seed, metavar="SEED", help="seeds beside that of params.yaml"
    )
    _jobs(parser, "as for run")
    parser.add_argument(
        "--cluster", action="store_true", help="as for run; all seeds at the same time"
    )
    _repeatable(parser, "--metric", "M", "metrics", "as for sweep")


def _since_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "revision",
        nargs="?",
        metavar="REVISION",
        help="a commit, branch or tag of git, or a DVC experiment (default: the newest commit with"
        " other results than these)",
    )


def _deploy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--type",
        choices=("process", "docker", "kubernetes"),
        default="process",
        help="the type of pools that are not there yet (default process)",
    )


def _work_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pool", metavar="POOL", help="cpu or gpu, as `meta: pool` of the stages in dvc.yaml says"
    )
    parser.add_argument(
        "--limit",
        type=_positive,
        default=1,
        metavar="N",
        help="stages at the same time (default 1)",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="end when no stage of the pool is waiting, as in a batch job",
    )


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        action="store_true",
        help="read all of DVC's cache too, for results that are damaged",
    )


def _repeatable(
    parser: argparse.ArgumentParser, option: str, metavar: str, dest: str, told: str
) -> None:
    """An option that may come more than once, whose values are a list."""
    parser.add_argument(option, action="append", metavar=metavar, dest=dest, default=[], help=told)


def _jobs(parser: argparse.ArgumentParser, told: str) -> None:
    parser.add_argument("--jobs", type=_positive, metavar="N", default=0, help=told)


def _seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _count(text: str) -> int:
    if _positive(text) > 200:
        raise argparse.ArgumentTypeError(f"{text} is more than the 200 that a server tells of")
    return int(text)


def _check_root(root: Path) -> None:
    if not (root / "dvc.yaml").is_file() or not (root / ".dvc").is_dir():
        raise PipelineError(
            f"{root}: no dvc.yaml and .dvc here; run this in the root of the repository"
        )


def _say(lines: Iterable[str]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as text with aligned columns; the last one runs free."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    return ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]


# --- commands; each imports what it needs, for --help to be quick ---------------------------------


def _plan(arguments: argparse.Namespace) -> int:
    from pipeline.dvc.plan import plan

    dag = _dag()
    statuses = plan(Path.cwd(), dag)
    changed = [
        (name, status) for name, status in statuses.items() if status.prospect != "up to date"
    ]
    _say(_columns([(name, status.prospect, ", ".join(status.reasons)) for name, status in changed]))
    _say([f"{len(dag) - len(changed)} of {len(dag)} stages are up to date"])
    if arguments.cost:
        _say(_reckoned(arguments, statuses))
    return 0


def _reckoned(arguments: argparse.Namespace, statuses: Mapping[str, StageStatus]) -> Iterator[str]:
    from pipeline import yaml_text
    from pipeline.cost import page
    from pipeline.cost.machine import machine

    params = yaml_text.load(yaml_text.read(Path("params.yaml")))
    card = machine(arguments.gpu).with_given(arguments.price, arguments.mfu)
    found = page.reckon(params, Path.cwd(), card, list(statuses), arguments.parameters)
    rows = page.rows(found, statuses)
    yield ""
    yield from _columns(rows)
    yield from page.notes(found, statuses)


def _dag() -> dict[str, StageSpec]:
    from dvc.exceptions import DvcException

    from pipeline.dvc.dag import load_dag
    from pipeline.dvc.plan import one_line

    try:
        return load_dag(Path.cwd())
    except DvcException as error:
        raise PipelineError(one_line(error)) from None


def _reach_server(cluster: bool) -> None:
    """Use the server that shows runs, without which none can be on workers."""
    if cluster:
        server.need()
    else:
        server.use_running()


def _run(arguments: argparse.Namespace) -> int:
    from pipeline import names, yaml_text
    from pipeline.dvc.parameters import assign, settings_of
    from pipeline.dvc.plan import select

    settings = settings_of(arguments.settings)
    if not arguments.params:  # a slip of the pen need not wait for a server
        names.check(Path.cwd(), assign(yaml_text.read(Path("params.yaml")), settings))
        select(_dag(), arguments.stages)
    _reach_server(arguments.cluster)
    from pipeline.prefect.flow import REFUSED, WAITING, alignment

    with server.own_server():
        state = alignment(
            stages=arguments.stages, force=arguments.force, set=settings, preset=arguments.params,
            jobs=arguments.jobs, cluster=arguments.cluster, return_state=True,
        )  # fmt: skip
    if state.is_cancelled():
        raise KeyboardInterrupt
    if state.name == REFUSED:
        raise PipelineError(state.message)
    if state.name == WAITING:
        return 3
    return 0 if state.is_completed() else 1


def _sweep(arguments: argparse.Namespace) -> int:
    import logging

    from pipeline.dvc.plan import select
    from pipeline.sweep import GOOD, grid, sweep, table, unmatched

    points = grid(arguments.grid)
    select(_dag(), arguments.stages)
    _reach_server(arguments.cluster)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = [option for stage in arguments.stages for option in ("--stage", stage)]
    options += ["--jobs", str(arguments.jobs)] if arguments.jobs else []
    sweep(Path.cwd(), points, arguments.stages, options, arguments.cluster)
    _say([*_columns(table(points, arguments.metrics)), *unmatched(points, arguments.metrics)])
    return int(any(point.end not in GOOD for point in points))


def _seeds(arguments: argparse.Namespace) -> int:
    import logging
    import subprocess

    from pipeline.dvc.plan import select
    from pipeline.prefect.artifacts import current_metrics
    from pipeline.seeds import REPORT, columns, gather, own_seed, points
    from pipeline.sweep import Point, fetched, table, unmatched

    root = Path.cwd()
    found = points(root, arguments.seeds)
    select(_dag(), [REPORT])
    _reach_server(arguments.cluster)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    jobs = ["--jobs", str(arguments.jobs)] if arguments.jobs else []
    good = gather(root, found, jobs, arguments.cluster)
    if good:
        where = ["--cluster"] if arguments.cluster else []
        own = [sys.executable, "-m", "pipeline", "run", "--stage", REPORT, *jobs, *where]
        if code := subprocess.run(own, check=False).returncode:
            return code
        if arguments.cluster:
            fetched(root, [_dag()[REPORT]])
        metrics = current_metrics(root, _dag()[REPORT])
        found = [Point({"seed": own_seed(root)}, "this run", metrics), *found]
    shown = table(found, arguments.metrics or columns(found))
    _say([*_columns(shown), *unmatched(found, arguments.metrics)])
    return int(not good)


def _since(arguments: argparse.Namespace) -> int:
    from pipeline.earlier import KEPT, keep

    _dag()
    whose = keep(Path.cwd(), arguments.revision)
    _say(
        [
            f"{KEPT}: the run of {whose}",
            "dvc repro report now shows what changed since (on workers: python -m pipeline run"
            " --stage report --cluster)",
        ]
    )
    return 0


def _deploy(arguments: argparse.Namespace) -> int:
    server.need()
    from pipeline.prefect.deploy import deploy

    _say(deploy(Path.cwd(), _dag(), arguments.type))
    return 0


def _work(arguments: argparse.Namespace) -> int:
    server.need()
    from pipeline.prefect.deploy import become_worker

    become_worker(Path.cwd(), _dag(), arguments.pool, arguments.limit, arguments.once)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    server.need()
    from pipeline.prefect.serving import serve

    serve(Path.cwd())
    return 0


def _status(arguments: argparse.Namespace) -> int:
    server.use_running()
    from pipeline.prefect.history import last_runs

    with server.own_server():
        _say(last_runs(arguments.last, "" if arguments.all else identity.name(Path.cwd())))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from pipeline.doctor import examine

    findings = list(examine(Path.cwd(), server.address(), arguments.cache))
    _say([f"{finding.level:5}  {finding.what}" for finding in findings])
    return int(any(finding.level == "wrong" for finding in findings))


#: Every command: what runs it, what it does, and its options.
_COMMANDS: dict[str, tuple[Any, str, Any]] = {
    "plan": (_plan, "say what a run would do and why, without running anything", _plan_options),
    "run": (_run, "bring stages up to date", _run_options),
    "serve": (
        _serve,
        "offer the flow on the pages of a Prefect server, and run what is asked for there",
        _none,
    ),
    "status": (
        _status,
        "list the last flow runs of this workspace, and the stages of the newest",
        _status_options,
    ),
    "sweep": (
        _sweep,
        "run a grid of params, each point in a working tree of its own, as DVC experiments",
        _sweep_options,
    ),
    "seeds": (
        _seeds,
        "run other training seeds, and this run, and show them side by side in the report",
        _seeds_options,
    ),
    "since": (
        _since,
        "put an earlier run beside this one: the report shows what changed since",
        _since_options,
    ),
    "deploy": (
        _deploy,
        "tell a Prefect server how workers run a stage: pools and the deployments of prefect.yaml",
        _deploy_options,
    ),
    "work": (
        _work,
        "be a worker: take stages of a pool and run them in this clone, one after the other",
        _work_options,
    ),
    "doctor": (_doctor, "look for what may keep a run from working", _doctor_options),
}


if __name__ == "__main__":
    sys.exit(main())

"""Other training seeds of this run: each is a run of the same graph in a working tree of its own,
as a point of a sweep is, and what it compares goes beside this run's for the report.

A seed draws everything anew, from the split of the data to the answers, so no stage of the graph is
common to two of them. That is why seeds are runs, and not instances of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import yaml_text
from pipeline.dvc.parameters import replace_file
from pipeline.earlier import COMPARISON
from pipeline.errors import PipelineError
from pipeline.sweep import GOOD, Point, sweep

#: The stage that sets seeds side by side.
REPORT = "report"
#: Where the report looks for the comparisons of other runs.
GATHERED = Path("reports/seeds")


def own_seed(root: Path) -> int:
    """The seed of params.yaml. Raises PipelineError where it has none."""
    content = _params(root)
    seed = content.get("seed") if isinstance(content, dict) else None
    if not isinstance(seed, int):
        raise PipelineError("params.yaml: seed is no whole number, and other seeds go beside it")
    return seed


def _params(root: Path) -> Any:
    return yaml_text.load(yaml_text.read(root / "params.yaml"))


def points(root: Path, seeds: Sequence[int]) -> list[Point]:
    """The runs of these seeds; raises PipelineError for one that comes twice or is the own one."""
    own = own_seed(root)
    for seed in seeds:
        if seed == own:
            raise PipelineError(
                f"{seed}: the seed of params.yaml, which counts anyway; name other seeds"
            )
        if seeds.count(seed) > 1:
            raise PipelineError(f"{seed}: named twice; name each seed once")
    return [Point({"seed": seed}) for seed in seeds]


def columns(found: Sequence[Point]) -> list[str]:
    """The metrics that a table of runs shows: mean reward and cost of the policies that any of them
    recommends; the report has all.
    """
    names = dict.fromkeys(point.metrics.get("recommended") for point in found)
    known = [name for name in names if name]
    return [f"policies.{name}.{key}.mean" for name in known for key in ("reward", "cost")]


def gather(root: Path, found: Sequence[Point], options: Sequence[str], cluster: bool) -> bool:
    """Bring the runs of these points up to date, and put their comparisons into `GATHERED`: on
    workers all at the same time, here one after the other. Returns whether all ended well.

    Nothing is left there of a seed whose run did not, and nothing runs for one that is up to date.

    Raises PipelineError as `sweep` does, before anything runs, and where params.yaml was edited
    since: this run would be one of other params than they."""
    before = _params(root)
    sweep(root, found, [REPORT], ["--stage", REPORT, *options], cluster)
    for point in found:
        _keep(root / GATHERED / f"{point.settings['seed']}.json", point)
    good = all(point.end in GOOD for point in found)
    if good and _params(root) != before:
        raise PipelineError(
            "params.yaml: edited while the seeds ran, so this run would be one of other params;"
            " with those that you want in it, run this again (what has ended counts)"
        )
    return good


def _keep(path: Path, point: Point) -> None:
    """Put a run's comparison there, or take away what is there of an earlier one."""
    if point.end in GOOD and COMPARISON not in point.files:
        point.end = "not fetched"  # neither cache nor remote has it any more
    if point.end in GOOD:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, point.files[COMPARISON])
    else:
        path.unlink(missing_ok=True)

"""An earlier run of this workspace, set beside this one for the report: what git and DVC hold of it
at a revision or an experiment."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.repo.brancher import switch
from dvc.scm import RevError, resolve_rev
from dvc.utils.serialize import parse_yaml

from pipeline.dvc.checkout import asked, git
from pipeline.dvc.parameters import replace_file
from pipeline.errors import PipelineError

#: What the report compares of a run.
COMPARISON = "reports/comparison.json"
PROVENANCE = "reports/provenance"
#: Where the report looks for it.
KEPT = Path("reports/earlier/run.json")


def keep(root: Path, revision: str | None) -> str:
    """Put what a run compared, and what its stages ran with, into `KEPT`; returns in words whose
    run that is.

    Args:
        root: the workspace.
        revision: a revision of git or the name of a DVC experiment; None for the newest commit
            whose comparison is not that of the workspace.

    Raises PipelineError, and leaves what was there, for one that is not there, that holds no run,
    or whose files neither cache nor remote has."""
    name = revision or _last_other(root)
    with Repo(str(root)) as repo:
        commit = _resolved(repo, name)
        with switch(repo, commit):
            read = {
                "comparison": _json(repo, name, COMPARISON),
                "stages": [_json(repo, name, path) for path in _provenance(repo, root, commit)],
            }
    seconds = int(git(root, "show", "-s", "--format=%ct", commit))
    date = f"{datetime.fromtimestamp(seconds):%Y-%m-%d}"
    kept = {"name": name, "commit": commit, "date": date, **read}
    path = root / KEPT
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(kept, indent=2, sort_keys=True) + "\n")
    return f"{name}, {date}"


def _resolved(repo: Repo, name: str) -> str:
    try:
        return str(resolve_rev(repo.scm, name))
    except RevError:
        raise PipelineError(
            f"{name}: neither a revision of git nor an experiment; `git log` and `dvc exp list`"
            f" name them{_cut(Path(repo.root_dir))}"
        ) from None


def _last_other(root: Path) -> str:
    """The newest commit whose comparison differs from that of the workspace."""
    lock = root / "dvc.lock"
    own = _hashes(lock.read_text()) if lock.is_file() else {}
    for commit in git(root, "log", "--format=%H", "--", "dvc.lock").split():
        compared = _hashes(_lock(root, commit)).get(COMPARISON)
        if compared and compared != own.get(COMPARISON):
            return commit[:10]
    raise PipelineError(
        "no commit has the results of another run; commit a run before the next one (git add"
        " params.yaml dvc.lock && git commit -m 'A run'), or name a revision or an experiment"
        f"{_cut(root)}"
    )


def _cut(root: Path) -> str:
    """What to do, after a semicolon, where a clone holds the newest commits alone; else empty."""
    shallow = asked(root, "rev-parse", "--is-shallow-repository").stdout.strip() == "true"
    return "; this clone is shallow, git fetch --unshallow brings older commits" if shallow else ""


def _lock(root: Path, commit: str) -> str:
    """The text of dvc.lock in a commit; empty where it has none."""
    return asked(root, "show", f"{commit}:./dvc.lock").stdout


def _hashes(lock: str) -> dict[str, str]:
    """The hashes of all outputs in the text of dvc.lock, by path; none of one that is damaged."""
    try:
        content: Any = parse_yaml(lock, "dvc.lock") or {}
    except DvcException:  # half a merge, say
        content = {}
    outs = [out for stage in content.get("stages", {}).values() for out in stage.get("outs", [])]
    return {out["path"]: out.get("md5", "") for out in outs}


def _provenance(repo: Repo, root: Path, commit: str) -> list[str]:
    """Paths of what the stages of a commit's graph ran with, as far as they had run."""
    ran = _hashes(_lock(root, commit))
    paths = {out.def_path for out in repo.index.outs}
    return sorted(path for path in ran if path in paths and path.startswith(PROVENANCE))


def _json(repo: Repo, name: str, path: str) -> Any:
    try:
        return json.loads(repo.dvcfs.read_text(f"/{path}"))
    except (FileNotFoundError, DvcException, ValueError):
        raise PipelineError(
            f"{name}: {path}: no run is committed there, or neither DVC's cache nor its remote has"
            " this file any more"
        ) from None

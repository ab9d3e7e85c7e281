"""Commits as working trees: the commit that workers are asked to run, and a tree of it on a node.

Stages on one node never share a workspace, where DVC would have them wait for each other; they
share the node's cache."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from configobj import ConfigObj
from dvc.repo import Repo

from pipeline.errors import PipelineError
from pipeline.holding import held

#: What a run may change without a commit: it travels with each stage.
CARRIED = ("params.yaml", "dvc.lock")
#: Seconds between two looks whether another run of the very same stage or point has ended.
PAUSE = 5.0
#: Variables by which a hook, or a shell, of git has every command work at one repository or index,
#: whatever folder it is told.
ELSEWHERE = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_COMMON_DIR",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
)
#: Settings for every command: a clone's hooks are about the work of people (`dvc install` has git
#: check out outputs in every new tree), and what git prints must not hang on somebody's taste.
SETTINGS = {
    "core.hooksPath": os.devnull,
    "log.showSignature": "false",
    "status.showUntrackedFiles": "normal",
}
#: Variables that name folders of what stages keep outside of DVC, and where these lie by default.
OUTSIDE = {"DUALIGN_SCRATCH": ".scratch", "DUALIGN_TRACKING": "tracking"}


def committed(root: Path) -> str:
    """The commit of the workspace; raises PipelineError where files differ from it, or where it is
    not that of a whole repository.
    """
    around = git(root, "rev-parse", "--show-prefix", "--show-superproject-working-tree")
    if around.strip():  # its trees would hold more than this folder, or DVC would not work in them
        raise PipelineError(
            f"{root} is a folder or a submodule of another git repository, and points and workers"
            " need working trees of its own commits; git clone it elsewhere, or give it a"
            " repository of its own"
        )
    changed = [
        line[3:]
        for line in git(root, "status", "--porcelain").splitlines()
        if line[3:] not in CARRIED
    ]
    if changed:
        raise PipelineError(
            f"{len(changed)} files differ from the last commit, first {changed[0]}; what runs"
            " elsewhere is a commit, so commit them (params.yaml and dvc.lock travel by"
            " themselves)"
        )
    return git(root, "rev-parse", "HEAD").strip()


def check_identity(root: Path) -> None:
    """Raise PipelineError where git does not know whose a commit is, as in many containers."""
    if any(asked(root, "var", f"GIT_{who}_IDENT").returncode for who in ("AUTHOR", "COMMITTER")):
        raise PipelineError(
            "git does not know whose the commits are that experiments become; git config user.name"
            " NAME, and git config user.email ADDRESS"
        )


def published(root: Path) -> str:
    """The workspace's commit, which workers can fetch; raises PipelineError if not pushed."""
    commit = committed(root)
    if not git(root, "branch", "--remotes", "--contains", commit):
        raise PipelineError(
            f"commit {commit[:10]} is on no remote branch, where workers look for it; git push it"
        )
    return commit


@contextlib.contextmanager
def working_tree(
    root: Path,
    commit: str,
    name: str,
    log: Callable[[int, str], None],
    over: threading.Event | None = None,
) -> Iterator[tuple[Path, int]]:
    """A working tree of a commit below `root`, with its DVC cache and remote; removed at the end.

    Yields the tree and a file descriptor that holds it for whoever it is passed on to. Where a tree
    of the same `name` is in use, it is waited for; that of a killed run is replaced, once its
    processes have ended.

    Raises PipelineError where the commit cannot be had, or `over` is set while it waits.
    """
    folder = root / ".dvc" / "tmp" / "stages"
    tree = folder / name
    with _in_turn(folder / f"{name}.lock", log, over or threading.Event()) as lock:
        _add(root, commit, tree)
        try:
            _share(root, tree)
            yield tree, lock
        finally:
            _remove(root, tree)


@contextlib.contextmanager
def _in_turn(path: Path, log: Callable[[int, str], None], over: threading.Event) -> Iterator[int]:
    """Hold a lock file, once nobody else does; who does is logged once."""
    told = ""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                lock = stack.enter_context(held(path, f"{path.stem} runs here already"))
                break
            except PipelineError as error:
                if str(error) != told:
                    told = str(error)
                    log(logging.INFO, told)
                if over.wait(PAUSE):
                    raise
        yield lock


def _add(root: Path, commit: str, tree: Path) -> None:
    with (root / ".dvc" / "tmp" / "worktrees.lock").open(
        "w"
    ) as turn:  # git's own lock fails at once
        fcntl.flock(turn, fcntl.LOCK_EX)
        _fetch(root, commit)
        _remove(root, tree)
        git(root, "worktree", "add", "--quiet", "--force", "--detach", str(tree), commit)


def _fetch(root: Path, commit: str) -> None:
    """Get a commit from any remote, where it is not there; raises PipelineError if none has it."""
    said = ""
    for remote in git(root, "remote").split():
        if not _has(root, commit):  # a clone of one branch fetches that one alone by itself
            branches = f"+refs/heads/*:refs/remotes/{remote}/*"
            said = asked(root, "fetch", "--quiet", remote, branches).stderr or said
    if not _has(root, commit):
        why = f" ({complaint(said)})" if said else ""
        raise PipelineError(
            f"commit {commit[:10]} is not in a remote of {root}{why}; see `git remote -v` there"
        )


def _has(root: Path, commit: str) -> bool:
    return asked(root, "cat-file", "-e", f"{commit}^{{commit}}").returncode == 0


def _remove(root: Path, tree: Path) -> None:
    """Remove a tree, and what git knows of it; `prune` forgets those on a disk that is away."""
    shutil.rmtree(tree, ignore_errors=True)
    # Twice, for git holds a tree locked while it makes it, and for ever if it is killed then.
    asked(root, "worktree", "remove", "--force", "--force", str(tree))


def _share(root: Path, tree: Path) -> None:
    """Give a tree the settings of its clone that git does not hold, its cache and remote."""
    local = root / ".dvc" / "config.local"
    if local.exists():
        shutil.copy2(local, tree / ".dvc" / "config.local")
    with Repo(str(root)) as repo:
        cache = repo.cache.local.path
        remote, url = default_remote(repo)
    # DVC reads UTF-8, as folders may be called, but writes ASCII
    settings = ConfigObj(str(tree / ".dvc" / "config.local"), encoding="utf-8", interpolation=False)
    settings.setdefault("cache", {})["dir"] = str(Path(cache).parents[1])  # of .../files/md5
    site = tree / ".dvc" / "tmp" / "site"  # goes with the tree
    settings.setdefault("core", {})["site_cache_dir"] = str(site)
    if remote:  # a relative one counts from the clone
        settings.setdefault(f'remote "{remote}"', {})["url"] = url
    settings.write()


def default_remote(repo: Repo) -> tuple[str, str]:
    """Name and address of DVC's default remote; empty without one, or where its settings are gone,
    which another machine's `.dvc/config.local` may hold.
    """
    name = repo.config["core"].get("remote")
    settings = repo.config["remote"].get(name)
    return (str(name), str(settings["url"])) if settings else ("", "")


def tracked_files(root: Path, path: str, which: str = "--cached") -> list[str]:
    """The files in a path that git holds (`--cached`) or not (`--others`); none outside of git.

    Raises PipelineError where there is a repository that git does not trust.
    """
    answer = asked(root, "ls-files", "-z", which, "--", path)
    if _distrusts(answer.stderr):
        raise PipelineError(f"git: {complaint(answer.stderr)}")
    return [file for file in answer.stdout.split("\0") if file]


def lasting(root: Path) -> dict[str, str]:
    """The variables by which what stages keep outside of DVC lies in `root` and outlives trees."""
    return {name: str(root / (os.environ.get(name) or folder)) for name, folder in OUTSIDE.items()}


def write_files(tree: Path, files: Mapping[str, str]) -> None:
    """Write texts at paths in a tree; raises PipelineError for a path that leads out of it."""
    for name, text in files.items():
        path = (tree / name).resolve()
        if not path.is_relative_to(tree.resolve()):
            raise PipelineError(f"{name}: not a path in the repository")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def prune_worktrees(root: Path) -> None:
    """Remove the trees that killed runs have left."""
    folder = root / ".dvc" / "tmp" / "stages"
    for tree in [path for path in folder.glob("*") if path.is_dir()]:
        with contextlib.suppress(PipelineError), held(folder / f"{tree.name}.lock", "in use"):
            _remove(root, tree)


def git(root: Path, *arguments: str) -> str:
    """The output of a git command; raises PipelineError with what git says where it fails."""
    done = asked(root, *arguments)
    if done.returncode:
        raise PipelineError(f"git {arguments[0]}: {complaint(done.stderr)}; look at {root}")
    return done.stdout


def asked(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A git command in `root` that may fail, its messages in English."""
    kept = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    settings = [word for pair in SETTINGS.items() for word in ("-c", "=".join(pair))]
    return subprocess.run(
        ["git", "-C", str(root), *settings, *arguments],
        env={**kept, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        errors="surrogateescape",  # a file's name may be of any encoding
        check=False,
    )


def complaint(said: str) -> str:
    """Why git refused, in one line; for a distrusted owner of a folder with git's remedy."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    remedy = next((line for line in lines if line.startswith("git config ")), "")
    if _distrusts(said) and remedy:
        return f"the folder belongs to another user, which git calls dubious ownership; {remedy}"
    return lines[-1] if lines else "failed"


def _distrusts(said: str) -> bool:
    return "dubious ownership" in said

"""Working trees of commits: what may be run elsewhere, what a tree shares with its clone, and what
stays after it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from dvc.repo import Repo

from pipeline.doctor import examine
from pipeline.dvc import checkout
from pipeline.dvc.checkout import (
    committed,
    lasting,
    prune_worktrees,
    published,
    tracked_files,
    working_tree,
    write_files,
)
from pipeline.errors import PipelineError
from pipeline.run.runner import held
from tests.pipeline.project import Project, git


@pytest.fixture
def clone(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the project, with a remote that lies beside it and a setting that git does not
    hold.
    """
    git(project.root, "add", ".")
    git(project.root, "commit", "-qm", "first")
    folder = tmp_path_factory.mktemp("node")
    git(folder, "clone", "-q", str(project.root), "clone")
    (folder / "clone/.dvc/config").write_text(
        "[core]\n    remote = store\n['remote \"store\"']\n    url = ../../store\n"
    )
    git(folder / "clone", "commit", "-qam", "remote")
    git(folder / "clone", "push", "-q", "origin", "HEAD:refs/heads/other")
    git(folder / "clone", "fetch", "-q")
    (folder / "clone/.dvc/config.local").write_text("[core]\n    checksum_jobs = 3\n")
    return folder / "clone"


def test_only_commits_that_others_can_fetch_run_elsewhere(clone: Path) -> None:
    commit = git(clone, "rev-parse", "HEAD").strip()
    assert published(clone) == committed(clone) == commit
    (clone / "params.yaml").write_text("{}")
    (clone / "dvc.lock").write_text("stages: {}")
    assert published(clone) == commit
    (clone / "new.py").write_text("")
    with pytest.raises(PipelineError, match=r"1 files differ from the last commit, first new\.py"):
        committed(clone)
    git(clone, "add", ".")
    git(clone, "commit", "-qm", "new")
    committed(clone)
    with pytest.raises(PipelineError, match="is on no remote branch"):
        published(clone)


def test_a_folder_that_git_does_not_trust_is_told_with_its_remedy(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    remedy = f"dubious ownership; git config --global --add safe.directory {clone}"
    for ask in (lambda: committed(clone), lambda: tracked_files(clone, ".")):
        with pytest.raises(PipelineError, match=re.escape(remedy)):
            ask()
    (found,) = [
        finding
        for finding in examine(clone, "http://127.0.0.1:9/api")
        if finding.what.startswith("git")
    ]
    assert found.level == "wrong" and remedy in found.what


def test_a_tree_shares_cache_remote_and_settings_and_goes(clone: Path) -> None:
    commit = git(clone, "rev-parse", "HEAD").strip()
    with working_tree(clone, commit, "one", logging.log) as (tree, lock):
        assert (
            (tree / "work.py").exists()
            and git(tree, "rev-parse", "HEAD").strip() == commit
            and lock > 0
        )
        with Repo(str(tree)) as repo, Repo(str(clone)) as base:
            assert Path(repo.cache.local.path).resolve() == Path(base.cache.local.path).resolve()
            assert repo.config["remote"]["store"]["url"] == base.config["remote"]["store"]["url"]
            assert Path(repo.config["remote"]["store"]["url"]) == clone.parent / "store"
            assert repo.config["core"]["checksum_jobs"] == 3
        write_files(tree, {"a/b.txt": "text"})
        assert (tree / "a/b.txt").read_text() == "text"
        with pytest.raises(PipelineError, match="not a path in the repository"):
            write_files(tree, {"../../../../escaped": ""})
    assert not tree.exists() and git(clone, "worktree", "list").count("\n") == 1


def test_a_part_of_another_repository_is_told(clone: Path, tmp_path: Path) -> None:
    """A folder's own params.yaml would count as an edit, and its trees would lack it at the top; in
    the working trees of a submodule DVC stops."""
    git(tmp_path, "init", "-q", "around")
    around = tmp_path / "around"
    git(around, "-c", "protocol.file.allow=always", "submodule", "-q", "add", str(clone), "module")
    shutil.copytree(clone / ".dvc", around / "folder/.dvc", ignore=shutil.ignore_patterns("tmp"))
    for part in ("module", "folder"):
        with pytest.raises(PipelineError, match=f"{part} is a folder or a submodule of another"):
            committed(around / part)


def test_a_tree_of_a_clone_in_a_folder_of_any_alphabet(clone: Path, tmp_path: Path) -> None:
    """DVC's own `config` writes ASCII alone."""
    home = tmp_path / "home/jürgen/日本"
    home.parent.mkdir(parents=True)
    clone.parent.rename(home)
    moved = home / clone.name
    with (
        working_tree(moved, committed(moved), "one", logging.log) as (tree, _),
        Repo(str(tree)) as repo,
    ):
        assert Path(repo.cache.local.path) == moved / ".dvc/cache/files/md5"
        assert Path(repo.config["remote"]["store"]["url"]) == home / "store"
        assert repo.config["core"]["checksum_jobs"] == 3


def test_variables_of_a_hook_of_git_do_not_lead_a_tree_into_the_workspace(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`git add` in the tree of a point staged its params for the next commit of the workspace."""
    with monkeypatch.context() as hook:
        hook.setenv("GIT_DIR", str(clone / ".git"))
        hook.setenv("GIT_INDEX_FILE", ".git/index")
        with working_tree(clone, committed(clone), "one", logging.log) as (tree, _):
            write_files(tree, {"params.yaml": "a point's"})
            checkout.git(tree, "add", "--force", "params.yaml")
            assert checkout.git(tree, "diff", "--cached", "--name-only") == "params.yaml\n"
    assert git(clone, "status", "--porcelain") == ""


def test_a_tree_does_without_a_default_remote_that_is_not_there(clone: Path) -> None:
    (clone / ".dvc/config.local").write_text("[core]\n    remote = nowhere\n")
    with (
        working_tree(clone, committed(clone), "one", logging.log) as (tree, _),
        Repo(str(tree)) as repo,
    ):
        assert "nowhere" not in repo.config["remote"]


def test_hooks_and_settings_of_somebodys_git_change_nothing(clone: Path) -> None:
    """`dvc install` makes a hook that checks out outputs in every new tree, and failed there; with
    `log.showSignature` a date begins with what gpg says.
    """
    hook = clone / ".git/hooks/post-checkout"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    git(clone, "config", "status.showUntrackedFiles", "no")
    with working_tree(clone, committed(clone), "one", logging.log) as (tree, _):
        assert (tree / "work.py").exists()
    (clone / "helper.py").write_text("# that stages import\n")
    with pytest.raises(PipelineError, match=r"first helper\.py"):
        committed(clone)

    git(clone, "config", "log.showSignature", "true")
    raw = git(clone, "cat-file", "commit", "HEAD")
    author, message = raw.split("\n\n", 1)
    signature = "gpgsig -----BEGIN SSH SIGNATURE-----\n none\n -----END SSH SIGNATURE-----"
    signed = f"{author}\n{signature}\n\n{message}"
    (clone / "signed").write_text(signed)
    made = git(clone, "hash-object", "-t", "commit", "-w", "signed").strip()
    assert checkout.git(clone, "show", "-s", "--format=%ct", made).strip().isdigit()


def test_trees_of_others_on_a_disk_that_is_away_stay(clone: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine"
    git(clone, "worktree", "add", "-q", "--detach", str(own))
    away = own.rename(tmp_path / "unmounted")
    with working_tree(clone, committed(clone), "one", logging.log):
        pass
    away.rename(own)
    assert git(own, "status", "--porcelain") == ""


def test_a_commit_that_came_later_is_fetched_from_any_remote_and_one_that_is_nowhere_is_told(
    clone: Path, project: Project
) -> None:
    git(clone, "config", "remote.origin.fetch", "+refs/heads/other:refs/remotes/origin/other")
    git(project.root, "switch", "-qc", "topic")  # which a clone of one branch does not know
    (project.root / "work.py").write_text("# newer\n")
    git(project.root, "commit", "-qam", "newer")
    commit = git(project.root, "rev-parse", "HEAD").strip()
    git(clone, "remote", "rename", "origin", "ours")
    git(clone, "remote", "add", "gone", str(clone / "nowhere"))
    with working_tree(clone, commit, "one", logging.log) as (tree, _):
        assert (tree / "work.py").read_text() == "# newer\n"
    with (
        pytest.raises(PipelineError, match=r"^commit 0{10} is not in a remote of .* \(.*\); see"),
        working_tree(clone, "0" * 40, "one", logging.log),
    ):
        pass


def test_a_tree_that_a_killed_run_left_is_replaced_or_tidied(clone: Path) -> None:
    code = (
        "import logging, os, sys; from pathlib import Path; from pipeline.dvc.checkout import"
        " working_tree\nwith working_tree(Path(sys.argv[1]), 'HEAD', 'one', logging.log) as (tree,"
        " _):\n    (tree / 'left').write_text(''); os._exit(9)"
    )
    root = Path(__file__).resolve().parents[3]
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(clone)], cwd=root, check=False)
        assert (clone / ".dvc/tmp/stages/one/left").exists()
    with working_tree(clone, "HEAD", "one", logging.log) as (tree, _):
        assert not (tree / "left").exists()
        prune_worktrees(clone)
        assert tree.exists(), "it is in use"
    subprocess.run([sys.executable, "-c", code, str(clone)], cwd=root, check=False)
    prune_worktrees(clone)
    assert not tree.exists()


def test_a_tree_that_git_was_killed_in_making_is_replaced_or_tidied(clone: Path) -> None:
    tree = clone / ".dvc/tmp/stages/one"

    def killed() -> None:
        tree.parent.mkdir(parents=True, exist_ok=True)
        git(clone, "worktree", "add", "-q", "--detach", str(tree), "HEAD")
        git(clone, "worktree", "lock", "--reason", "initializing", str(tree))

    killed()
    with working_tree(clone, "HEAD", "one", logging.log) as (made, _):
        assert (made / "work.py").exists()
    killed()
    prune_worktrees(clone)
    assert not tree.exists() and git(clone, "worktree", "list").count("\n") == 1


def test_checkpoints_outlive_a_tree_also_where_a_variable_is_empty_or_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUALIGN_SCRATCH", "")
    monkeypatch.setenv("DUALIGN_TRACKING", "runs")
    assert lasting(tmp_path) == {
        "DUALIGN_SCRATCH": str(tmp_path / ".scratch"),
        "DUALIGN_TRACKING": str(tmp_path / "runs"),
    }
    monkeypatch.setenv("DUALIGN_SCRATCH", "/elsewhere")
    assert lasting(tmp_path)["DUALIGN_SCRATCH"] == "/elsewhere"


def test_a_tree_in_use_is_waited_for_until_the_wait_is_over(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkout, "PAUSE", 0.05)
    told: list[str] = []
    over = threading.Event()
    over.set()
    path = clone / ".dvc/tmp/stages/one.lock"
    with (
        held(path, "taken"),
        pytest.raises(PipelineError, match=rf"^one runs here already \(process {os.getpid()}\)"),
        working_tree(clone, "HEAD", "one", logging.log, over),
    ):
        pass
    lock = held(path, "taken")
    lock.__enter__()
    threading.Timer(0.5, lambda: lock.__exit__(None, None, None)).start()
    with working_tree(clone, "HEAD", "one", lambda _, line: told.append(line)) as (tree, _):
        assert tree.exists() and len(told) == 1 and told[0].startswith("one runs here already")

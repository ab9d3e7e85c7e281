"""The tiny world on a cluster of this one machine: a coordinator without outputs, and a node for
each pool of dvc.yaml.

What `bench.kills --worker` takes the power from. Commits travel through a bare repository, results
through a folder."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
from dvc.repo import Repo

from bench.nodes import Nodes, serving
from bench.tiny import LONG, ROOT, World, debris, differs, state, temporaries
from dualign.core.errors import DualignError
from pipeline.dvc.checkout import git
from pipeline.dvc.dag import StageSpec

COORDINATOR = "coordinator"
#: Seconds without a sign of life after which a worker counts as lost here, where a user waits a
#: minute: there is no
#: option, so the coordinator's `pipeline.prefect.cluster.SILENCE` is set. Workers give a sign every
#: ten seconds, as ever.
SILENCE = 25.0
_RUN = (
    "import sys; from pipeline import __main__; from pipeline.prefect import cluster;"
    f" cluster.SILENCE = {SILENCE}; sys.exit(__main__.main())",
    *("run", "--cluster", "--force", "--stage"),
)


class Cluster:
    """Clones of a world in `folder`, which see each other through the Prefect server at an
    address.
    """

    def __init__(self, world: World, folder: Path, server: str) -> None:
        self.world = world
        self._folder = folder
        self._system = folder / "tmp"
        self._system.mkdir()
        self.nodes = Nodes(folder, {**world.environment(self._system), "PREFECT_API_URL": server})
        self._pools = sorted({pool_of(spec) for spec in world.dag.values()})
        self._root, *_ = self._clones = [
            self.nodes.clone(name) for name in (COORDINATOR, *self._pools)
        ]
        self._objects = _objects(world.folder)

    def start(self) -> None:
        """Tell the server of the pools, and start a worker for each."""
        if self._start("-m", "pipeline", "deploy").wait(LONG):
            raise DualignError(f"{self._root}: python -m pipeline deploy failed; see {self._log}")
        for pool in self._pools:
            self.nodes.start(pool, pool)

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command at the coordinator, whose own code counts."""
        told = {name: text for name, text in self.nodes.settings.items() if name != "PYTHONPATH"}
        with self._log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, *command], cwd=self._root, env=told, stdout=output, stderr=output
            )

    @property
    def _log(self) -> Path:
        return self._folder / f"{COORDINATOR}.log"

    @property
    def said(self) -> str:
        """What the coordinator's last command wrote, and the workers since `forget`."""
        logs = [self._log, *(self._folder / f"{pool}.log" for pool in self._pools)]
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')}" for path in logs)

    def run(self, spec: StageSpec) -> subprocess.Popen[bytes]:
        """Start a run of one stage on the workers."""
        return self._start("-c", *_RUN, spec.name)

    def forget(self, spec: StageSpec) -> None:
        """Every clone as it was made, and nothing in the remote of what this stage alone has
        written.
        """
        git(self._root, "checkout", "-q", "dvc.lock")
        for clone in self._clones:
            git(clone, "clean", "-fdxq", "--exclude", "__pycache__")
        others = {
            item for name, items in self._objects.items() if name != spec.name for item in items
        }
        for item in self._objects[spec.name] - others:
            path = self._folder / "store/files/md5" / item[:2] / item[2:]
            path.unlink(
                missing_ok=True
            )  # a stage that was forgotten before has made another provenance
        for pool in self._pools:
            (self._folder / f"{pool}.log").write_bytes(b"")

    def trees(self, spec: StageSpec) -> list[Path]:
        """The trees in which a node has the stage in hand."""
        node = self._folder / pool_of(spec)
        return [path for path in (node / ".dvc/tmp/stages").glob("*") if path.is_dir()]

    def state(self, spec: StageSpec) -> set[str]:
        """The files of a stage on its node, none while it is not in hand there."""
        node = self._folder / pool_of(spec)
        return {
            found for tree in self.trees(spec) for found in state(tree, spec, node / ".scratch")
        }

    def lose(self, spec: StageSpec) -> bool:
        """Take the power from the node that has a stage, and start it again; returns whether it had
        it in hand.
        """
        pool = pool_of(spec)
        self.nodes.kill(pool)
        held = bool(self.trees(spec))
        self.nodes.start(pool, pool)
        return held

    def fetch(self, spec: StageSpec) -> list[str]:
        """Bring a stage's results to the coordinator; returns those that are not what they were."""
        if self._start("-m", "dvc", "pull", "-q", spec.name).wait(LONG):
            return [f"dvc pull: {self._log.read_text()}"]
        return differs(self._root, self.world.kept, [spec])

    def debris(self) -> list[str]:
        """What any clone holds that a run should have taken away, and processes that still work at
        nodes.
        """
        found = [f"tmp/{name}" for name in temporaries(self._system)]
        for clone in self._clones:
            trees = [path.name for path in (clone / ".dvc/tmp/stages").glob("*") if path.is_dir()]
            found += [f"{clone.name}/{name}" for name in (*debris(clone), *_changed(clone), *trees)]
        return sorted([*found, *self._orphans()])

    def _orphans(self) -> Iterator[str]:
        """What works at a node besides its worker."""
        workers = {worker.pid for worker in self.nodes.workers.values()}
        for pool in self._pools:
            for process in self.nodes.processes(pool):
                if process.pid not in workers:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        yield f"{pool}/process {' '.join(process.cmdline())}"

    def restore(self) -> None:
        """Nodes that do nothing, and the remote as it was filled first; what else is left goes with
        `forget`.
        """
        for pool in list(self.nodes.workers):
            self.nodes.kill(pool)
            self.nodes.start(pool, pool)
        shutil.rmtree(self._folder / "store/files")
        shutil.copytree(self.world.folder / ".dvc/cache/files", self._folder / "store/files")


@contextlib.contextmanager
def on_nodes(world: World) -> Iterator[Cluster]:
    """The cluster of a world, made anew, with a Prefect server of its own."""
    folder = world.folder.with_name("cluster")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "prefect").mkdir(parents=True)
    publish(world, folder)
    with serving(folder / "prefect") as server:
        cluster = Cluster(world, folder, server)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.nodes.stop()


def publish(world: World, folder: Path) -> None:
    """Commit a world, results and all, and put it where clones find it."""
    world.commit()
    shutil.copyfile(ROOT / ".dvc/config", world.folder / ".dvc/config")
    for command in (
        ["remote", "add", "-q", "-d", "-f", "store", str(folder / "store")],
        ["push", "-q", *world.costs],
    ):
        world.dvc(*command)
    git(world.folder, "add", "--all", "--", ".", ":!tmp")
    who = [
        "-c",
        "user.name=bench",
        "-c",
        "user.email=bench@localhost",
        "-c",
        "commit.gpgsign=false",
    ]
    git(world.folder, *who, "commit", "-q", "--allow-empty", "-m", "The tiny world")
    git(folder, "clone", "-q", "--bare", str(world.folder), "origin")


def _objects(root: Path) -> dict[str, set[str]]:
    """The hashes of the files in DVC's cache that each stage's outputs are made of."""
    found: dict[str, set[str]] = {}
    with Repo(str(root)) as repo:
        for out in repo.index.outs:
            if out.hash_info:
                listing = out.get_dir_cache() if out.hash_info.isdir else ()
                hashes = {out.hash_info.value, *(info.value for _, _, info in listing)}
                found.setdefault(out.stage.name, set()).update(hashes)
    return found


def _changed(clone: Path) -> list[str]:
    """What git sees in a clone beside the record of the run."""
    lines = git(clone, "status", "--porcelain").splitlines()
    return [line for line in lines if line[3:] != "dvc.lock"]


def pool_of(spec: StageSpec) -> str:
    """The pool whose workers run a stage."""
    return str(spec.meta.get("pool", "cpu"))

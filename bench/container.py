"""A stage in a container of the worker image, beside the same stage outside: equal bytes.

    bench/container.sh

builds the image, lets podman speak for Docker, and runs `python -m bench.container`. A coordinator
hands the stage out to a pool of type docker, Prefect's own docker worker starts the container, and
the coordinator fetches the result."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import options
from bench.cluster import publish
from bench.nodes import Nodes, serving
from bench.options import knob
from bench.tiny import World, differs
from dualign.core.errors import DualignError

PROGRAM = "python -m bench.container"
POOL = "gpu"


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    stage: str = knob("sft", f"a stage of pool {POOL}")
    image: str = knob("localhost/dualign-worker", "image of the Dockerfile, which is here")
    worker: str = knob(sys.executable, "a Python that has prefect-docker")


def measure(given: Settings, work: Path) -> dict[str, Any]:
    """Run the stage outside, then in a container; what differs, and the seconds of both."""
    world = World(work, [given.stage])
    spec = world.dag[given.stage]
    folder = work / "cluster"
    (folder / "prefect").mkdir(parents=True)
    (folder / "tmp").mkdir()
    _mount(world.folder / "prefect.yaml", folder)
    publish(world, folder)
    with serving(folder / "prefect") as server:
        told = {**world.environment(folder / "tmp"), "PREFECT_API_URL": server}
        told.pop("PYTHONPATH")
        told |= {"DUALIGN_IMAGE": given.image, "PREFECT_WORKER_QUERY_SECONDS": "0.5"}
        nodes = Nodes(folder, told)
        root = nodes.clone("coordinator")
        _call(root, told, sys.executable, "-m", "pipeline", "deploy", "--type", "docker")
        started = [given.worker, "-m", "prefect", "worker", "start", "--pool", POOL]
        with (folder / "worker.log").open("wb") as output:
            nodes.workers[POOL] = subprocess.Popen(
                started, cwd=folder, env=told, stdout=output, stderr=output
            )
        try:
            began = time.monotonic()
            run = ("-m", "pipeline", "run", "--cluster", "--force", "--stage", spec.name)
            said = _call(root, told, sys.executable, *run)
            seconds = time.monotonic() - began
        finally:
            nodes.stop()
            sys.stderr.write((folder / "worker.log").read_text(errors="replace"))
        _call(root, told, sys.executable, "-m", "dvc", "pull", "-q", spec.name)
    return {
        "differs": differs(root, world.kept, [spec]),
        "outside": world.costs[spec.name]["seconds"],
        "in_container": seconds,
        "said": said.splitlines()[-5:],
    }


def _mount(file: Path, folder: Path) -> None:
    """Let containers of the deployments see the remote and the repository; the image is here."""
    mounts = f"[{folder}:{folder}, {folder}/origin:/origin.git]"
    own = (
        f"        image_pull_policy: Never\n        auto_remove: true\n        volumes: {mounts}\n"
    )
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(f"{line}{own}" if "        image:" in line else line for line in lines))


def _call(folder: Path, told: dict[str, str], *command: str) -> str:
    """What a command says that must succeed."""
    done = subprocess.run(
        command, cwd=folder, env=told, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise DualignError(f"{' '.join(command[1:])}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def page(given: Settings, found: dict[str, Any]) -> str:
    """The results as Markdown."""
    engine = subprocess.run(["podman", "--version"], capture_output=True, text=True, check=True)
    differing = ", ".join(found["differs"]) or "none"
    return "\n".join(
        [
            "# A stage in a container",
            "",
            f"`bench/container.sh`: `{given.stage}` of the tiny world in the image of the"
            f" Dockerfile, started by Prefect's docker worker, {engine.stdout.strip()}.",
            "",
            *options.head(["", "s"]),
            f"| outside, the stage alone | {found['outside']:.0f} |",
            f"| `run --cluster` until the result is recorded | {found['in_container']:.0f} |",
            "",
            f"Outputs that differ: {differing}.",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; its files hold the result. Returns the status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given, out = options.parse(Settings, PROGRAM, __doc__, argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given, Path(folder))
    options.publish(out, "container", found, page(given, found))
    sys.stdout.write(page(given, found))
    return 1 if found["differs"] else 0


if __name__ == "__main__":
    sys.exit(main())

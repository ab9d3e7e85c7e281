"""Prefect servers with settings of their own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.server import reachable


@contextlib.contextmanager
def serving(home: Path, **settings: str) -> Iterator[str]:
    """A Prefect server whose records lie in `home`, with `PREFECT_...` settings; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    told = {**bare, "PREFECT_HOME": str(home), "PREFECT_SERVER_API_PORT": str(port), **settings}
    command = [sys.executable, "-m", "prefect", "server", "start"]
    api = f"http://127.0.0.1:{port}/api"
    with (
        (home / "server.log").open("w") as log,
        subprocess.Popen(command, cwd=home, env=told, stdout=log, stderr=log) as server,
    ):
        try:
            deadline = time.monotonic() + 600
            while not reachable(api):
                assert server.poll() is None and time.monotonic() < deadline, (home / "server.log").read_text()
                time.sleep(0.5)
            yield api
        finally:
            server.terminate()

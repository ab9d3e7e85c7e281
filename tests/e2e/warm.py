"""A `python` for whole graphs of tiny stages, whose imports take most of their time: it has a
process that has imported the libraries once run `python -m stages.NAME` in a copy of itself.

    python -m tests.e2e.warm SOCKET

Modules of the repository are imported by each stage itself, from the folder that it runs in. The
stage is of its client's process group, with which it is killed. How a stage starts by itself is
tested where one of them is killed, in tests/stages/test_imports.py and in tests/test_stage.py."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Hands over what it was called with, and ends as the copy does.
CLIENT = """#!{python} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
called = json.dumps([os.getpgrp(), os.getcwd(), dict(os.environ), sys.argv[1:]]).encode()
socket.send_fds(server, [len(called).to_bytes(4, "big")], [0, 1, 2])
server.sendall(called)
sys.exit(int(server.recv(4) or b"1"))
"""


@contextlib.contextmanager
def warm(folder: Path) -> Iterator[Path]:
    """A folder for the front of PATH that holds such a `python`; `folder` is empty."""
    address = str(folder / "socket")
    client = folder / "bin" / "python"
    client.parent.mkdir()
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    command = [sys.executable, "-m", "tests.e2e.warm", address]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            yield client.parent
        finally:
            server.terminate()


def serve(address: str) -> None:
    """Run what clients ask for, one copy of this process each; returns in a copy, to be ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        os.write(1, b"ready\n")
        while True:
            client, _ = door.accept()
            if not os.fork():
                break
            client.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, (*handles,), _, _ = socket.recv_fds(client, 4, 3)
    group, folder, environment, arguments = json.loads(_read(client, int.from_bytes(size, "big")))
    worker = os.fork()
    if worker:
        status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        client.sendall(str(status if status >= 0 else 128 - status).encode())
        os._exit(0)
    os.setpgid(0, group)
    for number, handle in enumerate(handles):
        os.dup2(handle, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    _become(arguments)


def _read(client: socket.socket, size: int) -> bytes:
    with client.makefile("rb") as stream:
        return stream.read(size)


def _become(arguments: list[str]) -> None:
    """`python -m MODULE ...`, in this process."""
    option, module, *rest = arguments
    assert option == "-m" and module.startswith("stages.")
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [path for path in sys.path if path not in ("", str(ROOT))]
    sys.path[:] = [os.getcwd(), *filter(None, named), *others]
    importlib.invalidate_caches()
    sys.argv = ["-m", *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def import_libraries() -> None:
    """Import what stages do, and leave their own modules to be imported anew."""
    gc.disable()
    for module in pkgutil.iter_modules([str(ROOT / "stages")], "stages."):
        importlib.import_module(module.name)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("stages", "dualign"):
            del sys.modules[name]
    gc.freeze()


if __name__ == "__main__":
    import_libraries()
    serve(sys.argv[1])

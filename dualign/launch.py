"""Starts the processes of a stage that runs in several, with torch's elastic launcher.

The command of the stage is the same on every machine. Where `resources` ask for more than one
process, the one that was called starts them, each with the same command, and waits. It tells their
faults in one line, and stops them all when it is stopped or one of them ends."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from dualign.core import ranks
from dualign.core.errors import ParamsError
from dualign.core.temporaries import scratch_root
from dualign.params.base import Resources

#: Names host and port of the machine at which all machines of a stage meet.
MEETING = "DUALIGN_RENDEZVOUS"
_PORT = 29400
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_INTERRUPTED = 130
_PARENT_DIED = 1  # Linux: PR_SET_PDEATHSIG

log = logging.getLogger("dualign")


def is_worker() -> bool:
    """Whether a launcher has started this process, ours or `torchrun`."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def several(resources: Resources) -> bool:
    """Whether this process is to start others that do the work."""
    return not is_worker() and (resources.nodes > 1 or count(resources) > 1)


def count(resources: Resources) -> int:
    """Processes on this machine. Raises ParamsError where there are fewer GPUs."""
    import torch

    gpus = torch.cuda.device_count() if resources.device != "cpu" else 0
    if resources.processes == "auto":
        return max(gpus, 1)
    if resources.processes > max(gpus, 1) and gpus:
        raise ParamsError(
            f"resources.processes is {resources.processes}, but torch sees {gpus} GPUs; set it to"
            " auto, or to fewer"
        )
    return resources.processes


def start(stage: str, resources: Resources) -> None:
    """Run this command in as many processes as asked for; returns when all have ended well.

    Exits as the first that failed did, and raises KeyboardInterrupt where it is stopped."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if resources.nodes > 1 and MEETING not in os.environ:
        _on_all_nodes(resources.nodes)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="dualign-") as folder:
        launch = elastic_launch(_config(stage, resources, folder), sys.executable)
        try:
            launch(*sys.orig_argv[1:])
        except SignalException as error:
            raise KeyboardInterrupt from error
        except ChildFailedError as error:
            _end_as(stage, error.failures)


def join(resources: Resources) -> None:
    """Become one of the processes; nothing where there is but one."""
    if not is_worker():
        return
    import torch

    ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGTERM)  # or a killed launcher would leave it
    if resources.device == "cpu" or not torch.cuda.is_available():
        ranks.join("gloo")
        return
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    ranks.join("cpu:gloo,cuda:nccl")


def told(message: str, status: int) -> bool:
    """Leave the telling of a fault to the launcher; False where none can be told.

    A launcher whose folder is gone has told of its own end already."""
    file = os.environ.get(_ERROR_FILE) if is_worker() else None
    if not file:
        return False
    fault = {"message": message, "timestamp": time.time(), "status": status}
    try:
        Path(file).write_text(json.dumps(fault))
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _config(stage: str, resources: Resources, folder: str) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    here = count(resources)
    threads = resources.threads or max(1, (os.cpu_count() or 1) // here)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    quiet = dict.fromkeys(range(1, here), Std.ALL)  # the first one speaks for all
    return LaunchConfig(
        min_nodes=resources.nodes,
        max_nodes=resources.nodes,
        nproc_per_node=here,
        run_id=stage.replace("/", "-"),
        rdzv_backend="c10d",
        rdzv_endpoint=os.environ.get(MEETING, "localhost:0"),
        max_restarts=0,
        local_addr="localhost" if resources.nodes == 1 else None,
        logs_specs=DefaultLogsSpecs(folder, redirects=quiet),
    )


def _on_all_nodes(nodes: int) -> NoReturn:
    """Become Slurm's `srun` of this command on every machine of the allocation."""
    if "SLURM_JOB_ID" not in os.environ:
        raise ParamsError(
            f"resources.nodes is {nodes}: run this command on each of them with ${MEETING} set to"
            f" HOST:{_PORT} of the first (docs/cluster.md)"
        )
    os.environ[MEETING] = f"{socket.gethostname()}:{_PORT}"
    tasks = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--overlap", "--kill-on-bad-exit=1"]
    os.execvp("srun", [*tasks, sys.executable, *sys.orig_argv[1:]])


def _end_as(stage: str, failures: dict[int, Any]) -> NoReturn:
    """Exit as the process did whose end was the cause; the others lost it, or were stopped."""
    rank, failure = min(failures.items(), key=lambda item: _order(item[1]))
    fault = failure.error_file_data
    if "status" in fault:
        log.error("%s", fault["message"].rstrip())
        sys.exit(fault["status"])
    if failure.exitcode >= 0:
        log.error("process %d of %s ended with status %d", rank, stage, failure.exitcode)
        sys.exit(failure.exitcode)
    log.error(
        "process %d of %s was ended by %s%s; checkpoints are kept in %s, run the stage again to go"
        " on from the last one",
        rank,
        stage,
        failure.signal_name(),
        ", for want of memory perhaps" if failure.exitcode == -signal.SIGKILL else "",
        scratch_root(),
    )
    sys.exit(128 - failure.exitcode)


def _order(failure: Any) -> tuple[int, float]:
    """Killed processes first, then those that told of a fault, by time, then those stopped."""
    if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
        return 0, 0.0
    stopped = failure.exitcode in (-signal.SIGTERM, _INTERRUPTED)
    return (2 if stopped else 1), float(failure.error_file_data.get("timestamp", 0.0))

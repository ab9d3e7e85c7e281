"""What all tests share: no network, two threads (one where tests run side by side), real rows where
there are any.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read when the libraries are first imported, so set before any test module is.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1" if "PYTEST_XDIST_WORKER" in os.environ else "2",
    DVC_NO_ANALYTICS="1",
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
)

# A shell starts background jobs with Ctrl-C ignored, and their children inherit that; some tests
# send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


# While tests are imported, next to nothing is garbage, and looking for some takes a quarter of it.
gc.disable()


def pytest_collection_finish() -> None:
    """All is imported: the search for garbage begins, among what is made from here on."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: where files run side by side, one begun last would run alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder of genuine rows, which the repository does not ship: $DUALIGN_REAL_DATA or
    ../shared/data.
    """
    folder = Path(os.environ.get("DUALIGN_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real rows at {folder}; set DUALIGN_REAL_DATA to a folder that has them")
    return folder


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> None:
    """What is imported by now is looked through for garbage no more, as in a stage: Accelerate has
    all collected after each training, which took longer than a training as tiny as those here."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread, which is fastest for models as tiny as those of the tests."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""What keeps a pool's workers from a stage is told, and the remedy that is told helps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate

from pipeline.prefect.pools import obstacle
from tests.pipeline.project import environment

pytestmark = pytest.mark.slow

POOL = "told"


@pytest.fixture(scope="module")
def api(server: str) -> str:
    """A server with a pool that no worker serves."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    return server


@pytest.fixture
def client(api: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as made:
        yield made


def prefect(api: str, *command: str) -> None:
    """Run a command of Prefect's, which must succeed."""
    told = {**environment(), "PREFECT_API_URL": api}
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *command], env=told, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("of", "change", "why"),
    [
        ("pool", {"is_paused": True}, f"pool {POOL} is paused"),
        ("pool", {"concurrency_limit": 0}, f"pool {POOL} may run no stage, its limit is 0"),
        ("queue", {"is_paused": True}, f"queue default of pool {POOL} is paused"),
        (
            "queue",
            {"concurrency_limit": 0},
            f"queue default of pool {POOL} may run no stage, its limit is 0",
        ),
    ],
)
def test_an_obstacle_has_a_remedy_that_helps(
    api: str, client: SyncPrefectClient, of: str, change: dict[str, Any], why: str
) -> None:
    nobody = f"no worker of pool {POOL} is online; start one: python -m pipeline work {POOL}"
    assert obstacle(client, POOL, "default") == nobody
    if of == "pool":
        client.update_work_pool(POOL, WorkPoolUpdate(**change))
    else:
        queue = client.read_work_queue_by_name("default", work_pool_name=POOL)
        client.update_work_queue(queue.id, **change)
    told, remedy = obstacle(client, POOL, "default").split("; prefect ")
    assert told == why
    prefect(api, *remedy.split())
    assert obstacle(client, POOL, "default") == nobody


def test_a_pool_that_is_gone(client: SyncPrefectClient) -> None:
    assert obstacle(client, "gone") == "there is no pool gone any more; python -m pipeline deploy"

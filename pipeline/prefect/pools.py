"""What keeps the workers of a pool from taking a stage, each with its remedy."""

from __future__ import annotations

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectNotFound


def obstacle(client: SyncPrefectClient, pool: str, queue: str | None = None) -> str:
    """Why nobody takes a stage from a pool's queue, in a line; empty if a worker may."""
    try:
        work_pool = client.read_work_pool(pool)
    except ObjectNotFound:
        return f"there is no pool {pool} any more; python -m pipeline deploy"
    if work_pool.is_paused:
        return f"pool {pool} is paused; prefect work-pool resume {pool}"
    if work_pool.concurrency_limit == 0:
        return (
            f"pool {pool} may run no stage, its limit is 0; prefect work-pool"
            f" clear-concurrency-limit {pool}"
        )
    return _of_queue(client, pool, queue) or _of_workers(client, pool)


def _of_queue(client: SyncPrefectClient, pool: str, queue: str | None) -> str:
    try:
        work_queue = client.read_work_queue_by_name(queue or "default", work_pool_name=pool)
    except ObjectNotFound:
        return ""
    name = f"queue {work_queue.name} of pool {pool}"
    if work_queue.is_paused:
        return f"{name} is paused; prefect work-queue resume {work_queue.name} --pool {pool}"
    if work_queue.concurrency_limit == 0:
        remedy = f"prefect work-queue clear-concurrency-limit {work_queue.name} --pool {pool}"
        return f"{name} may run no stage, its limit is 0; {remedy}"
    return ""


def _of_workers(client: SyncPrefectClient, pool: str) -> str:
    workers = client.read_workers_for_work_pool(pool)
    if any(worker.status == WorkerStatus.ONLINE for worker in workers):
        return ""
    return f"no worker of pool {pool} is online; start one: python -m pipeline work {pool}"

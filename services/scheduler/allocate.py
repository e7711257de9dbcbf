"""Allocate: look at what is free and what waits, decide, and apply the decision in one transaction, under row locks.

No lock is held between two statements: `place` holds the decision against what is there by then, and every change
after the look is followed by a wake-up, so by another pass.
"""

from collections.abc import Sequence

import structlog

from core import crash
from core.db import allocations, nodes, pending
from core.db.connection import Line, Pool
from core.policy import plan
from core.records import Capacity, Dispatch

BATCH = 500


async def allocate_once(database: Line | Pool) -> list[Dispatch]:
    """One pass; answer what was given CPUs, at most BATCH jobs."""
    async with database.acquire() as connection:
        free = await nodes.free(connection)
        if not free:
            return []
        waiting = await pending.heads(connection, room(free), BATCH)
        placements = plan(waiting, free)[:BATCH]
        if not placements:
            return []
        crash.here("scheduler.decided")
        placed = await allocations.place(connection, placements)
        crash.here("scheduler.placed")
    log = structlog.get_logger()
    for job in placed:
        log.info("job_allocated", job_id=job.job_id, attempt=job.attempt, node=job.node, cpus=job.cpus)
    return [Dispatch(job.job_id, job.attempt, job.node) for job in placed]


def room(free: Sequence[Capacity]) -> list[tuple[str, int, int]]:
    """For each partition: its name, its largest free node, its free CPUs in total."""
    largest: dict[str, int] = {}
    total: dict[str, int] = {}
    for node in free:
        for partition in node.partitions:
            largest[partition] = max(largest.get(partition, 0), node.free_cpus)
            total[partition] = total.get(partition, 0) + node.free_cpus
    return [(partition, largest[partition], total[partition]) for partition in largest]

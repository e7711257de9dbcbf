"""Allocate: look at what is free and what waits, decide, and apply the decision in one transaction, under row locks.

No lock is held between two statements: `place` holds the decision against what is there by then, and every change
after the look is followed by a wake-up, so by another pass.
"""

import structlog

from core import crash
from core.db import allocations, pending
from core.db.connection import Line, Pool
from core.policy import plan
from core.records import Dispatch

BATCH = 500


async def allocate_once(database: Line | Pool) -> list[Dispatch]:
    """One pass; answer what was given CPUs, at most BATCH jobs."""
    async with database.acquire() as connection:
        waiting, free = await pending.look(connection, BATCH)
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

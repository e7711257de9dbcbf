"""Allocate: look at what is free and what waits, decide, and apply the decision in one transaction, under row locks.

No lock is held between two statements: `place` holds the decision against what is there by then. What changes after the
look wakes another pass; a worker's report or take that fills its node does not, so a decision that did not hold calls
for one.
"""

import asyncio
from collections.abc import Callable, Sequence

import structlog

from core import crash
from core.db import allocations, pending
from core.db.connection import Line, Pool
from core.policy import plan
from core.records import Dispatch

BATCH = 500


async def allocate_once(
    database: Line | Pool,
    hand_on: Callable[[list[Dispatch]], object] | None = None,
    outrun: Callable[[], object] | None = None,
) -> list[Dispatch]:
    """One pass; answer what was given CPUs, at most BATCH jobs, which `hand_on` gets before that is logged.

    Calls `outrun` when others were there first.
    """
    async with database.acquire() as connection:
        waiting, free = await pending.look(connection, BATCH)
        placements = plan(waiting, free)[:BATCH]
        if not placements:
            return []
        crash.here("scheduler.decided")
        placed = await allocations.place(connection, placements)
        crash.here("scheduler.placed")
    if outrun is not None and len(placed) < len(placements):
        outrun()
    dispatches = [Dispatch(job.job_id, job.attempt, job.node) for job in placed]
    if hand_on is not None:
        hand_on(dispatches)
        await asyncio.sleep(0)  # whoever was woken by that sends them on their way first
    tell(placed)
    return dispatches


def tell(placed: Sequence[allocations.Placed]) -> None:
    """Log what was given CPUs, by a pass or by a worker."""
    log = structlog.get_logger()
    for job in placed:
        log.info("job_allocated", job_id=job.job_id, attempt=job.attempt, node=job.node, cpus=job.cpus)

"""Reap: what was allocated and cannot start where it lies goes back to the queue."""

from itertools import groupby

import structlog

from core.db import allocations
from core.db.connection import Pool
from core.records import Ending
from core.states import Reason, State

BATCH = 1000


async def reap_once(pool: Pool) -> int:
    """One look; answer how many jobs went back to PENDING. One transaction per node (see schema.sql, lock order)."""
    log = structlog.get_logger()
    returned = 0
    async with pool.acquire() as connection:
        stranded = await allocations.stranded(connection, BATCH)
        for node, group in groupby(stranded, key=lambda dispatch: dispatch.node):
            endings = [Ending(d.job_id, d.attempt, State.PENDING, Reason.NONE) for d in group]
            for attempt in await allocations.release(connection, endings, node=node, before=State.CONFIGURING):
                log.warning("job_returned", job_id=attempt.job_id, attempt=attempt.attempt, node=node)
                returned += 1
    return returned

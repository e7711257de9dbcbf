"""Reap: what was allocated and cannot start where it lies goes back to the queue; what a DOWN node holds ends."""

from itertools import groupby

import structlog

from core.db import allocations
from core.db.connection import Connection, Pool
from core.records import Ending
from core.states import Reason, State

BATCH = 1000


async def reap_once(pool: Pool) -> int:
    """One look; answer how many attempts it ended. One transaction per node (see schema.sql, lock order)."""
    async with pool.acquire() as connection:
        # The API does this itself when a node is declared DOWN, unless it is killed in between.
        return len(await allocations.end_on_down(connection, BATCH)) + await _return_stranded(connection)


async def _return_stranded(connection: Connection) -> int:
    returned = 0
    stranded = await allocations.stranded(connection, BATCH)
    for node, group in groupby(stranded, key=lambda dispatch: dispatch.node):
        endings = [Ending(d.job_id, d.attempt, State.PENDING, Reason.NONE) for d in group]
        for attempt in await allocations.release(connection, endings, node=node, before=State.CONFIGURING):
            structlog.get_logger().warning("job_returned", job_id=attempt.job_id, attempt=attempt.attempt, node=node)
            returned += 1
    return returned

"""Dispatch: publish whatever is allocated and not yet published, after a commit, a crash or an emptied Redis alike."""

import redis.asyncio as redis

from core import streams
from core.db import allocations
from core.db.connection import Pool

BATCH = 1000


async def dispatch_once(pool: Pool, client: redis.Redis) -> int:
    """Publish one batch; answer how many. Published twice after a crash in between: the start's guard does not mind."""
    async with pool.acquire() as connection:
        waiting = await allocations.undispatched(connection, BATCH)
    if not waiting:
        return 0
    published = await streams.publish(client, "run", waiting)
    async with pool.acquire() as connection:
        await allocations.mark_dispatched(connection, published)
    return len(published)

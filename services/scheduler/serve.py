"""The scheduler: one leads, and does its duties; the others stand by."""

import asyncio
from collections.abc import Awaitable
from functools import partial

from core import role, streams
from core.db import schema
from core.db.connection import PLANNED_ONCE, Line, Pool, open_pool
from core.duty import repeat
from core.settings import Settings, without_secrets
from core.streams import Link
from core.wakeup import Wakeup
from services.scheduler.allocate import BATCH, allocate_once
from services.scheduler.dispatch import UNCLAIMED_SECONDS, Outbox, dispatch_once, republish_once
from services.scheduler.lead import lead
from services.scheduler.lose import Watch
from services.scheduler.reap import reap_once

POOL_SIZE = 2
OUTRUN_SECONDS = 0.05


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Lead, or stand by to lead, until told to stop."""
    await role.until_stopped(stop, _schedule(settings))


async def _schedule(settings: Settings) -> None:
    pool = await open_pool(settings, "scheduler", POOL_SIZE, **PLANNED_ONCE)
    line = Line(settings, "scheduler", **PLANNED_ONCE)
    client = streams.connect(settings)
    link = Link(client)
    try:
        await schema.ensure(pool)
        outbox, wake = Outbox(), Wakeup()
        poll = settings.poll_seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(streams.name_when_away(client, without_secrets(settings.redis_dsn)))
            group.create_task(
                lead(
                    settings,
                    wake,
                    [
                        lambda: repeat("allocate", lambda: _allocate(line, outbox, wake), wake, poll),
                        lambda: repeat("dispatch", lambda: dispatch_once(outbox, link), outbox.filled, poll),
                        lambda: repeat("republish", lambda: _again(pool, link, wake), Wakeup(), UNCLAIMED_SECONDS),
                        lambda: repeat("reap", lambda: _waking(wake, reap_once(pool)), Wakeup(), poll),
                        lambda: _lose(pool, settings, wake),
                    ],
                )
            )
    finally:
        await client.aclose()
        line.close()
        pool.terminate()


async def _allocate(line: Line, outbox: Outbox, wake: Wakeup) -> bool:
    """One pass, handed on; whether there may be more to place. What comes to wait meanwhile wakes the next one."""
    # Not at once: who was there first may hold a job for a moment more.
    outrun = partial(asyncio.get_running_loop().call_later, OUTRUN_SECONDS, wake.set)
    return len(await allocate_once(line, outbox.put, outrun)) == BATCH


async def _again(pool: Pool, link: Link, wake: Wakeup) -> int:
    """Tell again what nobody claimed; and look for what a node was told of by an API, and has not taken."""
    wake.set()
    return await republish_once(pool, link)


async def _lose(pool: Pool, settings: Settings, wake: Wakeup) -> None:
    """Whoever begins to lead begins to watch; it looks several times in a lease."""
    watch, lease = Watch(pool, settings.lease_seconds), settings.lease_seconds
    await repeat("lose", lambda: _waking(wake, watch.lose_once()), Wakeup(), min(settings.poll_seconds, lease / 4))


async def _waking(wake: Wakeup, look: Awaitable[int]) -> int:
    """Wake the allocator when a look has found something: CPUs came back, or a job waits again."""
    found = await look
    if found:
        wake.set()
    return found

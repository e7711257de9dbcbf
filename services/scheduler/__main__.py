"""``rowlock scheduler``, ``python -m services.scheduler``."""

import asyncio
import sys

import uvloop

from core import role, streams
from core.db import schema
from core.db.connection import open_pool
from core.duty import repeat
from core.settings import Settings, without_secrets
from core.wakeup import Wakeup
from services.scheduler.allocate import allocate_once
from services.scheduler.dispatch import dispatch_once
from services.scheduler.lead import lead
from services.scheduler.reap import reap_once

POOL_SIZE = 4


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Lead, or stand by to lead, until told to stop."""
    await role.until_stopped(stop, _schedule(settings))


async def _schedule(settings: Settings) -> None:
    pool = await open_pool(settings, "scheduler", POOL_SIZE)
    client = streams.connect(settings)
    try:
        await schema.ensure(pool)
        allocated, wake = Wakeup(), Wakeup()

        async def allocate() -> int:
            placed = await allocate_once(pool)
            if placed:
                allocated.set()
            return placed

        poll = settings.poll_seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(streams.name_when_away(client, without_secrets(settings.redis_dsn)))
            group.create_task(
                lead(
                    settings,
                    wake,
                    [
                        lambda: repeat("allocate", allocate, wake, poll),
                        lambda: repeat("dispatch", lambda: dispatch_once(pool, client), allocated, poll),
                        lambda: repeat("reap", lambda: reap_once(pool), Wakeup(), poll),
                    ],
                )
            )
    finally:
        await client.aclose()
        pool.terminate()


def main(argv: list[str] | None = None) -> int:
    """Run the scheduler; answer the exit code."""
    return role.run("scheduler", serve, uvloop.new_event_loop, argv)


if __name__ == "__main__":
    sys.exit(main())

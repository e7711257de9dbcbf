"""Dispatch: the nodes are told what they were given, at once after the commit, and again when nobody claims it."""

from core import crash, streams
from core.db import allocations
from core.db.connection import Pool
from core.records import Dispatch
from core.wakeup import Wakeup

BATCH = 1000
UNCLAIMED_SECONDS = 10


class Outbox:
    """What was allocated a moment ago. A hint in memory: what is lost with it, its node finds in the tables."""

    def __init__(self) -> None:
        self.filled = Wakeup()
        self._waiting: list[Dispatch] = []

    def put(self, dispatches: list[Dispatch]) -> None:
        """Add what a commit has just allocated."""
        if dispatches:
            self._waiting += dispatches
            self.filled.set()

    def take(self) -> list[Dispatch]:
        """The oldest BATCH of it; they are out of here for good."""
        taken, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
        return taken


async def dispatch_once(outbox: Outbox, link: streams.Link) -> int:
    """Publish one batch; answer how many. What Redis does not take is left to `republish_once`, and to the nodes."""
    taken = outbox.take()
    if taken:
        await streams.publish(link, "run", taken)
        crash.here("scheduler.published")
    return len(taken)


async def republish_once(pool: Pool, link: streams.Link) -> int:
    """Publish what was allocated a while ago and has not started, after a crash or an emptied Redis alike.

    Twice does no harm: the start's guard lets one through.
    """
    async with pool.acquire() as connection:
        unclaimed = await allocations.unclaimed(connection, UNCLAIMED_SECONDS, BATCH)
    if unclaimed:
        await streams.publish(link, "run", unclaimed)
    return 0  # at the next look: they are still there

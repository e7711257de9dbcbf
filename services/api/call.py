"""Calling: a job that came alone is told to the node that has room for it, which takes it at once.

So that no pass of the scheduler's, with its commit, lies on the way of a job that need not wait. What the node does not
take it tells the scheduler of. A hint as all of them: one that is lost costs a poll of the scheduler's.
"""

import structlog

from core import streams
from core.db.connection import describe
from core.records import Dispatch
from core.streams import Link
from core.wakeup import Wakeup


class Calls:
    """What nodes are to be told. All that comes while some of it is on its way goes together."""

    def __init__(self, link: Link, scheduler: Wakeup) -> None:
        """`scheduler` wakes the scheduler: for what cannot be told."""
        self.filled = Wakeup()
        self._link, self._scheduler = link, scheduler
        self._waiting: list[Dispatch] = []
        self._failed = False

    def add(self, job_id: int, node: str) -> None:
        """Tell a node of a job that is stored, and waits; and the scheduler, while nodes cannot be told."""
        self._waiting.append(Dispatch(job_id, 1, node))
        self.filled.set()
        if self._failed:
            self._scheduler.set()

    async def call_once(self) -> int:
        """Tell them, or the scheduler where that cannot be done."""
        called, self._waiting = self._waiting, []
        if not called:
            return 0
        log = structlog.get_logger()
        try:
            refused = await streams.publish(self._link, "take", called)
        except streams.REDIS_ERRORS as error:
            if not self._failed:
                log.warning("nodes_not_called", error=describe(error))
            self._failed, refused = True, len(called)
        else:
            if self._failed:
                log.info("nodes_called_again")
            self._failed = False
        if refused:
            self._scheduler.set()
        return len(self._waiting)

"""What workers have allocated by themselves, told to the scheduler: its log tells of every allocation.

For the log alone: who hears of nothing has lost a line, and the tables know. Told a moment later, off every job's way.
"""

import json
from collections.abc import Iterable

from core.cancellation import pause
from core.db.allocations import Placed
from core.db.connection import Pool
from core.records import JobSpec
from core.wakeup import Wakeup

CHANNEL = "rowlock_taken"
BATCH = 100
"""A notification holds less than 8,000 bytes (the manual, NOTIFY)."""
GATHER_SECONDS = 0.1

_TELL = "SELECT pg_notify($1, $2)"


class Taken:
    """What one worker has to tell. All that comes within GATHER_SECONDS goes together."""

    def __init__(self) -> None:
        self.filled = Wakeup()
        self._waiting: list[tuple[int, int, int]] = []

    def add(self, specs: Iterable[JobSpec]) -> None:
        """Tell of these, after their commit."""
        self._waiting += [(spec.job_id, spec.attempt, spec.cpus) for spec in specs]
        if self._waiting:
            self.filled.set()

    async def tell_once(self, pool: Pool, node: str) -> int:
        """Tell that this node has taken a batch; answer how many there were. What cannot be told now is kept."""
        if not self._waiting:
            return 0
        await pause(GATHER_SECONDS)
        told = self._waiting[:BATCH]
        async with pool.acquire() as connection:
            await connection.execute(_TELL, CHANNEL, json.dumps([node, told]))
        del self._waiting[: len(told)]
        return len(told)


def heard(payload: str) -> list[Placed]:
    """What was told, nothing of what cannot be meant: the channel is open to all who may connect."""
    try:
        node, told = json.loads(payload)
        return [Placed(int(job_id), int(attempt), str(node), int(cpus)) for job_id, attempt, cpus in told]
    except (ValueError, TypeError, OverflowError, RecursionError):
        return []

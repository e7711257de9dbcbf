"""Lose: what ran on a node that has been silent for too long goes back to the queue, or ends with its time limit."""

from datetime import timedelta

import structlog

from core.db import allocations, nodes
from core.db.connection import Pool
from core.loss import Calm, Loss, calm, losses
from core.records import Attempt, Ending
from core.states import Reason, State

BATCH = 500


class Watch:
    """One leader's watch over the leases. It knows since when it has been looking at them without a break."""

    def __init__(self, pool: Pool, lease_seconds: float) -> None:
        self._pool = pool
        self._lease = timedelta(seconds=lease_seconds)
        self._calm: Calm | None = None

    async def lose_once(self) -> int:
        """One look; answer how many attempts ended. One transaction per node (see schema.sql, lock order)."""
        async with self._pool.acquire() as connection:
            found = await nodes.leases(connection)
        if found is None:
            return 0
        self._calm = calm(self._calm, found.now, self._lease)
        since = max(self._calm.since, found.server_start)
        lost = losses(found.leases, now=found.now, since=since, patience=self._lease)
        return sum([await _lose(self._pool, loss) for loss in lost])


async def _lose(pool: Pool, loss: Loss) -> int:
    lease = loss.lease
    async with pool.acquire() as connection, connection.transaction():
        overdue = await allocations.lock_overdue(connection, loss, BATCH)
        # After the jobs, as everywhere: a heartbeat that was on its way shows that the node lives.
        if not overdue or not await nodes.hold_silence(connection, lease):
            return 0
        endings = [_ending(attempt, loss, requeue=requeue) for attempt, requeue in overdue.items()]
        lost = await allocations.release(connection, endings, node=lease.node, before=State.RUNNING)
    log = structlog.get_logger()
    for attempt in sorted(lost, key=lambda attempt: attempt.job_id):
        log.warning(
            "job_lost",
            job_id=attempt.job_id,
            attempt=attempt.attempt,
            node=lease.node,
            silent_since=lease.heartbeat_time.isoformat(),
            requeue=overdue[attempt],
        )
    return len(lost)


def _ending(attempt: Attempt, loss: Loss, *, requeue: bool) -> Ending:
    silent = f"node {loss.lease.node} has been silent since {loss.lease.heartbeat_time:%Y-%m-%dT%H:%M:%SZ}"
    if requeue:
        return Ending(attempt.job_id, attempt.attempt, State.PENDING, Reason.NONE, f"requeued: {silent}")
    why = f"{silent}, for longer than the job's time limit and the grace period"
    return Ending(attempt.job_id, attempt.attempt, State.NODE_FAIL, Reason.NODE_DOWN, why)

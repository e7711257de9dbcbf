"""Which silent nodes are lost, so that their jobs may start elsewhere: a function of values.

A node is silent once its lease is over. Silence is no proof: a frozen worker, a cut cable and a dead machine look
alike. So nothing is concluded from it but what holds in each case:

- What may be requeued was ended by its own node, which counts as we do, but from earlier on: it began before the
  heartbeat was written that we count from. MARGIN is what it may be late by: its look at the clock (1 s), its
  keeper's turn (2 s later, and another look), killing and sweeping.
- What has a time limit has reached it. (A worker that was stopped on purpose is not silent: it said so, and how its
  jobs end meanwhile its keeper notes for the next one.)

Nobody believes a clock that jumped, or a silence that has its cause on this side: see `calm` and `_many_at_once`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

MARGIN: Final = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class Lease:
    """A node's lease, and what its worker grants; all times are the database's."""

    node: str
    incarnation: int
    heartbeat_time: datetime
    alive: bool
    draining: bool
    """Its worker stops, or has stopped, on purpose."""
    holds: bool
    """Whether any job holds CPUs of the node."""
    grace: timedelta
    requeue_after: timedelta


@dataclass(frozen=True, slots=True)
class Loss:
    """A node whose silence is believed."""

    lease: Lease
    requeue: bool
    """Whether it has ended what may be requeued."""
    limits: datetime | None
    """It has ended what reached its time limit by then; None when that would be known from its next worker."""


@dataclass(frozen=True, slots=True)
class Calm:
    """Since when the leases have been looked at without a break, and when last."""

    since: datetime
    last: datetime


def calm(before: Calm | None, now: datetime, gap: timedelta) -> Calm:
    """The calm after a look at `now`. It begins anew when `gap` has passed since the last one, or time went back.

    Whoever could not look may not be the only one who could not speak; and where the clock jumped every lease seems
    to be over.
    """
    if before is None or not before.last <= now <= before.last + gap:
        return Calm(now, now)
    return Calm(before.since, now)


def losses(leases: Sequence[Lease], *, now: datetime, since: datetime, patience: timedelta) -> list[Loss]:
    """The nodes that hold jobs and are lost. `patience` is a lease, and `since` when the last doubt arose.

    A doubt, or many that fell silent at once, costs one more lease.
    """
    if now < since + patience:
        return []
    found = []
    for lease in (lease for lease in leases if lease.holds and not lease.alive):
        sure = now - patience if _many_at_once(lease, leases, patience) else now
        if sure >= lease.heartbeat_time + 2 * patience:
            ended = sure - lease.grace - MARGIN
            requeue = ended >= lease.heartbeat_time + lease.requeue_after
            found.append(Loss(lease, requeue=requeue, limits=None if lease.draining else ended))
    return found


def _many_at_once(lease: Lease, leases: Sequence[Lease], patience: timedelta) -> bool:
    """Whether more than half of the nodes that lived then fell silent within a lease of this one; two at least."""
    lately = [other for other in leases if other.heartbeat_time >= lease.heartbeat_time - patience]
    fallen = [o for o in lately if not o.alive and o.heartbeat_time <= lease.heartbeat_time + patience]
    return len(fallen) >= 2 and 2 * len(fallen) > len(lately)

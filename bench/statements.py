"""The hot statements: how each is called, and how many pages of the tables one touches.

The list is also that of the tests that look at plans (tests/test_statements.py).
"""

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from core.db import allocations, jobs, outputs, pending
from core.db.connection import PLANNED_ONCE
from core.loss import Lease, Loss
from core.records import Attempt, Ending, NewJob, Output, Placement
from core.states import Reason, State

AT_ONCE = 8
"""Jobs of a statement that takes several."""
ENOUGH = 4 * AT_ONCE


class Recorder:
    """Stands where a connection does, and keeps what would be run."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, tuple[object, ...]]] = []

    async def fetch(self, text: str, *arguments: object) -> list[object]:
        """Run nothing."""
        self.ran.append((text, arguments))
        return []

    async def fetchval(self, text: str, *arguments: object) -> None:
        """Run nothing."""
        self.ran.append((text, arguments))

    fetchrow = execute = fetchval


@dataclass(frozen=True, slots=True)
class Tables:
    """What the statements are asked about."""

    waiting: Sequence[int]
    held: Sequence[int]
    """Jobs that hold CPUs of the node, in their first attempt."""
    node: str
    incarnation: int
    job: NewJob
    """What is submitted."""

    def attempts(self, count: int) -> list[Attempt]:
        """The first attempts of some that are held."""
        return [Attempt(job_id, 1) for job_id in self.held[:count]]

    def endings(self, count: int) -> list[Ending]:
        """Their ends."""
        return [Ending(job_id, 1, State.COMPLETED, Reason.NONE, exit_code=0) for job_id in self.held[:count]]

    def loss(self) -> Loss:
        """The loss of the node."""
        now, none = datetime.now(UTC), timedelta()
        lease = Lease(self.node, 1, now, alive=False, draining=False, holds=True, grace=none, requeue_after=none)
        return Loss(lease, requeue=True, limits=now)


Use = Callable[[Any, int, Tables], Awaitable[object]]
OVER_OR_NOT = jobs.Filter(states=(State.PENDING, State.RUNNING, State.COMPLETED, State.DEADLINE))

HOT: Mapping[str, Use] = {
    "insert": lambda c, n, t: jobs.insert(c, [t.job] * n),
    "insert with keys": lambda c, n, t: jobs.insert(c, [replace(t.job, key="1", digest=b"")] * n),
    "stored_by": lambda c, n, t: jobs.stored_by(c, 0, n),
    "by_keys": lambda c, n, t: jobs.by_keys(c, [replace(t.job, key="1")] * n),
    "get": lambda c, n, t: jobs.get(c, t.waiting[n]),
    "get_all": lambda c, n, t: jobs.get_all(c, t.waiting[:n]),
    "states": lambda c, n, t: jobs.states(c, t.waiting[:n]),
    "of_list": lambda c, n, t: jobs.of_list(c, t.waiting[n], n),
    "cancel_waiting": lambda c, n, t: jobs.cancel_waiting(c, t.waiting[n]),
    "request_cancel": lambda c, n, t: jobs.request_cancel(c, Attempt(t.waiting[n], 1)),
    "look": lambda c, n, t: pending.look(c, n),
    "place": lambda c, n, t: allocations.place(c, [Placement(job_id, t.node, 1) for job_id in t.waiting[:n]]),
    "unclaimed": lambda c, n, t: allocations.unclaimed(c, 10, n),
    "start": lambda c, n, t: jobs.start(c, t.attempts(n), node=t.node, incarnation=t.incarnation),
    "running": lambda c, n, t: jobs.running(c, t.attempts(n), node=t.node, incarnation=t.incarnation),
    "store": lambda c, n, t: outputs.store(
        c, [Output(job_id, 1, 1, 0, None) for job_id in t.held[:n]], node=t.node, incarnation=t.incarnation
    ),
    "starts": lambda c, n, t: outputs.starts(c, t.waiting[n]),
    "release": lambda c, n, t: allocations.release(
        c, t.endings(n), node=t.node, before=State.RUNNING, incarnation=t.incarnation
    ),
    "turn_over": lambda c, n, t: allocations.turn_over(
        c, t.endings(n), node=t.node, incarnation=t.incarnation, take=True
    ),
    "of_node": lambda c, n, t: allocations.of_node(c, t.node),
    "stranded": lambda c, n, t: allocations.stranded(c, n),
    "end_on_down": lambda c, n, t: allocations.end_on_down(c, n),
    "lock_overdue": lambda c, n, t: allocations.lock_overdue(c, t.loss(), n),
    "newest": lambda c, n, t: jobs.page(c, jobs.Filter(), newest_first=True, after=None, limit=n),
    "oldest": lambda c, n, t: jobs.page(c, jobs.Filter(), newest_first=False, after=t.waiting[n], limit=n),
    "newest of states": lambda c, n, t: jobs.page(c, OVER_OR_NOT, newest_first=True, after=t.waiting[-1], limit=n),
    "oldest of states": lambda c, n, t: jobs.page(c, OVER_OR_NOT, newest_first=False, after=t.waiting[0], limit=n),
}

# In this order each finds what the one before it has done.
_A_LIFE = ("insert", "look", "place", "stranded", "unclaimed", "start", "running", "of_node", "turn_over")
_BESIDE = ("get", "get_all", "states", "newest", "oldest", "newest of states", "oldest of states", "cancel_waiting")


async def buffers(connection: asyncpg.Connection, tables: Tables) -> dict[str, int]:
    """Pages of 8 KiB that each statement touches for AT_ONCE jobs, in a transaction that is undone.

    `waiting` must be the oldest that wait, ENOUGH of them, and `held` the first AT_ONCE of these; the node may be
    drained. Planned for the very values, with the pins of the roles' own connections.
    """
    transaction = connection.transaction()
    await transaction.start()
    try:
        for name, value in PLANNED_ONCE.items():
            await connection.execute(f"SET LOCAL {name} = {value}")
        await connection.execute("UPDATE nodes SET admin_state = 'RESUME' WHERE name = $1", tables.node)
        found = {name: await _buffers_of(connection, HOT[name], tables) for name in _A_LIFE}
        left = replace(tables, waiting=tables.waiting[2 * AT_ONCE :])  # what was placed, and then taken, waits no more
        return found | {name: await _buffers_of(connection, HOT[name], left) for name in _BESIDE}
    finally:
        await transaction.rollback()


async def _buffers_of(connection: asyncpg.Connection, use: Use, tables: Tables) -> int:
    recorder = Recorder()
    await use(recorder, AT_ONCE, tables)
    [(text, arguments)] = recorder.ran
    [[document]] = await connection.fetch(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {text}", *arguments)
    return touched(json.loads(document)[0]["Plan"])


def touched(plan: Mapping[str, Any]) -> int:
    """Pages that a plan has touched: its root tells of all but what is done after the last row was read.

    That is what writes and is read by nobody: a part of the WITH that no other scans.
    """
    nodes = list(_nodes(plan))
    read = {node["CTE Name"] for node in nodes if "CTE Name" in node}
    own = [node for node in nodes if _name(node) is not None and _name(node) not in read]
    return sum(node["Shared Hit Blocks"] + node["Shared Read Blocks"] for node in (plan, *own))


def _name(node: Mapping[str, Any]) -> str | None:
    """As which part of the WITH a node stands, if it does."""
    kind, _, name = str(node.get("Subplan Name", "")).partition(" ")
    return name if kind == "CTE" else None


def _nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from _nodes(below)

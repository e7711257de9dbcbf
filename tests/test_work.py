"""What a job costs in counted work, whatever the machine: statements, commits, system calls, memory of a pass.

More is not wrong by itself, but it is never an accident: whoever adds to a bound here says why.
"""

import asyncio
import select
import socket
import sys
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
import redis.asyncio as redis

from bench.stack import written
from core.db import connection as connections
from core.db import jobs
from core.db.connection import PLANNED_ONCE, Line
from core.records import Attempt
from core.settings import Settings
from core.streams import Link
from services.scheduler.allocate import allocate_once
from services.scheduler.dispatch import Outbox, dispatch_once
from services.worker import claim
from services.worker.node import Node, Run
from services.worker.report import write_endings
from tests.builders import a_job, a_node, an_ending, register, submit

pytestmark = pytest.mark.anyio

BATCHES = [1, 100]

ROUND_TRIP = 4
"""System calls of one: the loop turns, sends, waits, and receives."""
PIECES = 4
"""What is large comes in some more."""


@dataclass(slots=True)
class Work:
    """What something has cost."""

    statements: int = 0
    commits: int = 0
    calls: int = 0


class Watched:
    """Counts the statements of every connection that is opened from now on."""

    def __init__(self, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
        self._look = connection
        self.statements: list[str] = []
        opened = connections._opened

        async def open_watched(*arguments: Any, **options: Any) -> asyncpg.Connection:
            found = await opened(*arguments, **options)
            found.add_query_logger(lambda record: self.statements.append(record.query))
            return found

        monkeypatch.setattr(connections, "_opened", open_watched)

    @asynccontextmanager
    async def work(self) -> AsyncIterator[Work]:
        """What the block costs."""
        await asyncio.sleep(0)  # loggers are called by the loop
        work, said, before = Work(), len(self.statements), await written(self._look)
        with counted_calls() as calls:
            yield work
        await asyncio.sleep(0)
        work.calls = calls.total()
        work.statements = len(self.statements) - said
        work.commits = (await written(self._look)).transactions - before.transactions


_CALLED = (socket.socket, select.epoll)
_CALLS = {"send", "sendmsg", "recv", "recv_into", "poll", "register", "modify", "unregister"}


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """The system calls of this thread's event loop in the block: of sockets, and of waiting for them."""
    found: Counter[str] = Counter()

    def note(_: object, event: str, function: Any) -> None:
        if event == "c_call" and isinstance(getattr(function, "__self__", None), _CALLED):
            found[function.__name__] += function.__name__ in _CALLS

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


@pytest.fixture
def watched(connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(connection, monkeypatch)


@pytest.fixture
async def line(watched: Watched, settings: Settings) -> AsyncIterator[Line]:
    """A connection as a duty keeps it, and a node that is large; the statements of a pass are prepared."""
    found = Line(settings, "test", **PLANNED_ONCE)
    async with found.acquire() as own:
        await register(own, a_node("large", 1000))
        await submit(own)
    assert len(await allocate_once(found)) == 1
    yield found
    found.close()


@pytest.mark.parametrize("batch", BATCHES)
async def test_a_submission(watched: Watched, line: Line, batch: int) -> None:
    async with line.acquire() as own:
        await jobs.insert(own, [a_job()] * batch)
        async with watched.work() as work:
            await jobs.insert(own, [a_job()] * batch)
    assert (work.statements, work.commits) == (1, 1)


@pytest.mark.parametrize("batch", BATCHES)
async def test_a_pass(watched: Watched, line: Line, redis_client: redis.Redis, batch: int) -> None:
    async with line.acquire() as own:
        await submit(own, *[a_job()] * batch)
    outbox = Outbox()
    async with watched.work() as work:
        outbox.put(await allocate_once(line))
    assert (work.statements, work.commits) == (2, 1)
    assert work.calls <= ROUND_TRIP * 2 + PIECES
    link = Link(redis_client)
    await link.ask(("PING",))
    async with watched.work() as work:
        assert await dispatch_once(outbox, link) == batch
    assert work.calls <= ROUND_TRIP + PIECES


async def test_a_pass_with_nothing_to_do(watched: Watched, line: Line) -> None:
    async with watched.work() as work:
        assert await allocate_once(line) == []
    assert (work.statements, work.commits) == (1, 0)
    assert work.calls <= ROUND_TRIP


@pytest.mark.parametrize(("batch", "taken", "an_end"), [(1, 1, (1, 1)), (100, 64, (2, 2))])
async def test_a_start_and_an_end(
    watched: Watched, line: Line, node: Node, batch: int, taken: int, an_end: tuple[int, int]
) -> None:
    """The statement that ends jobs starts what waits, 64 at most; what is free then the scheduler hears of."""
    begun: list[Run] = []

    def begin(run: Run) -> None:
        node.runs[run.attempt] = run
        begun.append(run)

    node.line = line
    async with line.acquire() as own:
        await own.execute("UPDATE nodes SET admin_state = 'DRAIN' WHERE name = 'large'")
        node.incarnation = await register(own, a_node("n1", batch, spool_id=node.spool.open()))
        await submit(own, *[a_job()] * batch)
    attempts = [Attempt(placed.job_id, placed.attempt) for placed in await allocate_once(line)]
    async with watched.work() as work:
        await claim.start(node, attempts, begin)
    assert (len(begun), work.statements, work.commits) == (batch, 1, 1)
    async with line.acquire() as own:
        await submit(own, *[a_job()] * batch)
    async with watched.work() as work:
        await write_endings(node, [an_ending(attempt) for attempt in attempts], begin)
    assert (len(begun), work.statements, work.commits) == (batch + taken, *an_end)


async def test_a_look_of_an_idle_node(watched: Watched, line: Line, node: Node) -> None:
    """It looks once a second, and there may be a thousand of them."""
    node.line = line
    await claim.look_once(node, lambda _: None)  # its statement is prepared
    async with watched.work() as work:
        await claim.look_once(node, lambda _: None)
    assert (work.statements, work.commits) == (1, 0)
    assert work.calls <= ROUND_TRIP


@pytest.mark.parametrize("batch", BATCHES)
async def test_memory_of_a_pass(line: Line, batch: int) -> None:
    """At its peak, above what it begins with; asyncio alone takes 256 KiB for what it receives."""
    async with line.acquire() as own:
        await submit(own, *[a_job()] * batch)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        placed = await allocate_once(line)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(placed) == batch
    assert peak - before <= (256 + 16 + 3 * batch) * 1024

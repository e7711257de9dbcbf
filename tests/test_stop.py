"""Whoever is told to stop ends, whatever becomes of a cancellation in what it waits for."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from core import duty, streams
from core.batch import Batcher
from core.db import allocations, nodes, outputs, schema
from core.db.connection import Pool, open_pool
from core.duty import repeat
from core.settings import Settings
from core.wakeup import Wakeup
from services.api.database import Database
from services.scheduler import lead
from services.worker import health, recover, report, serve, supervise
from services.worker import node as worker_node
from tests.builders import a_node
from tests.proxy import Fault, proxied

pytestmark = pytest.mark.anyio

LONG = 3  # seconds within which something surely happens

Going = Coroutine[Any, Any, Any]


class Deaf:
    """What answers a cancellation with `answer`, as libraries do; ever after the server is away."""

    def __init__(self, answer: int | Exception) -> None:
        self.answer = answer
        self.asked = asyncio.Event()

    async def __call__(self, *_: Any, **__: Any) -> int:
        if self.asked.is_set():
            raise ConnectionRefusedError("away")
        self.asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if isinstance(self.answer, Exception):
                raise self.answer from None
        assert isinstance(self.answer, int)
        return self.answer


class Slow:
    """What goes on for ever, and takes its time to end once it is cancelled."""

    def __init__(self) -> None:
        self.ending, self.ended = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ending.set()
            await self.ended.wait()


@pytest.fixture
def lost() -> Deaf:
    return Deaf(ConnectionError("in place of it"))


async def ends(task: "asyncio.Task[Any]") -> None:
    """Cancel it once, and wait for its end."""
    task.cancel()
    try:
        await asyncio.wait((task,), timeout=LONG)
        assert task.cancelled()
    finally:
        while not task.done():  # or it would outlive the test that has found it
            task.cancel()
            await asyncio.sleep(0)


async def told_while_it_waits(going: Going, deaf: Deaf) -> None:
    task = asyncio.ensure_future(going)
    await asyncio.wait_for(deaf.asked.wait(), LONG)
    await ends(task)


# Every loop that goes on for ever


@pytest.mark.parametrize("answer", [0, 1, ConnectionError()], ids=["nothing", "more", "an error"])
async def test_a_duty(answer: int | Exception) -> None:
    deaf = Deaf(answer)
    await told_while_it_waits(repeat("look", deaf, Wakeup(), 3600), deaf)


async def test_a_batcher(lost: Deaf) -> None:
    batcher: Batcher[int, int] = Batcher(lost, 1)  # type: ignore[arg-type]
    waiting = asyncio.ensure_future(batcher.do(1))
    await told_while_it_waits(batcher.run(), lost)
    with suppress(ConnectionError):
        await waiting


async def test_who_waits_for_postgres(lost: Deaf, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncpg, "connect", lost)
    await told_while_it_waits(open_pool(settings, "api", 1), lost)


async def test_who_waits_for_the_schema(lost: Deaf, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "version", lost)
    await told_while_it_waits(schema.ensure(pool), lost)


async def test_who_waits_for_redis(lost: Deaf, redis_client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_client, "ping", lost)
    await told_while_it_waits(streams.name_when_away(redis_client, "here"), lost)


async def test_who_waits_to_lead(lost: Deaf, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lead, "connect", lost)
    await told_while_it_waits(lead.lead(settings, Wakeup(), []), lost)


async def test_who_registers(lost: Deaf, settings: Settings, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "register", lost)
    await told_while_it_waits(worker_node.register(pool, a_node(), settings), lost)


async def test_who_recovers(lost: Deaf, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocations, "of_node", lost)
    node: Any = SimpleNamespace(pool=pool, name="n1")
    await told_while_it_waits(recover.recover(node, lambda _: None), lost)


async def test_who_reports(lost: Deaf, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocations, "turn_over", lost)
    node: Any = SimpleNamespace(
        line=pool,
        name="n1",
        incarnation=1,
        recovered=True,
        trouble=None,
        draining=False,
        is_silent=False,
        claiming=asyncio.Lock(),
        look=Wakeup(),
    )
    await told_while_it_waits(report.write_endings(node, [], lambda _: None), lost)


async def test_who_stores_where_a_restart_begins(lost: Deaf, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "store", lost)
    node: Any = SimpleNamespace(pool=pool, name="n1", incarnation=1)
    await told_while_it_waits(report.write_outputs(node, []), lost)


async def test_who_says_first_that_the_node_is_in_trouble(lost: Deaf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its report would be left to a batcher that has ended already."""

    async def not_started(*_: Any) -> Any:
        return SimpleNamespace(ran=False)

    monkeypatch.setattr(supervise, "attempt", not_started)
    monkeypatch.setattr(health, "look_once", lost)
    run: Any = SimpleNamespace(spec=SimpleNamespace(job_id=1, attempt=1), fenced=False)
    node: Any = SimpleNamespace(name="n1")
    await told_while_it_waits(supervise.supervise(node, run, Batcher(Deaf(0), 1), Batcher(Deaf(0), 1)), lost)  # type: ignore[arg-type]


async def test_an_api_that_looks_after_its_database(
    lost: Deaf, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(settings)
    monkeypatch.setattr("services.api.database.LOOK_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(database, "_look", lost)
    await told_while_it_waits(database.keep_open(), lost)
    await database.close()


async def test_who_waits_for_the_end_of_what_it_has_given_up() -> None:
    """A worker that was replaced while it was stopped hears of that."""
    stop, slow = asyncio.Event(), Slow()

    task = asyncio.ensure_future(serve._unless(stop, slow()))
    await asyncio.sleep(0)
    stop.set()
    await asyncio.wait_for(slow.ending.wait(), LONG)
    task.cancel()
    await asyncio.sleep(0)
    slow.ended.set()
    await ends(task)


# What is known to lose it


async def test_a_task_group_one_of_whose_members_has_failed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leader that has lost PostgreSQL is told to stop before its duties have ended: they are many, and it waits."""
    monkeypatch.setattr(lead, "RETRY_SECONDS", 0.01)
    slow = Slow()

    async def fails() -> None:
        raise ConnectionError("lost")

    task = asyncio.ensure_future(lead.lead(settings, Wakeup(), [slow, fails]))
    await asyncio.wait_for(slow.ending.wait(), LONG)
    task.cancel()
    await asyncio.sleep(0)
    slow.ended.set()
    await ends(task)


async def test_a_transaction_whose_connection_is_lost_on_the_way_out(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duty, "BACK_OFF_SECONDS", (0.01,))
    async with proxied(settings.postgres_dsn) as wire:
        pool = await asyncpg.create_pool(wire.url, min_size=1, max_size=1)
        inside = asyncio.Event()

        async def once() -> int:
            async with pool.acquire() as connection, connection.transaction():
                inside.set()
                await connection.execute("SELECT pg_sleep(3600)")
            return 0

        task = asyncio.ensure_future(repeat("sleep", once, Wakeup(), 3600))
        await asyncio.wait_for(inside.wait(), LONG)
        wire.at(b"ROLLBACK", Fault.CUT_BEFORE, away=True)
        await asyncio.sleep(0)
        await ends(task)
        assert wire.tripped.is_set()
        pool.terminate()


async def test_a_command_to_redis_at_any_instant(redis_client: Redis) -> None:
    """At each of many iterations of the loop, while one is sent after the other."""

    async def once() -> int:
        await redis_client.ping()
        return 1

    await redis_client.ping()
    for instant in range(150):
        task = asyncio.ensure_future(repeat("ping", once, Wakeup(), 3600))
        for _ in range(instant):
            await asyncio.sleep(0)
        await ends(task)

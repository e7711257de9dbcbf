"""The scheduler's duties one pass at a time, the streams they speak through, and who leads."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest
import redis.asyncio as redis
from pydantic import SecretStr
from redis.exceptions import RedisError, ResponseError
from structlog.testing import capture_logs

from core import duty, streams, taken
from core.db import jobs
from core.db.connection import Pool, notify
from core.moves import Ear
from core.records import Attempt, Dispatch
from core.settings import Settings
from core.states import State
from core.streams import Command, Link, Message, Reader
from core.taken import Taken
from core.wakeup import Wakeup
from services.scheduler import allocate, dispatch, lead, reap
from services.scheduler import serve as scheduler
from services.scheduler.allocate import allocate_once
from services.scheduler.dispatch import UNCLAIMED_SECONDS, Outbox, dispatch_once, republish_once
from services.scheduler.reap import reap_once
from tests.builders import LONG, a_job, a_node, a_spec, finish, give, register, start, state_of, submit, until
from tests.proxy import Fault, proxied

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BLOCK_MS", 50)
    for name in ("PROBE_SECONDS", "STAND_BY_SECONDS", "RETRY_SECONDS"):
        monkeypatch.setattr(lead, name, 0.05)


async def place_of(connection: asyncpg.Connection, job_id: int) -> tuple[State, str | None, int]:
    job = await jobs.get(connection, job_id)
    assert job is not None
    return job.state, job.node, job.attempt


# Allocate


async def test_allocates_in_the_order_of_submission(connection: asyncpg.Connection, pool: Pool) -> None:
    for name, cpus in (("n2", 4), ("n1", 2)):
        await register(connection, a_node(name, cpus))
    ids = await submit(connection, *(a_job(cpus) for cpus in (3, 2, 2, 1)))
    with capture_logs() as logs:
        assert len(await allocate_once(pool)) == 3
    places = [(await place_of(connection, job_id))[:2] for job_id in ids]
    given = State.CONFIGURING
    assert places == [(given, "n2"), (given, "n1"), (State.PENDING, None), (given, "n2")]
    assert [(log["event"], log["job_id"], log["attempt"], log["node"], log["cpus"]) for log in logs] == [
        ("job_allocated", ids[0], 1, "n2", 3),
        ("job_allocated", ids[1], 1, "n1", 2),
        ("job_allocated", ids[3], 1, "n2", 1),
    ]
    assert len(await allocate_once(pool)) == 0


async def test_a_partition_is_served_by_its_nodes(connection: asyncpg.Connection, pool: Pool) -> None:
    ids = await submit(connection, *(a_job(partition=name) for name in ("default", "big", "debug")))
    await register(connection, a_node("n1", partitions=("debug", "big")))
    assert len(await allocate_once(pool)) == 2
    assert [await state_of(connection, job_id) for job_id in ids] == ["PENDING", "CONFIGURING", "CONFIGURING"]


OUT = {
    "lease over": "UPDATE node_leases SET lease_until = now() - interval '1 second'",
    "draining": "UPDATE node_leases SET draining = true",
    "drained": "UPDATE nodes SET admin_state = 'DRAIN'",
    "down": "UPDATE nodes SET admin_state = 'DOWN'",
    "gone": "DELETE FROM node_leases",
}


@pytest.mark.parametrize("why", OUT)
async def test_a_node_that_is_out_is_given_nothing(connection: asyncpg.Connection, pool: Pool, why: str) -> None:
    await register(connection)
    await connection.execute(OUT[why])
    await submit(connection)
    assert len(await allocate_once(pool)) == 0


async def test_a_pass_has_a_limit(connection: asyncpg.Connection, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocate, "BATCH", 2)
    await register(connection, a_node(cpus=8))
    await submit(connection, *(a_job(cpus) for cpus in (1, 1, 1, 2, 2)))
    assert [len(await allocate_once(pool)) for _ in range(4)] == [2, 2, 1, 0]


async def test_a_decision_that_others_outran_calls_for_another_pass(connection: asyncpg.Connection, pool: Pool) -> None:
    """They may have left room elsewhere, or for others, and nobody says so."""
    await register(connection)
    ids = await submit(connection, a_job(1), a_job(1))
    called: list[bool] = []
    async with connection.transaction():
        await connection.execute("SELECT FROM jobs WHERE job_id = $1 FOR UPDATE", ids[0])
        assert len(await allocate_once(pool, outrun=lambda: called.append(True))) == 1
    assert called == [True]
    assert len(await allocate_once(pool, outrun=lambda: called.append(True))) == 1
    assert called == [True]


async def test_an_idle_pass_waits_for_nobody(connection: asyncpg.Connection, pool: Pool) -> None:
    await register(connection)
    async with connection.transaction():
        await connection.execute("SELECT FROM nodes FOR UPDATE")
        assert len(await allocate_once(pool)) == 0


# Dispatch


async def messages(client: redis.Redis, node: str) -> list[Attempt]:
    """What the node's stream holds."""
    entries = await client.xrange(streams.stream_of(node))
    assert all(fields[b"kind"] == b"run" for _, fields in entries)
    return [Attempt(int(fields[b"job_id"]), int(fields[b"attempt"])) for _, fields in entries]


@pytest.fixture
def outbox() -> Outbox:
    return Outbox()


async def long_ago(connection: asyncpg.Connection, *job_ids: int) -> None:
    """Let jobs have been allocated longer ago than a node takes to claim them."""
    past = "UPDATE jobs SET allocate_time = now() - make_interval(secs => $1) WHERE job_id = ANY ($2)"
    await connection.execute(past, UNCLAIMED_SECONDS + 1, job_ids)


async def test_publishes_what_is_allocated_once(
    connection: asyncpg.Connection, pool: Pool, redis_client: redis.Redis, outbox: Outbox
) -> None:
    for name in ("n1", "n2"):
        await register(connection, a_node(name, 2))
    ids = await submit(connection, *[a_job()] * 3)
    assert await dispatch_once(outbox, Link(redis_client)) == 0
    outbox.put(await allocate_once(pool))
    assert await outbox.filled.wait(LONG)
    assert await dispatch_once(outbox, Link(redis_client)) == 3
    assert await messages(redis_client, "n1") == [Attempt(ids[0], 1), Attempt(ids[1], 1)]
    assert await messages(redis_client, "n2") == [Attempt(ids[2], 1)]
    assert await dispatch_once(outbox, Link(redis_client)) == 0
    assert await redis_client.xlen(streams.stream_of("n1")) == 2


async def test_publishes_batch_after_batch(
    redis_client: redis.Redis, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "BATCH", 2)
    outbox.put([Dispatch(1, 1, "n1"), Dispatch(2, 1, "n1")])
    outbox.put([Dispatch(3, 1, "n1")])
    assert [await dispatch_once(outbox, Link(redis_client)) for _ in range(3)] == [2, 1, 0]
    assert [attempt.job_id for attempt in await messages(redis_client, "n1")] == [1, 2, 3]


async def test_what_redis_did_not_take_is_published_when_nobody_claimed_it(
    connection: asyncpg.Connection, pool: Pool, redis_client: redis.Redis, outbox: Outbox
) -> None:
    await register(connection)
    [job_id] = await submit(connection)
    outbox.put(await allocate_once(pool))
    nowhere = redis.Redis.from_url("unix:///nowhere/redis.sock")
    with pytest.raises((RedisError, OSError)):
        await dispatch_once(outbox, Link(nowhere))
    await nowhere.aclose()
    assert await dispatch_once(outbox, Link(redis_client)) == 0
    await long_ago(connection, job_id)
    await republish_once(pool, Link(redis_client))
    assert await messages(redis_client, "n1") == [Attempt(job_id, 1)]


async def test_one_stream_that_takes_nothing_does_not_hold_up_the_others(
    redis_client: redis.Redis, outbox: Outbox
) -> None:
    outbox.put([Dispatch(1, 1, "n1"), Dispatch(2, 1, "n2")])
    await redis_client.set(streams.stream_of("n1"), "forged")
    assert await dispatch_once(outbox, Link(redis_client)) == 2
    assert await messages(redis_client, "n2") == [Attempt(2, 1)]
    outbox.put([Dispatch(1, 1, "n1")])
    with pytest.raises(RedisError):
        await dispatch_once(outbox, Link(redis_client))


async def test_published_twice_and_started_once(
    connection: asyncpg.Connection, pool: Pool, redis_client: redis.Redis, outbox: Outbox
) -> None:
    await register(connection)
    [job_id] = await submit(connection)
    outbox.put(await allocate_once(pool))
    await dispatch_once(outbox, Link(redis_client))
    await long_ago(connection, job_id)
    await republish_once(pool, Link(redis_client))
    told = await messages(redis_client, "n1")
    assert len(told) == 2
    assert [len(await start(connection, attempt)) for attempt in told] == [1, 0]


async def test_published_again_after_redis_was_emptied(
    connection: asyncpg.Connection, pool: Pool, redis_client: redis.Redis, outbox: Outbox
) -> None:
    """Once nobody has claimed it for a while; what runs, or was published a moment ago, is left alone."""
    await register(connection)
    lost, running, fresh = await submit(connection, *[a_job()] * 3)
    attempts = [await give(connection, job_id) for job_id in (lost, running, fresh)]
    await start(connection, attempts[1])
    await republish_once(pool, Link(redis_client))
    assert await messages(redis_client, "n1") == []
    await long_ago(connection, lost, running)
    await republish_once(pool, Link(redis_client))
    assert await messages(redis_client, "n1") == [attempts[0]]


# Reap


async def test_what_has_not_started_on_a_dead_node_waits_again_at_its_old_place(
    connection: asyncpg.Connection, pool: Pool
) -> None:
    await register(connection, a_node("n1", 2))
    old, running = await submit(connection, a_job(), a_job())
    attempts = [await give(connection, job_id) for job_id in (old, running)]
    await start(connection, attempts[1])
    [young] = await submit(connection, a_job())
    assert await reap_once(pool) == 0

    await connection.execute(OUT["lease over"])
    with capture_logs() as logs:
        assert await reap_once(pool) == 1
    assert [(log["event"], log["job_id"], log["node"]) for log in logs] == [("job_returned", old, "n1")]
    assert await place_of(connection, old) == (State.PENDING, None, 1)
    assert await place_of(connection, running) == (State.RUNNING, "n1", 1)
    assert await connection.fetchval("SELECT alloc_cpus FROM nodes") == 1
    assert await reap_once(pool) == 0

    await register(connection, a_node("n2", 1))
    assert len(await allocate_once(pool)) == 1
    assert await place_of(connection, old) == (State.CONFIGURING, "n2", 2)
    assert await state_of(connection, young) is State.PENDING
    assert await start(connection, attempts[0]) == []  # the dead one comes back
    assert await finish(connection, attempts[1]) == {attempts[1]}


@pytest.mark.parametrize("why", ["draining", "gone"])
async def test_what_cannot_start_where_it_lies_goes_back(connection: asyncpg.Connection, pool: Pool, why: str) -> None:
    await register(connection)
    [job_id] = await submit(connection)
    await allocate_once(pool)
    await connection.execute(OUT[why])
    assert await reap_once(pool) == 1
    assert await state_of(connection, job_id) is State.PENDING


async def test_two_that_reap_at_once_return_each_job_once(connection: asyncpg.Connection, pool: Pool) -> None:
    for name in ("n1", "n2", "n3"):
        await register(connection, a_node(name, 4))
    await submit(connection, *[a_job()] * 12)
    await allocate_once(pool)
    await connection.execute(OUT["lease over"])
    assert sum(await asyncio.gather(*(reap_once(pool) for _ in range(6)))) == 12


async def test_a_look_has_a_limit(connection: asyncpg.Connection, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reap, "BATCH", 2)
    await register(connection)
    await submit(connection, *[a_job()] * 3)
    await allocate_once(pool)
    await connection.execute(OUT["lease over"])
    assert [await reap_once(pool) for _ in range(3)] == [2, 1, 0]


# The reader of a node's stream


@pytest.fixture
def reader(redis_client: redis.Redis) -> Reader:
    return Reader(redis_client, "n1")


async def tell(client: redis.Redis, *job_ids: int) -> list[Attempt]:
    """Publish the first attempts of jobs to n1."""
    await streams.publish(Link(client), "run", [Dispatch(job_id, 1, "n1") for job_id in job_ids])
    return [Attempt(job_id, 1) for job_id in job_ids]


async def read(reader: Reader, looks: int = 10) -> list[Message]:
    """The next messages; errors are survived as a role does, and counted out."""
    for _ in range(looks):
        with suppress(RedisError):
            if found := await reader.read(100):
                return found
    return []


def told(found: list[Message]) -> list[Attempt]:
    return [message.attempt for message in found]


async def left(client: redis.Redis) -> tuple[int, int]:
    """How many entries the stream holds, and how many of them are somebody's."""
    stream = streams.stream_of("n1")
    pending = await client.xpending(stream, streams.GROUP)
    return await client.xlen(stream), pending["pending"]


async def test_reads_what_was_said_before_it_came_and_after(redis_client: redis.Redis, reader: Reader) -> None:
    early = await tell(redis_client, 1, 2)
    first = await read(reader)
    late = await tell(redis_client, 3)
    second = await read(reader)
    assert (told(first), told(second)) == (early, late)
    assert {message.kind for message in first} == {"run"}
    reader.done([message.entry_id for message in first + second])
    assert await reader.read(1) == []
    assert await left(redis_client) == (0, 0)


async def test_a_cancel_is_told_as_one(redis_client: redis.Redis, reader: Reader) -> None:
    await streams.publish(Link(redis_client), "cancel", [Dispatch(7, 2, "n1")])
    [message] = await read(reader)
    assert (message.kind, message.attempt) == ("cancel", Attempt(7, 2))


async def test_silence_is_an_empty_answer(reader: Reader) -> None:
    assert await reader.read(10) == []  # its own old entries
    assert await reader.read(10) == []  # BLOCK_MS without a new one


async def test_no_more_than_the_limit(redis_client: redis.Redis, reader: Reader) -> None:
    await tell(redis_client, 1, 2, 3)
    assert await reader.read(2) == []
    assert [len(await reader.read(2)) for _ in range(2)] == [2, 1]


async def test_the_group_is_made_anew_when_redis_lost_it(redis_client: redis.Redis, reader: Reader) -> None:
    await tell(redis_client, 1)
    assert len(await read(reader)) == 1
    await redis_client.flushdb()
    again = await tell(redis_client, 1, 2)
    assert told(await read(reader)) == again


async def test_the_group_is_made_anew_when_it_vanishes_under_a_read(
    settings: Settings, redis_client: redis.Redis, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BLOCK_MS", 4000)  # shorter than the socket's time-out, as always
    assert await reader.read(10) == []
    other = streams.connect(settings)
    task = asyncio.create_task(read(reader))
    await until(lambda: blocked(other))
    await other.flushdb()
    again = await tell(other, 5)
    async with asyncio.timeout(LONG):
        assert told(await task) == again
    await other.aclose()


async def blocked(client: redis.Redis) -> bool:
    """Whether some client waits in a blocking command."""
    return bool((await client.info("clients"))["blocked_clients"])


async def test_after_an_error_it_reads_its_own_entries_again(
    settings: Settings, redis_client: redis.Redis, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry of an answer that never came would sit unseen otherwise."""
    first = await tell(redis_client, 1)
    assert told(await read(reader)) == first
    monkeypatch.setattr(streams, "BLOCK_MS", 4000)
    other = streams.connect(settings)
    task = asyncio.create_task(reader.read(10))
    await until(lambda: blocked(other))
    [reading] = [client["id"] for client in await other.client_list() if client["cmd"] == "xreadgroup"]
    await other.execute_command("CLIENT", "KILL", "ID", reading)
    with pytest.raises((RedisError, OSError)):
        await task
    await other.aclose()
    new = await tell(redis_client, 2)
    replayed = await read(reader)
    assert told(replayed) == first
    reader.done([message.entry_id for message in replayed])
    assert told(await read(reader)) == new


async def test_a_worker_that_comes_back_reads_what_the_last_one_left(redis_client: redis.Redis, reader: Reader) -> None:
    first = await tell(redis_client, 1)
    assert told(await read(reader)) == first
    assert told(await read(Reader(redis_client, "n1"))) == first


async def test_a_reader_learns_whether_anybody_listens(redis_client: redis.Redis, reader: Reader) -> None:
    ear, heard = Ear(redis_client), []
    for listens in (False, True, False):
        if listens:
            assert await ear.hear() is None
        else:
            await ear.close()
        await read(reader)
        heard.append(reader.somebody_listens)
    assert heard == [False, True, False]


@pytest.mark.parametrize("answer", [ResponseError("NOPERM"), [], None, [b"x"], [b"x", b"y"], 7])
async def test_a_redis_that_does_not_say_who_listens_is_read_all_the_same(
    redis_client: redis.Redis, reader: Reader, monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    first, ask = await tell(redis_client, 1), Link.ask

    async def otherwise(link: Link, *commands: Command) -> list[Any]:
        return [*(await ask(link, *commands))[:-1], answer]

    monkeypatch.setattr(Link, "ask", otherwise)
    assert told(await read(reader)) == first
    assert not reader.somebody_listens


NO_MESSAGES: list[dict[Any, Any]] = [
    {"x": "y"},
    {"kind": "run"},
    {"kind": "run", "job_id": "1"},
    {"kind": "run", "job_id": "one", "attempt": "1"},
    {"kind": "run", "job_id": "0", "attempt": "1"},
    {"kind": "run", "job_id": "-1", "attempt": "1"},
    {"kind": "run", "job_id": "1", "attempt": "0"},
    {"kind": "run", "job_id": str(2**63), "attempt": "1"},
    {"kind": "run", "job_id": "1", "attempt": str(2**31)},
    {"kind": "run", "job_id": "1.5", "attempt": "1"},
    {"kind": "run", "job_id": "9" * 10_000, "attempt": "1"},
    {"kind": "shell", "job_id": "1", "attempt": "1"},
    {"kind": b"\xff\xfe", "job_id": "1", "attempt": "1"},
    {b"\xff": b"\x00"},
]


async def test_what_is_no_message_is_dropped(redis_client: redis.Redis, reader: Reader) -> None:
    for fields in NO_MESSAGES:
        await redis_client.xadd(streams.stream_of("n1"), fields)
    good = await tell(redis_client, 1)
    found = await read(reader)
    assert told(found) == good
    reader.done([message.entry_id for message in found])
    assert await reader.read(1) == []
    assert await left(redis_client) == (0, 0)


async def test_an_entry_that_was_deleted_meanwhile_is_dropped(redis_client: redis.Redis, reader: Reader) -> None:
    await tell(redis_client, 1)
    [message] = await read(reader)
    await redis_client.xdel(streams.stream_of("n1"), message.entry_id)
    other = Reader(redis_client, "n1")
    assert [await other.read(10) for _ in range(2)] == [[], []]
    assert await left(redis_client) == (0, 0)


async def test_a_forged_message_starts_nothing(
    connection: asyncpg.Connection, redis_client: redis.Redis, reader: Reader
) -> None:
    """Well formed, of a job that waits, of one placed elsewhere, and of none at all."""
    for name in ("n1", "n2"):
        await register(connection, a_node(name))
    waits, elsewhere = await submit(connection, a_job(), a_job())
    await give(connection, elsewhere, "n2")
    await tell(redis_client, waits, elsewhere, 10**15)
    found = told(await read(reader))
    assert len(found) == 3
    assert await start(connection, *found, node="n1") == []


# Leading


@asynccontextmanager
async def leading(settings: Settings, wake: Wakeup, *duties: Callable[[], Awaitable[None]]) -> AsyncIterator[Any]:
    """One scheduler's `lead`, until the block ends."""
    task = asyncio.create_task(lead.lead(settings, wake, duties))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_leader_logs_what_workers_have_taken(
    settings: Settings, connection: asyncpg.Connection, pool: Pool
) -> None:
    node, led = 'n "1"', Led()
    async with leading(settings, Wakeup(), led):
        await until(lambda: led.now)
        with capture_logs() as logs:
            jobs_of = '["n1", [[{}, 1, 1]]]'
            rubbish_of_jobs = [jobs_of.format(job_id) for job_id in ('"x"', "1e999", "null", "1, 2")]
            for rubbish in ("", "x", "1", "[]", '["n1", 5]', "[" * 5000, *rubbish_of_jobs):
                await connection.execute("SELECT pg_notify($1, $2)", taken.CHANNEL, rubbish)
            own = Taken()
            own.add([a_spec(job_id=2**62, attempt=3, cpus=4)])
            assert await own.tell_once(pool, node) == 1
            await until(lambda: logs)
    assert logs == [
        {"event": "job_allocated", "log_level": "info", "job_id": 2**62, "attempt": 3, "node": node, "cpus": 4}
    ]


class Led:
    """A duty that notes whether it is being done."""

    def __init__(self) -> None:
        self.now = False
        self.times = 0

    async def __call__(self) -> None:
        self.now = True
        self.times += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.now = False


LEADER = """
SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


async def test_the_second_stands_by_and_takes_over_when_the_first_loses_its_connection(
    settings: Settings, connection: asyncpg.Connection
) -> None:
    first, second = Led(), Led()
    async with leading(settings, Wakeup(), first):
        await until(lambda: first.now)
        with capture_logs() as logs:
            async with leading(settings, Wakeup(), second):
                await until(lambda: "scheduler_stands_by" in {log["event"] for log in logs})
                assert not second.now
                assert await connection.fetchval("SELECT pg_terminate_backend($1)", await connection.fetchval(LEADER))
                await until(lambda: first.times + second.times == 2)  # whoever comes first
                # The one that led has noticed; exactly one leads again.
                await until(lambda: {first.now, second.now} == {True, False})
                await until(lambda: "leader_connection_lost" in {log["event"] for log in logs})


async def test_the_second_takes_over_when_the_first_stops(settings: Settings) -> None:
    first, second = Led(), Led()
    async with leading(settings, Wakeup(), first) as task:
        await until(lambda: first.now)
        async with leading(settings, Wakeup(), second):
            await asyncio.sleep(0.2)
            assert not second.now
            task.cancel()
            await until(lambda: second.now)
            assert not first.now


async def test_a_notification_wakes_the_leader(settings: Settings, connection: asyncpg.Connection) -> None:
    wake, led = Wakeup(), Led()
    async with leading(settings, wake, led):
        await until(lambda: led.now)
        assert await wake.wait(LONG)  # whatever was said while nobody listened
        assert not await wake.wait(0.05)
        await notify(connection)
        assert await wake.wait(LONG)


async def test_a_leader_looks_at_the_tables_after_each_reconnect(
    settings: Settings, connection: asyncpg.Connection
) -> None:
    wake, led = Wakeup(), Led()
    async with leading(settings, wake, led):
        for times in (1, 2):
            await until(lambda times=times: led.times == times and led.now)
            assert await wake.wait(LONG)
            await connection.execute("SELECT pg_terminate_backend($1)", await connection.fetchval(LEADER))


async def test_a_leader_whose_connection_fell_silent_leads_again_at_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server knows nothing of that, and keeps the lock for the old connection."""
    monkeypatch.setattr(lead, "SILENCE", "1h")
    monkeypatch.setattr(lead, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(lead, "PROBE_TIMEOUT_SECONDS", 0.5)
    led = Led()
    async with proxied(settings.postgres_dsn) as wire:
        through = settings.model_copy(update={"database_url": SecretStr(wire.url)})
        async with leading(through, Wakeup(), led):
            await until(lambda: led.now)
            wire.at(b"SELECT 1", Fault.HOLE_BEFORE)
            await until(lambda: led.times == 2)


async def test_a_duty_that_fails_takes_the_role_down(settings: Settings) -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    led = Led()
    async with asyncio.timeout(LONG):
        with pytest.raises(BaseExceptionGroup) as caught:
            await lead.lead(settings, Wakeup(), [led, broken])
    assert caught.group_contains(ZeroDivisionError)
    assert not led.now


# The loop around a duty


def answers(*given: int | Exception) -> Callable[[], Awaitable[int]]:
    """A duty that gives these answers, and then stops the loop."""
    remaining: Iterator[int | Exception] = iter((*given, ZeroDivisionError()))

    async def once() -> int:
        answer = next(remaining)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return once


async def test_a_duty_survives_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duty, "BACK_OFF_SECONDS", (0.001, 0.002))
    away = [
        ConnectionRefusedError("no"),
        RedisError("no"),
        asyncpg.CannotConnectNowError("starting up"),
        TimeoutError(),
    ]
    with capture_logs() as logs, pytest.raises(ZeroDivisionError):
        await duty.repeat("look", answers(*away, 1, 0), Wakeup(), 0.001)
    assert [(log["event"], log["duty"]) for log in logs] == [("duty_waits", "look"), ("duty_resumed", "look")]


async def test_a_duty_goes_on_at_once_while_there_is_something_left() -> None:
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(duty.repeat("look", answers(3, 2, 1), Wakeup(), 3600), LONG)


async def test_a_duty_waits_for_the_poll_or_a_wake_up() -> None:
    done, wake = 0, Wakeup()

    async def once() -> int:
        nonlocal done
        done += 1
        return 0

    task = asyncio.create_task(duty.repeat("look", once, wake, 3600))
    await until(lambda: done == 1)
    await asyncio.sleep(0.05)
    assert done == 1
    wake.set()
    await until(lambda: done == 2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# All of it


async def test_two_schedulers_bring_a_job_to_its_node(
    settings: Settings, connection: asyncpg.Connection, redis_client: redis.Redis, reader: Reader
) -> None:
    """Woken by a notification alone: the poll is far away."""
    far = settings.model_copy(update={"poll_seconds": 3600.0})
    await register(connection)
    stop = asyncio.Event()
    both = [asyncio.create_task(scheduler.serve(far, stop)) for _ in range(2)]
    try:
        await until(lambda: connection.fetchval(f"SELECT EXISTS ({LEADER})"))
        for _ in range(3):
            [job_id] = await submit(connection)
            await notify(connection)
            async with asyncio.timeout(LONG):
                while not (found := await read(reader)):
                    pass
            assert told(found) == [Attempt(job_id, 1)]
            reader.done([message.entry_id for message in found])
    finally:
        stop.set()
        async with asyncio.timeout(LONG):
            await asyncio.gather(*both)

"""The wire of the tests itself: each of its faults is what it says, against real servers."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from redis.asyncio import Redis

from core.db.connection import CONNECTION_ERRORS
from tests.proxy import Fault, Proxy, proxied

pytestmark = pytest.mark.anyio

PATIENCE = 20.0
SILENCE = 0.3
"""Seconds without an answer after which there is taken to be none; one that came would fail the test."""


@pytest.fixture
async def proxy(empty_url: str) -> AsyncIterator[Proxy]:
    async with proxied(empty_url) as found:
        yield found


@pytest.fixture
async def direct(empty_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A look past the wire, with a table to write to."""
    found = await asyncpg.connect(empty_url)
    await found.execute("CREATE TABLE words (word text)")
    yield found
    await found.close()


async def connect(proxy: Proxy) -> asyncpg.Connection:
    return await asyncpg.connect(proxy.url, timeout=PATIENCE, command_timeout=PATIENCE)


async def say(connection: asyncpg.Connection, word: str) -> None:
    await connection.execute(f"INSERT INTO words VALUES ('{word}')")


async def said(direct: asyncpg.Connection) -> list[str]:
    return [row["word"] for row in await direct.fetch("SELECT word FROM words")]


async def until_said(direct: asyncpg.Connection, word: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while word not in await said(direct):  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


async def test_it_changes_nothing(proxy: Proxy, direct: asyncpg.Connection, redis_url: str) -> None:
    connection = await connect(proxy)
    long = "x" * 1_000_000
    await connection.execute("INSERT INTO words VALUES ($1)", long)
    assert await connection.fetchval("SELECT word FROM words") == long
    await connection.close()
    async with proxied(redis_url) as other:
        client = Redis.from_url(other.url)
        assert await client.ping()
        await client.aclose()


@pytest.mark.parametrize(("fault", "arrives"), [(Fault.CUT_BEFORE, False), (Fault.CUT_AFTER, True)])
@pytest.mark.parametrize("away", [False, True])
async def test_cut_at_a_word(proxy: Proxy, direct: asyncpg.Connection, fault: Fault, arrives: bool, away: bool) -> None:
    connection, other = await connect(proxy), await connect(proxy)
    await say(connection, "fatal")  # spoken before: no trap was set yet
    proxy.at(b"fatal", fault, away=away)
    await say(connection, "harmless")
    with pytest.raises(CONNECTION_ERRORS):
        await say(connection, "fatal")
    assert proxy.tripped.is_set()
    assert await said(direct) == ["fatal", "harmless", *["fatal"] * arrives]
    if away:
        with pytest.raises(CONNECTION_ERRORS):
            await say(other, "more")
        with pytest.raises(ConnectionRefusedError):
            await connect(proxy)
        await proxy.mend()
    else:
        await say(other, "fatal")  # it strikes once
        await other.close()
    await (await connect(proxy)).close()


async def test_a_trap_that_strikes_twice(proxy: Proxy, direct: asyncpg.Connection) -> None:
    proxy.at(b"fatal", Fault.CUT_BEFORE, times=2)
    for _ in range(2):
        with pytest.raises(CONNECTION_ERRORS):
            await say(await connect(proxy), "fatal")
    connection = await connect(proxy)
    await say(connection, "fatal")
    await connection.close()
    assert await said(direct) == ["fatal"]


@pytest.mark.parametrize(("fault", "arrives"), [(Fault.HOLE_BEFORE, False), (Fault.HOLE_AFTER, True)])
async def test_a_hole_at_a_word(proxy: Proxy, direct: asyncpg.Connection, fault: Fault, arrives: bool) -> None:
    connection, other = await connect(proxy), await connect(proxy)
    proxy.at(b"fatal", fault)
    with pytest.raises(TimeoutError):
        await connection.execute("INSERT INTO words VALUES ('fatal')", timeout=SILENCE)
    if arrives:
        await until_said(direct, "fatal")
    await say(other, "harmless")
    assert await said(direct) == [*["fatal"] * arrives, "harmless"]
    connection.terminate()
    await other.close()


async def test_silence_holds_up_what_arrives_later(proxy: Proxy, direct: asyncpg.Connection) -> None:
    connection = await connect(proxy)
    proxy.silence()
    saying = asyncio.create_task(say(connection, "late"))
    connecting = asyncio.create_task(connect(proxy))
    await asyncio.sleep(SILENCE)
    assert not saying.done()
    assert not connecting.done()
    assert await said(direct) == []
    await proxy.mend()
    await saying
    assert await said(direct) == ["late"]
    await connection.close()
    await (await connecting).close()


async def test_a_word_in_two_pieces_is_a_word(proxy: Proxy) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    proxy.at(b"fatal", Fault.CUT_BEFORE)
    for piece in (b"fa", b"tal"):
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.05)  # a piece is to arrive by itself; when it does not, nothing else is expected
    async with asyncio.timeout(PATIENCE):
        await proxy.tripped.wait()
    writer.close()

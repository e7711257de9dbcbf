"""Link: a connection to Redis that is kept, and what breaks it."""

import asyncio

import pytest
import redis.asyncio as redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

from core import streams
from core.records import Dispatch
from core.streams import REDIS_ERRORS, Link
from tests.builders import LONG, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def link(redis_client: redis.Redis) -> Link:
    return Link(redis_client)


async def id_of(link: Link) -> int:
    """The number that the server gave its connection."""
    [number] = await link.ask(("CLIENT", "ID"))
    assert isinstance(number, int)
    return number


async def test_it_keeps_one_connection(link: Link) -> None:
    numbers = await asyncio.gather(*[id_of(link) for _ in range(5)])
    assert len(set(numbers)) == 1


async def test_answers_come_in_order_and_refusals_are_among_them(link: Link) -> None:
    first, refusal, last = await link.ask(("ECHO", "a"), ("INCR",), ("ECHO", "b"))
    assert (first, last) == (b"a", b"b")
    assert isinstance(refusal, ResponseError)


async def test_many_users_get_each_their_own_answer(link: Link) -> None:
    texts = [str(number) for number in range(50)]
    answers = await asyncio.gather(*[link.ask(("ECHO", text)) for text in texts])
    assert answers == [[text.encode()] for text in texts]


async def test_what_the_server_has_closed_meanwhile_is_opened_anew(link: Link, redis_client: redis.Redis) -> None:
    """Nothing is lost with it: a hint that is would cost seconds."""
    before = await id_of(link)
    await redis_client.execute_command("CLIENT", "KILL", "ID", before)
    kept = link._connection
    assert kept is not None
    await until(kept.can_read)
    await streams.publish(link, "run", [Dispatch(1, 1, "n1")])
    assert await redis_client.xlen(streams.stream_of("n1")) == 1
    assert await id_of(link) != before


async def test_an_answer_that_nobody_waited_for_is_nobody_elses(link: Link) -> None:
    asked = asyncio.create_task(link.ask(("BLPOP", "nothing", 5)))
    await until(link._free.locked)
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert await link.ask(("ECHO", "mine")) == [b"mine"]


async def test_an_opening_that_is_cut_short_leaves_no_answers_behind(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py leaves such a connection open, with the answers to its greetings still to come."""
    await id_of(link)
    kept = link._connection
    assert kept is not None
    await kept.disconnect(nowait=True)
    greet, greeted = type(kept).on_connect_check_health, asyncio.Event()

    async def slowly(connection: AbstractConnection, check_health: bool = True) -> None:
        await connection.send_command("ECHO", "greeting", check_health=False)
        greeted.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(type(kept), "on_connect_check_health", slowly)
    asked = asyncio.create_task(link.ask(("ECHO", "late")))
    await greeted.wait()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    monkeypatch.setattr(type(kept), "on_connect_check_health", greet)
    assert await link.ask(("ECHO", "mine")) == [b"mine"]


async def test_a_server_that_is_away_is_said_so_each_time() -> None:
    nowhere = redis.Redis.from_url("unix:///nowhere/redis.sock")
    link = Link(nowhere)
    for _ in range(2):
        with pytest.raises(REDIS_ERRORS):
            await link.ask(("PING",))
    await nowhere.aclose()


async def test_a_silent_server_is_given_up(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "ANSWER_SECONDS", 0.2)
    with pytest.raises(TimeoutError):
        await link.ask(("BLPOP", "nothing", 5))
    monkeypatch.setattr(streams, "ANSWER_SECONDS", LONG)
    assert await link.ask(("ECHO", "mine")) == [b"mine"]

"""Long polls: answered by what happens, by a poll where nobody says so, by their time; and nothing is missed."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import asyncpg
import pytest
from pydantic import SecretStr

from core import moves
from core.db import jobs
from core.moves import Moves
from core.records import Attempt
from core.settings import Settings
from core.states import State
from core.streams import moved_channel
from services.api import watch
from services.api.watch import Watch
from tests import builders
from tests.api import JOBS, PATIENCE, Answer, Api, an_api, check_problem, serving, until
from tests.builders import a_node, give, register
from tests.proxy import proxied

pytestmark = pytest.mark.anyio

FAR = 3600.0
"""Seconds of a poll that comes too late for every test."""


@asynccontextmanager
async def polling(settings: Settings, seconds: float = FAR, **changes: Any) -> AsyncIterator[Api]:
    async with an_api(settings.model_copy(update={"poll_seconds": seconds, **changes})) as found:
        yield found


@pytest.fixture
async def api(
    settings: Settings, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Api]:
    """An API that hears of changes by what it is told alone, and a node with many CPUs."""
    monkeypatch.setattr(watch, "SETTLING_SECONDS", 0.0)
    await register(connection, a_node(cpus=1000))
    async with polling(settings) as found:
        yield found


async def tell(api: Api, state: State, *attempts: Attempt) -> None:
    """As a worker does, after its commit."""
    told = Moves(wanted=lambda: True)
    for attempt in attempts:
        told.add(attempt.job_id, state)
    await told.tell_once(api.state.link)


async def start(api: Api, attempt: Attempt) -> None:
    assert await builders.start(api.database, attempt)
    await tell(api, State.RUNNING, attempt)


async def finish(api: Api, *attempts: Attempt, state: State = State.COMPLETED) -> None:
    await builders.finish(api.database, *attempts, state=state)
    await tell(api, state, *attempts)


async def running(api: Api, **fields: Any) -> Attempt:
    attempt = await give(api.database, (await api.submit(**fields))["job_id"])
    assert await builders.start(api.database, attempt)
    return attempt


async def waiting(api: Api, job_id: int, query: str = "wait=60s") -> asyncio.Task[Answer]:
    """A request that waits, at an API that listens and has looked for what was said before."""
    others = len(waiters(api.state.watch, job_id))
    task = asyncio.create_task(api.get(f"{JOBS}/{job_id}?{query}"))
    await until(lambda: len(waiters(api.state.watch, job_id)) > others and is_at_ease(api.state.watch))
    return task


def is_at_ease(found: Watch) -> bool:
    return found._ear.is_open and found._next_poll > asyncio.get_running_loop().time()


def waiters(found: Watch, job_id: int) -> list[object]:
    """Those who wait for a job, and have found that it is not yet what they wait for."""
    return [waiter for waiter in found._waiters.get(job_id, ()) if waiter.as_it_is.done()]


async def answered(task: Awaitable[Answer]) -> Any:
    answer = await asyncio.wait_for(task, PATIENCE)
    assert answer.status == 200, answer.body
    return answer.json


async def test_an_end_is_answered_as_soon_as_it_is_told(api: Api) -> None:
    attempt = await running(api)
    task = await waiting(api, attempt.job_id)
    await finish(api, attempt, state=State.FAILED)
    job = await answered(task)
    assert (job["state"], job["exit_code"]) == ("FAILED", 1)
    assert job == await api.job(attempt.job_id)
    assert not api.state.watch._waiters


async def test_an_end_that_nobody_tells_is_answered_by_the_poll(
    settings: Settings, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SETTLING_SECONDS", 0.0)
    await register(connection)
    async with polling(settings, 0.05) as api:
        attempt = await running(api)
        task = await waiting(api, attempt.job_id)
        await builders.finish(api.database, attempt)
        assert (await answered(task))["state"] == "COMPLETED"


async def test_workers_that_do_not_know_yet_are_not_waited_for(
    settings: Settings, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has just begun to listen polls more often for as long as that may last, also for who comes meanwhile."""
    monkeypatch.setattr(watch, "SETTLING_SECONDS", FAR)
    await register(connection)
    async with polling(settings) as api:
        for _ in range(2):
            attempt = await running(api)
            task = await waiting(api, attempt.job_id)
            await builders.finish(api.database, attempt)
            assert (await answered(task))["state"] == "COMPLETED"


async def test_without_redis_the_poll_answers(settings: Settings, connection: asyncpg.Connection) -> None:
    await register(connection)
    async with polling(settings, 0.05, redis_url=SecretStr("redis://127.0.0.1:1/0")) as api:
        attempt = await running(api)
        task = asyncio.create_task(api.get(f"{JOBS}/{attempt.job_id}?wait=60s"))
        await until(lambda: waiters(api.state.watch, attempt.job_id))
        await builders.finish(api.database, attempt)
        assert (await answered(task))["state"] == "COMPLETED"


async def test_a_start_is_answered_to_who_waits_for_one(api: Api) -> None:
    attempt = await give(api.database, (await api.submit())["job_id"])
    started, ended = [await waiting(api, attempt.job_id, f"wait=60&until={what}") for what in ("running", "final")]
    await start(api, attempt)
    assert (await answered(started))["state"] == "RUNNING"
    assert not ended.done()
    assert (await answered(api.get(f"{JOBS}/{attempt.job_id}?wait=60s&until=running")))["state"] == "RUNNING"
    await finish(api, attempt)
    assert (await answered(ended))["state"] == "COMPLETED"


async def test_who_waits_for_a_start_is_told_of_an_end_without_one(api: Api) -> None:
    job_id = (await api.submit())["job_id"]
    task = await waiting(api, job_id, "wait=60s&until=running")
    assert (await api.ask("DELETE", f"{JOBS}/{job_id}")).status == 200
    assert (await answered(task))["state"] == "CANCELLED"


async def test_what_goes_back_to_the_queue_is_waited_for(api: Api) -> None:
    attempt = await running(api, requeue=True)
    task = await waiting(api, attempt.job_id)
    await finish(api, attempt, state=State.PENDING)
    again = await give(api.database, attempt.job_id)
    await start(api, again)
    assert not task.done()
    await finish(api, again)
    assert (await answered(task))["attempt"] == 2


async def test_what_is_over_is_answered_at_once(api: Api) -> None:
    attempt = await running(api)
    await finish(api, attempt)
    assert (await answered(api.get(f"{JOBS}/{attempt.job_id}?wait=60s")))["state"] == "COMPLETED"


@pytest.mark.parametrize("wait", ["50ms", "0.05", "0.05s", "0", "0s"])
async def test_when_the_time_is_over_the_job_is_answered_as_it_is(api: Api, wait: str) -> None:
    job_id = (await api.submit())["job_id"]
    assert (await answered(api.get(f"{JOBS}/{job_id}?wait={wait}")))["state"] == "PENDING"
    assert not api.state.watch._waiters


async def test_a_job_that_is_not_there_is_not_waited_for(api: Api) -> None:
    check_problem(await asyncio.wait_for(api.get(f"{JOBS}/999999?wait=60s"), PATIENCE), 404, "there is no job 999999")


@pytest.mark.parametrize(
    ("query", "parameter", "detail"),
    [
        ("wait=", "wait", "should be a time of at most 60 seconds, such as 10s or 500ms"),
        ("wait=long", "wait", "should be a time"),
        ("wait=-1", "wait", "should be a time"),
        ("wait=1m", "wait", "should be a time"),
        ("wait=60.1s", "wait", "of at most 60 seconds"),
        ("wait=999999999999s", "wait", "should be a time"),
        ("wait=%D9%A3s", "wait", "should be a time"),  # a digit of another script
        ("wait=1s&wait=2s", "wait", "should be given once"),
        ("wait=1s&until=ended", "until", "should be final or running"),
        ("until=final", "until", "needs wait, such as wait=10s"),
        ("timeout=1s", "timeout", "unknown parameter"),
    ],
)
async def test_what_cannot_be_waited_for_is_said(api: Api, query: str, parameter: str, detail: str) -> None:
    check_problem(await api.get(f"{JOBS}/1?{query}"), 422, detail, parameter, "parameter")


async def test_what_ends_between_the_look_and_the_wait_is_not_missed(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    other = await running(api)
    task = await waiting(api, other.job_id)
    attempt, plain = await running(api), jobs.get_all

    async def get_and_then_it_ends(*arguments: Any) -> Any:
        found = await plain(*arguments)
        monkeypatch.setattr(jobs, "get_all", plain)
        await finish(api, attempt)
        return found

    monkeypatch.setattr(jobs, "get_all", get_and_then_it_ends)
    assert (await answered(api.get(f"{JOBS}/{attempt.job_id}?wait=60s")))["state"] == "COMPLETED"
    await finish(api, other)
    assert (await answered(task))["state"] == "COMPLETED"


async def test_who_comes_during_a_look_is_not_answered_by_it(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads may be older than what a client knows that only then asks."""
    attempt, plain = await running(api), jobs.get_all
    looks, goes_on = 0, asyncio.Event()

    async def get_and_dawdle(*arguments: Any) -> Any:
        nonlocal looks
        looks += 1
        found = await plain(*arguments)
        await goes_on.wait()
        return found

    monkeypatch.setattr(jobs, "get_all", get_and_dawdle)
    first = asyncio.create_task(api.get(f"{JOBS}/{attempt.job_id}?wait=50ms"))
    await until(lambda: looks == 1)
    await builders.finish(api.database, attempt)
    second = asyncio.create_task(api.get(f"{JOBS}/{attempt.job_id}?wait=60s"))
    await until(lambda: api.state.watch._count == 2)
    goes_on.set()
    assert (await answered(second))["state"] == "COMPLETED"
    assert (await answered(first))["state"] == "COMPLETED"


async def test_many_that_wait_are_one_look(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = [await running(api) for _ in range(20)]
    tasks = [await waiting(api, attempt.job_id) for attempt in attempts for _ in range(3)]
    looks: list[str] = []

    def counted(name: str) -> None:
        plain = getattr(jobs, name)

        async def count(*arguments: Any) -> Any:
            looks.append(name)
            return await plain(*arguments)

        monkeypatch.setattr(jobs, name, count)

    counted("states")
    counted("get_all")
    await finish(api, *attempts)
    assert {(await answered(task))["state"] for task in tasks} == {"COMPLETED"}
    assert looks == ["get_all"]
    await api.get("/health")
    assert looks == ["get_all"]  # nobody waits, and nobody looks


async def test_who_is_gone_is_not_waited_for(settings: Settings, connection: asyncpg.Connection) -> None:
    await register(connection)
    async with polling(settings, 0.05) as api:
        job_id = (await api.submit())["job_id"]
        task = await waiting(api, job_id)
        other = await waiting(api, job_id)
        task.cancel()  # and its connection closes
        await until(lambda: len(api.state.watch._waiters[job_id]) == 1)
        assert not other.done()
        assert (await api.ask("DELETE", f"{JOBS}/{job_id}")).status == 200
        assert (await answered(other))["state"] == "CANCELLED"


async def test_no_more_wait_than_there_is_room_for(api: Api) -> None:
    api.state.watch._most = 2
    job_id = (await api.submit())["job_id"]
    tasks = [await waiting(api, job_id) for _ in range(2)]
    assert (await answered(api.get(f"{JOBS}/{job_id}?wait=60s")))["state"] == "PENDING"  # as it is, at once
    assert (await api.ask("DELETE", f"{JOBS}/{job_id}")).status == 200
    assert [(await answered(task))["state"] for task in tasks] == ["CANCELLED"] * 2
    assert (await answered(api.get(f"{JOBS}/{job_id}?wait=60s")))["state"] == "CANCELLED"


async def test_another_apis_cancel_is_heard(api: Api, settings: Settings) -> None:
    job_id = (await api.submit())["job_id"]
    task = await waiting(api, job_id)
    async with polling(settings) as other:
        assert (await other.ask("DELETE", f"{JOBS}/{job_id}")).status == 200
        assert (await answered(task))["state"] == "CANCELLED"


async def test_words_that_cannot_be_meant_are_passed_over(api: Api) -> None:
    attempt = await running(api)
    task = await waiting(api, attempt.job_id)
    for words in (b"", b"=", b"x=COMPLETED", b"1=\xff", f"{attempt.job_id}=GONE".encode(), b"\x00" * 100):
        await api.state.redis.publish(moved_channel(api.state.redis), words)
    await tell(api, State.COMPLETED, attempt)  # which is not true
    await finish(api, attempt)
    assert (await answered(task))["state"] == "COMPLETED"


async def test_a_subscription_that_was_cut_is_made_anew(api: Api) -> None:
    """And what was said meanwhile is looked for."""
    attempt = await running(api)
    task = await waiting(api, attempt.job_id)
    await builders.finish(api.database, attempt)
    await api.state.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    assert (await answered(task))["state"] == "COMPLETED"


@pytest.mark.parametrize("comes_back_silent", [False, True])
async def test_a_silent_redis_is_noticed(
    settings: Settings, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, *, comes_back_silent: bool
) -> None:
    monkeypatch.setattr(moves, "SILENCE_SECONDS", 0.05)
    monkeypatch.setattr(moves, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(watch, "SETTLING_SECONDS", 0.0)
    await register(connection)
    async with proxied(settings.redis_dsn) as wire, polling(settings, redis_url=SecretStr(wire.url)) as api:
        attempt = await running(api)
        task = await waiting(api, attempt.job_id)
        wire.silence()
        if comes_back_silent:  # accepted, and nothing is said
            wire.cut(away=False)
        await builders.finish(api.database, attempt)
        await until(lambda: not api.state.watch._ear.is_open)
        assert not task.done()
        wire.cut()
        await wire.mend()
        assert (await answered(task))["state"] == "COMPLETED"


async def test_nobody_listens_while_nobody_waits(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers tell nothing then."""
    monkeypatch.setattr(moves, "SILENCE_SECONDS", 0.05)
    monkeypatch.setattr(watch, "LISTEN_SECONDS", 0.1)
    attempt = await running(api)
    assert not api.state.watch._ear.is_open
    task = await waiting(api, attempt.job_id)
    [(_, listeners)] = await api.state.redis.pubsub_numsub(moved_channel(api.state.redis))
    assert listeners > 0
    await finish(api, attempt)
    await answered(task)
    await until(lambda: not api.state.watch._ear.is_open)
    again = await running(api)
    task = await waiting(api, again.job_id)
    await finish(api, again)
    assert (await answered(task))["state"] == "COMPLETED"


async def test_postgres_away_in_between_is_waited_for(
    settings: Settings, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SETTLING_SECONDS", 0.0)
    await register(connection)
    async with (
        proxied(settings.postgres_dsn) as wire,
        polling(settings, 0.05, database_url=SecretStr(wire.url)) as api,
    ):
        attempt = await running(api)
        task = await waiting(api, attempt.job_id)
        wire.cut()
        await builders.finish(connection, attempt)
        check_problem(await api.get(f"{JOBS}/{attempt.job_id}?wait=60s"), 503, "PostgreSQL")
        assert not task.done()
        await wire.mend()
        assert (await answered(task))["state"] == "COMPLETED"


@pytest.mark.parametrize("what", ["get_all", "states"])
async def test_an_error_reaches_who_waits_for_what_was_looked_at_and_ends_no_role(
    settings: Settings, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As of a row that is damaged."""
    monkeypatch.setattr(watch, "SETTLING_SECONDS", 0.0)
    await register(connection)
    async with polling(settings, 0.05) as api:
        damaged, sound = await running(api), await running(api)
        tasks = [await waiting(api, attempt.job_id) for attempt in (damaged, sound)]
        plain, raised = getattr(jobs, what), asyncio.Event()

        async def fail(connection: asyncpg.Connection, job_ids: list[int]) -> Any:
            if damaged.job_id in job_ids and not (what == "states" and raised.is_set()):
                raised.set()
                raise asyncpg.InternalServerError("a row that cannot be read")
            return await plain(connection, job_ids)

        monkeypatch.setattr(jobs, what, fail)
        await builders.finish(api.database, damaged)
        await asyncio.wait_for(raised.wait(), PATIENCE)
        if what == "get_all":
            check_problem(await asyncio.wait_for(tasks[0], PATIENCE), 500, "an error of Rowlock's own")
        else:
            assert (await answered(tasks[0]))["state"] == "COMPLETED"
        assert not tasks[1].done()
        await builders.finish(api.database, sound)
        assert (await answered(tasks[1]))["state"] == "COMPLETED"


async def test_an_api_that_stops_answers_who_waits(settings: Settings, connection: asyncpg.Connection) -> None:
    await register(connection)
    async with aiohttp.ClientSession() as session, serving(settings) as (state, port):
        await until(lambda: state.database.is_open)
        api = Api(settings, state, port, session, connection)
        attempt = await running(api)
        task = await waiting(api, attempt.job_id)
        stopping = asyncio.create_task(state.watch.job(attempt.job_id, frozenset({State.COMPLETED}), 60))
    assert (await answered(task))["state"] == "RUNNING"
    found = await stopping
    assert found is not None
    assert found.state is State.RUNNING

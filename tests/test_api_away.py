"""PostgreSQL or Redis away: said with 503, survived, and over by itself; nothing is stored by halves."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from pydantic import SecretStr

from core.db import connection as db
from core.db.connection import Pool
from core.settings import Settings
from services.api import database as api_database
from services.api import submit
from services.api.app import ROUTES
from services.api.problems import Problem
from tests.api import JOBS, PATIENCE, Answer, Api, check_problem, serving
from tests.builders import a_job, a_node, give, register, start
from tests.proxy import Fault, Proxy, proxied

pytestmark = pytest.mark.anyio


@pytest.fixture
async def wire(database_url: str) -> AsyncIterator[Proxy]:
    async with proxied(database_url) as found:
        yield found


@pytest.fixture
def wired(settings: Settings, wire: Proxy) -> Settings:
    """Settings of an API at the other end of the wire."""
    return settings.model_copy(update={"database_url": SecretStr(wire.url)})


@asynccontextmanager
async def an_api_on(settings: Settings, connection: asyncpg.Connection) -> AsyncIterator[Api]:
    """An API that need not have found its database, with a client, and a look of our own into the database."""
    async with serving(settings) as (state, port), aiohttp.ClientSession() as session:
        yield Api(settings, state, port, session, connection)


async def answers(api: Api, true: Callable[[Answer], bool] = lambda answer: answer.status == 200) -> None:
    """Wait until the API is as it should be again; until then it says 503, and nothing worse."""
    async with asyncio.timeout(PATIENCE):
        while True:
            answer = await api.get("/health")
            assert answer.status in (200, 503), answer.body
            if true(answer) and api.state.database.is_open:
                return
            await asyncio.sleep(0.01)


WITHOUT_TABLES = ("/", "/openapi.json", "/docs")


async def check_everything_is_unavailable(api: Api, detail: str) -> None:
    for method, pattern, _ in ROUTES:
        path = pattern.replace("{job_id}", "1").replace("{name:[^/]+}", "n1")
        if path in WITHOUT_TABLES:
            continue
        bodies = {("POST", JOBS): {"job": {"account": "test"}, "script": "#!/bin/sh\n"}}
        body = {"state": "RESUME"} if method == "PATCH" else bodies.get((method, path))
        answer = await api.ask(method, path, json=body)
        check_problem(answer, 503, detail if path == "/health" else "PostgreSQL")
        assert int(answer.headers["Retry-After"]) > 0
    for path in WITHOUT_TABLES:
        assert (await api.get(path)).status == 200


async def test_it_starts_before_postgres_and_finds_it(
    wired: Settings, wire: Proxy, connection: asyncpg.Connection
) -> None:
    wire.cut()
    async with an_api_on(wired, connection) as api:
        await check_everything_is_unavailable(api, f"127.0.0.1:{wire.port}")
        await wire.mend()
        await answers(api)
        assert (await api.submit())["state"] == "PENDING"


async def test_it_is_not_well_before_it_takes_jobs(
    settings: Settings, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL answers to the look of the health check, and the API's own connections are not there yet."""
    opening, let_go = api_database.open_pool, asyncio.Event()

    async def open_late(*arguments: Any) -> Pool:
        await let_go.wait()
        return await opening(*arguments)

    monkeypatch.setattr(api_database, "open_pool", open_late)
    async with an_api_on(settings, connection) as api:
        check_problem(await api.get("/health"), 503, "answers, and will be used in a moment")
        let_go.set()
        await answers(api)
        assert (await api.submit())["state"] == "PENDING"


async def test_postgres_goes_and_comes_back(wired: Settings, wire: Proxy, connection: asyncpg.Connection) -> None:
    async with an_api_on(wired, connection) as api:
        await answers(api)
        first = await api.submit()
        wire.cut()
        await check_everything_is_unavailable(api, f"127.0.0.1:{wire.port}")
        await wire.mend()
        await answers(api)
        assert await api.job(first["job_id"]) == first
        assert await connection.fetchval("SELECT count(*) FROM jobs") == 1
        await api.submit()


async def test_bad_requests_are_told_so_while_postgres_is_away(
    wired: Settings, wire: Proxy, connection: asyncpg.Connection
) -> None:
    wire.cut()
    async with an_api_on(wired, connection) as api:
        check_problem(await api.post({"job": {}}), 422)
        check_problem(await api.get(f"{JOBS}?limit=0"), 422)
        check_problem(await api.get("/nowhere"), 404)


# --- the answer to a commit is lost

ACCOUNT = "the account"
JOB = {"job": {"account": ACCOUNT}, "script": "#!/bin/sh\n"}

# Prepared, then run: its values come with the run, whose answer is that of the commit.
LOST = [
    (b"INSERT INTO jobs", Fault.CUT_BEFORE, 0),
    (b"INSERT INTO jobs", Fault.CUT_AFTER, 0),
    (ACCOUNT.encode(), Fault.CUT_BEFORE, 0),
    (ACCOUNT.encode(), Fault.CUT_AFTER, 1),
    (ACCOUNT.encode(), Fault.HOLE_BEFORE, 0),
    (ACCOUNT.encode(), Fault.HOLE_AFTER, 1),
]
CUT = [lost for lost in LOST if lost[1] in (Fault.CUT_BEFORE, Fault.CUT_AFTER)]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for an answer that does not come gives up soon."""
    monkeypatch.setattr(db, "COMMAND_SECONDS", 0.5)
    monkeypatch.setattr(api_database, "ACQUIRE_SECONDS", 0.5)


async def check_stored(connection: asyncpg.Connection, jobs: int) -> None:
    """So many jobs are there, each as a whole."""
    for table in ("jobs", "job_specs", "pending", "job_events"):
        assert await connection.fetchval(f"SELECT count(*) FROM {table}") == jobs


@pytest.mark.parametrize(("word", "fault", "_kept"), LOST)
@pytest.mark.usefixtures("hasty")
async def test_a_lost_answer_is_settled(
    wired: Settings, wire: Proxy, connection: asyncpg.Connection, word: bytes, fault: Fault, _kept: int
) -> None:
    async with an_api_on(wired, connection) as api:
        await answers(api)
        wire.at(word, fault)
        answer = await api.post(JOB)
        assert (wire.tripped.is_set(), answer.status) == (True, 201), answer.body
        assert await api.job(answer.json["job_id"]) == answer.json
        await check_stored(connection, 1)


@pytest.mark.parametrize(("word", "fault", "_kept"), CUT)
async def test_a_lost_answer_is_settled_once_postgres_is_back(
    wired: Settings, wire: Proxy, connection: asyncpg.Connection, word: bytes, fault: Fault, _kept: int
) -> None:
    async with an_api_on(wired, connection) as api:
        await answers(api)
        wire.at(word, fault, away=True)
        posting = asyncio.create_task(api.post(JOB))
        await wire.tripped.wait()
        await wire.mend()
        assert (await posting).status == 201
        await check_stored(connection, 1)


@pytest.mark.parametrize(("word", "fault", "kept"), CUT)
async def test_a_lost_answer_of_a_postgres_that_stays_away(
    wired: Settings,
    wire: Proxy,
    connection: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    word: bytes,
    fault: Fault,
    kept: int,
) -> None:
    monkeypatch.setattr(submit, "SETTLE_SECONDS", 0.2)
    async with an_api_on(wired, connection) as api:
        await answers(api)
        wire.at(word, fault, away=True)
        answer = await api.post(JOB)
        check_problem(answer, 503, "may have been stored")
        assert answer.headers["Retry-After"]
        answer = await api.post(JOB)
        check_problem(answer, 503, "is away")
        assert b"may have been stored" not in answer.body  # the next one knows that it was not sent
        await wire.mend()
        await answers(api)
        await check_stored(connection, kept)
        await api.submit()


async def test_an_insert_that_arrives_late_finds_nobody(
    wired: Settings, wire: Proxy, connection: asyncpg.Connection, hasty: None
) -> None:
    """A network held it up for longer than the API waited: stored again by then, it must not be stored twice."""
    async with an_api_on(wired, connection) as api:
        await answers(api)
        wire.at(ACCOUNT.encode(), Fault.LATE)
        assert (await api.post(JOB)).status == 201
        wire.deliver()
        await api.submit(account="another")
        await connection.execute("SELECT pg_sleep(0.3)")  # in which nothing is to happen
        assert await connection.fetch("SELECT account FROM jobs ORDER BY 1") == [("another",), (ACCOUNT,)]


async def test_a_batch_is_settled_job_by_job(wired: Settings, wire: Proxy, connection: asyncpg.Connection) -> None:
    """Of those that were stored, those that fit no node, and those whose key is taken, each gets its own answer."""
    await register(connection, a_node("n1", 4))
    async with an_api_on(wired, connection) as api:
        await answers(api)
        earlier = await api.state.submitter.submit(a_job(key="taken", digest=b"d"))
        wire.at(ACCOUNT.encode(), Fault.CUT_AFTER)
        batch = [
            a_job(account=ACCOUNT, name="one"),
            a_job(cpus=5),
            a_job(key="taken", digest=b"d"),
            a_job(account=ACCOUNT, name="two", key="new", digest=b"d"),
        ]
        results = await asyncio.gather(*map(api.state.submitter.submit, batch), return_exceptions=True)
        one, large, taken, two = results
        assert wire.tripped.is_set()
        assert isinstance(one, submit.Accepted)
        assert isinstance(two, submit.Accepted)
        assert [(found.job.name, found.replayed) for found in (one, two)] == [("one", False), ("two", False)]
        assert isinstance(large, Problem)
        assert taken == replace(earlier, replayed=True)
        await check_stored(connection, 3)


async def test_what_the_server_itself_refuses_is_no_doubt(
    settings: Settings, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that is not given is an answer: nothing was stored, and nothing has to be looked for."""
    monkeypatch.setitem(db.SESSION, "lock_timeout", "100ms")
    async with an_api_on(settings, connection) as api:
        await answers(api)
        async with connection.transaction():
            await connection.execute("LOCK TABLE pending IN ACCESS EXCLUSIVE MODE")
            answer = await api.post(JOB)
        check_problem(answer, 503, "lock timeout")
        assert b"may have been stored" not in answer.body
        await check_stored(connection, 0)


async def test_postgres_goes_before_the_scheduler_is_told(
    wired: Settings, wire: Proxy, connection: asyncpg.Connection
) -> None:
    async with an_api_on(wired, connection) as api:
        await answers(api)
        wire.at(b"NOTIFY", Fault.CUT_BEFORE, away=True)
        await api.submit()
        await answers(api, lambda answer: answer.status == 503)
        await wire.mend()
        await answers(api)
        heard = asyncio.Event()
        await connection.add_listener("rowlock_wake", lambda *_: heard.set())
        await api.submit()
        async with asyncio.timeout(PATIENCE):
            await heard.wait()


async def test_a_postgres_that_says_nothing(
    wired: Settings, wire: Proxy, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_database, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(api_database, "CLOSE_SECONDS", 0.1)
    async with an_api_on(wired, connection) as api:
        await answers(api)
        wire.silence()
        check_problem(await api.get("/health"), 503, "is away")
        wire.cut()
        await wire.mend()
        await answers(api)


async def test_connections_that_the_server_ends_are_opened_again(
    settings: Settings, connection: asyncpg.Connection
) -> None:
    async with an_api_on(settings, connection) as api:
        await answers(api)
        await asyncio.gather(*(api.get(JOBS) for _ in range(20)))
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        for _ in range(20):
            assert (await api.get(JOBS)).status in (200, 503)
        await answers(api)
        assert (await api.submit())["state"] == "PENDING"


@pytest.mark.parametrize("renamed", [False, True])
async def test_a_database_that_an_administrator_takes_away(
    settings: Settings, postgres_url: str, connection: asyncpg.Connection, renamed: bool
) -> None:
    name = await connection.fetchval("SELECT current_database()")
    away = f"{name}_away" if renamed else name
    await connection.close()
    administrator = await asyncpg.connect(postgres_url)
    try:
        async with an_api_on(settings, connection) as api:
            await answers(api)
            await administrator.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
            await administrator.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1", name
            )
            if renamed:
                await administrator.execute(f'ALTER DATABASE "{name}" RENAME TO "{away}"')
            await check_everything_is_unavailable(api, name)
            await administrator.execute(f'ALTER DATABASE "{away}" ALLOW_CONNECTIONS true')
            if renamed:
                await administrator.execute(f'ALTER DATABASE "{away}" RENAME TO "{name}"')
            await answers(api)
            await api.submit()
    finally:
        await administrator.close()


# --- the schema


async def test_a_database_that_is_emptied_gets_its_schema_again(
    settings: Settings, connection: asyncpg.Connection
) -> None:
    async with an_api_on(settings, connection) as api:
        await answers(api)
        await api.submit()
        await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        check_problem(await api.get("/health"), 503, "holds schema none")
        answer = await api.get(JOBS)
        check_problem(answer, 503, "does not hold this schema")
        assert answer.headers["Retry-After"]
        await answers(api)
        assert await api.job((await api.submit())["job_id"])


@pytest.mark.parametrize(
    ("statement", "detail"),
    [
        ("INSERT INTO rowlock_schema (version) VALUES (99)", "holds schema 99"),
        ("DROP TABLE rowlock_schema", "tables that are not Rowlock's"),
    ],
)
async def test_another_schema_is_named(
    settings: Settings, connection: asyncpg.Connection, statement: str, detail: str
) -> None:
    await connection.execute(statement)
    async with an_api_on(settings, connection) as api:
        check_problem(await api.get("/health"), 503, detail)
        check_problem(await api.get(JOBS), 503, "GET /health says why")


# --- passwords, Redis


async def test_an_address_is_shown_without_its_password(settings: Settings, connection: asyncpg.Connection) -> None:
    url = SecretStr("postgresql://someone:hunter2@127.0.0.1:1/rowlock?password=hunter2")
    async with an_api_on(settings.model_copy(update={"database_url": url}), connection) as api:
        for path in ("/health", JOBS):
            answer = await api.get(path)
            check_problem(answer, 503, "postgresql://127.0.0.1:1/rowlock")
            assert b"hunter2" not in answer.body
            assert b"someone" not in answer.body


async def test_without_redis_only_time_is_lost(
    settings: Settings, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    alone = settings.model_copy(update={"redis_url": SecretStr("redis://:hunter2@127.0.0.1:1/0")})
    async with an_api_on(alone, connection) as api:
        await answers(api)
        await register(connection, a_node())
        attempt = await give(connection, (await api.submit())["job_id"])
        assert await start(connection, attempt)
        answer = await api.ask("DELETE", f"{JOBS}/{attempt.job_id}")
        assert (answer.status, answer.json["state"]) == (202, "RUNNING")
        assert answer.json["cancel_requested_time"]

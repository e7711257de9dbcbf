"""PostgreSQL or Redis away: said with 503, survived, and over by itself; nothing is stored by halves."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from pydantic import SecretStr

from core.db.connection import Pool
from core.settings import Settings
from services.api import database as api_database
from services.api.app import ROUTES
from tests.api import JOBS, PATIENCE, Answer, Api, check_problem, serving
from tests.builders import a_node, give, register, start
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


async def check_everything_is_unavailable(api: Api, detail: str) -> None:
    for method, pattern, _ in ROUTES:
        path = pattern.replace("{job_id}", "1").replace("{name:[^/]+}", "n1")
        if path == "/":
            continue
        bodies = {("POST", JOBS): {"job": {"account": "test"}, "script": "#!/bin/sh\n"}}
        body = {"state": "RESUME"} if method == "PATCH" else bodies.get((method, path))
        answer = await api.ask(method, path, json=body)
        check_problem(answer, 503, detail if path == "/health" else "PostgreSQL")
        assert int(answer.headers["Retry-After"]) > 0
    assert (await api.get("/")).status == 200


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


@pytest.mark.parametrize(
    ("word", "fault", "detail", "kept"),
    [
        # Prepared, then run: its values come with the run, whose answer is that of the commit.
        (b"INSERT INTO jobs", Fault.CUT_BEFORE, "may have been stored", 0),
        (b"INSERT INTO jobs", Fault.CUT_AFTER, "may have been stored", 0),
        (b"the account", Fault.CUT_BEFORE, "may have been stored", 0),
        (b"the account", Fault.CUT_AFTER, "may have been stored", 1),
    ],
)
async def test_a_submission_is_stored_as_a_whole_or_not_at_all(
    wired: Settings, wire: Proxy, connection: asyncpg.Connection, word: bytes, fault: Fault, detail: str, kept: int
) -> None:
    async with an_api_on(wired, connection) as api:
        await answers(api)
        wire.at(word, fault, away=True)
        answer = await api.post({"job": {"account": "the account"}, "script": "#!/bin/sh\n"})
        check_problem(answer, 503, detail)
        assert answer.headers["Retry-After"]
        await wire.mend()
        await answers(api)
        for table in ("jobs", "job_specs", "pending", "job_events"):
            assert await connection.fetchval(f"SELECT count(*) FROM {table}") == kept
        await api.submit()


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

"""PostgreSQL or Redis away: said with 503, survived, and over by itself; nothing is stored by halves."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

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

pytestmark = pytest.mark.anyio

# What a wire does with what a client says: nothing, or it is cut before it arrives, or before its answer does.
BEFORE, AFTER = "before", "after"


class Wire:
    """A wire to PostgreSQL that can be cut and mended."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)
        self._server: asyncio.Server | None = None
        self._ends: set[asyncio.StreamWriter] = set()
        self._trap: tuple[bytes, str] | None = None
        self.port = 0
        self.silent = False

    @property
    def url(self) -> str:
        """The database at the other end."""
        account, at, _ = self._url.netloc.rpartition("@")
        return urlunsplit(self._url._replace(netloc=f"{account}{at}127.0.0.1:{self.port}", query=""))

    async def mend(self) -> None:
        """Let connections through again."""
        self.silent, self._trap = False, None
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """End every connection and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for end in list(self._ends):
            end.transport.abort()

    def cut_at(self, word: bytes, when: str) -> None:
        """Cut at the next time that a client says the word."""
        self._trap = word, when

    async def _far_end(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        query = parse_qs(self._url.query)
        host = self._url.hostname or query.get("host", ["localhost"])[0]
        port = self._url.port or int(query.get("port", ["5432"])[0])
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await self._far_end()
        ends = {writer, far_writer}
        self._ends |= ends
        with suppress(ConnectionError):
            await asyncio.gather(self._forth(reader, far_writer), self._back(far_reader, writer))
        self._ends -= ends
        for end in ends:
            end.close()

    async def _forth(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            word, when = self._trap or (None, None)
            if word is not None and word in data:
                if when == AFTER:
                    self.silent = True
                    writer.write(data)
                else:
                    await self.cut()
                    return
            else:
                writer.write(data)
        writer.close()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self._trap is not None and self.silent:
                await self.cut()
                return
            if not self.silent:
                writer.write(data)
        writer.close()


@pytest.fixture
async def wire(database_url: str) -> AsyncIterator[Wire]:
    found = Wire(database_url)
    await found.mend()
    yield found
    await found.cut()
    await asyncio.sleep(0)


@pytest.fixture
def wired(settings: Settings, wire: Wire) -> Settings:
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
    wired: Settings, wire: Wire, connection: asyncpg.Connection
) -> None:
    await wire.cut()
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


async def test_postgres_goes_and_comes_back(wired: Settings, wire: Wire, connection: asyncpg.Connection) -> None:
    async with an_api_on(wired, connection) as api:
        await answers(api)
        first = await api.submit()
        await wire.cut()
        await check_everything_is_unavailable(api, f"127.0.0.1:{wire.port}")
        await wire.mend()
        await answers(api)
        assert await api.job(first["job_id"]) == first
        assert await connection.fetchval("SELECT count(*) FROM jobs") == 1
        await api.submit()


async def test_bad_requests_are_told_so_while_postgres_is_away(
    wired: Settings, wire: Wire, connection: asyncpg.Connection
) -> None:
    await wire.cut()
    async with an_api_on(wired, connection) as api:
        check_problem(await api.post({"job": {}}), 422)
        check_problem(await api.get(f"{JOBS}?limit=0"), 422)
        check_problem(await api.get("/nowhere"), 404)


@pytest.mark.parametrize(
    ("word", "when", "detail", "kept"),
    [
        # Prepared, then run: its values come with the run, whose answer is that of the commit.
        (b"INSERT INTO jobs", BEFORE, "may have been stored", 0),
        (b"INSERT INTO jobs", AFTER, "may have been stored", 0),
        (b"the account", BEFORE, "may have been stored", 0),
        (b"the account", AFTER, "may have been stored", 1),
    ],
)
async def test_a_submission_is_stored_as_a_whole_or_not_at_all(
    wired: Settings, wire: Wire, connection: asyncpg.Connection, word: bytes, when: str, detail: str, kept: int
) -> None:
    async with an_api_on(wired, connection) as api:
        await answers(api)
        wire.cut_at(word, when)
        answer = await api.post({"job": {"account": "the account"}, "script": "#!/bin/sh\n"})
        check_problem(answer, 503, detail)
        assert answer.headers["Retry-After"]
        await wire.mend()
        await answers(api)
        for table in ("jobs", "job_specs", "pending", "job_events"):
            assert await connection.fetchval(f"SELECT count(*) FROM {table}") == kept
        await api.submit()


async def test_postgres_goes_before_the_scheduler_is_told(
    wired: Settings, wire: Wire, connection: asyncpg.Connection
) -> None:
    async with an_api_on(wired, connection) as api:
        await answers(api)
        wire.cut_at(b"NOTIFY", BEFORE)
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
    wired: Settings, wire: Wire, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_database, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(api_database, "CLOSE_SECONDS", 0.1)
    async with an_api_on(wired, connection) as api:
        await answers(api)
        wire.silent = True
        check_problem(await api.get("/health"), 503, "is away")
        wire.silent = False
        await wire.cut()
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

"""Real servers for every test that needs them: embedded ones, or those that the environment names.

``TEST_DATABASE_URL`` (a role that may create databases) and ``TEST_REDIS_URL`` (a database that may be emptied).
"""

import asyncio
import gc
import itertools
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from redis.asyncio import Redis

from core import streams
from core.db import schema
from core.db.audit import audit
from core.db.connection import Pool, open_pool
from core.settings import Settings, usable_cpus
from services.standalone.embedded import EmbeddedPostgres, EmbeddedRedis
from services.worker.node import Node
from tests.builders import LONG, settings_for
from tests.workers import joined

_numbers = itertools.count(1)

MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of the session's own in it, 0700
PREFIX = "rowlock-tests-"
ROOM_BYTES = 2 * 1024**3
MOST_PROCESSES = 8
"""Each has servers of its own."""


def pytest_collection_finish() -> None:
    """What was collected stays: no collection of garbage looks through it again."""
    gc.freeze()


def pytest_xdist_auto_num_workers() -> int:
    """A process of the tests for every CPU; a single one where they would share a Redis, as tests empty it."""
    return 1 if os.environ.get("TEST_REDIS_URL") else min(usable_cpus(), MOST_PROCESSES)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def server_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the servers keep their files: in memory where there is room, as a database a test is 300 files."""
    if not MEMORY.is_dir() or not os.access(MEMORY, os.W_OK) or shutil.disk_usage(MEMORY).free < ROOM_BYTES:
        folder = tmp_path_factory.mktemp("servers")
        folder.chmod(0o700)
        yield folder
        return
    for left in MEMORY.glob(f"{PREFIX}*"):  # by a session that was killed
        if not Path(f"/proc/{left.name.removeprefix(PREFIX)}").exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = MEMORY / f"{PREFIX}{os.getpid()}"
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def with_cluster(server_dir: Path) -> Callable[[Path], Path]:
    """Makes a folder in which an embedded PostgreSQL finds its cluster: copied, as initdb takes a second."""
    made = EmbeddedPostgres(server_dir / "made", throwaway=True)

    async def make() -> None:
        async with made:
            pass

    def copy(folder: Path) -> Path:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copytree(made.cluster, folder / made.cluster.name)
        return folder

    asyncio.run(make())
    return copy


@pytest.fixture(scope="session")
def postgres_url(server_dir: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A server in which databases may be created."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        yield given
        return
    folder = request.getfixturevalue("with_cluster")(server_dir)
    server = EmbeddedPostgres(folder, throwaway=True, options={"fsync": "off", "max_connections": "200"})
    asyncio.run(server.start())
    yield server.url
    asyncio.run(server.stop())


@pytest.fixture(scope="session")
def redis_url(server_dir: Path) -> Iterator[str]:
    if given := os.environ.get("TEST_REDIS_URL"):
        yield given
        return
    server = EmbeddedRedis(server_dir)
    asyncio.run(server.start())
    yield server.url
    asyncio.run(server.stop())


# What the catalogs say of what stands in it: any change of that has a transaction of its own.
_SHAPE = """
SELECT concat_ws(' ', (SELECT max(xmin::text::bigint) FROM pg_attribute), (SELECT count(*) FROM pg_attribute),
    (SELECT max(xmin::text::bigint) FROM pg_constraint), (SELECT count(*) FROM pg_constraint),
    (SELECT max(xmin::text::bigint) FROM pg_type), (SELECT count(*) FROM pg_type),
    (SELECT max(xmin::text::bigint) FROM pg_proc), (SELECT count(*) FROM pg_proc),
    (SELECT max(xmin::text::bigint) FROM pg_trigger), (SELECT count(*) FROM pg_trigger),
    (SELECT max(xmin::text::bigint) FROM pg_sequence), (SELECT max(xmin::text::bigint) FROM pg_namespace),
    (SELECT string_agg(concat(relname, relacl, reloptions), ' ' ORDER BY oid) FROM pg_class WHERE oid >= 16384),
    (SELECT string_agg(rowlock_schema::text, ' ') FROM rowlock_schema),
    (SELECT count(*) FROM pg_db_role_setting))
"""

_TABLES = """
SELECT string_agg(relname, ', ') FROM pg_class
WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname <> 'rowlock_schema'
"""

_END_OTHERS = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


@dataclass(slots=True)
class Databases:
    """Makes databases from a template that holds the schema."""

    url: str
    template: str
    strategy: str
    """How the server copies. As files is three times as fast, where it need not wait for a disk to have them."""
    emptied: list[str] = field(default_factory=list)
    """Those that a test has left as it had found them: to empty one takes a fifth of making and dropping it."""
    shape: str = ""
    """What the catalogs of the template say, and of any database that is still what it is."""
    emptying: str = ""
    """The statement that leaves no row."""

    def url_of(self, name: str) -> str:
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))

    async def execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self.url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def create(self, template: str | None = None) -> str:
        """A database with the schema in it, or a copy of `template`."""
        name = f"rowlock_test_{os.getpid()}_{next(_numbers)}"
        await self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template or self.template}" STRATEGY {self.strategy}')
        return name

    async def drop(self, name: str) -> None:
        await self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    @asynccontextmanager
    async def one(self) -> AsyncIterator[str]:
        """The address of a database with the schema in it; whatever was done, at the end no invariant is broken."""
        name = await self._take() or await self.create()
        url = self.url_of(name)
        kept = False
        try:
            yield url
            connection = await asyncpg.connect(url)
            try:
                assert await audit(connection) == []
                kept = await self._empty(connection)
            finally:
                await connection.close()
        finally:
            if kept:
                self.emptied.append(name)
            else:
                await self.drop(name)

    async def _take(self) -> str | None:
        """One that was emptied, under a new name: what an earlier test may have left does not find it."""
        while self.emptied:
            old, name = self.emptied.pop(), f"rowlock_test_{os.getpid()}_{next(_numbers)}"
            try:
                await self.execute(f'ALTER DATABASE "{old}" RENAME TO "{name}"')
            except asyncpg.ObjectInUseError:  # something that an earlier test has left
                await self.drop(old)
            else:
                return name
        return None

    async def _empty(self, connection: asyncpg.Connection) -> bool:
        """Leave nothing in a database, and nobody; False when it is not what the template is any more."""
        async with asyncio.timeout(LONG):
            while await connection.fetchval(_END_OTHERS):  # noqa: ASYNC110 - they end by themselves
                await asyncio.sleep(0.005)
        try:
            if await connection.fetchval(_SHAPE) != self.shape:
                return False
            await connection.execute(self.emptying)
            await connection.execute("SELECT pg_stat_reset()")
        except (asyncpg.UndefinedTableError, asyncpg.InsufficientPrivilegeError):
            return False
        return True

    async def make_template(self) -> None:
        await self.execute(f'CREATE DATABASE "{self.template}"')
        connection = await asyncpg.connect(self.url_of(self.template))
        try:
            await connection.execute(schema.fresh_schema())
            self.shape = await connection.fetchval(_SHAPE)
            self.emptying = f"TRUNCATE {await connection.fetchval(_TABLES)} RESTART IDENTITY"
        finally:
            await connection.close()


@pytest.fixture(scope="session")
def databases(postgres_url: str) -> Iterator[Databases]:
    strategy = "WAL_LOG" if os.environ.get("TEST_DATABASE_URL") else "FILE_COPY"
    found = Databases(postgres_url, f"rowlock_template_{os.getpid()}", strategy)
    asyncio.run(found.make_template())
    yield found
    for name in (*found.emptied, found.template):
        asyncio.run(found.drop(name))


@pytest.fixture
async def database_url(databases: Databases) -> AsyncIterator[str]:
    """A database of the test's own."""
    async with databases.one() as url:
        yield url


@pytest.fixture
async def empty_url(databases: Databases) -> AsyncIterator[str]:
    """A database of the test's own with nothing in it."""
    name = await databases.create("template1")
    yield databases.url_of(name)
    await databases.drop(name)


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """Settings of a whole system in the test's own folder and database."""
    return settings_for(database_url, redis_url, tmp_path)


@pytest.fixture
async def connection(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    """A look into the test's database."""
    found = await asyncpg.connect(settings.postgres_dsn)
    yield found
    await found.close()


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[Pool]:
    """Connections to the test's database, as a role opens them."""
    found = await open_pool(settings, "test", 8)
    yield found
    found.terminate()


@pytest.fixture
async def two(pool: Pool) -> AsyncIterator[tuple[Any, Any]]:
    """Two connections that race. Their lock time-out is off: on a slow machine a test must not lose its waiter."""
    async with pool.acquire() as one, pool.acquire() as other:
        for racer in (one, other):
            await racer.execute("SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0")
        yield one, other


@pytest.fixture
async def node(settings: Settings, pool: Pool, tmp_path: Path, connection: asyncpg.Connection) -> Node:
    return await joined(settings, pool, tmp_path, connection)


@pytest.fixture
async def redis_client(settings: Settings) -> AsyncIterator[Redis]:
    """A client of an emptied Redis, as a role connects."""
    found = streams.connect(settings)
    await found.flushdb()
    yield found
    await found.aclose()

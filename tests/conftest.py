"""Real servers for every test that needs them: embedded ones, or those that the environment names.

``TEST_DATABASE_URL`` (a role that may create databases) and ``TEST_REDIS_URL`` (a database that may be emptied).
"""

import asyncio
import itertools
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from core import streams
from core.db import schema
from core.db.audit import audit
from core.db.connection import Pool, open_pool
from core.settings import Settings
from services.standalone.embedded import EmbeddedPostgres, EmbeddedRedis

_numbers = itertools.count(1)

MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of the session's own in it, 0700
PREFIX = "rowlock-tests-"
ROOM_BYTES = 2 * 1024**3


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
def postgres_url(server_dir: Path) -> Iterator[str]:
    """A server in which databases may be created."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        yield given
        return
    server = EmbeddedPostgres(server_dir, throwaway=True, options={"fsync": "off", "max_connections": "200"})
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


@dataclass(frozen=True, slots=True)
class Databases:
    """Makes databases from a template that holds the schema."""

    url: str
    template: str

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
        await self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template or self.template}"')
        return name

    async def drop(self, name: str) -> None:
        await self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    async def make_template(self) -> None:
        await self.execute(f'CREATE DATABASE "{self.template}"')
        connection = await asyncpg.connect(self.url_of(self.template))
        try:
            await connection.execute(schema.fresh_schema())
        finally:
            await connection.close()


@pytest.fixture(scope="session")
def databases(postgres_url: str) -> Iterator[Databases]:
    found = Databases(postgres_url, f"rowlock_template_{os.getpid()}")
    asyncio.run(found.make_template())
    yield found
    asyncio.run(found.drop(found.template))


@pytest.fixture
async def database_url(databases: Databases) -> AsyncIterator[str]:
    """A database of the test's own with the schema in it; whatever the test did, no invariant is broken at its end."""
    name = await databases.create()
    yield databases.url_of(name)
    try:
        connection = await asyncpg.connect(databases.url_of(name))
        try:
            assert await audit(connection) == []
        finally:
            await connection.close()
    finally:
        await databases.drop(name)


@pytest.fixture
async def empty_url(databases: Databases) -> AsyncIterator[str]:
    """A database of the test's own with nothing in it."""
    name = await databases.create("template1")
    yield databases.url_of(name)
    await databases.drop(name)


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """Settings of a whole system in the test's own folder and database, whatever the environment says."""
    changed = {
        "database_url": SecretStr(database_url),
        "redis_url": SecretStr(redis_url),
        "api_port": 0,
        "data_dir": tmp_path / "data",
        "log_dir": tmp_path / "logs",
        "node_name": "n1",
        "total_cpus": 4,
        "kill_grace_seconds": 1.0,
        "poll_seconds": 0.2,
    }
    return Settings.model_construct().model_copy(update=changed)


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
async def redis_client(settings: Settings) -> AsyncIterator[Redis]:
    """A client of an emptied Redis, as a role connects."""
    found = streams.connect(settings)
    await found.flushdb()
    yield found
    await found.aclose()

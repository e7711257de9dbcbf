"""PostgreSQL as the API sees it: opened in the background, and away is an answer, not a crash."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import asyncpg

from core.db import schema
from core.db.connection import (
    CONNECTION_ERRORS,
    PLANNED_ONCE,
    Connection,
    Line,
    Pool,
    check_safe,
    connect,
    describe,
    open_pool,
)
from core.errors import SchemaMismatch, Unavailable, UnsafeServer
from core.settings import Settings, without_secrets
from core.wakeup import Wakeup

POOL_SIZE = 8
ACQUIRE_SECONDS = 5
CLOSE_SECONDS = 3
LOOK_SECONDS = 3
LOOK_AGAIN_SECONDS = 10

# Tables that are not there (any more), or not ours to use: the database was emptied, or is being migrated.
UNFIT = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.InvalidCachedStatementError,
)


class Database:
    """A pool that may not be there yet, and lines. Every way of being away is `Unavailable` to those who use them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._address = without_secrets(settings.postgres_dsn)
        self._pool: Pool | None = None
        self._store = Line(settings, "api", **PLANNED_ONCE)
        self._bell = Line(settings, "api")
        self._lists = Line(settings, "api", **PLANNED_ONCE)
        self._watch = Line(settings, "api", **PLANNED_ONCE)
        self._fits = False
        self._doubt = Wakeup()

    async def keep_open(self) -> None:
        """Wait for the server, then for the schema; again for the schema when it turns out not to fit."""
        self._pool = await open_pool(self._settings, "api", POOL_SIZE)
        while True:
            await schema.ensure(self._pool)
            self._fits = True
            while not await self._doubt.wait(LOOK_AGAIN_SECONDS):
                with suppress(Unavailable):
                    await self.check()
            self._fits = False

    @property
    def is_open(self) -> bool:
        """Whether there is something to ask; it may be away all the same."""
        return self._pool is not None and self._fits

    def connection(self) -> AbstractAsyncContextManager[Connection]:
        """A connection for SQL alone. Unavailable when PostgreSQL is away, at whatever moment it went."""
        return self._acquired(self._pool)

    def store(self) -> AbstractAsyncContextManager[Connection]:
        """The one that submissions are stored on: PLANNED_ONCE, which no list with its filters could be."""
        return self._acquired(self._store)

    def lists(self) -> AbstractAsyncContextManager[Connection]:
        """The one that lists of submissions are stored on."""
        return self._acquired(self._lists)

    def watch(self) -> AbstractAsyncContextManager[Connection]:
        """The one on which long polls look at jobs."""
        return self._acquired(self._watch)

    def bell(self) -> AbstractAsyncContextManager[Connection]:
        """The one that notifications are sent on."""
        return self._acquired(self._bell)

    @asynccontextmanager
    async def _acquired(self, source: Pool | Line | None) -> AsyncIterator[Connection]:
        if source is None or not self._fits:
            raise Unavailable(f"PostgreSQL at {self._address} cannot be used yet: GET /health says why")
        try:
            acquired = source.acquire() if isinstance(source, Line) else source.acquire(timeout=ACQUIRE_SECONDS)
            async with acquired as connection:
                yield connection
        except ValueError:  # asyncpg's word for data that does not fit is also one of its connection errors
            raise
        except UNFIT as error:
            self._doubt.set()
            raise Unavailable(f"the database does not hold this schema: {describe(error)}") from error
        except CONNECTION_ERRORS as error:
            raise self._unavailable(error) from error

    async def check(self) -> None:
        """Raise Unavailable, saying what is wrong, unless PostgreSQL answers, the schema fits, and jobs are taken."""
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await self._look()
        except (SchemaMismatch, *UNFIT) as error:
            raise Unavailable(describe(error)) from error
        except CONNECTION_ERRORS as error:
            if isinstance(error, UnsafeServer):
                await self._let_go()
            raise self._unavailable(error) from error
        if not self.is_open:
            raise Unavailable(f"PostgreSQL at {self._address} answers, and will be used in a moment")

    async def _let_go(self) -> None:
        """Use no connection any more that was opened to a safe server: each new one is looked at."""
        self._close_lines()
        if self._pool is not None:
            await self._pool.expire_connections()

    def _unavailable(self, error: BaseException) -> Unavailable:
        how = "refused" if isinstance(error, UnsafeServer) else "away"
        return Unavailable(f"PostgreSQL at {self._address} is {how}: {describe(error)}")

    async def _look(self) -> None:
        if self._pool is not None:
            async with self._pool.acquire(timeout=LOOK_SECONDS) as connection:
                await check_safe(connection, self._settings)
                await schema.check(connection)
            return
        alone = await connect(self._settings, "api")
        try:
            await schema.check(alone)
        finally:
            alone.terminate()

    def _close_lines(self) -> None:
        for line in (self._store, self._bell, self._lists, self._watch):
            line.close()

    async def close(self) -> None:
        """Close the pool in order, or in haste when something still holds it."""
        self._close_lines()
        if self._pool is None:
            return
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._pool.close()
        except CONNECTION_ERRORS:
            self._pool.terminate()

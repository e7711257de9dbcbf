"""Connections to PostgreSQL: their settings, their errors, and waiting for a server that is not there yet."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import asyncpg
import structlog

from core.cancellation import pause
from core.errors import UnsafeServer
from core.settings import Settings, without_secrets

Connection = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy
Pool = asyncpg.Pool

# The channel that wakes the scheduler: jobs arrived, or CPUs came back.
WAKE_CHANNEL = "rowlock_wake"

CONNECT_SECONDS = 5
COMMAND_SECONDS = 15
RETRY_SECONDS = 0.5

# Nobody may stop the cluster by stopping: the server ends what fell silent, and durability is not a server default.
SESSION = {
    "synchronous_commit": "on",
    "idle_in_transaction_session_timeout": "5s",
    "lock_timeout": "2s",
    "statement_timeout": "10s",
    "tcp_user_timeout": "10s",
    "timezone": "UTC",
    # What is hot is in memory: without this a large batch reads the whole queue. Nothing here is worth compiling.
    "random_page_cost": "1.1",
    "jit": "off",
}

# For who runs the same few statements for ever: each is planned once, for any values, into walks along indexes, which
# hold at any size of the tables. To plan anew, for the very values, costs as much as to run (tests hold the plans).
PLANNED_ONCE = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}

# What says that the server is away, or busy, and not that the statement was wrong.
CONNECTION_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a backend that was ended in the middle of an answer
    asyncpg.ObjectNotInPrerequisiteStateError,  # the database takes no connections now
    asyncpg.OperatorInterventionError,  # shutdown, crash, "the database system is starting up"
    asyncpg.InsufficientResourcesError,  # too many connections, disk full
    asyncpg.LockNotAvailableError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,  # the database is not created yet
    asyncpg.ReadOnlySQLTransactionError,  # a standby not promoted yet
    UnsafeServer,  # waited for like one that is away: a promotion or a mended setting heals it
)


def _options(settings: Settings, role: str, **more: str) -> dict[str, Any]:
    return {
        "dsn": settings.postgres_dsn,
        "timeout": CONNECT_SECONDS,
        "command_timeout": COMMAND_SECONDS,
        "max_cached_statement_lifetime": 0,
        "server_settings": {**SESSION, "application_name": application_name(role), **more},
    }


def application_name(role: str) -> str:
    """The name a role on this host carries in pg_stat_activity; its health check looks for it."""
    return f"rowlock {role} {socket.gethostname()}"[:63]


async def connect(settings: Settings, role: str, **more: str) -> asyncpg.Connection:
    """Open one connection; `more` are server settings of its own."""
    return await _opened(settings, **_options(settings, role, **more))


_TYPES = "SELECT $1::int[], $2::bigint[], $3::bool[]"


async def _opened(settings: Settings, *arguments: Any, **options: Any) -> asyncpg.Connection:
    """Connect, hold the server to what it must be, and let asyncpg learn what types are: for this it asks, for 10 ms.

    Not as a pool's `init`: to close a connection that fails there, asyncpg waits, and a cancellation of that is lost.
    """
    connection: asyncpg.Connection = await asyncpg.connect(*arguments, **options)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):  # or a server that falls silent now holds up whoever opens it
            await check_safe(connection, settings)
            await connection.fetch(_TYPES, [], [], [])
    except BaseException:
        connection.terminate()
        raise
    return connection


async def open_pool(
    settings: Settings, role: str, size: int, command_seconds: float = COMMAND_SECONDS, /, **more: str
) -> Pool:
    """Open a pool of at most `size` connections, waiting for the server as long as it takes.

    A connection that is silent for `command_seconds` is given up after as long again, in which asyncpg tries to take
    the command back. `more` are server settings of its own, PLANNED_ONCE for instance.
    """
    log = structlog.get_logger()
    said = ""
    options = {
        **_options(settings, role, **more),
        "command_timeout": command_seconds,
        "connect": partial(_opened, settings),
        "max_inactive_connection_lifetime": 0,
    }

    while True:
        try:
            return await asyncpg.create_pool(**options, min_size=1, max_size=size, reset=_keep)
        except CONNECTION_ERRORS as error:
            problem = describe(error)
            if problem != said:
                event = "postgres_unsafe" if isinstance(error, UnsafeServer) else "postgres_unreachable"
                log.warning(event, address=without_secrets(settings.postgres_dsn), error=problem)
                said = problem
            await pause(RETRY_SECONDS)


_SAFETY = "SELECT current_setting('fsync'), current_setting('full_page_writes'), pg_is_in_recovery()"


async def check_safe(connection: Connection, settings: Settings) -> None:
    """Raise UnsafeServer when what the server commits may be lost, unless UNSAFE was said.

    Asked of every new connection: a failover and a restart end the old ones. A reload of the server's settings does
    not, so the leading scheduler and the API ask again now and then.
    """
    if settings.unsafe:
        return
    row = await connection.fetchrow(_SAFETY)
    assert row is not None
    if problem := risk(*row):
        raise UnsafeServer(problem)


def risk(fsync: str, full_page_writes: str, in_recovery: bool) -> str | None:
    """Why what a server with these settings commits may be lost, and what would be right."""
    if in_recovery:
        return "it is in recovery, as a standby is: it should be the primary, or be promoted"
    for name, value in (("fsync", fsync), ("full_page_writes", full_page_writes)):
        if value != "on":
            return f"{name}={value} loses accepted jobs when its machine crashes: should be on, unless --unsafe is said"
    return None


async def _keep(_: Connection) -> None:
    """Nothing is reset between two uses, which would be one more round trip for each: no use changes a session."""


class Line:
    """A connection that one duty keeps: a pool's acquire and release cost twice what a small statement does.

    Opened at its first use, and anew after an error that leaves in doubt what it is good for.
    """

    def __init__(self, settings: Settings, role: str, **more: str) -> None:
        """`more` are server settings of its own."""
        self._settings, self._role, self._more = settings, role, more
        self._connection: asyncpg.Connection | None = None

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        """The connection, for one user at a time."""
        if self._connection is None or self._connection.is_closed():
            self._connection = await connect(self._settings, self._role, **self._more)
        try:
            yield self._connection
        except (ValueError, asyncpg.DataError, asyncpg.IntegrityConstraintViolationError):
            raise  # the statement was wrong, and nothing else
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close it without a word."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


def describe(error: BaseException) -> str:
    """The error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def is_refusal(error: BaseException | None) -> bool:
    """Whether the server itself has said that a statement failed: nothing of it stays. All else leaves that open."""
    return isinstance(error, asyncpg.PostgresError) and error.severity_en == "ERROR"


_END_BACKEND = """
SELECT coalesce(bool_and(pg_terminate_backend(pid, $2)), true) FROM pg_stat_activity
WHERE pid = $1 AND pid <> pg_backend_pid() AND application_name = current_setting('application_name')
"""


async def end_backend(connection: Connection, pid: int, seconds: float) -> bool:
    """See to it that a backend of this role's that was lost is at an end, so that what it did not do it never will.

    False when it is not within `seconds`. What arrives late, from a network that held it up, finds nobody.
    """
    return bool(await connection.fetchval(_END_BACKEND, pid, int(seconds * 1000)))


NOTIFY = f"NOTIFY {WAKE_CHANNEL}"


async def notify(connection: Connection) -> None:
    """Wake the scheduler. A statement of its own after the commit: a transaction that has notified commits alone."""
    await connection.execute(NOTIFY)

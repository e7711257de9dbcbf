"""Leading: the advisory lock stands on the LISTEN connection, so that leading and hearing live and die together."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import asyncpg
import structlog

from core import crash, taken
from core.cancellation import pause
from core.db.connection import (
    CONNECTION_ERRORS,
    RETRY_SECONDS,
    WAKE_CHANNEL,
    check_safe,
    connect,
    describe,
    end_backend,
)
from core.settings import Settings
from core.wakeup import Wakeup
from services.scheduler.allocate import tell

LEADER_KEY = 0x6C6561646572  # "leader"
PROBE_SECONDS = 2
PROBE_TIMEOUT_SECONDS = 5
STAND_BY_SECONDS = 1
# The server itself ends a leader that fell silent, and frees its lock.
SILENCE = "10s"

_TRY_LEAD = "SELECT pg_try_advisory_lock($1)"
_PROBE = "SELECT 1"


async def lead(settings: Settings, wake: Wakeup, duties: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run the duties whenever this process leads, for ever. `wake` is set by notifications and after each reconnect."""
    log = structlog.get_logger()
    said, former = "", None
    while True:
        try:
            connection = await connect(settings, "scheduler", idle_session_timeout=SILENCE)
            try:
                if former is not None:  # lost to us, it may live on at the server, and hold the lock
                    await end_backend(connection, former, PROBE_TIMEOUT_SECONDS)
                former = connection.get_server_pid()
                await _lead_on(connection, settings, wake, duties)
            finally:
                connection.terminate()
        except CONNECTION_ERRORS as error:
            if (problem := describe(error)) != said:
                log.warning("leader_connection_lost", error=problem)
                said = problem
        except BaseExceptionGroup as group:
            lost, other = group.split(CONNECTION_ERRORS)
            if other is not None:
                raise other from None
            log.warning("leader_connection_lost", error=describe(_first(lost)))
        await pause(RETRY_SECONDS)


async def _lead_on(
    connection: asyncpg.Connection,
    settings: Settings,
    wake: Wakeup,
    duties: Sequence[Callable[[], Awaitable[None]]],
) -> None:
    log = structlog.get_logger()
    await connection.add_listener(WAKE_CHANNEL, lambda *_: wake.set())
    standing_by = False
    while not await connection.fetchval(_TRY_LEAD, LEADER_KEY, timeout=PROBE_TIMEOUT_SECONDS):
        if not standing_by:
            log.info("scheduler_stands_by")
            standing_by = True
        await asyncio.sleep(STAND_BY_SECONDS)
    log.info("scheduler_leads")
    await connection.add_listener(taken.CHANNEL, lambda *told: tell(taken.heard(told[-1])))
    crash.here("scheduler.leads")
    wake.set()  # whatever was said while nobody listened
    async with asyncio.TaskGroup() as group:
        for duty in duties:
            group.create_task(_awaited(duty()))
        # Not a member: while the group merely waits for members, the end of one counts as a cancellation of this task
        # for ever (before Python 3.13), which `pause` would take for a stop.
        await _probe(connection, settings)


async def _probe(connection: asyncpg.Connection, settings: Settings) -> None:
    """A LISTEN connection that died says nothing: ask it; and whether the server's settings are still safe."""
    while True:
        async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
            await connection.execute(_PROBE)
            await check_safe(connection, settings)
        await asyncio.sleep(PROBE_SECONDS)


async def _awaited(duty: Awaitable[None]) -> None:
    await duty


def _first(group: BaseExceptionGroup[BaseException] | None) -> BaseException:
    error: BaseException = group if group is not None else RuntimeError()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

"""One connection for one command: what goes wrong on it is told in one line, without a password."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from core.db.connection import CONNECT_SECONDS, CONNECTION_ERRORS, SESSION, application_name, describe
from core.errors import SettingsError, Unavailable
from core.settings import Settings, without_secrets


@asynccontextmanager
async def connected(
    settings: Settings, command: str, *, statement_seconds: float = 0
) -> AsyncIterator[asyncpg.Connection]:
    """A connection whose statements may take `statement_seconds` (0: as long as they take).

    Raises Unavailable when the server cannot be reached or refuses what is asked.
    """
    connection = await _connect(settings, command, statement_seconds)
    try:
        yield connection
        await connection.close(timeout=CONNECT_SECONDS)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise Unavailable(f"PostgreSQL: {describe(error)}") from None
    finally:
        connection.terminate()


async def _connect(settings: Settings, command: str, statement_seconds: float) -> asyncpg.Connection:
    session = {**SESSION, "statement_timeout": f"{statement_seconds:g}s", "application_name": application_name(command)}
    try:
        return await asyncpg.connect(settings.postgres_dsn, timeout=CONNECT_SECONDS, server_settings=session)
    except (asyncpg.exceptions.ClientConfigurationError, ValueError):
        # What asyncpg says of an address that it cannot read may quote a piece of the password.
        raise SettingsError("DATABASE_URL: should be postgresql://USER:PASSWORD@HOST:PORT/DATABASE") from None
    except CONNECTION_ERRORS as error:
        raise Unavailable(f"PostgreSQL at {without_secrets(settings.postgres_dsn)}: {describe(error)}") from None

"""The schema's life: applied to an empty database under an advisory lock, migrated step by step, checked by all."""

import re
from pathlib import Path

import asyncpg
import structlog

from core.cancellation import pause
from core.db.connection import CONNECTION_ERRORS, RETRY_SECONDS, Connection, Pool, describe
from core.errors import SchemaMismatch

VERSION = 1
LOCK_KEY = 0x726F776C6F636B  # "rowlock"
MIGRATIONS = Path(__file__).parent / "migrations"
MIGRATION_SECONDS = 3600

# The second: there is no schema that this role may look into.
NOT_ALLOWED = (asyncpg.InsufficientPrivilegeError, asyncpg.InvalidSchemaNameError)


def fresh_schema() -> str:
    """The text of schema.sql, in a clone or in an installed wheel."""
    here = Path(__file__).resolve()
    for place in (here.parents[2] / "schema.sql", here.parents[1] / "schema.sql"):
        if place.is_file():
            return place.read_text(encoding="utf-8")
    raise FileNotFoundError("schema.sql")


def migrations() -> dict[int, str]:
    """The numbered steps, ``0002_words.sql`` leading to version 2, by the version that they lead to."""
    files = [(re.fullmatch(r"(\d{4})_\w+\.sql", path.name), path) for path in MIGRATIONS.iterdir()]
    return {int(match[1]): path.read_text(encoding="utf-8") for match, path in files if match}


_TABLES = """
SELECT count(*) FROM pg_class c
WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm')
"""
_HAS_VERSION = "SELECT to_regclass('rowlock_schema') IS NOT NULL"
_VERSION = "SELECT max(version) FROM rowlock_schema"


async def version(connection: Connection) -> int | None:
    """The version that the database holds; None when it is empty. SchemaMismatch when it is not Rowlock's."""
    if await connection.fetchval(_HAS_VERSION):
        found: int = await connection.fetchval(_VERSION)
        return found
    if await connection.fetchval(_TABLES):
        raise SchemaMismatch("the database holds tables that are not Rowlock's: give Rowlock a database of its own")
    return None


async def check(connection: Connection) -> None:
    """Raise SchemaMismatch unless the database holds exactly this schema."""
    found = await version(connection)
    if found != VERSION:
        raise SchemaMismatch(
            f"the database holds schema {found or 'none'}, this Rowlock needs {VERSION}:"
            + (" upgrade Rowlock" if found and found > VERSION else " run `rowlock migrate`")
        )


async def migrate(connection: Connection) -> list[int]:
    """Bring the database to this version; answer the versions applied. Whoever comes first does it, others wait."""
    async with connection.transaction():
        await connection.execute(f"SET LOCAL statement_timeout = '{MIGRATION_SECONDS}s'")
        await connection.execute("SET LOCAL lock_timeout = 0")
        await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK_KEY, timeout=MIGRATION_SECONDS)
        found = await version(connection)
        if found is None:
            await connection.execute(fresh_schema(), timeout=MIGRATION_SECONDS)
            return [VERSION]
        if found > VERSION:
            raise SchemaMismatch(f"the database holds schema {found}, this Rowlock knows {VERSION}: upgrade Rowlock")
        steps = migrations()
        for step in range(found + 1, VERSION + 1):
            await connection.execute(steps[step], timeout=MIGRATION_SECONDS)
        return list(range(found + 1, VERSION + 1))


async def ensure(pool: Pool) -> None:
    """Wait until the database holds this schema, applying it where that is possible, naming once what is wrong."""
    log = structlog.get_logger()
    said = ""
    while True:
        try:
            async with pool.acquire() as connection:
                if await version(connection) != VERSION and (applied := await migrate(connection)):
                    log.info("schema_applied", versions=applied)
            return
        except (SchemaMismatch, *NOT_ALLOWED, *CONNECTION_ERRORS) as error:
            if (problem := describe(error)) != said:
                log.warning("schema_not_ready", error=problem)
                said = problem
            await pause(RETRY_SECONDS)

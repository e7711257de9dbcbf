"""The schema's life: applied once by whoever comes first, migrated step by step, refused when it is not ours."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs

from core.db import schema
from core.db.connection import Pool
from core.errors import SchemaMismatch
from tests.builders import a_job, a_node, allocate, finish, register, start, submit

pytestmark = pytest.mark.anyio

STORED = Path(__file__).parent / "data"
LONG = 30  # seconds within which something surely happens


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "RETRY_SECONDS", 0.05)


@pytest.fixture
async def empty(empty_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a database with nothing in it."""
    connection = await asyncpg.connect(empty_url)
    yield connection
    await connection.close()


@pytest.fixture
async def empty_pool(empty_url: str) -> AsyncIterator[Pool]:
    async with asyncpg.create_pool(empty_url, min_size=1, max_size=2) as pool:
        yield pool


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG):
        while not true():  # noqa: ASYNC110 - a log has no event
            await asyncio.sleep(0.01)


# What check, migrate and ensure do with each kind of database


async def test_an_empty_database(empty: asyncpg.Connection) -> None:
    assert await schema.version(empty) is None
    with pytest.raises(SchemaMismatch, match=r"holds schema none.*run `rowlock migrate`"):
        await schema.check(empty)
    assert await schema.migrate(empty) == [schema.VERSION]
    assert await schema.version(empty) == schema.VERSION
    await schema.check(empty)


async def test_the_right_schema_is_left_alone(connection: asyncpg.Connection, pool: Pool) -> None:
    before = await catalog(connection)
    assert await schema.migrate(connection) == []
    with capture_logs() as logs:
        await schema.ensure(pool)
    assert logs == []
    assert await catalog(connection) == before


async def test_a_newer_schema_is_named_and_left_alone(connection: asyncpg.Connection) -> None:
    newer = schema.VERSION + 1
    await connection.execute("INSERT INTO rowlock_schema (version) VALUES ($1)", newer)
    for refuse in (schema.check, schema.migrate):
        with pytest.raises(SchemaMismatch, match=f"holds schema {newer}.*upgrade Rowlock"):
            await refuse(connection)


@pytest.mark.parametrize("foreign", ["TABLE orders (id int)", "VIEW orders AS SELECT 1 AS id"])
async def test_a_foreign_database_is_named_and_left_alone(empty: asyncpg.Connection, foreign: str) -> None:
    await empty.execute(f"CREATE {foreign}")
    before = await catalog(empty)
    for refuse in (schema.version, schema.check, schema.migrate):
        with pytest.raises(SchemaMismatch, match="tables that are not Rowlock's"):
            await refuse(empty)
    assert await catalog(empty) == before


async def ensured(pool: Pool, mend: Callable[[], Awaitable[object]]) -> list[MutableMapping[str, Any]]:
    """What `ensure` says about a database until it is mended, and after."""
    with capture_logs() as logs:
        task = asyncio.create_task(schema.ensure(pool))
        await until(lambda: task.done() or bool(logs))
        await asyncio.sleep(2.2 * schema.RETRY_SECONDS)  # it looks again, and has nothing new to say
        assert not task.done()
        await mend()
        async with asyncio.timeout(LONG):
            await task
    return logs


async def test_ensure_applies_the_schema(empty: asyncpg.Connection, empty_pool: Pool) -> None:
    with capture_logs() as logs:
        await schema.ensure(empty_pool)
    assert [(log["event"], log["versions"]) for log in logs] == [("schema_applied", [schema.VERSION])]
    await schema.check(empty)


async def test_ensure_names_a_newer_schema_once_and_waits_for_it(connection: asyncpg.Connection, pool: Pool) -> None:
    await connection.execute("INSERT INTO rowlock_schema (version) VALUES ($1)", schema.VERSION + 1)
    back = "DELETE FROM rowlock_schema WHERE version > $1"
    [log] = await ensured(pool, lambda: connection.execute(back, schema.VERSION))
    assert log["event"] == "schema_not_ready"
    assert "upgrade Rowlock" in log["error"]


async def test_ensure_names_a_foreign_database_once_and_waits_for_it(
    empty: asyncpg.Connection, empty_pool: Pool
) -> None:
    await empty.execute("CREATE TABLE orders (id int)")
    refused, applied = await ensured(empty_pool, lambda: empty.execute("DROP TABLE orders"))
    assert "not Rowlock's" in refused["error"]
    assert applied["event"] == "schema_applied"


@pytest.fixture
async def application(empty_url: str) -> AsyncIterator[str]:
    """A role that may use tables and create nothing."""
    name = f"rowlock_application_{os.getpid()}"
    connection = await asyncpg.connect(empty_url)
    try:
        try:
            await connection.execute(f"CREATE ROLE {name}")
        except asyncpg.InsufficientPrivilegeError:
            pytest.skip("the server's role may not create roles")
        yield name
        await connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")
    finally:
        await connection.close()


async def test_only_migrate_needs_the_right_to_create(
    empty: asyncpg.Connection, empty_url: str, application: str
) -> None:
    """A role without it waits until somebody else has migrated, and then does everything else."""

    async def migrate_and_grant() -> None:
        await schema.migrate(empty)
        await empty.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {application}")
        await empty.execute(f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {application}")

    async with asyncpg.create_pool(empty_url, min_size=1, max_size=1, server_settings={"role": application}) as limited:
        first, *later = await ensured(limited, migrate_and_grant)
        assert "permission denied" in first["error"]
        assert not [log for log in later if log["event"] == "schema_applied"]
        async with limited.acquire() as connection:
            await register(connection, a_node())
            await submit(connection, a_job())
            attempts = await allocate(connection)
            assert len(await start(connection, *attempts)) == 1
            assert await finish(connection, *attempts) == set(attempts)


async def test_a_role_that_may_not_even_look_waits(empty: asyncpg.Connection, empty_url: str, application: str) -> None:
    await empty.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    async with asyncpg.create_pool(empty_url, min_size=1, max_size=1, server_settings={"role": application}) as limited:
        grant = f"GRANT CREATE, USAGE ON SCHEMA public TO {application}"
        refused, applied = await ensured(limited, lambda: empty.execute(grant))
        assert [refused["event"], applied["event"]] == ["schema_not_ready", "schema_applied"]


async def test_of_many_at_once_exactly_one_applies_it(empty_url: str) -> None:
    connections = [await asyncpg.connect(empty_url) for _ in range(12)]
    try:
        applied = await asyncio.gather(*(schema.migrate(connection) for connection in connections))
        assert sorted(applied) == [[]] * 11 + [[schema.VERSION]]
        assert await connections[0].fetchval("SELECT count(*) FROM rowlock_schema") == 1
    finally:
        for connection in connections:
            await connection.close()


async def test_whoever_comes_second_waits_longer_than_the_session_allows(empty_url: str) -> None:
    """A role's sessions have short time-outs; a migration may take its time."""
    impatient = {"lock_timeout": "50ms", "statement_timeout": "100ms"}
    holder, waiter = await asyncpg.connect(empty_url), await asyncpg.connect(empty_url, server_settings=impatient)
    try:
        await holder.execute("SELECT pg_advisory_lock($1)", schema.LOCK_KEY)
        task = asyncio.create_task(schema.migrate(waiter))
        await asyncio.sleep(0.5)
        assert not task.done()
        await holder.execute("SELECT pg_advisory_unlock($1)", schema.LOCK_KEY)
        assert await task == [schema.VERSION]
        assert await waiter.fetchval("SHOW statement_timeout") == "100ms"
    finally:
        await holder.close()
        await waiter.close()


# Migrations


def test_the_last_line_of_the_schema_is_its_version() -> None:
    last = schema.fresh_schema().strip().splitlines()[-1]
    assert last == f"INSERT INTO rowlock_schema (version) VALUES ({schema.VERSION});"


def test_migrations_have_no_gaps() -> None:
    steps = schema.migrations()
    assert sorted(steps) == list(range(2, schema.VERSION + 1))
    assert len([path for path in schema.MIGRATIONS.iterdir() if path.name != "README.md"]) == len(steps)
    for number, text in steps.items():
        assert text.strip().splitlines()[-1] == f"INSERT INTO rowlock_schema (version) VALUES ({number});"


@pytest.mark.skipif(schema.VERSION > 1, reason="version 1 is history")
def test_the_stored_version_1_is_the_schema() -> None:
    """While it changes without migrations: cp schema.sql tests/data/schema_v1.sql."""
    assert (STORED / "schema_v1.sql").read_text() == schema.fresh_schema()


CATALOG = {
    "relations": """
        SELECT c.relname, c.relkind::text, c.relpersistence::text, c.reloptions, pg_get_viewdef(c.oid) AS view
        FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind <> 'i'""",
    "columns": """
        SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity::text,
               a.attgenerated::text, a.attcollation::regcollation::text, a.attstorage::text,
               a.attoptions, pg_get_expr(d.adbin, d.adrelid) AS value
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm')""",
    "constraints": """
        SELECT c.conrelid::regclass::text, c.conname, c.contype::text, pg_get_constraintdef(c.oid), c.convalidated
        FROM pg_constraint c WHERE c.connamespace = 'public'::regnamespace""",
    "indexes": """
        SELECT i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid), i.indisvalid, c.reloptions
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relnamespace = 'public'::regnamespace""",
    "sequences": """
        SELECT s.seqrelid::regclass::text, s.seqtypid::regtype::text, s.seqstart, s.seqincrement, s.seqmax, s.seqmin,
               s.seqcache, s.seqcycle FROM pg_sequence s""",
    "functions": """
        SELECT p.proname, pg_get_functiondef(p.oid) FROM pg_proc p
        WHERE p.pronamespace = 'public'::regnamespace AND p.prokind IN ('f', 'p')""",
    "triggers": "SELECT t.tgname, pg_get_triggerdef(t.oid) FROM pg_trigger t WHERE NOT t.tgisinternal",
    "comments": """
        SELECT pg_describe_object(classoid, objoid, objsubid), description FROM pg_description
        JOIN pg_class c ON c.oid = objoid WHERE c.relnamespace = 'public'::regnamespace""",
}


async def catalog(connection: asyncpg.Connection) -> set[tuple[object, ...]]:
    """All that a database is made of but for the order of columns, which a migration cannot choose."""
    return {
        (kind, *(tuple(value) if isinstance(value, list) else value for value in row))
        for kind, query in CATALOG.items()
        for row in await connection.fetch(query)
    }


async def test_a_migrated_database_equals_a_fresh_one(
    empty: asyncpg.Connection, connection: asyncpg.Connection
) -> None:
    await empty.execute((STORED / "schema_v1.sql").read_text())
    assert await schema.migrate(empty) == list(range(2, schema.VERSION + 1))
    migrated, fresh = await catalog(empty), await catalog(connection)
    assert migrated - fresh == set()
    assert fresh - migrated == set()
    assert {row[0] for row in fresh} >= {"relations", "columns", "constraints", "indexes", "sequences"}


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE jobs ALTER COLUMN requeue SET DEFAULT false",
        "ALTER TABLE jobs ADD COLUMN other text",
        "ALTER TABLE jobs ALTER COLUMN name DROP NOT NULL",
        "ALTER TABLE jobs DROP CONSTRAINT ended",
        "ALTER TABLE jobs SET (fillfactor = 71)",
        "ALTER TABLE pending RESET (autovacuum_vacuum_cost_delay)",
        "ALTER TABLE jobs ALTER COLUMN tasks TYPE bigint",
        "ALTER TABLE jobs ALTER COLUMN job_id SET INCREMENT BY 2",
        "CREATE INDEX other ON jobs (state)",
        "CREATE FUNCTION other() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    ],
)
async def test_the_comparison_would_see(changing: asyncpg.Connection, change: str) -> None:
    before = await catalog(changing)
    await changing.execute(change)
    assert await catalog(changing) != before


@pytest.fixture(scope="module")
async def module_connection(databases: Any) -> AsyncIterator[asyncpg.Connection]:
    name = await databases.create()
    connection = await asyncpg.connect(databases.url_of(name))
    yield connection
    await connection.close()
    await databases.drop(name)


@pytest.fixture
async def changing(module_connection: asyncpg.Connection) -> AsyncIterator[asyncpg.Connection]:
    """A database whose changes are undone."""
    transaction = module_connection.transaction()
    await transaction.start()
    yield module_connection
    await transaction.rollback()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for migrations of a future that ends one version further on."""
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    monkeypatch.setattr(schema, "MIGRATIONS", tmp_path)
    return tmp_path


async def test_a_step_is_applied_once(connection: asyncpg.Connection, steps: Path) -> None:
    number = schema.VERSION
    insert = f"INSERT INTO rowlock_schema (version) VALUES ({number});"
    (steps / f"{number:04}_words.sql").write_text(f"ALTER TABLE jobs ADD COLUMN other text;\n{insert}\n")
    (steps / "README.md").write_text("no step")
    with pytest.raises(SchemaMismatch, match="run `rowlock migrate`"):
        await schema.check(connection)
    assert await schema.migrate(connection) == [number]
    assert await schema.migrate(connection) == []
    await schema.check(connection)


async def test_a_step_that_fails_leaves_nothing_behind(connection: asyncpg.Connection, steps: Path) -> None:
    before = await catalog(connection)
    (steps / f"{schema.VERSION:04}_words.sql").write_text("ALTER TABLE jobs ADD COLUMN other text;\nSELECT 1 / 0;\n")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await schema.migrate(connection)
    assert await catalog(connection) == before
    assert await schema.version(connection) == schema.VERSION - 1


def test_the_lock_order_is_written_where_the_tables_are() -> None:
    """Every table that a transaction locks stands in the one place that says in which order."""
    text = schema.fresh_schema()
    [order] = re.findall(r"^--\s+(idempotency_keys by .*)$", text, re.MULTILINE)
    tables = set(re.findall(r"^CREATE TABLE (\w+)", text, re.MULTILINE))
    inserted_only = {"rowlock_schema", "job_specs", "outputs", "job_events"}
    assert set(re.findall(r"\w+", order)) & tables == tables - inserted_only

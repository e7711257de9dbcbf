"""A PostgreSQL that may lose what it has committed is refused, named, waited for, and taken once it is mended."""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import aiohttp
import asyncpg
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from core.db import connection as db
from core.db import schema
from core.db.connection import connect, open_pool, risk
from core.errors import Unavailable, UnsafeServer
from core.settings import Settings
from core.wakeup import Wakeup
from services.api import database as api_database
from services.api import submit
from services.api.state import State
from services.scheduler import lead
from services.standalone import embedded
from services.standalone.embedded import EmbeddedPostgres
from tests.api import JOBS, serving
from tests.builders import settings_for
from tests.proxy import Fault, proxied
from tests.system import System, until

pytestmark = pytest.mark.anyio

JOB = {"job": {"account": "test"}, "script": "#!/bin/sh\n"}
RISKS = {"fsync": "fsync=off loses accepted jobs", "full_page_writes": "full_page_writes=off loses accepted jobs"}
RECOVERY = "it is in recovery"


@pytest.fixture
async def server(
    server_dir: Path, with_cluster: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[EmbeddedPostgres]:
    """A server of the test's own that holds the schema and may be made a standby, or unsafe by a reload."""
    options = {key: value for key, value in embedded.POSTGRES_OPTIONS.items() if key not in RISKS}
    monkeypatch.setattr(embedded, "POSTGRES_OPTIONS", {**options, "wal_level": "replica"})
    folder = with_cluster(server_dir / "safety")
    async with EmbeddedPostgres(folder) as found:
        await execute(found, schema.fresh_schema())
        yield found
    shutil.rmtree(folder)


@pytest.fixture
def own(server: EmbeddedPostgres, redis_url: str, tmp_path: Path) -> Settings:
    """Settings of roles that use the test's own server, and insist on a safe one."""
    return settings_for(server.url, redis_url, tmp_path, unsafe=False, poll_seconds=0.2)


async def execute(server: EmbeddedPostgres, *statements: str) -> None:
    connection = await asyncpg.connect(server.url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def set_by_reload(server: EmbeddedPostgres, name: str, value: str) -> None:
    """Change a setting under the connections that there are; it is so when this returns."""
    await execute(server, f"ALTER SYSTEM SET {name} = {value}", "SELECT pg_reload_conf()")

    async def is_so() -> bool:
        connection = await asyncpg.connect(server.url)
        try:
            return await connection.fetchval(f"SHOW {name}") == value.strip("'")
        finally:
            await connection.close()

    await until(is_so, f"{name} is {value}")


async def restart(server: EmbeddedPostgres, **options: str) -> None:
    await server.stop()
    server.options = options
    await server.start()


async def make_standby(server: EmbeddedPostgres) -> None:
    await server.stop()
    (server.cluster / "standby.signal").touch()
    await server.start()


async def promote(server: EmbeddedPostgres) -> None:
    await execute(server, "SELECT pg_promote()")


async def becomes(true: Callable[[], object], what: str) -> None:
    async def asked() -> object:
        return true()

    await until(asked, what)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (("on", "on", False), None),
        (("off", "on", False), RISKS["fsync"]),
        (("on", "off", False), RISKS["full_page_writes"]),
        (("on", "on", True), RECOVERY),
    ],
)
def test_what_is_a_risk(values: tuple[str, str, bool], named: str | None) -> None:
    problem = risk(*values)
    assert problem is None if named is None else problem is not None and named in problem


# What every role opens


@pytest.mark.parametrize("name", RISKS)
async def test_every_connection_is_asked_unless_unsafe_was_said(
    server: EmbeddedPostgres, own: Settings, name: str
) -> None:
    await restart(server, **{name: "off"})
    with pytest.raises(UnsafeServer, match=RISKS[name]):
        await connect(own, "test")
    unsafe = own.model_copy(update={"unsafe": True})
    await (await connect(unsafe, "test")).close()
    pool = await open_pool(unsafe, "test", 1)
    pool.terminate()


async def test_a_pool_waits_for_a_promotion_and_names_once_why(server: EmbeddedPostgres, own: Settings) -> None:
    await make_standby(server)
    with capture_logs() as logs:
        opening = asyncio.create_task(open_pool(own, "test", 2))
        await becomes(lambda: logs, "it says why it waits")
        assert not opening.done()
        await promote(server)
        pool = await opening
    (said,) = logs
    assert said["event"] == "postgres_unsafe"
    assert said["error"].startswith(RECOVERY)
    # What it connects to later is looked at as well: a failover, a restart with other settings.
    await restart(server, fsync="off")
    with pytest.raises(UnsafeServer, match=RISKS["fsync"]):
        await first_use(pool)
    await restart(server)
    await first_use(pool)
    pool.terminate()


async def first_use(pool: asyncpg.Pool) -> None:
    """The first use over a connection that was not there before: the lost ones are told by their errors."""

    async def used() -> bool:
        try:
            async with pool.acquire() as connection:
                await connection.execute("SELECT 1")
        except (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError):
            return False
        return True

    await until(used, "the pool is connected again")


# The API


async def answers(api: tuple[State, int], status: int, detail: str = "") -> None:
    """Wait until /health answers so; a submission then does as well."""
    async with aiohttp.ClientSession(f"http://127.0.0.1:{api[1]}") as session:

        async def asked() -> bool:
            async with session.get("/health") as health:
                text = await health.text()
            return health.status == status and detail in text

        await until(asked, f"/health is {status} {detail}")
        async with session.post(JOBS, json=JOB) as posted:
            assert posted.status == (201 if status == 200 else 503), await posted.text()


async def test_an_api_says_what_it_waits_for_and_heals_itself(server: EmbeddedPostgres, own: Settings) -> None:
    await make_standby(server)
    async with serving(own) as api:
        await answers(api, 503, f"is refused: {RECOVERY}")
        await promote(server)
        await answers(api, 200)
        await restart(server, full_page_writes="off")
        await answers(api, 503, f"is refused: {RISKS['full_page_writes']}")
        await restart(server)
        await answers(api, 200)


async def refuses(open_one: Callable[[], AbstractAsyncContextManager[object]]) -> bool:
    """Whether a connection is not given out, with the reason."""
    try:
        async with open_one():
            return False
    except Unavailable as error:
        return f"is refused: {RISKS['fsync']}" in str(error)


async def test_an_api_notices_a_reload_by_itself(
    server: EmbeddedPostgres, own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_database, "LOOK_AGAIN_SECONDS", 0.05)
    async with serving(own) as api:
        await answers(api, 200)
        await set_by_reload(server, "fsync", "off")

        for open_one in (api[0].database.connection, api[0].database.store):
            await until(lambda open_one=open_one: refuses(open_one), "it refuses")
            assert all([await refuses(open_one) for _ in range(20)])  # whichever of its connections is used
        await set_by_reload(server, "fsync", "on")
        await answers(api, 200)


async def test_what_waits_for_a_standby_is_not_accepted_by_a_look_at_it(
    server: EmbeddedPostgres, own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that was cut off from its client shows its rows, whether or not a standby has them."""
    monkeypatch.setattr(db, "COMMAND_SECONDS", 0.5)
    monkeypatch.setattr(api_database, "ACQUIRE_SECONDS", 0.5)
    monkeypatch.setattr(submit, "SETTLE_SECONDS", 3)
    await restart(server, max_wal_senders="2")
    async with proxied(server.url) as wire:
        wired = own.model_copy(update={"database_url": SecretStr(wire.url)})
        async with serving(wired) as api, aiohttp.ClientSession(f"http://127.0.0.1:{api[1]}") as session:
            await answers(api, 200)
            await set_by_reload(server, "synchronous_standby_names", "nobody")
            await until(lambda: commits_hang(server), "commits wait for the standby")
            wire.at(b"the account", Fault.HOLE_AFTER)
            body = {"job": {"account": "the account"}, "script": "#!/bin/sh\n"}
            for detail in ("may have been stored", "is away"):
                async with session.post(JOBS, json=body, headers={"Idempotency-Key": "k"}) as posted:
                    assert posted.status == 503
                    assert detail in await posted.text()
            await set_by_reload(server, "synchronous_standby_names", "''")
            await answers(api, 200)
            async with session.post(JOBS, json=body, headers={"Idempotency-Key": "k"}) as posted:
                assert (posted.status, posted.headers["Idempotent-Replay"]) == (200, "true")


async def commits_hang(server: EmbeddedPostgres) -> bool:
    connection = await asyncpg.connect(server.url)
    try:
        await connection.execute("CREATE TABLE IF NOT EXISTS waits (); DROP TABLE waits", timeout=0.3)
    except TimeoutError:
        return True
    finally:
        connection.terminate()
    return False


# The scheduler, the worker


async def test_a_leader_stops_leading_at_a_reload_and_leads_again(
    server: EmbeddedPostgres, own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lead, "PROBE_SECONDS", 0.05)
    leading = False

    async def duty() -> None:
        nonlocal leading
        leading = True
        try:
            await asyncio.Event().wait()
        finally:
            leading = False

    task = asyncio.create_task(lead.lead(own, Wakeup(), [duty]))
    try:
        await becomes(lambda: leading, "it leads")
        await set_by_reload(server, "fsync", "off")
        await becomes(lambda: not leading, "it leads no more")
        with pytest.raises(UnsafeServer):
            await connect(own, "test")
        assert not leading
        await set_by_reload(server, "fsync", "on")
        await becomes(lambda: leading, "it leads again")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def roles(settings: Settings, folder: Path, *flags: str) -> AsyncIterator[System]:
    """The processes of a scheduler and a worker, started with these flags."""
    system = System(settings, folder)
    try:
        system.start("scheduler", "", *flags)
        system.start("worker", "", *flags)
        yield system
    finally:
        await system.close()


async def test_who_waits_can_be_stopped_at_any_instant(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the connection to an unsafe server is being closed, if anybody waits for that."""
    closing = asyncio.Event()

    async def close_slowly(connection: asyncpg.Connection, *, timeout: float | None = None) -> None:
        closing.set()
        await asyncio.sleep(3600)

    async def refuse(*_: object) -> None:
        raise UnsafeServer("for the test")

    monkeypatch.setattr(asyncpg.Connection, "close", close_slowly)
    monkeypatch.setattr(db, "check_safe", refuse)
    with capture_logs() as logs:
        task = asyncio.create_task(open_pool(settings, "api", 1))

        async def waits() -> bool:
            return bool(logs) or closing.is_set()

        await until(waits, "the server is refused")
        task.cancel()
        async with asyncio.timeout(60):
            await asyncio.wait((task,))
    assert task.cancelled()


async def test_scheduler_and_worker_name_it_in_one_line_and_take_it_when_told(
    server: EmbeddedPostgres, own: Settings, tmp_path: Path
) -> None:
    await restart(server, fsync="off")

    def said(role: str, word: str) -> Callable[[], Awaitable[bool]]:
        async def asked() -> bool:
            return any(word in line for line in (tmp_path / f"{role}.err").read_text().splitlines())

        return asked

    async with roles(own, tmp_path) as system:
        for role in ("scheduler", "worker"):
            await until(said(role, "postgres_unsafe"), f"the {role} says why it waits")
            (line,) = [line for line in (tmp_path / f"{role}.err").read_text().splitlines() if "postgres_" in line]
            assert RISKS["fsync"] in line
        for child in system.children:
            child.process.send_signal(signal.SIGTERM)
            assert await child.wait() == 0
    async with roles(own, tmp_path, "--unsafe"):
        await until(said("scheduler", "scheduler_leads"), "the scheduler leads")
        await until(said("worker", "node_registered"), "the worker registers its node")

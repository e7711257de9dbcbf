"""What PostgreSQL promises as it is set, whether it holds what it should, and how far away it is."""

import asyncio
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import asyncpg

from core.db import nodes, schema
from core.errors import RowlockError, SchemaMismatch
from core.records import Node
from core.settings import Settings
from services.cli.database import connected
from services.cli.doctor.finding import Finding, fault, ok, warning

OLDEST = 15
STATEMENT_SECONDS = 3
PATIENCE_SECONDS = 10
ROUND_TRIPS = 5
FAR_SECONDS = 0.02
CLOCK_SECONDS = 1.0

CONNECTIONS: Mapping[str, int] = {"api": 10, "scheduler": 4, "worker": 2}
"""What a process of each role keeps open at most: its pool, its lines, and the scheduler's LISTEN connection."""


@dataclass(frozen=True, slots=True)
class Server:
    """The settings of a server, as a session of Rowlock's sees them."""

    version_num: int
    version: str
    fsync: str
    full_page_writes: str
    synchronous_commit: str
    in_recovery: bool
    synchronous_standby_names: str
    may_be_opened: int
    autovacuum: bool


@dataclass(frozen=True, slots=True)
class Standby:
    """A connected standby; its state is None where this account may not see it."""

    name: str
    sync_state: str | None


@dataclass(frozen=True, slots=True)
class Distance:
    """How long a round trip takes, and by how much the server's clock is ahead, in seconds."""

    round_trip: float
    ahead: float


async def examine(settings: Settings) -> list[Finding]:
    """Every finding; that it cannot be reached is the only one then."""
    found: list[Finding] = []
    try:
        async with (
            asyncio.timeout(PATIENCE_SECONDS),
            connected(settings, "doctor", statement_seconds=STATEMENT_SECONDS) as connection,
        ):
            server = await _server(connection)
            found += judge_server(server, unsafe=settings.unsafe)
            found.append(judge_standbys(server, await _standbys(connection)))
            found += judge_distance(await _distance(connection))
            held = judge_schema(await _schema(connection))
            found.append(held)
            registered = await nodes.all_nodes(connection) if held.verdict == "ok" else []
            found.append(judge_connections(server, await _open_connections(connection), len(registered)))
            if held.verdict == "ok":
                found.append(judge_node(settings.node_name, socket.gethostname(), registered))
    except TimeoutError:
        found.append(fault("PostgreSQL", f"no answer within {PATIENCE_SECONDS:g} s", "one within milliseconds"))
    except RowlockError as error:
        found.append(fault("PostgreSQL", str(error).removeprefix("PostgreSQL at "), "one that is up, and lets us in"))
    return found


_SERVER = """
SELECT current_setting('server_version_num')::int AS version_num, current_setting('server_version') AS version,
       current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_page_writes,
       current_setting('synchronous_commit') AS synchronous_commit, pg_is_in_recovery() AS in_recovery,
       current_setting('synchronous_standby_names') AS synchronous_standby_names,
       current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
           - coalesce(current_setting('reserved_connections', true)::int, 0) AS may_be_opened,
       current_setting('autovacuum')::bool AND current_setting('track_counts')::bool AS autovacuum
"""


async def _server(connection: asyncpg.Connection) -> Server:
    row = await connection.fetchrow(_SERVER)
    assert row is not None
    return Server(**row)


def judge_server(server: Server, *, unsafe: bool) -> list[Finding]:
    """What its settings promise."""
    lossy = warning if unsafe else fault
    found = [
        ok("PostgreSQL", server.version)
        if server.version_num >= OLDEST * 10_000
        else fault("PostgreSQL", server.version, f"{OLDEST} or later"),
        ok("primary", "it is not in recovery")
        if not server.in_recovery
        else fault("primary", "it is in recovery, as a standby is: the roles wait for its promotion", "the primary"),
    ]
    for name, value in (("fsync", server.fsync), ("full_page_writes", server.full_page_writes)):
        detail = f"{value}: accepted jobs are lost when the server's machine crashes"
        found.append(ok(name, value) if value == "on" else lossy(name, detail, "on"))
    found.append(
        ok("synchronous_commit", "on, by each session itself")
        if server.synchronous_commit == "on"
        else fault(
            "synchronous_commit",
            f"{server.synchronous_commit}, though each session asks for on: something in between drops that",
            "on, in the server's own settings",
        )
    )
    found.append(
        ok("autovacuum", "on")
        if server.autovacuum
        else warning("autovacuum", "off: the tables grow, and everything slows down", "autovacuum=on, track_counts=on")
    )
    return found


_STANDBYS = "SELECT application_name AS name, sync_state FROM pg_stat_replication ORDER BY 1"


async def _standbys(connection: asyncpg.Connection) -> list[Standby]:
    return [Standby(**row) for row in await connection.fetch(_STANDBYS)]


def judge_standbys(server: Server, standbys: Sequence[Standby]) -> Finding:
    """What is lost when a standby is promoted, or waited for in vain."""
    names = server.synchronous_standby_names
    trailing = [standby.name for standby in standbys if standby.sync_state in ("async", None)]
    waited_for = [standby.name for standby in standbys if standby.sync_state in ("sync", "quorum")]
    if names and not waited_for and not any(standby.sync_state is None for standby in standbys):
        detail = f"every commit waits for {names}, and none of them is connected"
        return fault("standbys", detail, "one of them up, or synchronous_standby_names empty")
    if names:
        return ok("standbys", f"commits wait for {names}: promote one of those, and nothing is lost")
    if trailing:
        detail = f"{', '.join(trailing)}: promoted, it lacks what it had not received, accepted jobs and their ends"
        return warning("standbys", detail, "synchronous_standby_names, where none may be lost")
    return ok("standbys", "none is connected")


_OPEN = """
SELECT coalesce(application_name, '') AS name, count(*) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() GROUP BY 1
"""


async def _open_connections(connection: asyncpg.Connection) -> dict[str, int]:
    return {row["name"]: row["count"] for row in await connection.fetch(_OPEN)}


def judge_connections(server: Server, opened: Mapping[str, int], workers: int) -> Finding:
    """Whether the server has room for all that the roles may open; `opened` counts by application_name."""
    counts = {role: len([name for name in opened if name.startswith(f"rowlock {role} ")]) for role in CONNECTIONS}
    counts["worker"] = max(counts["worker"], workers)
    roles = {role: max(count, 1) for role, count in counts.items()}
    wanted = sum(CONNECTIONS[role] * count for role, count in roles.items())
    others = sum(count for name, count in opened.items() if not name.startswith("rowlock "))
    listed = ", ".join(f"{count} {role}{'s' if count > 1 else ''}" for role, count in roles.items())
    detail = f"{listed} open up to {wanted}, others have {others}, of {server.may_be_opened}"
    if wanted + others > server.may_be_opened:
        return fault("connections", detail, f"max_connections larger by {wanted + others - server.may_be_opened}")
    return ok("connections", detail)


_CLOCK = "SELECT extract(epoch FROM clock_timestamp())::float8"


async def _distance(connection: asyncpg.Connection) -> Distance:
    """The shortest of a few round trips, and the clocks as they stood in its middle."""
    return min([await _measured(connection) for _ in range(ROUND_TRIPS)], key=lambda distance: distance.round_trip)


async def _measured(connection: asyncpg.Connection) -> Distance:
    asked, began = time.time(), time.perf_counter()
    there: float = await connection.fetchval(_CLOCK)
    took = time.perf_counter() - began
    return Distance(took, there - (asked + took / 2))


def judge_distance(distance: Distance) -> list[Finding]:
    """Whether it is near, and whether the two clocks agree."""
    milliseconds = f"{distance.round_trip * 1000:.1f} ms a round trip"
    apart = f"this host's is {abs(distance.ahead):.3f} s {'behind' if distance.ahead > 0 else 'ahead of'} PostgreSQL's"
    return [
        ok("PostgreSQL's distance", milliseconds)
        if distance.round_trip < FAR_SECONDS
        else warning("PostgreSQL's distance", f"{milliseconds}: each step of a job waits so long", "a nearer one"),
        ok("clock", apart)
        if abs(distance.ahead) < CLOCK_SECONDS
        else warning("clock", f"{apart}: leases go by PostgreSQL's alone, but logs cannot be compared", "NTP on both"),
    ]


async def _schema(connection: asyncpg.Connection) -> int | SchemaMismatch | None:
    try:
        return await schema.version(connection)
    except SchemaMismatch as error:
        return error


def judge_schema(held: int | SchemaMismatch | None) -> Finding:
    """Whether the roles could work on what the database holds."""
    if isinstance(held, SchemaMismatch):
        return fault("schema", str(held), "an empty database")
    if held is None:
        return warning("schema", "none yet: the first role to come applies it", "rowlock migrate, where none may")
    if held > schema.VERSION:
        return fault("schema", f"version {held}, this Rowlock knows {schema.VERSION}", "a newer Rowlock")
    if held < schema.VERSION:
        return warning("schema", f"version {held}: the first role to come migrates it", f"version {schema.VERSION}")
    return ok("schema", f"version {held}")


def judge_node(name: str, host: str, registered: Sequence[Node]) -> Finding:
    """Whether a worker of this host holds the lease of its node."""
    node = next((node for node in registered if node.name == name), None)
    if node is None:
        known = ", ".join(node.name for node in registered) or "none"
        return warning("NODE_NAME", f"{name} is not registered; there is {known}", "a worker, if this host is a node")
    if not node.alive:
        return warning("NODE_NAME", f"{name}: its lease is over", "its worker up, if this host is that node")
    if node.hostname != host:
        return warning("NODE_NAME", f"{name} is held by a worker on {node.hostname}", "a NODE_NAME of this host's own")
    if node.admin_state != "RESUME":
        return warning("NODE_NAME", f"{name} is in {node.admin_state}: {node.admin_reason}", "it gets no work so")
    return ok("NODE_NAME", f"{name} is held by this host's worker")

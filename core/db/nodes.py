"""The tables nodes and node_leases: registration, heartbeats, and the capacity that may be given out."""

from dataclasses import dataclass, fields
from datetime import datetime

from core.db.connection import Connection
from core.loss import Lease
from core.records import Holder, Node, NodeSpec

_ADD = """
INSERT INTO nodes (name, partitions, declared_cpus, cpus, memory_mib, work_base_dir, job_user)
VALUES ($1, $2, $3::int, $3::int, $4, $5, $6)
ON CONFLICT (name) DO NOTHING
"""

_LEASE = """
INSERT INTO node_leases AS l
    (node, incarnation, spool_since, spool_id, hostname, heartbeat_time, lease_until, address, secret, version,
     grace_seconds, requeue_after_seconds)
VALUES ($1, 1, 1, $2, $3, clock_timestamp(), clock_timestamp() + make_interval(secs => $7), $4, $5, $6, $8, $9)
ON CONFLICT (node) DO UPDATE SET
    incarnation = l.incarnation + 1,
    spool_since = CASE WHEN l.spool_id = excluded.spool_id THEN l.spool_since ELSE l.incarnation + 1 END,
    spool_id = excluded.spool_id, hostname = excluded.hostname,
    heartbeat_time = excluded.heartbeat_time, lease_until = excluded.lease_until, draining = false,
    address = excluded.address, secret = excluded.secret, version = excluded.version,
    grace_seconds = excluded.grace_seconds, requeue_after_seconds = excluded.requeue_after_seconds,
    stale_writes_refused = 0
WHERE l.spool_id = excluded.spool_id OR l.lease_until < clock_timestamp()
RETURNING incarnation
"""

_DECLARE = """
UPDATE nodes SET partitions = $2, declared_cpus = $3::int, cpus = greatest($3::int, alloc_cpus), memory_mib = $4,
                 work_base_dir = $5, job_user = $6
WHERE name = $1
"""


async def register(connection: Connection, spec: NodeSpec, lease_seconds: float) -> int | None:
    """Register a node's worker; answer its incarnation. Needs a transaction of the caller's.

    None, with nothing changed, when another spool's worker holds the node's name under a living lease. A worker that
    comes back with fewer CPUs than are allocated registers all the same: `cpus` falls to what is allocated, then with
    each release.
    """
    node = (spec.name, list(spec.partitions), spec.cpus, spec.memory_mib, spec.work_base_dir, spec.job_user)
    await connection.execute(_ADD, *node)  # the lease refers to it; whoever is refused must not touch one that is there
    incarnation: int | None = await connection.fetchval(
        _LEASE,
        spec.name,
        spec.spool_id,
        spec.hostname,
        spec.address,
        spec.secret,
        spec.version,
        lease_seconds,
        spec.grace_seconds,
        spec.requeue_after_seconds,
    )
    if incarnation is not None:
        await connection.execute(_DECLARE, *node)
    return incarnation


_HOLDER = "SELECT hostname, spool_id FROM node_leases WHERE node = $1"


async def holder(connection: Connection, node: str) -> Holder | None:
    """Who holds, or held last, the lease of a node."""
    row = await connection.fetchrow(_HOLDER, node)
    return None if row is None else Holder(*row)


_IS_CURRENT = "SELECT EXISTS (SELECT FROM node_leases WHERE node = $1 AND incarnation = $2)"


async def is_current(connection: Connection, node: str, incarnation: int) -> bool:
    """Whether no newer worker has registered as this node."""
    return bool(await connection.fetchval(_IS_CURRENT, node, incarnation))


_HEARTBEAT = """
UPDATE node_leases SET heartbeat_time = clock_timestamp(), lease_until = clock_timestamp() + make_interval(secs => $3),
                       draining = $4, cpu_load = $5, stale_writes_refused = $6
WHERE node = $1 AND incarnation = $2
RETURNING true
"""


async def heartbeat(
    connection: Connection,
    node: str,
    incarnation: int,
    *,
    lease_seconds: float,
    draining: bool,
    cpu_load: float,
    stale_writes_refused: int = 0,
) -> bool:
    """Prolong the lease; False when a newer incarnation holds it."""
    return bool(
        await connection.fetchval(
            _HEARTBEAT, node, incarnation, lease_seconds, draining, cpu_load, stale_writes_refused
        )
    )


_GIVE_UP = """
UPDATE node_leases SET lease_until = clock_timestamp(), draining = true WHERE node = $1 AND incarnation = $2
"""


async def give_up_lease(connection: Connection, node: str, incarnation: int) -> None:
    """End the lease now: a worker that stops on purpose need not be waited for."""
    await connection.execute(_GIVE_UP, node, incarnation)


_DRAIN_ITSELF = """
UPDATE nodes SET admin_state = 'DRAIN', admin_reason = $3, admin_by = 'rowlock', admin_time = clock_timestamp()
WHERE name = $1 AND admin_state = 'RESUME'
  AND EXISTS (SELECT FROM node_leases l WHERE l.node = $1 AND l.incarnation = $2)
RETURNING true
"""


async def drain_itself(connection: Connection, node: str, incarnation: int, reason: str) -> bool:
    """Take a node out on its own worker's word; False when it is out already."""
    return bool(await connection.fetchval(_DRAIN_ITSELF, node, incarnation, reason))


_RESUME_ITSELF = """
UPDATE nodes SET admin_state = 'RESUME', admin_reason = NULL, admin_by = 'rowlock', admin_time = clock_timestamp()
WHERE name = $1 AND admin_state = 'DRAIN' AND admin_by = 'rowlock'
  AND EXISTS (SELECT FROM node_leases l WHERE l.node = $1 AND l.incarnation = $2)
RETURNING true
"""


async def resume_itself(connection: Connection, node: str, incarnation: int) -> bool:
    """Take back `drain_itself`, and nothing that an operator said."""
    return bool(await connection.fetchval(_RESUME_ITSELF, node, incarnation))


_SET_STATE = """
WITH changed AS (
    UPDATE nodes SET admin_state = $2, admin_reason = $3, admin_by = $4, admin_time = clock_timestamp()
    WHERE name = $1 AND (admin_state, admin_reason, admin_by) IS DISTINCT FROM ($2, $3, $4)
    RETURNING name
)
SELECT EXISTS (SELECT FROM changed) FROM nodes WHERE name = $1
"""


async def set_state(connection: Connection, node: str, state: str, *, reason: str | None, by: str) -> bool | None:
    """Take a node out (DRAIN, DOWN) or back in (RESUME) on an operator's word; None when there is no such node.

    Said again it changes nothing, not even the time: False.
    """
    changed: bool | None = await connection.fetchval(_SET_STATE, node, state, reason, by)
    return changed


_FORGET = """
WITH lease AS (
    -- Locked first, as in a registration: a worker that comes back lives by then, or finds its node forgotten.
    SELECT lease_until > clock_timestamp() AS alive FROM node_leases WHERE node = $1 FOR UPDATE
)
DELETE FROM nodes n USING (SELECT coalesce(bool_or(alive), false) AS alive FROM lease) l
WHERE n.name = $1 AND n.alloc_cpus = 0 AND (n.admin_state = 'DOWN' OR NOT l.alive)
RETURNING true
"""


async def forget(connection: Connection, node: str) -> bool:
    """Forget a node that is DOWN, declared or silent, and holds nothing; False for any other.

    Should a worker of it live all the same, its next heartbeat tells it.
    """
    return bool(await connection.fetchval(_FORGET, node))


_PARTITIONS = "SELECT p AS partition, max(declared_cpus) FROM nodes, unnest(partitions) AS p GROUP BY p"


async def largest_by_partition(connection: Connection) -> dict[str, int]:
    """The CPUs of the largest node of each partition, whatever its state; empty while no node is registered."""
    return {row[0]: row[1] for row in await connection.fetch(_PARTITIONS)}


_ALL = """
SELECT n.name, n.partitions, n.cpus, n.declared_cpus, n.alloc_cpus, n.memory_mib, n.admin_state, n.admin_reason,
       n.admin_by, n.admin_time, n.registered_time, coalesce(l.lease_until > clock_timestamp(), false) AS alive,
       coalesce(l.draining, false) AS draining, l.hostname, l.address, l.heartbeat_time, l.incarnation, l.version,
       l.cpu_load, coalesce(l.stale_writes_refused, 0) AS stale_writes_refused
FROM nodes n LEFT JOIN node_leases l ON l.node = n.name
WHERE $1::text IS NULL OR n.name = $1
ORDER BY n.name
"""


async def all_nodes(connection: Connection, name: str | None = None) -> list[Node]:
    """Every node, or the one of that name."""
    rows = await connection.fetch(_ALL, name)
    return [Node(**{**row, "partitions": tuple(row["partitions"])}) for row in rows]


_LEASES = """
SELECT now() AS now, pg_postmaster_start_time() AS server_start, l.node, l.incarnation, l.heartbeat_time,
       l.lease_until > now() AS alive, l.draining, n.alloc_cpus > 0 AS holds,
       make_interval(secs => l.grace_seconds) AS grace, make_interval(secs => l.requeue_after_seconds) AS requeue_after
FROM node_leases l JOIN nodes n ON n.name = l.node
ORDER BY l.node
"""


@dataclass(frozen=True, slots=True)
class Leases:
    """Every lease at one instant."""

    now: datetime
    server_start: datetime
    leases: list[Lease]


async def leases(connection: Connection) -> Leases | None:
    """Every lease as it is now; None while there is no node."""
    rows = await connection.fetch(_LEASES)
    if not rows:
        return None
    names = [field.name for field in fields(Lease)]
    found = [Lease(**{name: row[name] for name in names}) for row in rows]
    return Leases(rows[0]["now"], rows[0]["server_start"], found)


_HOLD_SILENCE = """
SELECT true FROM node_leases WHERE node = $1 AND incarnation = $2 AND heartbeat_time = $3 FOR NO KEY UPDATE
"""


async def hold_silence(connection: Connection, lease: Lease) -> bool:
    """Whether a node has been silent ever since; until the end of the caller's transaction its heartbeats wait."""
    return bool(await connection.fetchval(_HOLD_SILENCE, lease.node, lease.incarnation, lease.heartbeat_time))


_FILE_SERVER = "SELECT address, secret FROM node_leases WHERE node = $1 AND lease_until > clock_timestamp()"


async def file_server(connection: Connection, node: str) -> tuple[str, str] | None:
    """Where a node's worker serves its files, and the secret that it wants to see; None while its lease is over."""
    row = await connection.fetchrow(_FILE_SERVER, node)
    return None if row is None else (row[0], row[1])

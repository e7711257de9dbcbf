"""The tables jobs, job_specs and idempotency_keys: submissions, what clients read, and the moves that hold no CPUs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from core.db.connection import Connection
from core.records import Attempt, Job, JobSpec, NewJob
from core.states import State

NEWEST = 200_000
"""More than can be stored in the seconds in which somebody asks for what was just stored."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A submission that is a job now."""

    job_id: int
    submit_time: datetime
    room: str | None = None
    """Of one that came alone, while nothing as small waits: the first node with room, as the policy would choose."""


_INSERT = """
WITH input AS MATERIALIZED (
    SELECT nextval('jobs_job_id_seq') AS job_id, t.*
    FROM unnest($1::text[], $2::text[], $3::text[], $4::int[], $5::int[], $6::bigint[], $7::bigint[], $8::bool[],
                $9::text[], $10::text[], $11::text[], $12::text[], $13::text[], $14::text[], $15::bool[], $16::bool[],
                $17::text[], $18::bytea[])
         WITH ORDINALITY AS t (name, account, partition, tasks, cpus_per_task, memory_mib, time_limit_seconds, requeue,
                               script, environment, cwd, standard_output, standard_error, comment,
                               cpus_per_task_given, tasks_per_node_given, key, digest, position)
    WHERE EXISTS (SELECT FROM nodes n
                  WHERE n.declared_cpus >= t.tasks::bigint * t.cpus_per_task AND t.partition = ANY (n.partitions))
       OR NOT EXISTS (SELECT FROM nodes)
), claimed AS (
    -- In one order, so that two of these that share keys wait for each other in one direction alone.
    INSERT INTO idempotency_keys (account, key, job_id, digest)
    SELECT account, key, job_id, digest FROM input WHERE key IS NOT NULL ORDER BY account, key, position
    ON CONFLICT DO NOTHING
    RETURNING job_id
), taken AS (
    SELECT * FROM input WHERE key IS NULL OR job_id IN (SELECT job_id FROM claimed)
), stored AS (
    INSERT INTO jobs (job_id, name, account, partition, tasks, cpus_per_task, cpus, memory_mib, time_limit_seconds,
                      requeue)
    OVERRIDING SYSTEM VALUE
    SELECT job_id, name, account, partition, tasks, cpus_per_task, tasks * cpus_per_task, memory_mib,
           time_limit_seconds, requeue
    FROM taken
), described AS (
    INSERT INTO job_specs (job_id, script, environment, current_working_directory, standard_output, standard_error,
                           comment, cpus_per_task_given, tasks_per_node_given, submission)
    SELECT job_id, script, environment, cwd, standard_output, standard_error, comment, cpus_per_task_given,
           tasks_per_node_given, $19 + position
    FROM taken
), queued AS (
    INSERT INTO pending (partition, cpus, job_id) SELECT partition, tasks * cpus_per_task, job_id FROM taken
), logged AS (
    INSERT INTO job_events (job_id, attempt, to_state, reason) SELECT job_id, 0, 'PENDING', 'None' FROM taken
)
SELECT position, job_id, now(),
       -- Nobody is asked where something as small waits, perhaps a thousand nodes that are full.
       CASE WHEN cardinality($1) = 1 AND (
           SELECT p.job_id FROM pending p WHERE p.partition = t.partition AND p.cpus <= t.tasks * t.cpus_per_task
           ORDER BY p.cpus LIMIT 1
       ) IS NULL THEN (
           SELECT n.name FROM nodes n JOIN node_leases l ON l.node = n.name
           WHERE n.declared_cpus - n.alloc_cpus >= t.tasks * t.cpus_per_task AND t.partition = ANY (n.partitions)
             AND n.admin_state = 'RESUME' AND NOT l.draining AND l.lease_until > clock_timestamp()
           ORDER BY n.name LIMIT 1
       ) END
FROM taken t
"""


async def insert(connection: Connection, jobs: Sequence[NewJob], submission: int = 0) -> list[Stored | None]:
    """Store submissions in one statement; answer how, in their order.

    None, with nothing stored, for one that is larger than every registered node of its partition (while no node is
    registered, all are taken), and for one whose key is taken. `submission`, a number that no other statement has,
    finds them again (`stored_by`): its next len(jobs) successors are used.
    """
    rows = await connection.fetch(
        _INSERT,
        [job.name for job in jobs],
        [job.account for job in jobs],
        [job.partition for job in jobs],
        [job.tasks for job in jobs],
        [job.cpus_per_task for job in jobs],
        [job.memory_mib for job in jobs],
        [job.time_limit_seconds for job in jobs],
        [job.requeue for job in jobs],
        [job.script for job in jobs],
        [json.dumps(dict(job.environment)) for job in jobs],
        [job.current_working_directory for job in jobs],
        [job.standard_output for job in jobs],
        [job.standard_error for job in jobs],
        [job.comment for job in jobs],
        [job.cpus_per_task_given for job in jobs],
        [job.tasks_per_node_given for job in jobs],
        [job.key for job in jobs],
        [job.digest for job in jobs],
        submission,
    )
    return _in_order(rows, len(jobs))


_STORED_BY = """
SELECT s.submission - $1 AS position, job_id, j.submit_time
FROM job_specs s JOIN jobs j USING (job_id)
WHERE job_id > (SELECT max(job_id) - $3 FROM job_specs) AND s.submission > $1 AND s.submission <= $1 + $2
FOR KEY SHARE OF j  -- see _BY_KEYS
"""


async def stored_by(connection: Connection, submission: int, count: int) -> list[Stored | None]:
    """What `insert` with this number and so many jobs has stored: its answer once more, all or nothing.

    To be asked soon, and only once that statement is over: it looks at the newest NEWEST jobs alone.
    """
    return _in_order(await connection.fetch(_STORED_BY, submission, count, NEWEST), count)


def _in_order(rows: Sequence[asyncpg.Record], count: int) -> list[Stored | None]:
    stored = {row[0]: Stored(*row[1:]) for row in rows}
    return [stored.get(position) for position in range(1, count + 1)]


_OF_LIST = """
SELECT s.job_id
FROM job_specs f
JOIN job_specs s ON s.job_id >= f.job_id AND s.submission >= f.submission AND s.submission < f.submission + $2
WHERE f.job_id = $1
ORDER BY s.job_id LIMIT $2
"""


async def of_list(connection: Connection, first: int, count: int) -> list[int]:
    """The jobs that were stored in one go of `count`, in their order, given the first one."""
    return [row[0] for row in await connection.fetch(_OF_LIST, first, count)]


_BY_KEYS = """
SELECT k.key, k.digest, j.*, s.current_working_directory, s.standard_output, s.standard_error, s.comment,
       n.work_base_dir, n.job_user,
       j.state = 'RUNNING' AND NOT EXISTS (SELECT FROM node_leases l WHERE l.node = j.node
                                           AND l.lease_until > clock_timestamp()) AS node_unreachable
FROM unnest($1::text[], $2::text[]) AS t (account, key) JOIN idempotency_keys k USING (account, key)
     JOIN jobs j USING (job_id) JOIN job_specs s USING (job_id) LEFT JOIN nodes n ON n.name = j.node
-- A lock is written, so that this commits after all that the job's own commit has to wait for: one that was cut off
-- from its client shows its rows, whether or not a standby that must have them does.
FOR KEY SHARE OF j
"""


async def by_keys(connection: Connection, wanted: Sequence[NewJob]) -> dict[tuple[str, str], tuple[bytes, Job]]:
    """The jobs, as they are now, that were stored under the keys of these submissions, each with its digest.

    To be asked after `insert`, by a statement of its own: that one waits for another transaction that holds a key,
    and does not see what it has stored.
    """
    rows = await connection.fetch(_BY_KEYS, [job.account for job in wanted], [job.key for job in wanted])
    found = {}
    for row in rows:
        columns = dict(row)
        key, digest = columns.pop("key"), columns.pop("digest")
        found[row["account"], key] = digest, _job(columns)
    return found


_GET = """
SELECT j.*, s.current_working_directory, s.standard_output, s.standard_error, s.comment, n.work_base_dir, n.job_user,
       j.state = 'RUNNING' AND NOT EXISTS (SELECT FROM node_leases l WHERE l.node = j.node
                                           AND l.lease_until > clock_timestamp()) AS node_unreachable
FROM jobs j JOIN job_specs s USING (job_id) LEFT JOIN nodes n ON n.name = j.node
WHERE j.job_id = $1
"""


async def get(connection: Connection, job_id: int) -> Job | None:
    """One job, or None."""
    row = await connection.fetchrow(_GET, job_id)
    return None if row is None else _job(row)


_GET_ALL = """
SELECT j.*, s.current_working_directory, s.standard_output, s.standard_error, s.comment, n.work_base_dir, n.job_user,
       j.state = 'RUNNING' AND NOT EXISTS (SELECT FROM node_leases l WHERE l.node = j.node
                                           AND l.lease_until > clock_timestamp()) AS node_unreachable
FROM jobs j JOIN job_specs s USING (job_id) LEFT JOIN nodes n ON n.name = j.node
WHERE j.job_id = ANY ($1::bigint[])
"""


async def get_all(connection: Connection, job_ids: Sequence[int]) -> list[Job]:
    """Those of the jobs that there are, in no order."""
    return [_job(row) for row in await connection.fetch(_GET_ALL, job_ids)]


_STATES = "SELECT job_id, state FROM jobs WHERE job_id = ANY ($1::bigint[])"


async def states(connection: Connection, job_ids: Sequence[int]) -> dict[int, State]:
    """The states of those of the jobs that there are."""
    return {job_id: State(state) for job_id, state in await connection.fetch(_STATES, job_ids)}


_SCRIPT = "SELECT script FROM job_specs WHERE job_id = $1"


async def script(connection: Connection, job_id: int) -> str | None:
    """A job's script as submitted, or None when there is no such job."""
    text: str | None = await connection.fetchval(_SCRIPT, job_id)
    return text


@dataclass(frozen=True, slots=True)
class Filter:
    """What a list of jobs is narrowed by; None lets everything through. Times are exclusive bounds."""

    states: tuple[State, ...] | None = None
    account: str | None = None
    name: str | None = None
    node: str | None = None
    submitted_after: datetime | None = None
    submitted_before: datetime | None = None


_NEWEST = """
SELECT j.*, s.current_working_directory, s.standard_output, s.standard_error, s.comment, n.work_base_dir, n.job_user,
       j.state = 'RUNNING' AND NOT EXISTS (SELECT FROM node_leases l WHERE l.node = j.node
                                           AND l.lease_until > clock_timestamp()) AS node_unreachable
FROM jobs j JOIN job_specs s USING (job_id) LEFT JOIN nodes n ON n.name = j.node
WHERE ($1::bigint IS NULL OR j.job_id < $1) AND ($2::text[] IS NULL OR j.state = ANY ($2))
  AND ($3::text IS NULL OR j.account = $3) AND ($4::text IS NULL OR j.name = $4) AND ($5::text IS NULL OR j.node = $5)
  AND ($6::timestamptz IS NULL OR j.submit_time > $6) AND ($7::timestamptz IS NULL OR j.submit_time < $7)
ORDER BY j.job_id DESC LIMIT $8
"""

_OLDEST = """
SELECT j.*, s.current_working_directory, s.standard_output, s.standard_error, s.comment, n.work_base_dir, n.job_user,
       j.state = 'RUNNING' AND NOT EXISTS (SELECT FROM node_leases l WHERE l.node = j.node
                                           AND l.lease_until > clock_timestamp()) AS node_unreachable
FROM jobs j JOIN job_specs s USING (job_id) LEFT JOIN nodes n ON n.name = j.node
WHERE ($1::bigint IS NULL OR j.job_id > $1) AND ($2::text[] IS NULL OR j.state = ANY ($2))
  AND ($3::text IS NULL OR j.account = $3) AND ($4::text IS NULL OR j.name = $4) AND ($5::text IS NULL OR j.node = $5)
  AND ($6::timestamptz IS NULL OR j.submit_time > $6) AND ($7::timestamptz IS NULL OR j.submit_time < $7)
ORDER BY j.job_id LIMIT $8
"""


_NEWEST_OF_STATES = """
SELECT j.*, s.current_working_directory, s.standard_output, s.standard_error, s.comment, n.work_base_dir, n.job_user,
       j.state = 'RUNNING' AND NOT EXISTS (SELECT FROM node_leases l WHERE l.node = j.node
                                           AND l.lease_until > clock_timestamp()) AS node_unreachable
FROM (
    SELECT job_id FROM (
        (SELECT job_id FROM pending WHERE 'PENDING' = ANY ($2::text[]) AND ($1::bigint IS NULL OR job_id < $1)
         ORDER BY job_id DESC LIMIT $3)
        UNION ALL
        (SELECT job_id FROM allocations JOIN jobs USING (job_id)
         WHERE $2 && '{CONFIGURING,RUNNING}' AND state = ANY ($2) AND ($1 IS NULL OR job_id < $1)
         ORDER BY job_id DESC LIMIT $3)
        UNION ALL
        SELECT job_id FROM unnest($2) AS asked (state) CROSS JOIN LATERAL (
            SELECT job_id FROM job_events
            WHERE to_state = asked.state AND to_state <> ALL ('{PENDING,CONFIGURING,RUNNING}')
              AND ($1 IS NULL OR job_id < $1)
            ORDER BY job_id DESC LIMIT $3
        ) AS ended
    ) AS found ORDER BY job_id DESC LIMIT $3
) AS listed JOIN jobs j USING (job_id) JOIN job_specs s USING (job_id) LEFT JOIN nodes n ON n.name = j.node
ORDER BY job_id DESC
"""

_OLDEST_OF_STATES = """
SELECT j.*, s.current_working_directory, s.standard_output, s.standard_error, s.comment, n.work_base_dir, n.job_user,
       j.state = 'RUNNING' AND NOT EXISTS (SELECT FROM node_leases l WHERE l.node = j.node
                                           AND l.lease_until > clock_timestamp()) AS node_unreachable
FROM (
    SELECT job_id FROM (
        (SELECT job_id FROM pending WHERE 'PENDING' = ANY ($2::text[]) AND ($1::bigint IS NULL OR job_id > $1)
         ORDER BY job_id LIMIT $3)
        UNION ALL
        (SELECT job_id FROM allocations JOIN jobs USING (job_id)
         WHERE $2 && '{CONFIGURING,RUNNING}' AND state = ANY ($2) AND ($1 IS NULL OR job_id > $1)
         ORDER BY job_id LIMIT $3)
        UNION ALL
        SELECT job_id FROM unnest($2) AS asked (state) CROSS JOIN LATERAL (
            SELECT job_id FROM job_events
            WHERE to_state = asked.state AND to_state <> ALL ('{PENDING,CONFIGURING,RUNNING}')
              AND ($1 IS NULL OR job_id > $1)
            ORDER BY job_id LIMIT $3
        ) AS ended
    ) AS found ORDER BY job_id LIMIT $3
) AS listed JOIN jobs j USING (job_id) JOIN job_specs s USING (job_id) LEFT JOIN nodes n ON n.name = j.node
ORDER BY job_id
"""


async def page(
    connection: Connection, wanted: Filter, *, newest_first: bool, after: int | None, limit: int
) -> list[Job]:
    """The next `limit` jobs behind job `after` in the order of submission, or against it.

    Walked to along an index: all jobs, those of an account, those of a name; or, when nothing else is asked for, those
    in each of some states.
    """
    if wanted == Filter(states=wanted.states) and wanted.states is not None:
        statement = _NEWEST_OF_STATES if newest_first else _OLDEST_OF_STATES
        rows = await connection.fetch(statement, after, wanted.states, limit)
    else:
        rows = await connection.fetch(
            _NEWEST if newest_first else _OLDEST,
            after,
            wanted.states,
            wanted.account,
            wanted.name,
            wanted.node,
            wanted.submitted_after,
            wanted.submitted_before,
            limit,
        )
    return [_job(row) for row in rows]


_CANCEL_WAITING = """
WITH moved AS (
    UPDATE jobs SET state = 'CANCELLED', state_reason = 'None', end_time = now(), cancel_requested_time = now()
    WHERE job_id = $1 AND state = 'PENDING'
    RETURNING job_id, attempt
), dequeued AS (
    DELETE FROM pending p USING moved m WHERE p.job_id = m.job_id
), logged AS (
    INSERT INTO job_events (job_id, attempt, from_state, to_state, reason)
    SELECT job_id, attempt, 'PENDING', 'CANCELLED', 'None' FROM moved
)
SELECT true FROM moved
"""


async def cancel_waiting(connection: Connection, job_id: int) -> bool:
    """Cancel a job that is PENDING; False when it is not."""
    return bool(await connection.fetchval(_CANCEL_WAITING, job_id))


_REQUEST_CANCEL = """
UPDATE jobs SET cancel_requested_time = coalesce(cancel_requested_time, now())
WHERE job_id = $1 AND attempt = $2 AND state = 'RUNNING'
RETURNING true
"""


async def request_cancel(connection: Connection, attempt: Attempt) -> bool:
    """Ask for the end of a running attempt; False when it is not running.

    It stays RUNNING until nothing of it is left.
    """
    return bool(await connection.fetchval(_REQUEST_CANCEL, attempt.job_id, attempt.attempt))


_START = """
WITH input AS (
    SELECT * FROM unnest($1::bigint[], $2::int[]) AS t (job_id, attempt)
), locked AS (
    SELECT j.job_id FROM jobs j JOIN input i USING (job_id)
    WHERE j.state = 'CONFIGURING' AND j.attempt = i.attempt AND j.node = $3
    ORDER BY j.job_id FOR NO KEY UPDATE OF j
), current AS (
    -- Locked, after all jobs are: a newer worker that registers meanwhile must find what this one has started.
    SELECT FROM node_leases WHERE node = $3 AND incarnation = $4 AND NOT draining AND (SELECT count(*) > 0 FROM locked)
    FOR SHARE
), moved AS (
    UPDATE jobs j SET state = 'RUNNING', start_time = clock_timestamp(), incarnation = $4
    FROM input i JOIN locked USING (job_id) CROSS JOIN current
    WHERE j.job_id = i.job_id AND j.attempt = i.attempt AND j.state = 'CONFIGURING' AND j.node = $3
    RETURNING j.*
), logged AS (
    INSERT INTO job_events (job_id, attempt, from_state, to_state, reason, node, time)
    SELECT job_id, attempt, 'CONFIGURING', 'RUNNING', 'None', node, start_time FROM moved
)
SELECT m.job_id, m.attempt, m.restart_cnt, m.name, m.account, m.partition, m.tasks, m.cpus_per_task, m.cpus,
       m.memory_mib, m.time_limit_seconds, m.requeue, m.start_time, s.script, s.environment,
       s.current_working_directory, s.standard_output, s.standard_error, s.cpus_per_task_given, s.tasks_per_node_given
FROM moved m JOIN job_specs s USING (job_id)
"""


async def start(connection: Connection, attempts: Sequence[Attempt], *, node: str, incarnation: int) -> list[JobSpec]:
    """Move attempts from CONFIGURING to RUNNING on behalf of a node's current worker; answer those that moved.

    Fenced by attempt, node and incarnation: what is stale, repeated or forged is simply not among the answers.
    """
    rows = await connection.fetch(
        _START, [a.job_id for a in attempts], [a.attempt for a in attempts], node, incarnation
    )
    return [spec_of(row) for row in rows]


_RUNNING = """
SELECT j.job_id, j.attempt, j.restart_cnt, j.name, j.account, j.partition, j.tasks, j.cpus_per_task, j.cpus,
       j.memory_mib, j.time_limit_seconds, j.requeue, j.start_time, s.script, s.environment,
       s.current_working_directory, s.standard_output, s.standard_error, s.cpus_per_task_given, s.tasks_per_node_given,
       j.incarnation >= l.spool_since AS ours, j.incarnation, j.cancel_requested_time IS NOT NULL AS cancel_requested
FROM unnest($1::bigint[], $2::int[]) AS t (job_id, attempt)
JOIN jobs j USING (job_id, attempt) JOIN job_specs s USING (job_id)
JOIN node_leases l ON l.node = $3 AND l.incarnation = $4
WHERE j.state = 'RUNNING' AND j.node = $3
"""


async def running(connection: Connection, attempts: Sequence[Attempt], *, node: str, incarnation: int) -> list[JobSpec]:
    """Those of the attempts that are RUNNING on a node, for its current worker alone."""
    rows = await connection.fetch(
        _RUNNING, [a.job_id for a in attempts], [a.attempt for a in attempts], node, incarnation
    )
    return [spec_of(row) for row in rows]


def spec_of(row: Mapping[str, Any] | asyncpg.Record) -> JobSpec:
    """What a row says whose columns are the fields of JobSpec."""
    return JobSpec(**{**row, "environment": json.loads(row["environment"])})


def _job(row: Mapping[str, Any] | asyncpg.Record) -> Job:
    return Job(**{**row, "state": State(row["state"])})

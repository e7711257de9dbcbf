"""The ledger. `place`, `release` and `turn_over` are the only writers of allocations and of nodes.alloc_cpus."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import asyncpg
import structlog

from core.db.connection import Connection
from core.db.jobs import spec_of
from core.loss import Loss
from core.records import Attempt, Dispatch, Ending, JobSpec, Placement
from core.states import FINAL, Reason, State, is_legal

_PLACE = """
WITH input AS (
    SELECT * FROM unnest($1::bigint[], $2::text[]) AS t (job_id, node)
), locked AS (
    SELECT j.job_id, j.cpus, i.node FROM jobs j JOIN input i USING (job_id) WHERE j.state = 'PENDING'
    ORDER BY j.job_id FOR NO KEY UPDATE OF j SKIP LOCKED
), charged AS (
    -- Whoever holds a node is waited for, and its row asked again: what it left must have room for all of this.
    UPDATE nodes n SET alloc_cpus = n.alloc_cpus + t.cpus
    FROM (SELECT node, sum(cpus)::int AS cpus FROM locked GROUP BY node ORDER BY node) t
    WHERE n.name = t.node AND n.admin_state = 'RESUME' AND n.alloc_cpus + t.cpus <= n.cpus
    RETURNING n.name
), moved AS (
    UPDATE jobs j SET state = 'CONFIGURING', state_reason = 'None', state_description = NULL,
                      attempt = j.attempt + 1, node = l.node, allocate_time = clock_timestamp()
    FROM locked l JOIN charged c ON c.name = l.node
    WHERE j.job_id = l.job_id AND j.state = 'PENDING'
    RETURNING j.job_id, j.attempt, j.node, j.cpus, j.allocate_time
), dequeued AS (
    DELETE FROM pending p USING moved m WHERE p.job_id = m.job_id
), taken AS (
    INSERT INTO allocations (job_id, node, attempt, cpus) SELECT job_id, node, attempt, cpus FROM moved
), logged AS (
    INSERT INTO job_events (job_id, attempt, from_state, to_state, reason, node, time)
    SELECT job_id, attempt, 'PENDING', 'CONFIGURING', 'None', node, allocate_time FROM moved
)
SELECT job_id, attempt, node, cpus FROM moved ORDER BY job_id
"""


@dataclass(frozen=True, slots=True)
class Placed:
    """An attempt that now holds CPUs."""

    job_id: int
    attempt: int
    node: str
    cpus: int


async def place(connection: Connection, placements: Sequence[Placement]) -> list[Placed]:
    """Give jobs their CPUs: PENDING to CONFIGURING, attempt + 1; answer those that got them.

    The decision may be older than what is there. A job that somebody else holds, or that waits no longer, is passed
    over; a node that has no room for all that was to come to it, or takes no more, gets nothing.
    """
    rows = await connection.fetch(_PLACE, [p.job_id for p in placements], [p.node for p in placements])
    return [Placed(*row) for row in rows]


_RELEASE = """
WITH input AS (
    SELECT * FROM unnest($3::bigint[], $4::int[], $5::text[], $6::text[], $7::text[], $8::int[], $9::text[],
                         $10::bool[])
        AS t (job_id, attempt, state, reason, description, exit_code, signal, ran)
), locked AS (
    -- What was to go back to the queue and is to be cancelled is cancelled.
    SELECT i.job_id, i.attempt, i.reason, i.description, i.exit_code, i.signal, i.ran,
           CASE WHEN i.state = 'PENDING' AND j.cancel_requested_time IS NOT NULL THEN 'CANCELLED'
                ELSE i.state END AS state
    FROM jobs j JOIN input i USING (job_id)
    WHERE j.attempt = i.attempt AND j.state = $1 AND j.node = $2
      AND ($11::bigint IS NULL OR EXISTS (SELECT FROM node_leases l WHERE l.node = $2 AND l.incarnation = $11))
    ORDER BY j.job_id FOR NO KEY UPDATE OF j
), moved AS (
    UPDATE jobs j SET
        state = i.state, state_reason = i.reason, state_description = i.description,
        exit_code = CASE WHEN i.state <> 'PENDING' THEN i.exit_code END,
        signal = CASE WHEN i.state <> 'PENDING' THEN i.signal END,
        end_time = CASE WHEN i.state <> 'PENDING' THEN clock_timestamp() END,
        cancel_requested_time = CASE WHEN i.state = 'CANCELLED' THEN coalesce(j.cancel_requested_time, now())
                                     ELSE j.cancel_requested_time END,
        node = CASE WHEN i.state <> 'PENDING' THEN j.node END,
        allocate_time = CASE WHEN i.state <> 'PENDING' THEN j.allocate_time END,
        start_time = CASE WHEN i.state <> 'PENDING' THEN j.start_time END,
        restart_cnt = j.restart_cnt + (i.state = 'PENDING' AND $1 = 'RUNNING' AND i.ran)::int
    FROM locked i
    WHERE j.job_id = i.job_id AND j.attempt = i.attempt AND j.state = $1 AND j.node = $2
    RETURNING j.job_id, j.attempt, j.state, j.state_reason, j.partition, j.cpus
), released AS (
    DELETE FROM allocations a USING moved m WHERE a.job_id = m.job_id AND a.attempt = m.attempt RETURNING a.node, a.cpus
), returned AS (
    UPDATE nodes n SET alloc_cpus = n.alloc_cpus - r.cpus, cpus = greatest(n.declared_cpus, n.alloc_cpus - r.cpus)
    FROM (SELECT node, sum(cpus)::int AS cpus FROM released GROUP BY node) r WHERE n.name = r.node
), requeued AS (
    INSERT INTO pending (partition, cpus, job_id) SELECT partition, cpus, job_id FROM moved WHERE state = 'PENDING'
), logged AS (
    INSERT INTO job_events (job_id, attempt, from_state, to_state, reason, node)
    SELECT job_id, attempt, $1, state, state_reason, $2 FROM moved
)
SELECT job_id, attempt FROM moved
"""


def ends_of(before: State) -> frozenset[State]:
    """What an attempt that is `before` may become when it gives its CPUs back."""
    if before not in (State.CONFIGURING, State.RUNNING):
        return frozenset()
    return frozenset(after for after in FINAL | {State.PENDING} if is_legal(before, after))


async def release(
    connection: Connection,
    endings: Sequence[Ending],
    *,
    node: str,
    before: State,
    incarnation: int | None = None,
) -> set[Attempt]:
    """End attempts of one node and return their CPUs in the same statement; answer those that were current.

    `before` is the state they must be in; a worker also gives its `incarnation`. An attempt that goes back to
    PENDING stands in the queue again at its old place. A second release of an attempt finds nothing. ValueError when
    an ending is no legal move from `before`.
    """
    if wrong := {ending.state for ending in endings} - ends_of(before):
        raise ValueError(f"an attempt that is {before} does not end as {', '.join(sorted(wrong))}")
    rows = await connection.fetch(
        _RELEASE,
        before,
        node,
        *_columns(endings),
        [ending.ran for ending in endings],
        incarnation,
    )
    return {Attempt(*row) for row in rows}


def _columns(endings: Sequence[Ending]) -> tuple[list[Any], ...]:
    """What both statements are told of each end, column by column."""
    return (
        [ending.job_id for ending in endings],
        [ending.attempt for ending in endings],
        [ending.state for ending in endings],
        [ending.reason for ending in endings],
        [ending.description for ending in endings],
        [ending.exit_code for ending in endings],
        [ending.signal for ending in endings],
    )


_TURN_OVER = """
WITH RECURSIVE input AS (
    SELECT * FROM unnest($4::bigint[], $5::int[], $6::text[], $7::text[], $8::text[], $9::int[], $10::text[])
        AS t (job_id, attempt, state, reason, description, exit_code, signal)
), locked AS (
    SELECT i.*, j.cpus FROM jobs j JOIN input i USING (job_id)
    WHERE j.attempt = i.attempt AND j.state = 'RUNNING' AND j.node = $1
      AND EXISTS (SELECT FROM node_leases l WHERE l.node = $1 AND l.incarnation = $2)
    ORDER BY j.job_id FOR NO KEY UPDATE OF j
), current AS (
    -- Locked, after the jobs that are waited for: a newer worker that registers meanwhile must find what this begins.
    SELECT FROM node_leases
    WHERE node = $1 AND incarnation = $2 AND NOT draining AND lease_until > clock_timestamp() AND $3
      AND ($4 = '{}' OR (SELECT count(*) > 0 FROM locked))
      AND (SELECT job_id FROM pending ORDER BY job_id LIMIT 1) IS NOT NULL
    FOR SHARE
), held AS (
    SELECT n.partitions, n.alloc_cpus,
           n.declared_cpus - n.alloc_cpus + (SELECT coalesce(sum(cpus), 0)::int FROM locked) AS cpus
    FROM nodes n WHERE n.name = $1 AND n.admin_state = 'RESUME' AND (SELECT count(*) > 0 FROM current)
    FOR NO KEY UPDATE
), shapes AS (
    (SELECT m.partition, h.cpus AS room, first.cpus
     FROM held h CROSS JOIN unnest(h.partitions) AS m (partition)
     CROSS JOIN LATERAL (SELECT p.cpus FROM pending p WHERE p.partition = m.partition AND p.cpus <= h.cpus
                         ORDER BY p.cpus LIMIT 1) AS first)
    UNION ALL
    SELECT s.partition, s.room, next.cpus
    FROM shapes s
    CROSS JOIN LATERAL (SELECT p.cpus FROM pending p
                        WHERE p.partition = s.partition AND p.cpus > s.cpus AND p.cpus <= s.room
                        ORDER BY p.cpus LIMIT 1) AS next
), heads AS (
    -- Of each shape one more than fits: nothing behind it is taken. The 64 tell the planner, too, that they are few.
    SELECT head.job_id, sum(s.cpus) OVER (ORDER BY head.job_id) <= s.room AS fits
    FROM shapes s
    CROSS JOIN LATERAL (SELECT p.job_id FROM pending p WHERE p.partition = s.partition AND p.cpus = s.cpus
                        ORDER BY p.job_id LIMIT s.room / s.cpus + 1) AS head
    ORDER BY head.job_id LIMIT 64
), taken AS (
    -- Without waiting: whoever waits for the node may hold them.
    SELECT j.job_id, j.attempt
    FROM heads h
    CROSS JOIN LATERAL (SELECT j.job_id, j.attempt FROM jobs j WHERE j.job_id = h.job_id AND j.state = 'PENDING'
                        FOR NO KEY UPDATE SKIP LOCKED) AS j
    WHERE h.fits
), changed AS (
    -- All of these rows are locked and were asked again: nothing here may fail once more, or they would be read twice.
    UPDATE jobs j SET
        state = c.after, state_reason = c.reason, state_description = c.description,
        exit_code = c.exit_code, signal = c.signal,
        attempt = j.attempt + (c.before = 'PENDING')::int,
        node = $1,
        incarnation = CASE c.before WHEN 'PENDING' THEN $2 ELSE j.incarnation END,
        allocate_time = CASE c.before WHEN 'PENDING' THEN clock_timestamp() ELSE j.allocate_time END,
        start_time = CASE c.before WHEN 'PENDING' THEN clock_timestamp() ELSE j.start_time END,
        end_time = CASE c.before WHEN 'RUNNING' THEN clock_timestamp() END,
        cancel_requested_time = CASE c.after WHEN 'CANCELLED' THEN coalesce(j.cancel_requested_time, now())
                                             ELSE j.cancel_requested_time END
    FROM (SELECT job_id, attempt, 'RUNNING' AS before, state AS after, reason, description, exit_code, signal
          FROM locked
          UNION ALL
          SELECT job_id, attempt, 'PENDING', 'RUNNING', 'None', NULL, NULL, NULL FROM taken) c
    WHERE j.job_id = c.job_id AND j.attempt = c.attempt AND j.state = c.before
    RETURNING j.*
), released AS (
    DELETE FROM allocations a USING changed c
    WHERE c.state <> 'RUNNING' AND a.job_id = c.job_id AND a.attempt = c.attempt
    RETURNING a.cpus
), dequeued AS (
    DELETE FROM pending p USING changed c WHERE c.state = 'RUNNING' AND p.job_id = c.job_id
), charged AS (
    INSERT INTO allocations (job_id, node, attempt, cpus)
    SELECT job_id, node, attempt, cpus FROM changed WHERE state = 'RUNNING'
), balance AS MATERIALIZED (
    SELECT (SELECT sum(CASE state WHEN 'RUNNING' THEN cpus ELSE 0 END) FROM changed)::int
           - (SELECT coalesce(sum(cpus), 0) FROM released)::int AS cpus
), balanced AS (
    -- A node that came back smaller shrinks with what ends; what would be too much is refused by its CHECKs, which are
    -- asked first of the row as it was before this statement waited for it: reckoned is with what was found then.
    UPDATE nodes n SET alloc_cpus = coalesce(h.alloc_cpus, n.alloc_cpus) + b.cpus,
                       cpus = greatest(n.declared_cpus, least(n.cpus, coalesce(h.alloc_cpus, n.alloc_cpus) + b.cpus))
    FROM balance b LEFT JOIN held h ON true WHERE n.name = $1 AND b.cpus IS NOT NULL
    RETURNING n.cpus - n.alloc_cpus AS free
), logged AS (
    INSERT INTO job_events (job_id, attempt, from_state, to_state, reason, node, time)
    SELECT c.job_id, c.attempt, step.before, coalesce(step.after, c.state), c.state_reason, c.node,
           coalesce(c.end_time, c.start_time)
    FROM changed c
    JOIN (VALUES (false, 1, 'RUNNING', NULL), (true, 1, 'PENDING', 'CONFIGURING'), (true, 2, 'CONFIGURING', 'RUNNING'))
         AS step (begins, number, before, after) ON step.begins = (c.state = 'RUNNING')
    ORDER BY c.job_id, step.number
)
SELECT (SELECT free FROM balanced) AS free,
       $4 = '{}' AND (SELECT count(*) FROM (SELECT FROM pending ORDER BY job_id LIMIT 65) AS p)
                     > (SELECT count(*) FROM taken) AS left_some,
       j.job_id, j.attempt, j.restart_cnt, j.name, j.account, j.partition, j.tasks, j.cpus_per_task, j.cpus,
       j.memory_mib, j.time_limit_seconds, j.requeue, j.start_time, s.script, s.environment,
       s.current_working_directory, s.standard_output, s.standard_error, s.cpus_per_task_given, s.tasks_per_node_given
FROM changed j LEFT JOIN job_specs s ON s.job_id = j.job_id AND j.state = 'RUNNING'
"""

_WAITS = "SELECT (SELECT job_id FROM pending ORDER BY job_id LIMIT 1) IS NOT NULL"


@dataclass(frozen=True, slots=True)
class TurnOver:
    """What became of a report."""

    ended: set[Attempt]
    """The attempts that were current, and are over."""
    begun: list[JobSpec]
    """What is RUNNING in their place, and has not been launched."""
    free_cpus: int | None
    """What is left of the node; None when nothing ended or began."""
    left_some: bool = False
    """Of a take alone: whether something waits that it did not take."""


async def turn_over(
    connection: Connection, endings: Sequence[Ending], *, node: str, incarnation: int, take: bool
) -> TurnOver:
    """End running attempts for good, and give the node's free CPUs to what waits: RUNNING, all in one commit.

    Where more waits than runs, this saves jobs the way over the scheduler; where nothing runs, so does a take alone,
    without endings. Taken is what that would place next on
    this node: the oldest jobs of its partitions that fit, until the first that does not any more, 64 at most.
    The rest is the scheduler's: what somebody else holds, what fits behind a larger one, other nodes. `take` says
    whether the worker takes anything. Fenced as `release` and `jobs.start` are. ValueError when an ending is no legal
    end of what runs, or is PENDING: that is for `release`.
    """
    if wrong := {ending.state for ending in endings} - (ends_of(State.RUNNING) & FINAL):
        raise ValueError(f"an attempt that is RUNNING does not end as {', '.join(sorted(wrong))}")
    rows = await connection.fetch(
        _TURN_OVER,
        node,
        incarnation,
        take,
        *_columns(endings),
    )
    begun = [
        spec_of({name: value for name, value in row.items() if name not in ("free", "left_some")})
        for row in rows
        if row["script"] is not None
    ]
    ended = {Attempt(row["job_id"], row["attempt"]) for row in rows if row["script"] is None}
    if not rows:
        return TurnOver(set(), [], None, not endings and await connection.fetchval(_WAITS))
    return TurnOver(ended, begun, rows[0]["free"], rows[0]["left_some"])


_UNCLAIMED = """
SELECT a.job_id, a.attempt, a.node FROM allocations a JOIN jobs j USING (job_id, attempt)
WHERE j.state = 'CONFIGURING' AND j.allocate_time < clock_timestamp() - make_interval(secs => $1)
ORDER BY a.job_id LIMIT $2
"""


async def unclaimed(connection: Connection, seconds: float, limit: int) -> list[Dispatch]:
    """What was allocated `seconds` ago and has not started: whoever was told may have lost the message."""
    return [Dispatch(*row) for row in await connection.fetch(_UNCLAIMED, seconds, limit)]


@dataclass(frozen=True, slots=True)
class Held:
    """An attempt that holds CPUs of a node, as the node's worker looks at it."""

    job_id: int
    attempt: int
    state: State
    cancel_requested: bool


_OF_NODE = """
SELECT a.job_id, a.attempt, j.state, j.cancel_requested_time IS NOT NULL
FROM allocations a JOIN jobs j USING (job_id) WHERE a.node = $1 ORDER BY a.job_id
"""


async def of_node(connection: Connection, node: str) -> list[Held]:
    """Everything that holds CPUs of a node."""
    rows = await connection.fetch(_OF_NODE, node)
    return [Held(row[0], row[1], State(row[2]), row[3]) for row in rows]


_STRANDED = """
SELECT a.job_id, a.attempt, a.node FROM allocations a JOIN jobs j USING (job_id)
LEFT JOIN node_leases l ON l.node = a.node
WHERE j.state = 'CONFIGURING' AND (l.node IS NULL OR l.draining OR l.lease_until < now())
ORDER BY a.node, a.job_id LIMIT $1
"""


async def stranded(connection: Connection, limit: int) -> list[Dispatch]:
    """Attempts that have not started, on nodes whose lease is over or that drain."""
    return [Dispatch(*row) for row in await connection.fetch(_STRANDED, limit)]


_OVERDUE = """
SELECT j.job_id, j.attempt, j.requeue
FROM allocations a JOIN jobs j USING (job_id, attempt)
WHERE a.node = $1 AND j.state = 'RUNNING'
  AND CASE WHEN j.requeue THEN $2
           -- A script may begin later than its attempt, when its worker died in between, but then not in silence.
           ELSE greatest(j.start_time, $3) + make_interval(secs => j.time_limit_seconds) <= $4 END
ORDER BY j.job_id LIMIT $5 FOR NO KEY UPDATE OF j SKIP LOCKED
"""


async def lock_overdue(connection: Connection, loss: Loss, limit: int) -> dict[Attempt, bool]:
    """Lock what runs no more on a lost node: what may be requeued (True), and what has reached its time limit (False).

    What somebody else holds at this moment is passed over.
    """
    lease = loss.lease
    rows = await connection.fetch(_OVERDUE, lease.node, loss.requeue, lease.heartbeat_time, loss.limits, limit)
    return {Attempt(row[0], row[1]): row[2] for row in rows}


_ON_DOWN = """
SELECT a.job_id, a.attempt, a.node, j.state, n.admin_reason
FROM nodes n JOIN allocations a ON a.node = n.name JOIN jobs j USING (job_id, attempt)
WHERE n.admin_state = 'DOWN' AND ($1::text IS NULL OR n.name = $1)
ORDER BY a.node, j.state, a.job_id LIMIT $2
"""


async def end_on_down(connection: Connection, limit: int, node: str | None = None) -> list[Dispatch]:
    """End what nodes that are declared DOWN hold, or one of them: NODE_FAIL, or PENDING again where it has not started.

    Answers what ended, of at most `limit` attempts; one that starts at this moment is for the next call. Each node
    and state is a transaction of its own (see schema.sql, lock order), so this is not to be called in one.
    """
    rows = await connection.fetch(_ON_DOWN, node, limit)
    ended = []
    for (name, before), group in groupby(rows, key=lambda row: (row["node"], State(row["state"]))):
        endings = [_on_down(row) for row in group]
        done = await release(connection, endings, node=name, before=before)
        for ending in endings:
            if Attempt(ending.job_id, ending.attempt) in done:
                ended.append(Dispatch(ending.job_id, ending.attempt, name))
                log = structlog.get_logger().bind(job_id=ending.job_id, attempt=ending.attempt, node=name)
                log.warning("job_ended_by_down", state=ending.state)
    return ended


def _on_down(row: asyncpg.Record) -> Ending:
    if State(row["state"]) is State.CONFIGURING:
        return Ending(row["job_id"], row["attempt"], State.PENDING, Reason.NONE)
    why = f"node {row['node']} was declared DOWN: {row['admin_reason']}"
    return Ending(row["job_id"], row["attempt"], State.NODE_FAIL, Reason.NODE_DOWN, why)

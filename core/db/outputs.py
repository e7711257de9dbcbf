"""The table outputs: where the output of each restart begins; read with what job_events knows of the attempts."""

from collections.abc import Sequence

from core.attempts import Start
from core.db.connection import Connection
from core.records import Attempt, Output

_STORE = """
WITH current AS (
    SELECT i.job_id, i.attempt, i.restart_cnt, i.stdout_begin, i.stderr_begin
    FROM unnest($1::bigint[], $2::int[], $3::int[], $4::bigint[], $5::bigint[])
         AS i (job_id, attempt, restart_cnt, stdout_begin, stderr_begin)
    JOIN jobs j USING (job_id, attempt)
    WHERE j.state = 'RUNNING' AND j.node = $6
      AND EXISTS (SELECT FROM node_leases l WHERE l.node = $6 AND l.incarnation = $7)
), stored AS (
    -- The first word stands: of a worker that died before the script started, there may be an empty file since.
    INSERT INTO outputs (job_id, attempt, restart_cnt, stdout_begin, stderr_begin)
    SELECT job_id, attempt, restart_cnt, stdout_begin, stderr_begin FROM current ORDER BY job_id
    ON CONFLICT DO NOTHING
)
SELECT job_id, attempt FROM current
"""


async def store(connection: Connection, outputs: Sequence[Output], *, node: str, incarnation: int) -> set[Attempt]:
    """Store where outputs begin, on behalf of a node's current worker; answer whose attempts are current.

    May be said again: only what was said first is kept.
    """
    rows = await connection.fetch(
        _STORE,
        [output.job_id for output in outputs],
        [output.attempt for output in outputs],
        [output.restart_cnt for output in outputs],
        [output.stdout_begin for output in outputs],
        [output.stderr_begin for output in outputs],
        node,
        incarnation,
    )
    return {Attempt(*row) for row in rows}


_STARTS = """
WITH told AS (
    SELECT job_id, attempt, max(node) AS node, min(time) AS start_time,
           bool_or(to_state = 'PENDING' AND reason = 'Resources') AS went_back  -- the reason of what was not started
    FROM job_events WHERE job_id = $1 AND (to_state = 'RUNNING' OR from_state = 'RUNNING')
    GROUP BY job_id, attempt
)
SELECT t.attempt, t.node, t.start_time, t.went_back, o.restart_cnt, o.stdout_begin, o.stderr_begin, n.work_base_dir,
       n.job_user
FROM told t LEFT JOIN outputs o USING (job_id, attempt) LEFT JOIN nodes n ON n.name = t.node
ORDER BY t.attempt
"""


async def starts(connection: Connection, job_id: int) -> list[Start]:
    """The attempts of a job that came to RUNNING, in their order."""
    return [Start(*row) for row in await connection.fetch(_STARTS, job_id)]

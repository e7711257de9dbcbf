"""Every invariant that SQL can state: a broken one is returned as its rows."""

from dataclasses import dataclass

from core.db.connection import Connection

INVARIANTS = {
    "capacity: alloc_cpus is the sum of a node's allocations": """
        SELECT n.name, n.alloc_cpus, coalesce(sum(a.cpus), 0) AS allocated
        FROM nodes n LEFT JOIN allocations a ON a.node = n.name
        GROUP BY n.name, n.alloc_cpus HAVING n.alloc_cpus <> coalesce(sum(a.cpus), 0)""",
    "ledger: exactly the jobs that are CONFIGURING or RUNNING hold CPUs, their own, on their node": """
        SELECT coalesce(j.job_id, a.job_id) AS job_id, j.state, j.attempt, j.node, j.cpus,
               a.attempt AS held_attempt, a.node AS held_node, a.cpus AS held_cpus
        FROM (SELECT * FROM jobs WHERE state IN ('CONFIGURING', 'RUNNING')) j FULL JOIN allocations a USING (job_id)
        WHERE (j.attempt, j.node, j.cpus) IS DISTINCT FROM (a.attempt, a.node, a.cpus)""",
    "queue: exactly the jobs that are PENDING wait, in their own shape": """
        SELECT coalesce(j.job_id, p.job_id) AS job_id, j.state, j.partition, j.cpus, p.partition AS queued_partition,
               p.cpus AS queued_cpus
        FROM (SELECT * FROM jobs WHERE state = 'PENDING') j FULL JOIN pending p USING (job_id)
        WHERE (j.partition, j.cpus) IS DISTINCT FROM (p.partition, p.cpus)""",
    "specification: every job has one": """
        SELECT coalesce(j.job_id, s.job_id) AS job_id FROM jobs j FULL JOIN job_specs s USING (job_id)
        WHERE j.job_id IS NULL OR s.job_id IS NULL""",
    "key: every key stands for a job of its account": """
        SELECT k.account, k.key, k.job_id FROM idempotency_keys k LEFT JOIN jobs j USING (job_id, account)
        WHERE j.job_id IS NULL""",
    "one end: a job that ended has exactly one final event, and its last event is its state": """
        WITH told AS (
            SELECT job_id, count(*) FILTER (WHERE to_state NOT IN ('PENDING', 'CONFIGURING', 'RUNNING')) AS endings,
                   (array_agg(to_state ORDER BY seq DESC))[1] AS last_state
            FROM job_events GROUP BY job_id
        )
        SELECT j.job_id, j.state, t.endings, t.last_state
        FROM jobs j LEFT JOIN told t USING (job_id)
        WHERE t.endings IS DISTINCT FROM (j.end_time IS NOT NULL)::int OR t.last_state IS DISTINCT FROM j.state""",
    "one start: no attempt entered RUNNING twice": """
        SELECT job_id, attempt, count(*) FROM job_events WHERE to_state = 'RUNNING'
        GROUP BY job_id, attempt HAVING count(*) > 1""",
    "fencing: what runs was started by a worker that its node has had": """
        SELECT j.job_id, j.node, j.incarnation, l.incarnation AS of_node
        FROM allocations a JOIN jobs j USING (job_id) LEFT JOIN node_leases l ON l.node = a.node
        WHERE j.state = 'RUNNING' AND (j.incarnation IS NULL OR j.incarnation > l.incarnation)""",
    "restart: only a job that allows it was started again after its script had run": """
        SELECT job_id, attempt, restart_cnt, requeue FROM jobs
        WHERE restart_cnt > 0 AND (NOT requeue OR restart_cnt > attempt)""",
    "output: of a restart that ran to its end it is known where its output begins": """
        SELECT j.job_id, j.attempt, j.restart_cnt, o.restart_cnt AS noted
        FROM jobs j LEFT JOIN outputs o USING (job_id, attempt)
        WHERE j.restart_cnt > 0 AND num_nonnulls(j.exit_code, j.signal) > 0
          AND o.restart_cnt IS DISTINCT FROM j.restart_cnt""",
    "exit: a script that ran to its end has exactly one of exit_code and signal": """
        SELECT job_id, state, exit_code, signal FROM jobs
        WHERE (state IN ('COMPLETED', 'TIMEOUT') AND (exit_code IS NULL) = (signal IS NULL))
           OR (state NOT IN ('COMPLETED', 'TIMEOUT') AND exit_code IS NOT NULL AND signal IS NOT NULL)""",
}


@dataclass(frozen=True, slots=True)
class Broken:
    """A broken invariant with one of the rows that break it."""

    invariant: str
    row: dict[str, object]


async def audit(connection: Connection) -> list[Broken]:
    """Every row that breaks an invariant, of one snapshot of the live database."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        return [Broken(name, dict(row)) for name, query in INVARIANTS.items() for row in await connection.fetch(query)]

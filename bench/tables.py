"""Full tables: what would take hours to submit and to run is written by SQL, as it would stand there.

Written without waiting for the disk (`synchronous_commit` of this one connection); then VACUUM, ANALYZE, CHECKPOINT.
"""

import asyncpg

from bench.spawn import SCRIPT

CHUNK = 500_000
"""Jobs of a transaction."""
ACCOUNTS = 10
RARE = 50
"""Jobs that bear a name of their own: the oldest of those that wait."""

_FINISHED = """
INSERT INTO jobs (job_id, state, attempt, name, account, partition, tasks, cpus_per_task, cpus, requeue, node,
                  incarnation, submit_time, allocate_time, start_time, end_time, exit_code)
OVERRIDING SYSTEM VALUE
SELECT i, 'COMPLETED', 1, 'bench', 'account' || i % $4, $3, 1, 1, 1, false, $5, 1, now(), now(), now(), now(), 0
FROM generate_series($1::bigint, $2::bigint) AS i
"""

_WAITING = """
INSERT INTO jobs (job_id, name, account, partition, tasks, cpus_per_task, cpus, requeue)
OVERRIDING SYSTEM VALUE
SELECT i, CASE WHEN i < $5::bigint THEN 'rare' ELSE 'bench' END, 'account' || i % $4, $3, 1, 1, 1, false
FROM generate_series($1::bigint, $2::bigint) AS i
"""

_QUEUE = "INSERT INTO pending (partition, cpus, job_id) SELECT $3, 1, i FROM generate_series($1::bigint, $2) AS i"

_SPECS = """
INSERT INTO job_specs (job_id, script, environment, standard_output, cpus_per_task_given, tasks_per_node_given,
                       submission)
SELECT i, $3, '{}', 'slurm-%j.out', true, false, i FROM generate_series($1::bigint, $2::bigint) AS i
"""

_SUBMITTED = """
INSERT INTO job_events (job_id, attempt, to_state, reason)
SELECT i, 0, 'PENDING', 'None' FROM generate_series($1::bigint, $2::bigint) AS i
"""

_ENDED = """
INSERT INTO job_events (job_id, attempt, from_state, to_state, reason, node)
SELECT i, step.attempt, step.before, step.after, 'None', CASE WHEN step.attempt > 0 THEN $3 END
FROM generate_series($1::bigint, $2::bigint) AS i
CROSS JOIN (VALUES (0, NULL, 'PENDING'), (1, 'PENDING', 'CONFIGURING'), (1, 'CONFIGURING', 'RUNNING'),
                   (1, 'RUNNING', 'COMPLETED')) AS step (attempt, before, after)
"""


async def fill(
    connection: asyncpg.Connection, *, waiting: int, finished: int, node: str, partition: str = "default"
) -> range:
    """Add `finished` jobs that have run on a node, and `waiting` ones of one CPU behind them: their numbers.

    Nothing else may be submitted meanwhile, and the nodes should be drained.
    """
    await connection.execute("SET synchronous_commit = off")
    first = await connection.fetchval("SELECT coalesce(max(job_id), 0) + 1 FROM jobs")
    queue = range(first + finished, first + finished + waiting)
    for low, high in _chunks(range(first, queue.start)):
        async with connection.transaction():
            await connection.execute(_FINISHED, low, high, partition, ACCOUNTS, node)
            await connection.execute(_ENDED, low, high, node)
            await connection.execute(_SPECS, low, high, SCRIPT)
    for low, high in _chunks(queue):
        async with connection.transaction():
            await connection.execute(_WAITING, low, high, partition, ACCOUNTS, queue.start + RARE)
            await connection.execute(_QUEUE, low, high, partition)
            await connection.execute(_SUBMITTED, low, high)
            await connection.execute(_SPECS, low, high, SCRIPT)
    await connection.execute("SELECT setval('jobs_job_id_seq', $1)", queue.stop - 1)
    await connection.execute("RESET synchronous_commit")
    await connection.execute("VACUUM ANALYZE")
    await connection.execute("CHECKPOINT")
    return queue


def _chunks(numbers: range) -> list[tuple[int, int]]:
    """First and last number of each."""
    return [(low, min(low + CHUNK, numbers.stop) - 1) for low in range(numbers.start, numbers.stop, CHUNK)]

"""What waits, and where there is room for it: the look that a pass begins with."""

from core.db.connection import Connection
from core.records import Capacity, Waiting

_LOOK = """
WITH RECURSIVE free AS MATERIALIZED (
    SELECT n.name, n.partitions, n.cpus - n.alloc_cpus AS cpus
    FROM nodes n JOIN node_leases l ON l.node = n.name
    WHERE n.alloc_cpus < n.cpus AND n.admin_state = 'RESUME' AND NOT l.draining AND l.lease_until > clock_timestamp()
      -- By the index: a look from the table's start passes all that was taken out since the last vacuum.
      AND (SELECT job_id FROM pending ORDER BY job_id LIMIT 1) IS NOT NULL
), room AS (
    SELECT partition, max(cpus) AS largest, sum(cpus) AS total
    FROM free CROSS JOIN unnest(partitions) AS partition GROUP BY partition
), shapes AS (
    (SELECT r.partition, r.largest, r.total, first.cpus
     FROM room r
     CROSS JOIN LATERAL (SELECT p.cpus FROM pending p WHERE p.partition = r.partition AND p.cpus <= r.largest
                         ORDER BY p.cpus LIMIT 1) AS first)
    UNION ALL
    SELECT s.partition, s.largest, s.total, next.cpus
    FROM shapes s
    CROSS JOIN LATERAL (SELECT p.cpus FROM pending p
                        WHERE p.partition = s.partition AND p.cpus > s.cpus AND p.cpus <= s.largest
                        ORDER BY p.cpus LIMIT 1) AS next
)
SELECT NULL::bigint AS job_id, name, cpus, partitions FROM free
UNION ALL
SELECT head.job_id, s.partition, s.cpus, NULL
FROM shapes s
CROSS JOIN LATERAL (SELECT p.job_id FROM pending p WHERE p.partition = s.partition AND p.cpus = s.cpus
                    ORDER BY p.job_id LIMIT least(s.total / s.cpus, $1)) AS head
ORDER BY job_id
"""


async def look(connection: Connection, limit: int) -> tuple[list[Waiting], list[Capacity]]:
    """What may be placed now, and where; both empty when nothing waits. `place` asks again.

    First the oldest jobs of every shape that fits somewhere, in the order of submission: at most `limit` of a shape,
    and no more than there are CPUs for. Then every node that has free CPUs and may be given work. A loose index scan
    (wiki.postgresql.org/wiki/Loose_indexscan) over the shapes: the cost is that of what fits, not of what waits.
    """
    rows = await connection.fetch(_LOOK, limit)
    waiting = [Waiting(row[0], row[1], row[2]) for row in rows if row[0] is not None]
    return waiting, [Capacity(row[1], frozenset(row[3]), row[2]) for row in rows[len(waiting) :]]

"""The table pending: what waits, by shape."""

from collections.abc import Sequence

from core.db.connection import Connection
from core.records import Waiting

_HEADS = """
WITH RECURSIVE room AS (
    SELECT * FROM unnest($1::text[], $2::int[], $3::bigint[]) AS t (partition, largest, total)
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
SELECT head.job_id, s.partition, s.cpus
FROM shapes s
CROSS JOIN LATERAL (SELECT p.job_id FROM pending p WHERE p.partition = s.partition AND p.cpus = s.cpus
                    ORDER BY p.job_id LIMIT least(s.total / s.cpus, $4)) AS head
ORDER BY head.job_id
"""


async def heads(connection: Connection, room: Sequence[tuple[str, int, int]], limit: int) -> list[Waiting]:
    """The oldest jobs of every shape that fits, in the order of submission: at most `limit` of a shape.

    `room` has for each partition its largest free node and its free CPUs in total. A loose index scan
    (wiki.postgresql.org/wiki/Loose_indexscan) over the shapes: the cost is that of what fits, not of what waits.
    """
    rows = await connection.fetch(_HEADS, [r[0] for r in room], [r[1] for r in room], [r[2] for r in room], limit)
    return [Waiting(*row) for row in rows]

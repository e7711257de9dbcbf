"""A run: a cluster under load, the looks at it while it runs, and its evidence once nothing is under way."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import asyncpg

from core.db.connection import CONNECTION_ERRORS
from core.records import Attempt
from services.worker import proc
from tests.faults import ledger
from tests.faults.cluster import Cluster
from tests.faults.evidence import Evidence, Sighting, Silence, stored
from tests.faults.load import Load
from tests.faults.record import Record
from tests.faults.verdicts import judge

LOOK_SECONDS = 0.04
ORPHAN_LOOK_SECONDS = 1.0
RECENT = 500
"""Jobs whose processes are looked for while others run."""
SETTLE_SECONDS = 120.0

_CAPACITY = """
SELECT n.name, n.cpus, n.alloc_cpus, coalesce(sum(a.cpus), 0)::int AS held
FROM nodes n LEFT JOIN allocations a ON a.node = n.name GROUP BY n.name, n.cpus, n.alloc_cpus ORDER BY n.name
"""

_OVER = """
SELECT e.job_id, e.attempt, j.name, j.end_time IS NOT NULL AS final
FROM job_events e JOIN jobs j USING (job_id)
WHERE e.from_state = 'RUNNING' AND e.job_id > (SELECT max(job_id) FROM jobs) - $1
  -- What ended because its node is silent may run on there, until the node is back and before it starts anything else.
  AND ($2 OR e.reason <> 'NodeDown' OR EXISTS (SELECT FROM job_events s
                                               WHERE s.node = e.node AND s.to_state = 'RUNNING' AND s.time > e.time))
"""

_STATES = """
SELECT coalesce(a.node, ''), j.state, count(*) FROM jobs j LEFT JOIN allocations a USING (job_id)
WHERE j.job_id IN (SELECT job_id FROM pending UNION ALL SELECT job_id FROM allocations) GROUP BY 1, 2
"""


@dataclass(slots=True)
class Run:
    """What the faults strike and the looks look at."""

    cluster: Cluster
    load: Load
    record: Record
    luck: Random
    silences: list[Silence] = field(default_factory=list)
    sightings: set[Sighting] = field(default_factory=set)
    freezes: tuple[float, float] = (2, 14)
    """Seconds, from and to, for which a scheduler is frozen, or a node cut off beyond what it must be."""
    snapshot: bytes | None = None
    """Of Redis, from some time ago."""
    findings: list[str] = field(default_factory=list)
    """What a scenario found out by looks of its own."""
    replaced: int = 0
    """Workers that were added, for the names of more."""
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _database: asyncpg.Connection | None = None

    async def ask(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        """Rows from the database past all wires; none while it is away."""
        async with self._asking:
            try:
                if self._database is None:
                    self._database = await self.cluster.connect()
                return await self._database.fetch(query, *arguments)
            except CONNECTION_ERRORS:
                if self._database is not None:
                    self._database.terminate()
                self._database = None
                return []

    async def states(self, node: str | None = None) -> dict[str, int]:
        """How many jobs are PENDING, CONFIGURING and RUNNING at this instant: of a node, or anywhere."""
        found: dict[str, int] = {}
        for where, state, count in await self.ask(_STATES):
            if node is None or where == node:
                found[state] = found.get(state, 0) + count
        return found

    async def look_at_capacity(self) -> None:
        """Look at the live database for ever."""
        while True:
            with suppress(*CONNECTION_ERRORS):
                connection = await self.cluster.connect()
                try:
                    while True:
                        await self._look_at_capacity_once(connection)
                        await asyncio.sleep(LOOK_SECONDS)
                finally:
                    connection.terminate()
            await asyncio.sleep(LOOK_SECONDS)

    async def _look_at_capacity_once(self, connection: asyncpg.Connection) -> None:
        rows = await connection.fetch(_CAPACITY)
        self.record.look({row["name"]: (row["cpus"], row["alloc_cpus"], row["held"]) for row in rows})

    async def look_for_orphans(self) -> None:
        """Look for processes of jobs that are over, for ever."""
        while True:
            await self.look_for_orphans_once()
            await asyncio.sleep(ORPHAN_LOOK_SECONDS)

    async def look_for_orphans_once(self, recent: int = RECENT, *, calm: bool = False) -> None:
        """The tables first: what they call over by then must be gone by now; where it is `calm`, no node is silent."""
        rows = await self.ask(_OVER, recent, calm)
        over = {Attempt(row["job_id"], row["attempt"]) for row in rows}
        names = {row["name"] for row in rows if row["final"]}
        for pid in proc.all_pids():
            name = _name_of(pid, self.cluster)
            if name is None or ((attempt := attempt_of(pid)) not in over and name not in names):
                continue
            stat = proc.read_stat(pid)
            if stat is not None and not stat.dead:
                self.sightings.add(Sighting(name or str(attempt), pid))

    async def evidence(self) -> Evidence:
        """Everything that is known, once nothing is under way any more."""
        await self.look_for_orphans_once(recent=2**40, calm=True)
        connection = await self.cluster.connect()
        try:
            rows, events, audited = await stored(connection)
        finally:
            await connection.close()
        return Evidence(
            sent=self.load.sent,
            lines=ledger.read(self.cluster.ledger),
            rows=rows,
            events=events,
            cpus=self.cluster.nodes,
            outputs={row.job_id: _output_of(self.cluster, row.job_id) for row in rows.values() if row.node},
            losses=self.cluster.losses,
            silences=self.silences,
            sightings=sorted(self.sightings, key=str),
            audited=audited,
            surprises=[*self.cluster.surprises, *self.findings],
            over=self.record.over,
        )

    async def verdicts(self) -> dict[str, list[str]]:
        """What is broken, by column; nothing may be under way."""
        return judge(await self.evidence())

    async def left(self) -> list[dict[str, Any]]:
        """What is not over, for whoever wonders why."""
        return [dict(row) for row in await self.ask(_LEFT)]

    async def settled(self, patience: float = SETTLE_SECONDS) -> bool:
        """Wait until nothing waits or runs; False when that takes too long."""
        deadline = asyncio.get_running_loop().time() + patience
        while asyncio.get_running_loop().time() < deadline:
            if await self.ask("SELECT 1") and not await self.states():
                return True
            await asyncio.sleep(0.05)
        return False


_LEFT = """
SELECT job_id, name, state, attempt, node, cancel_requested_time IS NOT NULL AS cancelled
FROM jobs WHERE end_time IS NULL ORDER BY job_id
"""


def _output_of(cluster: Cluster, job_id: int) -> bytes:
    """What its nodes have of its output, in whatever spool it lies, in the order in which it was written."""
    name = f"jobs/{job_id}/slurm-{job_id}.out"
    parts = [*cluster.folder.glob(f"*/{name}"), *(disk.seen(disk.folder) / name for disk in cluster.disks.values())]
    there = sorted((path for path in parts if path.exists()), key=lambda path: path.stat().st_mtime)
    return b"".join(path.read_bytes() for path in there)


def _name_of(pid: int, cluster: Cluster) -> str | None:
    """The name of the job that a process belongs to; empty where only its mark is known, None for a stranger."""
    with suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if cluster.token.encode() in command:
            return command.split(b"\0")[0].decode()
        if os.fsencode(cluster.ledger) in Path(f"/proc/{pid}/environ").read_bytes():
            return ""
    return None


def attempt_of(pid: int) -> Attempt | None:
    """The attempt whose mark a process bears."""
    words = (proc.read_variable(pid, "ROWLOCK_JOB") or "").split(":")
    return Attempt(int(words[0]), int(words[1])) if len(words) == 3 else None


@asynccontextmanager
async def running(cluster: Cluster, load: Load, record: Record, luck: Random) -> AsyncIterator[Run]:
    """A run with its looks, until the end of the block."""
    run = Run(cluster, load, record, luck)
    looks = [asyncio.create_task(look()) for look in (run.look_at_capacity, run.look_for_orphans)]
    try:
        yield run
    finally:
        for look in looks:
            look.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*looks, return_exceptions=True)
        if run._database is not None:
            run._database.terminate()

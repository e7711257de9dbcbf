"""`python -m bench.width`: jobs a second with few and with many nodes, whose scripts end at once (bench/worker.py).

For each number of nodes, in a fresh directory: servers, scheduler and workers; once all nodes are registered they are
taken out, what is to run is written into the tables, and they are taken back in. First some that do not count.
"""

import asyncio
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from bench import machine, report, scale
from bench.__main__ import count, note
from bench.apart import ROOT, BenchError
from bench.rates import rate
from bench.report import Target, percentile
from bench.scale import counts
from bench.stack import broken_invariants, durability
from bench.tables import fill
from core.db import schema
from core.db.connection import notify
from core.settings import Settings, usable_cpus
from services.standalone.child import Child, Step, spawn
from services.standalone.embedded import EmbeddedPostgres, EmbeddedRedis
from services.standalone.stack import exported

LEAST_PER_SECOND = 3000.0
LONGEST_PASS_SECONDS = 0.05
WIDE = 1000
"""Nodes that the targets are about."""
ROUNDS = 3
"""At least so many times as many jobs are measured as there are CPUs."""
CONNECTIONS, CONNECTIONS_BESIDE = 2, 50
"""Of a node, and of all else."""
STOP = (Step(signal.SIGTERM, 60),)
LOOK_SECONDS = 0.5


class Cluster:
    """Servers, a scheduler and nodes, all of them children of this process."""

    def __init__(self, folder: Path, nodes: int, options: Any) -> None:
        self.folder, self.nodes, self.options = folder, nodes, options
        self.passes = folder / "passes"
        most = {"max_connections": str(CONNECTIONS * nodes + CONNECTIONS_BESIDE)}
        self.postgres = EmbeddedPostgres(folder, throwaway=True, options=most)
        self.redis = EmbeddedRedis(folder)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncpg.Connection]:
        """Everything, once every node is registered; a connection to the tables."""
        async with self.postgres, self.redis, AsyncExitStack() as stack:
            settings = Settings.model_construct().model_copy(update={"log_dir": self.folder / "logs"})
            environment = {**exported(settings), "DATABASE_URL": self.postgres.url, "REDIS_URL": self.redis.url}
            connection = await asyncpg.connect(self.postgres.url)
            stack.push_async_callback(connection.close)
            await connection.execute(schema.fresh_schema())
            await self._start(stack, "scheduler", (self.passes,), environment)
            for first, nodes in shares(self.nodes, min(self.nodes, usable_cpus())):
                await self._start(stack, "worker", self._words(first, nodes), {})
            await self._until_registered(connection)
            yield connection

    def _words(self, first: int, nodes: int) -> tuple[object, ...]:
        options = self.options
        size = ("--folder", self.folder, "--first", first, "--nodes", nodes, "--cpus", options.cpus)
        return (*size, "--poll", options.poll, "--database", self.postgres.url, "--redis", self.redis.url)

    async def _start(
        self, stack: AsyncExitStack, role: str, words: Iterable[object], settings: Mapping[str, str]
    ) -> None:
        output = os.open(self.folder / f"{role}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            child: Child = spawn(
                role,
                (sys.executable, "-m", f"bench.{role}", *map(str, words)),
                env={**os.environ, **settings, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"},
                dying=signal.SIGKILL,
                output=output,
                cwd=self.folder,
            )
        finally:
            os.close(output)
        stack.push_async_callback(child.stop, STOP)

    async def _until_registered(self, connection: asyncpg.Connection) -> None:
        deadline = time.monotonic() + 60 + self.nodes / 3
        while (found := await connection.fetchval(_ALIVE)) < self.nodes:
            if time.monotonic() > deadline:
                raise BenchError(f"{found} of {self.nodes} nodes are there after {60 + self.nodes / 3:.0f} s")
            await asyncio.sleep(0.2)


_ALIVE = "SELECT count(*) FROM node_leases WHERE lease_until > clock_timestamp()"


def shares(nodes: int, processes: int) -> list[tuple[int, int]]:
    """The first node of each process, and how many it has."""
    starts = [nodes * number // processes for number in range(processes + 1)]
    return [(low + 1, high - low) for low, high in itertools.pairwise(starts)]


async def measured(folder: Path, nodes: int, options: Any) -> dict[str, Any]:
    """One width. Raises BenchError when the run is void, TimeoutError when it takes too long."""
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="nodes-", dir=folder)), nodes, options)
    began = time.monotonic()
    async with asyncio.timeout(300 + nodes), cluster.running() as connection:
        note(f"{nodes} nodes are registered after {time.monotonic() - began:.0f} s")
        idle = await _idle(connection)
        await _work_off(connection, nodes * options.cpus)
        begin, cpu = time.time(), machine.cpu_times(os.getpid())
        locks: list[tuple[int, int]] = []
        looking = asyncio.create_task(_look_at_locks(cluster.postgres.url, locks))
        jobs = max(options.jobs, ROUNDS * nodes * options.cpus)
        moments = await _work_off(connection, jobs)
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        found = {
            "nodes": nodes,
            "jobs": jobs,
            **{f"{name}_per_second": round(rate(times), 1) for name, times in moments.items()},
            "cpu_seconds": machine.used(cpu, machine.cpu_times(os.getpid()), 0.0),
            "idle_cpus": idle,
            "memory_kib": machine.memory(os.getpid()),
            "connections": await connection.fetchval(_CONNECTIONS),
            "locks": {"most": max((a for a, _ in locks), default=0), "waiting": max((b for _, b in locks), default=0)},
            "durability": await durability(cluster.postgres.url),
        }
        if broken := await broken_invariants(connection):
            raise BenchError(f"the run is void, the audit found: {'; '.join(broken)}")
    passes = [json.loads(line) for line in cluster.passes.read_text().splitlines()]
    return {**found, "passes": [each for each in passes if each[0] >= begin]}


IDLE_SECONDS = 5.0
_CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'rowlock worker%'"


async def _idle(connection: asyncpg.Connection) -> dict[str, float]:
    """CPUs in use by role while nothing is to be done."""
    before = machine.cpu_times(os.getpid())
    await asyncio.sleep(IDLE_SECONDS)
    used = machine.used(before, machine.cpu_times(os.getpid()), 0.0)
    return {role: round(seconds / IDLE_SECONDS, 3) for role, seconds in used.items()}


_OUT = "UPDATE nodes SET admin_state = 'DRAIN', admin_reason = 'bench'"
_IN = "UPDATE nodes SET admin_state = 'RESUME', admin_reason = NULL"
_LEFT = "SELECT EXISTS (SELECT FROM pending) OR EXISTS (SELECT FROM allocations)"
_MOMENTS = """
SELECT extract(epoch FROM allocate_time)::float8, extract(epoch FROM start_time)::float8,
       extract(epoch FROM end_time)::float8, state
FROM jobs WHERE job_id BETWEEN $1 AND $2
"""


async def _work_off(connection: asyncpg.Connection, jobs: int) -> dict[str, list[float]]:
    """Let so many jobs run: when each was allocated, started and ended, ascending."""
    await connection.execute(_OUT)
    queue = await fill(connection, waiting=jobs, finished=0, node="")
    await connection.execute(_IN)
    await notify(connection)
    while await connection.fetchval(_LEFT):  # noqa: ASYNC110  (it is another's doing)
        await asyncio.sleep(0.1)
    rows = await connection.fetch(_MOMENTS, queue[0], queue[-1])
    if wrong := {row[3] for row in rows} - {"COMPLETED"}:
        raise BenchError(f"the run is void: jobs ended {', '.join(sorted(wrong))}")
    return {name: sorted(row[at] for row in rows) for at, name in enumerate(("allocated", "started", "ended"))}


async def _look_at_locks(url: str, seen: list[tuple[int, int]]) -> None:
    connection = await asyncpg.connect(url)
    try:
        while True:
            row = await connection.fetchrow("SELECT count(*), count(*) FILTER (WHERE NOT granted) FROM pg_locks")
            assert row is not None
            seen.append((row[0], row[1]))
            await asyncio.sleep(LOOK_SECONDS)
    finally:
        connection.terminate()


def measure_all(folder: Path, options: Any) -> dict[str, Any]:
    """Every width, `--runs` times."""
    results: dict[str, Any] = {"widths": []}
    for _ in range(options.runs):
        for nodes in options.nodes:
            load = machine.load()
            try:
                found = asyncio.run(measured(folder, nodes, options))
            except TimeoutError:
                raise BenchError(f"{nodes} nodes took more than {300 + nodes} s") from None
            results["durability"] = found.pop("durability")
            results["widths"].append({"nodes": nodes, "load": load, "found": found})
            note(f"{nodes} nodes: ended/s {found['ended_per_second']}, load {load:.2f}")
    return results


def lines(results: Mapping[str, Any]) -> list[str]:
    """The table, and the targets."""
    widths = results["widths"]
    labels = list(dict.fromkeys(width["nodes"] for width in widths))
    rows: dict[str, Callable[[Any], float]] = {
        "allocated/s": lambda f: f["allocated_per_second"],
        "started/s": lambda f: f["started_per_second"],
        "ended/s": lambda f: f["ended_per_second"],
        "connections of a node": lambda f: f["connections"] / f["nodes"],
        "passes of the scheduler": lambda f: len(f["passes"]),
        "jobs of a pass, most": lambda f: max((each[3] for each in f["passes"]), default=0),
        "pass, p50, ms": lambda f: _pass_ms(f, 1, 50),
        "pass, p95, ms": lambda f: _pass_ms(f, 1, 95),
        "pass, longest, ms": lambda f: _pass_ms(f, 1, 100),
        "row locks of a pass held, p95, ms": lambda f: _pass_ms(f, 2, 95),
        "locks at a time, most (pg_locks)": lambda f: f["locks"]["most"],
        "locks waited for, most": lambda f: f["locks"]["waiting"],
        "MiB of postgres (PSS)": lambda f: f["memory_kib"].get("postgres", 0) / 1024,
        "MiB of the workers": lambda f: f["memory_kib"].get("worker", 0) / 1024,
        "CPUs when idle: workers": lambda f: f["idle_cpus"].get("worker", 0.0),
        "CPUs when idle: postgres": lambda f: f["idle_cpus"].get("postgres", 0.0),
        "us of CPU a job: workers": lambda f: f["cpu_seconds"].get("worker", 0.0) / f["jobs"] * 1e6,
        "us of CPU a job: postgres": lambda f: f["cpu_seconds"].get("postgres", 0.0) / f["jobs"] * 1e6,
        "us of CPU a job: scheduler": lambda f: f["cpu_seconds"].get("scheduler", 0.0) / f["jobs"] * 1e6,
        "us of CPU a job: redis": lambda f: f["cpu_seconds"].get("redis", 0.0) / f["jobs"] * 1e6,
    }
    table = [f"{'nodes':<44}" + "".join(f"{label:>13,}" for label in labels)]
    for name, value in rows.items():
        cells = []
        for label in labels:
            found = [width["found"] for width in widths if width["nodes"] == label]
            cells.append(f"{statistics.median(map(value, found)):>13,.2f}")
        table.append(f"  {name:<42}" + "".join(cells))
    loads = ", ".join(f"{width['load']:.2f}" for width in widths)
    return [*table, "", f"load before each: {loads}", *report.target_lines(targets(widths))]


def _pass_ms(found: Mapping[str, Any], at: int, percent: float) -> float:
    times: Sequence[float] = [each[at] for each in found["passes"]]
    return percentile(times, percent) * 1000 if times else 0.0


def targets(widths: Sequence[Mapping[str, Any]]) -> list[Target]:
    """Those of issue 4, for WIDE nodes."""
    wide = [width["found"] for width in widths if width["nodes"] == WIDE]
    ended = statistics.median([found["ended_per_second"] for found in wide]) if wide else None
    passes = [each[1] for found in wide for each in found["passes"]]
    longest = percentile(passes, 95) if passes else None
    return [
        Target(
            f"{WIDE:,} nodes: jobs ended/s >= {LEAST_PER_SECOND:,.0f}",
            "-" if ended is None else f"{ended:,.0f}/s",
            None if ended is None else ended >= LEAST_PER_SECOND,
        ),
        Target(
            f"{WIDE:,} nodes: p95 of a pass <= {LONGEST_PASS_SECONDS * 1000:g} ms",
            "-" if longest is None else f"{longest * 1000:.1f} ms",
            None if longest is None else longest <= LONGEST_PASS_SECONDS,
        ),
    ]


def main(words: Sequence[str] | None = None) -> int:
    """0 when everything was measured; 1 with one line when a run is void."""
    parser = scale.parser("width", __doc__)
    parser.add_argument("--nodes", type=counts, default="1,10,100,1000", metavar="N,…", help="nodes (%(default)s)")
    parser.add_argument("--cpus", type=count, default=4, metavar="N", help="of each node (%(default)s)")
    parser.add_argument("--jobs", type=count, default=8000, metavar="N", help="that are measured (%(default)s)")
    parser.add_argument("--runs", type=count, default=1, metavar="N", help="of every width (%(default)s)")
    parser.add_argument(
        "--poll", type=float, default=1.0, metavar="SECONDS", help="POLL_SECONDS of the nodes (%(default)g)"
    )
    options = parser.parse_args(words)
    scale.allow_many_files()
    return scale.run("width", options, lambda folder: measure_all(folder, options), lines)


if __name__ == "__main__":
    sys.exit(main())

"""A burst: many short jobs over a few connections, from the first POST until the last one has ended.

`python -m bench.burst …` is the load generator alone, a process of its own. It answers with rates, checks
and CPU times; a run in which a job did not end COMPLETED, or CPUs stayed allocated, is void.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import asyncpg
import uvloop

from bench.apart import BenchError, answer, own_cpu
from bench.machine import cpu_times, used
from bench.spawn import SCRIPT
from bench.stack import Stack, Written, broken_invariants, written
from bench.wire import Lane, open_lane, request
from core.states import FINAL

POLL_SECONDS = 0.02  # of the job posted last, until it is over: 50 requests a second beside the burst
SUBMISSION = {"job": {"name": "bench", "account": "bench", "cpus_per_task": 1}, "script": SCRIPT}
_FINAL = frozenset(state.value for state in FINAL)


@dataclass(frozen=True, slots=True)
class Size:
    """How many jobs, over how many connections, after how many that are not measured."""

    jobs: int
    connections: int
    warm_up: int = 100
    as_list: bool = False
    """Whether one request holds them all."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one burst found. Times of jobs are PostgreSQL's, those of requests ours, by one clock of one machine."""

    jobs: int
    accepted_per_second: float
    finished_per_second: float
    seconds: float
    seen_after_seconds: float
    cpu_seconds: dict[str, float]
    transactions: int
    wal_bytes: int


async def burst(target: Stack, size: Size, seconds: float) -> Result:
    """Warm up, then measure. Raises BenchError when the run is void, TimeoutError after `seconds`."""
    connection = await asyncpg.connect(target.database_url)
    lanes = [await open_lane(target.port) for _ in range(size.connections)]
    try:
        async with asyncio.timeout(seconds):
            warm = await _post_all(lanes, target, size.warm_up)
            await _all_over(lanes[0], target, warm)
            result = await _measured(connection, lanes, target, size)
            await _check_nodes(lanes[0], target)
            if broken := await broken_invariants(connection):
                raise BenchError(f"the run is void, the audit found: {'; '.join(broken)}")
            return result
    finally:
        for lane in lanes:
            lane.close()
        await connection.close()


async def _measured(connection: asyncpg.Connection, lanes: Sequence[Lane], target: Stack, size: Size) -> Result:
    wrote, times, cpu = await written(connection), cpu_times(target.pid), own_cpu()
    began = time.time()
    ids = await (_post_list(lanes[0], target, size.jobs) if size.as_list else _post_all(lanes, target, size.jobs))
    accepted = time.time()
    await _over(lanes[0], target, ids[-1])
    seen = time.time()
    cpu_seconds = used(times, cpu_times(target.pid), own_cpu() - cpu)
    wrote_after = await written(connection)
    ended = max(await _all_over(lanes[0], target, ids))
    return Result(
        jobs=size.jobs,
        accepted_per_second=round(size.jobs / (accepted - began), 1),
        finished_per_second=round(size.jobs / (ended - began), 1),
        seconds=round(ended - began, 3),
        seen_after_seconds=round(max(seen, ended) - began, 3),
        cpu_seconds=cpu_seconds,
        **asdict(_between(wrote, wrote_after)),
    )


def _between(before: Written, after: Written) -> Written:
    return Written(after.transactions - before.transactions, after.wal_bytes - before.wal_bytes)


async def _post_all(lanes: Sequence[Lane], target: Stack, jobs: int) -> list[int]:
    """Post them as fast as the connections allow; their numbers, ascending."""
    sent = request("POST", "/api/v1/jobs", target.port, SUBMISSION)
    turns, bodies = iter(range(jobs)), list[bytes]()
    await asyncio.gather(*(_post_some(lane, sent, turns, bodies) for lane in lanes))
    return sorted(_job_id(body) for body in bodies)


async def _post_list(lane: Lane, target: Stack, jobs: int) -> list[int]:
    """Post them in one request; their numbers, ascending."""
    got = await lane.ask(request("POST", "/api/v1/jobs", target.port, {"jobs": [SUBMISSION] * jobs}))
    if got.status != 201:
        raise BenchError(f"the run is void: the list was answered {got.status} {got.body[:300]!r}")
    return [job["job_id"] for job in got.document["jobs"]]


async def _post_some(lane: Lane, sent: bytes, turns: Iterator[int], bodies: list[bytes]) -> None:
    for _ in turns:
        got = await lane.ask(sent)
        if got.status != 201:
            raise BenchError(f"the run is void: a POST was answered {got.status} {got.body[:300]!r}")
        bodies.append(got.body)


def _job_id(body: bytes) -> int:
    # Only the number is wanted, and it comes first: 2,000 documents are not read while the last jobs run.
    before, _, rest = body.partition(b'"job_id":')
    if before.strip() != b"{":
        raise BenchError(f"a job's document should begin with its number: {body[:100]!r}")
    return int(rest.partition(b",")[0])


async def _over(lane: Lane, target: Stack, job_id: int) -> None:
    asked = request("GET", f"/api/v1/jobs/{job_id}", target.port)
    while (await lane.ask(asked)).document["state"] not in _FINAL:  # noqa: ASYNC110  (it is another's doing)
        await asyncio.sleep(POLL_SECONDS)


async def _all_over(lane: Lane, target: Stack, ids: Sequence[int]) -> list[float]:
    """Wait until all are over: their end times. Raises BenchError when one is not COMPLETED."""
    await _over(lane, target, ids[-1])
    while True:
        jobs = {job["job_id"]: job async for job in _listed(lane, target) if ids[0] <= job["job_id"] <= ids[-1]}
        if jobs.keys() != set(ids):
            raise BenchError(f"the run is void: {len(ids)} jobs were posted and {len(jobs)} are listed")
        running = [job for job in jobs.values() if job["state"] not in _FINAL]
        if not running:
            return [_end_time(job) for job in jobs.values()]
        await _over(lane, target, running[-1]["job_id"])


def _end_time(job: dict[str, Any]) -> float:
    if job["state"] != "COMPLETED":
        raise BenchError(f"the run is void: job {job['job_id']} ended {job['state']}, {job['state_reason']}")
    return datetime.fromisoformat(job["end_time"]).timestamp()


async def _listed(lane: Lane, target: Stack) -> Any:
    path = "/api/v1/jobs?order=oldest&limit=200"
    cursor = ""
    while True:
        got = await lane.ask(request("GET", path + cursor, target.port))
        if got.status != 200:
            raise BenchError(f"a list was answered {got.status} {got.body[:300]!r}")
        for job in got.document["jobs"]:
            yield job
        if got.document["next_cursor"] is None:
            return
        cursor = f"&cursor={got.document['next_cursor']}"


async def _check_nodes(lane: Lane, target: Stack) -> None:
    nodes = (await lane.ask(request("GET", "/api/v1/nodes", target.port))).document["nodes"]
    if held := {node["name"]: node["alloc_cpus"] for node in nodes if node["alloc_cpus"]}:
        raise BenchError(f"the run is void: all jobs are over and CPUs are still allocated: {held}")


def main() -> int:
    """The entry of `python -m bench.burst`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True, help="the process of the stack")
    parser.add_argument("--database", required=True, help="its URL")
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--list", action="store_true", help="all in one request")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    target = Stack(options.pid, options.port, options.database)
    size = Size(options.jobs, options.connections, as_list=options.list)

    def work() -> object:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return asdict(runner.run(burst(target, size, options.seconds)))

    return answer(work)


if __name__ == "__main__":
    sys.exit(main())

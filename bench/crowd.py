"""A burst with many who look on: `python -m bench.crowd …`, a process of its own, runs bench.burst beside them.

Half of the long polls wait for jobs that do not end meanwhile (of a partition whose only node is not there): what it
costs to wait. The other half follow the burst's own jobs to their ends, one after another: what it costs to be
answered. Log readers ask again and again for the output of a job of late.
"""

import argparse
import asyncio
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from random import Random
from typing import Any

import asyncpg
import uvloop

from bench.apart import BenchError, answer, measure, own_cpu
from bench.burst import SUBMISSION
from bench.machine import memory
from bench.report import PERCENTS, percentile
from bench.stack import Stack
from bench.wire import Lane, WireError, open_lane, request
from core.states import FINAL

ELSEWHERE = "elsewhere"
READ_SECONDS = 1.0
"""From one look of a log reader to its next."""
RECENT = 50
"""Of the newest jobs, those whose output is read."""
LOOK_SECONDS = 0.05
"""How often is asked which jobs there are."""
OPEN_SECONDS = 120.0
_FINAL = frozenset(state.value for state in FINAL)


@dataclass(slots=True)
class Seen:
    """What the crowd saw."""

    followed: int = 0
    """Ends of the burst's jobs that were answered."""
    late_seconds: list[float] = field(default_factory=list)
    """From a job's end to the answer, of those that were waited for before it ended."""
    reads: Counter[int] = field(default_factory=Counter)
    """Answers to log readers, by their status."""


class Crowd:
    """Those who look on, in an event loop of their own thread: from `start` until `stop`."""

    def __init__(self, target: Stack, polls: int, readers: int) -> None:
        self.seen = Seen()
        self.failed: Exception | None = None
        self._target, self._polls, self._readers = target, polls, readers
        self._ready, self._over = threading.Event(), threading.Event()
        self._newest, self._next = 0, 0
        self._more = asyncio.Event()
        self._random = Random(1)  # the same jobs in each run
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        """Return once everybody waits. Raises BenchError."""
        self._thread.start()
        self._ready.wait(OPEN_SECONDS)
        self._check()

    def stop(self) -> None:
        """Let everybody go. Raises BenchError when somebody got what should not be."""
        self._over.set()
        self._thread.join(OPEN_SECONDS)
        self._check()

    def _check(self) -> None:
        if self.failed is not None or not self._ready.is_set():
            raise BenchError(f"the run is void: those who look on failed: {self.failed or 'they are not all there'}")

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._look_on())
        except Exception as error:  # noqa: BLE001 - told by whoever waits for this thread
            self.failed = error
        finally:
            self._ready.set()

    async def _look_on(self) -> None:
        connection = await asyncpg.connect(self._target.database_url)
        lanes = [await open_lane(self._target.port) for _ in range(self._polls + self._readers)]
        try:
            self._newest = self._next = await _newest_job(connection)
            waiting = await _submit_elsewhere(connection, self._target, self._polls // 2)
            self._newest = self._next = self._newest + len(waiting)
            doing = [self._wait(lane, job_id) for lane, job_id in zip(lanes, waiting, strict=False)]
            doing += [self._follow(lane) for lane in lanes[len(waiting) : self._polls]]
            doing += [self._read(lane) for lane in lanes[self._polls :]]
            tasks = [asyncio.ensure_future(each) for each in doing]
            await asyncio.sleep(1 if tasks else 0)  # so that all of them wait
            self._ready.set()
            await self._until_over(connection, tasks)
        finally:
            for lane in lanes:
                lane.close()
            await connection.close()

    async def _until_over(self, connection: asyncpg.Connection, tasks: "Sequence[asyncio.Future[None]]") -> None:
        while not self._over.is_set():
            if (newest := await _newest_job(connection)) > self._newest:
                self._newest = newest
                self._more.set()
            if failed := [task for task in tasks if task.done()]:
                failed[0].result()
                raise WireError("somebody went away")
            await asyncio.sleep(LOOK_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _wait(self, lane: Lane, job_id: int) -> None:
        """Wait for a job that does not end, for ever."""
        while True:
            job = await self._job(lane, job_id)
            if job["state"] in _FINAL:
                raise BenchError(f"job {job_id}, which cannot run, ended {job['state']}")

    async def _follow(self, lane: Lane) -> None:
        """Wait for the end of one job after another; each is somebody's."""
        while True:
            while self._next >= self._newest:
                self._more.clear()
                await self._more.wait()
            self._next += 1
            job_id, began = self._next, time.time()
            while (job := await self._job(lane, job_id))["state"] not in _FINAL:
                pass
            ended = datetime.fromisoformat(job["end_time"]).timestamp()
            self.seen.followed += 1
            if ended > began:
                self.seen.late_seconds.append(time.time() - ended)

    async def _job(self, lane: Lane, job_id: int) -> dict[str, Any]:
        got = await lane.ask(request("GET", f"/api/v1/jobs/{job_id}?wait=60s&until=final", self._target.port))
        if got.status != 200:
            raise BenchError(f"a long poll was answered {got.status} {got.body[:300]!r}")
        found: dict[str, Any] = got.document
        return found

    async def _read(self, lane: Lane) -> None:
        """Read the output of some job of late, again and again."""
        await asyncio.sleep(self._random.random() * READ_SECONDS)
        while True:
            job_id = max(1, self._newest - self._random.randrange(RECENT))
            got = await lane.ask(request("GET", f"/api/v1/jobs/{job_id}/logs?stream=stdout", self._target.port))
            self.seen.reads[got.status] += 1
            await asyncio.sleep(READ_SECONDS)


async def _newest_job(connection: asyncpg.Connection) -> int:
    return int(await connection.fetchval("SELECT coalesce(max(job_id), 0) FROM jobs"))


_NODE = """
INSERT INTO nodes (name, partitions, declared_cpus, cpus, memory_mib, work_base_dir, job_user)
VALUES ($1::text, ARRAY[$1::text], 1, 1, 1, '/nowhere', 'nobody')
"""


async def _submit_elsewhere(connection: asyncpg.Connection, target: Stack, jobs: int) -> list[int]:
    """Submit jobs to a node that is not there: their numbers."""
    if not jobs:
        return []
    await connection.execute(_NODE, ELSEWHERE)
    submission = {**SUBMISSION, "job": {**SUBMISSION["job"], "partition": ELSEWHERE}}  # type: ignore[dict-item]
    lane = await open_lane(target.port)
    try:
        got = await lane.ask(request("POST", "/api/v1/jobs", target.port, {"jobs": [submission] * jobs}))
    finally:
        lane.close()
    if got.status != 201:
        raise BenchError(f"a list was answered {got.status} {got.body[:300]!r}")
    return [job["job_id"] for job in got.document["jobs"]]


def watched_burst(target: Stack, polls: int, readers: int, burst: tuple[object, ...], seconds: float) -> dict[str, Any]:
    """What bench.burst found, and what those who looked on saw. Raises BenchError."""
    sizes = {"before": memory(target.pid)}
    crowd = Crowd(target, polls, readers)
    crowd.start()
    sizes["waiting"], cpu = memory(target.pid), own_cpu()
    found: dict[str, Any] = measure("bench.burst", *burst, seconds=seconds)
    cpu = own_cpu() - cpu
    sizes["after"] = memory(target.pid)
    crowd.stop()
    late = crowd.seen.late_seconds
    return {
        "burst": found,
        "memory_kib": sizes,
        "crowd_cpu_seconds": round(cpu, 3),
        "followed": crowd.seen.followed,
        "late_ms": {str(part): round(percentile(late, part) * 1000, 1) for part in PERCENTS} if late else {},
        "reads": {str(status): times for status, times in sorted(crowd.seen.reads.items())},
    }


def main() -> int:
    """The entry of `python -m bench.crowd`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True, help="the process of the stack")
    parser.add_argument("--database", required=True, help="its URL")
    parser.add_argument("--polls", type=int, required=True)
    parser.add_argument("--readers", type=int, required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="for the burst")
    options = parser.parse_args()
    target = Stack(options.pid, options.port, options.database)
    place = ("--port", options.port, "--pid", options.pid, "--database", options.database)
    size = ("--jobs", options.jobs, "--connections", options.connections, "--seconds", options.seconds)
    return answer(lambda: watched_burst(target, options.polls, options.readers, (*place, *size), options.seconds + 30))


if __name__ == "__main__":
    sys.exit(main())

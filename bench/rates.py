"""What a system with full tables does a second: submit, list, cancel, start; the memory that it takes for that.

`python -m bench.rates …` is a process of its own. The node is drained over HTTP, the tables are filled
(bench/tables.py), and each kind of request is sent over a few connections; then the node works off what waits.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import asyncpg
import uvloop

from bench.apart import BenchError, answer, own_cpu
from bench.burst import SUBMISSION
from bench.machine import cpu_times, memory, used
from bench.spawn import SCRIPT
from bench.stack import Stack, broken_invariants
from bench.statements import AT_ONCE, ENOUGH, Tables, buffers
from bench.tables import fill
from bench.wire import Answer, Lane, open_lane, request
from core.records import NewJob
from core.states import FINAL

LISTS = {
    "newest": "limit=50",
    "oldest that wait": "order=oldest&state=PENDING&limit=50",
    "of an account": "account=account3&limit=50",
    "of a rare name": "name=rare&limit=50",
    "page after page": "order=oldest&limit=200",
    "of a state that none has": "state=DEADLINE&limit=50",
}
LIST_SECONDS = 3.0
"""For which one kind of list is asked for."""
MOST_LISTS = 400
WINDOW = (0.1, 0.9)
"""Of the ends in a row, the part that is measured: by then the node is as busy as it gets, and not idle again."""

JOB = NewJob(
    name="bench",
    account="bench",
    partition="default",
    tasks=1,
    cpus_per_task=1,
    memory_mib=None,
    time_limit_seconds=None,
    requeue=False,
    script=SCRIPT,
    environment={},
    current_working_directory=None,
    standard_output="slurm-%j.out",
    standard_error=None,
    comment=None,
    cpus_per_task_given=True,
    tasks_per_node_given=False,
)


@dataclass(frozen=True, slots=True)
class Size:
    """How many jobs wait and have ended before, how many are submitted, half of which is cancelled, and over what."""

    waiting: int
    finished: int
    jobs: int
    connections: int


@dataclass(slots=True)
class Found:
    """What was measured, by what was done: times a second, and CPU by role of one of it."""

    rates: dict[str, float] = field(default_factory=dict)
    cpu_microseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    memory_kib: dict[str, int] = field(default_factory=dict)
    """The most that each role had after any of it."""
    buffers: dict[str, int] = field(default_factory=dict)
    fill_seconds: float = 0.0


class Phase:
    """One kind of work on a target, from its making to `end`."""

    def __init__(self, target: Stack, found: Found) -> None:
        self._target, self._found = target, found
        self._cpu, self._own, self._began = cpu_times(target.pid), own_cpu(), time.monotonic()

    def end(self, what: str, times: int, rate: float | None = None) -> None:
        """Enter that it was done so many times; `rate` where it is known better than by the time from the making."""
        seconds = time.monotonic() - self._began
        cpu = used(self._cpu, cpu_times(self._target.pid), own_cpu() - self._own)
        self._found.rates[what] = round(times / seconds if rate is None else rate, 1)
        self._found.cpu_microseconds[what] = {role: round(spent / times * 1e6, 1) for role, spent in cpu.items()}
        for role, kib in memory(self._target.pid).items():
            self._found.memory_kib[role] = max(kib, self._found.memory_kib.get(role, 0))


async def measured(target: Stack, size: Size, seconds: float) -> Found:
    """Fill and measure. Raises BenchError when the run is void, TimeoutError after `seconds`."""
    connection = await asyncpg.connect(target.database_url)
    lanes = [await open_lane(target.port) for _ in range(size.connections)]
    try:
        async with asyncio.timeout(seconds):
            found = await _measured(connection, lanes, target, size)
            if broken := await broken_invariants(connection):
                raise BenchError(f"the run is void, the audit found: {'; '.join(broken)}")
            return found
    finally:
        for lane in lanes:
            lane.close()
        await connection.close()


async def _measured(connection: asyncpg.Connection, lanes: Sequence[Lane], target: Stack, size: Size) -> Found:
    found, node = Found(), await _node_of(lanes[0], target)
    began = time.monotonic()
    await set_state(lanes[0], target, node, "DRAIN")
    queue = await fill(connection, waiting=size.waiting, finished=size.finished, node=node)
    found.fill_seconds = round(time.monotonic() - began, 1)
    phase = Phase(target, found)
    submitted = await _submit(lanes, target, size.jobs)
    phase.end("submit", size.jobs)
    for name, query in LISTS.items():
        phase = Phase(target, found)
        phase.end(f"list: {name}", await _list(lanes, target, query))
    half = submitted[size.jobs // 2 :]
    phase = Phase(target, found)
    await _send(lanes, [request("DELETE", f"/api/v1/jobs/{job_id}", target.port) for job_id in half], 200)
    phase.end("cancel", len(half))
    found.buffers = await _buffers(connection, node)
    started = (*queue, *submitted)[: size.jobs * 3 // 4]  # some go on waiting, whatever there was
    phase = Phase(target, found)
    await set_state(lanes[0], target, node, "RESUME")
    await until_over(lanes[0], target, started[-1])
    phase.end("start and end", len(started), await _end_rate(connection, started))
    await set_state(lanes[0], target, node, "DRAIN")
    await _until_idle(connection)
    # What was taken from the head of the queue is passed until it is vacuumed away.
    after = await _buffers(connection, node)
    found.buffers |= {f"{name}, after the starts": after[name] for name in ("look", "turn_over") if after}
    return found


async def _node_of(lane: Lane, target: Stack) -> str:
    [node] = (await lane.ask(request("GET", "/api/v1/nodes", target.port))).document["nodes"]
    return str(node["name"])


async def set_state(lane: Lane, target: Stack, node: str, state: str) -> None:
    """DRAIN the node, or RESUME it."""
    document = {"state": state, "reason": "bench"} if state != "RESUME" else {"state": state}
    _expect(await lane.ask(request("PATCH", f"/api/v1/nodes/{quote(node, safe='')}", target.port, document)), 200)


async def _submit(lanes: Sequence[Lane], target: Stack, jobs: int) -> list[int]:
    """Post them; their numbers, ascending."""
    sent = request("POST", "/api/v1/jobs", target.port, SUBMISSION)
    answers = await _send(lanes, [sent] * jobs, 201)
    return sorted(got.document["job_id"] for got in answers)


async def _send(lanes: Sequence[Lane], requests: Sequence[bytes], status: int) -> list[Answer]:
    """Send them as fast as the connections allow."""
    turns, answers = iter(requests), list[Answer]()

    async def some(lane: Lane) -> None:
        for sent in turns:
            answers.append(_expect(await lane.ask(sent), status))

    await asyncio.gather(*(some(lane) for lane in lanes))
    return answers


async def _list(lanes: Sequence[Lane], target: Stack, query: str) -> int:
    """Ask for a page, each connection for the one behind its last one, until the time is over: how many came."""
    ends, turns = time.monotonic() + LIST_SECONDS, iter(range(MOST_LISTS))
    return sum(
        await asyncio.gather(
            *(_list_some(lane, target, query, turns, lambda: time.monotonic() < ends) for lane in lanes)
        )
    )


async def _list_some(lane: Lane, target: Stack, query: str, turns: Iterator[int], more: Callable[[], bool]) -> int:
    path, cursor, count = f"/api/v1/jobs?{query}", "", 0
    walks = "limit=200" in query
    for _ in turns:
        got = _expect(await lane.ask(request("GET", path + cursor, target.port)), 200)
        count += 1
        if walks:
            behind = got.document["next_cursor"]
            cursor = f"&cursor={behind}" if behind else ""
        if not more():
            break
    return count


def _expect(got: Answer, status: int) -> Answer:
    if got.status != status:
        raise BenchError(f"the run is void: answered {got.status} instead of {status}: {got.body[:300]!r}")
    return got


_FINAL = frozenset(state.value for state in FINAL)


async def until_over(lane: Lane, target: Stack, job_id: int) -> None:
    """Wait for a job's end, by long polls."""
    asked = request("GET", f"/api/v1/jobs/{job_id}?wait=60s&until=final", target.port)
    while _expect(await lane.ask(asked), 200).document["state"] not in _FINAL:
        pass


_ENDS = """
SELECT extract(epoch FROM end_time)::float8 FROM jobs
WHERE job_id = ANY ($1::bigint[]) AND state = 'COMPLETED' ORDER BY end_time
"""


async def _end_rate(connection: asyncpg.Connection, job_ids: Sequence[int]) -> float:
    """Ends a second, by PostgreSQL's clock. Those that are not over yet, of the last few, do not count."""
    return rate([row[0] for row in await connection.fetch(_ENDS, job_ids)])


def rate(times: Sequence[float]) -> float:
    """How many a second there were in WINDOW of these ascending times."""
    low, high = (int(part * (len(times) - 1)) for part in WINDOW)
    if high <= low or times[high] <= times[low]:
        raise BenchError(f"the run is void: {len(times)} ends are too few for a rate")
    return (high - low) / (times[high] - times[low])


async def _until_idle(connection: asyncpg.Connection) -> None:
    while await connection.fetchval("SELECT EXISTS (SELECT FROM allocations)"):  # noqa: ASYNC110  (another's doing)
        await asyncio.sleep(0.05)


async def _buffers(connection: asyncpg.Connection, node: str) -> dict[str, int]:
    oldest = await connection.fetch("SELECT job_id FROM pending ORDER BY job_id LIMIT $1", ENOUGH)
    incarnation = await connection.fetchval("SELECT incarnation FROM node_leases WHERE node = $1", node)
    waiting = [row[0] for row in oldest]
    if len(waiting) < ENOUGH:
        return {}
    return await buffers(connection, Tables(waiting, waiting[:AT_ONCE], node, incarnation, JOB))


def main() -> int:
    """The entry of `python -m bench.rates`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True, help="the process of the stack")
    parser.add_argument("--database", required=True, help="its URL")
    parser.add_argument("--waiting", type=int, required=True)
    parser.add_argument("--finished", type=int, required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    target = Stack(options.pid, options.port, options.database)
    size = Size(options.waiting, options.finished, options.jobs, options.connections)

    def work() -> dict[str, Any]:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return _document(runner.run(measured(target, size, options.seconds)))

    return answer(work)


def _document(found: Found) -> dict[str, Any]:
    return {name: getattr(found, name) for name in Found.__slots__}


if __name__ == "__main__":
    sys.exit(main())

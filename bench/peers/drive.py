"""What the peers' drivers have in common: the series of jobs, the workers beside it, what a task does.

A driver is `python -m bench.peers.NAME …`, run by the Python of the peers' own environment. It starts the peer's
workers by the peer's own command, feeds them from one process through the peer's own client, and answers as
`bench.latency` and `bench.burst` do. Nothing is imported here but the standard library, and of Rowlock what needs
no more than that.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from bench.apart import BenchError, answer, steady_clock
from bench.spawn import use_pidfd_watcher
from services.standalone.child import Child, ending, spawn

SERVER = os.environ.get("BENCH_SERVER", "")
"""The URL of the Redis or the PostgreSQL that is this run's own."""
CONNECTIONS = 16
WARM_UP = 20
START_SECONDS = 60.0
STOP_SECONDS = 10.0
JOB_SECONDS = 60.0
BURST_SECONDS = 600.0
IDLE_POLL_SECONDS = 0.001  # where a client can only ask again and again
BURST_POLL_SECONDS = 0.02  # as often as bench.burst asks
_PLAIN = {"PATH": os.defpath}


@dataclass(frozen=True, slots=True)
class Orders:
    """What to measure. In `folder` the harness has put `script`, and an empty directory `outputs`."""

    workload: str
    jobs: int
    pause: float
    cpus: int
    folder: Path
    variant: str

    @property
    def script(self) -> str:
        return str(self.folder / "script")

    def output(self, number: int) -> str:
        """The file that a job writes its output to."""
        return str(self.folder / "outputs" / str(number))


class Client(Protocol):
    """What a driver adds for its peer. Where the peer's own client blocks, so does this."""

    async def submit(self, number: int) -> Any:
        """Hand in the job of that number: what to wait for, once the peer has accepted it."""

    async def submit_list(self, numbers: Sequence[int]) -> list[Any]:
        """Hand in many jobs in the one request that the peer has for that; only for the workload `list`."""

    async def wait(self, job: Any, poll: float, seconds: float) -> float:
        """Wait up to `seconds` until this client sees the job's final state; return when the job was over.

        `poll` is for a peer that has to be asked. Raises when the job has not ended well.
        """


@dataclass(frozen=True, slots=True)
class Worker:
    """A command that works beside the client, and what its log says, so many times, when it is ready."""

    words: Sequence[str]
    ready: str
    times: int = 1


Clients = Callable[[Orders], AbstractAsyncContextManager[Client]]


def command(name: str) -> str:
    """A command of the peers' environment."""
    return str(Path(sys.executable).with_name(name))


def run_script(script: str, output: str) -> float:
    """The task of every peer whose tasks are functions; the time at its end. Raises CalledProcessError."""
    file = _create(output)
    try:
        subprocess.run(
            (script,),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=_PLAIN,
            start_new_session=True,
            check=True,
        )
    finally:
        os.close(file)
    return time.time()


async def run_script_async(script: str, output: str) -> float:
    """The same for peers whose tasks are coroutines."""
    _watch_by_pidfd()
    file = _create(output)
    try:
        process = await asyncio.create_subprocess_exec(
            script, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=_PLAIN, start_new_session=True
        )
    finally:
        os.close(file)
    if code := await process.wait():
        raise subprocess.CalledProcessError(code, script)
    return time.time()


@cache
def _watch_by_pidfd() -> None:
    """As the bare limit does; the peer's worker has begun its loop already."""
    use_pidfd_watcher()
    if sys.version_info < (3, 12):
        asyncio.get_child_watcher().attach_loop(asyncio.get_running_loop())


def _create(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def main(clients: Clients, workers: Callable[[Orders], Sequence[Worker]] = lambda _: ()) -> int:
    """The entry of a driver."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=("idle", "burst", "list"), required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--variant", default="")
    orders = Orders(**vars(parser.parse_args()))

    def work() -> object:
        with working(orders.folder, workers(orders)):
            return asyncio.run(_measured(orders, clients))

    return answer(work)


@contextmanager
def working(folder: Path, workers: Sequence[Worker]) -> Iterator[None]:
    """Run the workers, each started when the one before is ready; afterwards none is left. Raises BenchError.

    Their logs are `folder/worker-N.log`.
    """
    children: list[Child] = []
    try:
        for number, worker in enumerate(workers, 1):
            log = folder / f"worker-{number}.log"
            children.append(_start(worker.words, log))
            _await_ready(children[-1], worker, log)
        yield
    finally:
        for child in reversed(children):
            _end(child)


def _start(words: Sequence[str], log: Path) -> Child:
    output = _create(str(log))
    try:
        return spawn(words[0], words, env=os.environ, dying=signal.SIGTERM, output=output, cwd=log.parent)
    finally:
        os.close(output)


def _await_ready(child: Child, worker: Worker, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while log.read_text(errors="replace").count(worker.ready) < worker.times:
        if not child.alive:
            raise BenchError(f"{child.name} {ending(child.process.wait())} as it started")
        if time.monotonic() > deadline:
            raise BenchError(f"{child.name} was not ready in {START_SECONDS:g} s")
        time.sleep(0.02)


def _end(child: Child) -> None:
    child.process.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.process.wait(STOP_SECONDS)
    child.process.kill()
    child.process.wait()


async def _measured(orders: Orders, clients: Clients) -> dict[str, Any]:
    async with clients(orders) as client:
        warm = [await client.submit(orders.jobs + number) for number in range(WARM_UP)]
        for job in warm:
            await client.wait(job, BURST_POLL_SECONDS, JOB_SECONDS)
        with steady_clock():
            return await (_idle if orders.workload == "idle" else _burst)(orders, client)


async def _idle(orders: Orders, client: Client) -> dict[str, Any]:
    times: list[tuple[float, float]] = []
    for number in range(orders.jobs):
        await asyncio.sleep(orders.pause)
        posted = time.time()
        await client.wait(await client.submit(number), IDLE_POLL_SECONDS, JOB_SECONDS)
        times.append((posted, time.time()))
    stamps = [_stamp(orders.output(number)) for number in range(orders.jobs)]
    return {
        "first_line_ms": [_milliseconds(stamp - posted) for (posted, _), stamp in zip(times, stamps, strict=True)],
        "final_ms": [_milliseconds(seen - posted) for posted, seen in times],
    }


def _stamp(output: str) -> float:
    return float(Path(output).read_bytes())


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


async def _burst(orders: Orders, client: Client) -> dict[str, Any]:
    began = time.time()
    numbers = range(orders.jobs)
    jobs = await (client.submit_list(numbers) if orders.workload == "list" else _submit_all(client, numbers))
    accepted = time.time()
    # From the last on: when it is over, hardly one has still to be waited for, and none has been asked about before.
    ended = max([await client.wait(job, BURST_POLL_SECONDS, BURST_SECONDS) for job in reversed(jobs)])
    _check_outputs(orders)
    return {
        "jobs": orders.jobs,
        "accepted_per_second": round(orders.jobs / (accepted - began), 1),
        "finished_per_second": round(orders.jobs / (ended - began), 1),
    }


async def _submit_all(client: Client, numbers: Sequence[int]) -> list[Any]:
    turns, jobs = iter(numbers), dict[int, Any]()

    async def some() -> None:
        for number in turns:
            jobs[number] = await client.submit(number)

    await asyncio.gather(*(some() for _ in range(CONNECTIONS)))
    return [jobs[number] for number in numbers]


def _check_outputs(orders: Orders) -> None:
    """Each script has run: it has its file, empty as it says nothing."""
    if lacking := [n for n in range(orders.jobs) if not Path(orders.output(n)).is_file()]:
        raise BenchError(f"the run is void: {len(lacking)} of {orders.jobs} scripts left no output")

"""`rowlock demo`: one job from the POST to its freed CPU, on real servers, with nothing left behind.

The stack is a process of its own in its own session (throwaway.py): a Ctrl-C reaches only the demo, which
then lets go of the stack's lifeline and waits. A demo that is killed lets go of it as well.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from core.client import Client
from core.documents import JobDocument
from core.errors import RowlockError
from core.states import FINAL
from services.standalone.child import Child, Step
from services.standalone.embedded import postgres_folders, redis_binary
from services.standalone.stack import IMPORT_ROOT, Orders, http_address, obey_signals, say_line

JOB = {"name": "migration-test", "account": "test", "cpus_per_task": 1, "ntasks_per_node": 1}
SCRIPT = "#!/bin/bash\necho Migration successful!\nsleep 5"
EXPECTED = b"Migration successful!\n"
TOO_LONG = 60.0
STOPPING_TOO_LONG = 60.0
POLL = 0.02
TAIL_LINES = 15


class DemoError(RowlockError):
    """The demo did not show what it should: one line."""


@dataclass(slots=True)
class _Theatre:
    """The stack behind the scenes, as far as its process has told."""

    child: Child
    told: asyncio.StreamReader
    folder: Path | None = None
    port: int = 0
    failure: str | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)


async def demo() -> int:
    """Show it; the exit code: 0, 1 with a message, or 128 and the number of the signal that ended it."""
    orders = Orders()
    heard: list[signal.Signals] = []
    obey_signals(orders, heard.append)
    try:
        await _shown(orders)
    except (RowlockError, OSError) as error:
        if not heard:
            print(f"rowlock demo: {error}", file=sys.stderr, flush=True)
            return 1
    if heard:
        print(f"rowlock demo: stopped by {heard[0].name}, nothing is left", file=sys.stderr, flush=True)
        return 128 + heard[0]
    return 0


async def _shown(orders: Orders) -> None:
    redis_binary()  # a missing extra or a foreign platform is told here, in one line
    postgres_folders()
    async with _theatre(orders) as theatre:
        show = asyncio.ensure_future(_show(theatre))
        told = asyncio.ensure_future(orders.stop.wait())
        try:
            await asyncio.wait((show, told), timeout=TOO_LONG, return_when=asyncio.FIRST_COMPLETED)
            if show.done():
                show.result()
            elif not told.done():
                raise DemoError(f"it took more than {TOO_LONG:g} s")
        except RowlockError as error:
            if not told.done():
                _print_tails(theatre.folder)
            raise DemoError(str(error)) from None
        finally:
            for task in (show, told):
                task.cancel()
            await asyncio.gather(show, told, return_exceptions=True)
        if show.done() and not show.cancelled():
            say_line("stopping everything")
    if show.done() and not show.cancelled():
        say_line("done: nothing is left running, nothing is left behind")


@asynccontextmanager
async def _theatre(orders: Orders) -> AsyncIterator[_Theatre]:
    """The stack's process. Whatever happens inside, afterwards it is gone and so is its directory."""
    process = subprocess.Popen(  # noqa: ASYNC220  (a Child is waited for without blocking)
        (sys.executable, "-m", "services.standalone.throwaway"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(IMPORT_ROOT), "PYTHONSAFEPATH": "1"},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    told = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(told), process.stdout)
    theatre = _Theatre(Child("the stack", process), told)
    listener = asyncio.ensure_future(_listen(theatre))
    try:
        yield theatre
    finally:
        process.stdin.close()  # the lifeline
        await _gone(theatre, orders.hasten)
        await asyncio.gather(listener, return_exceptions=True)
        transport.close()


async def _gone(theatre: _Theatre, hasten: asyncio.Event) -> None:
    if not await theatre.child.ended_within(STOPPING_TOO_LONG, hasten):
        await theatre.child.stop((Step(signal.SIGTERM, 20),))
    await asyncio.sleep(0)
    if theatre.folder is not None:  # there still when the stack's process was killed itself
        await asyncio.to_thread(shutil.rmtree, theatre.folder, ignore_errors=True)


async def _listen(theatre: _Theatre) -> None:
    while line := (await theatre.told.readline()).decode(errors="replace").strip():
        word, _, value = line.partition(" ")
        match word:
            case "directory":
                theatre.folder = Path(value)
            case "port":
                theatre.port = int(value)
            case "failed":
                theatre.failure = value
                theatre.ready.set()
            case "ready":
                theatre.ready.set()
    if not theatre.ready.is_set():
        theatre.failure = "the stack's process ended before it was ready"
        theatre.ready.set()


async def _show(theatre: _Theatre) -> None:
    say_line("starting PostgreSQL, Redis, api, scheduler and worker in a temporary directory")
    await theatre.ready.wait()
    if theatre.failure is not None:
        raise DemoError(theatre.failure)
    address = http_address("127.0.0.1", theatre.port)
    async with Client(address) as client:
        say_line(f"POST {address}/api/v1/jobs {json.dumps({'job': JOB, 'script': SCRIPT})}")
        job, output = await _watched(client, (await client.submit(JOB, SCRIPT))["job_id"])
        _check_job(job, output)
        await _check_nodes(client)


async def _watched(client: Client, job_id: int) -> tuple[JobDocument, bytes]:
    """Follow a job to its end, telling each state and piece of output once: the job and its output."""
    shown: set[tuple[str, str]] = set()
    output = b""
    while True:
        # In this order: what has written is seen to run before that, and to be over afterwards.
        piece = await client.logs(job_id, offset=len(output))
        job = await client.job(job_id)
        over = job["state"] in FINAL
        if over:
            piece += await client.logs(job_id, offset=len(output + piece))
        output += piece
        moments = _moments(job)
        _tell(job, moments[:-1] if over else moments, shown)
        for line in piece.decode(errors="replace").splitlines():
            say_line(f"                | {line}")
        if over:
            _tell(job, moments, shown)
            return job, output
        await asyncio.sleep(POLL)


def _tell(job: JobDocument, moments: Sequence[tuple[str, str]], shown: set[tuple[str, str]]) -> None:
    """Say those that were not said before."""
    for state, time in moments:
        if (state, time) not in shown:
            shown.add((state, time))
            say_line(f"  {_clock(time)}  {state}{_exit(job) if state in FINAL else ''}")


def _moments(job: JobDocument) -> list[tuple[str, str]]:
    """The states that a job has been in, with their times: short ones are over before anybody could ask."""
    passed = (
        ("PENDING", job["submit_time"]),
        ("CONFIGURING", job["allocate_time"]),
        ("RUNNING", job["start_time"]),
        (job["state"], job["end_time"]),
    )
    return [(state, time) for state, time in passed if time]


def _exit(job: JobDocument) -> str:
    return "" if job["exit_code"] is None else f" (exit code {job['exit_code']})"


def _clock(time: str) -> str:
    return datetime.fromisoformat(time).strftime("%H:%M:%S.%f")[:-3]


def _check_job(job: JobDocument, output: bytes) -> None:
    if job["state"] != "COMPLETED" or job["exit_code"] != 0:
        raise DemoError(f"the job ended {job['state']}{_exit(job)}: {job['state_reason']}")
    if output != EXPECTED:
        raise DemoError(f"the job's output should be {EXPECTED!r} and is {output!r}")


async def _check_nodes(client: Client) -> None:
    nodes = await client.nodes()
    for node in nodes:
        say_line(f"node {node['name']}: {node['alloc_cpus']} of {node['cpus']} CPUs allocated")
    if not nodes or any(node["alloc_cpus"] for node in nodes):
        raise DemoError("the job is over and its CPU is not free again")


def _print_tails(folder: Path | None) -> None:
    if folder is None:
        return
    for path in (*sorted(folder.glob("*.log")), *sorted((folder / "logs").glob("*"))):
        with suppress(OSError), path.open(errors="replace") as lines:
            tail = [line.rstrip() for line in deque(lines, TAIL_LINES)]
            print(f"--- {path.name}", *tail, sep="\n", file=sys.stderr)

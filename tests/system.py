"""A whole system of real role processes against the tests' servers, and scripts that keep a ledger of their own."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from core.client import Client, ClientError
from core.documents import JobDocument
from core.settings import Settings
from core.states import FINAL
from services.standalone.child import Child, Step, spawn
from services.standalone.stack import exported, free_port

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ROOT / "tests/plain"
PATIENCE = 60.0
"""Seconds after which something that must come is called missing."""

AVAILABLE = frozenset({"IDLE", "MIXED", "ALLOCATED"})


async def until(true: Callable[[], Awaitable[Any]], what: str, patience: float = PATIENCE) -> Any:
    """Wait until the answer is true, and return it."""
    deadline = time.monotonic() + patience
    while not (answer := await true()):
        assert time.monotonic() < deadline, f"not within {patience:g} s: {what}"
        await asyncio.sleep(0.05)
    return answer


@dataclass(slots=True)
class System:
    """Role processes of one test. What it started it ends, by pid."""

    settings: Settings
    folder: Path
    children: list[Child] = field(default_factory=list)
    client: Client | None = None

    @property
    def node(self) -> str:
        """The node that the settings name."""
        return self.settings.node_name

    @property
    def partition(self) -> str:
        """The partition of that node."""
        return self.settings.partitions[0]

    @property
    def api(self) -> Client:
        """A client of the first API."""
        assert self.client is not None
        return self.client

    def start(self, role: str, name: str = "", *args: str, **env: str | int) -> Child:
        """Start a role; `name` tells two of a kind apart, `env` are settings."""
        label = name or role
        with (self.folder / f"{label}.err").open("ab") as err:
            child = spawn(
                label,
                (sys.executable, "-m", f"services.{role}", *args),
                env=self.environment(**env),
                dying=signal.SIGTERM,
                output=err.fileno(),
                cwd=self.folder,
            )
        self.children.append(child)
        return child

    def environment(self, **more: str | int) -> dict[str, str]:
        """The whole environment of a role: it finds nothing of the developer's own."""
        plain = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if key in os.environ}
        here = {"PYTHONPATH": f"{PLAIN}:{ROOT}", "PYTHONSAFEPATH": "1"}
        # aiohttp reads all authorities of the machine as it is imported: a tenth of a second of each start.
        none = {"SSL_CERT_FILE": os.devnull}
        return {**plain, **here, **none, **exported(self.settings), **{key: str(value) for key, value in more.items()}}

    def worker_pid(self) -> int:
        """The asyncio worker of the node, below its launcher and its keeper."""
        mine = [pid for pid in alive_with(str(self.folder / self.node)) if "services.worker.kept" in cmdline(pid)]
        assert len(mine) == 1, mine
        return mine[0]

    def start_worker(self, node: str, cpus: int = 4, **env: str | int) -> Child:
        """Start a worker for a node of its own."""
        folder = self.folder / node
        return self.start(
            "worker", f"worker-{node}", NODE_NAME=node, TOTAL_CPUS=cpus, DATA_DIR=str(folder / "data"), **env
        )

    def start_api(self, name: str = "api", **env: str | int) -> str:
        """Start an API on a port of its own; its address."""
        port = free_port()
        self.start("api", name, API_PORT=port, **env)
        return f"http://127.0.0.1:{port}"

    async def healthy(self, client: Client) -> None:
        """Wait for an API that has its database."""

        async def asked() -> bool:
            try:
                await client.health()
            except ClientError:
                return False
            return True

        await until(asked, "a healthy API")

    async def node_is(self, node: str, *states: str) -> None:
        """Wait for a node to be in one of the states; any that is alive by default."""
        wanted = states or tuple(AVAILABLE)

        async def asked() -> bool:
            try:
                return any(n["name"] == node and n["state"] in wanted for n in await self.api.nodes())
            except ClientError:
                return False

        await until(asked, f"node {node} is {' or '.join(wanted)}")

    async def submit(self, script: str, **job: Any) -> JobDocument:
        """Submit to the partition of the node."""
        return await self.api.submit({"account": "test", "partition": self.partition, **job}, script)

    async def run(self, script: str, **job: Any) -> JobDocument:
        """Submit and wait for the end."""
        submitted = await self.submit(script, **job)
        return await self.api.wait(submitted["job_id"], timeout_seconds=PATIENCE)

    async def state_is(self, job_id: int, *states: str) -> JobDocument:
        """Wait for a job to be in one of the states."""

        async def asked() -> JobDocument | None:
            job = await self.api.job(job_id)
            return job if job["state"] in states else None

        found: JobDocument = await until(asked, f"job {job_id} is {' or '.join(states)}")
        return found

    async def says(self, job_id: int, text: bytes) -> None:
        """Wait for a piece of a job's output."""

        async def asked() -> bool:
            try:
                return text in await self.api.logs(job_id)
            except ClientError as error:
                if not error.may_pass:
                    raise
                return False

        await until(asked, f"job {job_id} says {text!r}")

    async def cpus_in_use(self) -> int:
        """The allocated CPUs of the partition."""
        return sum(node["alloc_cpus"] for node in await self.api.nodes() if self.partition in node["partitions"])

    async def clear(self) -> None:
        """End every job of the partition that is left, and wait until its CPUs are free."""
        mine = [job async for job in self.api.all_jobs() if job["partition"] == self.partition]
        for job in mine:
            if job["state"] not in FINAL:
                await self.api.cancel(job["job_id"])

        async def free() -> bool:
            return await self.cpus_in_use() == 0

        await until(free, "no CPU is allocated")

    async def close(self) -> None:
        """End what still runs: roles in order, then what a killed one left, its keeper and its jobs."""
        for child in reversed(self.children):
            await child.stop((Step(signal.SIGTERM, 30),))
        while left := alive_with(str(self.folder)):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(
    settings: Settings, folder: Path, *, workers: Mapping[str, int] | None = None
) -> AsyncIterator[System]:
    """A system that is ready: an API, a scheduler, and workers by node name and CPUs."""
    system = System(settings, folder)
    nodes = {"n1": 4} if workers is None else workers
    async with AsyncExitStack() as stack:
        stack.push_async_callback(system.close)
        address = system.start_api()
        system.start("scheduler")
        for node, cpus in nodes.items():
            system.start_worker(node, cpus)
        system.client = await stack.enter_async_context(Client(address))
        await system.healthy(system.client)
        for node in nodes:
            await system.node_is(node)
        yield system


@asynccontextmanager
async def beside(system: System, folder: Path, workers: Mapping[str, int], **changes: Any) -> AsyncIterator[System]:
    """The same API and scheduler, and workers in `folder` and in a partition of its name: nobody else's jobs get there.

    `changes` are settings of these workers alone.
    """
    own = {"partitions": (folder.name,), "log_dir": folder / "logs", "node_name": next(iter(workers)), **changes}
    mine = System(system.settings.model_copy(update=own), folder, client=system.client)
    try:
        for node, cpus in workers.items():
            mine.start_worker(node, cpus)
        for node in workers:
            await mine.node_is(node)
        yield mine
    finally:
        await mine.close()


def alive_with(text: str) -> list[int]:
    """Every live process, whosesoever, with this text in its environment or command line; not ourselves."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        for file in ("environ", "cmdline"):
            try:
                held = Path(f"/proc/{name}/{file}").read_bytes()
            except OSError:
                continue
            if text.encode() in held and int(name) not in (os.getpid(), os.getppid()):
                found.append(int(name))
                break
    return found


def cmdline(pid: int) -> str:
    """What a process was started as; empty when it is gone, or dead."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


LEDGER_SCRIPT = """#!/bin/bash
echo "start $SLURM_JOB_ID $SLURM_CPUS_ON_NODE $EPOCHREALTIME $SLURMD_NODENAME" >> "$LEDGER"
sleep "$SECONDS_LONG"
echo "end $SLURM_JOB_ID $SLURM_CPUS_ON_NODE $EPOCHREALTIME $SLURMD_NODENAME" >> "$LEDGER"
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the ledger that the scripts themselves write."""

    what: str
    job_id: int
    cpus: int
    time: float
    node: str


def read_ledger(path: Path) -> list[Entry]:
    """The ledger in the order of time; at one instant ends come before starts."""
    entries = []
    for line in path.read_text().splitlines():
        what, job_id, cpus, when, node = line.split()
        entries.append(Entry(what, int(job_id), int(cpus), float(when), node))
    return sorted(entries, key=lambda entry: (entry.time, entry.what))


def most_held(entries: list[Entry], node: str) -> int:
    """The most CPUs of a node that overlapping jobs held at any instant."""
    held = most = 0
    for entry in entries:
        if entry.node == node:
            held += entry.cpus if entry.what == "start" else -entry.cpus
            most = max(most, held)
    return most


async def text_of(address: str) -> str:
    """A page as it is."""
    async with aiohttp.ClientSession() as session, session.get(address) as answer:
        return await answer.text()

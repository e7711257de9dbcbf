"""Builders of what the tests speak of, and short ways into the tables: always over the real statements."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
from pydantic import SecretStr

from core.db import allocations, jobs, nodes, outputs, pending
from core.db.allocations import TurnOver
from core.db.connection import Connection
from core.policy import plan
from core.records import Attempt, Ending, Job, JobSpec, NewJob, NodeSpec, Output, Placement
from core.settings import Settings
from core.states import Reason, State

SCRIPT = "#!/bin/sh\ntrue\n"
LONG = 60  # seconds within which everything is surely over

MACHINE: dict[str, Any] = {
    "cpus": 2,
    "usable_cpus": 2,
    "cpu_model": "some CPU",
    "kernel": "6.1",
    "python": "3.11",
    "filesystem": "ext4",
    "file_microseconds": 40.0,
    "load": [0.5, 0.4, 0.3],
}
"""What a benchmark says of the machine (bench/machine.py)."""


def settings_for(database_url: str, redis_url: str, folder: Path, **changes: Any) -> Settings:
    """Settings of a whole system in a folder, whatever the environment says."""
    changed = {
        "database_url": SecretStr(database_url),
        "redis_url": SecretStr(redis_url),
        "api_port": 0,
        "data_dir": folder / "data",
        "log_dir": folder / "logs",
        "node_name": "n1",
        "total_cpus": 4,
        "kill_grace_seconds": 1.0,
        "poll_seconds": 0.2,
        "unsafe": True,  # the tests' server does not wait for its disk
    }
    return Settings.model_construct().model_copy(update={**changed, **changes})


def a_job(cpus: int = 1, **changes: Any) -> NewJob:
    """A job of one task with `cpus` CPUs."""
    plain = NewJob(
        name="job",
        account="test",
        partition="default",
        tasks=1,
        cpus_per_task=cpus,
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
    return replace(plain, **changes)


def a_node(name: str = "n1", cpus: int = 4, **changes: Any) -> NodeSpec:
    """A node of the partition `default`."""
    plain = NodeSpec(
        name=name,
        partitions=("default",),
        cpus=cpus,
        memory_mib=1024,
        work_base_dir="/jobs",
        job_user="nobody",
        spool_id=f"spool of {name}",
        hostname="here",
        address="http://127.0.0.1:1",
        secret="of the node",  # noqa: S106
        version="0",
        grace_seconds=1,
        requeue_after_seconds=60,
    )
    return replace(plain, **changes)


def a_spec(**change: Any) -> JobSpec:
    """What a worker would have started."""
    spec = JobSpec(
        job_id=7, attempt=2, restart_cnt=0, name="n", account="a", partition="default", tasks=2,
        cpus_per_task=3, cpus=6, memory_mib=None, time_limit_seconds=None, requeue=False,
        start_time=datetime.fromtimestamp(1000, UTC),
        script="#!/bin/sh\n", environment={}, current_working_directory=None, standard_output="o",
        standard_error=None, cpus_per_task_given=False, tasks_per_node_given=False,
    )  # fmt: skip
    return replace(spec, **change)


def an_ending(attempt: Attempt, state: State = State.COMPLETED) -> Ending:
    """The end of an attempt with what its state asks for."""
    exit_code = {State.COMPLETED: 0, State.TIMEOUT: 1, State.FAILED: 1}.get(state)
    return Ending(attempt.job_id, attempt.attempt, state, Reason.NONE, exit_code=exit_code)


async def submit(connection: Connection, *wanted: NewJob) -> list[int]:
    """Store jobs; answer their numbers."""
    stored = await jobs.insert(connection, wanted or [a_job()])
    assert None not in stored
    return [row.job_id for row in stored if row is not None]


async def register(connection: Connection, spec: NodeSpec | None = None, *, lease_seconds: float = 3600) -> int:
    """Register a node's worker; answer its incarnation."""
    async with connection.transaction():
        incarnation = await nodes.register(connection, spec or a_node(), lease_seconds)
    assert incarnation is not None
    return incarnation


async def allocate(connection: Connection) -> list[Attempt]:
    """One pass over all that waits; answer what got CPUs."""
    waiting, free = await pending.look(connection, 1000)
    placed = await allocations.place(connection, plan(waiting, free))
    return [Attempt(job.job_id, job.attempt) for job in placed]


async def give(connection: Connection, job_id: int, node: str = "n1", cpus: int = 1) -> Attempt:
    """Give one job the CPUs of a node, whatever else waits."""
    [placed] = await allocations.place(connection, [Placement(job_id, node, cpus)])
    return Attempt(placed.job_id, placed.attempt)


async def start(connection: Connection, *attempts: Attempt, node: str = "n1", incarnation: int = 1) -> list[JobSpec]:
    """Start attempts on behalf of a node's worker, before anybody can end them; what restarts append to is empty."""
    async with connection.transaction():
        specs = await jobs.start(connection, attempts, node=node, incarnation=incarnation)
        await _restarts_begin(connection, specs, node=node, incarnation=incarnation)
    return specs


async def _restarts_begin(connection: Connection, specs: Sequence[JobSpec], *, node: str, incarnation: int) -> None:
    begun = [Output(spec.job_id, spec.attempt, spec.restart_cnt, 0, 0) for spec in specs if spec.restart_cnt > 0]
    assert len(await outputs.store(connection, begun, node=node, incarnation=incarnation)) == len(begun)


async def finish(
    connection: Connection, *attempts: Attempt, node: str = "n1", incarnation: int = 1, state: State = State.COMPLETED
) -> set[Attempt]:
    """End running attempts on behalf of a node's worker."""
    endings = [an_ending(attempt, state) for attempt in attempts]
    return await allocations.release(connection, endings, node=node, before=State.RUNNING, incarnation=incarnation)


async def report(
    connection: Connection, endings: Sequence[Ending], *, node: str = "n1", incarnation: int = 1, take: bool = True
) -> TurnOver:
    """End running attempts on behalf of a node's worker, which takes what waits next; `start` says what of restarts."""
    async with connection.transaction():
        turned = await allocations.turn_over(connection, endings, node=node, incarnation=incarnation, take=take)
        await _restarts_begin(connection, turned.begun, node=node, incarnation=incarnation)
    return turned


async def turn_over(
    connection: Connection, *attempts: Attempt, state: State = State.COMPLETED, **more: Any
) -> TurnOver:
    """Report the end of attempts, all in the same way."""
    return await report(connection, [an_ending(attempt, state) for attempt in attempts], **more)


async def state_of(connection: Connection, job_id: int) -> State:
    """The state of a job."""
    job = await jobs.get(connection, job_id)
    assert job is not None
    return job.state


async def job_of(connection: Connection, attempt: Attempt) -> Job:
    """The job of an attempt, as it is now."""
    job = await jobs.get(connection, attempt.job_id)
    assert job is not None
    return job


async def blocked(watcher: asyncpg.Connection, count: int = 1) -> None:
    """Return when so many wait for a lock that another one holds, in this database."""
    query = """SELECT count(*) FROM pg_stat_activity
               WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0"""
    async with asyncio.timeout(LONG):
        while await watcher.fetchval(query) < count:  # noqa: ASYNC110 - only the server knows
            await asyncio.sleep(0.01)


async def race(
    watcher: asyncpg.Connection,
    two: tuple[Any, Any],
    first: Callable[[Any], Awaitable[Any]],
    second: Callable[[Any], Awaitable[Any]],
) -> tuple[Any, Any]:
    """The answers when `second` comes while `first` is done and not committed."""
    one, other = two
    async with one.transaction():
        answer = await first(one)
        task = asyncio.ensure_future(second(other))
        await blocked(watcher)
    return answer, await task


async def until(true: Callable[[], Any]) -> None:
    """Return when something has become true; it may be awaitable."""
    async with asyncio.timeout(LONG):
        while not (await answer if asyncio.iscoroutine(answer := true()) else answer):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

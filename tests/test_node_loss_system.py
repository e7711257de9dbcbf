"""Nodes that freeze, die, are stopped and declared DOWN: real roles, real scripts, and the ledger that these keep."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import asyncpg
import pytest

from core.client import ClientError
from core.documents import JobDocument
from services.standalone.child import Child, Step
from services.worker.environment import MARK
from services.worker.proc import read_stat, read_variable
from tests.builders import settings_for
from tests.conftest import Databases
from tests.system import System, alive_with, beside, cmdline, running, until

pytestmark = pytest.mark.anyio

# Deaf to SIGTERM: that it is over is no courtesy of its own.
LEDGER = """#!/bin/bash
trap '' TERM
echo "start $SLURM_JOB_ID $SLURMD_NODENAME ${SLURM_RESTART_COUNT:-0}" >> "$LEDGER"
while [ ! -e "$GO" ]; do sleep 0.02; done
echo "end $SLURM_JOB_ID $SLURMD_NODENAME ${SLURM_RESTART_COUNT:-0}" >> "$LEDGER"
exit 7
"""


@pytest.fixture(scope="module")
async def servers(
    databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[System]:
    """An API and a scheduler for all tests."""
    folder = tmp_path_factory.mktemp("servers")
    async with databases.one() as url:
        quick = settings_for(url, redis_url, folder, heartbeat_seconds=0.3, lease_seconds=1.5)
        async with running(quick, folder, workers={}) as found:
            yield found


@pytest.fixture
async def system(servers: System, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[System]:
    """A node of the test's own. The parameter: REQUEUE_AFTER."""
    quick = {"heartbeat_seconds": 0.3, "lease_seconds": 1.5, "kill_grace_seconds": 0.5}
    quick["requeue_after"] = getattr(request, "param", 5.0)
    async with beside(servers, tmp_path, {f"{tmp_path.name}.1": 3}, **quick) as found:
        yield found


@pytest.fixture
async def second_node(system: System) -> None:
    """Beside the first; it is out until it is wanted."""
    system.start_worker(second(system), 2)
    await system.node_is(second(system))
    await system.api.set_node_state(second(system), "DRAIN", "not yet")


def second(system: System) -> str:
    """The name of the second node; the first is the system's own."""
    return f"{system.node[:-1]}2"


async def submitted(system: System, go: str = "go", **job: object) -> int:
    """A job that writes the ledger; it ends once `let_go`."""
    environment = {"LEDGER": str(system.folder / "ledger"), "GO": str(system.folder / go)}
    return (await system.submit(LEDGER, environment=environment, **job))["job_id"]


async def up(system: System, go: str = "go", **job: object) -> int:
    """Such a job, once its script has begun on the first node."""
    job_id = await submitted(system, go, **job)
    await has_begun(system, job_id, system.node)
    return job_id


async def has_begun(system: System, job_id: int, node: str, restarts: int = 0) -> None:
    async def asked() -> bool:
        return f"start {job_id} {node} {restarts}" in ledger(system)

    await until(asked, f"job {job_id} has begun on {node}")


def ledger(system: System) -> list[str]:
    path = system.folder / "ledger"
    return path.read_text().splitlines() if path.exists() else []


def let_go(system: System, go: str = "go") -> None:
    (system.folder / go).touch()


async def ended(system: System, job_id: int) -> tuple[int | None, int, int, list[str]]:
    """How a job ended: its exit code, attempt and restarts, and where."""
    job = await system.api.wait(job_id, timeout_seconds=60)
    return job["exit_code"], job["attempt"], job["restart_cnt"], job["nodes"]


def scripts_of(system: System) -> list[int]:
    """The live processes of the first node's jobs."""
    mine = [pid for pid in alive_with(str(system.folder / system.node)) if "services." not in cmdline(pid)]
    return [pid for pid in mine if (stat := read_stat(pid)) is not None and not stat.dead]


def processes_of(system: System, job_id: int) -> list[int]:
    """The live processes of a job's first attempt on the first node."""
    return [pid for pid in scripts_of(system) if (read_variable(pid, MARK) or "").startswith(f"{job_id}:1:")]


async def nothing_is_left_of(system: System, job_id: int) -> None:
    async def asked() -> bool:
        return not processes_of(system, job_id)

    await until(asked, f"nothing of job {job_id} is left")


def worker_of(system: System) -> Child:
    """The worker of the first node as it was started last."""
    return [child for child in system.children if child.name == f"worker-{system.node}"][-1]


def kill_all_of(system: System, *, keep_scripts: bool = False) -> None:
    """A power cut of the first node; or all but the scripts."""
    kept = set(scripts_of(system)) if keep_scripts else set()
    for pid in set(alive_with(str(system.folder / system.node))) - kept:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def let_time_pass(system: System, seconds: float = 60) -> None:
    """For the first node, which is silent: PostgreSQL heard it last that much earlier."""
    connection = await asyncpg.connect(system.settings.postgres_dsn)
    try:
        await connection.execute(
            "UPDATE node_leases SET heartbeat_time = heartbeat_time - make_interval(secs => $2) WHERE node = $1",
            system.node, seconds,
        )  # fmt: skip
    finally:
        await connection.close()


def spool_of(system: System) -> Path:
    """Where the worker of the first node and its keeper leave word for each other."""
    return system.folder / f"{system.node}/data/scripts/.spool"


def let_silence_be_over(system: System) -> None:
    """For the keeper of the first node, whose worker is stopped: PostgreSQL was heard too long ago."""
    os.utime(spool_of(system) / "silence", (0, 0))


async def unreachable(system: System, job_id: int, wanted: bool) -> JobDocument:
    async def asked() -> JobDocument | None:
        job = await system.api.job(job_id)
        return job if job["node_unreachable"] is wanted else None

    found: JobDocument = await until(asked, f"job {job_id} is{'' if wanted else ' not'} unreachable")
    return found


async def refused(system: System, count: int) -> None:
    async def asked() -> bool:
        return (await system.api.node(system.node))["stale_writes_refused"] == count

    await until(asked, f"node {system.node} was refused {count} writes")


@pytest.mark.usefixtures("second_node")
async def test_a_worker_that_is_frozen_and_thawed(system: System) -> None:
    """Meanwhile its keeper has ended what may be requeued, which runs elsewhere; the rest it takes up again."""
    one, two = system.node, second(system)
    again, kept = await up(system, requeue=True), await up(system)
    os.kill(system.worker_pid(), signal.SIGSTOP)
    await system.node_is(one, "DOWN")
    await nothing_is_left_of(system, again)
    for job_id in (again, kept):
        job = await unreachable(system, job_id, wanted=True)
        assert (job["state"], job["nodes"]) == ("RUNNING", [one])
    await system.api.set_node_state(two, "RESUME")
    await let_time_pass(system, 10**6)
    await has_begun(system, again, two, restarts=1)
    assert (await unreachable(system, kept, wanted=True))["state"] == "RUNNING"  # no time is long enough

    os.kill(system.worker_pid(), signal.SIGCONT)
    await refused(system, 1)
    assert (await unreachable(system, kept, wanted=False))["nodes"] == [one]
    let_go(system)
    assert [await ended(system, job_id) for job_id in (again, kept)] == [(7, 2, 1, [two]), (7, 1, 0, [one])]
    assert sorted(ledger(system)) == sorted(
        [
            f"start {again} {one} 0",
            f"start {again} {two} 1",
            f"end {again} {two} 1",
            f"start {kept} {one} 0",
            f"end {kept} {one} 0",
        ]
    )


@pytest.mark.usefixtures("second_node")
async def test_a_node_that_is_gone_for_good(system: System) -> None:
    """What may be requeued runs elsewhere, once; what may not waits for an operator's word; then it is forgotten."""
    one, two = system.node, second(system)
    again, kept = await up(system, requeue=True), await up(system)
    kill_all_of(system)
    await system.node_is(one, "DOWN")
    await system.api.set_node_state(two, "RESUME")
    await let_time_pass(system)
    let_go(system)
    assert await ended(system, again) == (7, 2, 1, [two])
    assert (await unreachable(system, kept, wanted=True))["state"] == "RUNNING"
    with pytest.raises(ClientError, match=rf"{one} holds 1 CPUs for jobs \({kept}\)"):
        await system.api.delete_node(one)
    assert (await system.api.set_node_state(one, "DOWN", "burnt"))["alloc_cpus"] == 0
    lost = await system.api.job(kept)
    assert (lost["state"], lost["state_reason"]) == ("NODE_FAIL", "NodeDown")
    await system.api.delete_node(one)
    assert one not in [node["name"] for node in await system.api.nodes()]
    assert sorted(ledger(system)) == sorted(
        [f"start {again} {one} 0", f"start {kept} {one} 0", f"start {again} {two} 1", f"end {again} {two} 1"]
    )


async def test_down_of_a_living_node(system: System) -> None:
    """Its worker ends what it runs at once; the node comes back as it was. A deleted one's worker stops."""
    jobs = [await up(system), await up(system, requeue=True)]
    worker = system.worker_pid()
    shown = await system.api.set_node_state(system.node, "DOWN", "smells")
    assert (shown["state"], shown["alloc_cpus"], shown["reason"]) == ("DOWN", 0, "smells")
    for job_id in jobs:
        job = await system.api.job(job_id)
        assert (job["state"], job["state_reason"]) == ("NODE_FAIL", "NodeDown")
        await nothing_is_left_of(system, job_id)
    await refused(system, 2)
    waiting = await submitted(system)
    let_go(system)
    await system.api.set_node_state(system.node, "RESUME")
    assert await ended(system, waiting) == (7, 1, 0, [system.node])
    assert system.worker_pid() == worker
    assert [line for line in ledger(system) if "end" in line] == [f"end {waiting} {system.node} 0"]

    await system.api.set_node_state(system.node, "DOWN", "sold")
    await system.api.delete_node(system.node)
    assert await worker_of(system).wait() == 3
    said = (system.folder / f"worker-{system.node}.err").read_text()
    assert f"node {system.node} was deleted: this worker stops" in said
    system.start_worker(system.node)
    await system.node_is(system.node, "IDLE")


@pytest.mark.parametrize("system", [3600.0], indirect=True, ids=["it lasts until the test says"])
async def test_a_stopped_workers_keeper_counts_the_silence(system: System) -> None:
    """What it ends goes back to the queue by the next worker's word: it was no signal of the job's own.

    What has ended by itself before, has ended.
    """
    again, kept = await up(system, requeue=True), await up(system)
    quick = await up(system, "go at once", requeue=True)
    await worker_of(system).stop((Step(signal.SIGTERM, 30),))
    let_go(system, "go at once")
    await nothing_is_left_of(system, quick)
    assert processes_of(system, again)
    let_silence_be_over(system)
    await nothing_is_left_of(system, again)
    assert processes_of(system, kept)
    assert (await system.api.job(again))["state"] == "RUNNING"
    system.start_worker(system.node)
    await has_begun(system, again, system.node, restarts=1)
    let_go(system)
    assert await ended(system, again) == (7, 2, 1, [system.node])
    for job_id in (kept, quick):
        assert await ended(system, job_id) == (7, 1, 0, [system.node])
    spool = spool_of(system)
    assert not list((spool / "granted").iterdir())


async def test_what_runs_on_after_its_end_is_ended_by_the_next_worker(system: System) -> None:
    """Worker and keeper are gone, the scripts are not; an operator who sees the node silent declares it DOWN."""
    job_id = await up(system)
    kill_all_of(system, keep_scripts=True)
    await system.node_is(system.node, "DOWN")
    await system.api.set_node_state(system.node, "DOWN", "silent")
    assert (await system.api.job(job_id))["state"] == "NODE_FAIL"
    await system.api.set_node_state(system.node, "RESUME")
    assert processes_of(system, job_id)
    system.start_worker(system.node)
    new = await up(system)
    assert not processes_of(system, job_id)  # before anything new began
    let_go(system)
    assert (await ended(system, new))[0] == 7
    assert f"end {job_id} {system.node} 0" not in ledger(system)

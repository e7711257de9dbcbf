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
from core.settings import Settings
from services.standalone.child import Child, Step
from services.worker.environment import MARK
from services.worker.proc import read_stat, read_variable
from tests.system import System, alive_with, cmdline, running, until

pytestmark = pytest.mark.anyio

# What it starts goes on by itself: nothing short of ending everything ends it.
LEDGER = """#!/bin/bash
trap '' TERM
echo "start $SLURM_JOB_ID $SLURMD_NODENAME ${SLURM_RESTART_COUNT:-0}" >> "$LEDGER"
while [ ! -e "$GO" ]; do sleep 0.02; done
echo "end $SLURM_JOB_ID $SLURMD_NODENAME ${SLURM_RESTART_COUNT:-0}" >> "$LEDGER"
exit 7
"""


@pytest.fixture
async def system(settings: Settings, tmp_path: Path) -> AsyncIterator[System]:
    """Two nodes, of which n2 is out until it is wanted."""
    quick = settings.model_copy(
        update={"heartbeat_seconds": 0.3, "lease_seconds": 1.5, "requeue_after": 5.0, "kill_grace_seconds": 0.5}
    )
    async with running(quick, tmp_path, workers={"n1": 3, "n2": 2}) as found:
        await found.api.set_node_state("n2", "DRAIN", "not yet")
        yield found


async def submitted(system: System, go: str = "go", **job: object) -> int:
    """A job that writes the ledger; it ends once `let_go`."""
    environment = {"LEDGER": str(system.folder / "ledger"), "GO": str(system.folder / go)}
    found = await system.api.submit({"account": "a", "environment": environment, **job}, LEDGER)
    return found["job_id"]


async def up(system: System, go: str = "go", **job: object) -> int:
    """Such a job, once its script has begun on n1."""
    job_id = await submitted(system, go, **job)
    await has_begun(system, job_id, "n1")
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


def scripts_of(system: System, node: str) -> list[int]:
    """The live processes of the jobs of a node."""
    mine = [pid for pid in alive_with(str(system.folder / node)) if "services." not in cmdline(pid)]
    return [pid for pid in mine if (stat := read_stat(pid)) is not None and not stat.dead]


def processes_of(system: System, job_id: int) -> list[int]:
    """The live processes of a job's first attempt on n1, its `sleep` among them."""
    return [pid for pid in scripts_of(system, "n1") if (read_variable(pid, MARK) or "").startswith(f"{job_id}:1:")]


async def nothing_is_left_of(system: System, job_id: int) -> None:
    async def asked() -> bool:
        return not processes_of(system, job_id)

    await until(asked, f"nothing of job {job_id} is left")


def worker_of(system: System, node: str) -> Child:
    """The worker of a node as it was started last."""
    return [child for child in system.children if child.name == f"worker-{node}"][-1]


def kill_all_of(system: System, node: str, *, keep_scripts: bool = False) -> None:
    """A power cut; or all but the scripts."""
    kept = set(scripts_of(system, node)) if keep_scripts else set()
    for pid in set(alive_with(str(system.folder / node))) - kept:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def let_time_pass(system: System, seconds: float = 60, node: str = "n1") -> None:
    """For a node that is silent: PostgreSQL heard it last that much earlier."""
    connection = await asyncpg.connect(system.settings.postgres_dsn)
    try:
        await connection.execute(
            "UPDATE node_leases SET heartbeat_time = heartbeat_time - make_interval(secs => $2) WHERE node = $1",
            node, seconds,
        )  # fmt: skip
    finally:
        await connection.close()


async def unreachable(system: System, job_id: int, wanted: bool) -> JobDocument:
    async def asked() -> JobDocument | None:
        job = await system.api.job(job_id)
        return job if job["node_unreachable"] is wanted else None

    found: JobDocument = await until(asked, f"job {job_id} is{'' if wanted else ' not'} unreachable")
    return found


async def refused(system: System, node: str, count: int) -> None:
    async def asked() -> bool:
        return (await system.api.node(node))["stale_writes_refused"] == count

    await until(asked, f"node {node} was refused {count} writes")


async def test_a_worker_that_is_frozen_and_thawed(system: System) -> None:
    """Meanwhile its keeper has ended what may be requeued, which runs elsewhere; the rest it takes up again."""
    again, kept = await up(system, requeue=True), await up(system)
    os.kill(system.worker_pid("n1"), signal.SIGSTOP)
    await system.node_is("n1", "DOWN")
    await nothing_is_left_of(system, again)
    for job_id in (again, kept):
        job = await unreachable(system, job_id, wanted=True)
        assert (job["state"], job["nodes"]) == ("RUNNING", ["n1"])
    await system.api.set_node_state("n2", "RESUME")
    await let_time_pass(system, 10**6)
    await has_begun(system, again, "n2", restarts=1)
    assert (await unreachable(system, kept, wanted=True))["state"] == "RUNNING"  # no time is long enough

    os.kill(system.worker_pid("n1"), signal.SIGCONT)
    await refused(system, "n1", 1)
    assert (await unreachable(system, kept, wanted=False))["nodes"] == ["n1"]
    let_go(system)
    ends = [await system.api.wait(job_id, timeout_seconds=60) for job_id in (again, kept)]
    assert [(job["exit_code"], job["attempt"], job["restart_cnt"]) for job in ends] == [(7, 2, 1), (7, 1, 0)]
    assert sorted(ledger(system)) == sorted(
        [f"start {again} n1 0", f"start {again} n2 1", f"end {again} n2 1", f"start {kept} n1 0", f"end {kept} n1 0"]
    )
    assert {node["alloc_cpus"] for node in await system.api.nodes()} == {0}


async def test_a_node_that_is_gone_for_good(system: System) -> None:
    """What may be requeued runs elsewhere, once; what may not waits for an operator's word; then it is forgotten."""
    again, kept = await up(system, requeue=True), await up(system)
    kill_all_of(system, "n1")
    await system.node_is("n1", "DOWN")
    await system.api.set_node_state("n2", "RESUME")
    await let_time_pass(system)
    let_go(system)
    ended = await system.api.wait(again, timeout_seconds=60)
    assert (ended["state"], ended["exit_code"], ended["nodes"]) == ("FAILED", 7, ["n2"])
    assert (await unreachable(system, kept, wanted=True))["state"] == "RUNNING"
    with pytest.raises(ClientError, match=rf"n1 holds 1 CPUs for jobs \({kept}\)"):
        await system.api.delete_node("n1")
    assert (await system.api.set_node_state("n1", "DOWN", "burnt"))["alloc_cpus"] == 0
    lost = await system.api.job(kept)
    assert (lost["state"], lost["state_reason"]) == ("NODE_FAIL", "NodeDown")
    await system.api.delete_node("n1")
    assert [node["name"] for node in await system.api.nodes()] == ["n2"]
    assert [line for line in ledger(system) if "end" in line] == [f"end {again} n2 1"]
    assert sorted(line for line in ledger(system) if f" {again} " in line and "start" in line) == [
        f"start {again} n1 0",
        f"start {again} n2 1",
    ]


async def test_down_of_a_living_node(system: System) -> None:
    """Its worker ends what it runs at once; the node comes back as it was. A deleted one's worker stops."""
    first, second = await up(system), await up(system, requeue=True)
    worker = system.worker_pid("n1")
    shown = await system.api.set_node_state("n1", "DOWN", "smells")
    assert (shown["state"], shown["alloc_cpus"], shown["reason"]) == ("DOWN", 0, "smells")
    for job_id in (first, second):
        job = await system.api.job(job_id)
        assert (job["state"], job["state_reason"]) == ("NODE_FAIL", "NodeDown")
    for job_id in (first, second):
        await nothing_is_left_of(system, job_id)
    await refused(system, "n1", 2)
    waiting = await submitted(system)
    let_go(system)
    await system.api.set_node_state("n1", "RESUME")
    ended = await system.api.wait(waiting, timeout_seconds=60)
    assert (ended["nodes"], ended["exit_code"]) == (["n1"], 7)
    assert system.worker_pid("n1") == worker
    assert [line for line in ledger(system) if "end" in line] == [f"end {waiting} n1 0"]

    await system.api.set_node_state("n1", "DOWN", "sold")
    await system.api.delete_node("n1")
    assert await worker_of(system, "n1").wait() == 3
    assert "node n1 was deleted: this worker stops" in (system.folder / "worker-n1.err").read_text()
    system.start_worker("n1")
    await system.node_is("n1", "IDLE")


async def test_a_stopped_workers_keeper_counts_the_silence(system: System) -> None:
    """What it ends goes back to the queue by the next worker's word: it was no signal of the job's own.

    What has ended by itself before, has ended.
    """
    again, kept = await up(system, requeue=True), await up(system)
    quick = await up(system, "go at once", requeue=True)
    await worker_of(system, "n1").stop((Step(signal.SIGTERM, 30),))
    let_go(system, "go at once")
    await nothing_is_left_of(system, quick)
    await nothing_is_left_of(system, again)
    assert processes_of(system, kept)
    assert (await system.api.job(again))["state"] == "RUNNING"
    system.start_worker("n1")
    await has_begun(system, again, "n1", restarts=1)
    let_go(system)
    job = await system.api.wait(again, timeout_seconds=60)
    assert (job["restart_cnt"], job["attempt"], job["exit_code"]) == (1, 2, 7)
    for job_id in (kept, quick):
        job = await system.api.wait(job_id, timeout_seconds=60)
        assert (job["restart_cnt"], job["attempt"], job["exit_code"]) == (0, 1, 7)
    assert not list((system.folder / "n1/data/scripts/.spool/granted").iterdir())


async def test_what_runs_on_after_its_end_is_ended_by_the_next_worker(system: System) -> None:
    """Worker and keeper are gone, the scripts are not; an operator who sees the node silent declares it DOWN."""
    job_id = await up(system)
    kill_all_of(system, "n1", keep_scripts=True)
    await system.node_is("n1", "DOWN")
    await system.api.set_node_state("n1", "DOWN", "silent")
    assert (await system.api.job(job_id))["state"] == "NODE_FAIL"
    await system.api.set_node_state("n1", "RESUME")
    assert processes_of(system, job_id)
    system.start_worker("n1")
    new = await up(system)
    assert not processes_of(system, job_id)  # before anything new began
    let_go(system)
    assert (await system.api.wait(new, timeout_seconds=60))["exit_code"] == 7
    assert f"end {job_id} n1 0" not in ledger(system)

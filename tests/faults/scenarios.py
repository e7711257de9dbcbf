"""Situations made on purpose: the product as it is comes out of each unbroken, and a defect (broken.py) does not."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from core import streams
from core.db import allocations, jobs, nodes
from services.standalone.child import Step
from tests.faults import ledger
from tests.faults.cluster import Role, cluster
from tests.faults.evidence import Sent
from tests.faults.faults import kill_both
from tests.faults.jobs import Wanted, leaves_behind, sleeps, unmarked
from tests.faults.load import loading
from tests.faults.record import Record
from tests.faults.run import Run, running
from tests.faults.verdicts import judge
from tests.proxy import Fault
from tests.system import until

FAR = 3600.0
"""Seconds of a poll that nothing may rely on."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A situation: what is played on which cluster, and how long its jobs may take to be over afterwards."""

    play: Callable[[Run], Awaitable[None]]
    nodes: Mapping[str, int] = field(default_factory=lambda: {"n1": 4})
    patience: float = 8.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    postgres: Mapping[str, str] = field(default_factory=dict)


SCENARIOS: dict[str, Scenario] = {}


def scenario(**more: Any) -> Callable[[Callable[[Run], Awaitable[None]]], Callable[[Run], Awaitable[None]]]:
    """Enter a function among the scenarios, by its name."""

    def enter(play: Callable[[Run], Awaitable[None]]) -> Callable[[Run], Awaitable[None]]:
        SCENARIOS[play.__name__] = Scenario(play, **more)
        return play

    return enter


async def a_job(run: Run, body: str, **more: Any) -> Sent:
    """Submit one, which goes by the scheduler."""
    return await run.load.submit(Wanted(run.load.new_name(), body, **more), listed=True)


async def says(run: Run, sent: Sent, word: str) -> None:
    """Wait for a job's own line in the ledger."""
    [job_id] = sent.job_ids

    async def said() -> bool:
        return any(line.word == word and line.attempt.job_id == job_id for line in ledger.read(run.cluster.ledger))

    await until(said, f"job {job_id} writes {word}")


async def is_in(run: Run, sent: Sent, *states: str) -> None:
    """Wait for a job's state in the database."""
    [job_id] = sent.job_ids

    async def found() -> bool:
        rows = await run.ask("SELECT state FROM jobs WHERE job_id = $1", job_id)
        return bool(rows) and rows[0][0] in states

    await until(found, f"job {job_id} is {' or '.join(states)}")


async def _lease_over(run: Run, node: str = "n1") -> None:
    async def over() -> bool:
        rows = await run.ask("SELECT lease_until < clock_timestamp() FROM node_leases WHERE node = $1", node)
        return bool(rows) and rows[0][0]

    await until(over, f"the lease of {node} is over")


async def _worker_of(run: Run, role: Role) -> int:
    async def alive() -> int | None:
        return run.cluster.worker_pid(role)

    pid: int = await until(alive, f"{role.name} has a worker")
    return pid


async def _registers(run: Run, role: Role, older: int) -> None:
    """Wait for a worker of an incarnation after `older`."""

    async def done() -> bool:
        rows = await run.ask("SELECT incarnation FROM node_leases WHERE node = $1", role.node)
        return bool(rows) and rows[0][0] > older

    await until(done, f"{role.name} registers")


async def _at_work(run: Run) -> None:
    """Every role has looked at the tables for the first time, and a job has gone its way."""
    await is_in(run, await a_job(run, sleeps(0)), "COMPLETED")


async def _incarnation(run: Run, node: str = "n1") -> int:
    [row] = await run.ask("SELECT incarnation FROM node_leases WHERE node = $1", node)
    return int(row[0])


# What a worker that died leaves


@scenario()
async def a_script_ends_under_another_worker(run: Run) -> None:
    """It was started by one that was killed."""
    [role] = run.cluster.of("worker")
    sent = [await a_job(run, sleeps(1.5, end)) for end in ("leave 137", "fall KILL", "leave 0")]
    for one in sent:
        await says(run, one, "start")
    os.kill(await _worker_of(run, role), signal.SIGKILL)


async def _ends_with_nobody_to_tell(run: Run, role: Role, sent: Sent) -> None:
    """Kill its worker and its keeper, and let another worker come once it has ended."""
    role.kept = False
    assert kill_both(run, role)
    await says(run, sent, "end")
    await asyncio.sleep(0.1)  # it has said that it ends, and does
    await run.cluster.add_worker("again", "n1")


@scenario()
async def a_script_ends_with_nobody_to_tell(run: Run) -> None:
    """Worker and keeper were killed, and the script had ended before another worker came."""
    [role] = run.cluster.of("worker")
    sent = await a_job(run, sleeps(1))
    await says(run, sent, "start")
    await _ends_with_nobody_to_tell(run, role, sent)


@scenario()
async def a_daemon_outlives_its_script_and_their_keeper(run: Run) -> None:
    """Whoever could have told how the script ended was killed; what it left leads a session with its tag."""
    [role] = run.cluster.of("worker")
    name = run.load.new_name()
    sent = await run.load.submit(Wanted(name, leaves_behind(name, "sleep 1\nleave 0")))
    await says(run, sent, "child")
    await _ends_with_nobody_to_tell(run, role, sent)


@scenario()
async def a_worker_dies_right_before_a_process(run: Run) -> None:
    """Its keeper lives, and has seen none: the script is started by the next worker, in the same attempt."""
    [first] = run.cluster.of("worker")
    incarnation = await _incarnation(run)
    await run.cluster.retire(first)
    armed = await run.cluster.add_worker("armed", "n1", ROWLOCK_CRASH="worker.written:2")
    await _registers(run, armed, incarnation)
    await says(run, await a_job(run, sleeps(3)), "start")
    await is_in(run, await a_job(run, sleeps(0.1, "leave 5")), "FAILED", "NODE_FAIL")
    if "was killed by signal 9" not in (run.cluster.folder / "armed.err").read_text():
        run.findings.append("the worker did not die")


@scenario()
async def a_job_leaves_processes_behind(run: Run) -> None:
    """In a session of their own, with nothing in their environment, and in the job's own group."""
    name = run.load.new_name()
    sent = await run.load.submit(Wanted(name, leaves_behind(name)))
    await is_in(run, sent, "COMPLETED")
    await run.look_for_orphans_once()


@scenario()
async def a_running_job_is_cancelled(run: Run) -> None:
    """It stays RUNNING until nothing of it is left."""
    sent = await a_job(run, sleeps(30))
    await says(run, sent, "start")
    await run.load.cancel(sent)


# Answers that are lost, and what comes late


@scenario()
async def the_answer_to_an_end_is_lost(run: Run) -> None:
    """The worker writes it again."""
    [role] = run.cluster.of("worker")
    sent = await a_job(run, sleeps(0.3, "leave 4"))
    await says(run, sent, "start")
    role.postgres.lose(allocations._TURN_OVER)
    await says(run, sent, "end")


@scenario(settings={"poll_seconds": 0.05})
async def the_answer_to_a_requeue_is_lost(run: Run) -> None:
    """When the worker writes it again the job is running already, in another attempt of the same node."""
    [role] = run.cluster.of("worker")
    sent = await a_job(run, sleeps(2), requeue=True)
    await says(run, sent, "start")
    incarnation = await _incarnation(run)
    role.kept = False
    assert kill_both(run, role)
    for pid in run.cluster.scripts_of(role):
        os.kill(pid, signal.SIGKILL)
    again = await run.cluster.add_worker("again", "n1")
    again.postgres.lose(allocations._RELEASE)
    await _registers(run, again, incarnation)


@scenario(settings={"lease_seconds": 1.0, "heartbeat_seconds": 0.2, "requeue_after": 6.0}, patience=20.0)
async def an_end_of_an_earlier_worker_comes_late(run: Run) -> None:
    """It calls lost what a newer worker, of the spool that started it, has taken over alive."""
    [first] = run.cluster.of("worker")
    sent = await a_job(run, unmarked(sleeps(12, "leave 9")))  # or it would be refused on this machine
    await says(run, sent, "start")
    incarnation = await _incarnation(run)
    await run.cluster.retire(first)
    other = await run.cluster.add_worker("other", "n1", "elsewhere")
    other.postgres.hold(allocations._TURN_OVER)
    await _registers(run, other, incarnation)
    await asyncio.wait_for(other.postgres.tripped.wait(), 20)
    await _lease_over(run)
    other.kept = False
    other.struck = True
    again = await run.cluster.add_worker("again", "n1")
    await _registers(run, again, incarnation + 1)
    await other.postgres.let_go()


@scenario(settings={"lease_seconds": 1.0, "heartbeat_seconds": 0.2, "requeue_after": 6.0})
async def a_worker_that_lost_its_node_reads_on(run: Run) -> None:
    """Its heartbeats vanish, so that it does not know of the other that has its node's name, with another spool."""
    [first] = run.cluster.of("worker")
    incarnation = await _incarnation(run)
    first.kept, first.struck = False, True
    first.postgres.lose(nodes._HEARTBEAT, Fault.HOLE_BEFORE)
    await asyncio.wait_for(first.postgres.tripped.wait(), 20)
    await _lease_over(run)
    other = await run.cluster.add_worker("other", "n1", "elsewhere")
    await _registers(run, other, incarnation)
    for _ in range(12):
        await a_job(run, sleeps(0.5))
        await asyncio.sleep(0.1)


@scenario(settings={"lease_seconds": 1.0, "heartbeat_seconds": 0.2, "requeue_after": 6.0})
async def a_start_arrives_after_its_node_was_taken(run: Run) -> None:
    """Its worker hears nothing else, nor does the scheduler, which would have taken the job back by then."""
    [first], [scheduler] = run.cluster.of("worker"), run.cluster.of("scheduler")
    incarnation = await _incarnation(run)
    first.kept, first.struck = False, True
    first.postgres.hold(jobs._START, alone=True)
    await a_job(run, sleeps(3))
    await asyncio.wait_for(first.postgres.tripped.wait(), 20)
    scheduler.postgres.silence()
    first.postgres.lose(nodes._HEARTBEAT, Fault.HOLE_BEFORE)
    await _lease_over(run)
    other = await run.cluster.add_worker("other", "n1", "elsewhere")
    other.postgres.hold(jobs._START, alone=True)
    await _registers(run, other, incarnation)
    await asyncio.wait_for(other.postgres.tripped.wait(), 20)
    first.postgres.let_arrive()
    await asyncio.sleep(1)  # it is refused, which nobody sees
    for role in (other, first, scheduler):
        await role.postgres.let_go()


@scenario(nodes={"n1": 4, "n2": 4})
async def a_worker_is_stopped_while_its_start_is_on_its_way(run: Run) -> None:
    """And nobody comes back to its node: the job waits for another one."""
    role, another = run.cluster.of("worker")
    for worker in (role, another):
        worker.kept, worker.struck = False, True
    assert another.child is not None
    await another.child.stop((Step(signal.SIGTERM, 30),))
    role.postgres.lose(jobs._START, Fault.HOLE_AFTER)
    sent = await a_job(run, sleeps(0))
    await asyncio.wait_for(role.postgres.tripped.wait(), 20)
    assert role.child is not None
    role.child.process.send_signal(signal.SIGTERM)
    await is_in(run, sent, "PENDING")
    await run.cluster.add_worker("again", "n2")


@scenario()
async def a_start_waits_for_its_commit(run: Run) -> None:
    """Until then the entry that spoke of it stays in the stream: whoever comes next reads it again."""
    [role] = run.cluster.of("worker")
    role.postgres.hold(jobs._START)
    sent = await a_job(run, sleeps(0))
    await asyncio.wait_for(role.postgres.tripped.wait(), 20)
    client = run.cluster.redis_client()
    try:
        await asyncio.sleep(0.2)  # for an acknowledgement that must not come
        if not await client.xlen(streams.stream_of("n1")):
            run.findings.append("an entry was acknowledged before the start of its job was committed")
    finally:
        await client.aclose()
    await role.postgres.let_go()
    await says(run, sent, "start")


@scenario(settings={"lease_seconds": 30.0, "heartbeat_seconds": 5.0, "requeue_after": 60.0})
async def a_newer_worker_registers_while_one_recovers(run: Run) -> None:
    """The older one does not know of it yet, reads what runs in its name, and finds nothing."""
    [role] = run.cluster.of("worker")
    sent = await a_job(run, sleeps(4, "leave 9"))
    await says(run, sent, "start")
    incarnation = await _incarnation(run)
    os.kill(await _worker_of(run, role), signal.SIGKILL)
    role.postgres.hold(jobs._RUNNING, alone=True)
    await asyncio.wait_for(role.postgres.tripped.wait(), 20)
    role.kept, role.struck = False, True
    again = await run.cluster.add_worker("again", "n1")
    await _registers(run, again, incarnation + 1)
    await role.postgres.let_go()


# Hints that never come: nothing polls here


@scenario(settings={"poll_seconds": FAR})
async def a_notification_is_missed(run: Run) -> None:
    """The scheduler had no connection when it came."""
    [role] = run.cluster.of("scheduler")
    role.postgres.cut()
    await a_job(run, sleeps(0))
    await role.postgres.mend()


@scenario(settings={"poll_seconds": FAR}, patience=25.0)
async def a_message_is_not_taken(run: Run) -> None:
    """Redis was away when the scheduler told the node."""
    await _at_work(run)
    [role] = run.cluster.of("scheduler")
    role.redis.cut()
    sent = await a_job(run, sleeps(0))
    await is_in(run, sent, "CONFIGURING")
    await role.redis.mend()


# The pass


@scenario()
async def a_report_is_faster_than_a_pass(run: Run) -> None:
    """What the pass has decided on fits no more: a report gave the node to an older and larger job."""
    [role] = run.cluster.of("scheduler")
    first = await a_job(run, sleeps(60), cpus=2)
    await says(run, first, "start")
    role.postgres.hold(allocations._PLACE, alone=True)
    larger = await a_job(run, sleeps(2), cpus=3)
    await a_job(run, sleeps(0.3), cpus=2)
    await asyncio.wait_for(role.postgres.tripped.wait(), 20)
    await run.load.cancel(first)
    await says(run, larger, "start")
    await role.postgres.let_go()


@scenario(postgres={"wal_writer_delay": "10s"})
async def postgres_crashes_after_an_answer(run: Run) -> None:
    """Nobody else has committed anything in between."""
    frozen = [role.pid for role in run.cluster.of("scheduler")]
    frozen += [await _worker_of(run, role) for role in run.cluster.of("worker")]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        await a_job(run, sleeps(0))
        await run.cluster.crash_postgres("kill")
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def staged(scene: Scenario, folder: Path, broken: str | None = None) -> AsyncIterator[Run]:
    """The cluster that a scenario wants."""
    async with (
        cluster(
            folder,
            nodes=scene.nodes,
            apis=1,
            schedulers=1,
            broken=broken,
            options=scene.postgres,
            **scene.settings,
        ) as found,
        loading(found, Random(1)) as load,
        running(found, load, Record(), Random(2)) as run,
    ):
        yield run


async def played(name: str, folder: Path, broken: str | None = None) -> dict[str, list[str]]:
    """Play a scenario, and answer what is broken afterwards, by column."""
    scene = SCENARIOS[name]
    async with staged(scene, folder, broken) as run:
        await scene.play(run)
        calm = await run.settled(scene.patience)
        verdicts = judge(await run.evidence())
    if not calm and not any(verdicts.values()):
        verdicts["lost"].append("something is not over after all")
    return verdicts

"""Silent, DOWN and forgotten nodes on the real statements, and what a worker does that comes back too late."""

import asyncio
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import structlog
from redis.asyncio import Redis
from structlog.testing import capture_logs

from core.batch import Batcher
from core.db import allocations, jobs, nodes, outputs
from core.db.connection import Pool
from core.loss import MARGIN, Calm, Loss
from core.records import Attempt, Output, Placement
from core.settings import Settings
from core.states import State
from services.scheduler import lose
from services.scheduler.lose import Watch
from services.scheduler.reap import reap_once
from services.worker import claim, health, proc, serve
from services.worker import node as worker_node
from services.worker.node import Node, Run, Superseded, heartbeat_once
from services.worker.recover import recover
from services.worker.report import write_endings, write_outputs
from services.worker.spool import Exit
from services.worker.supervise import attempt
from tests.builders import (
    LONG,
    a_job,
    a_node,
    allocate,
    an_ending,
    blocked,
    finish,
    give,
    job_of,
    register,
    start,
    state_of,
    submit,
)
from tests.workers import a_run, joined, nothing, started

pytestmark = pytest.mark.anyio

LEASE = 5.0
# With the grants of `a_node`: REQUEUE_AFTER, the grace period, the margin.
REQUEUE = 60 + 1 + 10
UNUSED: Any = None
"""Who would store where a restart begins: nothing here is one, and what runs first has nothing to store."""


class Patient(Watch):
    """A watch that has lasted for ages."""

    async def lose_once(self) -> int:
        async with self._pool.acquire() as connection:
            now = await connection.fetchval("SELECT now()")
        self._calm = Calm(now - timedelta(days=10_000), now)
        return await super().lose_once()


@pytest.fixture
async def watch(pool: Pool, connection: asyncpg.Connection) -> Watch:
    """A watch over a PostgreSQL that began more than a lease ago."""
    age = "SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time()) > $1"
    async with asyncio.timeout(LONG):
        while not await connection.fetchval(age, LEASE):  # noqa: ASYNC110 - only the server knows
            await asyncio.sleep(0.05)
    return Patient(pool, LEASE)


async def silence(connection: asyncpg.Connection, seconds: float, node: str = "n1") -> None:
    """The last heartbeat of a node was so long ago, and what runs there started before that."""
    await connection.execute(
        "UPDATE node_leases SET heartbeat_time = now() - make_interval(secs => $2),"
        " lease_until = now() - make_interval(secs => $2 - $3) WHERE node = $1",
        node, seconds, LEASE,
    )  # fmt: skip
    await connection.execute(
        "UPDATE jobs SET start_time = now() - make_interval(secs => $2 + 1) WHERE node = $1 AND state = 'RUNNING'",
        node, seconds,
    )  # fmt: skip


async def beat(connection: Any, node: str = "n1", incarnation: int = 1) -> bool:
    return await nodes.heartbeat(connection, node, incarnation, lease_seconds=60, draining=False, cpu_load=0)


# Silent nodes


async def test_what_may_be_requeued_starts_elsewhere(connection: asyncpg.Connection, watch: Watch) -> None:
    await register(connection, a_node("n1", 2))
    lost, kept = await started(connection, requeue=True), await started(connection)
    [younger] = await submit(connection, a_job())
    await silence(connection, REQUEUE - 1)
    assert await watch.lose_once() == 0
    await silence(connection, REQUEUE)
    with capture_logs() as logs:
        assert await watch.lose_once() == 1
    assert [(log["event"], log["job_id"], log["attempt"], log["node"]) for log in logs] == [
        ("job_lost", lost.job_id, 1, "n1")
    ]
    job = await job_of(connection, lost)
    assert (job.state, job.restart_cnt, job.node, job.start_time) == (State.PENDING, 1, None, None)
    assert job.state_description is not None
    assert job.state_description.startswith("requeued: node n1 has been silent since 20")
    assert await state_of(connection, kept.job_id) is State.RUNNING
    assert await connection.fetchval("SELECT alloc_cpus FROM nodes") == 1
    assert await watch.lose_once() == 0

    await register(connection, a_node("n2", 1))
    assert await allocate(connection) == [Attempt(lost.job_id, 2)]  # at its old place, before the younger
    assert await state_of(connection, younger) is State.PENDING
    assert await start(connection, Attempt(lost.job_id, 2), node="n2")
    assert await finish(connection, lost) == set()  # the first one, coming back
    assert await finish(connection, Attempt(lost.job_id, 2), node="n2") == {Attempt(lost.job_id, 2)}
    assert await finish(connection, kept) == {kept}


async def test_a_node_is_held_to_what_it_grants(connection: asyncpg.Connection, watch: Watch) -> None:
    await register(connection, a_node("n1", grace_seconds=100))
    await register(connection, a_node("n2", requeue_after_seconds=159))
    attempts = [await started(connection, node, requeue=True) for node in ("n1", "n2")]
    await register(connection, a_node("n3"))
    await register(connection, a_node("n4"))
    for node in ("n1", "n2"):
        await silence(connection, REQUEUE + 98, node)
    assert await watch.lose_once() == 0
    for node in ("n1", "n2"):
        await silence(connection, REQUEUE + 99, node)
    assert await watch.lose_once() == 2
    assert [await state_of(connection, attempt.job_id) for attempt in attempts] == [State.PENDING] * 2


async def test_without_a_grant_only_a_time_limit_that_is_over_ends_it(
    connection: asyncpg.Connection, watch: Watch
) -> None:
    await register(connection, a_node("n1", 4))
    short, long, none = [await started(connection, time_limit_seconds=limit) for limit in (100, 101, None)]
    again = await started(connection, time_limit_seconds=1, requeue=True)
    await connection.execute("UPDATE node_leases SET requeue_after_seconds = 1000")
    await silence(connection, 100 + 1 + 10)
    assert await watch.lose_once() == 1
    job = await job_of(connection, short)
    assert (job.state, job.state_reason, job.node) == (State.NODE_FAIL, "NodeDown", "n1")
    assert "longer than the job's time limit and the grace period" in (job.state_description or "")
    await silence(connection, 10**6)
    await connection.execute("UPDATE node_leases SET requeue_after_seconds = 2000000")
    assert await watch.lose_once() == 1
    states = [await state_of(connection, attempt.job_id) for attempt in (long, none, again)]
    assert states == [State.NODE_FAIL, State.RUNNING, State.RUNNING]
    assert await connection.fetchval("SELECT alloc_cpus FROM nodes") == 2


async def test_a_worker_that_was_stopped_on_purpose_knows_how_it_ended(
    connection: asyncpg.Connection, watch: Watch
) -> None:
    await register(connection)
    attempt = await started(connection, time_limit_seconds=1)
    await silence(connection, 10**6)
    await connection.execute("UPDATE node_leases SET draining = true")
    assert await watch.lose_once() == 0
    assert await state_of(connection, attempt.job_id) is State.RUNNING


async def test_a_time_limit_counts_from_the_start_that_followed_the_last_heartbeat(
    connection: asyncpg.Connection, watch: Watch
) -> None:
    await register(connection)
    attempt = await started(connection, time_limit_seconds=100)
    await silence(connection, 120)
    later = "UPDATE jobs SET start_time = now() - make_interval(secs => $1)"
    await connection.execute(later, 110.0)
    assert await watch.lose_once() == 0
    await connection.execute(later, 111.0)
    assert await watch.lose_once() == 1
    assert await state_of(connection, attempt.job_id) is State.NODE_FAIL


async def test_a_cancel_beats_the_requeue(connection: asyncpg.Connection, watch: Watch) -> None:
    await register(connection)
    attempt = await started(connection, requeue=True)
    assert await jobs.request_cancel(connection, attempt)
    await silence(connection, REQUEUE)
    assert await watch.lose_once() == 1
    assert await state_of(connection, attempt.job_id) is State.CANCELLED


async def test_what_has_not_started_is_left_to_the_reaper(
    connection: asyncpg.Connection, watch: Watch, pool: Pool
) -> None:
    await register(connection)
    [job_id] = await submit(connection, a_job(requeue=True))
    await allocate(connection)
    await silence(connection, 10**6)
    assert await watch.lose_once() == 0
    assert await reap_once(pool) == 1
    assert (await job_of(connection, Attempt(job_id, 1))).restart_cnt == 0


async def test_who_begins_to_watch_loses_nothing(connection: asyncpg.Connection, pool: Pool, watch: Watch) -> None:
    await register(connection)
    await started(connection, requeue=True)
    await silence(connection, 10**6)
    beginner = Watch(pool, LEASE)
    for _ in range(3):
        assert await beginner.lose_once() == 0
    assert await watch.lose_once() == 1


async def test_a_postgres_that_came_back_a_moment_ago_loses_nothing(
    connection: asyncpg.Connection, pool: Pool, watch: Watch
) -> None:
    await register(connection)
    await started(connection, requeue=True)
    await silence(connection, 10**9)
    a_while = await connection.fetchval("SELECT extract(epoch FROM now() - pg_postmaster_start_time())::float8 + 3600")
    assert await Patient(pool, a_while).lose_once() == 0
    assert await watch.lose_once() == 1


async def test_many_at_once_are_waited_for(connection: asyncpg.Connection, watch: Watch) -> None:
    for name in ("n1", "n2", "n3"):
        await register(connection, a_node(name))
    await started(connection, "n1", requeue=True)
    for name in ("n1", "n2"):
        await silence(connection, REQUEUE, name)
    assert await watch.lose_once() == 0
    for name in ("n1", "n2"):
        await silence(connection, REQUEUE + LEASE, name)
    assert await watch.lose_once() == 1


async def test_a_look_has_a_limit(
    connection: asyncpg.Connection, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lose, "BATCH", 2)
    await register(connection)
    for _ in range(3):
        await started(connection, requeue=True)
    await silence(connection, REQUEUE)
    assert [await watch.lose_once() for _ in range(3)] == [2, 1, 0]


async def test_no_node_no_loss(watch: Watch) -> None:
    assert await watch.lose_once() == 0


# Races


async def race(
    watcher: asyncpg.Connection,
    first: Any,
    doing: Callable[[], Awaitable[Any]],
    second: Callable[[], Awaitable[Any]],
) -> tuple[Any, Any]:
    """The answers when `second` comes while the first connection is `doing` something and has not committed."""
    async with first.transaction():
        answer = await doing()
        task = asyncio.ensure_future(second())
        await blocked(watcher)
    return answer, await task


async def test_a_heartbeat_that_is_on_its_way_saves_the_node(
    connection: asyncpg.Connection, watch: Watch, two: Any
) -> None:
    """Or a job would run on, which its node had taken up again, and elsewhere."""
    await register(connection)
    attempt = await started(connection, requeue=True)
    await silence(connection, REQUEUE)
    assert await race(connection, two[0], lambda: beat(two[0]), watch.lose_once) == (True, 0)
    assert await state_of(connection, attempt.job_id) is State.RUNNING


async def test_a_heartbeat_waits_for_a_loss_and_finds_its_job_gone(
    connection: asyncpg.Connection, watch: Watch, two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await register(connection)
    attempt = await started(connection, requeue=True)
    await silence(connection, REQUEUE)
    beats: list[asyncio.Future[bool]] = []
    release = allocations.release

    async def slowly(*args: Any, **options: Any) -> set[Attempt]:
        beats.append(asyncio.ensure_future(beat(two[0])))
        await blocked(connection)
        return await release(*args, **options)

    monkeypatch.setattr(allocations, "release", slowly)
    assert await watch.lose_once() == 1
    assert [await beaten for beaten in beats] == [True]
    assert await state_of(connection, attempt.job_id) is State.PENDING


async def test_a_new_worker_of_the_node_saves_it_as_well(
    connection: asyncpg.Connection, watch: Watch, two: Any
) -> None:
    await register(connection)
    attempt = await started(connection, requeue=True)
    await silence(connection, REQUEUE)
    spec = a_node()
    assert await race(connection, two[0], lambda: nodes.register(two[0], spec, 60), watch.lose_once) == (2, 0)
    assert await state_of(connection, attempt.job_id) is State.RUNNING


async def test_an_end_that_is_on_its_way_is_not_waited_for(
    connection: asyncpg.Connection, watch: Watch, two: Any
) -> None:
    await register(connection)
    ending, other = await started(connection, requeue=True), await started(connection, requeue=True)
    await silence(connection, REQUEUE)
    async with two[0].transaction():
        assert await finish(two[0], ending) == {ending}
        async with asyncio.timeout(LONG):
            # All but the release, which waits for the node's row.
            found = await nodes.leases(connection)
            assert found is not None
            [lease] = found.leases
            loss = Loss(lease, requeue=True, limits=found.now)
            async with connection.transaction():
                assert await allocations.lock_overdue(connection, loss, 10) == {other: True}
    assert await watch.lose_once() == 1
    assert await state_of(connection, ending.job_id) is State.COMPLETED


async def test_two_that_watch_lose_each_job_once(connection: asyncpg.Connection, watch: Watch, pool: Pool) -> None:
    await register(connection, a_node("n1", 12))
    for _ in range(12):
        await started(connection, requeue=True)
    await silence(connection, REQUEUE)
    watches = [Patient(pool, LEASE) for _ in range(4)]

    async def all_of_it(one: Watch) -> int:
        return sum([await one.lose_once() for _ in range(3)])

    assert sum(await asyncio.gather(*map(all_of_it, watches))) == 12
    assert await connection.fetchval("SELECT alloc_cpus FROM nodes") == 0


# DOWN


async def declare_down(connection: asyncpg.Connection, node: str = "n1") -> None:
    assert await nodes.set_state(connection, node, "DOWN", reason="burnt", by="operator")


async def test_what_a_killed_api_left_on_a_down_node_ends(connection: asyncpg.Connection, pool: Pool) -> None:
    for name in ("n1", "n2"):
        await register(connection, a_node(name))
    runs, other = await started(connection), await started(connection, "n2")
    [job_id] = await submit(connection)
    waits = await give(connection, job_id)
    await declare_down(connection)
    with capture_logs() as logs:
        assert await reap_once(pool) == 2
    assert {(log["event"], log["job_id"], log["state"]) for log in logs} == {
        ("job_ended_by_down", runs.job_id, "NODE_FAIL"),
        ("job_ended_by_down", waits.job_id, "PENDING"),
    }
    assert await reap_once(pool) == 0
    assert [await state_of(connection, a.job_id) for a in (runs, waits, other)] == ["NODE_FAIL", "PENDING", "RUNNING"]
    assert await connection.fetchval("SELECT sum(alloc_cpus) FROM nodes") == 1


async def test_what_starts_while_its_node_is_declared_down_ends_next(connection: asyncpg.Connection, two: Any) -> None:
    await register(connection)
    [job_id] = await submit(connection)
    attempt = await give(connection, job_id)
    await declare_down(connection)

    async def end() -> list[Any]:
        return await allocations.end_on_down(two[1], 10)

    specs, ended = await race(connection, two[0], lambda: start(two[0], attempt), end)
    assert (len(specs), ended) == (1, [])
    assert [dispatch.job_id for dispatch in await end()] == [job_id]
    assert await state_of(connection, job_id) is State.NODE_FAIL


async def test_a_pass_that_is_under_way_gives_a_down_node_its_last_job(
    connection: asyncpg.Connection, two: Any
) -> None:
    """DOWN waits for it, and finds what it gave."""
    await register(connection)
    [job_id] = await submit(connection)

    async def down() -> int:
        await declare_down(two[1])
        return len(await allocations.end_on_down(two[1], 10))

    async with two[0].transaction():
        assert await allocations.place(two[0], [Placement(job_id, "n1", 1)])
        task = asyncio.ensure_future(down())
        await blocked(connection)
    assert await task == 1
    assert await state_of(connection, job_id) is State.PENDING
    assert await allocate(connection) == []


# Forgetting


async def registered(connection: Any) -> int | None:
    async with connection.transaction():
        return await nodes.register(connection, a_node(), 60)


async def test_a_worker_that_comes_back_first_keeps_its_node(connection: asyncpg.Connection, two: Any) -> None:
    await register(connection)
    await silence(connection, 100)
    spec = a_node()
    answers = await race(
        connection, two[0], lambda: nodes.register(two[0], spec, 60), lambda: nodes.forget(two[1], "n1")
    )
    assert answers == (2, False)


async def test_a_heartbeat_that_comes_first_keeps_the_node(connection: asyncpg.Connection, two: Any) -> None:
    await register(connection)
    await silence(connection, 100)
    assert await race(connection, two[0], lambda: beat(two[0]), lambda: nodes.forget(two[1], "n1")) == (True, False)


async def test_a_pass_that_comes_first_keeps_the_node(connection: asyncpg.Connection, two: Any) -> None:
    await register(connection)
    [job_id] = await submit(connection)
    async with two[0].transaction():
        assert await allocations.place(two[0], [Placement(job_id, "n1", 1)])
        await silence(connection, 100)
        task = asyncio.ensure_future(nodes.forget(two[1], "n1"))
        await blocked(connection)
    assert not await task


async def test_a_pass_that_comes_second_gives_a_forgotten_node_nothing(
    connection: asyncpg.Connection, two: Any
) -> None:
    await register(connection)
    [job_id] = await submit(connection)
    await silence(connection, 100)
    placement = Placement(job_id, "n1", 1)
    answers = await race(
        connection, two[0], lambda: nodes.forget(two[0], "n1"), lambda: allocations.place(two[1], [placement])
    )
    assert answers == (True, [])
    assert await state_of(connection, job_id) is State.PENDING


async def test_the_lease_is_locked_before_its_node(connection: asyncpg.Connection, two: Any) -> None:
    """As in a registration: the other way round the two could wait for each other."""
    await register(connection)
    await declare_down(connection)
    async with two[0].transaction():
        await two[0].execute("SELECT FROM node_leases FOR UPDATE")
        task = asyncio.ensure_future(nodes.forget(two[1], "n1"))
        await blocked(connection)
        await two[0].execute("SELECT FROM nodes FOR UPDATE NOWAIT")
    assert await task


async def test_a_worker_that_comes_back_second_registers_anew(
    settings: Settings, connection: asyncpg.Connection, two: Any, pool: Pool
) -> None:
    """It has seen its node, and the statement that gives it the lease finds none to refer to: all of it again."""
    await register(connection)
    await declare_down(connection)
    async with two[0].transaction():
        await two[0].execute("SELECT FROM node_leases FOR UPDATE")  # both come this far
        forgetting = asyncio.ensure_future(nodes.forget(two[1], "n1"))
        await blocked(connection)
        registering = asyncio.ensure_future(worker_node.register(pool, a_node(), settings))
        await blocked(connection, 2)
    assert await forgetting
    assert (await registering)[0] == 1
    [node] = await nodes.all_nodes(connection)
    assert (node.admin_state, node.alive) == ("RESUME", True)


# The worker


async def test_what_another_machine_may_still_run_is_not_started_again_before_that_has_ended_it(
    settings: Settings, pool: Pool, tmp_path: Path, connection: asyncpg.Connection
) -> None:
    """A worker with another spool has taken the name over, once the lease of the first one was over."""
    await register(connection)
    again, kept = await started(connection, requeue=True), await started(connection)
    await silence(connection, LEASE + 1)
    node = await joined(settings, pool, tmp_path, connection)
    begun: list[Run] = []
    await recover(node, begun.append)
    assert node.recovered
    assert {run.attempt: run.may_run_for for run in begun} == {again: REQUEUE, kept: 0}
    runs = {run.attempt: run for run in begun}
    log = structlog.get_logger()
    assert (await attempt(node, runs[kept], log, UNUSED)).state is State.NODE_FAIL
    waiting = asyncio.ensure_future(attempt(node, runs[again], log, UNUSED))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    waiting.cancel()
    runs[again].may_run_for = 0.0
    assert (await attempt(node, runs[again], log, UNUSED)).state is State.PENDING


@pytest.mark.parametrize("find", [recover, claim.look_once])
async def test_what_was_never_started_and_is_to_be_cancelled_is_not_started(
    node: Node, connection: asyncpg.Connection, find: Callable[[Node, Callable[[Run], None]], Awaitable[Any]]
) -> None:
    """Only its start was committed, or the answer to that never came."""
    kept, cancelled = await started(connection), await started(connection)
    assert await jobs.request_cancel(connection, cancelled)
    begun: dict[Run, bool] = {}
    await find(node, lambda run: begun.update({run: run.cancelled}))
    assert {run.attempt: known for run, known in begun.items()} == {kept: False, cancelled: True}
    [run] = [run for run, known in begun.items() if known]
    ending = await attempt(node, run, structlog.get_logger(), UNUSED)
    assert (ending.state, run.script) == (State.CANCELLED, None)
    assert await write_endings(node, [ending], nothing) == [True]


async def test_in_silence_a_worker_ends_what_may_be_requeued(node: Node, connection: asyncpg.Connection) -> None:
    granted, kept = await a_run(node, connection, requeue=True), await a_run(node, connection)
    over = await a_run(node, connection, requeue=True)
    over.over = True
    node.heard = proc.now() - 59
    await health.end_after_silence_once(node)
    assert not granted.stopped
    node.heard = proc.now() - 60
    with capture_logs() as logs:
        await health.end_after_silence_once(node)
        await health.end_after_silence_once(node)
    assert [run.stopped for run in (granted, kept, over)] == [True, False, False]
    assert [(log["event"], log["job_id"]) for log in logs] == [("job_ended_in_silence", granted.spec.job_id)]
    assert not granted.fenced


async def test_silence_counts_from_before_the_heartbeat_was_sent(
    node: Node, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the worker's count is ahead of the database's, which begins when the heartbeat arrives."""
    arrived: list[float] = []
    heartbeat = nodes.heartbeat

    async def slowly(*args: Any, **options: Any) -> bool:
        arrived.append(proc.now())
        return await heartbeat(*args, **options)

    monkeypatch.setattr(nodes, "heartbeat", slowly)
    await heartbeat_once(node)
    assert node.heard <= arrived[0]
    assert arrived[0] - node.heard < LONG


async def test_a_heartbeat_without_an_answer_is_none(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lost(*_: Any, **__: Any) -> bool:
        raise ConnectionError("cut")

    before = node.heard = proc.now() - 30
    monkeypatch.setattr(nodes, "heartbeat", lost)
    with pytest.raises(ConnectionError):
        await heartbeat_once(node)
    assert node.heard == before


async def test_the_keepers_turn_comes_after_the_workers_and_before_the_schedulers(node: Node) -> None:
    until = (node.spool.folder / "silence").stat().st_mtime
    own = node.heard + node.settings.requeue_after + node.settings.kill_grace_seconds
    assert own < until < own + MARGIN.total_seconds()
    node.spool.grant(7)
    assert node.spool.silent_tags() == set()
    node.hear(proc.now() - 1000)
    assert node.spool.silent_tags() == {7}
    assert node.spool.open()  # a worker that starts does not take back what the last one said
    assert node.spool.silent_tags() == {7}
    node.hear(proc.now())
    assert node.spool.silent_tags() == set()


async def test_a_worker_that_was_frozen_ends_it_before_postgres_answers(
    node: Node, connection: asyncpg.Connection
) -> None:
    """The answer makes it forget for how long it was silent."""
    granted = await a_run(node, connection, requeue=True)
    node.heard = proc.now() - 61
    await serve._beat_once(node)
    assert granted.stopped
    assert proc.now() - node.heard < 60


class Killed:
    """Stands where a script does that was killed, and keeps the signals that it would get."""

    pid = 7

    def __init__(self) -> None:
        self.got: list[int] = []

    async def wait(self) -> Exit:
        return Exit(None, "KILL")

    def signal(self, number: int) -> None:
        self.got.append(number)

    def members(self) -> list[int]:
        return []

    def kill_leftovers(self) -> bool:
        return False


@pytest.mark.parametrize("requeue", [True, False])
async def test_what_the_keeper_ended_while_the_worker_was_frozen_goes_back(
    node: Node, connection: asyncpg.Connection, requeue: bool
) -> None:
    """Should it thaw before the scheduler has seen to that."""
    run = await a_run(node, connection, requeue=requeue)
    run.script = Killed()  # type: ignore[assignment]
    node.spool.grant(node.tag(run.spec))
    assert (await attempt(node, run, structlog.get_logger(), UNUSED)).state is State.FAILED
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # as on a full disk
    try:
        node.spool.note_silence(node.tag(run.spec))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    ending = await attempt(node, run, structlog.get_logger(), UNUSED)
    assert ending.state is (State.PENDING if requeue else State.FAILED)
    assert await write_endings(node, [ending], nothing) == [True]
    job = await job_of(connection, run.attempt)
    assert (job.restart_cnt, job.exit_code) == (int(requeue), None)


async def a_restart(node: Node, connection: asyncpg.Connection) -> Run:
    """A run of a job whose script has run before."""
    first = await a_run(node, connection, requeue=True)
    assert await finish(connection, first.attempt, state=State.PENDING)
    node.end(first)
    again = await give(connection, first.spec.job_id)
    [spec] = await jobs.start(connection, [again], node=node.name, incarnation=node.incarnation)
    run = node.runs[again] = Run(spec)
    return run


@asynccontextmanager
async def measuring(work: Callable[[Sequence[Output]], Awaitable[Sequence[bool]]]) -> AsyncIterator[Batcher[Any, bool]]:
    """A worker's batches of where restarts begin."""
    measure: Batcher[Output, bool] = Batcher(work, 10)
    task = asyncio.create_task(measure.run())
    try:
        yield measure
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(("end", "state"), [(Run.stop, State.PENDING), (Run.cancel, State.CANCELLED)])
async def test_a_restart_that_waits_for_postgres_can_be_ended_and_was_never_started(
    node: Node, connection: asyncpg.Connection, end: Callable[[Run], None], state: State
) -> None:
    run, asked = await a_restart(node, connection), asyncio.Event()

    async def waits(_: Sequence[Output]) -> Sequence[bool]:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with measuring(waits) as measure, asyncio.timeout(LONG):
        waiting = asyncio.create_task(attempt(node, run, structlog.get_logger(), measure))
        await asked.wait()
        end(run)
        ending = await waiting
    assert (ending.state, ending.ran, run.script) == (state, False, None)
    assert not node.settings.work_base_dir.exists()
    assert await write_endings(node, [ending], nothing) == [True]
    assert (await job_of(connection, run.attempt)).restart_cnt == 1  # it did not run once more


async def test_a_restart_that_is_not_current_any_more_is_not_started(
    node: Node, connection: asyncpg.Connection
) -> None:
    stale, good = await a_restart(node, connection), await a_restart(node, connection)
    assert await finish(connection, stale.attempt, state=State.NODE_FAIL)
    async with measuring(partial(write_outputs, node)) as measure:
        await attempt(node, stale, structlog.get_logger(), measure)
    assert (stale.fenced, stale.script) == (True, None)
    assert not node.settings.work_base_dir.exists()
    of = [stale.attempt, Attempt(good.spec.job_id, 1), good.attempt]
    said = [Output(a.job_id, a.attempt, 1, 0, 0) for a in of]
    assert await write_outputs(node, said) == [False, False, True]
    node.incarnation += 1
    assert await write_outputs(node, said) == [False] * 3


async def test_where_a_restart_begins_is_what_was_said_first(node: Node, connection: asyncpg.Connection) -> None:
    """Who says it again may find an empty file that a worker made which died before the script started."""
    run = await a_restart(node, connection)
    for begin in (None, 0):
        said = Output(run.spec.job_id, run.spec.attempt, 1, begin, begin)
        assert await write_outputs(node, [said]) == [True]
    begun = (await outputs.starts(connection, run.spec.job_id))[-1]
    assert (begun.attempt, begun.stdout_begin, begun.stderr_begin) == (2, None, None)


async def test_a_look_fences_what_was_started_elsewhere(
    node: Node, connection: asyncpg.Connection, watch: Watch
) -> None:
    """It ends at once: its grace period is over for long."""
    lost = await a_run(node, connection, requeue=True)
    kept = await a_run(node, connection)
    lost.script, kept.script = Killed(), Killed()  # type: ignore[assignment]
    await silence(connection, REQUEUE)
    assert await watch.lose_once() == 1
    await register(connection, a_node("n2"))
    await connection.execute("UPDATE nodes SET admin_state = 'DRAIN' WHERE name = 'n1'")
    assert await allocate(connection) == [Attempt(lost.spec.job_id, 2)]
    with capture_logs() as logs:
        await claim.look_once(node, nothing)
    assert [(log["event"], log["job_id"], log["attempt"]) for log in logs] == [("job_fenced", lost.spec.job_id, 1)]
    assert (lost.fenced, lost.stopped) == (True, True)
    assert (kept.fenced, kept.stopped) == (False, False)
    assert (lost.script.got, kept.script.got) == ([signal.SIGKILL], [])  # type: ignore[union-attr]


async def test_a_late_end_is_refused(node: Node, connection: asyncpg.Connection, watch: Watch) -> None:
    lost = await a_run(node, connection, requeue=True)
    await silence(connection, REQUEUE)
    assert await watch.lose_once() == 1
    for state in (State.COMPLETED, State.PENDING):
        assert await write_endings(node, [an_ending(lost.attempt, state)], nothing) == [False]
    job = await job_of(connection, lost.attempt)
    assert (job.state, job.restart_cnt) == (State.PENDING, 1)


async def test_refused_writes_are_shown(node: Node, connection: asyncpg.Connection) -> None:
    node.stale_writes_refused = 3
    await heartbeat_once(node)
    [shown] = await nodes.all_nodes(connection)
    assert shown.stale_writes_refused == 3
    await register(connection, a_node(spool_id=node.host.spool_id))
    [shown] = await nodes.all_nodes(connection)
    assert shown.stale_writes_refused == 0


async def test_a_worker_whose_node_was_deleted_stops_and_ends_what_it_runs(
    node: Node, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "STOP_SECONDS", -1)
    run = await a_run(node, connection)
    await finish(connection, run.attempt)
    await declare_down(connection)
    assert await nodes.forget(connection, "n1")
    with pytest.raises(Superseded, match=r"^node n1 was deleted: this worker stops; start it again to register"):
        await serve._beat_once(node)
    assert run.fenced


async def test_a_worker_that_stops_leaves_redis_to_who_still_uses_it(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A duty whose connection is taken away in the middle of a command fails in a way that nobody expects."""
    stop, drained, using, closed_in_use = asyncio.Event(), asyncio.Event(), True, []
    aclose = Redis.aclose

    async def consumes(*_: Any) -> int:
        nonlocal using
        stop.set()
        try:
            await asyncio.Event().wait()
        finally:
            await drained.wait()
            using = False
        return 0

    async def drains(_: Node, heartbeat: "asyncio.Task[None]") -> None:
        heartbeat.cancel()
        drained.set()

    async def closes(client: Redis) -> None:
        closed_in_use.append(using)
        await aclose(client)

    monkeypatch.setattr(claim, "consume_once", consumes)
    monkeypatch.setattr(serve, "_drain", drains)
    monkeypatch.setattr(Redis, "aclose", closes)
    async with asyncio.timeout(LONG):
        await serve._work(node, stop)
    assert closed_in_use == [False]

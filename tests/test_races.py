"""Many at once on the real statements: no CPU is given twice or kept, no attempt starts twice or after its cancel."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random
from typing import Any

import asyncpg
import pytest

from core.db import allocations, jobs, nodes
from core.db.audit import audit
from core.db.connection import Pool, open_pool
from core.records import Attempt, Dispatch, Ending, Placement
from core.settings import Settings
from core.states import FINAL, Reason, State
from services.scheduler.allocate import allocate_once
from services.scheduler.reap import reap_once
from tests.builders import (
    LONG,
    a_job,
    a_node,
    allocate,
    an_ending,
    blocked,
    finish,
    give,
    race,
    register,
    report,
    start,
    state_of,
    submit,
    turn_over,
)

pytestmark = pytest.mark.anyio

JOBS = 300
NODES = {"n1": 8, "n2": 4, "n3": 3}


class Storm:
    """Everybody at once, each on connections of its own, and what they saw."""

    def __init__(self, pools: list[Pool]) -> None:
        self.pools = pools
        self.submitted: list[int] = []
        self.all_submitted = False
        self.started: Counter[Attempt] = Counter()
        self.ended: Counter[Attempt] = Counter()
        self.never: set[Attempt] = set()  # cancelled before they started
        self.taken = 0  # of what started, by what ended there
        self.looks = 0
        self.most = 0  # CPUs in use at one look

    async def submitter(self, pool: Pool, random: Random, count: int) -> None:
        while count:
            size = min(count, random.randint(1, 20))
            count -= size
            async with pool.acquire() as connection:
                self.submitted += await submit(
                    connection, *(a_job(random.randint(1, 4), requeue=True) for _ in range(size))
                )
            await asyncio.sleep(0)

    async def allocator(self, pool: Pool) -> None:
        while not await self.over(pool):
            await allocate_once(pool)
            await reap_once(pool)

    async def finisher(self, pool: Pool, random: Random) -> None:
        """A worker of all nodes; the others do the very same, so every start and every end is tried many times."""
        while not await self.over(pool):
            for node in NODES:
                async with pool.acquire() as connection:
                    held = await allocations.of_node(connection, node)
                    random.shuffle(held)
                    waiting = [Attempt(h.job_id, h.attempt) for h in held if h.state is State.CONFIGURING]
                    running = [Attempt(h.job_id, h.attempt) for h in held if h.state is State.RUNNING]
                    specs = await start(connection, *waiting, node=node)
                    self.started.update(Attempt(spec.job_id, spec.attempt) for spec in specs)
                    states = [State.COMPLETED, State.FAILED, State.CANCELLED, State.PENDING]
                    endings = [an_ending(attempt, random.choices(states, [6, 1, 1, 1])[0]) for attempt in running]
                    final = [ending for ending in endings if ending.state in FINAL]
                    turned = await report(connection, final, node=node)
                    self.started.update(Attempt(spec.job_id, spec.attempt) for spec in turned.begun)
                    self.taken += len(turned.begun)
                    back = [ending for ending in endings if ending.state not in FINAL]
                    ended = await allocations.release(connection, back, node=node, before=State.RUNNING, incarnation=1)
                    self.ended.update(turned.ended | ended)

    async def canceller(self, pool: Pool, random: Random) -> None:
        while not await self.over(pool):
            if not self.submitted:
                await asyncio.sleep(0)
                continue
            job_id = random.choice(self.submitted)
            async with pool.acquire() as connection:
                job = await jobs.get(connection, job_id)
                assert job is not None
                attempt = Attempt(job_id, job.attempt)
                if job.state is State.PENDING and random.random() < 0.2:
                    if await jobs.cancel_waiting(connection, job_id):
                        self.never.add(Attempt(job_id, job.attempt + 1))
                elif job.state is State.CONFIGURING:
                    back = random.choice([State.CANCELLED, State.PENDING])
                    ending = Ending(job_id, job.attempt, back, Reason.NONE)
                    if await allocations.release(connection, [ending], node=job.node or "", before=State.CONFIGURING):
                        self.never.add(attempt)
                        self.ended[attempt] += 1
                elif job.state is State.RUNNING:
                    await jobs.request_cancel(connection, attempt)

    async def watcher(self, pool: Pool) -> None:
        """Every invariant, and capacity of its own reckoning, at one instant after the other."""
        while not await self.over(pool):
            async with pool.acquire() as connection:
                assert await audit(connection) == []
                rows = await connection.fetch(
                    "SELECT n.name, n.cpus, n.alloc_cpus, coalesce(sum(a.cpus), 0)::int AS held FROM nodes n"
                    " LEFT JOIN allocations a ON a.node = n.name GROUP BY n.name, n.cpus, n.alloc_cpus"
                )
            assert all(row["held"] == row["alloc_cpus"] <= row["cpus"] == NODES[row["name"]] for row in rows)
            self.most = max(self.most, sum(row["held"] for row in rows))
            self.looks += 1

    async def over(self, pool: Pool) -> bool:
        """Whether all is submitted and nothing waits or runs."""
        if not self.all_submitted:
            return False
        left = "SELECT EXISTS (SELECT FROM pending) OR EXISTS (SELECT FROM allocations)"
        async with pool.acquire() as connection:
            return not await connection.fetchval(left)


async def insist(duty: Callable[..., Awaitable[None]], conflicts: Counter[str], *arguments: Any) -> None:
    """Do a duty to its end as a role does: what says "busy" is tried again. A deadlock is never to be seen."""
    while True:
        try:
            return await duty(*arguments)
        except asyncpg.LockNotAvailableError as error:  # two seconds on a machine that has much to do
            conflicts[type(error).__name__] += 1


@pytest.fixture
async def pools(settings: Settings) -> AsyncIterator[list[Pool]]:
    found = [await open_pool(settings, "test", 6) for _ in range(3)]
    yield found
    for pool in found:
        pool.terminate()


async def test_everybody_at_once(pools: list[Pool], connection: asyncpg.Connection) -> None:
    for name, cpus in NODES.items():
        await register(connection, a_node(name, cpus))
    storm, conflicts = Storm(pools), Counter[str]()
    seeds = iter(range(100))

    def some(
        count: int, duty: Callable[..., Awaitable[None]], *more: Any, chance: bool = True
    ) -> list[Awaitable[None]]:
        return [
            insist(duty, conflicts, pools[i % len(pools)], *([Random(next(seeds))] if chance else []), *more)
            for i in range(count)
        ]

    async def submissions() -> None:
        await asyncio.gather(*some(2, storm.submitter, JOBS // 2))
        storm.all_submitted = True

    async with asyncio.timeout(LONG), asyncio.TaskGroup() as group:
        for duty in [
            submissions(),
            *some(4, storm.allocator, chance=False),
            *some(3, storm.finisher),
            *some(2, storm.canceller),
            *some(1, storm.watcher, chance=False),
        ]:
            group.create_task(duty)  # type: ignore[arg-type]

    states = await connection.fetch("SELECT state, count(*) FROM jobs GROUP BY state")
    assert {State(row[0]) for row in states} <= FINAL
    assert sum(row[1] for row in states) == JOBS
    assert await connection.fetchval("SELECT sum(alloc_cpus) FROM nodes") == 0
    assert set(storm.started.values()) == {1}
    assert set(storm.ended.values()) == {1}
    assert not set(storm.started) & storm.never
    assert set(storm.started) | storm.never >= set(storm.ended) >= set(storm.started)
    assert await connection.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == 0
    # The storm was one.
    assert storm.looks > 3
    assert storm.most > 0
    assert len(storm.started) > JOBS / 4
    assert storm.taken > JOBS / 10
    assert storm.never


# One race at a time: who is second waits for who is first, and then finds the truth


async def test_a_second_finisher_finds_nothing(connection: asyncpg.Connection, two: Any) -> None:
    await register(connection)
    await submit(connection, a_job(3))
    [attempt] = await allocate(connection)
    await start(connection, attempt)
    answers = await race(
        connection, two, lambda c: finish(c, attempt), lambda c: finish(c, attempt, state=State.FAILED)
    )
    assert answers == ({attempt}, set())
    assert await state_of(connection, attempt.job_id) is State.COMPLETED
    assert await connection.fetchval("SELECT alloc_cpus FROM nodes") == 0


async def test_of_many_finishers_one_releases(connection: asyncpg.Connection, pool: Pool) -> None:
    await register(connection)
    await submit(connection, a_job(3), a_job(1))
    placed = await allocate(connection)
    await start(connection, *placed)

    async def finish_on_its_own(attempt: Attempt) -> int:
        async with pool.acquire() as racer:
            return len(await finish(racer, attempt))

    assert sum(await asyncio.gather(*(finish_on_its_own(placed[0]) for _ in range(24)))) == 1
    assert await connection.fetchval("SELECT alloc_cpus FROM nodes") == 1
    await finish(connection, placed[1])


LOCK = "SELECT FROM jobs WHERE job_id = $1 FOR NO KEY UPDATE NOWAIT"


async def ended_by(connection: asyncpg.Connection, *attempts: Attempt) -> set[Attempt]:
    return (await turn_over(connection, *attempts)).ended


@pytest.mark.parametrize("moved", [start, finish, ended_by])
async def test_a_batch_locks_its_jobs_in_the_order_of_their_numbers(
    connection: asyncpg.Connection, two: Any, moved: Any
) -> None:
    """Whatever the order of the batch, or two that overlap could wait for each other."""
    await register(connection)
    await submit(connection, *[a_job()] * 3)
    placed = await allocate(connection)
    if moved is not start:
        await start(connection, *placed)
    async with two[0].transaction():
        await two[0].execute(LOCK, placed[1].job_id)
        task = asyncio.ensure_future(moved(two[1], *placed[::-1]))
        await blocked(connection)
        with pytest.raises(asyncpg.LockNotAvailableError):
            await connection.execute(LOCK, placed[0].job_id)
        await connection.execute(LOCK, placed[2].job_id)
    assert len(await task) == 3


async def test_a_job_cancelled_while_configuring_never_starts(connection: asyncpg.Connection, two: Any) -> None:
    await register(connection)
    await submit(connection)
    [attempt] = await allocate(connection)
    ending = Ending(attempt.job_id, attempt.attempt, State.CANCELLED, Reason.NONE)
    cancelled, started = await race(
        connection,
        two,
        lambda c: allocations.release(c, [ending], node="n1", before=State.CONFIGURING),
        lambda c: start(c, attempt),
    )
    assert (cancelled, started) == ({attempt}, [])
    assert await start(connection, attempt) == []


async def test_a_cancel_that_comes_second_asks_the_worker(connection: asyncpg.Connection, two: Any) -> None:
    await register(connection)
    await submit(connection)
    [attempt] = await allocate(connection)
    ending = Ending(attempt.job_id, attempt.attempt, State.CANCELLED, Reason.NONE)
    started, cancelled = await race(
        connection,
        two,
        lambda c: start(c, attempt),
        lambda c: allocations.release(c, [ending], node="n1", before=State.CONFIGURING),
    )
    assert (len(started), cancelled) == (1, set())
    assert await jobs.request_cancel(connection, attempt)
    await finish(connection, attempt, state=State.CANCELLED)
    assert not await jobs.request_cancel(connection, attempt)


async def test_a_cancel_in_flight_does_not_hold_up_a_pass(connection: asyncpg.Connection, pool: Pool, two: Any) -> None:
    await register(connection)
    first, second = await submit(connection, a_job(), a_job())
    async with two[0].transaction():
        assert await jobs.cancel_waiting(two[0], first)
        async with asyncio.timeout(LONG):
            assert len(await allocate_once(pool)) == 1
        assert await state_of(connection, second) is State.CONFIGURING
    assert await state_of(connection, first) is State.CANCELLED
    assert len(await allocate_once(pool)) == 0


async def test_a_cancel_that_finds_its_job_placed_is_told_so(connection: asyncpg.Connection, two: Any) -> None:
    await register(connection)
    [job_id] = await submit(connection)
    _, cancelled = await race(connection, two, lambda c: give(c, job_id), lambda c: jobs.cancel_waiting(c, job_id))
    assert not cancelled
    assert await state_of(connection, job_id) is State.CONFIGURING


async def test_a_pass_waits_for_a_release_and_reckons_with_what_that_left(
    connection: asyncpg.Connection, pool: Pool, two: Any
) -> None:
    """The node came back smaller: what the release returns is not free."""
    await register(connection, a_node("n1", 4))
    await submit(connection, a_job(3))
    [held] = await allocate(connection)
    await start(connection, held)
    await submit(connection, a_job(1))
    async with two[0].transaction():
        await two[0].execute("UPDATE nodes SET declared_cpus = 1, cpus = 3")
        task = asyncio.create_task(allocate_once(pool))
        await blocked(connection)
    assert await task == []
    await finish(connection, held)
    assert len(await allocate_once(pool)) == 1
    assert await connection.fetchval("SELECT alloc_cpus FROM nodes") == 1


async def test_a_pass_gives_nothing_to_a_node_that_was_drained_meanwhile(
    connection: asyncpg.Connection, pool: Pool, two: Any
) -> None:
    await register(connection)
    [job_id] = await submit(connection)
    async with two[0].transaction():
        await two[0].execute("UPDATE nodes SET admin_state = 'DRAIN'")
        task = asyncio.create_task(allocate_once(pool))
        await blocked(connection)
    assert await task == []
    assert await state_of(connection, job_id) is State.PENDING


async def test_a_release_that_waits_for_a_pass_reckons_with_what_that_took(
    connection: asyncpg.Connection, two: Any
) -> None:
    await register(connection, a_node("n1", 8))
    await submit(connection, a_job(5))
    [held] = await allocate(connection)
    await start(connection, held)
    [job_id] = await submit(connection, a_job(2))
    _, ended = await race(connection, two, lambda c: give(c, job_id), lambda c: finish(c, held))
    assert ended == {held}
    assert await connection.fetchval("SELECT alloc_cpus FROM nodes") == 2


async def test_passes_wait_for_each_other(connection: asyncpg.Connection, pool: Pool, two: Any) -> None:
    """The second pass, which decided by what was there before, is held against what the first one left."""
    await register(connection, a_node("n1", 8))
    await register(connection, a_node("n2", 8))
    first, second, third = await submit(connection, a_job(5), a_job(5), a_job(5))
    async with two[0].transaction():
        await allocations.place(two[0], [Placement(third, "n1", 5)])
        task = asyncio.create_task(allocate_once(pool))  # decides for the first on n1, and the second on n2
        await blocked(connection)
    assert await task == [Dispatch(second, 1, "n2")]
    assert await state_of(connection, first) is State.PENDING
    assert await connection.fetch("SELECT alloc_cpus FROM nodes") == [(5,), (5,)]


# Fences


@pytest.mark.parametrize(
    ("attempt", "node", "incarnation"), [(1, "n1", 1), (3, "n1", 1), (2, "n2", 1), (2, "n1", 2), (2, "n1", 0)]
)
async def test_a_stale_attempt_another_node_or_incarnation_does_nothing(
    connection: asyncpg.Connection, attempt: int, node: str, incarnation: int
) -> None:
    """The job is at its second attempt, on n1, whose worker is at its first incarnation."""
    await register(connection)
    await register(connection, a_node("n2"))
    [job_id] = await submit(connection)
    first = await give(connection, job_id)
    await allocations.release(
        connection, [Ending(job_id, 1, State.PENDING, Reason.NONE)], node="n1", before=State.CONFIGURING
    )
    current = await give(connection, job_id)
    assert (first.attempt, current.attempt) == (1, 2)
    wrong = Attempt(job_id, attempt)

    assert await start(connection, wrong, node=node, incarnation=incarnation) == []
    assert await state_of(connection, job_id) is State.CONFIGURING
    assert len(await start(connection, current)) == 1
    assert await finish(connection, wrong, node=node, incarnation=incarnation) == set()
    assert not await jobs.request_cancel(connection, Attempt(job_id, 1))
    assert await state_of(connection, job_id) is State.RUNNING
    assert await finish(connection, current) == {current}


async def test_one_stale_member_does_not_fail_its_batch(connection: asyncpg.Connection) -> None:
    await register(connection)
    await submit(connection, a_job(), a_job())
    good, late = await allocate(connection)
    stale, unknown = Attempt(late.job_id, 7), Attempt(10**12, 1)
    assert [spec.job_id for spec in await start(connection, stale, good, unknown)] == [good.job_id]
    assert await finish(connection, stale, good, unknown) == {good}


async def test_a_draining_node_starts_nothing(connection: asyncpg.Connection) -> None:
    await register(connection)
    await submit(connection)
    [attempt] = await allocate(connection)
    assert await nodes.heartbeat(connection, "n1", 1, lease_seconds=60, draining=True, cpu_load=0)
    assert await start(connection, attempt) == []
    await submit(connection)
    assert await allocate(connection) == []
    assert await nodes.heartbeat(connection, "n1", 1, lease_seconds=60, draining=False, cpu_load=0)
    assert len(await start(connection, attempt)) == 1


async def test_an_older_worker_starts_nothing_once_a_newer_one_has_registered(
    connection: asyncpg.Connection, two: Any
) -> None:
    """Also when its statement had begun before: the newer one has looked at what runs, and would not know of it."""
    await register(connection)
    await submit(connection)
    [attempt] = await allocate(connection)
    async with two[0].transaction():
        await two[0].execute("SELECT FROM jobs FOR NO KEY UPDATE")  # anything that makes the start wait
        task = asyncio.ensure_future(start(two[1], attempt, incarnation=1))
        await blocked(connection)
        assert await register(connection) == 2
    assert await task == []
    assert len(await start(connection, attempt, incarnation=2)) == 1


async def test_a_newer_worker_registers_after_what_the_older_one_has_started(
    connection: asyncpg.Connection, two: Any
) -> None:
    await register(connection)
    await submit(connection)
    [attempt] = await allocate(connection)
    started, incarnation = await race(connection, two, lambda c: start(c, attempt), lambda c: register(c))
    assert (len(started), incarnation) == (1, 2)
    [held] = await allocations.of_node(connection, "n1")
    assert held.state is State.RUNNING


async def test_a_heartbeat_of_an_older_incarnation_is_refused(connection: asyncpg.Connection) -> None:
    await register(connection)
    await register(connection)
    beats = [
        await nodes.heartbeat(connection, "n1", i, lease_seconds=60, draining=False, cpu_load=0) for i in (1, 2, 3)
    ]
    assert beats == [False, True, False]


# Registration


async def registered(connection: asyncpg.Connection, **changes: Any) -> int | None:
    async with connection.transaction():
        return await nodes.register(connection, a_node(**changes), 3600)


async def test_another_spool_is_refused_while_the_lease_lives_and_changes_nothing(
    connection: asyncpg.Connection,
) -> None:
    assert await registered(connection, cpus=4) == 1
    before = await connection.fetch("SELECT * FROM nodes, node_leases")
    assert await registered(connection, cpus=64, spool_id="elsewhere", partitions=("big",), hostname="there") is None
    assert await connection.fetch("SELECT * FROM nodes, node_leases") == before
    await nodes.give_up_lease(connection, "n1", 1)
    assert await registered(connection, cpus=64, spool_id="elsewhere") == 2
    assert await connection.fetchval("SELECT cpus FROM nodes") == 64


async def test_two_first_registrations_of_one_name(connection: asyncpg.Connection, two: Any) -> None:
    """The one that waits for the other's new node is refused, and leaves that one's word alone."""

    def register_as(spool: str, cpus: int) -> Callable[[Any], Awaitable[int | None]]:
        return lambda c: registered(c, spool_id=spool, cpus=cpus)

    assert await race(connection, two, register_as("one", 4), register_as("other", 64)) == (1, None)
    assert await connection.fetchval("SELECT cpus FROM nodes") == 4


async def test_a_worker_that_comes_back_smaller_shrinks_with_each_release(connection: asyncpg.Connection) -> None:
    await register(connection, a_node(cpus=8))
    await submit(connection, a_job(3), a_job(3), a_job(1))
    placed = await allocate(connection)
    assert await registered(connection, cpus=2) == 2
    seen = [await connection.fetchval("SELECT cpus FROM nodes")]
    await start(connection, *placed, incarnation=2)
    for attempt in placed:
        await finish(connection, attempt, incarnation=2)
        seen.append(await connection.fetchval("SELECT cpus FROM nodes"))
        await submit(connection, a_job(2))
        if seen[-1] > 2:
            assert await allocate(connection) == []
    assert seen == [7, 4, 2, 2]

"""A report that gives its CPUs to what waits next: what it takes, when it takes nothing, and who else is at it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import asyncpg
import pytest

from core.db import allocations, jobs, nodes, pending
from core.db.allocations import TurnOver
from core.db.audit import audit
from core.db.connection import PLANNED_ONCE, Pool, connect, open_pool
from core.policy import plan
from core.records import Attempt, Capacity, Ending, Job, NewJob, Waiting
from core.settings import Settings
from core.states import FINAL, Reason, State
from services.scheduler.allocate import BATCH, allocate_once
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
    start,
    state_of,
    submit,
    turn_over,
)

pytestmark = pytest.mark.anyio

MOST = 64
NOTHING = TurnOver(set(), [], None)
NOT_TAKEN = replace(NOTHING, left_some=True)


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[Pool]:
    """Connections as the worker's are: what holds by the plan alone must hold by theirs."""
    found = await open_pool(settings, "test", 8, **PLANNED_ONCE)
    yield found
    found.terminate()


@pytest.fixture
async def connection(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    found = await connect(settings, "test", **PLANNED_ONCE)
    yield found
    await found.close()


async def running(
    connection: asyncpg.Connection, *wanted: NewJob, node: str = "n1", incarnation: int = 1
) -> list[Attempt]:
    """Jobs that run on a node, whatever else waits."""
    ids = await submit(connection, *wanted)
    sizes = [job.cpus for job in wanted] or [1]
    placed = [await give(connection, job_id, node, cpus) for job_id, cpus in zip(ids, sizes, strict=True)]
    assert len(await start(connection, *placed, node=node, incarnation=incarnation)) == len(placed)
    return placed


def begun(turned: TurnOver) -> list[int]:
    return sorted(spec.job_id for spec in turned.begun)


async def job_of(connection: asyncpg.Connection, job_id: int) -> Job:
    job = await jobs.get(connection, job_id)
    assert job is not None
    return job


async def allocated(connection: asyncpg.Connection, node: str = "n1") -> int:
    found: int = await connection.fetchval("SELECT alloc_cpus FROM nodes WHERE name = $1", node)
    return found


# What is taken


def next_on(node: Capacity, waiting: Sequence[Waiting]) -> list[int]:
    """What the policy places on it, until the first that fits no more beside what was placed before."""
    placed = {placement.job_id for placement in plan(waiting, [node])}
    found = []
    for job in waiting:
        if job.partition in node.partitions and job.cpus <= node.free_cpus:
            if job.job_id not in placed:
                break
            found.append(job.job_id)
    return found[:MOST]


@pytest.mark.parametrize("seed", range(12))
async def test_what_is_taken_is_what_the_policy_places_next(connection: asyncpg.Connection, seed: int) -> None:
    random = Random(seed)
    partitions = ["batch", "big", "debug"]
    mine = random.sample(partitions, random.randint(1, 3))
    kept, ended = random.randint(1, 3), [random.randint(1, 5) for _ in range(random.randint(1, 5))]
    cpus = kept + sum(ended) + random.randint(0, 4)
    await register(connection, a_node("n1", cpus, partitions=tuple(mine)))
    await register(connection, a_node("n2", 64, partitions=tuple(partitions)))
    await running(connection, *[a_job(partition=mine[0])] * kept)
    over = await running(connection, *(a_job(size, partition=mine[0]) for size in ended))
    wanted = [a_job(random.randint(1, 12), partition=random.choice(partitions)) for _ in range(150)]
    ids = await submit(connection, *wanted)
    waiting = [Waiting(i, job.partition, job.cpus) for i, job in zip(ids, wanted, strict=True)]
    for several in (len(over) // 2, len(over)):  # what is left of the first ends is there for the second
        now, over = over[:several], over[several:]
        if not now:
            continue
        free = cpus - await allocated(connection) + sum([(await job_of(connection, a.job_id)).cpus for a in now])
        expected = next_on(Capacity("n1", frozenset(mine), free), waiting)
        turned = await turn_over(connection, *now)
        assert turned.ended == set(now)
        assert begun(turned) == expected
        assert turned.free_cpus == free - sum(spec.cpus for spec in turned.begun)
        waiting = [job for job in waiting if job.job_id not in expected]
        assert await allocated(connection) == cpus - free + sum(spec.cpus for spec in turned.begun)
        assert await audit(connection) == []
    found, _ = await pending.look(connection, BATCH)
    assert {job.job_id for job in found} <= {job.job_id for job in waiting}


async def test_it_takes_64_at_most(connection: asyncpg.Connection) -> None:
    await register(connection, a_node("n1", 100))
    over = await running(connection, a_job(100))
    ids = await submit(connection, *[a_job()] * 120)
    turned = await turn_over(connection, *over)
    assert (begun(turned), turned.free_cpus) == (ids[:MOST], 36)
    assert await audit(connection) == []


@pytest.mark.parametrize(
    ("room", "sizes", "taken", "free"),
    [
        (4, [4], [0], 0),
        (4, [5, 2, 6, 1], [1, 3], 1),  # what is larger than the whole room is passed by
        (4, [3, 2, 1], [0], 1),  # nothing behind the first that fits no more
        (3, [2, 2, 1], [0], 1),  # also when that is of a shape that was taken
        (4, [2, 2, 1], [0, 1], 0),
        (4, [1, 1, 1, 1, 1], [0, 1, 2, 3], 0),
        (1, [2, 3], [], 1),
    ],
)
async def test_the_oldest_that_fit_are_taken(
    connection: asyncpg.Connection, room: int, sizes: list[int], taken: list[int], free: int
) -> None:
    await register(connection, a_node("n1", room))
    await register(connection, a_node("large", 8, partitions=("default",)))
    over = await running(connection, a_job(room))
    ids = await submit(connection, *map(a_job, sizes))
    turned = await turn_over(connection, *over)
    assert (begun(turned), turned.free_cpus) == ([ids[i] for i in taken], free)
    assert await allocated(connection) == room - free


async def test_what_was_free_already_is_given_as_well(connection: asyncpg.Connection) -> None:
    await register(connection, a_node("n1", 4))
    one, _ = await running(connection, a_job(1), a_job(1))
    ids = await submit(connection, *[a_job()] * 4)
    turned = await turn_over(connection, one)
    assert (begun(turned), turned.free_cpus) == (ids[:3], 0)


# What is there afterwards

_ROW = "SELECT * FROM jobs WHERE job_id = $1"
_EVENTS = """
SELECT attempt, from_state, to_state, reason, node, time FROM job_events WHERE job_id = $1 ORDER BY xact, seq
"""


async def test_what_is_taken_runs_and_all_of_it_is_said(connection: asyncpg.Connection) -> None:
    await register(connection)
    await register(connection)
    [over] = await running(connection, a_job(4), incarnation=2)
    wanted = a_job(
        2,
        name="wanted",
        account="other",
        tasks=2,
        cpus_per_task=1,
        memory_mib=7,
        time_limit_seconds=60,
        requeue=True,
        script="#!/bin/sh\necho",
        environment={"A": "1", "B": "ü"},
        current_working_directory="here",
        standard_output="out",
        standard_error="err",
        cpus_per_task_given=False,
        tasks_per_node_given=True,
    )
    first, second, third = await submit(connection, wanted, a_job(1), a_job(2))
    turned = await turn_over(connection, over, incarnation=2)
    assert (turned.ended, begun(turned), turned.free_cpus) == ({over}, [first, second], 1)
    attempts = [Attempt(spec.job_id, spec.attempt) for spec in turned.begun]
    known = await jobs.running(connection, attempts, node="n1", incarnation=2)
    assert {spec.incarnation for spec in known} == {2}  # which only who finds them later is told
    assert turned.begun == [replace(spec, incarnation=0) for spec in known]
    for job_id in (first, second):
        job = await job_of(connection, job_id)
        assert (job.state, job.state_reason, job.state_description) == (State.RUNNING, Reason.NONE, None)
        assert (job.attempt, job.restart_cnt, job.node, job.incarnation) == (1, 0, "n1", 2)
        assert job.allocate_time is not None
        assert job.start_time is not None
        assert job.submit_time <= job.allocate_time <= job.start_time
        assert (job.end_time, job.exit_code, job.signal, job.cancel_requested_time) == (None,) * 4
        story = await connection.fetch(_EVENTS, job_id)
        assert [tuple(event)[:5] for event in story[-2:]] == [
            (1, "PENDING", "CONFIGURING", "None", "n1"),
            (1, "CONFIGURING", "RUNNING", "None", "n1"),
        ]
        assert {event["time"] for event in story[-2:]} == {job.start_time}
    held = await connection.fetch("SELECT job_id, node, attempt, cpus FROM allocations ORDER BY job_id")
    assert [tuple(row) for row in held] == [(first, "n1", 1, 2), (second, "n1", 1, 1)]
    assert [row[0] for row in await connection.fetch("SELECT job_id FROM pending")] == [third]
    assert await state_of(connection, third) is State.PENDING
    assert await allocated(connection) == 3
    assert await audit(connection) == []
    assert (await turn_over(connection, *attempts, incarnation=2)).ended == set(attempts)


async def test_what_was_requeued_is_taken_at_its_old_place(connection: asyncpg.Connection) -> None:
    await register(connection)
    [again] = await running(connection, a_job(1, requeue=True))
    [over] = await running(connection, a_job(3))
    [younger] = await submit(connection, a_job(4))
    assert await finish(connection, again, state=State.PENDING) == {again}
    turned = await turn_over(connection, over)
    assert [(spec.job_id, spec.attempt, spec.restart_cnt) for spec in turned.begun] == [(again.job_id, 2, 1)]
    assert (await job_of(connection, again.job_id)).restart_cnt == 1
    assert await state_of(connection, younger) is State.PENDING
    assert await audit(connection) == []
    assert (await turn_over(connection, again)) == NOTHING
    turned = await turn_over(connection, Attempt(again.job_id, 2))
    assert begun(turned) == [younger]
    assert await audit(connection) == []


ENDS = [
    Ending(0, 0, State.COMPLETED, Reason.NONE, exit_code=0),
    Ending(0, 0, State.FAILED, Reason.NON_ZERO_EXIT_CODE, exit_code=255),
    Ending(0, 0, State.FAILED, Reason.RAISED_SIGNAL, signal="KILL"),
    Ending(0, 0, State.FAILED, Reason.JOB_LAUNCH_FAILURE, "no such shell", ran=False),
    Ending(0, 0, State.CANCELLED, Reason.NONE, signal="TERM"),
    Ending(0, 0, State.CANCELLED, Reason.NONE),
    Ending(0, 0, State.TIMEOUT, Reason.TIME_LIMIT, exit_code=3),
    Ending(0, 0, State.OUT_OF_MEMORY, Reason.NONE, "too much", signal="KILL"),
    Ending(0, 0, State.NODE_FAIL, Reason.SYSTEM_FAILURE, "nobody can tell"),
    Ending(0, 0, State.PREEMPTED, Reason.NONE),
]
TIMES = {"submit_time", "allocate_time", "start_time", "end_time", "cancel_requested_time", "time"}


async def stored(connection: asyncpg.Connection, job_id: int) -> list[dict[str, Any]]:
    """What the tables say of a job; of a time, whether there is one."""
    rows = [*await connection.fetch(_ROW, job_id), *await connection.fetch(_EVENTS, job_id)]
    found = [{key: value is not None if key in TIMES else value for key, value in row.items()} for row in rows]
    return [{key: value for key, value in row.items() if key != "job_id"} for row in found]


@pytest.mark.parametrize("cancelled", [False, True])
async def test_ends_are_stored_as_a_release_stores_them(connection: asyncpg.Connection, cancelled: bool) -> None:
    assert {ending.state for ending in ENDS} == allocations.ends_of(State.RUNNING) & FINAL
    await register(connection, a_node("n1", 2 * len(ENDS)))
    attempts = await running(connection, *[a_job(1, requeue=True)] * 2 * len(ENDS))
    if cancelled:
        for attempt in attempts:
            assert await jobs.request_cancel(connection, attempt)
    asked = {a: (await job_of(connection, a.job_id)).cancel_requested_time for a in attempts}
    one, other = attempts[: len(ENDS)], attempts[len(ENDS) :]

    def endings(of: list[Attempt]) -> list[Ending]:
        return [replace(e, job_id=a.job_id, attempt=a.attempt) for a, e in zip(of, ENDS, strict=True)]

    released = await allocations.release(connection, endings(one), node="n1", before=State.RUNNING, incarnation=1)
    turned = await allocations.turn_over(connection, endings(other), node="n1", incarnation=1, take=True)
    assert (released, turned) == (set(one), TurnOver(set(other), [], 2 * len(ENDS)))
    for left, right, ending in zip(one, other, ENDS, strict=True):
        assert await stored(connection, left.job_id) == await stored(connection, right.job_id)
        assert await state_of(connection, right.job_id) is ending.state
        if cancelled:  # the first time that it was asked for
            assert (await job_of(connection, right.job_id)).cancel_requested_time == asked[right]
    times = await connection.fetch("SELECT end_time, start_time FROM jobs")
    assert all(row["start_time"] <= row["end_time"] for row in times)
    assert await connection.fetchval("SELECT count(*) FROM allocations") == 0
    assert await audit(connection) == []


# When nothing is taken


async def drains(connection: asyncpg.Connection) -> None:
    assert await nodes.heartbeat(connection, "n1", 1, lease_seconds=60, draining=True, cpu_load=0)


async def lease_is_over(connection: asyncpg.Connection) -> None:
    await connection.execute("UPDATE node_leases SET lease_until = now() - interval '1 s'")


async def is_drained(connection: asyncpg.Connection) -> None:
    assert await nodes.set_state(connection, "n1", "DRAIN", reason="r", by="operator")


async def is_down(connection: asyncpg.Connection) -> None:
    assert await nodes.set_state(connection, "n1", "DOWN", reason="r", by="operator")


async def is_smaller(connection: asyncpg.Connection) -> None:
    """As small as what still runs there."""
    await connection.execute("UPDATE nodes SET declared_cpus = 2, cpus = greatest(2, alloc_cpus) WHERE name = 'n1'")


async def is_larger(connection: asyncpg.Connection) -> None:
    await connection.execute("UPDATE nodes SET declared_cpus = 5, cpus = 5 WHERE name = 'n1'")


async def only_others_wait(connection: asyncpg.Connection) -> None:
    await connection.execute("UPDATE nodes SET partitions = '{other}' WHERE name = 'n1'")


async def nothing_waits(connection: asyncpg.Connection) -> None:
    for row in await connection.fetch("SELECT job_id FROM pending"):
        assert await jobs.cancel_waiting(connection, row[0])


async def nothing_happens(connection: asyncpg.Connection) -> None:
    pass


Change = Callable[[asyncpg.Connection], Awaitable[None]]


@pytest.mark.parametrize(
    ("change", "take", "taken", "free"),
    [
        (nothing_happens, True, 2, 0),  # or the others could not fail
        (is_larger, True, 3, 0),
        (nothing_happens, False, 0, 2),
        (drains, True, 0, 2),
        (lease_is_over, True, 0, 2),
        (is_drained, True, 0, 2),
        (is_down, True, 0, 2),
        (is_smaller, True, 0, 0),
        (only_others_wait, True, 0, 2),
        (nothing_waits, True, 0, 2),
    ],
)
async def test_ends_are_written_whatever_keeps_the_node_from_taking_more(
    connection: asyncpg.Connection, change: Change, take: bool, taken: int, free: int
) -> None:
    await register(connection, a_node("n1", 4))
    [over, _] = await running(connection, a_job(2), a_job(2))
    waiting = await submit(connection, *[a_job()] * 3)
    await change(connection)
    turned = await turn_over(connection, over, take=take)
    assert (turned.ended, begun(turned), turned.free_cpus) == ({over}, waiting[:taken], free)
    assert await state_of(connection, over.job_id) is State.COMPLETED
    assert await allocated(connection) == 2 + taken
    assert await audit(connection) == []


async def test_a_worker_that_came_back_smaller_takes_no_more_than_it_says_now(connection: asyncpg.Connection) -> None:
    await register(connection, a_node("n1", 8))
    held = await running(connection, a_job(3), a_job(3), a_job(1))
    waiting = await submit(connection, a_job(1), a_job(1), a_job(1))
    assert await register(connection, a_node("n1", 2)) == 2
    seen = []
    for attempt in held:
        turned = await turn_over(connection, attempt, incarnation=2)
        cpus = await connection.fetchval("SELECT cpus FROM nodes")
        seen.append((begun(turned), turned.free_cpus, cpus, await allocated(connection)))
    assert seen == [([], 0, 4, 4), (waiting[:1], 0, 2, 2), (waiting[1:2], 0, 2, 2)]
    assert await audit(connection) == []


@pytest.mark.parametrize(
    ("node", "incarnation", "attempt"),
    [("n1", 1, 2), ("n1", 3, 2), ("n2", 1, 2), ("nowhere", 2, 2), ("n1", 2, 1), ("n1", 2, 3)],
)
async def test_who_is_not_current_changes_nothing(
    connection: asyncpg.Connection, node: str, incarnation: int, attempt: int
) -> None:
    """The job is at its second attempt, on n1, whose worker is at its second incarnation."""
    await register(connection)
    await register(connection, a_node("n2"))
    [first] = await running(connection, a_job(1, requeue=True))
    assert await finish(connection, first, state=State.PENDING)
    assert await register(connection) == 2
    current = await give(connection, first.job_id)
    await start(connection, current, incarnation=2)
    [waits] = await submit(connection)
    stale = Attempt(current.job_id, attempt)
    before = await connection.fetch("SELECT * FROM jobs ORDER BY job_id")
    assert await turn_over(connection, stale, node=node, incarnation=incarnation) == NOTHING
    assert await connection.fetch("SELECT * FROM jobs ORDER BY job_id") == before
    assert begun(await turn_over(connection, current, incarnation=2)) == [waits]


async def test_ends_that_are_written_take_nothing_more(connection: asyncpg.Connection) -> None:
    """Who reports them again may have lost the answer."""
    await register(connection)
    over = await running(connection, a_job(2), a_job(2))
    ids = await submit(connection, a_job(2), a_job(2), a_job(2), a_job(2))
    assert begun(await turn_over(connection, *over, state=State.FAILED)) == ids[:2]
    for _ in range(2):
        assert await turn_over(connection, *over) == NOTHING
        assert await audit(connection) == []
    assert await state_of(connection, ids[2]) is State.PENDING


async def test_what_has_not_started_does_not_end_so(connection: asyncpg.Connection) -> None:
    await register(connection)
    await submit(connection, a_job(1), a_job(1))
    placed, _ = await allocate(connection)
    assert await turn_over(connection, placed) == NOTHING
    assert await state_of(connection, placed.job_id) is State.CONFIGURING


# A take alone


@pytest.mark.parametrize("seed", range(6))
async def test_a_take_without_ends_takes_what_the_policy_places_next(connection: asyncpg.Connection, seed: int) -> None:
    random = Random(seed)
    await register(connection, a_node("n1", 8, partitions=("default", "other")))
    await register(connection, a_node("n2", 64, partitions=("default", "other")))
    await running(connection, a_job(random.randint(1, 4)))
    wanted = [a_job(random.randint(1, 9), partition=random.choice(["default", "other"])) for _ in range(7)]
    ids = await submit(connection, *wanted)
    waiting = [Waiting(i, job.partition, job.cpus) for i, job in zip(ids, wanted, strict=True)]
    free = 8 - await allocated(connection)
    expected = next_on(Capacity("n1", frozenset({"default", "other"}), free), waiting)
    turned = await turn_over(connection)
    assert (turned.ended, begun(turned)) == (set(), expected)
    if expected:
        assert turned.free_cpus == free - sum(spec.cpus for spec in turned.begun)
    assert turned.left_some
    assert await allocated(connection) == 8 - free + sum(spec.cpus for spec in turned.begun)
    assert await audit(connection) == []


@pytest.mark.parametrize(
    ("sizes", "taken", "left_some"),
    [
        ([1], [0], False),
        ([4], [0], False),
        ([1, 2], [0, 1], False),
        ([2, 3], [0], True),
        ([5], [], True),
        ([], [], False),  # somebody was faster
    ],
)
async def test_a_take_tells_whether_anything_is_left(
    connection: asyncpg.Connection, sizes: list[int], taken: list[int], *, left_some: bool
) -> None:
    await register(connection, a_node("n1", 4))
    await register(connection, a_node("large", 8))
    ids = await submit(connection, *map(a_job, sizes)) if sizes else []
    turned = await turn_over(connection)
    assert (begun(turned), turned.left_some) == ([ids[i] for i in taken], left_some)
    assert await audit(connection) == []


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE node_leases SET incarnation = 2, spool_since = 2",
        "UPDATE node_leases SET draining = true",
        "UPDATE node_leases SET lease_until = now()",
        "UPDATE nodes SET admin_state = 'DRAIN'",
    ],
)
async def test_who_may_not_takes_nothing(connection: asyncpg.Connection, change: str) -> None:
    await register(connection)
    [waits] = await submit(connection)
    await connection.execute(change)
    assert await turn_over(connection) == NOT_TAKEN
    assert await turn_over(connection, take=False) == NOT_TAKEN
    assert await state_of(connection, waits) is State.PENDING
    assert await allocated(connection) == 0


async def test_many_takes_and_passes_at_once(connection: asyncpg.Connection, pool: Pool) -> None:
    """Each job begins once, and the node is as full as it gets."""
    await register(connection, a_node("n1", 6))
    await submit(connection, *[a_job()] * 9)

    async def take() -> int:
        async with pool.acquire() as own:
            return len((await turn_over(own)).begun)

    async def place() -> int:
        return len(await allocate_once(pool))

    assert sum(await asyncio.gather(*[one() for one in (take, place) * 3])) == 6
    assert await allocated(connection) == 6
    assert await audit(connection) == []


async def test_one_stale_member_does_not_fail_the_batch(connection: asyncpg.Connection) -> None:
    """And its CPUs, which it still holds or gave back before, are not given away."""
    await register(connection)
    good, late, kept = await running(connection, a_job(1), a_job(1), a_job(1))
    assert await finish(connection, late)
    ids = await submit(connection, *[a_job()] * 4)
    turned = await turn_over(connection, late, good, Attempt(kept.job_id, 7), Attempt(10**12, 1))
    assert (turned.ended, begun(turned), turned.free_cpus) == ({good}, ids[:3], 0)
    assert await state_of(connection, kept.job_id) is State.RUNNING
    assert await audit(connection) == []


@pytest.mark.parametrize("state", sorted(set(State) - (allocations.ends_of(State.RUNNING) & FINAL)))
async def test_what_is_no_end_for_good_is_refused_and_changes_nothing(
    connection: asyncpg.Connection, state: State
) -> None:
    await register(connection)
    one, other = await running(connection, a_job(1, requeue=True), a_job(1))
    await submit(connection)
    before = await connection.fetch("SELECT * FROM jobs ORDER BY job_id")
    endings = [an_ending(other), replace(an_ending(one), state=state, exit_code=None)]
    with pytest.raises(ValueError, match=f"RUNNING does not end as {state}"):
        await allocations.turn_over(connection, endings, node="n1", incarnation=1, take=True)
    assert await connection.fetch("SELECT * FROM jobs ORDER BY job_id") == before


# Others at the same time


async def test_a_cancel_in_flight_is_passed_over(connection: asyncpg.Connection, two: Any) -> None:
    await register(connection, a_node("n1", 2))
    [over] = await running(connection, a_job(2))
    cancelled, taken = await submit(connection, a_job(), a_job())
    async with two[0].transaction():
        assert await jobs.cancel_waiting(two[0], cancelled)
        async with asyncio.timeout(LONG):
            turned = await turn_over(two[1], over)
        assert (begun(turned), turned.free_cpus) == ([taken], 1)
    assert await state_of(connection, cancelled) is State.CANCELLED


async def test_a_cancel_that_finds_its_job_taken_is_told_so(connection: asyncpg.Connection, two: Any) -> None:
    await register(connection, a_node("n1", 2))
    [over] = await running(connection, a_job(2))
    [job_id] = await submit(connection)
    turned, cancelled = await race(
        connection, two, lambda c: turn_over(c, over), lambda c: jobs.cancel_waiting(c, job_id)
    )
    assert (begun(turned), cancelled) == ([job_id], False)
    assert await jobs.request_cancel(connection, Attempt(job_id, 1))


async def test_it_waits_for_a_pass_and_takes_what_that_left(connection: asyncpg.Connection, two: Any) -> None:
    await register(connection, a_node("n1", 5))
    await register(connection, a_node("n2", 5, partitions=("other",)))
    [over] = await running(connection, a_job(3))
    placed, first, second, third = await submit(connection, a_job(2, partition="other"), a_job(2), a_job(1), a_job(1))
    _, turned = await race(connection, two, lambda c: give(c, placed, cpus=2), lambda c: turn_over(c, over))
    assert (turned.ended, begun(turned), turned.free_cpus) == ({over}, [first, second], 0)
    assert await state_of(connection, third) is State.PENDING
    assert await allocated(connection) == 5


async def test_it_waits_for_a_release_and_takes_what_that_left(connection: asyncpg.Connection, two: Any) -> None:
    """PostgreSQL asks the CHECKs of the row as it was before, too, where taking this much would have been too much."""
    await register(connection)
    first, over = await running(connection, a_job(3), a_job(1))
    [waiting] = await submit(connection, a_job(4))
    _, turned = await race(connection, two, lambda c: finish(c, first), lambda c: turn_over(c, over))
    assert (turned.ended, begun(turned), turned.free_cpus) == ({over}, [waiting], 0)
    assert await allocated(connection) == 4


async def test_what_a_pass_placed_meanwhile_is_passed_over(connection: asyncpg.Connection, two: Any) -> None:
    """Its CPUs are not for others in its place: what is left over is the scheduler's."""
    await register(connection, a_node("n1", 5))
    [over] = await running(connection, a_job(3))
    placed, *waiting = await submit(connection, *[a_job()] * 6)
    _, turned = await race(connection, two, lambda c: give(c, placed), lambda c: turn_over(c, over))
    assert (turned.ended, begun(turned), turned.free_cpus) == ({over}, waiting[:3], 1)
    assert await state_of(connection, placed) is State.CONFIGURING


async def test_a_pass_that_waits_for_it_reckons_with_what_it_left(
    connection: asyncpg.Connection, pool: Pool, two: Any
) -> None:
    await register(connection, a_node("n1", 4))
    [over] = await running(connection, a_job(2))
    taken, left = await submit(connection, a_job(3), a_job(2))
    async with two[0].transaction():
        turned = await turn_over(two[0], over)
        assert (begun(turned), turned.free_cpus) == ([taken], 1)
        task = asyncio.create_task(allocate_once(pool))  # has seen that 2 were free, and no job but the smaller fits
        await blocked(connection)
    assert await task == []
    assert await state_of(connection, left) is State.PENDING


async def another_registers(connection: asyncpg.Connection) -> None:
    assert await register(connection) == 2


async def comes_back_smaller(connection: asyncpg.Connection) -> None:
    assert await register(connection, a_node("n1", 1)) == 2


@pytest.mark.parametrize(
    ("change", "taken", "free"),
    [
        (nothing_happens, 3, 0),  # or the others could not fail
        (is_drained, 0, 3),
        (is_down, 0, 3),
        (is_smaller, 1, 0),
        (is_larger, 3, 1),
        (drains, 0, 3),
        (lease_is_over, 0, 3),
        (another_registers, 0, 3),
        (comes_back_smaller, 0, 0),
        (nothing_waits, 0, 3),
    ],
)
async def test_what_happens_while_it_waits_counts(
    connection: asyncpg.Connection, two: Any, change: Change, taken: int, free: int
) -> None:
    """Its statement had begun before, and waits for a job whose cancel is being requested."""
    await register(connection, a_node("n1", 4))
    [over, _] = await running(connection, a_job(3), a_job(1))
    waiting = await submit(connection, *[a_job()] * 3)
    async with two[0].transaction():
        assert await jobs.request_cancel(two[0], over)
        task = asyncio.ensure_future(turn_over(two[1], over))
        await blocked(connection)
        await change(connection)
    turned = await task
    assert (turned.ended, begun(turned), turned.free_cpus) == ({over}, waiting[:taken], free)
    job = await job_of(connection, over.job_id)
    assert (job.state, job.cancel_requested_time is None) == (State.COMPLETED, False)
    assert await allocated(connection) == 1 + taken
    assert await audit(connection) == []


@pytest.mark.parametrize("ran", [False, True])
async def test_what_left_the_queue_while_it_waits_and_came_back_is_not_torn(
    connection: asyncpg.Connection, two: Any, ran: bool
) -> None:
    """It waits as before, in a later attempt: what the statement saw in the queue is gone, and what stands there now
    it has not seen."""
    await register(connection)
    await register(connection, a_node("n2"))
    [over] = await running(connection, a_job(4))
    [job_id, next_one] = await submit(connection, a_job(1, requeue=True), a_job(1))
    async with two[0].transaction():
        assert await jobs.request_cancel(two[0], over)
        task = asyncio.ensure_future(turn_over(two[1], over))
        await blocked(connection)
        away = await give(connection, job_id, "n2")
        if ran:
            await start(connection, away, node="n2")
            assert await finish(connection, away, node="n2", state=State.PENDING)
        else:
            back = Ending(job_id, 1, State.PENDING, Reason.NONE)
            assert await allocations.release(connection, [back], node="n2", before=State.CONFIGURING)
    assert next_one in begun(await task)
    assert await audit(connection) == []
    assert await allocate(connection) == [Attempt(job_id, 2)]
    assert await audit(connection) == []


async def test_a_newer_worker_that_registers_after_it_finds_what_it_began(
    connection: asyncpg.Connection, two: Any
) -> None:
    await register(connection)
    [over] = await running(connection, a_job(4))
    [job_id] = await submit(connection)
    turned, incarnation = await race(connection, two, lambda c: turn_over(c, over), lambda c: register(c))
    assert (begun(turned), incarnation) == ([job_id], 2)
    [held] = await allocations.of_node(connection, "n1")
    assert (held.job_id, held.state) == (job_id, State.RUNNING)


async def test_it_waits_for_a_newer_worker_that_registers_and_begins_nothing(
    connection: asyncpg.Connection, two: Any
) -> None:
    await register(connection)
    [over] = await running(connection, a_job(4))
    await submit(connection)
    spec = a_node()
    incarnation, turned = await race(
        connection, two, lambda c: nodes.register(c, spec, 60), lambda c: turn_over(c, over)
    )
    assert (incarnation, turned.ended, turned.begun) == (2, {over}, [])


async def test_two_nodes_share_a_queue_without_waiting(connection: asyncpg.Connection, two: Any) -> None:
    await register(connection, a_node("n1", 2))
    await register(connection, a_node("n2", 4))
    [one] = await running(connection, a_job(2))
    [other] = await running(connection, a_job(4), node="n2")
    ids = await submit(connection, *[a_job()] * 6)
    async with two[0].transaction():
        first = await turn_over(two[0], one)
        async with asyncio.timeout(LONG):
            second = await turn_over(two[1], other, node="n2")
    assert (begun(first), first.free_cpus) == (ids[:2], 0)
    assert (begun(second), second.free_cpus) == (ids[2:4], 2)
    assert await audit(connection) == []


async def test_many_nodes_at_one_queue_begin_each_job_once(connection: asyncpg.Connection, pool: Pool) -> None:
    """Each ends what it runs, and takes the next, until nothing waits for it."""
    names = [f"n{i}" for i in range(6)]
    for name in names:
        await register(connection, a_node(name, 4))
        await running(connection, a_job(2), node=name)
    random = Random(3)
    ids = await submit(connection, *(a_job(random.randint(1, 4)) for _ in range(200)))
    seen: list[int] = []

    async def work(name: str) -> None:
        while True:
            async with pool.acquire() as own:
                held = await allocations.of_node(own, name)
                ended = [Attempt(h.job_id, h.attempt) for h in held if h.state is State.RUNNING]
                if not ended:
                    return
                turned = await turn_over(own, *ended[: random.randint(1, 4)], node=name)
                seen.extend(begun(turned))

    async with asyncio.timeout(LONG):
        await asyncio.gather(*map(work, names))
    assert len(seen) == len(set(seen)) > 100
    assert set(seen) <= set(ids)
    assert await connection.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == 0
    assert await audit(connection) == []


async def test_the_lease_is_locked_after_the_jobs_and_before_the_node(connection: asyncpg.Connection, two: Any) -> None:
    await register(connection)
    [over] = await running(connection, a_job(4))
    [waits] = await submit(connection)
    async with two[0].transaction():
        await two[0].execute("SELECT FROM node_leases FOR UPDATE")
        task = asyncio.ensure_future(turn_over(two[1], over))
        await blocked(connection)
        await two[0].execute("SELECT FROM nodes FOR UPDATE NOWAIT")
        await two[0].execute("SELECT FROM jobs WHERE job_id = $1 FOR UPDATE NOWAIT", waits)
        with pytest.raises(asyncpg.LockNotAvailableError):
            await connection.execute("SELECT FROM jobs WHERE job_id = $1 FOR UPDATE NOWAIT", over.job_id)
    assert begun(await task) == [waits]


async def test_the_node_is_locked_before_what_is_taken(connection: asyncpg.Connection, two: Any) -> None:
    """Or a pass that has the node could wait for a job, and this for the node."""
    await register(connection)
    [over] = await running(connection, a_job(4))
    [waits] = await submit(connection)
    async with two[0].transaction():
        await two[0].execute("SELECT FROM nodes FOR UPDATE")
        task = asyncio.ensure_future(turn_over(two[1], over))
        await blocked(connection)
        await connection.execute("SELECT FROM jobs WHERE job_id = $1 FOR UPDATE NOWAIT", waits)
    assert begun(await task) == [waits]

"""A worker's report: what gets the CPUs of what has ended begins here, once, and only while anything may."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import pytest
import redis.asyncio as redis
import structlog
from pydantic import SecretStr
from structlog.testing import capture_logs

from core import streams, taken
from core.db import allocations, jobs, outputs
from core.db.allocations import Placed, TurnOver
from core.db.connection import PLANNED_ONCE, WAKE_CHANNEL, Line, open_pool
from core.moves import Ear
from core.records import Attempt, Dispatch, JobSpec
from core.settings import Settings
from core.states import State
from core.streams import Link
from services.worker import claim, files, proc, process, report, serve, supervise
from services.worker.node import Node, Run
from services.worker.recover import recover
from services.worker.report import write_endings
from services.worker.spool import Exit
from services.worker.supervise import attempt
from tests.builders import LONG, a_job, a_node, allocate, an_ending, job_of, register, state_of, submit
from tests.faults.wires import Wires
from tests.workers import a_run, nothing, started

pytestmark = pytest.mark.anyio

NEVER_USED: Any = None


class Begun:
    """What begins, among the node's runs at once."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.runs: list[Run] = []

    def __call__(self, run: Run) -> None:
        self.node.runs[run.attempt] = run
        self.runs.append(run)

    @property
    def job_ids(self) -> list[int]:
        return sorted(run.spec.job_id for run in self.runs)


@pytest.fixture
async def ear(redis_client: redis.Redis) -> AsyncIterator[Ear]:
    found = Ear(redis_client)
    yield found
    await found.close()


@pytest.fixture
def begun(node: Node) -> Begun:
    return Begun(node)


async def an_end(node: Node, connection: asyncpg.Connection, cpus: int = 4) -> Run:
    """What has filled the node, and is over but for its report."""
    run = await a_run(node, connection, cpus=cpus)
    run.over = True
    return run


@asynccontextmanager
async def hearing(connection: asyncpg.Connection) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Answers how often the scheduler has been woken."""
    said: asyncio.Queue[str] = asyncio.Queue()
    await connection.add_listener(WAKE_CHANNEL, lambda *told: said.put_nowait(str(told[-1])))

    async def heard() -> int:
        await connection.execute(f"NOTIFY {WAKE_CHANNEL}, 'now'")
        count = 0
        async with asyncio.timeout(LONG):
            while await said.get() != "now":
                count += 1
        return count

    yield heard


async def told_as_taken(node: Node, connection: asyncpg.Connection) -> list[Placed]:
    said: asyncio.Queue[str] = asyncio.Queue()
    await connection.add_listener(taken.CHANNEL, lambda *told: said.put_nowait(str(told[-1])))
    found: list[Placed] = []
    while count := await node.taken.tell_once(node.pool, node.name):
        async with asyncio.timeout(LONG):
            found += (now := taken.heard(await said.get()))
        assert len(now) == count
    return sorted(found, key=lambda placed: placed.job_id)


async def test_what_is_taken_begins(node: Node, connection: asyncpg.Connection, begun: Begun) -> None:
    over = await an_end(node, connection)
    first, second, third = await submit(connection, a_job(3), a_job(1), a_job(1))
    assert await write_endings(node, [an_ending(over.attempt)], begun) == [True]
    assert begun.job_ids == [first, second]
    assert await told_as_taken(node, connection) == [Placed(first, 1, "n1", 3), Placed(second, 1, "n1", 1)]
    assert await state_of(connection, third) is State.PENDING
    known = await jobs.running(connection, [run.attempt for run in begun.runs], node="n1", incarnation=1)
    assert {run.spec.job_id: replace(run.spec, incarnation=1) for run in begun.runs} == {s.job_id: s for s in known}


async def test_what_is_taken_is_told_in_batches_and_kept_while_it_cannot_be(
    node: Node, connection: asyncpg.Connection, begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = await an_end(node, connection)
    ids = await submit(connection, *[a_job(1)] * 4)
    await write_endings(node, [an_ending(over.attempt)], begun)
    monkeypatch.setattr(taken, "BATCH", 3)
    await node.pool.close()
    with pytest.raises(asyncpg.InterfaceError):
        await node.taken.tell_once(node.pool, node.name)
    monkeypatch.setattr(node, "pool", await open_pool(node.settings, "worker", 1))
    assert [placed.job_id for placed in await told_as_taken(node, connection)] == ids
    await node.pool.close()


async def test_a_look_at_the_same_time_finds_what_was_taken_among_the_runs(
    node: Node, connection: asyncpg.Connection, begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes between the commit and the beginning, and waits, or would take it for one whose answer was lost."""
    over = await an_end(node, connection)
    [job_id] = await submit(connection, a_job(4))
    looks: list[asyncio.Future[int]] = []
    turn_over = allocations.turn_over

    async def slowly(*args: Any, **more: Any) -> TurnOver:
        turned = await turn_over(*args, **more)
        look = asyncio.ensure_future(claim.look_once(node, begun))
        looks.append(look)
        while not (look.done() or node.claiming._waiters):  # noqa: ASYNC110 - neither can be waited for
            await asyncio.sleep(0)
        return turned

    monkeypatch.setattr(allocations, "turn_over", slowly)
    async with asyncio.timeout(LONG):
        assert await write_endings(node, [an_ending(over.attempt)], begun) == [True]
        assert [await look for look in looks] == [0]
    assert begun.job_ids == [job_id]
    assert [run.fenced for run in node.runs.values()] == [False, False]


@pytest.fixture
async def wires(node: Node, settings: Settings) -> AsyncIterator[Wires]:
    """The way of the node's reports, which can lose an answer."""
    found = Wires(settings.postgres_dsn)
    await found.mend()
    by_it = settings.model_copy(update={"database_url": SecretStr(found.url)})
    node.line = Line(by_it, "worker", **PLANNED_ONCE)
    yield found
    node.line.close()
    await found.close()


async def test_an_answer_that_is_lost_costs_nothing(
    node: Node, connection: asyncpg.Connection, begun: Begun, wires: Wires
) -> None:
    """The ends are found written; the look, which is called for, begins what was taken: once."""
    over = await an_end(node, connection)
    [job_id] = await submit(connection, a_job(4))
    wires.lose(allocations._TURN_OVER)
    async with asyncio.timeout(LONG):
        assert await write_endings(node, [an_ending(over.attempt)], begun) == [True]
        assert wires.tripped.is_set()
        assert begun.runs == []
        assert (await job_of(connection, Attempt(job_id, 1))).state is State.RUNNING
        node.end(over)
        assert await node.look.wait(LONG)
        for _ in range(2):
            await claim.look_once(node, begun)
    assert [(run.attempt, run.fenced) for run in begun.runs] == [(Attempt(job_id, 1), False)]
    assert await write_endings(node, [an_ending(Attempt(job_id, 1))], nothing) == [True]


@pytest.mark.parametrize("change", [{"draining": True}, {"heard": 0.0}])
async def test_nothing_is_started_by_a_worker_that_stops_or_is_silent(
    node: Node, connection: asyncpg.Connection, begun: Begun, change: dict[str, Any]
) -> None:
    """Of what it has been given; once it hears PostgreSQL again it does."""
    [job_id] = await submit(connection)
    [attempt] = await allocate(connection)
    before = {name: getattr(node, name) for name in change}
    for name, value in change.items():
        setattr(node, name, value)
    await claim.start(node, [attempt], nothing)
    assert await state_of(connection, job_id) is State.CONFIGURING
    for name, value in before.items():
        setattr(node, name, value)
    await claim.start(node, [attempt], begun)
    assert begun.job_ids == [job_id]


async def test_a_look_begins_nothing_while_nothing_is_heard(
    node: Node, connection: asyncpg.Connection, begun: Begun
) -> None:
    """Of what a commit has started whose answer was lost; the first heartbeat that is answered calls for a look."""
    lost = await started(connection)
    node.heard = 0.0
    await claim.look_once(node, nothing)
    node.hear(proc.now())
    assert await node.look.wait(0)
    await claim.look_once(node, begun)
    assert begun.job_ids == [lost.job_id]


async def test_a_start_is_told_to_who_listens(
    node: Node, connection: asyncpg.Connection, begun: Begun, redis_client: redis.Redis, ear: Ear
) -> None:
    [job_id] = await submit(connection)
    [attempt] = await allocate(connection)
    await streams.publish(Link(redis_client), "run", [Dispatch(job_id, attempt.attempt, node.name)])
    reader = streams.Reader(redis_client, node.name)
    node.moves.wanted = lambda: reader.somebody_listens
    async with asyncio.timeout(LONG):
        assert await ear.hear() is None
        for _ in range(2):  # first what an earlier worker left, then what is new
            await claim.consume_once(node, reader, begun)
        await node.moves.tell_once(Link(redis_client))
        assert await ear.hear() == [(job_id, State.RUNNING)]
    assert begun.job_ids == [job_id]


@pytest.mark.parametrize(("sizes", "taken", "heard"), [([3, 1], [0, 1], 0), ([3, 2], [0], 1), ([5], [], 1)])
async def test_a_node_that_is_told_of_a_job_takes_what_fits_and_tells_of_the_rest(
    node: Node,
    connection: asyncpg.Connection,
    begun: Begun,
    redis_client: redis.Redis,
    sizes: list[int],
    taken: list[int],
    heard: int,
) -> None:
    await register(connection, a_node("large", 8))
    ids = await submit(connection, *map(a_job, sizes))
    await streams.publish(Link(redis_client), "take", [Dispatch(job_id, 1, node.name) for job_id in ids])
    reader = streams.Reader(redis_client, node.name)
    async with hearing(connection) as count:
        for _ in range(2):  # first what an earlier worker left, then what is new
            await claim.consume_once(node, reader, begun)
        assert await count() == heard
    assert begun.job_ids == [ids[i] for i in taken]
    await claim.consume_once(node, reader, begun)
    assert await redis_client.xlen(streams.stream_of(node.name)) == 0


@pytest.mark.parametrize("change", [{"draining": True}, {"trouble": "a full disk"}, {"heard": 0.0}])
async def test_a_worker_that_starts_nothing_tells_the_scheduler_at_once(
    node: Node, connection: asyncpg.Connection, begun: Begun, change: dict[str, Any]
) -> None:
    [job_id] = await submit(connection)
    for name, value in change.items():
        setattr(node, name, value)
    async with hearing(connection) as count:
        await report.take(node, begun)
        assert await count() == 1
    assert begun.job_ids == []
    assert await state_of(connection, job_id) is State.PENDING


@pytest.mark.parametrize("wanted", [False, True])
async def test_starts_and_ends_are_told_to_who_wants_to_know(
    node: Node, connection: asyncpg.Connection, begun: Begun, redis_client: redis.Redis, ear: Ear, *, wanted: bool
) -> None:
    over, refused = await an_end(node, connection), Attempt(999_999, 1)
    [taken] = await submit(connection, a_job(cpus=4))
    node.moves.wanted = lambda: wanted
    async with asyncio.timeout(LONG):
        assert await ear.hear() is None
        assert await write_endings(node, [an_ending(over.attempt), an_ending(refused)], begun) == [True, False]
        await node.moves.tell_once(Link(redis_client))
        await redis_client.publish(streams.moved_channel(redis_client), "7=FAILED")
        if wanted:
            assert sorted(await ear.hear() or []) == [(over.spec.job_id, State.COMPLETED), (taken, State.RUNNING)]
        assert await ear.hear() == [(7, State.FAILED)]


@pytest.mark.parametrize("change", [{"draining": True}, {"trouble": "a full disk"}, {"heard": 0.0}])
async def test_nothing_is_taken_by_a_worker_that_starts_nothing(
    node: Node, connection: asyncpg.Connection, change: dict[str, Any]
) -> None:
    over = await an_end(node, connection)
    [job_id] = await submit(connection)
    for name, value in change.items():
        setattr(node, name, value)
    assert await write_endings(node, [an_ending(over.attempt)], nothing) == [True]
    assert await state_of(connection, job_id) is State.PENDING


async def test_what_goes_back_is_not_taken_at_once(node: Node, connection: asyncpg.Connection) -> None:
    """Nor is anything else that is reported with it."""
    back, over = await a_run(node, connection, requeue=True), await a_run(node, connection)
    [job_id] = await submit(connection)
    endings = [an_ending(over.attempt), an_ending(back.attempt, State.PENDING)]
    async with hearing(connection) as heard:
        assert await write_endings(node, endings, nothing) == [True, True]
        assert await heard() == 1
    assert [await state_of(connection, i) for i in (back.spec.job_id, over.spec.job_id, job_id)] == [
        State.PENDING,
        State.COMPLETED,
        State.PENDING,
    ]


@pytest.mark.parametrize(("sizes", "told"), [([4], 0), ([2, 2], 0), ([3], 1), ([3, 2], 1), ([], 1)])
async def test_the_scheduler_is_told_unless_the_node_is_full(
    node: Node, connection: asyncpg.Connection, begun: Begun, sizes: list[int], told: int
) -> None:
    over = await an_end(node, connection)
    if sizes:
        await submit(connection, *map(a_job, sizes))
    async with hearing(connection) as heard:
        assert await write_endings(node, [an_ending(over.attempt)], begun) == [True]
        assert await heard() == told


async def test_nothing_is_taken_while_it_is_found_out_what_an_earlier_worker_left(
    node: Node, connection: asyncpg.Connection, begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its script, its record and its grant would be those of nobody, and be removed."""
    node.recovered = False
    over, last = await started(connection, cpus=3), await started(connection, cpus=1)
    [job_id] = await submit(connection, a_job(1))
    files.script_path(node.spool.script_dir, 10**6, 1).touch()  # of what runs on for a while

    async def slowly(*_: Any) -> bool:
        assert await write_endings(node, [an_ending(over)], begun) == [True]
        return False

    monkeypatch.setattr(process, "end_stale", slowly)
    await recover(node, begun)
    assert node.recovered
    assert await state_of(connection, over.job_id) is State.COMPLETED
    assert begun.job_ids == [over.job_id, last.job_id]
    assert await write_endings(node, [an_ending(last)], begun) == [True]
    assert begun.job_ids == [over.job_id, last.job_id, job_id]


async def test_ends_do_not_depend_on_what_is_taken(
    node: Node, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement that is wrong takes more than there is room for: the CHECKs refuse that, and what ends, ends."""
    text = allocations._TURN_OVER
    monkeypatch.setattr(allocations, "_TURN_OVER", text.replace("WHERE h.fits", ""))
    over = await an_end(node, connection, cpus=3)
    waiting = await submit(connection, a_job(3), a_job(3))
    with capture_logs() as logs:
        assert await write_endings(node, [an_ending(over.attempt)], nothing) == [True]
    assert [log["event"] for log in logs] == ["take_refused"]
    assert "capacity" in logs[0]["error"]
    assert [await state_of(connection, i) for i in (over.spec.job_id, *waiting)] == [
        State.COMPLETED,
        State.PENDING,
        State.PENDING,
    ]


# A stop as it is taken


async def test_what_is_to_end_before_it_has_started_does_not_start(node: Node, connection: asyncpg.Connection) -> None:
    run = await a_run(node, connection)
    run.stop()
    ending = await attempt(node, run, structlog.get_logger(), NEVER_USED)
    assert (ending.state, ending.ran, run.script) == (State.PENDING, False, None)
    assert await write_endings(node, [ending], nothing) == [True]
    job = await job_of(connection, run.attempt)
    assert (job.state, job.attempt, job.restart_cnt) == (State.PENDING, 1, 0)
    assert [start.went_back for start in await outputs.starts(connection, job.job_id)] == [True]


async def test_a_cancel_beats_the_stop(node: Node, connection: asyncpg.Connection) -> None:
    run = await a_run(node, connection)
    run.stop()
    run.cancel()
    ending = await attempt(node, run, structlog.get_logger(), NEVER_USED)
    assert (ending.state, run.script) == (State.CANCELLED, None)


class Played:
    """Stands where a script does that ends at once, or never."""

    pid = 7

    def __init__(self, *, ends: bool) -> None:
        self.ended = asyncio.Event()
        if ends:
            self.ended.set()

    async def wait(self) -> Exit:
        await self.ended.wait()
        return Exit(0, None)

    def signal(self, number: int) -> None:
        pytest.fail(f"it is sent {number}")

    def members(self) -> list[int]:
        return []

    def kill_leftovers(self) -> bool:
        return False

    def forget(self) -> None:
        pass


@pytest.mark.usefixtures("redis_client")
@pytest.mark.parametrize("end_jobs", [True, False])
async def test_what_is_taken_as_a_stop_is_said(
    node: Node, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, end_jobs: bool
) -> None:
    """It goes back, and has not started."""
    node.settings = node.settings.model_copy(update={"end_jobs": end_jobs})
    for folder in (node.settings.scripts_dir, node.settings.work_base_dir):
        folder.mkdir(parents=True)
    stop, launched, turn_over = asyncio.Event(), list[int](), allocations.turn_over

    async def starts(_: Node, spec: JobSpec) -> Played:
        launched.append(spec.job_id)
        return Played(ends=len(launched) == 1)

    async def slowly(*args: Any, **more: Any) -> TurnOver:
        turned = await turn_over(*args, **more)
        stop.set()
        while not node.draining:  # noqa: ASYNC110 - nobody says so
            await asyncio.sleep(0)
        return turned

    monkeypatch.setattr(supervise, "_start", starts)
    monkeypatch.setattr(allocations, "turn_over", slowly)
    over, taken = await submit(connection, a_job(4), a_job(4))
    assert len(await allocate(connection)) == 1
    async with asyncio.timeout(LONG):
        await serve._work(node, stop)
    assert launched == [over]
    assert await state_of(connection, over) is State.COMPLETED
    job = await job_of(connection, Attempt(taken, 1))
    assert (job.state, job.attempt, job.restart_cnt) == (State.PENDING, 1, 0)
    assert [start.went_back for start in await outputs.starts(connection, taken)] == [True]
    assert node.runs == {}

"""Every role killed at each of its named points, between two effects; afterwards no promise is broken."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from random import Random

import pytest

from tests.faults.cluster import cluster
from tests.faults.faults import POINTS, crash_at, kill_both
from tests.faults.jobs import Wanted, brief_of, sleeps
from tests.faults.load import loading
from tests.faults.record import Record, Struck
from tests.faults.run import Run, running
from tests.system import until

pytestmark = [pytest.mark.anyio, pytest.mark.long]

CPUS = 4
NODES = ("n1", "n2")
CLIENTS = 6
TRIES = 5
OF_RESTARTS = {"worker.measured"}
"""The points to which only a job comes that starts again."""


def mixed(name: str, luck: Random) -> Wanted:
    """What comes to every point: also what may be requeued, and what is ended by its time limit."""
    if luck.random() < 0.3:
        return Wanted(name, sleeps(luck.uniform(0, 0.3)), requeue=True)
    if luck.random() < 0.2:
        return Wanted(name, sleeps(60), time_limit_seconds=1)
    return brief_of(name, luck)


@pytest.fixture(scope="module")
async def run(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Run]:
    """A cluster under load; whatever was done to it, nothing is broken at its end."""
    folder = tmp_path_factory.mktemp("points")
    async with (
        cluster(folder, nodes=dict.fromkeys(NODES, CPUS), apis=1, schedulers=1) as found,
        loading(found, Random(5), clients=CLIENTS, make=mixed) as load,
        running(found, load, Record(), Random(6)) as run,
    ):
        yield run
        await load.stop()
        calm = await run.settled()
        assert calm, await run.left()
        await found.ready()
        assert {column: texts for column, texts in (await run.verdicts()).items() if texts} == {}


async def incarnations(run: Run) -> int:
    """How often workers have registered."""
    [row] = await run.ask("SELECT sum(incarnation) FROM node_leases")
    return int(row[0])


async def full(run: Run) -> bool:
    """Whether every node runs one job that fills it."""
    query = "SELECT count(*) FROM jobs JOIN allocations USING (job_id) WHERE state = 'RUNNING' AND jobs.cpus = $1"
    [row] = await run.ask(query, CPUS)
    return int(row[0]) == len(NODES)


async def crash_restart_at(run: Run, point: str) -> Struck | None:
    """While a worker is armed, the nodes lose what fills them and may be requeued: there it starts again."""
    make, run.load.make = (
        run.load.make,
        lambda name, luck: Wanted(name, sleeps(luck.uniform(2, 4)), cpus=CPUS, requeue=True),
    )
    try:
        before = await incarnations(run)
        crashing = asyncio.create_task(crash_at(run, point))

        async def armed() -> bool:
            return crashing.done() or await incarnations(run) > before

        await until(armed, "a worker that is armed registers")
        await until(partial(full, run), "every node is full of one job")
        for role in run.cluster.of("worker"):
            kill_both(run, role)
        return await crashing
    finally:
        run.load.make = make


@pytest.mark.parametrize("point", POINTS)
async def test_it_ends_there(run: Run, point: str) -> None:
    crash = crash_restart_at if point in OF_RESTARTS else crash_at
    for _ in range(TRIES):
        if await crash(run, point) is not None:
            break
    else:
        pytest.fail("it does not come there")

"""Every role killed at each of its named points, between two effects; afterwards no promise is broken."""

from collections.abc import AsyncIterator
from random import Random

import pytest

from tests.faults.cluster import cluster
from tests.faults.faults import POINTS, crash_at
from tests.faults.jobs import Wanted, brief_of, sleeps
from tests.faults.load import loading
from tests.faults.record import Record
from tests.faults.run import Run, running

pytestmark = [pytest.mark.anyio, pytest.mark.long]

CLIENTS = 6
TRIES = 5


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
        cluster(folder, nodes={"n1": 4, "n2": 4}, apis=1, schedulers=1) as found,
        loading(found, Random(5), clients=CLIENTS, make=mixed) as load,
        running(found, load, Record(), Random(6)) as run,
    ):
        yield run
        load.stopping = True
        calm = await run.settled()
        assert calm, await run.left()
        await found.ready()
        assert {column: texts for column, texts in (await run.verdicts()).items() if texts} == {}


@pytest.mark.parametrize("point", POINTS)
async def test_it_ends_there(run: Run, point: str) -> None:
    for _ in range(TRIES):
        if await crash_at(run, point) is not None:
            break
    else:
        pytest.fail("it does not come there")

"""Each kind of fault at least once, under load; afterwards no promise is broken."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random

import pytest

from tests.faults.cluster import SERVERS, cluster
from tests.faults.faults import KINDS, no_disk_can_be_mounted
from tests.faults.jobs import Wanted, brief_of, sleeps
from tests.faults.load import loading
from tests.faults.record import Record
from tests.faults.run import Run, running
from tests.system import PATIENCE

pytestmark = pytest.mark.anyio

CLIENTS = 8
SEED = 4


@pytest.fixture(scope="module")
async def run(tmp_path_factory: pytest.TempPathFactory, with_cluster: Callable[[Path], Path]) -> AsyncIterator[Run]:
    """A cluster under load; whatever was done to it, nothing is broken at its end."""
    folder: Path = tmp_path_factory.mktemp("faults")
    with_cluster(folder / SERVERS)
    small = () if no_disk_can_be_mounted() else ("n2",)
    quick = {"lease_seconds": 1.2, "heartbeat_seconds": 0.3, "requeue_after": 3.0}
    async with (
        cluster(folder, nodes={"n1": 4, "n2": 3}, small=small, **quick) as found,
        loading(found, Random(SEED), clients=CLIENTS, make=brief_of) as load,
        running(found, load, Record(), Random(SEED)) as run,
    ):
        run.freezes = (0.5, 1.5)
        yield run
        await found.mend()
        await load.stop()
        calm = await run.settled()
        assert calm, await run.left()
        await found.ready()
        assert {column: texts for column, texts in (await run.verdicts()).items() if texts} == {}


@pytest.mark.parametrize("name", KINDS)
async def test_a_job_goes_its_way_after(run: Run, name: str) -> None:
    if why := KINDS[name].impossible():
        pytest.skip(why)
    async with asyncio.timeout(PATIENCE):
        # Until it has met work
        while (struck := await KINDS[name].strike(run)) is None or not struck.counts:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    async with asyncio.timeout(PATIENCE):
        while not (await run.load.one(Wanted(run.load.new_name(), sleeps(0, "leave 7")))).ends:
            pass

"""Crowds that others do not notice: thousands that wait and are cancelled at once, slow and vanishing clients."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from core.settings import Settings
from tests.system import System, running

pytestmark = pytest.mark.anyio

WAITS = "#!/bin/bash\nwhile [ ! -e {go} ]; do sleep 0.05; done\n"
SAYS = "#!/bin/bash\nhead -c 8000000 /dev/zero\n"
LANES = 64
EACH = 40
"""How many of each kind of client are slow, or vanish."""


@pytest.fixture
async def system(settings: Settings, tmp_path: Path) -> AsyncIterator[System]:
    """With a lease that a worker which is held up for a second would lose."""
    quick = settings.model_copy(update={"heartbeat_seconds": 0.25, "lease_seconds": 1.5})
    async with running(quick, tmp_path, workers={settings.node_name: 4}) as found:
        yield found
        assert complaints(found.settings) == []


def complaints(settings: Settings) -> list[str]:
    """What any role has warned of."""
    lines = [line for path in settings.log_dir.glob("*.log") for line in path.read_text().splitlines()]
    return [line for line in lines if json.loads(line)["level"] not in ("debug", "info")]


@asynccontextmanager
async def another_client(system: System) -> AsyncIterator[list[int]]:
    """Whoever has small jobs of their own meanwhile, one after the other; each of them ends as ever."""
    ended: list[int] = []

    async def submit() -> None:
        while True:
            job = await system.run("#!/bin/sh\nexit 7\n")
            assert (job["state"], job["exit_code"]) == ("FAILED", 7)
            ended.append(job["job_id"])

    task = asyncio.create_task(submit())
    try:
        yield ended
    finally:
        task.cancel()
        await asyncio.wait((task,))
    assert task.cancelled()


async def goes_on(ended: list[int]) -> None:
    """Two more of its jobs end: one may have been under way."""
    wanted = len(ended) + 2
    async with asyncio.timeout(60):
        while len(ended) < wanted:  # noqa: ASYNC110 - what is waited for is done by others
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.long)])
async def test_thousands_that_wait_and_are_cancelled_at_once(system: System, tmp_path: Path, count: int) -> None:
    go = tmp_path / "go"
    blocker = await system.submit(WAITS.format(go=go), cpus_per_task=2)
    await system.state_is(blocker["job_id"], "RUNNING")
    lanes = asyncio.Semaphore(LANES)

    async def wait_and_be_cancelled(all_wait: asyncio.Event) -> str:
        async with lanes:
            job = await system.submit("#!/bin/sh\n", cpus_per_task=3)  # it never fits beside the other
        waiting.append(job["job_id"])
        await all_wait.wait()
        async with lanes:
            return (await system.api.cancel(job["job_id"]))["state"]

    async with another_client(system) as ended:
        waiting, all_wait = list[int](), asyncio.Event()
        crowd = [asyncio.create_task(wait_and_be_cancelled(all_wait)) for _ in range(count)]
        while len(waiting) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await goes_on(ended)
        all_wait.set()
        assert set(await asyncio.gather(*crowd)) == {"CANCELLED"}
        await goes_on(ended)
    go.touch()
    assert (await system.api.wait(blocker["job_id"], timeout_seconds=60))["state"] == "COMPLETED"


async def test_slow_and_vanishing_clients(system: System) -> None:
    said = await system.run(SAYS)
    address = urlsplit(system.api.address)
    host = f"Host: {address.netloc}\r\n"
    job = json.dumps({"job": {"account": "half"}, "script": "#!/bin/sh\n"})
    post = f"POST /api/v1/jobs HTTP/1.1\r\n{host}Content-Type: application/json\r\nContent-Length: {len(job)}\r\n\r\n"
    slow = ("G", f"GET /health HTTP/1.1\r\n{host}", f"{post}{job[:20]}")
    reads_nothing = f"GET /api/v1/jobs/{said['job_id']}/logs HTTP/1.1\r\n{host}\r\n"
    writers: list[asyncio.StreamWriter] = []

    async def send(text: str) -> asyncio.StreamWriter:
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        writers.append(writer)
        writer.write(text.encode())
        await writer.drain()
        return writer

    try:
        async with another_client(system) as ended:
            await asyncio.gather(*(send(text) for text in (*slow, reads_nothing) for _ in range(EACH)))
            await goes_on(ended)
            for text in (*slow, reads_nothing, f"GET /api/v1/jobs HTTP/1.1\r\n{host}\r\n"):
                for writer in await asyncio.gather(*(send(text) for _ in range(EACH))):
                    writer.transport.abort()
                await goes_on(ended)
    finally:
        for writer in writers:
            writer.transport.abort()
    assert [job async for job in system.api.all_jobs(account="half")] == []  # half a request is none

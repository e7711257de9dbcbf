"""The output of each attempt alone: real workers and scripts, on one node and on two, killed and cut off in between."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from core.attempts import Start, Stream, own_bytes
from core.client import ClientError
from core.db import outputs
from tests.builders import settings_for
from tests.conftest import Databases
from tests.proxy import Fault, Proxy, proxied
from tests.system import System, alive_with, beside, running, until

pytestmark = pytest.mark.anyio

# Each attempt says on which node it is which restart, and ends once it is let go; $SILENT restarts say nothing.
SCRIPT = """#!/bin/bash
restart=${SLURM_RESTART_COUNT:-0}
if [ $restart -ge "$SILENT" ]; then
    echo "out $restart of $SLURMD_NODENAME"
    printf 'err %s' $restart >&2
fi
echo "$SLURM_JOB_ID $SLURMD_NODENAME $restart" >> "$LEDGER"
while [ ! -e "$GO" ]; do sleep 0.02; done
echo "bye $restart"
"""


@pytest.fixture(scope="module")
async def servers(
    databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[System]:
    """An API and a scheduler for all tests; jobs may write where any test keeps its own."""
    folder = tmp_path_factory.mktemp("servers")
    async with databases.one() as url:
        settings = settings_for(url, redis_url, folder, allowed_roots=(folder.parent,))
        async with running(settings, folder, workers={}) as found:
            yield found


@pytest.fixture
async def system(servers: System, tmp_path: Path) -> AsyncIterator[System]:
    """A node of the test's own."""
    async with one_node(servers, tmp_path) as found:
        yield found


@pytest.fixture
async def second_node(system: System) -> None:
    """Beside the first; it is out until it is wanted."""
    await start_second(system)


@asynccontextmanager
async def one_node(servers: System, folder: Path, **changes: Any) -> AsyncIterator[System]:
    quick = {"heartbeat_seconds": 0.3, "lease_seconds": 10.0, "kill_grace_seconds": 0.5, **changes}
    async with beside(servers, folder, {f"{folder.name}.1": 2}, **quick) as found:
        yield found


async def start_second(system: System) -> None:
    system.start_worker(second(system), 2)
    await system.node_is(second(system))
    await use(system, first(system))


def first(system: System) -> str:
    return system.node


def second(system: System) -> str:
    return f"{system.node[:-1]}2"


async def use(system: System, node: str) -> None:
    """Let jobs start on this node alone."""
    other = second(system) if node == first(system) else first(system)
    await system.api.set_node_state(other, "DRAIN", "not wanted")
    with suppress(ClientError):
        await system.api.set_node_state(node, "RESUME")


async def submitted(system: System, silent: int = 0, **job: Any) -> int:
    names = {"LEDGER": system.folder / "ledger", "GO": system.folder / "go", "SILENT": silent}
    environment = {name: str(value) for name, value in names.items()}
    return (await system.submit(SCRIPT, environment=environment, requeue=True, **job))["job_id"]


def ledger(system: System) -> list[str]:
    path = system.folder / "ledger"
    return path.read_text().splitlines() if path.exists() else []


async def has_begun(system: System, job_id: int, node: str, restart: int = 0) -> None:
    """The script of a restart runs, and has said what it says at first."""

    async def asked() -> bool:
        return f"{job_id} {node} {restart}" in ledger(system)

    await until(asked, f"restart {restart} of job {job_id} has begun on {node}")


def kill_all_of(system: System, node: str) -> None:
    """A power cut of a node: what ran there may have ended, and nobody can tell."""
    for pid in alive_with(str(system.folder / node)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def start_again(system: System, node: str, **environment: str) -> None:
    """Start the worker of a node that lost everything: what may be requeued starts once more."""
    kill_all_of(system, node)
    system.start_worker(node, 2, **environment)


async def ended(system: System, job_id: int) -> tuple[str, int, int]:
    (system.folder / "go").touch()
    job = await system.api.wait(job_id, timeout_seconds=60)
    return job["state"], job["attempt"], job["restart_cnt"]


def said(node: str, restart: int, *, bye: bool = False) -> tuple[bytes, bytes]:
    """What a restart writes to its two streams."""
    out = f"out {restart} of {node}\n" + f"bye {restart}\n" * bye
    return out.encode(), f"err {restart}".encode()


async def parts(system: System, job_id: int, stream: Stream = "stdout") -> list[bytes]:
    """Each attempt's bytes."""
    count = (await system.api.job(job_id))["attempt"]
    return [await system.api.logs(job_id, stream, attempt=number) for number in range(1, count + 1)]


# On one node


async def test_one_node_each_stream_in_its_file(system: System) -> None:
    """While the second attempt runs, and when it is over."""
    node = first(system)
    job_id = await submitted(system, standard_error="errors")
    await has_begun(system, job_id, node)
    assert await parts(system, job_id) == [said(node, 0)[0]]
    await start_again(system, node)
    await has_begun(system, job_id, node, 1)
    assert await parts(system, job_id) == [said(node, 0)[0], said(node, 1)[0]]
    assert await parts(system, job_id, "stderr") == [said(node, 0)[1], said(node, 1)[1]]
    assert await system.api.logs(job_id, attempt=2, offset=4) == said(node, 1)[0][4:]
    assert await ended(system, job_id) == ("COMPLETED", 2, 1)
    assert await parts(system, job_id) == [said(node, 0)[0], said(node, 1, bye=True)[0]]
    assert await system.api.logs(job_id) == said(node, 0)[0] + said(node, 1, bye=True)[0]


async def test_one_node_both_streams_in_one_file(system: System) -> None:
    node = first(system)
    job_id = await submitted(system)
    await has_begun(system, job_id, node)
    for restart in (1, 2):
        await start_again(system, node)
        await has_begun(system, job_id, node, restart)
    assert await ended(system, job_id) == ("COMPLETED", 3, 2)
    expected = [b"".join(said(node, 0)), b"".join(said(node, 1)), b"".join(said(node, 2)) + b"bye 2\n"]
    assert await parts(system, job_id) == await parts(system, job_id, "stderr") == expected
    assert await system.api.logs(job_id) == b"".join(expected)


async def test_one_node_a_file_for_each_restart(system: System) -> None:
    node = first(system)
    job_id = await submitted(system, standard_output="out.%r", standard_error="errors")
    await has_begun(system, job_id, node)
    await start_again(system, node)
    await has_begun(system, job_id, node, 1)
    assert await ended(system, job_id) == ("COMPLETED", 2, 1)
    assert await parts(system, job_id) == [said(node, 0)[0], said(node, 1, bye=True)[0]]
    assert await parts(system, job_id, "stderr") == [said(node, 0)[1], said(node, 1)[1]]


# On two nodes


async def there_and_back(system: System, job_id: int) -> None:
    """Three attempts: on the first node, on the second, and on the first again; all workers live at the end."""
    one, two = first(system), second(system)
    await has_begun(system, job_id, one)
    for restart, (before, after) in enumerate(((one, two), (two, one)), 1):
        await use(system, after)
        await start_again(system, before)
        await has_begun(system, job_id, after, restart)
    assert await ended(system, job_id) == ("COMPLETED", 3, 2)


@pytest.mark.usefixtures("second_node")
async def test_two_nodes_with_disks_of_their_own(system: System) -> None:
    one, two = first(system), second(system)
    job_id = await submitted(system, standard_error="errors")
    await there_and_back(system, job_id)
    outs = [said(one, 0)[0], said(two, 1)[0], said(one, 2, bye=True)[0]]
    assert await parts(system, job_id) == outs
    assert await parts(system, job_id, "stderr") == [said(one, 0)[1], said(two, 1)[1], said(one, 2)[1]]
    assert await system.api.logs(job_id) == outs[0] + outs[2]  # where the last attempt wrote it


@pytest.mark.parametrize("silent", [pytest.param(0, marks=pytest.mark.long), 1])
async def test_two_nodes_that_share_a_disk(servers: System, tmp_path: Path, silent: int) -> None:
    """Also when the first attempt has written nothing to the file."""
    shared = tmp_path / "home"
    async with one_node(servers, tmp_path, allowed_roots=(shared.parent,)) as system:
        await start_second(system)
        one, two = first(system), second(system)
        job_id = await submitted(system, silent, current_working_directory=str(shared))
        await there_and_back(system, job_id)
        expected = [b"".join(said(node, restart)) for node, restart in ((one, 0), (two, 1), (one, 2))]
        expected[:silent] = [b""] * silent
        expected[2] += b"bye 2\n"
        assert await parts(system, job_id) == expected
        assert await system.api.logs(job_id) == b"".join(expected)


# Killed, and cut off


async def stored_of(system: System, job_id: int) -> list[tuple[int, int | None]]:
    """What is stored of a job: the attempts, and where their stdout begins."""
    connection = await asyncpg.connect(system.settings.postgres_dsn)
    try:
        starts = await outputs.starts(connection, job_id)
    finally:
        await connection.close()
    return [(start.attempt, start.stdout_begin) for start in starts if start.restart_cnt is not None]


async def test_a_worker_killed_between_the_offset_and_the_script(system: System) -> None:
    """Its successors start the script in the same attempt, once; the offset stays."""
    node = first(system)
    job_id = await submitted(system, standard_error="errors")
    await has_begun(system, job_id, node)
    await start_again(system, node, ROWLOCK_CRASH="worker.measured")
    err = system.folder / f"worker-{node}.err"

    async def killed() -> bool:
        return err.read_text().count("was killed by signal 9") >= 2

    await until(killed, "two workers have died there")
    begins = [(2, len(said(node, 0)[0]))]
    assert await stored_of(system, job_id) == begins
    assert len(ledger(system)) == 1
    await start_again(system, node)
    await has_begun(system, job_id, node, 1)
    assert await ended(system, job_id) == ("COMPLETED", 2, 1)
    assert len(ledger(system)) == 2
    assert await stored_of(system, job_id) == begins
    assert await parts(system, job_id) == [said(node, 0)[0], said(node, 1, bye=True)[0]]
    assert await parts(system, job_id, "stderr") == [said(node, 0)[1], said(node, 1)[1]]


@asynccontextmanager
async def cut_off_at_the_offset(system: System, job_id: int, fault: Fault) -> AsyncIterator[Proxy]:
    """A restart whose worker has lost PostgreSQL just when it was to store where the output begins."""
    node = first(system)
    await has_begun(system, job_id, node)
    async with proxied(system.settings.postgres_dsn) as wire:
        wire.at(b"INSERT INTO outputs", fault, away=True)
        await start_again(system, node, DATABASE_URL=wire.url)
        await until(lambda: told(wire), "the worker is to store where the output begins")
        yield wire


async def told(wire: Proxy) -> bool:
    return wire.tripped.is_set()


@pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER])
async def test_postgres_away_just_then_is_waited_for(system: System, fault: Fault) -> None:
    node = first(system)
    job_id = await submitted(system)
    async with cut_off_at_the_offset(system, job_id, fault) as wire:
        await says_that_it_waits(system)
        job = await system.api.job(job_id)
        assert (job["state"], job["attempt"], len(ledger(system))) == ("RUNNING", 2, 1)
        await wire.mend()
        await has_begun(system, job_id, node, 1)
        assert await ended(system, job_id) == ("COMPLETED", 2, 1)
        assert len(ledger(system)) == 2
        assert await parts(system, job_id) == [b"".join(said(node, 0)), b"".join(said(node, 1)) + b"bye 1\n"]


async def says_that_it_waits(system: System) -> None:
    err = system.folder / f"worker-{first(system)}.err"

    async def asked() -> bool:
        return "start_waits" in err.read_text()

    await until(asked, "the worker says that a start waits")


async def test_what_ended_meanwhile_is_not_started(system: System) -> None:
    """An operator has called the node DOWN, which is cut off."""
    node = first(system)
    job_id = await submitted(system)
    async with cut_off_at_the_offset(system, job_id, Fault.CUT_BEFORE) as wire:
        await system.api.set_node_state(node, "DOWN", "cut off")
        assert (await system.api.job(job_id))["state"] == "NODE_FAIL"
        await wire.mend()

        async def refused() -> bool:
            return (await system.api.node(node))["stale_writes_refused"] == 1

        await until(refused, "the worker knows")
        await system.api.set_node_state(node, "RESUME")
        other = await submitted(system)
        assert await ended(system, other) == ("COMPLETED", 1, 0)
        assert [line.split()[0] for line in ledger(system)] == [str(job_id), str(other)]
        assert await parts(system, job_id) == [b"".join(said(node, 0)), b""]


async def test_a_worker_that_is_stopped_meanwhile_leaves_the_start_to_the_next_one(system: System) -> None:
    node = first(system)
    job_id = await submitted(system)
    async with cut_off_at_the_offset(system, job_id, Fault.CUT_BEFORE):
        worker = system.children[-1]
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.wait() == 0
    assert len(ledger(system)) == 1
    system.start_worker(node, 2)
    await has_begun(system, job_id, node, 1)
    assert await ended(system, job_id) == ("COMPLETED", 2, 1)
    assert len(ledger(system)) == 2
    assert await parts(system, job_id) == [b"".join(said(node, 0)), b"".join(said(node, 1)) + b"bye 1\n"]


# Whose bytes are whose


def a_start(attempt: int, node: str, begin: int | None = None, restart_cnt: int | None = None) -> Start:
    """A later attempt is a restart, unless told otherwise."""
    count = attempt - 1 if restart_cnt is None else restart_cnt
    return Start(attempt, node, datetime.now(UTC), False, count or None, begin, begin, "/jobs", "nobody")


def bytes_of(starts: list[Start], size: int = 100, pattern: str = "out") -> list[tuple[int, int]]:
    """From where to where each attempt's bytes go, if each file has so many."""
    found = [own_bytes(starts, start.attempt, "stdout", lambda count: pattern.format(count), size) for start in starts]
    return [(part.start, part.stop) if part else (0, 0) for part in found]


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([a_start(1, "a")], [(0, 100)]),
        ([a_start(1, "a"), a_start(2, "a", 30)], [(0, 30), (30, 100)]),
        ([a_start(1, "a"), a_start(2, "a", 0)], [(0, 0), (0, 100)]),
        ([a_start(1, "a"), a_start(2, "a")], [(0, 0), (0, 100)]),
        ([a_start(1, "a"), a_start(2, "a", 100)], [(0, 100), (0, 0)]),
        ([a_start(1, "a"), a_start(2, "a", 120), a_start(3, "a", 10)], [(0, 100), (0, 0), (10, 100)]),
        ([a_start(1, "a"), a_start(2, "b")], [(0, 100), (0, 100)]),
        ([a_start(1, "a"), a_start(2, "b"), a_start(3, "a", 30)], [(0, 30), (0, 100), (30, 100)]),
        ([a_start(1, "a"), a_start(2, "b"), a_start(3, "b", 0, 1)], [(0, 100), (0, 0), (0, 100)]),
        ([a_start(1, "a"), a_start(2, "b", 0)], [(0, 0), (0, 100)]),
        ([a_start(1, "a"), a_start(2, "b", 30), a_start(3, "a", 40)], [(0, 30), (30, 40), (40, 100)]),
        ([a_start(1, "a"), a_start(2, "b", 0), a_start(3, "a", 40)], [(0, 0), (0, 40), (40, 100)]),
    ],
)
def test_where_an_attempt_ends_the_next_one_of_its_file_begins(
    starts: list[Start], expected: list[tuple[int, int]]
) -> None:
    assert bytes_of(starts) == expected
    assert bytes_of(starts, pattern="out.{}")[0] == (0, 100)

"""Storing submissions: held against the nodes there are, in few statements, each by itself when one is bad."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis.asyncio as redis

from core import streams
from core.db.audit import audit
from core.errors import Unavailable
from core.records import NewJob
from services.api import submit
from services.api.problems import Problem
from tests.api import Api, api_of_a_module, check_problem
from tests.builders import a_job, a_node, register, until
from tests.conftest import Databases

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def a_server(
    databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Api]:
    folder = tmp_path_factory.mktemp("api")
    more = {"allowed_roots": (folder / "allowed", folder / "more")}
    async with api_of_a_module(databases, redis_url, folder, **more) as found:
        yield found


@pytest.fixture
async def api(a_server: Api) -> AsyncIterator[Api]:
    """The server on tables that are empty."""
    yield a_server
    assert await audit(a_server.database) == []
    await a_server.database.execute(
        "TRUNCATE jobs, job_specs, idempotency_keys, pending, allocations, job_events, node_leases, nodes"
        " RESTART IDENTITY"
    )


async def transactions(api: Api) -> int:
    """Transactions that stored a job."""
    count: int = await api.database.fetchval("SELECT count(DISTINCT xact) FROM job_events")
    return count


# --- what fits no node


async def test_everything_is_accepted_while_no_node_is_registered(api: Api) -> None:
    assert (await api.submit(cpus_per_task=1_000_000, partition="anything"))["state"] == "PENDING"


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"cpus_per_task": 9}, "/job/cpus_per_task"),
        ({"cpus_per_task": 1_000_000}, "/job/cpus_per_task"),
        ({"tasks": 9}, "/job/tasks"),
        ({"ntasks_per_node": 9}, "/job/tasks"),
        ({"tasks": 3, "cpus_per_task": 3}, "/job/cpus_per_task"),
    ],
)
async def test_more_cpus_than_the_largest_node_has(api: Api, fields: dict[str, int], pointer: str) -> None:
    await register(api.database, a_node("small", 2))
    await register(api.database, a_node("large", 8))
    await register(api.database, a_node("other", 100, partitions=("other",)))
    document = {"job": {"account": "test", **fields}, "script": "#!/bin/sh\n"}
    check_problem(await api.post(document), 422, "the largest node of partition default has 8", pointer)
    assert await api.stored() == 0
    assert (await api.submit(cpus_per_task=8))["cpus"] == 8
    document["job"]["partition"] = "other"
    assert (await api.post(document)).status == (422 if fields.get("cpus_per_task") == 1_000_000 else 201)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE node_leases SET lease_until = now() - interval '1 hour'",
        "UPDATE node_leases SET draining = true",
        "UPDATE nodes SET admin_state = 'DOWN'",
        "UPDATE nodes SET admin_state = 'DRAIN'",
        "DELETE FROM node_leases",
    ],
)
async def test_a_node_counts_whatever_its_state(api: Api, statement: str) -> None:
    await register(api.database, a_node("n1", 8))
    await api.database.execute(statement)
    await api.submit(cpus_per_task=8)
    document = {"job": {"account": "test", "cpus_per_task": 9}, "script": "#!/bin/sh\n"}
    check_problem(await api.post(document), 422, "has 8", "/job/cpus_per_task")


async def test_a_node_that_came_back_smaller_counts_as_it_is_now(api: Api) -> None:
    await register(api.database, a_node("n1", 8))
    await register(api.database, a_node("n1", 2))
    document = {"job": {"account": "test", "cpus_per_task": 3}, "script": "#!/bin/sh\n"}
    check_problem(await api.post(document), 422, "has 2", "/job/cpus_per_task")


async def test_a_partition_that_no_node_has(api: Api) -> None:
    await register(api.database, a_node("n1", partitions=("long", "default")))
    for partition in ("nowhere", "Default", " default"):
        document = {"job": {"account": "test", "partition": partition}, "script": "#!/bin/sh\n"}
        check_problem(await api.post(document), 422, "there is default, long", "/job/partition")
    assert await api.stored() == 0
    assert (await api.submit(partition="long"))["partition"] == "long"


def test_what_fits_by_now_may_be_posted_again() -> None:
    """A node has registered between the statement that took nothing and the look at why."""
    small, large = {"default": 4}, {"default": 8}
    assert isinstance(submit.why_not(a_job(cpus=8), {}, small), Problem)
    for nodes in (large, {}):
        answer = submit.why_not(a_job(cpus=8), {}, nodes)
        assert isinstance(answer, Unavailable)
        assert "post it again" in str(answer)


# --- batches


async def test_what_arrives_together_is_stored_together(api: Api) -> None:
    batch = [a_job(name=f"job {n}") for n in range(200)]
    jobs = [found.job for found in await asyncio.gather(*map(api.state.submitter.submit, batch))]
    assert await transactions(api) == 1
    assert [job.name for job in jobs] == [f"job {n}" for n in range(200)]
    assert len({job.job_id for job in jobs}) == 200
    kept = await api.database.fetch("SELECT job_id, name FROM jobs ORDER BY job_id")
    assert [(row["job_id"], row["name"]) for row in kept] == [(job.job_id, job.name) for job in jobs]


async def test_two_hundred_posts_at_once_are_few_transactions(api: Api) -> None:
    jobs = await asyncio.gather(*(api.submit(name=f"job {n}") for n in range(200)))
    assert [job["name"] for job in jobs] == [f"job {n}" for n in range(200)]
    assert len({job["job_id"] for job in jobs}) == 200
    assert await api.database.fetchval("SELECT count(*) FROM jobs") == 200
    assert await transactions(api) <= 50


@pytest.mark.parametrize(
    "changes",
    [
        {"script": "#!/bin/sh\n\0"},
        {"account": "\ud800"},
        {"comment": "\0"},
        {"tasks": 0},
        {"tasks": 2**31},
        {"tasks": 2**20, "cpus_per_task": 2**20},
        {"memory_mib": -1},
        {"time_limit_seconds": 2**63},
    ],
)
async def test_what_only_the_database_refuses_fails_alone(api: Api, changes: dict[str, Any]) -> None:
    bad = replace(a_job(), **changes)
    batch: list[NewJob] = [a_job(name=f"job {n}") for n in range(5)]
    batch.insert(2, bad)
    results = await asyncio.gather(*map(api.state.submitter.submit, batch), return_exceptions=True)
    refused = results.pop(2)
    assert isinstance(refused, Problem)
    assert refused.status == 422
    assert [found.job.name for found in results if isinstance(found, submit.Accepted)] == [f"job {n}" for n in range(5)]
    assert await api.database.fetchval("SELECT count(*) FROM jobs") == 5


async def test_bad_posts_among_good_ones(api: Api) -> None:
    await register(api.database, a_node("n1", 4))
    good = [{"account": "test"}] * 20
    bad = [{"account": ""}, {"account": "test", "cpus_per_task": 5}, {"account": "test", "partition": "x"}] * 5
    answers = await asyncio.gather(
        *(api.post({"job": job, "script": "#!/bin/sh\n"}) for pair in zip(good, bad, strict=False) for job in pair)
    )
    assert [answer.status for answer in answers] == [201, 422] * 15
    assert await api.database.fetchval("SELECT count(*) FROM jobs") == 15


async def test_large_submissions_go_in_parts(api: Api) -> None:
    script = "#!/bin/sh\n# " + "x" * (submit.PART // 20)
    batch = [a_job(name=f"job {n}", script=script) for n in range(40)]
    found = await asyncio.gather(*map(api.state.submitter.submit, batch))
    assert [one.job.name for one in found] == [f"job {n}" for n in range(40)]
    assert await transactions(api) == 3


@pytest.mark.parametrize(
    ("sizes", "cuts"),
    [([1] * 5, [5]), ([1] * 13, [6, 6, 1]), ([5, 5, 5], [2, 1]), ([99, 1, 1], [1, 2]), ([1, 99, 1], [1, 1, 1])],
)
def test_parts_are_cut_where_they_grow_too_large(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], cuts: list[int]
) -> None:
    monkeypatch.setattr(submit, "PART", 10)
    monkeypatch.setattr(submit, "PART_JOBS", 6)
    batch = [a_job(script="x" * (size - 1), environment={"A": ""}, standard_output="") for size in sizes]
    found = list(submit.parts(batch))
    assert [len(part) for part in found] == cuts
    assert [job for part in found for job in part] == batch


# --- the scheduler hears of it, or a node that has room


@asynccontextmanager
async def listening(api: Api) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Answers how to wait until the scheduler is woken."""
    heard: asyncio.Queue[int] = asyncio.Queue()
    listener = await asyncpg.connect(api.settings.postgres_dsn)

    async def woken() -> None:
        async with asyncio.timeout(10):
            await heard.get()

    try:
        await listener.add_listener("rowlock_wake", lambda *_: heard.put_nowait(1))
        yield woken
    finally:
        await listener.close()


async def told(api: Api, node: str) -> list[tuple[bytes, int]]:
    """What a node was told: kind and job."""
    entries = await api.state.redis.xrange(streams.stream_of(node))
    return [(fields[b"kind"], int(fields[b"job_id"])) for _, fields in entries]


async def test_the_scheduler_is_woken_after_the_commit(api: Api) -> None:
    """No node has room: there is none."""
    async with listening(api) as woken:
        await api.submit()
        await woken()


async def test_the_first_node_with_room_is_told_of_a_job_that_came_alone(api: Api) -> None:
    full, small, first, second = (f"room-{name}" for name in ("a", "b", "c", "d"))
    for node, cpus in ((full, 4), (small, 1), (first, 4), (second, 4)):
        await register(api.database, a_node(node, cpus, partitions=("room",)))
    await api.database.execute("UPDATE nodes SET alloc_cpus = 4 WHERE name = $1", full)
    job = await api.submit(cpus_per_task=2, partition="room")
    await until(lambda: told(api, first))
    assert await told(api, first) == [(b"take", job["job_id"])]
    assert [await told(api, node) for node in (full, small, second)] == [[], [], []]
    await api.database.execute("UPDATE nodes SET alloc_cpus = 0 WHERE name = $1", full)


async def test_the_scheduler_is_woken_for_what_no_node_has_room_for_now(api: Api) -> None:
    await register(api.database, a_node("filled", 2, partitions=("filled",)))
    await api.database.execute("UPDATE nodes SET alloc_cpus = 1 WHERE name = 'filled'")
    async with listening(api) as woken:
        await api.submit(cpus_per_task=2, partition="filled")
        await woken()
    await api.database.execute("UPDATE nodes SET alloc_cpus = 0 WHERE name = 'filled'")
    assert await told(api, "filled") == []


async def test_the_scheduler_is_woken_where_no_node_can_be_told(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    await register(api.database, a_node("deaf", 2, partitions=("deaf",)))

    async def refused(*_: object) -> None:
        raise redis.ConnectionError("no")

    monkeypatch.setattr(streams, "publish", refused)
    async with listening(api) as woken:
        await api.submit(partition="deaf")
        await woken()


async def test_the_scheduler_is_woken_for_many_at_once(api: Api) -> None:
    await register(api.database, a_node("wide", 4, partitions=("wide",)))
    one = {"job": {"account": "test", "partition": "wide"}, "script": "#!/bin/sh\n"}
    async with listening(api) as woken:
        assert (await api.post({"jobs": [one] * 3})).status == 201
        await woken()
    assert await told(api, "wide") == []


# --- a folder's name is looked at, the folder never is


async def test_links_are_not_looked_at(api: Api, tmp_path: Path) -> None:
    """That no link leads out of the allowed folders is the worker's to see; the API goes by the spelling alone."""
    root = api.settings.work_base_dir
    root.mkdir(parents=True)
    (root / "link").symlink_to(tmp_path)
    (tmp_path / "other").symlink_to(root)
    job = await api.submit(current_working_directory=str(root / "link"), standard_output=str(root / "link" / "x"))
    assert job["standard_output"] == str(root / "link" / "x")
    around = {"account": "test", "current_working_directory": str(tmp_path / "other")}
    answer = await api.post({"job": around, "script": "#!/bin/sh\n"})
    check_problem(answer, 422, str(root), "/job/current_working_directory")


@pytest.mark.parametrize("folder", ["allowed", "allowed/below", "more//./x", "data/jobs", "data/jobs/x"])
async def test_every_allowed_folder(api: Api, folder: str) -> None:
    path = f"{api.settings.data_dir.parent}/{folder}"
    job = await api.submit(current_working_directory=path, standard_error=f"{path}/err")
    assert (job["current_working_directory"], job["standard_error"]) == (path, f"{path}/err")
    assert await api.job(job["job_id"]) == job


@pytest.mark.parametrize("folder", ["allowedx", "allowe", "data", "data/job", "."])
async def test_what_is_beside_an_allowed_folder(api: Api, folder: str) -> None:
    around = {"account": "test", "current_working_directory": f"{api.settings.data_dir.parent}/{folder}"}
    answer = await api.post({"job": around, "script": "#!/bin/sh\n"})
    check_problem(answer, 422, "allowed folder", "/job/current_working_directory")

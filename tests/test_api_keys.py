"""`Idempotency-Key`: one key, one job, however often, in whatever spelling and by whatever way it is sent."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any

import asyncpg
import pytest
from multidict import CIMultiDict

from core.db import jobs
from core.db.audit import audit
from core.records import NewJob
from services.api import idempotency, submit
from services.api.models import Site, new_job
from services.api.problems import Problem
from tests.api import JOBS, SCRIPT, Answer, Api, an_api, api_of_a_module, check_problem
from tests.builders import a_job, a_node, register
from tests.conftest import Databases

pytestmark = pytest.mark.anyio

PATIENCE = 20.0
VISIBLE = "".join(map(chr, range(0x21, 0x7F)))


@pytest.fixture(scope="module")
async def a_server(
    databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Api]:
    async with api_of_a_module(databases, redis_url, tmp_path_factory.mktemp("api")) as found:
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


async def post(api: Api, *keys: str, document: object = None, **job: Any) -> Answer:
    """Submit under these keys; each stands in a header of its own."""
    sent = document or {"job": {"account": "test", **job}, "script": SCRIPT}
    headers = CIMultiDict({"Content-Type": "application/json"})
    for key in keys:
        headers.add("Idempotency-Key", key)
    return await api.ask("POST", JOBS, data=BytesIO(json.dumps(sent).encode()), headers=headers)


async def counts(api: Api) -> tuple[int, int]:
    """Jobs, and keys."""
    row = await api.database.fetchrow("SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM idempotency_keys)")
    assert row is not None
    return row[0], row[1]


# --- what is a key


@pytest.mark.parametrize("key", ["k", '"8e03978e-40d5-43dd-bc93-6894a57f9324"', VISIBLE, "x" * 255, "a,b"])
async def test_a_key(api: Api, key: str) -> None:
    first, second = await post(api, key), await post(api, key)
    assert (first.status, second.status) == (201, 200)
    assert await api.database.fetchval("SELECT key FROM idempotency_keys") == key


@pytest.mark.parametrize("keys", [("",), ("x" * 256,), ("a b",), ("ü",), ("a\tb",), ("a", "b"), ("a", "a"), ("", "a")])
async def test_what_is_no_key(api: Api, keys: tuple[str, ...]) -> None:
    check_problem(await post(api, *keys), 400, "1 to 255 visible ASCII characters")
    assert await api.stored() == 0


# --- the same job again


async def test_the_same_again_is_the_same_job_as_it_is_now(api: Api) -> None:
    first = await post(api, "k", name="one")
    assert (first.status, "Idempotent-Replay" in first.headers) == (201, False)
    second = await post(api, "k", name="one")
    assert (second.status, second.headers["Idempotent-Replay"]) == (200, "true")
    assert second.json == first.json
    assert second.headers["Location"] == first.headers["Location"] == f"{JOBS}/{first.json['job_id']}"
    await api.ask("DELETE", f"{JOBS}/{first.json['job_id']}")
    third = await post(api, "k", name="one")
    assert (third.status, third.json["state"]) == (200, "CANCELLED")
    assert third.json == await api.job(first.json["job_id"])
    assert await counts(api) == (1, 1)


async def test_without_a_key_each_is_a_job(api: Api) -> None:
    first, second = await post(api), await post(api)
    assert (first.status, second.status) == (201, 201)
    assert await counts(api) == (2, 0)


async def test_a_key_is_of_its_account(api: Api) -> None:
    answers = [await post(api, "k", account=account) for account in ("a", "b", "a")]
    assert [answer.status for answer in answers] == [201, 201, 200]
    assert answers[2].json == answers[0].json
    assert await counts(api) == (2, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"cpus_per_task": 2},
        {"cpus_per_task": 1},  # said, so that the script sees SLURM_CPUS_PER_TASK
        {"partition": "other"},
        {"time_limit": 1},
        {"environment": {"A": "1"}},
        {"requeue": True},
        {"comment": "x"},
        {"document": {"job": {"account": "test"}, "script": SCRIPT + "\n"}},
    ],
)
async def test_another_job_under_the_key_is_refused(api: Api, changes: dict[str, Any]) -> None:
    first = await post(api, "k")
    answer = await post(api, "k", **changes)
    check_problem(answer, 422, f"stands for another job, {first.json['job_id']}")
    assert await counts(api) == (1, 1)
    assert (await post(api, "k")).status == 200


async def test_a_refused_job_does_not_use_its_key_up(api: Api) -> None:
    await register(api.database, a_node("n1", 4))
    check_problem(await post(api, "k", cpus_per_task=5), 422, "the largest node", "/job/cpus_per_task")
    check_problem(await post(api, "k", nonsense=1), 422, "unknown field", "/job/nonsense")
    assert await api.stored() == 0
    await register(api.database, a_node("n2", 8))
    assert (await post(api, "k", cpus_per_task=5)).status == 201
    await api.database.execute("DELETE FROM node_leases; DELETE FROM nodes WHERE name = 'n2'")
    assert (await post(api, "k", cpus_per_task=5)).status == 200  # what is stored is no more held against the nodes


async def test_a_key_is_kept_over_a_restart(api: Api) -> None:
    first = await post(api, "k")
    async with an_api(api.settings) as other:
        again = await post(other, "k")
    assert (again.status, again.json) == (200, first.json)


# --- what is the same job

SITE = Site(roots=(PurePosixPath("/jobs"),), default_partition="default", user="nobody")
FULL: dict[str, Any] = {
    "account": "test",
    "name": "job",
    "tasks_per_node": 2,
    "memory_per_node": 4096,
    "time_limit": 90,
    "environment": {"A": "1", "B": "2"},
    "current_working_directory": "/jobs/x",
}


def digest_of(site: Site = SITE, **job: Any) -> bytes:
    """The digest of a job that came with a key; its script stands beside it unless it is in it."""
    document = {"job": job} if "script" in job else {"job": job, "script": SCRIPT}
    digest = new_job(document, site, "k").digest
    assert digest is not None
    return digest


@pytest.mark.parametrize(
    "spelled",
    [
        dict(reversed(FULL.items())),
        {**FULL, "environment": ["B=2", "A=1"]},
        {**FULL, "time_limit": "1:30:00"},
        {**FULL, "time_limit": 90.0},
        {**FULL, "memory_per_node": "4G"},
        {**{key: value for key, value in FULL.items() if key not in ("tasks_per_node", "name")}, "ntasks_per_node": 2},
        {**FULL, "tasks": 2, "ntasks_per_node": 2},
        {**FULL, "requeue": False, "comment": None, "standard_output": "slurm-%j.out", "priority": None, "nodes": 1},
    ],
)
def test_the_spelling_does_not_matter(spelled: dict[str, Any]) -> None:
    assert digest_of(**spelled) == digest_of(**FULL)
    assert digest_of(**spelled, script=SCRIPT) == digest_of(**FULL)


def test_a_default_that_a_setting_fills_in_is_left_as_it_was_asked_for() -> None:
    other = Site(roots=(PurePosixPath("/"),), default_partition="other", user="me")
    assert new_job({"job": FULL, "script": SCRIPT}, other).partition == "other"
    assert digest_of(other, **FULL) == digest_of(SITE, **FULL)
    said = {**FULL, "partition": "default"}
    assert digest_of(other, **said) == digest_of(SITE, **said) != digest_of(SITE, **FULL)


def test_without_a_key_there_is_no_digest() -> None:
    plain = new_job({"job": FULL, "script": SCRIPT}, SITE)
    assert (plain.key, plain.digest) == (None, None)


CANONICAL = (
    r'{"account":"test","comment":"\u00fc\n","cpus_per_task":1,"current_working_directory":"/jobs/x",'
    r'"environment":{"A":"1","B":"2"},"memory_mib":4096,"name":"job","script":"#!/bin/sh\necho hello\n",'
    r'"standard_output":"slurm-%j.out","tasks":2,"tasks_per_node_given":true,"time_limit_seconds":5400}'
)


def test_the_canonical_form_is_what_it_was() -> None:
    """Keys live as long as their jobs, over releases: who changes the form gives it another version."""
    assert digest_of(**FULL, comment="ü\n") == b"\x01" + hashlib.sha256(CANONICAL.encode()).digest()


def test_digests_of_two_versions_are_not_told_apart() -> None:
    one, other = digest_of(account="a"), digest_of(account="b")
    assert idempotency.is_same(one, one)
    assert not idempotency.is_same(one, other)
    assert idempotency.is_same(b"\x02" + other[1:], one)


def test_every_field_of_a_job_is_in_the_digest() -> None:
    plain = a_job()
    changed: dict[str, Any] = {
        "name": "other", "account": "other", "partition": "other", "tasks": 2, "cpus_per_task": 2, "memory_mib": 1,
        "time_limit_seconds": 1, "requeue": True, "script": "#!x", "environment": {"A": ""},
        "current_working_directory": "x", "standard_output": "x", "standard_error": "x", "comment": "x",
        "cpus_per_task_given": False, "tasks_per_node_given": True,
    }  # fmt: skip
    assert set(changed) == {name for name in NewJob.__dataclass_fields__ if name not in ("key", "digest")}
    digests = {idempotency.digest(a_job(**{name: value})) for name, value in changed.items()}
    assert len(digests | {idempotency.digest(plain)}) == len(changed) + 1


# --- at once


def keyed(key: str, **changes: Any) -> NewJob:
    plain = a_job(**changes)
    return a_job(**{**changes, "key": key, "digest": idempotency.digest(plain)})


async def test_the_same_key_many_times_in_one_batch(api: Api) -> None:
    batch = [keyed(f"k{n % 3}") for n in range(60)]
    batch.insert(30, keyed("k0", name="another"))
    batch += [a_job() for _ in range(5)]
    results = await asyncio.gather(*map(api.state.submitter.submit, batch), return_exceptions=True)
    refused = results.pop(30)
    assert isinstance(refused, Problem)
    assert refused.status == 422
    found = [result for result in results if isinstance(result, submit.Accepted)]
    assert len(found) == 65
    assert sum(not result.replayed for result in found) == 3 + 5
    assert [len({result.job.job_id for result in found[n:60:3]}) for n in range(3)] == [1, 1, 1]
    assert await counts(api) == (8, 3)
    assert await api.database.fetchval("SELECT count(DISTINCT xact) FROM job_events") == 1


async def test_one_bad_keyed_job_fails_alone(api: Api) -> None:
    batch = [keyed("a"), keyed("b", comment="\0"), keyed("c"), a_job()]
    results = await asyncio.gather(*map(api.state.submitter.submit, batch), return_exceptions=True)
    assert [isinstance(result, submit.Accepted) for result in results] == [True, False, True, True]
    assert await counts(api) == (3, 2)


async def test_two_apis_at_once(api: Api) -> None:
    """Every key by both, several times, over real HTTP: one 201 and one job each."""
    async with an_api(api.settings) as other:
        answers = await asyncio.gather(
            *(post(one, f"k{n}", name=f"job {n}") for n in range(100) for one in (api, other, other, api))
        )
    assert {answer.status for answer in answers} == {200, 201}
    assert sum(answer.status == 201 for answer in answers) == 100
    assert await counts(api) == (100, 100)


@pytest.fixture
async def holder(api: Api) -> AsyncIterator[asyncpg.Connection]:
    """Another API's connection."""
    found = await asyncpg.connect(api.settings.postgres_dsn)
    yield found
    await found.close()


WAITS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


@pytest.mark.parametrize("commits", [True, False])
async def test_a_key_that_another_api_holds_uncommitted(api: Api, holder: asyncpg.Connection, commits: bool) -> None:
    """It waits for that one, and sees what became of it only in a statement of its own."""
    transaction = holder.transaction()
    await transaction.start()
    [theirs] = await jobs.insert(holder, [keyed("k")])
    assert theirs is not None
    posting = asyncio.create_task(api.state.submitter.submit(keyed("k")))
    async with asyncio.timeout(PATIENCE):
        while not await api.database.fetchval(WAITS):  # noqa: ASYNC110 - a lock has no event
            await asyncio.sleep(0.01)
    assert not posting.done()
    await (transaction.commit() if commits else transaction.rollback())
    found = await posting
    assert (found.replayed, found.job.job_id == theirs.job_id) == (commits, commits)
    assert await counts(api) == (1, 1)


async def test_batches_that_share_keys_do_not_deadlock(api: Api) -> None:
    """In whatever order their keys come."""
    async with AsyncExitStack() as stack:
        apis = [api, *[await stack.enter_async_context(an_api(api.settings)) for _ in range(2)]]
        for turn in range(10):
            names = [f"{turn}-{n}" for n in range(100)]
            orders = (names, names[::-1], names[50:] + names[:50])
            sent = [(one, name) for one, order in zip(apis, orders, strict=True) for name in order]
            results = await asyncio.gather(*(one.state.submitter.submit(keyed(name)) for one, name in sent))
            assert sum(not result.replayed for result in results) == 100
    assert await counts(api) == (1000, 1000)

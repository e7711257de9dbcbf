"""Many jobs in one request: all of them or none, in their order, and once."""

import asyncio
import json
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr

from core.client import Client, ClientError
from core.settings import Settings
from services.api import guard, lists, models, submit
from services.api.problems import Problem
from tests.api import JOBS, SCRIPT, Answer, Api, an_api, check_problem, until
from tests.builders import a_job, a_node, allocate, register
from tests.proxy import Fault, proxied

pytestmark = pytest.mark.anyio


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[Api]:
    async with an_api(settings) as found:
        yield found


def item(**job: Any) -> dict[str, Any]:
    return {"job": {"account": "test", **job}, "script": SCRIPT}


async def post(api: Api, *items: Any, key: str | None = None, **beside: Any) -> Answer:
    headers = {"Content-Type": "application/json", **({} if key is None else {"Idempotency-Key": key})}
    body = json.dumps({"jobs": list(items), **beside}).encode()
    return await api.ask("POST", JOBS, data=BytesIO(body), headers=headers)


async def accepted(api: Api, *items: Any, status: int = 201, key: str | None = None) -> list[int]:
    answer = await post(api, *items, key=key)
    assert answer.status == status, answer.body
    assert (answer.headers.get("Idempotent-Replay") == "true") == (status == 200)
    return [job["job_id"] for job in answer.json["jobs"]]


async def names(api: Api) -> list[str]:
    return [row[0] for row in await api.database.fetch("SELECT name FROM jobs ORDER BY job_id")]


async def test_a_list_is_stored_in_its_order_by_one_commit(api: Api) -> None:
    ids = await accepted(api, *(item(name=f"job {n}", cpus_per_task=1 + n % 3) for n in range(300)))
    assert await api.database.fetchval(
        "SELECT count(DISTINCT xmin::text) FROM"
        " (SELECT xmin FROM jobs UNION ALL SELECT xmin FROM job_specs UNION ALL SELECT xmin FROM pending) AS stored"
    ) == 1  # fmt: skip
    assert len(set(ids)) == 300
    assert [(await api.job(job_id))["name"] for job_id in (ids[0], ids[17], ids[-1])] == ["job 0", "job 17", "job 299"]
    assert await names(api) == [f"job {n}" for n in range(300)]
    assert await api.database.fetchval("SELECT count(*) FROM pending") == 300


async def test_the_largest_list_and_one_more(api: Api) -> None:
    items = [item() for _ in range(lists.MAX_JOBS + 1)]
    check_problem(await post(api, *items), 422, "should hold 1 to 10000 jobs, and holds 10001", "/jobs")
    assert await api.stored() == 0
    assert len(await accepted(api, *items[1:])) == lists.MAX_JOBS


async def test_it_is_scheduled(api: Api) -> None:
    await register(api.database, a_node(cpus=3))
    ids = await accepted(api, item(), item(), item(), item())
    assert [attempt.job_id for attempt in await allocate(api.database)] == ids[:3]


@pytest.mark.parametrize(
    ("wrong", "pointer", "detail"),
    [
        ({"job": {"account": "test"}}, "/jobs/1/script", "required"),
        ({"job": {}, "script": SCRIPT}, "/jobs/1/job/account", "required"),
        (item(cpus_per_task=0), "/jobs/1/job/cpus_per_task", "greater than or equal to 1"),
        (item(colour="red"), "/jobs/1/job/colour", "unknown field"),
        (item(cpus_per_task=99), "/jobs/1/job/cpus_per_task", "the largest node of partition default has 4"),
        (item(partition="nowhere"), "/jobs/1/job/partition", "unknown partition"),
        (item(environment={"1": "2"}), "/jobs/1/job/environment/1", "the name of a variable"),
        ({"jobs": [item()]}, "/jobs/1/jobs", "unknown field"),
        ("job", "/jobs/1", "should be an object"),
        (None, "/jobs/1", "should be an object"),
    ],
)
async def test_one_that_is_wrong_and_none_is_stored(api: Api, wrong: Any, pointer: str, detail: str) -> None:
    await register(api.database, a_node())
    check_problem(await post(api, item(), wrong, item()), 422, detail, pointer)
    assert await api.stored() == 0


async def test_all_that_is_wrong_is_said_at_once(api: Api) -> None:
    problem = check_problem(await post(api, item(tasks=0), item(), item(name=""), item(tasks=-1)), 422)
    assert [fault["pointer"] for fault in problem["errors"]] == [
        "/jobs/0/job/tasks",
        "/jobs/2/job/name",
        "/jobs/3/job/tasks",
    ]
    problem = check_problem(await post(api, *[item(tasks=0)] * 101), 422, "101 faults, the first 100 of them here")
    assert len(problem["errors"]) == 100


@pytest.mark.parametrize("several", [None, {}, "jobs", 3, []])
async def test_what_is_no_list(api: Api, several: Any) -> None:
    check_problem(await api.post({"jobs": several}), 422, "should", "/jobs")


async def test_a_list_and_a_job_beside_it(api: Api) -> None:
    problem = check_problem(await post(api, item(), job={"account": "test"}, script=SCRIPT), 422)
    assert [fault["pointer"] for fault in problem["errors"]] == ["/job", "/script"]


async def test_a_script_that_is_too_large_is_named(api: Api) -> None:
    large = {"job": {"account": "test"}, "script": "#!" + "x" * 1024 * 1024}
    check_problem(await post(api, item(), large), 413, "at most 1 MiB of UTF-8", "/jobs/1/script")
    assert await api.stored() == 0


async def test_a_list_may_be_larger_than_a_job(api: Api) -> None:
    """And is stored in parts, in one transaction."""
    script = "#!/bin/sh\n# " + "x" * 1_000_000
    items = [{"job": {"account": "test", "name": f"job {n}"}, "script": script} for n in range(20)]
    assert len(await accepted(api, *items)) == 20
    assert await names(api) == [f"job {n}" for n in range(20)]
    assert await api.database.fetchval("SELECT count(DISTINCT xact) FROM job_events") == 1
    one = {"job": {"account": "test", "comment": "x" * guard.MAX_BODY}, "script": SCRIPT}
    check_problem(await api.post(one), 413, "at most 8 MiB, or 64 MiB for a list of jobs")
    check_problem(await api.post("x" * guard.MAX_LIST_BODY), 413, "at most 8 MiB, or 64 MiB for a list of jobs")


async def test_a_large_list_that_is_none_is_told_where(api: Api) -> None:
    body = json.dumps({"jobs": [item()] * lists.MAX_JOBS}).encode() + b" " * guard.MAX_BODY
    for wrong, status, detail in ((body[1:], 400, "is no JSON"), (body + b"}", 400, "Extra data"), (body, 201, "")):
        answer = await api.ask("POST", JOBS, data=BytesIO(wrong), headers={"Content-Type": "application/json"})
        assert (answer.status, detail in answer.body.decode()) == (status, True), answer.body[:300]


async def test_a_list_of_unknown_length_is_no_larger_than_a_job(api: Api) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(9):
            yield b" " * 1024 * 1024

    answer = await api.ask("POST", JOBS, data=pieces(), headers={"Content-Type": "application/json"})
    check_problem(answer, 413, "64 MiB for a list of jobs that says its Content-Length")


async def test_what_takes_no_list_takes_no_more_than_before(api: Api) -> None:
    body = BytesIO(b" " * (guard.MAX_BODY + 1))
    headers = {"Content-Type": "application/json"}
    check_problem(await api.ask("POST", f"{JOBS}/1/cancel", data=body, headers=headers), 413, "at most 8 MiB")


async def test_much_that_is_wrong_is_looked_at_in_part(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = 0
    plain = models.new_job

    def counted(*arguments: Any) -> Any:
        nonlocal looked
        looked += 1
        return plain(*arguments)

    monkeypatch.setattr(models, "new_job", counted)
    check_problem(await post(api, *[item(tasks=0)] * 5000), 422, "101 faults")
    assert looked == 101
    beside = {f"x{n}": 1 for n in range(1000)}
    problem = check_problem(await post(api, item(), **beside), 422, "1 fault")
    assert "has 1001 fields" in problem["errors"][0]["detail"]


async def test_a_list_waits_for_others_and_not_for_ever(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "PATIENCE_SECONDS", 0.05)
    large = [{"job": {"account": "test"}, "script": "#!/bin/sh\n# " + "x" * 1_000_000}] * 9
    async with api.state.submitter._lists:
        check_problem(await post(api, item()), 503, "other lists of jobs are being stored")
        await api.submit()
    for _ in range(lists.LARGE_LISTS):
        await api.state.large.acquire()
    check_problem(await post(api, *large), 503, "other large lists of jobs are being stored")
    assert len(await accepted(api, item())) == 1
    api.state.large.release()
    assert len(await accepted(api, *large)) == 9


async def test_a_part_that_fails_takes_all_of_it_back(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    await register(api.database, a_node())
    monkeypatch.setattr(submit, "PART", 200)
    check_problem(await post(api, *[item()] * 40, item(tasks=5)), 422, "has 4", "/jobs/40/job/tasks")
    assert await api.stored() == 0
    assert len(await accepted(api, *[item()] * 40)) == 40


async def test_what_only_the_database_refuses_stores_nothing(api: Api) -> None:
    with pytest.raises(Problem, match="the database refuses a value") as refused:
        await api.state.submitter.submit_all([a_job(), a_job(comment="\0"), a_job()])
    assert refused.value.status == 422
    assert await api.stored() == 0


# --- one key for the list


async def test_a_list_that_is_sent_twice_is_stored_once(api: Api) -> None:
    items = [item(name=f"job {n}") for n in range(7)]
    await accepted(api, item())
    ids = await accepted(api, *items, key="k")
    await accepted(api, item())
    assert await accepted(api, *items, key="k", status=200) == ids
    assert (await post(api, *items[:6], key="k")).status == 422
    assert (await post(api, *items[::-1], key="k")).status == 422
    assert (await post(api, *items[:1], key="k")).status == 422
    assert len(await names(api)) == 9


async def test_a_list_and_a_job_do_not_share_a_key(api: Api) -> None:
    headers = {"Content-Type": "application/json", "Idempotency-Key": "k"}
    [job_id] = await accepted(api, item(), key="k")
    one = json.dumps(item()).encode()
    answer = await api.ask("POST", JOBS, data=BytesIO(one), headers=headers)
    check_problem(answer, 422, f"stands for another job, {job_id}")
    headers["Idempotency-Key"] = "other"
    single = (await api.ask("POST", JOBS, data=BytesIO(one), headers=headers)).json["job_id"]
    check_problem(await post(api, item(), key="other"), 422, f"stands for another job, {single}")
    assert len(await names(api)) == 2


async def test_a_key_belongs_to_one_account(api: Api) -> None:
    others = [item(), item(account="other"), item(), item(account="third")]
    problem = check_problem(await post(api, *others, key="k"), 422, "differs from test", "/jobs/1/job/account")
    assert len(problem["errors"]) == 2
    assert await api.stored() == 0
    assert len(await accepted(api, *others)) == 4


async def test_at_once_under_one_key_it_is_stored_once(api: Api) -> None:
    """Beside single jobs, whose numbers come in between."""
    items = [item(name=f"job {n}") for n in range(50)]
    answers, _ = await asyncio.gather(
        asyncio.gather(*(post(api, *items, key="k") for _ in range(6))),
        asyncio.gather(*(api.submit(name="single") for _ in range(60))),
    )
    assert sorted(answer.status for answer in answers) == [200] * 5 + [201]
    assert len({answer.body for answer in answers}) == 1
    ids = [job["job_id"] for job in answers[0].json["jobs"]]
    stored = await api.database.fetch("SELECT name FROM jobs WHERE job_id = ANY ($1) ORDER BY job_id", ids)
    assert [row["name"] for row in stored] == [f"job {n}" for n in range(50)]
    assert len(await names(api)) == 110


async def test_the_numbers_of_a_list_may_have_others_between_them(api: Api) -> None:
    """As where another statement takes numbers at the same time."""
    await api.database.execute("ALTER TABLE jobs ALTER job_id SET INCREMENT BY 3")
    items = [item() for _ in range(5)]
    ids = await accepted(api, *items, key="k")
    await api.database.execute("ALTER TABLE jobs ALTER job_id SET INCREMENT BY 1 RESTART WITH 2")
    between = [(await api.submit())["job_id"] for _ in range(2)]
    await api.database.execute("ALTER TABLE jobs ALTER job_id RESTART WITH 5")
    between += await accepted(api, item(), item())
    assert (ids, between) == ([1, 4, 7, 10, 13], [2, 3, 5, 6])
    await api.database.execute("ALTER TABLE jobs ALTER job_id RESTART WITH 100")
    assert await accepted(api, *items, key="k", status=200) == ids


# --- lost answers, and the client


@pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER])
async def test_a_commit_whose_answer_is_lost_is_found(
    settings: Settings, connection: asyncpg.Connection, fault: Fault
) -> None:
    async with (
        proxied(settings.postgres_dsn) as wire,
        an_api(settings.model_copy(update={"database_url": SecretStr(wire.url)})) as api,
    ):
        await api.submit(name="single")
        wire.at(b"COMMIT", fault)
        listing = asyncio.create_task(accepted(api, *(item(name=f"job {n}") for n in range(20))))
        while not listing.done():  # others have a connection of their own, which goes on
            await api.submit(name="single")
        ids = await listing
        assert wire.tripped.is_set()
        await until(lambda: api.state.database.is_open)
    rows = await connection.fetch("SELECT job_id, name FROM jobs WHERE name <> 'single' ORDER BY job_id")
    assert [(row["job_id"], row["name"]) for row in rows] == [(job_id, f"job {n}") for n, job_id in enumerate(ids)]


@pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER])
async def test_the_client_sends_a_list_again(api: Api, fault: Fault) -> None:
    async with proxied(api.address) as wire, Client(wire.url, timeout_seconds=5) as client:
        wire.at(b"POST", fault)
        ids = await client.submit_many([({"account": "test", "name": f"job {n}"}, SCRIPT) for n in range(5)])
        assert await names(api) == [f"job {n}" for n in range(5)]
        assert [(await client.job(job_id))["name"] for job_id in ids] == [f"job {n}" for n in range(5)]
        with pytest.raises(ClientError, match=r"^1 fault; /jobs/1/job/account: required$"):
            await client.submit_many([({"account": "test"}, SCRIPT), ({}, SCRIPT)])

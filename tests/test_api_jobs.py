"""Jobs and nodes over HTTP: submitted, read, listed, cancelled."""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import pytest
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from core import __version__, streams
from core.db import allocations
from core.records import Attempt, Placement
from core.states import State
from services.api.app import ROUTES
from tests.api import JOBS, SCRIPT, Api, api_of_a_module, check_problem
from tests.builders import a_node, finish, give, register, start
from tests.conftest import Databases

pytestmark = pytest.mark.anyio

# The guide's request, byte for byte as curl sends it.
GUIDE = rb"""{
  "job": {"name": "migration-test", "account": "test", "cpus_per_task": 1, "ntasks_per_node": 1},
  "script": "#!/bin/bash\necho Migration successful!\nsleep 5"}"""

_numbers = itertools.count()

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


@pytest.fixture(scope="module")
async def api(databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    async with api_of_a_module(databases, redis_url, tmp_path_factory.mktemp("api")) as found:
        await register(found.database, a_node("big", 1_000_000, partitions=("default", "long")))
        yield found


@pytest.fixture
async def node(api: Api) -> str:
    """A node of the test's own with 4 CPUs."""
    name = f"n{next(_numbers)}"
    await register(api.database, a_node(name, partitions=("default", "long")))
    return name


async def a_started(api: Api, node: str, **fields: Any) -> Attempt:
    """A job that runs on the node."""
    attempt = await give(api.database, (await api.submit(**fields))["job_id"], node)
    assert await start(api.database, attempt, node=node)
    return attempt


# --- submit and read


async def test_the_guides_request_works_letter_for_letter(api: Api) -> None:
    headers = {"Content-Type": "application/json", "Accept": "*/*", "User-Agent": "curl/8.5.0"}
    answer = await api.ask("POST", JOBS, data=GUIDE, headers=headers)
    assert answer.status == 201
    assert answer.headers["Content-Type"].startswith("application/json")
    job = answer.json
    job_id, submit_time = job["job_id"], job["submit_time"]
    assert type(job_id) is int
    assert answer.headers["Location"] == f"{JOBS}/{job_id}"
    assert RFC3339.fullmatch(submit_time)
    assert job == {
        "job_id": job_id,
        "name": "migration-test",
        "account": "test",
        "partition": "default",
        "state": "PENDING",
        "state_reason": "None",
        "state_description": None,
        "tasks": 1,
        "cpus_per_task": 1,
        "tasks_per_node": 1,
        "cpus": 1,
        "memory_per_node": None,
        "time_limit": "UNLIMITED",
        "time_limit_seconds": None,
        "requeue": False,
        "nodes": [],
        "batch_host": None,
        "node_unreachable": False,
        "attempt": 0,
        "restart_cnt": 0,
        "submit_time": submit_time,
        "allocate_time": None,
        "start_time": None,
        "end_time": None,
        "cancel_requested_time": None,
        "exit_code": None,
        "signal": None,
        "current_working_directory": None,
        "standard_output": "slurm-%j.out",
        "standard_error": None,
        "comment": None,
    }
    assert (await api.get(answer.headers["Location"])).json == job
    script = await api.get(f"{JOBS}/{job_id}/script")
    assert script.body == b"#!/bin/bash\necho Migration successful!\nsleep 5"
    assert script.headers["Content-Type"] == "text/plain; charset=utf-8"


async def test_everything_that_may_be_asked_for_is_stored(api: Api) -> None:
    root = api.settings.work_base_dir
    job = await api.submit(
        "#!/usr/bin/env python3\r\n# a carriage return\n"[:22] + "\nprint('ü \U0001f680 \x7f')\r\n",
        name="näme \U0001f680 %x",
        partition="long",
        comment="two\nlines\tand \U0001f680",
        tasks=2,
        tasks_per_node=2,
        ntasks_per_node=2,
        cpus_per_task=2,
        memory_per_node="2g",
        time_limit=1.5,
        requeue=True,
        environment=["A=1", "B=", "_c=x=y\nz"],
        current_working_directory=f"{root}/here",
        standard_output="logs/%x-%4j.out",
        standard_error=f"{root}/errors/%j",
    )
    assert job == await api.job(job["job_id"])
    shown = {key: job[key] for key in ("name", "comment", "tasks", "tasks_per_node", "cpus_per_task", "cpus")}
    assert shown == {
        "name": "näme \U0001f680 %x",
        "comment": "two\nlines\tand \U0001f680",
        "tasks": 2,
        "tasks_per_node": 2,
        "cpus_per_task": 2,
        "cpus": 4,
    }
    assert job["memory_per_node"] == 2048
    assert (job["time_limit"], job["time_limit_seconds"], job["requeue"]) == ("0:01:30", 90, True)
    assert job["standard_output"] == "logs/%x-%4j.out"
    assert job["standard_error"] == f"{root}/errors/%j"
    assert job["current_working_directory"] == f"{root}/here"
    kept = await api.database.fetchrow("SELECT * FROM job_specs WHERE job_id = $1", job["job_id"])
    assert kept["environment"] == '{"A": "1", "B": "", "_c": "x=y\\nz"}'
    assert (kept["cpus_per_task_given"], kept["tasks_per_node_given"]) == (True, True)
    assert (await api.get(f"{JOBS}/{job['job_id']}/script")).body.decode().endswith("print('ü \U0001f680 \x7f')\r\n")


@pytest.mark.parametrize("limit", ["0:01:30", "1-02:00:00", "UNLIMITED", "59:59:59"])
async def test_a_time_limit_can_be_posted_again_as_it_is_shown(api: Api, limit: str) -> None:
    first = await api.submit(time_limit=limit)
    again = await api.submit(time_limit=first["time_limit"])
    assert again["time_limit_seconds"] == first["time_limit_seconds"]


@pytest.mark.parametrize(
    ("fields", "tasks", "cpus"),
    [
        ({}, 1, 1),
        ({"tasks": 3}, 3, 3),
        ({"tasks_per_node": 3}, 3, 3),
        ({"ntasks_per_node": 3, "cpus_per_task": 2}, 3, 6),
        ({"tasks": 3, "ntasks_per_node": 3}, 3, 3),
        ({"cpus_per_task": 1_000_000}, 1, 1_000_000),
    ],
)
async def test_tasks_in_all_spellings_are_one_number(api: Api, fields: dict[str, int], tasks: int, cpus: int) -> None:
    job = await api.submit(**fields)
    assert (job["tasks"], job["tasks_per_node"], job["cpus"]) == (tasks, tasks, cpus)


async def test_defaults(api: Api) -> None:
    job = await api.submit()
    assert (job["name"], job["tasks"], job["cpus_per_task"], job["partition"]) == ("job", 1, 1, "default")


@pytest.mark.parametrize("place", ["top", "job", "both"])
async def test_a_script_stands_at_the_top_or_in_the_job(api: Api, place: str) -> None:
    top = {} if place == "job" else {"script": SCRIPT}
    inner = {} if place == "top" else {"script": SCRIPT}
    answer = await api.post({"job": {"account": "test", **inner}, **top})
    assert answer.status == 201
    assert (await api.get(f"{answer.headers['Location']}/script")).body.decode() == SCRIPT


async def test_a_script_of_exactly_one_mebibyte(api: Api) -> None:
    script = "#!/bin/sh\n" + "ü" * ((1024 * 1024 - 10) // 2)
    job = await api.submit(script)
    assert (await api.get(f"{JOBS}/{job['job_id']}/script")).body == script.encode()


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "Application/JSON", "application/json;charset=utf-8", 'application/json ; charset="UTF-8"'],
)
async def test_content_types_that_say_json(api: Api, content_type: str) -> None:
    answer = await api.ask("POST", JOBS, data=GUIDE, headers={"Content-Type": content_type})
    assert answer.status == 201


async def test_a_body_in_chunks(api: Api) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for byte in GUIDE:
            yield bytes([byte])

    answer = await api.ask("POST", JOBS, data=chunks(), headers={"Content-Type": "application/json"})
    assert answer.status == 201


async def test_a_client_that_asks_before_it_sends(api: Api) -> None:
    headers = {"Content-Type": "application/json"}
    assert (await api.ask("POST", JOBS, data=GUIDE, headers=headers, expect100=True)).status == 201


async def test_the_life_of_a_job_is_shown(api: Api, node: str) -> None:
    root = str(api.settings.work_base_dir)
    await register(api.database, a_node(node, work_base_dir=root, job_user="alice"))
    job = await api.submit(name="life", standard_output="%x-%u-%j.out")
    job_id = job["job_id"]
    attempt = await give(api.database, job_id, node)
    placed = await api.job(job_id)
    assert (placed["state"], placed["nodes"], placed["batch_host"]) == ("CONFIGURING", [node], node)
    assert placed["attempt"] == 1
    assert placed["standard_output"] == f"{root}/{job_id}/life-alice-{job_id}.out"
    assert placed["standard_error"] == placed["standard_output"]
    assert placed["current_working_directory"] == f"{root}/{job_id}"
    await start(api.database, attempt, node=node, incarnation=2)
    assert (await api.job(job_id))["state"] == "RUNNING"
    await finish(api.database, attempt, node=node, incarnation=2)
    over = await api.job(job_id)
    assert (over["state"], over["exit_code"], over["signal"], over["nodes"]) == ("COMPLETED", 0, None, [node])
    times = [over[f"{name}_time"] for name in ("submit", "allocate", "start", "end")]
    assert all(RFC3339.fullmatch(time) for time in times)
    assert times == sorted(times, key=datetime.fromisoformat)


# --- lists


async def a_dozen(api: Api, account: str, count: int = 12) -> list[int]:
    """Jobs of an account, in the order of their submission."""
    return [(await api.submit(account=account))["job_id"] for _ in range(count)]


async def listed(api: Api, **query: Any) -> list[int]:
    answer = await api.ask("GET", JOBS, params=query)
    assert answer.status == 200, answer.body
    return [job["job_id"] for job in answer.json["jobs"]]


async def all_pages(api: Api, **query: Any) -> list[int]:
    found, cursor = [], {}
    while cursor is not None:
        answer = await api.session.get(api.address + JOBS, params={**query, **cursor})
        page = await answer.json()
        found += [job["job_id"] for job in page["jobs"]]
        cursor = None if page["next_cursor"] is None else {"cursor": page["next_cursor"]}
    return found


async def test_a_list_shows_the_newest_first(api: Api) -> None:
    jobs = await a_dozen(api, "order", 3)
    answer = await api.get(f"{JOBS}?account=order")
    assert answer.json == {"jobs": [await api.job(job_id) for job_id in reversed(jobs)], "next_cursor": None}
    assert await listed(api, account="order", order="newest") == jobs[::-1]
    assert await listed(api, account="order", order="oldest") == jobs
    assert await listed(api, account="nobody") == []


@pytest.mark.parametrize("order", ["newest", "oldest"])
@pytest.mark.parametrize("limit", [1, 5, 6, 12, 200])
async def test_pages_show_every_job_once(api: Api, order: str, limit: int) -> None:
    account = f"pages {order} {limit}"
    jobs = await a_dozen(api, account)
    found = await all_pages(api, account=account, order=order, limit=limit)
    assert found == (jobs if order == "oldest" else jobs[::-1])


@pytest.mark.parametrize("order", ["newest", "oldest"])
async def test_pages_while_others_submit(api: Api, order: str) -> None:
    account = f"busy {order}"
    jobs = await a_dozen(api, account)
    found: list[int] = []
    query: dict[str, Any] = {"account": account, "order": order, "limit": 5}
    for _ in range(len(jobs)):
        page = (await api.ask("GET", JOBS, params=query)).json
        found += [job["job_id"] for job in page["jobs"]]
        if page["next_cursor"] is None or len(found) >= len(jobs):
            break
        query["cursor"] = page["next_cursor"]
        await asyncio.gather(*(api.submit(account=account) for _ in range(3)))
    assert [job_id for job_id in found if job_id in jobs] == (jobs if order == "oldest" else jobs[::-1])
    assert len(set(found)) == len(found)


async def test_the_limit_may_change_from_page_to_page(api: Api) -> None:
    jobs = await a_dozen(api, "limits", 4)
    first = (await api.get(f"{JOBS}?account=limits&limit=1&order=oldest")).json
    assert await listed(api, account="limits", limit=3, order="oldest", cursor=first["next_cursor"]) == jobs[1:]


async def test_a_page_holds_fifty_unless_it_is_said_otherwise(api: Api) -> None:
    await asyncio.gather(*(api.submit(account="fifty") for _ in range(51)))
    assert len(await listed(api, account="fifty")) == 50
    assert len(await listed(api, account="fifty", limit=200)) == 51


async def test_filters(api: Api, node: str) -> None:
    waits = (await api.submit(account="filters", name="one"))["job_id"]
    placed = (await api.submit(account="filters", name="two"))["job_id"]
    await give(api.database, placed, node)
    runs = (await a_started(api, node, account="filters", name="two")).job_id
    await api.ask("DELETE", f"{JOBS}/{(over := (await api.submit(account='filters'))['job_id'])}")

    async def states(text: str) -> list[int]:
        answer = await api.get(f"{JOBS}?account=filters&order=oldest&{text}")
        return [job["job_id"] for job in answer.json["jobs"]]

    assert await states("state=PENDING") == [waits]
    assert await states("state=PENDING,RUNNING") == [waits, runs]
    assert await states("state=PENDING&state=RUNNING,CANCELLED") == [waits, runs, over]
    assert await states("state=COMPLETED") == []
    assert await states("name=two") == [placed, runs]
    assert await states(f"node={node}") == [placed, runs]
    assert await states(f"node={node}&state=RUNNING&name=two") == [runs]
    assert await states("name=%00".replace("%00", "o%20ne")) == []


async def test_filters_by_time_exclude_their_bounds(api: Api) -> None:
    jobs = await a_dozen(api, "times", 3)
    time = (await api.job(jobs[1]))["submit_time"]
    assert await listed(api, account="times", submitted_after=time) == [jobs[2]]
    assert await listed(api, account="times", submitted_before=time) == [jobs[0]]
    with_offset = datetime.fromisoformat(time).isoformat()  # ends in +00:00
    answer = await api.get(f"{JOBS}?account=times&submitted_after={with_offset}")  # a plus sign as it stands
    assert [job["job_id"] for job in answer.json["jobs"]] == [jobs[2]]


# --- cancel

CANCELS = [("DELETE", ""), ("POST", "/cancel")]


@pytest.mark.parametrize(("method", "end"), CANCELS)
async def test_cancel_of_what_waits(api: Api, method: str, end: str) -> None:
    job_id = (await api.submit())["job_id"]
    first = await api.ask(method, f"{JOBS}/{job_id}{end}")
    assert first.status == 200
    assert (first.json["state"], first.json["state_reason"]) == ("CANCELLED", "None")
    assert first.json["end_time"] == first.json["cancel_requested_time"]
    assert (first.json["exit_code"], first.json["signal"]) == (None, None)
    second = await api.ask(method, f"{JOBS}/{job_id}{end}")
    assert (second.status, second.json) == (200, first.json)


@pytest.mark.parametrize(("method", "end"), CANCELS)
async def test_cancel_of_what_is_configuring_returns_its_cpus(api: Api, node: str, method: str, end: str) -> None:
    job_id = (await api.submit())["job_id"]
    attempt = await give(api.database, job_id, node)
    answer = await api.ask(method, f"{JOBS}/{job_id}{end}")
    assert (answer.status, answer.json["state"]) == (200, "CANCELLED")
    assert (await api.get(f"/api/v1/nodes/{node}")).json["alloc_cpus"] == 0
    assert not await start(api.database, attempt, node=node)


@pytest.mark.parametrize(("method", "end"), CANCELS)
async def test_cancel_of_what_runs_is_on_its_way(api: Api, node: str, method: str, end: str) -> None:
    attempt = await a_started(api, node)
    path = f"{JOBS}/{attempt.job_id}{end}"
    first = await api.ask(method, path)
    assert (first.status, first.json["state"]) == (202, "RUNNING")
    assert first.json["cancel_requested_time"]
    second = await api.ask(method, path)
    assert (second.status, second.json) == (202, first.json)
    entries = await api.state.redis.xrange(streams.stream_of(node))
    assert {entry[b"kind"] for _, entry in entries} == {b"cancel"}
    assert {int(entry[b"job_id"]) for _, entry in entries} == {attempt.job_id}
    await finish(api.database, attempt, node=node, state=State.CANCELLED)
    third = await api.ask(method, path)
    assert (third.status, third.json["state"]) == (200, "CANCELLED")


@pytest.mark.parametrize(("method", "end"), CANCELS)
async def test_cancel_of_what_is_over_changes_nothing(api: Api, node: str, method: str, end: str) -> None:
    attempt = await a_started(api, node)
    await finish(api.database, attempt, node=node)
    before = await api.job(attempt.job_id)
    answer = await api.ask(method, f"{JOBS}/{attempt.job_id}{end}")
    assert (answer.status, answer.json) == (200, before)


async def test_many_cancels_of_one_job_at_once(api: Api, node: str) -> None:
    job_id = (await api.submit())["job_id"]
    answers = await asyncio.gather(*(api.ask("DELETE", f"{JOBS}/{job_id}") for _ in range(20)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) == 1


async def test_cancels_while_the_allocator_works(api: Api, node: str) -> None:
    jobs = [(await api.submit())["job_id"] for _ in range(20)]

    async def allocate() -> None:
        for job_id in jobs:
            async with api.database.transaction():
                await allocations.place(api.database, [Placement(job_id, node, 1)])
                await asyncio.sleep(0)

    await register(api.database, a_node(node, 20))
    asked = asyncio.gather(*(api.ask("DELETE", f"{JOBS}/{job_id}") for job_id in jobs))
    answers, _ = await asyncio.gather(asked, allocate())
    assert [(answer.status, answer.json["state"]) for answer in answers] == [(200, "CANCELLED")] * 20
    assert (await api.get(f"/api/v1/nodes/{node}")).json["alloc_cpus"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data": b""},
        {"data": b"", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        {"json": {}},
    ],
)
async def test_a_cancel_by_post_says_nothing_more(api: Api, options: dict[str, Any]) -> None:
    job_id = (await api.submit())["job_id"]
    assert (await api.ask("POST", f"{JOBS}/{job_id}/cancel", **options)).status == 200


# --- nodes, health, root


async def test_nodes_and_their_states(api: Api, node: str) -> None:
    await register(api.database, a_node(f"{node}-down"), lease_seconds=-1)

    async def shown() -> dict[str, Any]:
        answer = await api.get(f"/api/v1/nodes/{node}")
        assert answer.status == 200
        return answer.json

    idle = await shown()
    assert RFC3339.fullmatch(idle.pop("registered_time"))
    assert RFC3339.fullmatch(idle.pop("heartbeat_time"))
    assert idle == {
        "name": node,
        "hostname": "here",
        "address": "http://127.0.0.1:1",
        "state": "IDLE",
        "state_flags": [],
        "reason": None,
        "reason_set_by_user": None,
        "reason_changed_at": None,
        "partitions": ["default", "long"],
        "cpus": 4,
        "alloc_cpus": 0,
        "alloc_idle_cpus": 4,
        "cpu_load": None,
        "real_memory": 1024,
        "version": "0",
        "stale_writes_refused": 0,
    }
    await a_started(api, node)
    assert [(await shown())[key] for key in ("state", "alloc_cpus", "alloc_idle_cpus")] == ["MIXED", 1, 3]
    await a_started(api, node, cpus_per_task=1, tasks=3)
    assert [(await shown())[key] for key in ("state", "alloc_cpus", "alloc_idle_cpus")] == ["ALLOCATED", 4, 0]
    down = (await api.get(f"/api/v1/nodes/{node}-down")).json
    assert (down["state"], down["state_flags"], down["reason"]) == (
        "DOWN",
        ["NOT_RESPONDING"],
        "its worker's lease is over",
    )
    every = (await api.get("/api/v1/nodes")).json["nodes"]
    assert [found["name"] for found in every] == sorted(found["name"] for found in every)
    assert await shown() in every
    assert "of the node" not in (await api.get("/api/v1/nodes")).body.decode()


async def test_no_such_node(api: Api) -> None:
    check_problem(await api.get("/api/v1/nodes/n%C3%B6"), 404, "no node nö")


async def test_a_node_by_a_name_that_must_be_escaped(api: Api) -> None:
    await register(api.database, a_node("nö{1}?#%"))
    assert (await api.get("/api/v1/nodes/n%C3%B6%7B1%7D%3F%23%25")).json["cpus"] == 4


async def test_health_and_root(api: Api) -> None:
    health = await api.get("/health")
    assert (health.status, health.json) == (
        200,
        {"status": "ok", "service": "rowlock-api", "version": __version__},
    )
    root = await api.get("/")
    assert (root.status, root.json["service"], root.json["version"]) == (200, "rowlock-api", __version__)
    assert {(await api.get(link)).status for link in root.json["links"].values()} == {200}


@pytest.mark.parametrize("path", [path for method, path, _ in ROUTES if method == "GET"])
async def test_head_is_get_without_a_body(api: Api, node: str, path: str) -> None:
    job_id = (await api.submit())["job_id"]
    filled = path.replace("{job_id}", str(job_id)).replace("{name:[^/]+}", node)
    got, head = await api.get(filled), await api.ask("HEAD", filled)
    assert (head.status, head.body) == (got.status, b"") == (200, b"")
    plain = {name: value for name, value in head.headers.items() if name not in ("Date", "X-Request-ID")}
    assert plain.items() <= dict(got.headers).items()


async def test_what_every_answer_says(api: Api) -> None:
    for path in ("/", "/health", "/nowhere", JOBS):
        headers = (await api.get(path)).headers
        assert headers["Server"] == "rowlock"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert "Access-Control-Allow-Origin" not in headers
        assert re.fullmatch("[0-9a-f]{16}", headers["X-Request-ID"])


@pytest.mark.parametrize("given", ["a", "4bf92f3577b34da6:a.b_c-d/e+f=g@h", "x" * 128])
async def test_a_request_keeps_the_id_that_it_brings(api: Api, given: str) -> None:
    with capture_logs(processors=[merge_contextvars]) as logs:
        for path, status in ((JOBS, 200), ("/nowhere", 404)):
            answer = await api.ask("GET", path, headers={"X-Request-ID": given})
            assert (answer.status, answer.headers["X-Request-ID"]) == (status, given)
        await api.get(JOBS)
    seen = [log["request_id"] for log in logs]
    assert seen[:2] == [given, given]
    assert given not in seen[2:]


@pytest.mark.parametrize("given", ["", " ", "-x", "x" * 129, "a b", 'a"b', "ä", "a;b"])
async def test_what_is_no_id_is_replaced(api: Api, given: str) -> None:
    answer = await api.ask("GET", JOBS, headers={"X-Request-ID": given})
    assert re.fullmatch("[0-9a-f]{16}", answer.headers["X-Request-ID"])


@pytest.mark.parametrize("path", ["", "?limit=2", "/{}", "/{}?fields=state"])
async def test_what_has_not_changed_is_not_sent_again(api: Api, path: str) -> None:
    job_id = (await api.submit())["job_id"]
    url = JOBS + path.format(job_id)
    first = await api.get(url)
    tag = first.headers["ETag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        for method in ("GET", "HEAD"):
            answer = await api.ask(method, url, headers={"If-None-Match": known})
            assert (answer.status, answer.body, answer.headers["ETag"]) == (304, b"", tag)
    assert (await api.ask("GET", url, headers={"If-None-Match": '"other"'})).body == first.body
    await api.ask("DELETE", f"{JOBS}/{job_id}")
    changed = await api.ask("GET", url, headers={"If-None-Match": tag})
    assert changed.status == 200
    assert changed.headers["ETag"] != tag


@pytest.mark.parametrize("path", ["/0", "?limit=x"])
async def test_a_problem_has_no_tag(api: Api, path: str) -> None:
    answer = await api.ask("GET", JOBS + path, headers={"If-None-Match": "*"})
    assert answer.status >= 400
    assert "ETag" not in answer.headers


async def test_some_fields_alone(api: Api) -> None:
    job = await api.submit()
    one = f"{JOBS}/{job['job_id']}"
    assert (await api.get(f"{one}?fields=state,job_id")).json == {"job_id": job["job_id"], "state": "PENDING"}
    assert (await api.get(f"{one}?fields=account&fields=name")).json == {"name": job["name"], "account": "test"}
    assert (await api.get(f"{one}?fields=state&wait=10ms&until=running")).json == {"state": "PENDING"}
    page = (await api.get(f"{JOBS}?fields=job_id&limit=1")).json
    assert page["jobs"] == [{"job_id": job["job_id"]}]
    assert set(page) == {"jobs", "next_cursor"}


@pytest.mark.parametrize("path", ["", "/{}"])
@pytest.mark.parametrize("value", ["", "state,", "secret", "state,id"])
async def test_fields_that_there_are_not(api: Api, path: str, value: str) -> None:
    job_id = (await api.submit())["job_id"]
    answer = await api.get(f"{JOBS}{path.format(job_id)}?fields={value}")
    check_problem(answer, 422, "should be among job_id, name", "fields", "parameter")

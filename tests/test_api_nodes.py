"""Nodes over HTTP: taken out, taken back in, forgotten; what that does to their jobs."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import SecretStr

from core import streams
from core.client import Client
from core.db import allocations, jobs, nodes, pending
from core.db.connection import WAKE_CHANNEL
from core.records import Attempt
from services.api import nodes as api_nodes
from tests.api import JOBS, PATIENCE, Answer, Api, an_api, api_of_a_module, check_problem
from tests.builders import a_node, finish, give, register, start
from tests.conftest import Databases

pytestmark = pytest.mark.anyio

NODES = "/api/v1/nodes"
JSON = {"Content-Type": "application/json"}

_numbers = itertools.count()


@pytest.fixture(scope="module")
async def api(databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    async with api_of_a_module(databases, redis_url, tmp_path_factory.mktemp("api")) as found:
        yield found


@pytest.fixture
async def node(api: Api) -> str:
    """A node of the test's own with 4 CPUs."""
    name = f"n{next(_numbers)}"
    await register(api.database, a_node(name))
    return name


async def patch(api: Api, node: str, document: object) -> Answer:
    """Say something about a node."""
    return await api.ask("PATCH", f"{NODES}/{node}", data=json.dumps(document).encode(), headers=JSON)


async def set_state(api: Api, node: str, state: str, reason: str | None = None) -> Any:
    """Say something good; the document that came back."""
    answer = await patch(api, node, {"state": state, **({} if reason is None else {"reason": reason})})
    assert answer.status == 200, answer.body
    assert answer.json == (await api.get(f"{NODES}/{node}")).json
    return answer.json


async def placed(api: Api, node: str, **fields: Any) -> Attempt:
    """A job that has the node's CPUs and has not started."""
    return await give(api.database, (await api.submit(**fields))["job_id"], node)


async def started(api: Api, node: str, **fields: Any) -> Attempt:
    """A job that runs on the node."""
    attempt = await placed(api, node, **fields)
    assert await start(api.database, attempt, node=node)
    return attempt


async def silence(api: Api, node: str) -> None:
    """The lease of a node is over."""
    await api.database.execute("UPDATE node_leases SET lease_until = now() - interval '1 s' WHERE node = $1", node)


# --- jobs of a node that is silent


async def test_what_runs_on_a_silent_node_is_unreachable(api: Api, node: str) -> None:
    running, over = await started(api, node, account=node), await started(api, node, account=node)
    await finish(api.database, over, node=node)
    waiting = (await api.submit(account=node))["job_id"]

    async def unreachable() -> dict[int, bool]:
        listed = (await api.get(f"{JOBS}?account={node}")).json["jobs"]
        oldest = (await api.get(f"{JOBS}?account={node}&order=oldest")).json["jobs"]
        assert listed == oldest[::-1]
        assert listed == [await api.job(job["job_id"]) for job in listed]
        return {job["job_id"]: job["node_unreachable"] for job in listed}

    assert set((await unreachable()).values()) == {False}
    await silence(api, node)
    assert await unreachable() == {running.job_id: True, over.job_id: False, waiting: False}
    assert (await api.job(running.job_id))["state"] == "RUNNING"
    await nodes.heartbeat(api.database, node, 1, lease_seconds=600, draining=False, cpu_load=0)
    assert set((await unreachable()).values()) == {False}
    await finish(api.database, running, node=node)
    await api.ask("DELETE", f"{JOBS}/{waiting}")


# --- out and in


async def test_a_drained_node_gets_no_work_and_keeps_what_it_has(api: Api, node: str) -> None:
    runs, waits = await started(api, node), await placed(api, node)
    shown = await set_state(api, node, "DRAIN", "new fan")
    assert (shown["state"], shown["state_flags"], shown["reason"]) == ("MIXED", ["DRAIN"], "new fan")
    assert shown["reason_set_by_user"] == "operator"
    assert shown["alloc_cpus"] == 2
    assert node not in [capacity.name for capacity in await free(api)]
    assert await start(api.database, waits, node=node)  # it was given its CPUs before
    assert await finish(api.database, runs, waits, node=node) == {runs, waits}


async def free(api: Api) -> list[Any]:
    """The nodes that a pass would find."""
    job_id = (await api.submit())["job_id"]
    _, found = await pending.look(api.database, 1)
    await api.ask("DELETE", f"{JOBS}/{job_id}")
    return found


async def test_a_node_is_taken_back_in(api: Api, node: str) -> None:
    drained = await set_state(api, node, "DRAIN", "new fan")
    back = await set_state(api, node, "RESUME", "it turns")
    assert (back["state"], back["state_flags"], back["reason"]) == ("IDLE", [], None)
    assert back["reason_set_by_user"] == "operator"
    assert back["reason_changed_at"] > drained["reason_changed_at"]
    assert node in [capacity.name for capacity in await free(api)]


@pytest.mark.parametrize(("state", "reason"), [("DRAIN", "why"), ("DOWN", "why"), ("RESUME", None)])
async def test_what_is_said_again_changes_nothing(api: Api, node: str, state: str, reason: str | None) -> None:
    first = await set_state(api, node, state, reason)
    assert await set_state(api, node, state, reason) == first
    if reason is not None:
        other = await set_state(api, node, state, "another one")
        assert other["reason"] == "another one"
        assert other["reason_changed_at"] > first["reason_changed_at"]


async def test_an_operators_word_outlasts_the_nodes_own(api: Api, node: str) -> None:
    """A node that drained itself resumes itself, unless an operator has drained it as well."""
    assert await nodes.drain_itself(api.database, node, 1, "disk full")
    assert (await api.get(f"{NODES}/{node}")).json["reason_set_by_user"] == "rowlock"
    await set_state(api, node, "DRAIN", "disk full")
    assert not await nodes.resume_itself(api.database, node, 1)
    await set_state(api, node, "RESUME")
    assert await nodes.drain_itself(api.database, node, 1, "disk full")
    await set_state(api, node, "RESUME")
    assert (await api.get(f"{NODES}/{node}")).json["state"] == "IDLE"


async def test_a_resumed_node_wakes_the_scheduler(api: Api, node: str) -> None:
    await nodes.set_state(api.database, node, "DRAIN", reason="why", by="operator")
    await asyncio.sleep(0.1)  # for what the tests before have said
    heard = asyncio.Event()
    await api.database.add_listener(WAKE_CHANNEL, lambda *_: heard.set())
    await set_state(api, node, "RESUME")
    async with asyncio.timeout(PATIENCE):
        await heard.wait()
    await api.database.reset()


# --- DOWN


async def test_down_ends_what_runs_and_returns_what_waits(api: Api, node: str) -> None:
    runs, asked = await started(api, node), await started(api, node, requeue=True)
    waits = await placed(api, node)
    assert await jobs.request_cancel(api.database, asked)
    shown = await set_state(api, node, "DOWN", "burnt")
    assert (shown["state"], shown["reason"], shown["alloc_cpus"]) == ("DOWN", "burnt", 0)
    for attempt in (runs, asked):
        job = await api.job(attempt.job_id)
        assert (job["state"], job["state_reason"], job["nodes"]) == ("NODE_FAIL", "NodeDown", [node])
        assert job["state_description"] == f"node {node} was declared DOWN: burnt"
        assert (job["exit_code"], job["signal"], job["node_unreachable"]) == (None, None, False)
    again = await api.job(waits.job_id)
    assert (again["state"], again["nodes"], again["restart_cnt"]) == ("PENDING", [], 0)
    assert await finish(api.database, runs, asked, node=node) == set()  # its worker lives, and is refused
    assert await start(api.database, waits, node=node) == []
    [(_, entry)] = await api.state.redis.xrange(streams.stream_of(node))
    assert entry[b"kind"] == b"cancel"  # which makes the worker look at all that it runs
    await api.ask("DELETE", f"{JOBS}/{waits.job_id}")


async def test_down_ends_any_number_in_bounded_transactions(
    api: Api, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_nodes, "BATCH", 2)
    attempts = [await started(api, node) for _ in range(3)] + [await placed(api, node)]
    shown = await set_state(api, node, "DOWN", "burnt")
    assert shown["alloc_cpus"] == 0
    transactions = await api.database.fetch(
        "SELECT count(*) FROM job_events WHERE node = $1 AND reason = 'NodeDown' GROUP BY xact", node
    )
    assert sorted(row[0] for row in transactions) == [1, 2]
    await api.ask("DELETE", f"{JOBS}/{attempts[-1].job_id}")


async def test_down_of_a_silent_node(api: Api, node: str) -> None:
    runs = await started(api, node)
    await silence(api, node)
    shown = await set_state(api, node, "DOWN", "gone")
    assert (shown["state"], shown["state_flags"]) == ("DOWN", ["NOT_RESPONDING"])
    assert (await api.job(runs.job_id))["state"] == "NODE_FAIL"


async def test_down_touches_no_other_node(api: Api, node: str) -> None:
    await register(api.database, a_node(f"{node}-other"))
    other = await started(api, f"{node}-other")
    await set_state(api, node, "DOWN", "burnt")
    assert (await api.job(other.job_id))["state"] == "RUNNING"
    await finish(api.database, other, node=f"{node}-other")


async def test_without_redis_down_is_done_all_the_same(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory, api: Api
) -> None:
    alone = api.settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0")})
    async with an_api(alone) as apart:
        name = f"n{next(_numbers)}"
        await register(api.database, a_node(name))
        runs = await started(apart, name)
        await set_state(apart, name, "DOWN", "burnt")
        assert (await apart.job(runs.job_id))["state"] == "NODE_FAIL"
        assert (await apart.ask("DELETE", f"{NODES}/{name}")).status == 204


# --- what is wrong with a request

BODIES = [
    (b"x", {}, 415, None, ""),
    (b'{"state": "RESUME"}', {"Content-Type": "text/plain"}, 415, None, ""),
    (b'{"state": "RESUME"}', {**JSON, "Content-Encoding": "gzip"}, 415, None, ""),
    (b"", JSON, 400, None, "JSON"),
    (b"{", JSON, 400, None, "JSON"),
    (b"\xff", JSON, 400, None, "UTF-8"),
    (b'{"state": "RESUME", "state": "DOWN"}', JSON, 400, None, "twice"),
    (b"[]", JSON, 422, "", "an object"),
    (b"null", JSON, 422, "", "an object"),
    (b"{}", JSON, 422, "/state", "required"),
    (b'{"state": null}', JSON, 422, "/state", "'DRAIN', 'RESUME' or 'DOWN'"),
    (b'{"state": "drain", "reason": "x"}', JSON, 422, "/state", "'DRAIN', 'RESUME' or 'DOWN'"),
    (b'{"state": "IDLE"}', JSON, 422, "/state", "'DRAIN', 'RESUME' or 'DOWN'"),
    (b'{"state": ["DOWN"], "reason": "x"}', JSON, 422, "/state", "'DRAIN', 'RESUME' or 'DOWN'"),
    (b'{"state": "DRAIN"}', JSON, 422, "/reason", "required"),
    (b'{"state": "DOWN", "reason": null}', JSON, 422, "/reason", "required"),
    (b'{"state": "DOWN", "reason": ""}', JSON, 422, "/reason", "at least 1"),
    (b'{"state": "DOWN", "reason": "a\\nb"}', JSON, 422, "/reason", "control characters"),
    (b'{"state": "DOWN", "reason": "\\ud800"}', JSON, 422, "/reason", "half a surrogate pair"),
    (b'{"state": "DOWN", "reason": 5}', JSON, 422, "/reason", "valid string"),
    (json.dumps({"state": "DOWN", "reason": "x" * 256}).encode(), JSON, 422, "/reason", "at most 255"),
    (b'{"state": "RESUME", "by": "me"}', JSON, 422, "/by", "unknown field"),
    (json.dumps({f"f{n}": 1 for n in range(1000)}).encode(), JSON, 422, "", "1000 fields"),
]


@pytest.mark.parametrize(("sent", "headers", "status", "where", "detail"), BODIES)
async def test_a_wrong_body(
    api: Api, node: str, sent: bytes, headers: dict[str, str], status: int, where: str | None, detail: str
) -> None:
    before = (await api.get(f"{NODES}/{node}")).json
    for path in (f"{NODES}/{node}", f"{NODES}/nowhere"):  # the body comes first
        answer = await api.ask("PATCH", path, data=sent, headers=headers, skip_auto_headers=["Content-Type"])
        check_problem(answer, status, detail, where)
    assert (await api.get(f"{NODES}/{node}")).json == before


async def test_all_that_is_wrong_is_said_at_once(api: Api, node: str) -> None:
    problem = check_problem(await patch(api, node, {"state": "DOWN", "x": 1}), 422, "unknown field", "/x")
    assert {fault["pointer"] for fault in problem["errors"]} == {"/x", "/reason"}


@pytest.mark.parametrize("name", ["nowhere", "%00", "%0A", "%ED%A0%80", "n%C3%B6", "x" * 5000])
async def test_there_is_no_such_node(api: Api, name: str) -> None:
    check_problem(await patch(api, name, {"state": "RESUME"}), 404)
    check_problem(await api.ask("DELETE", f"{NODES}/{name}"), 404)


# --- DELETE


async def delete(api: Api, node: str) -> Answer:
    return await api.ask("DELETE", f"{NODES}/{node}")


@pytest.mark.parametrize("why", ["declared", "silent"])
async def test_a_node_that_is_down_is_forgotten_with_its_stream(api: Api, node: str, why: str) -> None:
    await (set_state(api, node, "DOWN", "sold") if why == "declared" else silence(api, node))
    await api.state.redis.xadd(streams.stream_of(node), {"x": "y"})
    answer = await delete(api, node)
    assert (answer.status, answer.body) == (204, b"")
    assert not await api.state.redis.exists(streams.stream_of(node))
    check_problem(await api.get(f"{NODES}/{node}"), 404)
    check_problem(await delete(api, node), 404)
    assert await nodes.all_nodes(api.database, node) == []
    # Its worker, should it live, is told; one that comes anew begins anew.
    assert not await nodes.heartbeat(api.database, node, 1, lease_seconds=60, draining=False, cpu_load=0)
    assert await nodes.holder(api.database, node) is None
    assert await register(api.database, a_node(node)) == 1
    assert (await api.get(f"{NODES}/{node}")).json["state"] == "IDLE"


@pytest.mark.parametrize("state", ["RESUME", "DRAIN"])
async def test_a_node_that_lives_is_kept(api: Api, node: str, state: str) -> None:
    await set_state(api, node, state, "why")
    check_problem(await delete(api, node), 409, f"node {node} is not DOWN: its worker's lease is alive")
    assert (await api.get(f"{NODES}/{node}")).status == 200


async def test_a_node_that_holds_something_is_kept(api: Api, node: str) -> None:
    runs, waits = await started(api, node), await placed(api, node)
    await silence(api, node)
    check_problem(
        await delete(api, node), 409, f"node {node} holds 2 CPUs for jobs ({runs.job_id}, {waits.job_id}): declare it"
    )
    assert [held.job_id for held in await allocations.of_node(api.database, node)] == [runs.job_id, waits.job_id]
    await set_state(api, node, "DOWN", "sold")
    assert (await delete(api, node)).status == 204
    await api.ask("DELETE", f"{JOBS}/{waits.job_id}")


async def test_many_jobs_are_named_in_part(api: Api) -> None:
    name = f"n{next(_numbers)}"
    await register(api.database, a_node(name, 20))
    attempts = [await started(api, name) for _ in range(11)]
    problem = check_problem(await delete(api, name), 409, f"{attempts[9].job_id}, …)")
    assert str(attempts[10].job_id) not in problem["detail"]
    await finish(api.database, *attempts, node=name)


async def test_jobs_of_a_forgotten_node(api: Api, node: str) -> None:
    """They say where they ran; where that node wrote their output, it does not know any more."""
    runs = await started(api, node, standard_output="o/%x.out")
    assert (await api.job(runs.job_id))["standard_output"] == f"/jobs/{runs.job_id}/o/job.out"
    await finish(api.database, runs, node=node)
    await silence(api, node)
    check_problem(await api.get(f"{JOBS}/{runs.job_id}/logs"), 503, "lease is over")
    assert (await delete(api, node)).status == 204
    job = await api.job(runs.job_id)
    assert (job["state"], job["nodes"], job["standard_output"]) == ("COMPLETED", [node], "o/%x.out")
    assert [found["job_id"] for found in (await api.get(f"{JOBS}?node={node}")).json["jobs"]] == [runs.job_id]
    check_problem(await api.get(f"{JOBS}/{runs.job_id}/logs"), 410, f"node {node}, which had the output, was deleted")


async def test_a_node_by_a_name_that_must_be_escaped_and_the_client(api: Api) -> None:
    name = "nö{1}?#%25 +"
    await register(api.database, a_node(name))
    async with Client(api.address) as client:
        assert (await client.node(name))["name"] == name
        assert (await client.set_node_state(name, "DRAIN", "why"))["state_flags"] == ["DRAIN"]
        assert (await client.set_node_state(name, "RESUME"))["state_flags"] == []
        await client.set_node_state(name, "DOWN", "sold")
        await client.delete_node(name)
        assert name not in [node["name"] for node in await client.nodes()]

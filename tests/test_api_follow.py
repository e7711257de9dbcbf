"""An output that is followed: as it is written, each byte once, to its end, over whatever cuts the connection."""

import asyncio
import base64
import json
import random
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from core.client import Client
from core.db import allocations, jobs, nodes, outputs
from core.db.connection import open_pool
from core.records import Attempt, Ending, Output
from core.states import Reason, State
from services.api import follow as following
from services.worker import file_server
from services.worker.file_server import FileServer
from services.worker.launch import describe_host
from tests.api import JOBS, Api, api_of_a_module, check_problem, serving, until
from tests.builders import LONG, a_node, finish, give, register, start
from tests.conftest import Databases
from tests.test_api_logs import SECRET, Node, logs_of, serving_files, write

pytestmark = pytest.mark.anyio

MIB = 2**20


class Runs(dict[Attempt, Any]):
    """The node's runs, as its file server looks at them."""

    def begin(self, attempt: Attempt) -> None:
        self[attempt] = SimpleNamespace(script=object(), over=False)


@pytest.fixture(scope="module")
async def api(databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    async with api_of_a_module(databases, redis_url, tmp_path_factory.mktemp("api"), poll_seconds=0.05) as found:
        yield found


@pytest.fixture(scope="module")
async def runs() -> Runs:
    return Runs()


@pytest.fixture(scope="module")
async def node(api: Api, runs: Runs) -> AsyncIterator[Node]:
    async with serving_files(api, "followed", runs) as found:
        yield found


@pytest.fixture
async def client(api: Api) -> AsyncIterator[Client]:
    async with Client(f"http://127.0.0.1:{api.port}") as found:
        yield found


class Stream:
    """The events of one answer, as they come."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.answer = answer

    async def line(self) -> str:
        async with asyncio.timeout(LONG):
            return (await self.answer.content.readline()).decode()

    async def event(self) -> dict[str, str]:
        """The next one; comments are passed over."""
        found: dict[str, str] = {}
        while (line := await self.line()) != "\n" or not found:
            assert line, "cut off"
            if not line.startswith(":") and line != "\n":
                name, _, value = line.rstrip("\n").partition(": ")
                found[name] = value
        return found

    async def piece(self) -> tuple[str, bytes]:
        found = await self.event()
        return found["id"], base64.b64decode(found["data"])

    async def end(self) -> dict[str, Any]:
        found = await self.event()
        assert found["event"] == "end"
        async with asyncio.timeout(LONG):
            assert await self.answer.content.read() == b""
        said: dict[str, Any] = json.loads(found["data"])
        return said


@asynccontextmanager
async def followed(api: Api, attempt: Attempt, query: str = "", **headers: str) -> AsyncIterator[Stream]:
    url = f"http://127.0.0.1:{api.port}{logs_of(attempt, f'?follow=true{query}')}"
    timeout = aiohttp.ClientTimeout(total=None, sock_read=LONG)
    async with api.session.get(url, headers=headers, timeout=timeout) as answer:
        assert answer.status == 200, await answer.read()
        assert answer.headers["Content-Type"] == "text/event-stream"
        assert answer.headers["Cache-Control"] == "no-store"
        yield Stream(answer)


async def over(node: Node, runs: Runs, attempt: Attempt, state: State = State.COMPLETED) -> None:
    """Its script has ended, and then that is reported."""
    runs[attempt].over = True
    if state is State.PENDING:
        await node.went_back(attempt)
    else:
        await finish(node.api.database, attempt, node=node.name, incarnation=node.incarnation, state=state)
    del runs[attempt]


async def test_lines_come_as_they_are_written_and_then_the_end(node: Node, runs: Runs) -> None:
    attempt = await node.run(b"one\n")
    runs.begin(attempt)
    async with followed(node.api, attempt) as stream:
        assert await stream.piece() == ("4", b"one\n")
        write(node.file(attempt), b"\xfftwo\n")
        assert await stream.piece() == ("9", b"\xfftwo\n")
        write(node.file(attempt), b"last")
        await over(node, runs, attempt)
        assert await stream.piece() == ("13", b"last")
        assert await stream.end() == {"job_id": attempt.job_id, "attempt": 1, "state": "COMPLETED"}


async def test_of_what_is_over_everything_and_the_end(node: Node, runs: Runs) -> None:
    attempt = await node.run(b"0123456789")
    await finish(node.api.database, attempt, node=node.name, incarnation=node.incarnation, state=State.FAILED)
    for query, headers, expected in (
        ("", {}, ("10", b"0123456789")),
        ("&offset=4", {}, ("10", b"456789")),
        ("&tail=3", {}, ("10", b"789")),
        ("&offset=1", {"Last-Event-ID": "8"}, ("10", b"89")),
        ("&attempt=1&offset=9", {}, ("10", b"9")),
    ):
        async with followed(node.api, attempt, query, **headers) as stream:
            assert await stream.piece() == expected
            assert (await stream.end())["state"] == "FAILED"


@pytest.mark.parametrize("query", ["&stream=stderr", "&offset=20"])
async def test_no_bytes_and_the_end(node: Node, query: str) -> None:
    attempt = await node.run(b"0123456789", standard_error="never.err")
    await finish(node.api.database, attempt, node=node.name, incarnation=node.incarnation, state=State.COMPLETED)
    async with followed(node.api, attempt, query) as stream:
        assert (await stream.end())["state"] == "COMPLETED"


async def test_what_waits_is_followed_from_its_start(node: Node, runs: Runs) -> None:
    job_id = (await node.api.submit())["job_id"]
    async with followed(node.api, Attempt(job_id, 1)) as stream:
        attempt = await give(node.api.database, job_id, node.name)
        runs.begin(attempt)
        assert await start(node.api.database, attempt, node=node.name, incarnation=node.incarnation)
        write(node.file(attempt), b"begun")
        assert await stream.piece() == ("5", b"begun")
        await over(node, runs, attempt)
        assert (await stream.end())["state"] == "COMPLETED"


async def test_what_is_cancelled_before_it_began_ends(node: Node) -> None:
    job_id = (await node.api.submit())["job_id"]
    async with followed(node.api, Attempt(job_id, 1)) as stream:
        assert (await node.api.ask("DELETE", f"{JOBS}/{job_id}")).status == 200
        assert await stream.end() == {"job_id": job_id, "attempt": 1, "state": "CANCELLED"}


async def test_what_stood_in_the_file_before_is_not_shown(node: Node, runs: Runs) -> None:
    """The start empties it; until the worker has begun, it is another job's."""
    attempt = await node.run(b"of another job")
    async with followed(node.api, attempt, "&attempt=1") as stream:
        starting = runs[attempt] = SimpleNamespace(script=None, over=False)
        await asyncio.sleep(0.3)  # in which it would be read
        node.file(attempt).write_bytes(b"own")
        starting.script = object()
        assert await stream.piece() == ("3", b"own")
        await over(node, runs, attempt)
        await stream.end()


@pytest.mark.parametrize("alone", [False, True])
async def test_an_attempt_that_goes_back_ends_without_a_final_state(node: Node, runs: Runs, *, alone: bool) -> None:
    first = await node.run(b"first")
    runs.begin(first)
    async with followed(node.api, first, "&attempt=1" if alone else "") as stream:
        assert await stream.piece() == ("5", b"first")
        await over(node, runs, first, State.PENDING)
        assert await stream.end() == {"job_id": first.job_id, "attempt": 1, "state": "PENDING"}
    async with followed(node.api, first, "&attempt=2") as stream:
        second = await node.again(first, b"second")
        runs.begin(second)
        assert await stream.piece() == ("2-6", b"second")
        await over(node, runs, second)
        assert await stream.end() == {"job_id": first.job_id, "attempt": 2, "state": "COMPLETED"}
    async with followed(node.api, first, "&attempt=1") as stream:  # what the second has appended is not its own
        assert await stream.piece() == ("5", b"first")
        assert (await stream.end())["attempt"] == 1


async def test_a_restart_is_followed_that_has_not_stored_yet_where_it_begins(node: Node, runs: Runs) -> None:
    first = await node.run(b"first")
    await node.went_back(first)
    second = await give(node.api.database, first.job_id, node.name)
    runs.begin(second)
    async with followed(node.api, first, "&attempt=2") as stream:
        assert await jobs.start(node.api.database, [second], node=node.name, incarnation=node.incarnation)
        for _ in range(6):  # it waits: comments, each with an empty line
            assert await stream.line() in (":\n", "\n")
        begun = Output(second.job_id, 2, 1, len(b"first"), None)
        assert await outputs.store(node.api.database, [begun], node=node.name, incarnation=node.incarnation)
        write(node.file(second), b"second")
        assert await stream.piece() == ("2-6", b"second")
        await over(node, runs, second)
        assert (await stream.end())["state"] == "COMPLETED"


async def test_who_was_cut_off_goes_on_in_the_attempt_that_it_was_in(node: Node, runs: Runs) -> None:
    first = await node.run(b"first")
    await node.went_back(first)
    second = await node.again(first, b"second")
    runs.begin(second)
    async with followed(node.api, first, **{"Last-Event-ID": "3"}) as stream:
        assert await stream.piece() == ("5", b"st")
        assert await stream.end() == {"job_id": first.job_id, "attempt": 1, "state": "PENDING"}
    async with followed(node.api, first, **{"Last-Event-ID": "2-3"}) as stream:
        assert await stream.piece() == ("2-6", b"ond")
        await over(node, runs, second)
        assert (await stream.end())["state"] == "COMPLETED"
    async with followed(node.api, first, "&attempt=1&tail=2") as stream:
        assert await stream.piece() == ("5", b"st")
        assert await stream.end() == {"job_id": first.job_id, "attempt": 1, "state": "PENDING"}


async def test_an_attempt_whose_node_is_gone_keeps_nobody_from_the_next(node: Node, runs: Runs) -> None:
    await register(node.api.database, a_node("lost", 4, address="http://127.0.0.1:9", secret=SECRET))
    first = await give(node.api.database, (await node.api.submit(requeue=True))["job_id"], "lost")
    assert await start(node.api.database, first, node="lost")
    ending = Ending(first.job_id, 1, State.PENDING, Reason.NONE)
    assert await allocations.release(node.api.database, [ending], node="lost", before=State.RUNNING)
    await node.api.database.execute("UPDATE node_leases SET lease_until = now() WHERE node = 'lost'")
    second = await node.again(first, b"second")
    runs.begin(second)
    async with followed(node.api, first, **{"Last-Event-ID": "3"}) as stream:
        assert await stream.end() == {"job_id": first.job_id, "attempt": 1, "state": "PENDING"}
    answer = await node.api.get(logs_of(first, "?follow=true&attempt=1"))
    check_problem(answer, 503, "lease is over")
    await over(node, runs, second)


async def test_followers_leave_descriptors_to_jobs(node: Node, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = await node.run(b"seen")
    runs.begin(attempt)
    monkeypatch.setattr(file_server, "FOLLOWERS_SHARE", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    async with followed(node.api, attempt) as stream:
        assert await stream.piece() == ("4", b"seen")
        check_problem(await node.api.get(logs_of(attempt, "?follow=true")), 503, "answered 503")
    await over(node, runs, attempt)


async def test_a_worker_that_answers_nothing_is_not_waited_for(
    node: Node, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "QUIET_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        await register(node.api.database, a_node("silent", 4, address=address, secret=SECRET, work_base_dir="/w"))
        attempt = await give(node.api.database, (await node.api.submit())["job_id"], "silent")
        assert await start(node.api.database, attempt, node="silent")
        check_problem(await node.api.get(logs_of(attempt, "?follow=true")), 503, "does not answer")


async def test_a_client_reads_every_attempt(node: Node, runs: Runs, client: Client) -> None:
    first, read = await node.run(b"first "), b""
    runs.begin(first)
    found = client.follow(first.job_id)
    while read != b"first ":
        read += await asyncio.wait_for(anext(found), LONG)
    await over(node, runs, first, State.PENDING)
    second = await node.again(first, b"second")
    runs.begin(second)
    await over(node, runs, second)
    async with asyncio.timeout(LONG):
        read += b"".join([data async for data in found])
    assert read == b"first second"


class Cutting:
    """A way to the API that is cut at random moments."""

    def __init__(self, port: int, seconds: float) -> None:
        self._port, self._luck, self._seconds = port, random.Random(1), seconds
        self.cuts = 0

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        above, below = await asyncio.open_connection("127.0.0.1", self._port)
        forth = asyncio.create_task(_copy(reader, below))
        writer.write(await above.read(65536))  # on a slow machine, too, each of them comes a bit further
        back = asyncio.create_task(_copy(above, writer))
        await asyncio.wait((back,), timeout=self._luck.uniform(0, 2 * self._seconds))
        self.cuts += not back.done()
        for task in (forth, back):
            task.cancel()
        await asyncio.gather(forth, back, return_exceptions=True)
        for end in (below, writer):
            end.transport.abort()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
        sink.close()


async def test_a_way_that_is_cut_again_and_again_loses_no_byte(node: Node, runs: Runs) -> None:
    content = random.Random(2).randbytes(50 * MIB)
    attempt = await node.run(content[: 10 * MIB])
    runs.begin(attempt)
    way = Cutting(node.api.port, 0.1)
    server = await asyncio.start_server(way.pass_on, "127.0.0.1", 0)
    read = bytearray()
    async with server, Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        written = 10 * MIB
        async for data in client.follow(attempt.job_id):
            read += data
            if written - len(read) < 5 * MIB and written < len(content):
                write(node.file(attempt), content[written : written + 10 * MIB])
                written += 10 * MIB
                if written == len(content):
                    await over(node, runs, attempt)
    assert bytes(read) == content
    assert way.cuts > 3


async def test_a_worker_that_is_gone_cuts_the_stream_off(node: Node, runs: Runs) -> None:
    pool = await open_pool(node.settings, "worker", 1)
    server = FileServer(
        node.settings.model_copy(update={"node_name": "goes"}), describe_host(node.settings, "s"), pool, SECRET, runs
    )
    address = await server.start()
    spec = a_node("goes", 4, address=address, secret=SECRET, work_base_dir=str(node.settings.work_base_dir))
    await register(node.api.database, spec)
    attempt = await give(node.api.database, (await node.api.submit(requeue=True))["job_id"], "goes")
    assert await start(node.api.database, attempt, node="goes")
    runs.begin(attempt)
    write(node.file(attempt), b"seen")
    with pytest.raises(aiohttp.ClientPayloadError):  # noqa: PT012 - it ends there
        async with followed(node.api, attempt) as stream:
            assert await stream.piece() == ("4", b"seen")
            await server.stop()
            pool.terminate()
            await stream.event()
    answer = await node.api.get(logs_of(attempt, "?follow=true"))
    check_problem(answer, 503, "cannot be reached")


async def test_a_silent_node_whose_lease_is_over_cuts_the_stream_off(
    node: Node, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "QUIET_SECONDS", 0.05)
    attempt = await node.run(b"seen")
    runs.begin(attempt)
    with pytest.raises(aiohttp.ClientPayloadError):  # noqa: PT012 - it ends there
        async with followed(node.api, attempt) as stream:
            assert await stream.piece() == ("4", b"seen")
            assert await stream.line() == ":\n"  # it is quiet, and lives
            await node.api.database.execute("UPDATE node_leases SET lease_until = now() WHERE node = 'followed'")
            await stream.event()
    answer = await node.api.get(logs_of(attempt, "?follow=true"))
    check_problem(answer, 503, "its worker's lease is over")
    assert await nodes.heartbeat(
        node.api.database, node.name, node.incarnation, lease_seconds=600, draining=False, cpu_load=0.0,
        stale_writes_refused=0,
    )  # fmt: skip
    await over(node, runs, attempt)


async def test_an_api_that_stops_waits_for_nobody_who_follows(node: Node, runs: Runs) -> None:
    attempt = await node.run(b"seen")
    runs.begin(attempt)
    async with aiohttp.ClientSession() as session, AsyncExitStack() as stack:
        state, port = await stack.enter_async_context(serving(node.api.settings, finish_seconds=10 * LONG))
        await until(lambda: state.database.is_open)
        url = f"http://127.0.0.1:{port}{logs_of(attempt, '?follow=true')}"
        async with session.get(url) as answer, asyncio.timeout(LONG):
            assert await Stream(answer).piece() == ("4", b"seen")
            await stack.aclose()
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.content.read()
    await over(node, runs, attempt)


async def test_who_goes_is_not_followed_for(node: Node, runs: Runs) -> None:
    attempt = await node.run(b"seen")
    runs.begin(attempt)
    async with followed(node.api, attempt) as stream:
        assert await stream.piece() == ("4", b"seen")
        stream.answer.close()
    write(node.file(attempt), b"unseen")
    await until(lambda: not node.api.state.followers)
    await over(node, runs, attempt)


async def test_head_begins_nothing(node: Node, runs: Runs) -> None:
    attempt = await node.run(b"seen")
    runs.begin(attempt)
    answer = await node.api.ask("HEAD", logs_of(attempt, "?follow=true"))
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["Content-Type"] == "text/event-stream"
    await over(node, runs, attempt)


@pytest.mark.parametrize(
    ("query", "headers", "status", "detail"),
    [
        ("?follow=yes", {}, 422, "false or true"),
        ("?follow=true&follow=true", {}, 422, "given once"),
        ("?follow=true&attempt=2", {}, 422, "at most 1"),
        ("?follow=true&tail=1&offset=1", {}, 422, "excludes offset"),
        ("?follow=true", {"Range": "bytes=0-1"}, 422, "excludes"),
        ("?follow=true", {"Last-Event-ID": "x"}, 400, "Last-Event-ID"),
        ("?follow=true", {"Last-Event-ID": "9223372036854775808"}, 400, "Last-Event-ID"),
        ("?follow=true", {"Last-Event-ID": "0-1"}, 400, "Last-Event-ID"),
        ("?follow=true&attempt=1", {"Last-Event-ID": "2-1"}, 400, "Last-Event-ID"),
        ("?follow=true&offset=4611686018427387905", {}, 422, "from 0 to"),
        ("?follow=true&attempt=3", {}, 422, "at most 1"),
        ("?follow=true", {"Last-Event-ID": "-1"}, 400, "Last-Event-ID"),
    ],
)
async def test_what_cannot_be_followed(
    node: Node, runs: Runs, query: str, headers: dict[str, str], status: int, detail: str
) -> None:
    attempt = await node.run(b"seen")
    runs.begin(attempt)
    answer = await node.api.ask("GET", logs_of(attempt, query), headers=headers)
    assert answer.status == status, answer.body
    assert detail in answer.body.decode()
    await over(node, runs, attempt)


async def test_no_such_job(node: Node) -> None:
    check_problem(await node.api.get(logs_of(Attempt(10**15, 1), "?follow=true")), 404)

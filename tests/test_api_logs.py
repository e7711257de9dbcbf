"""Output over HTTP: a worker's own file server has the bytes, the API passes them on."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from core.db.connection import open_pool
from core.records import Attempt
from core.settings import Settings
from core.states import State
from services.api import logs
from services.worker.file_server import FileServer
from services.worker.launch import describe_host
from tests.api import JOBS, Answer, Api, answers_in, api_of_a_module, check_problem, request_bytes, send_raw
from tests.builders import a_node, finish, give, register, start
from tests.conftest import Databases

pytestmark = pytest.mark.anyio

SECRET = "s3cr3t of the node"  # noqa: S105
TEN = b"0123456789"
# No text in any encoding, with line ends that must stay as they are.
BYTES = bytes(range(256)) * 3 + b"\r\n\xff\xfe\r"

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Node:
    """A node whose worker serves its files; `settings` are the worker's."""

    api: Api
    settings: Settings
    address: str
    incarnation: int

    @property
    def name(self) -> str:
        """The node's name."""
        return self.settings.node_name

    async def run(self, output: bytes | None = None, **fields: Any) -> Attempt:
        """A job that runs and has written `output`; None: nothing is open yet."""
        attempt = await give(self.api.database, (await self.api.submit(**fields))["job_id"], self.name)
        assert await start(self.api.database, attempt, node=self.name, incarnation=self.incarnation)
        if output is not None:
            write(self.file(attempt), output)
        return attempt

    def file(self, attempt: Attempt, name: str = "slurm-{}.out") -> Path:
        """A file in the job's own directory."""
        return self.settings.work_base_dir / str(attempt.job_id) / name.format(attempt.job_id)


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(content)


def logs_of(attempt: Attempt, query: str = "") -> str:
    return f"{JOBS}/{attempt.job_id}/logs{query}"


@pytest.fixture(scope="module")
async def api(databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    async with api_of_a_module(databases, redis_url, tmp_path_factory.mktemp("api")) as found:
        yield found


@pytest.fixture(scope="module")
async def node(api: Api) -> AsyncIterator[Node]:
    """The node that has everything; its worker is real but for running nothing."""
    settings = api.settings.model_copy(update={"node_name": "files", "worker_host": "127.0.0.1"})
    settings.work_base_dir.mkdir(parents=True)
    pool = await open_pool(settings, "worker", 2)
    server = FileServer(settings, describe_host(settings, "spool of files"), pool, SECRET)
    address = await server.start()
    try:
        spec = a_node("files", 10_000, address=address, secret=SECRET, work_base_dir=str(settings.work_base_dir))
        yield Node(api, settings, address, await register(api.database, spec))
    finally:
        await server.stop()
        pool.terminate()


@pytest.fixture
async def elsewhere(node: Node) -> Callable[[str], Any]:
    """Makes a job that runs on a node of its own, whose worker is at some address."""

    async def run(address: str, lease_seconds: float = 600, secret: str = SECRET) -> Attempt:
        name = f"n{next(_numbers)}"
        base = str(node.settings.work_base_dir)
        spec = a_node(name, address=address, secret=secret, work_base_dir=base)
        await register(node.api.database, spec)
        attempt = await give(node.api.database, (await node.api.submit())["job_id"], name)
        assert await start(node.api.database, attempt, node=name)
        if lease_seconds < 0:
            await register(node.api.database, spec, lease_seconds=lease_seconds)
        return attempt

    return run


def check_output(answer: Answer, content: bytes, status: int = 200) -> None:
    assert (answer.status, answer.body) == (status, content)
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Content-Length"] == str(len(content))
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


# --- what is there


@pytest.mark.parametrize("query", ["", "?stream=stderr", "?offset=5", "?tail=5"])
async def test_nothing_before_the_start(node: Node, query: str) -> None:
    job_id = (await node.api.submit())["job_id"]
    waiting = Attempt(job_id, 0)
    check_output(await node.api.get(logs_of(waiting, query)), b"")
    placed = await give(node.api.database, job_id, node.name)
    check_output(await node.api.get(logs_of(placed, query)), b"")
    assert (await node.api.ask("DELETE", f"{JOBS}/{job_id}")).status == 200
    check_output(await node.api.get(logs_of(placed, query)), b"")


async def test_nothing_is_written_yet(node: Node) -> None:
    check_output(await node.api.get(logs_of(await node.run())), b"")


@pytest.mark.parametrize("over", [False, True])
async def test_bytes_as_they_were_written(node: Node, over: bool) -> None:
    attempt = await node.run(BYTES)
    if over:
        await finish(node.api.database, attempt, node=node.name, incarnation=node.incarnation, state=State.COMPLETED)
    check_output(await node.api.get(logs_of(attempt)), BYTES)
    check_output(await node.api.get(logs_of(attempt, "?stream=stdout")), BYTES)


async def test_a_file_that_grows_is_followed_by_its_offset(node: Node) -> None:
    attempt, found = await node.run(b""), b""
    for line in (b"one\n", b"two\n", b"\n", b"three"):
        check_output(await node.api.get(logs_of(attempt, f"?offset={len(found)}")), b"")
        write(node.file(attempt), line)
        answer = await node.api.get(logs_of(attempt, f"?offset={len(found)}"))
        check_output(answer, line)
        found += answer.body
    assert found == b"one\ntwo\n\nthree"


@pytest.mark.parametrize(
    ("query", "content"),
    [
        ("?offset=0", TEN),
        ("?offset=4", b"456789"),
        ("?offset=10", b""),
        ("?offset=11", b""),
        ("?offset=9223372036854775807", b""),
        ("?tail=0", b""),
        ("?tail=3", b"789"),
        ("?tail=10", TEN),
        ("?tail=11", TEN),
        ("?tail=9223372036854775807", TEN),
    ],
)
async def test_a_part_by_offset_or_tail(node: Node, query: str, content: bytes) -> None:
    attempt = await node.run(TEN)
    answer = await node.api.get(logs_of(attempt, query))
    check_output(answer, content)
    head = await node.api.ask("HEAD", logs_of(attempt, query))
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(content)))


@pytest.mark.parametrize(
    ("asked", "content", "shown"),
    [
        ("bytes=0-0", b"0", "bytes 0-0/10"),
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=5-", b"56789", "bytes 5-9/10"),
        ("bytes=0-", TEN, "bytes 0-9/10"),
        ("bytes=5-100", b"56789", "bytes 5-9/10"),
        ("bytes=9-9", b"9", "bytes 9-9/10"),
        ("bytes=-1", b"9", "bytes 9-9/10"),
        ("bytes=-4", b"6789", "bytes 6-9/10"),
        ("bytes=-10", TEN, "bytes 0-9/10"),
        ("bytes=-100", TEN, "bytes 0-9/10"),
        (f"bytes=5-{'9' * 30}", b"56789", "bytes 5-9/10"),
        ("Bytes=2-4", b"234", "bytes 2-4/10"),
    ],
)
async def test_a_range(node: Node, asked: str, content: bytes, shown: str) -> None:
    attempt = await node.run(TEN)
    answer = await node.api.get(logs_of(attempt), headers={"Range": asked})
    check_output(answer, content, 206)
    assert answer.headers["Content-Range"] == shown
    head = await node.api.ask("HEAD", logs_of(attempt), headers={"Range": asked})
    assert (head.status, head.body, head.headers["Content-Range"]) == (206, b"", shown)


@pytest.mark.parametrize(
    ("asked", "size"), [("bytes=10-", 10), ("bytes=10-20", 10), (f"bytes={'9' * 30}-", 10), ("bytes=0-", 0)]
)
async def test_a_range_behind_the_end(node: Node, asked: str, size: int) -> None:
    attempt = await node.run(TEN[:size])
    answer = await node.api.get(logs_of(attempt), headers={"Range": asked})
    check_problem(answer, 416, "does not reach that far")
    assert answer.headers["Content-Range"] == f"bytes */{size}"


@pytest.mark.parametrize(
    "asked",
    [
        ["bytes=4-2"],
        ["bytes=0-1,3-4"],
        ["bytes=-"],
        ["bytes="],
        ["bytes"],
        ["bytes=a-b"],
        ["bytes=1.0-2"],
        ["bytes=\xd9\xa3-"],
        ["lines=1-2"],
        ["\xff\xfe"],
        [""],
        [f"bytes={'9' * 5000}-"],
        ["bytes=0-1", "bytes=2-3"],
    ],
)
async def test_a_range_that_means_nothing_is_ignored(node: Node, asked: list[str]) -> None:
    attempt = await node.run(TEN)
    request = request_bytes("GET", logs_of(attempt), *(f"Range: {value}" for value in asked))
    [answer] = answers_in(await send_raw(node.api.port, request))
    check_output(answer, TEN)


async def test_a_range_on_a_condition_that_nothing_can_meet_is_ignored(node: Node) -> None:
    headers = {"Range": "bytes=2-4", "If-Range": '"v1"'}
    check_output(await node.api.get(logs_of(await node.run(TEN)), headers=headers), TEN)


@pytest.mark.parametrize("query", ["offset=1", "tail=1"])
async def test_two_ways_to_ask_for_a_part_at_once(node: Node, query: str) -> None:
    answer = await node.api.get(logs_of(await node.run(TEN), f"?{query}"), headers={"Range": "bytes=2-4"})
    check_problem(answer, 422, "excludes a Range header", query[:-2], "parameter")


@pytest.mark.parametrize(
    ("fields", "out", "err"),
    [
        ({}, "slurm-{}.out", "slurm-{}.out"),
        ({"standard_error": "slurm-%j.out"}, "slurm-{}.out", "slurm-{}.out"),
        ({"standard_error": "errors"}, "slurm-{}.out", "errors"),
        ({"standard_output": "a/b/%x.%j", "name": "my job", "standard_error": "a/%j%%"}, "a/b/my job.{}", "a/{}%"),
    ],
)
async def test_where_the_streams_go(node: Node, fields: dict[str, str], out: str, err: str) -> None:
    attempt = await node.run(**fields)
    for file, text in ((out, b"out "), (err, b"err")):
        write(node.file(attempt, file), text)
    expected = (b"out err", b"out err") if out == err else (b"out ", b"err")
    for stream, content in zip(("stdout", "stderr"), expected, strict=True):
        check_output(await node.api.get(logs_of(attempt, f"?stream={stream}")), content)


async def test_the_null_device_holds_nothing(node: Node) -> None:
    attempt = await node.run(standard_output="/dev/null", standard_error="errors")
    write(node.file(attempt, "errors"), b"err")
    check_output(await node.api.get(logs_of(attempt)), b"")
    check_output(await node.api.get(logs_of(attempt, "?stream=stderr")), b"err")
    joined = await node.run(standard_output="/dev/null")
    check_output(await node.api.get(logs_of(joined, "?stream=stderr")), b"")


async def test_a_large_output(node: Node) -> None:
    content = BYTES * 8000
    attempt = await node.run(content)
    check_output(await node.api.get(logs_of(attempt)), content)


async def test_a_client_that_leaves_in_the_middle(node: Node) -> None:
    attempt = await node.run(BYTES * 20_000)
    reader, writer = await asyncio.open_connection("127.0.0.1", node.api.port)
    writer.write(request_bytes("GET", logs_of(attempt)))
    await reader.readexactly(1000)
    writer.transport.abort()
    check_output(await node.api.get(logs_of(attempt, "?tail=3")), BYTES[-3:])


# --- what is not there


async def test_a_link_in_the_place_of_the_file_is_not_followed(node: Node, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"hunter2")
    attempt = await node.run()
    node.file(attempt).parent.mkdir()
    node.file(attempt).symlink_to(tmp_path / "outside")
    check_problem(await node.api.get(logs_of(attempt)), 404, "no such output")
    node.file(attempt).unlink()
    node.file(attempt).mkdir()
    check_problem(await node.api.get(logs_of(attempt)), 404, "no such output")


async def test_a_worker_that_wants_another_secret(node: Node, elsewhere: Callable[..., Any]) -> None:
    attempt = await elsewhere(node.address, secret="an older one")  # noqa: S106
    check_unavailable(await node.api.get(logs_of(attempt)), "answered 401")


async def test_a_worker_shows_nothing_of_another_node(node: Node, elsewhere: Callable[..., Any]) -> None:
    attempt = await elsewhere(node.address)
    write(node.file(attempt), b"hunter2")
    check_problem(await node.api.get(logs_of(attempt)), 404, "no such output")


async def test_a_worker_whose_lease_is_over(node: Node, elsewhere: Callable[..., Any]) -> None:
    attempt = await elsewhere(node.address, lease_seconds=-1)
    check_unavailable(await node.api.get(logs_of(attempt)), "lease is over")


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:1", "nonsense", "http://[", "ftp://127.0.0.1", "", "http://", "http://127.0.0.1:99999"],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_worker_that_cannot_be_reached(
    node: Node, elsewhere: Callable[..., Any], address: str, method: str
) -> None:
    answer = await node.api.ask(method, logs_of(await elsewhere(address)))
    if method == "GET":
        check_unavailable(answer, "cannot be reached")
    else:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "2")


def check_unavailable(answer: Answer, detail: str) -> None:
    check_problem(answer, 503, detail)
    assert SECRET not in answer.body.decode()
    assert int(answer.headers["Retry-After"]) > 0


@asynccontextmanager
async def answering(answer: bytes, *, close: bool = True) -> AsyncIterator[str]:
    """A worker that is none: it sends these bytes whatever it is asked."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if close:
            writer.close()
        else:
            kept.append(writer)

    kept: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        for writer in kept:
            writer.close()
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    ("sent", "detail"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", "answered 302"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", "answered 500"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "answered 204"),
        (b"garbage", "cannot be reached"),
        (b"", "cannot be reached"),
    ],
)
async def test_a_worker_that_answers_nonsense(
    node: Node, elsewhere: Callable[..., Any], sent: bytes, detail: str
) -> None:
    async with answering(sent) as address:
        check_unavailable(await node.api.get(logs_of(await elsewhere(address))), detail)


async def test_a_worker_that_says_nothing(
    node: Node, elsewhere: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "TIMEOUT", aiohttp.ClientTimeout(sock_read=0.05))
    async with answering(b"", close=False) as address:
        check_unavailable(await node.api.get(logs_of(await elsewhere(address))), "cannot be reached")


@pytest.mark.parametrize("close", [True, False])
async def test_a_worker_that_dies_in_the_middle_cuts_the_answer(
    node: Node, elsewhere: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, close: bool
) -> None:
    monkeypatch.setattr(logs, "TIMEOUT", aiohttp.ClientTimeout(sock_read=0.05))
    async with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", close=close) as address:
        with pytest.raises(aiohttp.ClientPayloadError):
            await node.api.get(logs_of(await elsewhere(address)))
    assert (await node.api.get("/health")).status == 200


async def test_a_job_that_there_is_not(api: Api) -> None:
    check_problem(await api.get(f"{JOBS}/999999999/logs"), 404, "no job 999999999")


async def test_workers_that_stall_shut_nobody_out(node: Node, elsewhere: Callable[..., Any]) -> None:
    attempt = await node.run(TEN)
    async with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", close=False) as address:
        stalled = await elsewhere(address)
        readers = [await asyncio.open_connection("127.0.0.1", node.api.port) for _ in range(101)]
        try:
            for _, writer in readers:
                writer.write(request_bytes("GET", logs_of(stalled)))
            for reader, _ in readers:
                await reader.readuntil(b"half")
            check_output(await node.api.get(logs_of(attempt)), TEN)
        finally:
            for _, writer in readers:
                writer.transport.abort()

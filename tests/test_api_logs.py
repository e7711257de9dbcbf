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

from core.db import allocations, jobs, nodes, outputs
from core.db.connection import open_pool
from core.records import Attempt, Ending, Output
from core.settings import Settings
from core.states import Reason, State
from services.api import logs
from services.worker import files
from services.worker.file_server import FileServer
from services.worker.follow import Runs
from services.worker.launch import describe_host, paths_of
from tests.api import JOBS, Answer, Api, answers_in, api_of_a_module, check_problem, request_bytes, send_raw
from tests.builders import a_node, finish, give, register, start
from tests.conftest import Databases

pytestmark = pytest.mark.anyio

SECRET = "s3cr3t of the node"  # noqa: S105
TEN = b"0123456789"
LETTERS = b"abcdefghij"
TO_LETTERS = bytes.maketrans(TEN, LETTERS)
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
        attempt = await give(self.api.database, (await self.api.submit(requeue=True, **fields))["job_id"], self.name)
        assert await start(self.api.database, attempt, node=self.name, incarnation=self.incarnation)
        if output is not None:
            write(self.file(attempt), output)
        return attempt

    async def went_back(self, attempt: Attempt, *, ran: bool = True) -> None:
        """The attempt's end, with which its job waits again."""
        reason = Reason.NONE if ran else Reason.RESOURCES
        ending = Ending(attempt.job_id, attempt.attempt, State.PENDING, reason, ran=ran)
        running = State.RUNNING
        assert await allocations.release(self.api.database, [ending], node=self.name, before=running)

    async def again(self, attempt: Attempt, output: bytes | None = None, errors: bytes | None = None) -> Attempt:
        """The next attempt of a job that went back, which runs here and has written."""
        database = self.api.database
        again = await give(database, attempt.job_id, self.name)
        [spec] = await jobs.start(database, [again], node=self.name, incarnation=self.incarnation)
        paths = paths_of(self.settings, describe_host(self.settings, "spool of files"), spec)
        if spec.restart_cnt > 0:
            streams = (paths.standard_output, paths.standard_error)
            begins = [files.length(self.settings.roots, path) for path in streams]
            begun = Output(spec.job_id, spec.attempt, spec.restart_cnt, *begins)
            assert await outputs.store(database, [begun], node=self.name, incarnation=self.incarnation)
        for path, content in ((paths.standard_output, output), (paths.standard_error, errors)):
            if content is not None:
                write(Path(path), content)
        return again

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


@asynccontextmanager
async def serving_files(api: Api, name: str, runs: Runs) -> AsyncIterator[Node]:
    """A node that has everything; its worker is real but for running nothing."""
    settings = api.settings.model_copy(update={"node_name": name, "worker_host": "127.0.0.1"})
    settings.work_base_dir.mkdir(parents=True)
    pool = await open_pool(settings, "worker", 2)
    server = FileServer(settings, describe_host(settings, "spool of files"), pool, SECRET, runs)
    address = await server.start()
    try:
        spec = a_node(name, 10_000, address=address, secret=SECRET, work_base_dir=str(settings.work_base_dir))
        yield Node(api, settings, address, await register(api.database, spec))
    finally:
        await server.stop()
        pool.terminate()


@pytest.fixture(scope="module")
async def node(api: Api) -> AsyncIterator[Node]:
    async with serving_files(api, "files", {}) as found:
        yield found


@pytest.fixture
async def elsewhere(node: Node) -> Callable[[str], Any]:
    """Makes a job that runs on a node of its own, whose worker is at some address."""

    async def run(address: str, lease_seconds: float = 600, secret: str = SECRET) -> Attempt:
        name = f"n{next(_numbers)}"
        base = str(node.settings.work_base_dir)
        spec = a_node(name, address=address, secret=secret, work_base_dir=base)
        await register(node.api.database, spec)
        attempt = await give(node.api.database, (await node.api.submit(requeue=True))["job_id"], name)
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


# --- one attempt's bytes


@pytest.fixture
async def twice(node: Node) -> Attempt:
    """The second of two attempts: each has written ten bytes, and it runs."""
    first = await node.run(TEN)
    await node.went_back(first)
    return await node.again(first, LETTERS)


@pytest.mark.parametrize(
    ("query", "content"),
    [
        ("attempt=1", TEN),
        ("attempt=2", LETTERS),
        ("attempt=1&stream=stderr", TEN),
        ("attempt=2&stream=stderr", LETTERS),
        ("attempt=01", TEN),
        ("attempt=1&offset=4", b"456789"),
        ("attempt=1&offset=10", b""),
        ("attempt=1&offset=11", b""),
        ("attempt=1&tail=3", b"789"),
        ("attempt=1&tail=11", TEN),
        ("attempt=1&tail=0", b""),
        ("attempt=2&offset=4", b"efghij"),
        ("attempt=2&tail=3", b"hij"),
        ("attempt=2&tail=11", LETTERS),
        ("", TEN + LETTERS),
    ],
)
async def test_the_bytes_of_an_attempt(node: Node, twice: Attempt, query: str, content: bytes) -> None:
    check_output(await node.api.get(logs_of(twice, f"?{query}")), content)
    head = await node.api.ask("HEAD", logs_of(twice, f"?{query}"))
    assert (head.status, head.headers["Content-Length"]) == (200, str(len(content)))


@pytest.mark.parametrize(
    ("asked", "content", "shown"),
    [
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=5-100", b"56789", "bytes 5-9/10"),
        ("bytes=-4", b"6789", "bytes 6-9/10"),
        ("bytes=-100", TEN, "bytes 0-9/10"),
    ],
)
async def test_a_range_of_an_attempt(node: Node, twice: Attempt, asked: str, content: bytes, shown: str) -> None:
    for number, written in ((1, content), (2, content.translate(TO_LETTERS))):
        answer = await node.api.get(logs_of(twice, f"?attempt={number}"), headers={"Range": asked})
        check_output(answer, written, 206)
        assert answer.headers["Content-Range"] == shown
    answer = await node.api.get(logs_of(twice, "?attempt=1"), headers={"Range": "bytes=10-"})
    check_problem(answer, 416, "does not reach that far")
    assert answer.headers["Content-Range"] == "bytes */10"


async def test_an_attempt_that_runs_is_followed_by_its_offset(node: Node, twice: Attempt) -> None:
    for number, line in enumerate((b"one\n", b"two\n", b"\n", b"three")):
        write(node.file(twice), line)
        found = (await node.api.get(logs_of(twice, "?attempt=2&offset=10"))).body
        assert (found.endswith(line), found.count(b"\n")) == (True, min(number + 1, 3))
        check_output(await node.api.get(logs_of(twice, "?attempt=1")), TEN)


async def test_what_an_attempt_writes_while_the_one_before_it_is_read(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the tables and the look at the file."""
    first = await node.run(TEN)
    await node.went_back(first)
    starts, looks = outputs.starts, itertools.count(1)

    async def then_another_starts(connection: Any, job_id: int) -> Any:
        found = await starts(connection, job_id)
        if next(looks) == 2:  # the worker's first one; the API's comes before
            await node.again(first, LETTERS)
        return found

    monkeypatch.setattr(outputs, "starts", then_another_starts)
    check_output(await node.api.get(logs_of(first, "?attempt=1")), TEN)
    check_output(await node.api.get(logs_of(first, "?attempt=2")), LETTERS)


async def test_each_stream_has_its_own_beginning(node: Node) -> None:
    first = await node.run(TEN, standard_error="errors")
    write(node.file(first, "errors"), b"err")
    await node.went_back(first)
    second = await node.again(first, LETTERS, b"more errors")
    for number, out, err in ((1, TEN, b"err"), (2, LETTERS, b"more errors")):
        check_output(await node.api.get(logs_of(second, f"?attempt={number}")), out)
        check_output(await node.api.get(logs_of(second, f"?attempt={number}&stream=stderr")), err)


async def test_each_restart_may_have_a_file_of_its_own(node: Node) -> None:
    first = await node.run(standard_output="out.%r", standard_error="errors")
    write(node.file(first, "out.0"), TEN)
    write(node.file(first, "errors"), b"err")
    await node.went_back(first)
    second = await node.again(first, LETTERS, b"more")
    await node.went_back(second)
    third = await node.again(second, b"third", b"still more")
    for number, out, err in ((1, TEN, b"err"), (2, LETTERS, b"more"), (3, b"third", b"still more")):
        check_output(await node.api.get(logs_of(third, f"?attempt={number}")), out)
        check_output(await node.api.get(logs_of(third, f"?attempt={number}&stream=stderr")), err)
    check_output(await node.api.get(logs_of(third)), b"third")


async def test_of_a_job_that_waits_again_each_attempt_is_there(node: Node) -> None:
    first = await node.run(TEN)
    await node.went_back(first)
    check_output(await node.api.get(logs_of(first)), b"")
    check_output(await node.api.get(logs_of(first, "?attempt=1")), TEN)


async def test_an_attempt_that_never_started_has_written_nothing(node: Node) -> None:
    """Before the first that ran, between two, and as the last one; one that is on its way as well."""
    job_id = (await node.api.submit(requeue=True))["job_id"]
    placed = await give(node.api.database, job_id, node.name)
    never_claimed = Ending(job_id, placed.attempt, State.PENDING, Reason.NONE)
    assert await allocations.release(node.api.database, [never_claimed], node=node.name, before=State.CONFIGURING)
    second = await node.again(placed)
    await node.went_back(second, ran=False)
    third = await node.again(second, TEN)
    await node.went_back(third)
    fourth = await node.again(third)
    await node.went_back(fourth, ran=False)
    fifth = await node.again(fourth, LETTERS)
    await node.went_back(fifth)
    sixth = await give(node.api.database, job_id, node.name)
    for number, content in ((1, b""), (2, b""), (3, TEN), (4, b""), (5, LETTERS), (6, b"")):
        check_output(await node.api.get(logs_of(sixth, f"?attempt={number}")), content)
    incarnation = node.incarnation
    assert await jobs.start(node.api.database, [sixth], node=node.name, incarnation=incarnation)  # and has not said
    check_output(await node.api.get(logs_of(sixth, "?attempt=6")), b"")


async def test_bytes_that_somebody_removed(node: Node) -> None:
    first = await node.run(TEN)
    await node.went_back(first)
    node.file(first).unlink()
    second = await node.again(first, LETTERS)
    check_output(await node.api.get(logs_of(second, "?attempt=1")), b"")
    check_output(await node.api.get(logs_of(second, "?attempt=2")), LETTERS)
    node.file(first).write_bytes(b"abc")
    check_output(await node.api.get(logs_of(second, "?attempt=2")), b"abc")


async def test_the_null_device_holds_nothing_of_any_attempt(node: Node) -> None:
    first = await node.run(standard_output="/dev/null")
    await node.went_back(first)
    check_output(await node.api.get(logs_of(first, "?attempt=1")), b"")
    second = await node.again(first)
    check_output(await node.api.get(logs_of(second, "?attempt=2")), b"")


async def test_an_attempt_is_asked_of_its_own_node(node: Node, elsewhere: Callable[..., Any]) -> None:
    """Which may be away, or deleted, while the job's last one is there."""
    async with answering(b"HTTP/1.1 200 OK\r\nAccept-Ranges: bytes\r\nContent-Length: 3\r\n\r\nold") as address:
        first = await elsewhere(address)
        name = (await node.api.job(first.job_id))["nodes"][0]
        ending = Ending(first.job_id, first.attempt, State.PENDING, Reason.NONE)
        assert await allocations.release(node.api.database, [ending], node=name, before=State.RUNNING)
        second = await node.again(first, LETTERS)
        check_output(await node.api.get(logs_of(second, "?attempt=1")), b"old")
        check_output(await node.api.get(logs_of(second, "?attempt=2")), LETTERS)
        check_output(await node.api.get(logs_of(second)), LETTERS)
    await nodes.set_state(node.api.database, name, "DOWN", reason="burnt", by="operator")
    check_unavailable(await node.api.get(logs_of(second, "?attempt=1")), "cannot be reached")
    await node.api.database.execute("UPDATE node_leases SET lease_until = now() WHERE node = $1", name)
    check_unavailable(await node.api.get(logs_of(second, "?attempt=1")), f"node {name}, which has the output, is down")
    assert await nodes.forget(node.api.database, name)
    check_problem(await node.api.get(logs_of(second, "?attempt=1")), 410, f"node {name}, which had the output, was")
    check_output(await node.api.get(logs_of(second, "?attempt=2")), LETTERS)


async def test_a_worker_shows_no_attempt_of_another_node(node: Node, elsewhere: Callable[..., Any]) -> None:
    first = await elsewhere(node.address)
    write(node.file(first), b"hunter2")
    name = (await node.api.job(first.job_id))["nodes"][0]
    ending = Ending(first.job_id, first.attempt, State.PENDING, Reason.NONE)
    assert await allocations.release(node.api.database, [ending], node=name, before=State.RUNNING)
    second = await node.again(first)
    check_problem(await node.api.get(logs_of(second, "?attempt=1")), 503, "answered 409")


@pytest.mark.parametrize("attempt", ["0", "-1", "", "one", "1.0", "1e0", "%D9%A1", "9" * 20, "2147483648", "1;2"])
async def test_what_can_be_no_attempt(node: Node, twice: Attempt, attempt: str) -> None:
    answer = await node.api.get(logs_of(twice, f"?attempt={attempt}"))
    check_problem(answer, 422, "should be a number from 1 to", "attempt", "parameter")


async def test_an_attempt_that_the_job_has_not_had(node: Node, twice: Attempt) -> None:
    for number in (3, 2147483647):
        answer = await node.api.get(logs_of(twice, f"?attempt={number}"))
        wanted = f"should be at most 2, the last attempt of job {twice.job_id}"
        check_problem(answer, 422, wanted, "attempt", "parameter")
    job_id = (await node.api.submit())["job_id"]
    answer = await node.api.get(logs_of(Attempt(job_id, 1), "?attempt=1"))
    check_problem(answer, 422, f"job {job_id} has had no attempt yet", "attempt", "parameter")
    check_problem(await node.api.get(f"{JOBS}/999999999/logs?attempt=1"), 404, "no job 999999999")


async def test_an_attempt_is_asked_for_once(node: Node, twice: Attempt) -> None:
    answer = await node.api.get(logs_of(twice, "?attempt=1&attempt=2"))
    check_problem(answer, 422, "should be given once", "attempt", "parameter")


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
    check_problem(await node.api.get(logs_of(attempt)), 503, "answered 409")


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

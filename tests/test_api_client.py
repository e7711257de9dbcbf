"""The client against the live API, and against what is none."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from core import __version__
from core import client as core_client
from core.client import Client, ClientError
from core.db.connection import open_pool
from core.states import State
from services.api.app import running
from services.api.serving import Runner
from services.worker.file_server import FileServer
from services.worker.launch import describe_host
from tests.api import SCRIPT, Api, api_of_a_module
from tests.builders import a_node, finish, give, register, settings_for, start
from tests.conftest import Databases
from tests.proxy import Fault, proxied

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def api(databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    async with api_of_a_module(databases, redis_url, tmp_path_factory.mktemp("api")) as found:
        await register(found.database, a_node())
        yield found


@pytest.fixture
async def client(api: Api) -> AsyncIterator[Client]:
    async with Client(api.address + "/") as found:
        yield found


# --- the live API


async def test_submit_and_read(api: Api, client: Client) -> None:
    job = await client.submit({"account": "test", "name": "ü"}, SCRIPT)
    assert job == await api.job(job["job_id"]) == await client.job(job["job_id"])
    assert await client.script(job["job_id"]) == SCRIPT
    assert await client.logs(job["job_id"]) == b""


async def test_a_large_script(client: Client) -> None:
    script = "#!/bin/sh\n" + "x" * (1024 * 1024 - 10)
    job = await client.submit({"account": "test"}, script)
    assert await client.script(job["job_id"]) == script


async def test_a_key_of_ones_own(api: Api, client: Client) -> None:
    first = await client.submit({"account": "test"}, SCRIPT, key="mine")
    assert await client.submit({"account": "test"}, SCRIPT, key="mine") == first
    with pytest.raises(ClientError, match=f"stands for another job, {first['job_id']}"):
        await client.submit({"account": "test", "name": "other"}, SCRIPT, key="mine")
    others = [await client.submit({"account": "test"}, SCRIPT) for _ in range(2)]
    assert len({first["job_id"], *(job["job_id"] for job in others)}) == 3


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER, Fault.HOLE_BEFORE, Fault.HOLE_AFTER])
async def test_a_submission_whose_answer_is_lost_is_one_job(api: Api, fault: Fault, away: bool) -> None:
    account = f"{fault.name} {away}"
    async with proxied(api.address) as wire, Client(wire.url, timeout_seconds=1) as client:
        wire.at(b"POST", fault, away=away)
        submitting = asyncio.create_task(client.submit({"account": account}, SCRIPT))
        await wire.tripped.wait()
        await wire.mend()
        job = await submitting
    async with Client(api.address) as client:
        assert [found async for found in client.all_jobs(account=account)] == [job]


async def test_a_submission_is_not_sent_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_client, "RETRY_SECONDS", 0.5)
    sent: list[bytes] = []
    unavailable = http("503 Service Unavailable", "application/problem+json", b'{"detail": "away"}')
    async with answering(unavailable, sent) as address, Client(address) as client:
        async with asyncio.timeout(20):
            with pytest.raises(ClientError, match=r"^away$"):
                await client.submit({"account": "test"}, SCRIPT)
    keys = {line for head in sent for line in head.splitlines() if line.lower().startswith(b"idempotency-key: ")}
    assert (len(sent) > 1, len(keys)) == (True, 1)


async def test_what_is_refused_is_not_sent_again() -> None:
    sent: list[bytes] = []
    refused = http("422 Unprocessable", "application/problem+json", b'{"detail": "no"}')
    async with answering(refused, sent) as address, Client(address) as client:
        with pytest.raises(ClientError, match=r"^no$"):
            await client.submit({"account": "test"}, SCRIPT)
    assert len(sent) == 1


async def test_lists(client: Client) -> None:
    made = [(await client.submit({"account": "lists"}, SCRIPT))["job_id"] for _ in range(5)]
    page = await client.jobs(account="lists", limit=2, order="oldest")
    assert [job["job_id"] for job in page["jobs"]] == made[:2]
    found = [job["job_id"] async for job in client.all_jobs(account="lists", limit=2)]
    assert found == made[::-1]
    assert [job async for job in client.all_jobs(account="nobody")] == []


async def test_nodes_and_health(client: Client) -> None:
    assert "n1" in [node["name"] for node in await client.nodes()]
    assert (await client.health())["version"] == __version__


async def test_cancel(api: Api, client: Client) -> None:
    waits = (await client.submit({"account": "test"}, SCRIPT))["job_id"]
    assert (await client.cancel(waits))["state"] == "CANCELLED"
    attempt = await give(api.database, (await client.submit({"account": "test"}, SCRIPT))["job_id"])
    assert await start(api.database, attempt)
    assert (await client.cancel(attempt.job_id))["state"] == "RUNNING"
    await finish(api.database, attempt, state=State.CANCELLED)
    assert (await client.cancel(attempt.job_id))["state"] == "CANCELLED"


async def test_logs_from_an_offset(api: Api, client: Client) -> None:
    settings = api.settings.model_copy(update={"node_name": "files", "worker_host": "127.0.0.1"})
    pool = await open_pool(settings, "worker", 1)
    server = FileServer(settings, describe_host(settings, "spool"), pool, "secret", {})
    try:
        base = str(settings.work_base_dir)
        spec = a_node("files", address=await server.start(), secret="secret", work_base_dir=base)  # noqa: S106
        await register(api.database, spec)
        fields = {"account": "test", "standard_error": "err"}
        attempt = await give(api.database, (await client.submit(fields, SCRIPT))["job_id"], "files")
        assert await start(api.database, attempt, node="files")
        folder = settings.work_base_dir / str(attempt.job_id)
        folder.mkdir(parents=True)
        (folder / f"slurm-{attempt.job_id}.out").write_bytes(b"\xff\0out")
        (folder / "err").write_bytes(b"err")
        assert await client.logs(attempt.job_id) == b"\xff\0out"
        assert await client.logs(attempt.job_id, offset=2) == b"out"
        assert await client.logs(attempt.job_id, "stderr") == b"err"
    finally:
        await server.stop()
        pool.terminate()
        await api.database.execute("DELETE FROM node_leases WHERE node = 'files'")


async def test_wait_until_it_is_over(api: Api, client: Client) -> None:
    attempt = await give(api.database, (await client.submit({"account": "test"}, SCRIPT))["job_id"])
    assert await start(api.database, attempt)
    waiting = asyncio.create_task(client.wait(attempt.job_id, timeout_seconds=20))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await finish(api.database, attempt)
    assert (await waiting)["state"] == "COMPLETED"
    assert (await client.wait(attempt.job_id))["state"] == "COMPLETED"


async def test_wait_no_longer_than_that(client: Client) -> None:
    job_id = (await client.submit({"account": "test"}, SCRIPT))["job_id"]
    with pytest.raises(TimeoutError, match=rf"^job {job_id} is not over after 0\.05 s$"):
        await client.wait(job_id, timeout_seconds=0.05)
    with pytest.raises(ClientError, match="there is no job 999999"):
        await client.wait(999999, timeout_seconds=20)


async def test_what_a_refusal_says(client: Client) -> None:
    with pytest.raises(ClientError) as caught:
        await client.submit({"account": "", "x": 1}, "echo")
    assert sorted(str(caught.value).split("; ")) == [
        "/job/account: String should have at least 1 character",
        "/job/x: unknown field",
        "/script: should begin with '#!' and the interpreter, such as #!/bin/bash",
        "3 faults",
    ]
    assert (caught.value.status, caught.value.may_pass) == (422, False)
    with pytest.raises(ClientError, match=r"^1 fault; limit: should be a number from 1 to 200$"):
        await client.jobs(limit=0)
    with pytest.raises(ClientError, match=r"^there is no job 999999$"):
        await client.logs(999999)


# --- a server that is away, or another one


async def test_a_server_that_is_away() -> None:
    async with Client("http://127.0.0.1:1") as client:
        with pytest.raises(ClientError, match=r"^http://127\.0\.0\.1:1 cannot be reached: ") as caught:
            await client.health()
    assert (caught.value.status, caught.value.may_pass) == (0, True)


@pytest.mark.parametrize("address", ["nonsense", "http://", "http://127.0.0.1:99999", "http://[::"])
async def test_an_address_that_is_none(address: str) -> None:
    async with Client(address) as client:
        with pytest.raises(ClientError, match="cannot be reached"):
            await client.health()


@asynccontextmanager
async def answering(answer: bytes, asked: list[bytes] | None = None) -> AsyncIterator[str]:
    """A server that says this, whatever it is asked, and notes the heads of what it was."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if asked is not None:
            asked.append(head)
        if answer:
            writer.write(answer)
            writer.close()
        else:
            await reader.read()
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


def http(status: str, kind: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("answer", "status", "detail"),
    [
        (http("502 Bad Gateway", "text/html", b"<html>"), 502, "HTTP 502, and not from Rowlock"),
        (http("503 Away", "application/problem+json", b"{"), 503, "HTTP 503, and not from Rowlock"),
        (http("503 Away", "application/problem+json", b"[]"), 503, "HTTP 503, and not from Rowlock"),
        (http("503 Away", "application/problem+json", b"{}"), 503, "HTTP 503"),
        (http("503 Away", "application/problem+json", b"\xff"), 503, "HTTP 503, and not from Rowlock"),
        (http("503 Away", "application/problem+json", b'{"detail": "x", "errors": 5}'), 503, "x"),
        (http("503 Away", "application/problem+json", b'{"detail": "x", "errors": ["y"]}'), 503, "x"),
        (http("200 OK", "text/html", b"<html>"), 200, "something else than JSON"),
        (http("200 OK", "application/json", b"{"), 200, "something else than JSON"),
        (http("200 OK", "application/json", b"[]"), 200, "something else than JSON"),
        (http("200 OK", "application/json", b"\xff"), 200, "something else than JSON"),
        (http("200 OK", "application/json", b"{}")[:-1], 0, "cannot be reached"),
        (b"garbage\r\n\r\n", 0, "cannot be reached"),
    ],
)
async def test_a_server_that_is_another(answer: bytes, status: int, detail: str) -> None:
    async with answering(answer) as address, Client(address) as client:
        with pytest.raises(ClientError) as caught:
            await client.health()
    assert caught.value.status == status
    assert detail in str(caught.value)


async def test_a_server_that_says_nothing() -> None:
    async with answering(b"") as address, Client(address, timeout_seconds=0.05) as client:
        with pytest.raises(ClientError, match="cannot be reached: "):
            await client.health()
        with pytest.raises(TimeoutError, match="not over after"):
            await client.wait(1, timeout_seconds=0.1)


async def test_wait_outlives_a_server_that_comes_late(databases: Databases, redis_url: str, tmp_path: Path) -> None:
    name = await databases.create()
    settings = settings_for(databases.url_of(name), redis_url, tmp_path)
    try:
        async with running(settings) as application:
            runner = Runner(application, access_log=None, handle_signals=False)
            await runner.setup()
            async with asyncio.timeout(20):
                first = web.TCPSite(runner, "127.0.0.1", 0)
                await first.start()
                port = runner.addresses[0][1]
                async with Client(f"http://127.0.0.1:{port}") as client:
                    job_id = await _submitted(client)
                    await client.cancel(job_id)
                    await first.stop()
                async with Client(f"http://127.0.0.1:{port}") as client:
                    waiting = asyncio.create_task(client.wait(job_id))
                    await asyncio.sleep(0.1)
                    assert not waiting.done()
                    await web.TCPSite(runner, "127.0.0.1", port).start()
                    assert (await waiting)["state"] == "CANCELLED"
            await runner.cleanup()
    finally:
        await databases.drop(name)


async def _submitted(client: Client) -> int:
    """A job, once the API has found its database."""
    while True:
        try:
            return (await client.submit({"account": "test"}, SCRIPT))["job_id"]
        except ClientError as error:
            if not error.may_pass:
                raise
            await asyncio.sleep(0.02)

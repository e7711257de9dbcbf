"""The API in this process, asked over real HTTP, on a database of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import asyncpg
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from core.settings import Settings
from services.api.app import running
from services.api.serving import Runner
from services.api.state import STATE, State
from tests.builders import settings_for

if TYPE_CHECKING:
    from tests.conftest import Databases

PATIENCE = 60.0
"""Seconds after which something that must come is called missing."""

JOBS = "/api/v1/jobs"
SCRIPT = "#!/bin/sh\necho hello\n"
SECRETS = ("hunter2", "of the node", "Traceback", "site-packages")
"""What stands in no answer: a job's variable in the tests, a node's secret, and where a crash would show."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Api:
    """A running API with a client, and a look into its database."""

    settings: Settings
    state: State
    port: int
    session: aiohttp.ClientSession
    database: asyncpg.Connection

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        """Send a request; `path` goes out as it stands."""
        url = URL(self.address + path, encoded=True)
        async with self.session.request(method, url, allow_redirects=False, **options) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def get(self, path: str, **options: Any) -> Answer:
        """GET."""
        return await self.ask("GET", path, **options)

    async def post(self, document: object) -> Answer:
        """Submit what may be wrong."""
        body = BytesIO(json.dumps(document).encode())
        return await self.ask("POST", JOBS, data=body, headers={"Content-Type": "application/json"})

    async def submit(self, script: str = SCRIPT, **fields: Any) -> Any:
        """Submit a good job; the document that came back."""
        answer = await self.post({"job": {"account": "test", **fields}, "script": script})
        assert answer.status == 201, answer.body
        return answer.json

    async def job(self, job_id: int) -> Any:
        """The job's document."""
        answer = await self.get(f"{JOBS}/{job_id}")
        assert answer.status == 200, answer.body
        return answer.json

    async def stored(self) -> int:
        """Rows in all tables that a submission writes to."""
        tables = ("jobs", "job_specs", "idempotency_keys", "pending", "allocations", "job_events")
        counts = " + ".join(f"(SELECT count(*) FROM {table})" for table in tables)
        found: int = await self.database.fetchval(f"SELECT {counts}")
        return found


async def until(true: Callable[[], Any]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(PATIENCE):
        while not true():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(settings: Settings, finish_seconds: float = 1) -> AsyncIterator[tuple[State, int]]:
    """An API on a free port, which may be waiting for PostgreSQL: its state, its port."""
    async with running(settings) as application:
        runner = Runner(application, access_log=None, handle_signals=False, shutdown_timeout=finish_seconds)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield application[STATE], runner.addresses[0][1]
        finally:
            await runner.cleanup()


@asynccontextmanager
async def an_api(settings: Settings) -> AsyncIterator[Api]:
    """An API that has found its database, with a client."""
    database = await asyncpg.connect(settings.postgres_dsn)
    try:
        connector = aiohttp.TCPConnector(limit=0)
        async with serving(settings) as (state, port), aiohttp.ClientSession(connector=connector) as session:
            await until(lambda: state.database.is_open)
            yield Api(settings, state, port, session, database)
    finally:
        await database.close()


@asynccontextmanager
async def api_of_a_module(databases: Databases, redis_url: str, folder: Path, **changes: Any) -> AsyncIterator[Api]:
    """One API for all tests of a module."""
    async with databases.one() as url, an_api(settings_for(url, redis_url, folder, **changes)) as api:
        yield api


def check_problem(
    answer: Answer, status: int, detail: str = "", where: str | None = None, kind: str = "pointer"
) -> Any:
    """That this is the problem, and tells no secret; `detail` stands in it, or in its fault at `where`."""
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["Server"] == "rowlock"
    problem = answer.json
    assert problem["type"] == "about:blank"
    assert problem["title"] == HTTPStatus(status).phrase
    assert problem["status"] == status
    assert not [secret for secret in SECRETS if secret.encode() in answer.body]
    faults = [fault["detail"] for fault in problem.get("errors", []) if fault.get(kind) == where]
    texts = [problem["detail"]] if where is None else faults
    assert any(detail in text for text in texts), problem
    return problem


async def send_raw(port: int, *parts: bytes, end: bool = False, last: bytes = b"") -> bytes:
    """Send bytes, part by part, and read until the other side closes, or to `last`; `end` closes our half first."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(parts[0])
        for part in parts[1:]:
            await asyncio.sleep(0.03)  # a part is to arrive by itself; when it does not, nothing else is expected
            writer.write(part)
        await writer.drain()
        if end:
            writer.write_eof()
        async with asyncio.timeout(PATIENCE):
            return await (reader.readuntil(last) if last else reader.read())
    finally:
        writer.close()


def request_bytes(method: str, path: str, *headers: str, body: bytes = b"", host: str | None = "localhost") -> bytes:
    """A request as it goes over the wire, whatever is wrong with it; the connection ends after it."""
    given = [] if host is None else [f"Host: {host}"]
    lines = [f"{method} {path} HTTP/1.1", *given, *headers, "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def answers_in(raw: bytes) -> list[Answer]:
    """Every answer in what was received; one without a length is the last. HEAD is not for this."""
    found = []
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = CIMultiDict(_pairs(lines))
        status = int(first.split(" ")[1])
        length = 0 if status < 200 else int(headers.get("Content-Length", len(raw)))
        found.append(Answer(status, CIMultiDictProxy(headers), raw[:length]))
        raw = raw[length:]
    return found


def _pairs(lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    for line in lines:
        name, _, value = line.partition(": ")
        yield name, value

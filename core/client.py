"""A client of the HTTP API: for the command line, the demo, the benchmarks and the tests."""

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from types import TracebackType
from typing import Any, Literal, Self, cast
from urllib.parse import quote

import aiohttp

from core.documents import JobDocument, JobsDocument, NodeDocument, NodesDocument, SubmittedDocument
from core.errors import RowlockError
from core.states import FINAL

LONGEST_WAIT_SECONDS = 20.0
"""Of one request; the next one goes on."""
LONGEST_QUIET_SECONDS = 15.0
"""Of an output that is followed, between two comments."""
MOST_WAITS = 500
"""At a time, on connections of their own: what waits for jobs holds up nothing else."""
FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 2.0
RETRY_SECONDS = 20.0

_FINAL = frozenset(state.value for state in FINAL)


class ClientError(RowlockError):
    """The API refused, or was not there: `status` is 0 then. `problem` is the document that it answered."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status = status
        self.problem = dict(problem)
        errors = self.problem.get("errors")
        listed = errors if isinstance(errors, list) else []  # who knows who answered
        self.faults: list[dict[str, Any]] = [fault for fault in listed if isinstance(fault, dict)]
        texts = [_fault_text(fault) for fault in self.faults]
        super().__init__("; ".join([str(self.problem.get("detail", f"HTTP {status}")), *texts]))

    @property
    def may_pass(self) -> bool:
        """Whether the same request may be answered otherwise in a moment."""
        return self.status in (0, 503)


def _fault_text(fault: Mapping[str, Any]) -> str:
    return f"{fault.get('pointer') or fault.get('parameter') or 'request'}: {fault.get('detail')}"


class Client:
    """One API, at `address`; used as a context. Every call raises ClientError."""

    def __init__(self, address: str, *, timeout_seconds: float = 30, connections: int = 100) -> None:
        self.address = address.rstrip("/")
        self._seconds = timeout_seconds
        self._connections = connections
        self._longest_wait = min(LONGEST_WAIT_SECONDS, timeout_seconds / 2)
        self._session: aiohttp.ClientSession | None = None
        self._waiting: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = _new_session(self._connections, aiohttp.ClientTimeout(total=self._seconds))
        # Those that queue for a connection lose no time of theirs by it.
        patience = aiohttp.ClientTimeout(total=None, sock_connect=self._seconds, sock_read=self._seconds)
        self._waiting = _new_session(MOST_WAITS, patience)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        assert self._waiting is not None
        await self._session.close()
        await self._waiting.close()

    async def submit(self, job: Mapping[str, Any], script: str, *, key: str | None = None) -> JobDocument:
        """Submit under a key, one of its own by default: one job, however often it is sent.

        Sent again while the API cannot be reached or cannot tell (503), for RETRY_SECONDS.
        """
        return cast(JobDocument, await self._post({"job": dict(job), "script": script}, key))

    async def submit_many(
        self, submissions: Iterable[tuple[Mapping[str, Any], str]], *, key: str | None = None
    ) -> list[int]:
        """Submit jobs with their scripts in one request, all or none: their numbers, in order. Sent again likewise."""
        items = [{"job": dict(job), "script": script} for job, script in submissions]
        answer = cast(SubmittedDocument, await self._post({"jobs": items}, key))
        return [job["job_id"] for job in answer["jobs"]]

    async def _post(self, body: Mapping[str, Any], key: str | None) -> dict[str, Any]:
        headers = {"Idempotency-Key": key or secrets.token_hex(16)}
        loop, pause = asyncio.get_running_loop(), FIRST_RETRY_SECONDS
        ends = loop.time() + RETRY_SECONDS
        while True:
            try:
                return await self._json("POST", "/api/v1/jobs", body=body, headers=headers)
            except ClientError as error:
                if not error.may_pass or loop.time() + pause > ends:
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_RETRY_SECONDS)

    async def job(self, job_id: int) -> JobDocument:
        """One job."""
        return cast(JobDocument, await self._json("GET", f"/api/v1/jobs/{job_id}"))

    async def cancel(self, job_id: int) -> JobDocument:
        """Cancel; the job as it is then, which may be RUNNING until nothing of it is left."""
        return cast(JobDocument, await self._json("DELETE", f"/api/v1/jobs/{job_id}"))

    async def jobs(self, **query: str | int) -> JobsDocument:
        """One page of jobs; the query is that of ``GET /api/v1/jobs``."""
        return cast(JobsDocument, await self._json("GET", "/api/v1/jobs", query=query))

    async def all_jobs(self, **query: str | int) -> AsyncIterator[JobDocument]:
        """Every job."""
        async for page in self.pages(**query):
            for job in page["jobs"]:
                yield job

    async def pages(self, **query: str | int) -> AsyncIterator[JobsDocument]:
        """Every job, page by page."""
        page = await self.jobs(**query)
        yield page
        while page["next_cursor"] is not None:
            page = await self.jobs(**{**query, "cursor": page["next_cursor"]})
            yield page

    async def logs(
        self,
        job_id: int,
        stream: Literal["stdout", "stderr"] = "stdout",
        *,
        attempt: int | None = None,
        offset: int = 0,
    ) -> bytes:
        """The output, or that of one attempt alone, from `offset` on, as far as it is written."""
        alone = {} if attempt is None else {"attempt": attempt}
        query: dict[str, str | int] = {"stream": stream, "offset": offset, **alone}
        return await self._bytes("GET", f"/api/v1/jobs/{job_id}/logs", query=query)

    async def follow(
        self, job_id: int, stream: Literal["stdout", "stderr"] = "stdout", *, offset: int = 0
    ) -> AsyncGenerator[bytes, None]:
        """The output as it is written, until the job is over; each byte once, whatever becomes of the connection.

        Of a job that is run again, the bytes of each attempt. A server that is away is waited for. Close it to stop.
        """
        place = _Place({"stream": stream, "follow": "true", "offset": offset})
        pause = FIRST_RETRY_SECONDS
        while not place.over:
            before = place.mark
            try:
                async with aclosing(self._followed(job_id, place)) as found:
                    async for data in found:
                        yield data
            except ClientError as error:
                if not error.may_pass:
                    raise
            if place.over or place.mark != before:
                pause = FIRST_RETRY_SECONDS
                continue
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_RETRY_SECONDS)

    async def _followed(self, job_id: int, place: "_Place") -> AsyncGenerator[bytes, None]:
        path = f"/api/v1/jobs/{job_id}/logs"
        headers = {} if place.last is None else {"Last-Event-ID": place.last}
        patience = max(self._seconds, 2 * LONGEST_QUIET_SECONDS)
        async with self._answered("GET", path, place.query, headers=headers, patience=patience) as answer:
            async for event in _events(answer):
                try:
                    data = place.read(event)
                except (KeyError, ValueError, TypeError):
                    raise ClientError(answer.status, {"detail": f"{self.address} answered something else"}) from None
                yield data

    async def output(
        self,
        job_id: int,
        stream: Literal["stdout", "stderr"] = "stdout",
        *,
        attempt: int | None = None,
        tail: int | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """The output like `logs`, or its last `tail` bytes, piece by piece, of any size. Close it to stop earlier."""
        wanted = {"attempt": attempt, "tail": tail}
        given = {name: value for name, value in wanted.items() if value is not None}
        query: dict[str, str | int] = {"stream": stream, **given}
        async with self._answered("GET", f"/api/v1/jobs/{job_id}/logs", query, patience=self._seconds) as answer:
            async for piece in answer.content.iter_any():
                yield piece

    async def script(self, job_id: int) -> str:
        """The script as submitted."""
        return (await self._bytes("GET", f"/api/v1/jobs/{job_id}/script")).decode()

    async def nodes(self) -> list[NodeDocument]:
        """Every node."""
        return cast(NodesDocument, await self._json("GET", "/api/v1/nodes"))["nodes"]

    async def node(self, name: str) -> NodeDocument:
        """One node."""
        return cast(NodeDocument, await self._json("GET", _path_of(name)))

    async def set_node_state(
        self, name: str, state: Literal["DRAIN", "RESUME", "DOWN"], reason: str | None = None
    ) -> NodeDocument:
        """Take a node out, for a reason, or back in; DOWN ends what runs there."""
        return cast(NodeDocument, await self._json("PATCH", _path_of(name), body={"state": state, "reason": reason}))

    async def delete_node(self, name: str) -> None:
        """Forget a node that is DOWN and holds nothing."""
        async with self._answered("DELETE", _path_of(name), None, None):
            pass

    async def health(self) -> dict[str, Any]:
        """What ``GET /health`` says; ClientError when it is not well."""
        return await self._json("GET", "/health")

    async def wait(self, job_id: int, *, timeout_seconds: float | None = None) -> JobDocument:
        """The job once it is over; TimeoutError when that takes longer. A server that is away is waited for."""
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._wait(job_id)
        except TimeoutError:
            raise TimeoutError(f"job {job_id} is not over after {timeout_seconds:g} s") from None

    async def _wait(self, job_id: int) -> JobDocument:
        pause, query = FIRST_RETRY_SECONDS, {"wait": f"{self._longest_wait:g}s", "until": "final"}
        at_once = min(FIRST_RETRY_SECONDS, self._longest_wait / 2)
        loop = asyncio.get_running_loop()
        while True:
            asked = loop.time()
            try:
                job = cast(JobDocument, await self._json("GET", f"/api/v1/jobs/{job_id}", query=query))
                if job["state"] in _FINAL:
                    return job
                if loop.time() - asked > at_once:
                    pause = FIRST_RETRY_SECONDS
                    continue
            except ClientError as error:
                if not error.may_pass:
                    raise
            # It stops, or is away.
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_RETRY_SECONDS)

    async def _json(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int] | None = None,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        async with self._answered(method, path, query, body, headers) as answer:
            try:
                document = await answer.json(content_type=None)
            except ValueError:
                document = None
            if not isinstance(document, dict):
                raise ClientError(answer.status, {"detail": f"{self.address} answered something else than JSON"})
            return document

    async def _bytes(self, method: str, path: str, *, query: Mapping[str, str | int] | None = None) -> bytes:
        async with self._answered(method, path, query) as answer:
            return await answer.read()

    @asynccontextmanager
    async def _answered(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int] | None,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        patience: float | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        # `patience`: seconds without a byte, of an answer that may go on for ever.
        # From a file, as it were: aiohttp warns of large bodies that are bytes.
        sent = None if body is None else BytesIO(json.dumps(body).encode())
        given = dict(headers or {})
        if body is not None:
            given["Content-Type"] = "application/json"
        session = self._session if patience is None and "wait" not in (query or {}) else self._waiting
        assert session is not None, "use the client as a context"
        limits = None if patience is None else aiohttp.ClientTimeout(sock_connect=self._seconds, sock_read=patience)
        more: dict[str, Any] = {} if limits is None else {"timeout": limits}
        try:
            async with session.request(
                method, self.address + path, params=query, data=sent, headers=given, **more
            ) as answer:
                if answer.status >= 400:
                    raise ClientError(answer.status, await _problem(answer))
                yield answer
        except (aiohttp.ClientError, OSError) as error:  # a time-out is an OSError
            detail = f"{self.address} cannot be reached: {str(error) or type(error).__name__}"
            raise ClientError(0, {"detail": detail}) from error


@dataclass(slots=True)
class _Place:
    """How far an output has been read."""

    query: dict[str, str | int]
    last: str | None = None
    """The id of the last event."""
    over: bool = False

    @property
    def mark(self) -> tuple[object, ...]:
        """What changes as it is read on."""
        return self.last, self.query.get("attempt")

    def read(self, event: Mapping[str, str]) -> bytes:
        """The bytes of an event. Where an attempt has ended and its job waits again, the next one is what follows."""
        if event.get("event") == "end":
            said = json.loads(event["data"])
            self.over = said["state"] in _FINAL
            self.query |= {"attempt": int(said["attempt"]) + 1, "offset": 0}
            self.last = None
            return b""
        data = base64.b64decode(event["data"])
        self.last = event["id"]
        return data


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, str]]:
    """Server-sent events, each by the names of its fields."""
    event: dict[str, str] = {}
    async for line in answer.content:
        name, colon, value = line.decode(errors="replace").rstrip("\n").partition(":")
        if name:
            event[name] = value.removeprefix(" ")
        elif event and not colon:
            yield event
            event = {}


def _new_session(connections: int, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections), timeout=timeout)


def _path_of(node: str) -> str:
    return f"/api/v1/nodes/{quote(node, safe='')}"


async def _problem(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    if answer.content_type == "application/problem+json":
        with suppress(ValueError):
            document = await answer.json(content_type=None)
            if isinstance(document, dict):
                return document
    return {"detail": f"HTTP {answer.status}, and not from Rowlock", "status": answer.status}

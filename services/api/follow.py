"""``GET /jobs/{job_id}/logs?follow=true``: an output as it is written, as server-sent events (WHATWG HTML, 9.2).

An event's id says what is behind its bytes: who was cut off goes on from there by Last-Event-ID, and has each byte
once. What cannot be followed to its end is cut off as well: the end was not said.
"""

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

import aiohttp
import structlog
from aiohttp import web

from core.attempts import OFFSET_HEADER
from core.db import jobs, nodes
from core.errors import Unavailable
from core.records import Job
from core.states import FINAL, State
from services.api import guard, state
from services.api.jobs import found
from services.api.listing import MOST_OFFSET, Excerpt
from services.api.problems import Problem, unavailable
from services.api.source import Source, ask, find, goes_nowhere

QUIET_SECONDS = 15.0
"""After which a comment shows that the connection lives."""
AGAIN_SECONDS = 1.0
STORED_SECONDS = 0.1
PIECE = 32 * 1024
"""Bytes of an event at most: readers of lines have limits."""
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5)
HEADERS = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}

_EVENT_ID = re.compile(r"(?:([0-9]{1,10})-)?([0-9]{1,19})", re.ASCII)
_BEGUN = FINAL | {State.RUNNING}
_NOT_RUNNING = frozenset(State) - {State.RUNNING}


class _Gone(Exception):
    """Nobody reads any more."""


class _Events:
    """The answer, which begins with the first thing that is said."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(headers=HEADERS)

    @property
    def begun(self) -> bool:
        """Whether a problem comes too late."""
        return self.response.prepared

    async def say(self, text: str) -> None:
        """Send an event, or a comment. Raises _Gone."""
        if not guard.is_there(self._request):
            raise _Gone
        try:
            await self.begin()
            await self.response.write(text.encode())
        except (OSError, aiohttp.ClientError) as error:
            raise _Gone from error

    async def begin(self) -> None:
        """Send the head."""
        if not self.response.prepared:
            await self.response.prepare(self._request)

    async def piece(self, data: bytes, behind: "_Place") -> None:
        """Bytes of the output, and what comes behind them."""
        await self.say(f"id: {behind}\ndata: {base64.b64encode(data).decode()}\n\n")

    async def quiet(self) -> None:
        """A comment."""
        await self.say(":\n\n")

    async def end(self, job: Job, attempt: int) -> None:
        """The output of an attempt is complete. One that another has followed since had sent its job back."""
        state = job.state if attempt >= job.attempt else State.PENDING
        document = {"job_id": job.job_id, "attempt": attempt, "state": state}
        await self.say(f"event: end\ndata: {json.dumps(document)}\n\n")
        await self.response.write_eof()


async def follow(request: web.Request, job_id: int, excerpt: Excerpt) -> web.StreamResponse:
    """The own bytes of one attempt, the last one where none is named, of what waits the next, until it is over.

    Then the job's state is said: of one that went back to the queue, or runs again, that is none of the final ones,
    and what follows is its next attempt.
    """
    events = _Events(request)
    with _known(state.of(request)):
        try:
            await _follow(request, events, job_id, excerpt)
        except _Gone:
            pass
        except Exception as error:
            if not events.begun:
                raise
            if not isinstance(error, Problem | Unavailable | aiohttp.ClientError | OSError):
                structlog.get_logger().error("request_crashed", path=request.rel_url.raw_path, exc_info=error)
            if request.transport is not None:
                request.transport.abort()
    return events.response


@contextmanager
def _known(api: state.State) -> Iterator[None]:
    """Those who follow are cut off when this process stops."""
    task = asyncio.current_task()
    assert task is not None
    api.followers.add(task)
    try:
        yield
    finally:
        api.followers.discard(task)


async def _follow(request: web.Request, events: _Events, job_id: int, excerpt: Excerpt) -> None:
    api = state.of(request)
    resumed = _last_event(request, excerpt.attempt)
    job = await _look(api, job_id)
    attempt = resumed.attempt if resumed else excerpt.attempt or _attempt_of(job)
    offset = resumed.offset if resumed else excerpt.offset
    excerpt = replace(excerpt, attempt=attempt, offset=offset, tail=None if resumed else excerpt.tail)
    if request.method == "HEAD":
        await events.begin()
        return
    if _waits(job, attempt):
        job = await _once(api, events, job, _BEGUN)
    if not (job.state in FINAL and attempt == job.attempt + 1):  # it did not come to that one
        job, source = await _source(api, events, job, excerpt, resumed=resumed is not None)
        if source is not None:
            await _pass_on(request, events, source, excerpt)
    if attempt == job.attempt and job.state is State.RUNNING:
        job = await _once(api, events, job, _NOT_RUNNING)
    await events.end(job, attempt)


@dataclass(frozen=True, slots=True)
class _Place:
    attempt: int
    offset: int

    def __str__(self) -> str:
        """As an event's id: the offset; behind its attempt, if that is a later one than the first."""
        return f"{self.offset}" if self.attempt == 1 else f"{self.attempt}-{self.offset}"


def _last_event(request: web.Request, attempt: int | None) -> _Place | None:
    last = request.headers.get("Last-Event-ID")
    if last is None:
        return None
    found = _EVENT_ID.fullmatch(last)
    place = _Place(int(found[1] or 1), int(found[2])) if found else _Place(0, 0)
    if not 0 < place.attempt < 2**31 or place.offset > MOST_OFFSET or attempt not in (None, place.attempt):
        raise Problem(400, "Last-Event-ID should be the id of an event of this stream: an offset, or ATTEMPT-OFFSET")
    return place


def _attempt_of(job: Job) -> int:
    """The one to follow: of what waits, the next."""
    return job.attempt + (job.state is State.PENDING) or 1


def _waits(job: Job, attempt: int) -> bool:
    """Whether what is to be followed has not begun."""
    if job.state is State.PENDING:
        return attempt == job.attempt + 1
    return job.state is State.CONFIGURING and attempt == job.attempt


async def _look(api: state.State, job_id: int) -> Job:
    async with api.database.connection() as connection:
        return found(await jobs.get(connection, job_id), job_id)


async def _source(
    api: state.State, events: _Events, job: Job, excerpt: Excerpt, *, resumed: bool
) -> tuple[Job, Source | None]:
    """Where the output is, once that is known: a restart stores where it begins a moment after it is RUNNING.

    What an earlier attempt left on a node that is gone does not keep those who have read of it from the later ones.
    """
    while True:
        try:
            async with api.database.connection() as connection:
                source = await find(connection, job, excerpt)
        except Problem as problem:
            if resumed and excerpt.attempt != job.attempt and problem.status in (410, 503):
                return job, None
            raise
        runs = job.state is State.RUNNING and job.attempt == excerpt.attempt
        if source is not None or not runs or goes_nowhere(job, excerpt.stream):
            return job, source
        await events.quiet()
        await asyncio.sleep(STORED_SECONDS)
        job = await _look(api, job.job_id)


async def _once(api: state.State, events: _Events, job: Job, until: frozenset[State]) -> Job:
    """The job once it is in one of these states, or has had another attempt since."""
    loop, attempt = asyncio.get_running_loop(), job.attempt
    while job.state not in until:
        await events.quiet()
        asked = loop.time()
        try:
            job = found(await api.watch.job(job.job_id, until, QUIET_SECONDS), job.job_id)
        except Unavailable:
            await asyncio.sleep(AGAIN_SECONDS)
        if until is _NOT_RUNNING and job.attempt != attempt:
            break
        if job.state not in until and loop.time() - asked < QUIET_SECONDS / 2:  # too many wait: nobody is waited for
            await asyncio.sleep(AGAIN_SECONDS)
    return job


async def _pass_on(request: web.Request, events: _Events, source: Source, excerpt: Excerpt) -> None:
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                answer = await stack.enter_async_context(ask(request, source, excerpt, {}, TIMEOUT))
        except TimeoutError:
            raise unavailable(f"node {source.job.node}, which has the output, does not answer") from None
        place = _Place(source.job.attempt, int(answer.headers[OFFSET_HEADER]))
        if not events.begun:
            await events.quiet()
        async for data in _pieces(request, events, source, answer.content):
            place = replace(place, offset=place.offset + len(data))
            await events.piece(data, place)


async def _pieces(
    request: web.Request, events: _Events, source: Source, content: aiohttp.StreamReader
) -> AsyncIterator[bytes]:
    """What the worker sends, to its end. Raises ClientError where it was cut off, or its node is not heard any more."""
    while True:
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                data = await content.readany()
        except TimeoutError:
            await events.quiet()
            with suppress(Unavailable):
                await _check_node(request, source)
            continue
        if not data:
            return
        for at in range(0, len(data), PIECE):
            yield data[at : at + PIECE]


async def _check_node(request: web.Request, source: Source) -> None:
    """A machine that is gone says nothing, and its connections look alive."""
    assert source.job.node is not None
    async with state.of(request).database.connection() as connection:
        if await nodes.file_server(connection, source.job.node) is None:
            raise aiohttp.ClientError("its node's lease is over")
